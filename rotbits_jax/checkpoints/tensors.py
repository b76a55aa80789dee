"""Conversion between the named tensors of a checkpoint and the parameters of a model.

A unit is a layer, or all parameters outside the layers. In this file, a unit is named
by the index of the layer, or by None for the parameters outside the layers.

A tensor may differ from the parameters that it holds: it may be transposed, and it may
hold several parameters, stacked along its first axis.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import factors
from rotbits_jax.checkpoints import families
from rotbits_jax.checkpoints import lazy

Params = dict[str, Any]

_DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
_SHOWN = 8  # names listed in an error
_COMPARED = 1 << 24  # bytes compared at a time


class Entry(NamedTuple):
  """A tensor that a checkpoint with a given config must have.

  Attributes:
    name: name of the tensor in the checkpoint.
    paths: paths of the parameters that it holds, stacked along its first axis. The
      paths are those within the unit.
    lengths: length of each parameter's part along the first axis.
    shape: shape of the tensor.
    transposed: whether the tensor is `[out, in]` and the parameters are `[in, out]`.
  """

  name: str
  paths: tuple[str, ...]
  lengths: tuple[int, ...]
  shape: tuple[int, ...]
  transposed: bool


class Parameters:
  """The parameters of a checkpoint, read from its tensors when they are requested.

  The constructor checks the names, shapes and dtypes of the tensors.

  Attributes:
    config: sizes and switches. If the given config says that the head is tied, but the
      checkpoint stores a head, this config says that it is not tied.
    numbers: how many numbers all tensors hold.
    nbytes: how many bytes all tensors hold.
  """

  def __init__(
    self, tensors: Mapping[str, lazy.LazyTensor], config: models.ModelConfig
  ):
    """Matches the tensors with the parameters that a model with this config has.

    Args:
      tensors: the tensors by their names in the checkpoint.
      config: sizes and switches.

    Raises:
      CheckpointError: if a tensor is missing or unknown, or has a wrong shape or dtype,
        or if a head that must be tied differs from the embedding.
    """
    self.config = config = _untied(tensors, config)
    self.numbers = sum(tensor.size for tensor in tensors.values())
    self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
    self._entries = {unit: list(entries(config, unit)) for unit in units(config)}
    known = [entry for unit in self._entries.values() for entry in unit]
    joined = factors.join(tensors, [x.name for x in known if len(x.paths) == 1])
    buffers = {name for name in joined if families.is_buffer(name)}
    _check_names(joined.keys() - buffers, {entry.name for entry in known})
    for entry in known:
      tensor = joined[entry.name]
      if tensor.shape != entry.shape:
        raise errors.CheckpointError(
          f'{entry.name}: expected shape {entry.shape}, got {tensor.shape}'
        )
      if tensor.dtype not in _DTYPES:
        raise errors.CheckpointError(
          f'{entry.name}: expected float16, bfloat16 or float32, got {tensor.dtype}'
        )
    self._tensors, self._buffers = joined, sorted(buffers)

  def read(self, layer: int | None) -> Params:
    """Reads the parameters of a unit.

    Args:
      layer: the layer; None for the parameters outside the layers.

    Returns:
      Nested dicts. Leaves are views of the tensors' arrays, or `structured.LowRank`
      leaves of such views.
    """
    found: Params = {}
    for entry in self._entries[layer]:
      tensor = self._tensors[entry.name]
      if isinstance(tensor, structured.LowRank):
        parts = [dataclasses.replace(tensor, u=tensor.u.read(), v=tensor.v.read())]
      else:
        parts = np.split(tensor.read(), np.cumsum(entry.lengths)[:-1])
      for path, part in zip(entry.paths, parts, strict=True):
        found[path] = part.T if entry.transposed else part
    return structured.unflatten(found)

  def buffers(self) -> dict[str, np.ndarray]:
    """Returns copies of the tensors that the forward pass does not use, by name."""
    return {name: np.array(self._tensors[name].read()) for name in self._buffers}

  def specs(self, layer: int | None) -> Params:
    """Returns the result of `read` with a `lazy.TensorSpec` in place of each array."""
    found: Params = {}
    for entry in self._entries[layer]:
      tensor = self._tensors[entry.name]
      turned = entry.transposed
      if isinstance(tensor, structured.LowRank):
        u, v = (_spec(factor, turned) for factor in (tensor.u, tensor.v))
        u, v = (v, u) if turned else (u, v)
        found[entry.paths[0]] = dataclasses.replace(tensor, u=u, v=v)
        continue
      for path, length in zip(entry.paths, entry.lengths, strict=True):
        part = lazy.TensorSpec((length, *entry.shape[1:]), tensor.dtype)
        found[path] = _spec(part, turned)
    return structured.unflatten(found)

  def model(self) -> models.Model:
    """Reads the whole model into memory, one layer at a time."""
    key = lambda layer: models.stack_key(self.specs(layer))
    # Copied, so that no array is a view of a file. Stacking copies the layers, too.
    params = jax.tree.map(np.array, self.read(None))
    for layers in models.stack_ranges(range(self.config.num_layers), key):
      stack = models.stack_layers(map(self.read, layers), len(layers))
      params[models.names.stack(layers)] = stack
    return models.Model(params, self.buffers(), self.config)


def from_tensors(
  tensors: Mapping[str, np.ndarray], config: models.ModelConfig
) -> models.Model:
  """Makes a model from the tensors of a checkpoint.

  If the config says that the head is tied, but there is a tensor for the head, it must
  equal the embedding. The model then has the head as a parameter, and its config says
  that the head is not tied. Two factors of a weight, see `factors`, become a
  `structured.LowRank`.

  Args:
    tensors: the tensors by their names in the checkpoint.
    config: sizes and switches.

  Returns:
    The model; its leaves are NumPy arrays of the tensors' dtypes.

  Raises:
    CheckpointError: if a tensor is missing or unknown, or has a wrong shape or dtype,
      or if a head that must be tied differs from the embedding.
  """
  known = {name: lazy.LazyTensor.of(tensor) for name, tensor in tensors.items()}
  return Parameters(known, config).model()


def to_tensors(model: models.Model) -> dict[str, np.ndarray]:
  """Makes the tensors of a checkpoint from a model: the inverse of `from_tensors`.

  Args:
    model: the model. Structured leaves are materialized, except pairs of factors.

  Returns:
    The tensors by their names in the checkpoint.
  """
  tensors = dict(model.buffers)
  for unit, params in unit_params(model):
    parts = tensors_of(entries(model.config, unit), structured.flatten(params))
    tensors |= {
      name: np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
      for name, arrays in parts.items()
    }
  return {name: np.asarray(x) for name, x in tensors.items()}


def unit_params(model: models.Model) -> Iterator[tuple[int | None, Params]]:
  """Yields the parameters of each unit: outside the layers first, then layer by layer.

  Args:
    model: the model.

  Yields:
    The unit and its parameters. Dependent leaves are expanded.
  """
  yield None, models.expand(model.outer())
  yield from enumerate(model.layers())


def units(config: models.ModelConfig) -> tuple[int | None, ...]:
  """Returns all units: None for the parameters outside the layers, then each layer."""
  return (None, *range(config.num_layers))


def unit_name(layer: int | None) -> str:
  """Returns the prefix of the paths of a unit's parameters in the whole model."""
  return models.names.prefix(layer)


def entries(config: models.ModelConfig, layer: int | None) -> Iterator[Entry]:
  """Yields the tensors of a layer, or outside the layers if `layer` is None."""
  family = families.family(config.family)
  if layer is None:
    shapes, rows, prefix = models.outer_shapes(config), family.outer, ''
  else:
    shapes, rows = models.layer_shapes(config, layer), family.layer
    prefix = f'{family.layer_prefix}{layer}.'
  flat = structured.flatten(shapes)
  for row in rows:
    if row.paths[0] in flat:  # otherwise the model has no such tensor
      parts = [flat[path] for path in row.paths]
      if row.transposed:
        parts = [part[::-1] for part in parts]
      lengths = tuple(part[0] for part in parts)
      shape = (sum(lengths), *parts[0][1:])
      yield Entry(f'{prefix}{row.name}', row.paths, lengths, shape, row.transposed)


def tensors_of(
  known: Iterable[Entry], params: Mapping[str, Any]
) -> dict[str, list[np.ndarray]]:
  """Makes the tensors that hold the given parameters.

  Args:
    known: the tensors of the unit.
    params: leaves by path. Structured leaves are materialized, except pairs of factors.
      The bias of a linear layer must come with its kernel.

  Returns:
    The parts of each tensor, in order along the first axis, by the name of the tensor.
    Tensors that hold none of the parameters are omitted.
  """
  found: dict[str, Any] = {}
  for entry in known:
    if not any(path in params for path in entry.paths):
      continue
    parts = [params[path] for path in entry.paths]
    if len(parts) == 1 and isinstance(parts[0], structured.FactorPair):
      found[entry.name] = parts[0].T if entry.transposed else parts[0]
      continue
    arrays = [np.asarray(part) for part in structured.materialize(parts)]
    found[entry.name] = [x.T for x in arrays] if entry.transposed else arrays
  return {
    name: parts if isinstance(parts, list) else [np.asarray(parts)]
    for name, parts in factors.split(found).items()
  }


def is_sliced(tensors: Mapping[str, Any]) -> bool:
  """Returns whether tensors with these names belong to a sliced model."""
  return any(name.endswith(f'.{families.SHORTCUT_NAME}') for name in tensors)


def _untied(
  tensors: Mapping[str, lazy.LazyTensor], config: models.ModelConfig
) -> models.ModelConfig:
  if not config.tied_head:
    return config
  untied = dataclasses.replace(config, tied_head=False)
  names = {entry.paths[0]: entry.name for entry in entries(untied, None)}
  head, embedding = names['head/kernel'], names['embed/tokens']
  if head not in tensors:
    return config
  if embedding in tensors and not _same_bits(tensors[head], tensors[embedding]):
    raise errors.CheckpointError(
      f'{head} differs from {embedding}, but the config says that they are tied'
    )
  return untied


def _same_bits(a: lazy.LazyTensor, b: lazy.LazyTensor) -> bool:
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  x, y = np.atleast_1d(a.read()), np.atleast_1d(b.read())
  bits = lambda x: np.ascontiguousarray(x).view(np.uint8)
  rows = max(1, _COMPARED // max(x[:1].nbytes, 1))
  return all(
    np.array_equal(bits(x[i : i + rows]), bits(y[i : i + rows]))
    for i in range(0, len(x), rows)
  )


def _check_names(got: set[str], expected: set[str]) -> None:
  problems = []
  for kind, names in (('missing', expected - got), ('unknown', got - expected)):
    if names:
      shown = ', '.join(sorted(names)[:_SHOWN])
      rest = len(names) - _SHOWN
      problems.append(f'{kind}: {shown}' + (f' and {rest} more' if rest > 0 else ''))
  if problems:
    raise errors.CheckpointError(f'tensors of the checkpoint: {"; ".join(problems)}')


def _spec(spec: lazy.TensorSpec, transposed: bool) -> lazy.TensorSpec:
  shape = spec.shape[::-1] if transposed else spec.shape
  return lazy.TensorSpec(shape, spec.dtype)

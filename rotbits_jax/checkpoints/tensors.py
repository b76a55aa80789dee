"""A checkpoint's named tensors to and from the parameters of a model."""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import itertools
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
  """A tensor that a config calls for.

  Attributes:
    name: of the tensor.
    paths: the parameters that it holds, stacked along its first axis; without the
      layer's own prefix.
    lengths: of each parameter's part of the first axis.
    shape: of the tensor.
    transposed: the tensor is `[out, in]`, the parameters are `[in, out]`.
  """

  name: str
  paths: tuple[str, ...]
  lengths: tuple[int, ...]
  shape: tuple[int, ...]
  transposed: bool


class Parameters:
  """The parameters of a checkpoint, read from its tensors when they are asked for.

  Names, shapes and dtypes are checked when the object is made.

  Attributes:
    config: sizes and switches. A head that is stored though the config says it is tied
      is no longer tied here.
    numbers: how many numbers all tensors hold.
    nbytes: how many bytes all tensors hold.
  """

  def __init__(
    self, tensors: Mapping[str, lazy.LazyTensor], config: models.ModelConfig
  ):
    """Matches the tensors with the parameters that the config calls for.

    Args:
      tensors: the tensors by the names that they have in the checkpoint.
      config: sizes and switches.

    Raises:
      CheckpointError: if a tensor is missing, unknown, or of a wrong shape or dtype, or
        if a head that must be tied differs from the embedding.
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
    """The parameters of a layer, or those outside the layers.

    Args:
      layer: the layer; None for the parameters outside the layers.

    Returns:
      Nested dicts of views of the tensors' arrays, and of `structured.LowRank` leaves
      of such views.
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
    """Copies of the tensors that take no part in the mathematics, by their names."""
    return {name: np.array(self._tensors[name].read()) for name in self._buffers}

  def specs(self, layer: int | None) -> Params:
    """What `read` returns, with a `lazy.TensorSpec` in place of each array."""
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
    """The whole model in memory, besides which one layer at a time is read."""
    key = lambda layer: models.stack_key(self.specs(layer))
    # Copied like the layers, which get stacked: nothing hangs on the files any more.
    params = jax.tree.map(np.array, self.read(None))
    runs = itertools.groupby(range(self.config.num_layers), key)
    for index, (_, run) in enumerate(runs):
      layers = list(run)
      params[f'blocks_{index}'] = models.stack_layers(
        map(self.read, layers), len(layers)
      )
    return models.Model(params, self.buffers(), self.config)


def from_tensors(
  tensors: Mapping[str, np.ndarray], config: models.ModelConfig
) -> models.Model:
  """Builds a model from the tensors of a checkpoint.

  A head that is stored though the config says it is tied is kept if it equals the
  embedding: the model's config then says that it is not tied. Two factors of a weight,
  see `factors`, become a `structured.LowRank`.

  Args:
    tensors: the tensors by the names that they have in the checkpoint.
    config: sizes and switches.

  Returns:
    The model; its leaves are NumPy arrays of the tensors' dtypes.

  Raises:
    CheckpointError: if a tensor is missing, unknown, or of a wrong shape or dtype.
  """
  known = {name: lazy.LazyTensor.of(tensor) for name, tensor in tensors.items()}
  return Parameters(known, config).model()


def to_tensors(model: models.Model) -> dict[str, np.ndarray]:
  """The tensors of a model's checkpoint: the inverse of `from_tensors`.

  Args:
    model: the model; structured leaves are materialized, but for pairs of factors.

  Returns:
    The tensors by the names that they have in the checkpoint.
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
  """The parameters outside the layers, and of each layer in order.

  Args:
    model: the model.

  Yields:
    None or the layer, and its parameters; leaves that need other parameters are
    expanded.
  """
  yield None, models.expand(model.outer())
  yield from enumerate(model.layers())


def units(config: models.ModelConfig) -> tuple[int | None, ...]:
  """None, for the parameters outside the layers, and each layer."""
  return (None, *range(config.num_layers))


def unit_name(layer: int | None) -> str:
  """What the paths of a layer's parameters begin with in the whole model."""
  return '' if layer is None else f'layers.{layer}/'


def entries(config: models.ModelConfig, layer: int | None) -> Iterator[Entry]:
  """The tensors of a layer, or those outside the layers if it is None."""
  family = families.family(config.family)
  if layer is None:
    shapes, rows, prefix = models.outer_shapes(config), family.outer, ''
  else:
    shapes, rows = models.layer_shapes(config, layer), family.layer
    prefix = f'{family.layer_prefix}{layer}.'
  flat = structured.flatten(shapes)
  for row in rows:
    if row.paths[0] in flat:  # else the model has no such tensor
      parts = [flat[path] for path in row.paths]
      if row.transposed:
        parts = [part[::-1] for part in parts]
      lengths = tuple(part[0] for part in parts)
      shape = (sum(lengths), *parts[0][1:])
      yield Entry(f'{prefix}{row.name}', row.paths, lengths, shape, row.transposed)


def tensors_of(
  known: Iterable[Entry], params: Mapping[str, Any]
) -> dict[str, list[np.ndarray]]:
  """The tensors that hold some parameters.

  Args:
    known: the tensors of the unit.
    params: leaves by path; structured leaves are materialized, but for pairs of
      factors. A linear's bias must come with its kernel.

  Returns:
    The parts of each tensor by its name, stacked along the first axis. Tensors without
    any parameter among `params` are left out.
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
  """Whether tensors with these names are a sliced model's."""
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
      f'{head} differs from {embedding} though the config says that they are tied'
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

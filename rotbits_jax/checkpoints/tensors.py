"""A checkpoint's named tensors to and from a `Model`."""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import ml_dtypes
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import factors
from rotbits_jax.checkpoints import families

_DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
_SHOWN = 8  # names listed in an error


class _Entry(NamedTuple):
  """A tensor that a config calls for."""

  name: str
  layer: int | None  # None: outside the layers
  paths: tuple[str, ...]
  lengths: list[int]  # of each path's part of the first axis
  shape: tuple[int, ...]
  transposed: bool


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
  config = _untied(tensors, config)
  entries = list(_entries(config))
  tensors = factors.join(tensors, [x.name for x in entries if len(x.paths) == 1])
  buffers = {n: np.array(t) for n, t in tensors.items() if families.is_buffer(n)}
  _check_names(tensors.keys() - buffers.keys(), {entry.name for entry in entries})
  outer: dict[str, Any] = {}
  layers: list[dict[str, Any]] = [{} for _ in range(config.num_layers)]
  for entry in entries:
    tensor = tensors[entry.name]
    if tensor.shape != entry.shape:
      raise errors.CheckpointError(
        f'{entry.name}: expected shape {entry.shape}, got {tensor.shape}'
      )
    if tensor.dtype not in _DTYPES:
      raise errors.CheckpointError(
        f'{entry.name}: expected float16, bfloat16 or float32, got {tensor.dtype}'
      )
    target = outer if entry.layer is None else layers[entry.layer]
    parts = [tensor]
    if len(entry.paths) > 1:
      parts = np.split(tensor, np.cumsum(entry.lengths)[:-1])
    for path, part in zip(entry.paths, parts, strict=True):
      target[path] = part.T if entry.transposed else part
  # Copied like the layers, which get stacked: nothing hangs on the files any more.
  return models.from_layers(
    config,
    _nested(jax.tree.map(np.array, outer)),
    [_nested(layer) for layer in layers],
    buffers,
  )


def to_tensors(model: models.Model) -> dict[str, np.ndarray]:
  """The tensors of a model's checkpoint: the inverse of `from_tensors`.

  Args:
    model: the model; structured leaves are materialized, but for pairs of factors.

  Returns:
    The tensors by the names that they have in the checkpoint.
  """
  model = model.materialize(but=(structured.FactorPair,))
  outer = _flat(model.outer())
  layers = [_flat(layer) for layer in model.layers()]
  tensors = {}
  for entry in _entries(model.config):
    source = outer if entry.layer is None else layers[entry.layer]
    parts = [source[path] for path in entry.paths]
    if len(parts) > 1:
      parts = structured.materialize(parts)
    if entry.transposed:
      parts = [part.T for part in parts]
    tensors[entry.name] = np.concatenate(parts) if len(parts) > 1 else parts[0]
  tensors = factors.split(tensors) | model.buffers
  return {name: np.asarray(x) for name, x in tensors.items()}


def is_sliced(tensors: Mapping[str, np.ndarray]) -> bool:
  """Whether tensors with these names are a sliced model's."""
  return any(name.endswith(f'.{families.SHORTCUT_NAME}') for name in tensors)


def _entries(config: models.ModelConfig) -> Iterator[_Entry]:
  """The tensors of a model with this config."""
  family = families.family(config.family)
  shapes = _flat(models.outer_shapes(config))
  for row in family.outer:
    yield from _entry(row, row.name, None, shapes)
  for layer in range(config.num_layers):
    shapes = _flat(models.layer_shapes(config, layer))
    for row in family.layer:
      name = f'{family.layer_prefix}{layer}.{row.name}'
      yield from _entry(row, name, layer, shapes)


def _entry(
  row: families.TensorRow, name: str, layer: int | None, shapes: dict[str, Any]
) -> Iterator[_Entry]:
  """The row's tensor, if the model has it."""
  if row.paths[0] not in shapes:
    return
  parts = [shapes[path] for path in row.paths]
  if row.transposed:
    parts = [shape[::-1] for shape in parts]
  lengths = [shape[0] for shape in parts]
  shape = (sum(lengths), *parts[0][1:])
  yield _Entry(name, layer, row.paths, lengths, shape, row.transposed)


def _untied(
  tensors: Mapping[str, np.ndarray], config: models.ModelConfig
) -> models.ModelConfig:
  if not config.tied_head:
    return config
  untied = dataclasses.replace(config, tied_head=False)
  names = {entry.paths[0]: entry.name for entry in _entries(untied)}
  head, embedding = names['head.kernel'], names['embed.tokens']
  if head not in tensors:
    return config
  if embedding in tensors and not _same_bits(tensors[head], tensors[embedding]):
    raise errors.CheckpointError(
      f'{head} differs from {embedding} though the config says that they are tied'
    )
  return untied


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  bits = lambda x: np.ascontiguousarray(x).view(np.uint8)
  return np.array_equal(bits(a), bits(b))


def _check_names(got: set[str], expected: set[str]) -> None:
  problems = []
  for kind, names in (('missing', expected - got), ('unknown', got - expected)):
    if names:
      shown = ', '.join(sorted(names)[:_SHOWN])
      rest = len(names) - _SHOWN
      problems.append(f'{kind}: {shown}' + (f' and {rest} more' if rest > 0 else ''))
  if problems:
    raise errors.CheckpointError(f'tensors of the checkpoint: {"; ".join(problems)}')


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep='.')


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
  return traverse_util.unflatten_dict(flat, sep='.')

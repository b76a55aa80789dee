"""The tensors of a checkpoint: read when they are needed, and named as a family does.

Files are read into memory, not mapped: a map of a file that shrinks ends the process.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import itertools
import math
import os
import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import families
from rotbits_jax.system import files
from rotbits_jax.system import host

# The dtypes, and their names in safetensors and in PyTorch; None where there is none.
DTYPES: tuple[tuple[np.dtype, str, str | None], ...] = (
  (np.dtype(np.float64), 'F64', 'DoubleStorage'),
  (np.dtype(np.float32), 'F32', 'FloatStorage'),
  (np.dtype(np.float16), 'F16', 'HalfStorage'),
  (np.dtype(ml_dtypes.bfloat16), 'BF16', 'BFloat16Storage'),
  (np.dtype(ml_dtypes.float8_e4m3fn), 'F8_E4M3', None),
  (np.dtype(ml_dtypes.float8_e5m2), 'F8_E5M2', None),
  (np.dtype(np.int64), 'I64', 'LongStorage'),
  (np.dtype(np.int32), 'I32', 'IntStorage'),
  (np.dtype(np.int16), 'I16', 'ShortStorage'),
  (np.dtype(np.int8), 'I8', 'CharStorage'),
  (np.dtype(np.uint64), 'U64', None),
  (np.dtype(np.uint32), 'U32', None),
  (np.dtype(np.uint16), 'U16', None),
  (np.dtype(np.uint8), 'U8', 'ByteStorage'),
  (np.dtype(np.bool_), 'BOOL', 'BoolStorage'),
)
_MOST_NAME = 500  # characters
_MOST_AXES = 32  # NumPy supports no more on all versions
_PIECE = 1 << 23  # bytes that are made contiguous at a time

# Names that other programs obey (`.git`, `.envrc`), take as options, or run.
_is_harmful = re.compile(r'[.~-].*|__pycache__', re.DOTALL | re.IGNORECASE).fullmatch


def is_relative_path(path: str, levels: int = 8) -> bool:
  """Returns whether a printable path leads to a file in a folder or its sub-folders.

  No part is hidden, except '.gitattributes' alone, nor begins with a dash or '~'.
  """
  names = path.split('/')
  is_name = lambda x: 0 < len(x.encode()) <= 255 and not _is_harmful(x)
  fits = len(names) <= levels and (all(map(is_name, names)) or path == '.gitattributes')
  return fits and path.isprintable() and '\\' not in path


@dataclasses.dataclass(frozen=True)
class TensorSpec:
  """Shape and dtype of a tensor."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize

  def check(self, name: str) -> None:
    """Refuses a name that errors would repeat at length, and what NumPy cannot hold."""
    if len(name) > _MOST_NAME:
      text = f'the name has {len(name)} characters, more than {_MOST_NAME}'
      raise errors.CheckpointError(f'{errors.cut(name)}: {text}')
    size = math.prod(n for n in self.shape if n) * self.dtype.itemsize
    if len(self.shape) > _MOST_AXES or size >= 1 << 63:
      text = f'the shape {errors.cut(str(self.shape))} is too large'
      raise errors.CheckpointError(f'{name}: {text}')


@dataclasses.dataclass(frozen=True)
class LazyTensor(TensorSpec):
  """A tensor whose elements are read, each time anew, when they are requested."""

  read: Callable[[], np.ndarray]


def read(file: files.File, offset: int, size: int) -> tuple[np.ndarray, int]:
  """Reads a part of a file: uint8 `[size]`, aligned for JAX, and its CRC-32."""
  with errors.named(file.path):
    if offset < 0 or size < 0 or offset + size > file.size:
      raise errors.CheckpointError('the file is truncated')
    array = host.empty((size,), np.uint8)
    return array, file.read(offset, array)


def content(path: str | os.PathLike[str], most: int) -> bytes:
  """Returns the content of a file of at most `most` bytes."""
  with errors.named(path, ValueError):
    return files.File.of(path).content(most)


def row_major(array: np.ndarray) -> Iterator[memoryview]:
  """Yields the bytes of an array, often a transposed kernel, row by row in pieces."""
  whole = array if array.ndim else array[None]
  row_bytes = max(whole.nbytes // max(len(whole), 1), 1)
  step = len(whole) if whole.flags.c_contiguous else _PIECE // row_bytes
  for start in range(0, len(whole), max(step, 1)):
    piece = host.contiguous(whole[start : start + max(step, 1)])
    yield memoryview(piece.reshape(-1).view(np.uint8))


class Checkpoint(NamedTuple):
  """A model, the files beside its weights by name, and the stem of a sliced one."""

  model: models.Model
  files: dict[str, bytes]
  stem: str | None

  def __repr__(self) -> str:
    """Returns one line: a notebook would print the bytes of every file."""
    return f'Checkpoint({self.model!r}, files={sorted(self.files)}, stem={self.stem!r})'


class ExpectedTensor(NamedTuple):
  """A tensor of a checkpoint, and the parameters that it holds.

  Several parameters are stacked along the tensor's first axis.
  """

  name: str
  shape: tuple[int, ...]
  parameters: dict[str, tuple[int, ...]]  # the shapes by path
  transposed: bool = False  # whether it is [out, in], and the parameters are [in, out]

  def read(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the parameters by path, as views of the tensor."""
    arrays, axis = [tensor], -1 if self.transposed else 0
    if len(self.parameters) > 1:
      lengths = [shape[axis] for shape in self.parameters.values()]
      arrays = np.split(tensor, np.cumsum(lengths)[:-1])
    arrays = [array.T for array in arrays] if self.transposed else arrays
    return dict(zip(self.parameters, arrays, strict=True))

  def write(self, leaves: Sequence[Any]) -> list[np.ndarray]:
    """Returns the tensor, divided along its first axis, from its leaves in order."""
    arrays = [np.asarray(leaf) for leaf in structured.materialize(list(leaves))]
    return [x.T for x in arrays] if self.transposed else arrays


Records = dict[str, list[ExpectedTensor]]


def entries(config: models.ModelConfig, buffers: Mapping[str, Any]) -> Records:
  """Returns the tensors of a checkpoint by record, see `models.names`.

  `buffers` have the shapes of the tensors that the forward pass does not use, by name.
  """
  family, records = families.FAMILIES[config.family], {}
  for index in range(config.num_layers):
    name, prefix = models.names.layer(index), f'{family.layer_prefix}{index}.'
    shapes = models.layer_shapes(config, index)
    records[name] = _entries(family.layer, shapes, prefix, f'{name}/')
  records |= outer_entries(config)
  for name, buffer in sorted(buffers.items()):
    shapes = {f'{models.names.BUFFERS}/{name}': buffer.shape}
    entry = ExpectedTensor(name, buffer.shape, shapes)
    records.setdefault(models.names.BUFFERS, []).append(entry)
  return records


def outer_entries(config: models.ModelConfig) -> Records:
  """Returns the tensors outside the layers by record, see `entries`."""
  modules, shapes = families.FAMILIES[config.family].outer, models.outer_shapes(config)
  records: dict[str, list[ExpectedTensor]] = {}
  for entry in _entries(modules, shapes, '', ''):
    records.setdefault(next(iter(entry.parameters)).split('/')[0], []).append(entry)
  return records


def _entries(
  modules: dict[str, str], shapes: models.Params, prefix: str, path_prefix: str
) -> list[ExpectedTensor]:
  """Returns the tensors of those modules whose parameters a model has."""
  flat, tensors = structured.flatten(shapes), []
  for module, module_paths in modules.items():
    is_shortcut = module.endswith('_shortcut')
    for key in ('', '/kernel', '/scale', '/bias'):
      suffix = '.bias' if key == '/bias' else '.weight'
      paths = [f'{path}{key}' for path in module_paths.split()]
      if paths[0] in flat:
        name = f'{prefix}{module}{families.SHORTCUT_SUFFIX if is_shortcut else suffix}'
        transposed = key == '/kernel' and not is_shortcut
        slices = [flat[path][::-1] if transposed else flat[path] for path in paths]
        shape = (sum(x[0] for x in slices), *slices[0][1:])
        parameters = {f'{path_prefix}{path}': flat[path] for path in paths}
        tensors.append(ExpectedTensor(name, shape, parameters, transposed))
  return tensors


def leaves_of(model: models.Model) -> dict[str, Any]:
  """Returns the unstacked leaves of a model by path, each of which needs no other."""
  leaves = dict(model.leaves())
  for path, leaf in leaves.items():
    if structured.is_structured(leaf) and leaf.needs:
      needed = {x: leaves[x] for x in (path, *leaf.needs)}
      leaves[path] = structured.expand(needed)[path]
  return leaves | {f'{models.names.BUFFERS}/{k}': x for k, x in model.buffers.items()}


def to_tensors(model: models.Model) -> dict[str, np.ndarray]:
  """Makes the tensors of a checkpoint, by name, from a model, which is materialized."""
  leaves = leaves_of(model)
  tensors = {}
  for entry in itertools.chain(*entries(model.config, model.buffers).values()):
    arrays = entry.write([leaves[path] for path in entry.parameters])
    tensors[entry.name] = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
  return tensors

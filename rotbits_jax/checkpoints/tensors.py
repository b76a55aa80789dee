"""The tensors of a checkpoint: read when they are needed, and named as a family does.

Shape and dtype of a tensor are known at once, the elements are read later. Files are
read into memory, not mapped: a map of a file that shrinks ends the process.

A tensor may differ from the parameters that it holds: it may be transposed, and it may
hold several parameters, stacked along its first axis.

Raises:
  CheckpointError: if there is no such file, or if it changed after it was opened.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import math
import os
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import families
from rotbits_jax.system import files
from rotbits_jax.system import host

MAX_AXES = 32  # of a tensor, because NumPy supports no more on all versions
_MOST_NAME = 500  # characters
_POINTER, _MOST_POINTER = b'version https://git-lfs', 1 << 10  # bytes
_PIECE = 1 << 23  # bytes that are made contiguous at a time
_TILE = 64  # rows and columns that are transposed at a time


@dataclasses.dataclass(frozen=True)
class TensorSpec:
  """Shape and dtype of a tensor."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class LazyTensor(TensorSpec):
  """A tensor whose elements are read when they are requested.

  Attributes:
    read: returns the array. Each call reads the file again.
  """

  read: Callable[[], np.ndarray]

  @property
  def spec(self) -> TensorSpec:
    return TensorSpec(self.shape, self.dtype)

  @classmethod
  def of(cls, array: np.ndarray) -> 'LazyTensor':
    """Makes the tensor for an array in memory."""
    return cls(array.shape, array.dtype, lambda: array)

  @classmethod
  def in_file(cls, file: files.File, offset: int, spec: TensorSpec) -> 'LazyTensor':
    """Makes the tensor whose elements begin at an offset of a file, in C order."""

    def read_tensor() -> np.ndarray:
      return read(file, offset, spec.nbytes).view(spec.dtype).reshape(spec.shape)

    return cls(spec.shape, spec.dtype, read_tensor)


def numpy_holds(shape: Sequence[int], dtype: np.dtype) -> bool:
  """Returns whether NumPy supports arrays of this shape, even empty ones."""
  size = math.prod(n for n in shape if n) * dtype.itemsize
  return len(shape) <= MAX_AXES and size < 1 << 63


def check_name(name: str) -> None:
  """Refuses a tensor's name that is too long, because errors and files repeat it."""
  if len(name) > _MOST_NAME:
    raise errors.CheckpointError(
      f'{errors.cut(name)}: the name has {len(name)} characters, more than {_MOST_NAME}'
    )


# ---- files ---------------------------------------------------------------------------


@contextlib.contextmanager
def _errors_name(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns errors of the system into a `CheckpointError` with the path of the file."""
  try:
    yield
  except OSError as e:
    text = f'{path}: {e.strerror}' if e.strerror else str(e)
    raise errors.CheckpointError(text) from e


def opened(path: str | os.PathLike[str]) -> files.File:
  """Records the present state of a weights file."""
  with _errors_name(path):
    file = files.File.of(path)
    is_pointer = file.size < _MOST_POINTER and file.content().startswith(_POINTER)
  if is_pointer:
    raise errors.CheckpointError(
      f'{path}: a pointer of Git LFS, not the weights; `git lfs pull` gets them'
    )
  return file


def read(file: files.File, offset: int, size: int) -> np.ndarray:
  """Reads a part of a file into memory, see `read_with_crc32`."""
  return read_with_crc32(file, offset, size)[0]


def read_with_crc32(file: files.File, offset: int, size: int) -> tuple[np.ndarray, int]:
  """Reads a part of a file into memory.

  Returns:
    uint8 `[size]`, aligned so that JAX needs no copy; and its CRC-32.
  """
  if offset < 0 or size < 0 or offset + size > file.size:
    raise errors.CheckpointError(f'{file.path}: the file is truncated')
  array = host.empty((size,), np.uint8)
  with _errors_name(file.path):
    crc = file.read(offset, array)
  return array, crc


def content(path: str | os.PathLike[str], most: int) -> bytes:
  """Returns the content of a file of at most `most` bytes."""
  with _errors_name(path):
    file = files.File.of(path)
    if file.size > most:
      raise errors.CheckpointError(
        f'{path}: the file has {file.size} bytes, more than {most}'
      )
    return file.content()


def row_major(array: np.ndarray) -> Iterator[memoryview]:
  """Yields the bytes of an array in row-major order, piece by piece.

  Args:
    array: an array with any strides. Often it is a transposed kernel.

  Yields:
    The bytes of the next few rows, contiguous. They are valid until the next piece is
    requested.
  """
  if array.flags.c_contiguous:
    yield memoryview(array.reshape(-1).view(np.uint8))
    return
  # NumPy copies 16-bit integers much faster than the float dtypes of ml_dtypes.
  bits = array.view(np.dtype(f'u{array.dtype.itemsize}'))
  rows = max(_TILE, _PIECE // max(array[0].nbytes, 1) // _TILE * _TILE)
  transposed = array.ndim == 2 and abs(array.strides[0]) < abs(array.strides[1])
  for start in range(0, len(bits), rows):
    piece = bits[start : start + rows]
    if transposed:
      copy = np.empty(piece.shape, piece.dtype)
      for i in range(0, piece.shape[0], _TILE):
        for j in range(0, piece.shape[1], _TILE):
          tile = slice(i, i + _TILE), slice(j, j + _TILE)
          copy[tile] = piece[tile]
      piece = copy
    yield memoryview(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))


# ---- the tensors of a model ----------------------------------------------------------


class Checkpoint(NamedTuple):
  """A model and the other files of its checkpoint directory.

  Attributes:
    model: the parameters and their config.
    files: bytes of the sidecar files (configs, tokenizer) beside the weights, by name.
    stem: file name, without suffix, that SliceGPT gave to the weights and the slicing
      JSON; None if the model is dense.
  """

  model: models.Model
  files: dict[str, bytes]
  stem: str | None

  def __repr__(self) -> str:
    """Returns one line: a notebook would print the bytes of every file."""
    return f'Checkpoint({self.model!r}, files={sorted(self.files)}, stem={self.stem!r})'


class ExpectedTensor(NamedTuple):
  """A tensor that a checkpoint with a given config must have.

  Attributes:
    name: name of the tensor in the checkpoint.
    shape: shape of the tensor.
    paths: paths of the parameters that it holds, stacked along its first axis.
    lengths: length of each parameter's part along the first axis.
    transposed: whether the tensor is `[out, in]` and the parameters are `[in, out]`.
  """

  name: str
  shape: tuple[int, ...]
  paths: tuple[str, ...]
  lengths: tuple[int, ...]
  transposed: bool

  def stored(self) -> dict[str, tuple[int, ...]]:
    """Returns the shape of the tensor by its name."""
    return {self.name: self.shape}

  def parameters(self) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters by path."""
    slices = [(length, *self.shape[1:]) for length in self.lengths]
    shapes = [shape[::-1] for shape in slices] if self.transposed else slices
    return dict(zip(self.paths, shapes, strict=True))

  def read(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the parameters by path, as views of the tensor."""
    arrays = np.split(tensor, np.cumsum(self.lengths)[:-1])
    arrays = [array.T for array in arrays] if self.transposed else arrays
    return dict(zip(self.paths, arrays, strict=True))

  def write(self, leaves: Sequence[Any]) -> dict[str, list[np.ndarray]]:
    """Returns the tensor, divided along its first axis, by its name.

    Args:
      leaves: the parameters in the order of `paths`. Structured leaves are
        materialized.
    """
    arrays = [np.asarray(leaf) for leaf in structured.materialize(list(leaves))]
    return {self.name: [x.T for x in arrays] if self.transposed else arrays}


def entries(config: models.ModelConfig) -> dict[str, list[ExpectedTensor]]:
  """Returns the tensors of a checkpoint by record, see `models.names`."""
  family, records = families.family(config.family), {}
  for index in range(config.num_layers):
    name, prefix = models.names.layer(index), f'{family.layer_prefix}{index}.'
    shapes = models.layer_shapes(config, index)
    records[name] = _entries(family.layer, shapes, prefix, f'{name}/')
  return records | outer_entries(config)


def outer_entries(config: models.ModelConfig) -> dict[str, list[ExpectedTensor]]:
  """Returns the tensors outside the layers by record, see `entries`."""
  rows, shapes = families.family(config.family).outer, models.outer_shapes(config)
  records: dict[str, list[ExpectedTensor]] = {}
  for entry in _entries(rows, shapes, '', ''):
    records.setdefault(entry.paths[0].split('/')[0], []).append(entry)
  return records


def _entries(
  rows: Iterable[families.TensorRow],
  shapes: models.Params,
  prefix: str,
  path_prefix: str,
) -> list[ExpectedTensor]:
  """Returns the tensors of those rows whose parameters a model has."""
  flat, tensors = structured.flatten(shapes), []
  for row in rows:
    if row.paths[0] not in flat:
      continue
    slices = [flat[path] for path in row.paths]
    slices = [shape[::-1] for shape in slices] if row.transposed else slices
    lengths = tuple(shape[0] for shape in slices)
    shape = (sum(lengths), *slices[0][1:])
    paths = tuple(path_prefix + path for path in row.paths)
    tensors.append(
      ExpectedTensor(prefix + row.name, shape, paths, lengths, row.transposed)
    )
  return tensors


def leaves_of(model: models.Model) -> dict[str, Any]:
  """Returns the unstacked leaves of a model by path, each of which needs no other."""
  leaves = dict(model.leaves())
  for path, leaf in leaves.items():
    if structured.is_structured(leaf) and leaf.needs:
      needed = {x: leaves[x] for x in (path, *leaf.needs)}
      leaves[path] = structured.expand(needed)[path]
  return leaves


def to_tensors(model: models.Model) -> dict[str, np.ndarray]:
  """Makes the tensors of a checkpoint from a model: the inverse of `from_tensors`.

  Args:
    model: the model. Structured leaves are materialized.

  Returns:
    The tensors by their names in the checkpoint.
  """
  leaves = leaves_of(model)
  tensors = {name: np.asarray(x) for name, x in model.buffers.items()}
  for record in entries(model.config).values():
    for entry in record:
      written = entry.write([leaves[path] for path in entry.paths])
      for name, arrays in written.items():
        tensors[name] = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
  return tensors

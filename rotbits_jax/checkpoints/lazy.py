"""Tensors in files: described first, read when they are asked for."""

from collections.abc import Callable, Iterator
import dataclasses
import math
import mmap
import os
import pathlib

import numpy as np

from rotbits_jax.checkpoints import errors

_PIECE = 1 << 23  # bytes made contiguous at a time
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
  """A tensor whose numbers are read when they are asked for.

  Attributes:
    read: gives the numbers. An array from a file is a read-only view of a memory map
      of its own, which ends with the last view of it.
  """

  read: Callable[[], np.ndarray]

  @classmethod
  def of(cls, array: np.ndarray) -> 'LazyTensor':
    """An array that is in memory."""
    return cls(array.shape, array.dtype, lambda: array)


@dataclasses.dataclass(frozen=True)
class File:
  """A file as it was when it was opened.

  Attributes:
    path: of the file.
    size: in bytes.
    modified: the time of its last change, in nanoseconds.
  """

  path: pathlib.Path
  size: int
  modified: int

  @classmethod
  def of(cls, path: str | os.PathLike[str]) -> 'File':
    """The file at a path, as it is now.

    Raises:
      CheckpointError: if there is none.
    """
    try:
      found = os.stat(path)
    except OSError as e:
      raise errors.CheckpointError(f'{path}: {e.strerror}') from e
    return cls(pathlib.Path(path), found.st_size, found.st_mtime_ns)

  def map(self, offset: int, size: int) -> memoryview:
    """Maps a part of the file into memory, read-only, in a map of its own.

    Args:
      offset: of the first byte.
      size: how many bytes.

    Returns:
      The bytes; the map ends with the last view of them.

    Raises:
      CheckpointError: if the file changed after it was opened, or has no such part.
    """
    if File.of(self.path) != self:
      raise errors.CheckpointError(f'{self.path}: changed after it was opened')
    if offset < 0 or size < 0 or offset + size > self.size:
      raise errors.CheckpointError(f'{self.path}: truncated')
    if not size:
      return memoryview(b'')
    before = offset % mmap.ALLOCATIONGRANULARITY
    with open(self.path, 'rb') as file:
      mapped = mmap.mmap(
        file.fileno(), before + size, access=mmap.ACCESS_READ, offset=offset - before
      )
    return memoryview(mapped)[before:]


def in_file(file: File, offset: int, spec: TensorSpec) -> LazyTensor:
  """Returns the tensor whose numbers begin at an offset of a file, in C order."""

  def read() -> np.ndarray:
    content = file.map(offset, spec.nbytes)
    return np.frombuffer(content, spec.dtype).reshape(spec.shape)

  return LazyTensor(spec.shape, spec.dtype, read)


def row_major(array: np.ndarray) -> Iterator[memoryview]:
  """The bytes of an array in row-major order, piece by piece.

  Args:
    array: with any strides; transposed kernels are the common case.

  Yields:
    The bytes of the next few rows, contiguous; valid until the next is asked for.
  """
  if array.flags.c_contiguous:
    yield memoryview(array.reshape(-1).view(np.uint8))
    return
  # NumPy copies 16-bit integers much faster than the float dtypes of ml_dtypes.
  bits = array.view(np.dtype(f'u{array.dtype.itemsize}'))
  rows = max(_TILE, _PIECE // max(array[0].nbytes, 1) // _TILE * _TILE)
  transposed = array.ndim == 2 and abs(array.strides[0]) < abs(array.strides[1])
  for start in range(0, len(bits), rows):
    part = bits[start : start + rows]
    if transposed:
      copy = np.empty(part.shape, part.dtype)
      for i in range(0, part.shape[0], _TILE):
        for j in range(0, part.shape[1], _TILE):
          tile = slice(i, i + _TILE), slice(j, j + _TILE)
          copy[tile] = part[tile]
      part = copy
    yield memoryview(np.ascontiguousarray(part).reshape(-1).view(np.uint8))

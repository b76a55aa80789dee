"""Tensors in files. Shape and dtype are known at once, the numbers are read later.

The numbers of a tensor are read from a memory map: a part of a file that the operating
system loads into memory when it is used.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math
import mmap
import os
import pathlib
import stat

import numpy as np

from rotbits_jax.checkpoints import errors

_PIECE = 1 << 23  # bytes that are made contiguous at a time
MAX_AXES = 32  # of a tensor, because NumPy supports no more on all versions
_MOST_NAME = 500  # characters
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


def numpy_holds(shape: Sequence[int], dtype: np.dtype) -> bool:
  """Returns whether NumPy supports arrays of this shape, even empty ones."""
  size = math.prod(n for n in shape if n) * dtype.itemsize
  return len(shape) <= MAX_AXES and size < 1 << 63


def check_name(name: str) -> None:
  """Checks the length of a tensor's name, which errors and files repeat.

  Raises:
    CheckpointError: if the name is too long.
  """
  if len(name) > _MOST_NAME:
    raise errors.CheckpointError(
      f'{errors.cut(name)}: the name has {len(name)} characters, more than {_MOST_NAME}'
    )


@dataclasses.dataclass(frozen=True)
class LazyTensor(TensorSpec):
  """A tensor whose numbers are read when they are requested.

  Attributes:
    read: function that returns the numbers. If they are in a file, each call makes a
      memory map, and the array is a read-only view of it. The map is closed when its
      last view is deleted.
  """

  read: Callable[[], np.ndarray]

  @classmethod
  def of(cls, array: np.ndarray) -> 'LazyTensor':
    """Makes the tensor for an array in memory."""
    return cls(array.shape, array.dtype, lambda: array)


@dataclasses.dataclass(frozen=True)
class File:
  """A file and its state when it was opened.

  Attributes:
    path: path of the file.
    size: size in bytes.
    modified: time of the last change, in nanoseconds.
  """

  path: pathlib.Path
  size: int
  modified: int

  @classmethod
  def of(cls, path: str | os.PathLike[str]) -> 'File':
    """Records the present state of the file at a path.

    Raises:
      CheckpointError: if there is no such file, or it is a pipe or the like.
    """
    try:
      found = os.stat(path)
    except OSError as e:
      raise errors.CheckpointError(f'{path}: {e.strerror}') from e
    if not stat.S_ISREG(found.st_mode):  # a pipe waits, and a device may have no end
      raise errors.CheckpointError(f'{path}: not a regular file')
    return cls(pathlib.Path(path), found.st_size, found.st_mtime_ns)

  def read(self, most: int) -> bytes:
    """Reads the whole file into memory.

    Args:
      most: the greatest size in bytes.

    Raises:
      CheckpointError: if the file is larger, or changed after it was opened.
    """
    if self.size > most:
      raise errors.CheckpointError(
        f'{self.path}: the file has {self.size} bytes, more than {most}'
      )
    with open(self.path, 'rb') as file:
      content = file.read(self.size + 1)
    if len(content) != self.size:
      raise errors.CheckpointError(f'{self.path}: the file changed after it was opened')
    return content

  def map(self, offset: int, size: int) -> memoryview:
    """Maps a part of the file into memory, read-only.

    Args:
      offset: offset of the first byte.
      size: number of bytes.

    Returns:
      The bytes. The memory map is closed when their last view is deleted.

    Raises:
      CheckpointError: if the file changed after it was opened, or does not contain this
        part.
    """
    if File.of(self.path) != self:
      raise errors.CheckpointError(f'{self.path}: the file changed after it was opened')
    if offset < 0 or size < 0 or offset + size > self.size:
      raise errors.CheckpointError(f'{self.path}: the file is truncated')
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
    part = bits[start : start + rows]
    if transposed:
      copy = np.empty(part.shape, part.dtype)
      for i in range(0, part.shape[0], _TILE):
        for j in range(0, part.shape[1], _TILE):
          tile = slice(i, i + _TILE), slice(j, j + _TILE)
          copy[tile] = part[tile]
      part = copy
    yield memoryview(np.ascontiguousarray(part).reshape(-1).view(np.uint8))

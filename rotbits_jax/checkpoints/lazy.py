"""Tensors in files. Shape and dtype are known at once, the elements are read later.

Files are read into memory, not mapped: a map of a file that shrinks ends the process.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import math
import os
from typing import Any

import numpy as np

from rotbits_jax.checkpoints import errors
from rotbits_jax.system import files
from rotbits_jax.system import host

_PIECE = 1 << 23  # bytes that are made contiguous at a time
MAX_AXES = 32  # of a tensor, because NumPy supports no more on all versions
_MOST_NAME = 500  # characters
_POINTER, _MOST_POINTER = b'version https://git-lfs', 1 << 10  # bytes
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
  def T(self) -> 'TensorSpec':  # noqa: N802
    return TensorSpec(self.shape[::-1], self.dtype)

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
  """A tensor whose elements are read when they are requested.

  Attributes:
    read: returns the tensor: an array, or a structured leaf that stands for it. Each
      call reads the file again.
  """

  read: Callable[[], Any]

  @property
  def spec(self) -> TensorSpec:
    return TensorSpec(self.shape, self.dtype)

  @classmethod
  def of(cls, array: np.ndarray) -> 'LazyTensor':
    """Makes the tensor for an array in memory."""
    return cls(array.shape, array.dtype, lambda: array)


@contextlib.contextmanager
def _errors_name(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns errors of the system into a `CheckpointError` with the path of the file."""
  try:
    yield
  except OSError as e:
    text = f'{path}: {e.strerror}' if e.strerror else str(e)
    raise errors.CheckpointError(text) from e


def opened(path: str | os.PathLike[str]) -> files.File:
  """Records the present state of a weights file.

  Raises:
    CheckpointError: if there is no such file, if it is a pipe or the like, or if Git
      left a pointer in its place.
  """
  with _errors_name(path):
    found = files.File.of(path)
    is_pointer = found.size < _MOST_POINTER and found.content().startswith(_POINTER)
  if is_pointer:
    raise errors.CheckpointError(
      f'{path}: a pointer of Git LFS, not the weights; `git lfs pull` gets them'
    )
  return found


def read(file: files.File, offset: int, size: int) -> np.ndarray:
  """Reads a part of a file into memory, see `read_with_crc32`."""
  return read_with_crc32(file, offset, size)[0]


def read_with_crc32(file: files.File, offset: int, size: int) -> tuple[np.ndarray, int]:
  """Reads a part of a file into memory.

  Returns:
    uint8 `[size]`, aligned so that JAX needs no copy; and its CRC-32.

  Raises:
    CheckpointError: if the file changed after it was opened, or does not contain this
      part.
  """
  if offset < 0 or size < 0 or offset + size > file.size:
    raise errors.CheckpointError(f'{file.path}: the file is truncated')
  found = host.empty((size,), np.uint8)
  with _errors_name(file.path):
    crc = file.read(offset, found)
  return found, crc


def content(path: str | os.PathLike[str], most: int) -> bytes:
  """Returns the content of a file of at most `most` bytes.

  Raises:
    CheckpointError: if there is no such file, or it is larger.
  """
  with _errors_name(path):
    file = files.File.of(path)
    if file.size > most:
      raise errors.CheckpointError(
        f'{path}: the file has {file.size} bytes, more than {most}'
      )
    return file.content()


def in_file(file: files.File, offset: int, spec: TensorSpec) -> LazyTensor:
  """Returns the tensor whose elements begin at an offset of a file, in C order."""

  def read_tensor() -> np.ndarray:
    return read(file, offset, spec.nbytes).view(spec.dtype).reshape(spec.shape)

  return LazyTensor(spec.shape, spec.dtype, read_tensor)


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

"""Reads the header of a GGUF file: its metadata, and where its tensors are.

The counts and lengths in a header are untrusted. Each is checked against the size of
the file before anything is read or made.
"""

import math
import struct
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import lazy
from rotbits_jax.system import files

_MAGIC = 0x46554747
_VERSIONS = (2, 3)
_FORMATS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), 'BbHhIif?Qqd', strict=True))
_STRING, _ARRAY = 8, 9  # the other types of values
_ALIGNMENT = 'general.alignment'
_PIECE = 1 << 20  # bytes that are read at a time
_MOST_BYTES = 1 << 28  # of a header; vocabularies take a few million
_MOST_ENTRIES = 1 << 21  # of all arrays; vocabularies have up to 2^18 tokens
_MOST_AXES = 4
_MOST_SIZE = (1 << 31) - 1  # of an axis


class Tensor(NamedTuple):
  """A tensor's entry in the header.

  Attributes:
    type_number: the number of its type, see `gguf_blocks`.
    shape: the tensor's shape.
    offset: offset of its first byte in the file.
  """

  type_number: int
  shape: tuple[int, ...]
  offset: int


class _Cursor:
  """A place in the header, which moves forward."""

  def __init__(self, file: files.File):
    self._file, self._piece, self._place = file, b'', 0
    self._begin = 0  # of the piece in the file
    self._entries = 0

  @property
  def position(self) -> int:
    return self._begin + self._place

  def take(self, size: int) -> bytes:
    """Returns the next bytes."""
    self._check(size)
    if self._place + size > len(self._piece):
      self._begin, self._place = self.position, 0
      count = min(max(size, _PIECE), self._file.size - self._begin)
      self._piece = lazy.read(self._file, self._begin, count).tobytes()
    self._place += size
    return self._piece[self._place - size : self._place]

  def u32(self) -> int:
    return struct.unpack('<I', self.take(4))[0]

  def u64(self) -> int:
    return struct.unpack('<Q', self.take(8))[0]

  def count(self, least: int) -> int:
    """Reads how many items follow, of at least `least` bytes each."""
    found = self.u64()
    self._check(found * least)
    return found

  def string(self) -> str:
    return self.take(self.count(1)).decode()

  def value(self, type_number: int) -> Any:
    """Reads a value of a type."""
    if type_number in _FORMATS:
      form = f'<{_FORMATS[type_number]}'
      return struct.unpack(form, self.take(struct.calcsize(form)))[0]
    if type_number == _STRING:
      return self.string()
    if type_number == _ARRAY:
      return self._array()
    raise errors.CheckpointError(f'a value of the unknown type {type_number}')

  def _array(self) -> list[Any]:
    type_number = self.u32()
    form = _FORMATS.get(type_number)
    if form is None and type_number != _STRING:
      raise errors.CheckpointError(f'an array of the unknown type {type_number}')
    count = self.count(8 if form is None else struct.calcsize(f'<{form}'))
    self._entries += count
    if self._entries > _MOST_ENTRIES:
      raise errors.CheckpointError(f'arrays of more than {_MOST_ENTRIES} entries')
    if form is None:
      return [self.string() for _ in range(count)]
    dtype = np.dtype(f'<{form}' if form != '?' else '?')
    return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

  def _check(self, size: int) -> None:
    if size > self._file.size - self.position:
      raise errors.CheckpointError('the header of the GGUF file is cut short')
    if self.position + size > _MOST_BYTES:
      raise errors.CheckpointError(f'a header of more than {_MOST_BYTES} bytes')


def read(file: files.File) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """Reads a header.

  Args:
    file: a GGUF file, little-endian.

  Returns:
    The metadata and the tensors, by name.

  Raises:
    CheckpointError: if the file is not a GGUF file, or if its header is damaged or too
      large.
  """
  try:
    return _read(file)
  except UnicodeDecodeError as e:
    raise errors.CheckpointError(f'a text of the header is not UTF-8: {e}') from e


def _read(file: files.File) -> tuple[dict[str, Any], dict[str, Tensor]]:
  cursor = _Cursor(file)
  if cursor.u32() != _MAGIC or cursor.u32() not in _VERSIONS:
    raise errors.CheckpointError('not a GGUF file of version 2 or 3, little-endian')
  # A tensor takes at least its name's length, axes, type and offset; a field less.
  count, fields = cursor.count(24), cursor.count(13)
  metadata: dict[str, Any] = {}
  for _ in range(fields):
    name = cursor.string()
    if name in metadata:
      raise errors.CheckpointError(f'the field {name[:40]!r} is there twice')
    metadata[name] = cursor.value(cursor.u32())
  tensors: dict[str, Tensor] = {}
  for _ in range(count):
    name, axes = cursor.string(), cursor.u32()
    lazy.check_name(name)
    if name in tensors:
      raise errors.CheckpointError(f'the tensor {name[:40]!r} is there twice')
    if axes > _MOST_AXES:
      raise errors.CheckpointError(f'{name[:40]!r}: a tensor of {axes} axes')
    shape = struct.unpack(f'<{axes}Q', cursor.take(8 * axes))
    if max(shape, default=0) > _MOST_SIZE or math.prod(shape) >= 1 << 48:
      raise errors.CheckpointError(f'{name[:40]!r}: a tensor of {shape=} is too large')
    # GGUF has the last axis first.
    tensors[name] = Tensor(cursor.u32(), shape[::-1], cursor.u64())
  alignment = metadata.get(_ALIGNMENT, 32)
  if type(alignment) is not int or not 0 < alignment <= 1 << 16:
    raise errors.CheckpointError(f'{_ALIGNMENT} is out of range')
  start = -(-cursor.position // alignment) * alignment
  return metadata, {
    name: tensor._replace(offset=start + tensor.offset)
    for name, tensor in tensors.items()
  }

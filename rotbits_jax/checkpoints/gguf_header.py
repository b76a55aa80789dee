"""Checks the header of a GGUF file before the package gguf reads it.

The package believes the counts and lengths in the header. It makes an object for each
entry of an array, and does not notice where the file ends, so that a few bytes could
ask for all memory and all time. After this check the work that it does is bounded by
the size of the header.
"""

import math
import struct

from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import lazy
from rotbits_jax.system import files

_MAGIC = 0x46554747
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MOST_ENTRIES = 1 << 21  # of all arrays; vocabularies have up to 2^18 tokens
_MOST_AXES = 4
_MOST_SIZE = (1 << 31) - 1  # of an axis
_MOST_ALIGNMENT = 1 << 16
_WHERE = 'general.alignment'


class _Header:
  """The bytes of the file, read from the start."""

  def __init__(self, data: memoryview):
    self._data, self._position, self._entries = data, 0, 0

  def skip(self, size: int) -> memoryview:
    """Passes over bytes and returns them."""
    if size > len(self._data) - self._position:
      raise errors.CheckpointError('the header of the GGUF file is cut short')
    self._position += size
    return self._data[self._position - size : self._position]

  def u32(self) -> int:
    return struct.unpack('<I', self.skip(4))[0]

  def u64(self) -> int:
    return struct.unpack('<Q', self.skip(8))[0]

  def count(self, least: int) -> int:
    """Reads how many items follow, of at least `least` bytes each."""
    found = self.u64()
    if found > (len(self._data) - self._position) // least:
      raise errors.CheckpointError('the header of the GGUF file is cut short')
    return found

  def string(self) -> bytes:
    return bytes(self.skip(self.count(1)))

  def value(self, kind: int) -> None:
    """Passes over a value of a kind."""
    if kind in _SIZES:
      self.skip(_SIZES[kind])
    elif kind == _STRING:
      self.string()
    elif kind == _ARRAY:
      self._array()
    else:
      raise errors.CheckpointError(f'a value of the unknown kind {kind}')

  def _array(self) -> None:
    kind = self.u32()
    if kind not in _SIZES and kind != _STRING:
      raise errors.CheckpointError(f'an array of the unknown kind {kind}')
    count = self.count(_SIZES.get(kind, 8))
    self._entries += count
    if self._entries > _MOST_ENTRIES:
      raise errors.CheckpointError(f'arrays of more than {_MOST_ENTRIES} entries')
    if kind == _STRING:
      for _ in range(count):
        self.string()
    else:
      self.skip(count * _SIZES[kind])


def check(file: files.File) -> None:
  """Checks the header.

  Args:
    file: the GGUF file, little-endian.

  Raises:
    CheckpointError: if a count or a length leads out of the file, if arrays are too
      long, or if a tensor has a shape that none has.
  """
  header = _Header(lazy.read(file, 0, file.size))
  if header.u32() != _MAGIC or header.u32() not in _VERSIONS:
    raise errors.CheckpointError('not a GGUF file of version 2 or 3, little-endian')
  # A tensor takes at least its name's length, axes, kind and offset; a field less.
  tensors, fields = header.count(24), header.count(13)
  names: set[bytes] = set()
  for _ in range(fields):
    name, kind = header.string(), header.u32()
    if name in names:
      raise errors.CheckpointError(f'the field {name[:40]!r} is there twice')
    names.add(name)
    if name == _WHERE.encode():
      if kind != 4 or not 0 < header.u32() <= _MOST_ALIGNMENT:
        raise errors.CheckpointError(f'{_WHERE} is out of range')
    else:
      header.value(kind)
  for _ in range(tensors):
    name, axes = header.string(), header.u32()
    if axes > _MOST_AXES:
      raise errors.CheckpointError(f'{name[:40]!r}: a tensor of {axes} axes')
    shape = struct.unpack(f'<{axes}Q', header.skip(8 * axes))
    if max(shape, default=0) > _MOST_SIZE or math.prod(shape) >= 1 << 48:
      raise errors.CheckpointError(f'{name[:40]!r}: a tensor of {shape=} is too large')
    header.u32()
    if header.u64() > file.size:
      raise errors.CheckpointError(f'{name[:40]!r}: the tensor is outside the file')

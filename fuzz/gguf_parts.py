"""GGUF files taken apart and put together again."""

from collections.abc import Iterable
import struct
from typing import NamedTuple

STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a number, by its kind."""

_MAGIC, _VERSION, _ALIGNMENT = 0x46554747, 3, 32


class Parts(NamedTuple):
  """A file.

  Attributes:
    fields: the kind and the value of each field as the file has them, by name.
    tensor_count: how many tensors there are.
    tensors: the descriptions of the tensors as the file has them.
    body: the numbers.
  """

  fields: dict[bytes, bytes]
  tensor_count: int
  tensors: bytes
  body: bytes


def text(value: bytes) -> bytes:
  return struct.pack('<Q', len(value)) + value


def string(value: bytes) -> bytes:
  """Returns kind and value of a field."""
  return struct.pack('<I', STRING) + text(value)


def strings(values: Iterable[bytes]) -> bytes:
  """Returns kind and value of a field."""
  texts = [text(value) for value in values]
  return struct.pack('<IIQ', ARRAY, STRING, len(texts)) + b''.join(texts)


def number(kind: int, packed: bytes) -> bytes:
  """Returns kind and value of a field; `packed` has `SIZES[kind]` bytes."""
  return struct.pack('<I', kind) + packed


def numbers(kind: int, packed: bytes) -> bytes:
  """Returns kind and value of a field; `packed` has the numbers one after the other."""
  return struct.pack('<IIQ', ARRAY, kind, len(packed) // SIZES[kind]) + packed


def pack(parts: Parts) -> bytes:
  """Makes a file."""
  head = struct.pack('<IIQQ', _MAGIC, _VERSION, parts.tensor_count, len(parts.fields))
  head += b''.join(text(name) + value for name, value in parts.fields.items())
  head += parts.tensors
  return head + bytes(-len(head) % _ALIGNMENT) + parts.body


def unpack(data: bytes) -> Parts:
  """Takes a file apart.

  Raises:
    ValueError: if it is damaged.
  """
  try:
    return _unpack(data)
  except (struct.error, KeyError) as error:
    raise ValueError(str(error)) from error


def _unpack(data: bytes) -> Parts:
  _, _, count, fields = struct.unpack_from('<IIQQ', data)
  at, found = 24, dict[bytes, bytes]()
  for _ in range(min(fields, len(data))):
    name, at = _text(data, at)
    end = _value(data, at + 4, *struct.unpack_from('<I', data, at))
    found[name], at = data[at:end], end
  start = at
  for _ in range(min(count, len(data))):
    _, at = _text(data, at)
    (axes,) = struct.unpack_from('<I', data, at)
    at += 4 + 8 * axes + 12
  return Parts(found, count, data[start:at], data[at + -at % _ALIGNMENT :])


def _text(data: bytes, at: int) -> tuple[bytes, int]:
  """Returns a text, and where it ends."""
  (size,) = struct.unpack_from('<Q', data, at)
  if size > len(data):
    raise ValueError('a text leads out of the file')
  return data[at + 8 : at + 8 + size], at + 8 + size


def _value(data: bytes, at: int, kind: int) -> int:
  """Returns where a value ends."""
  if kind == STRING:
    return _text(data, at)[1]
  if kind != ARRAY:
    return at + SIZES[kind]
  kind, count = struct.unpack_from('<IQ', data, at)
  if count > len(data):
    raise ValueError('an array leads out of the file')
  at += 12
  if kind != STRING:
    return at + count * SIZES[kind]
  for _ in range(count):
    _, at = _text(data, at)
  return at

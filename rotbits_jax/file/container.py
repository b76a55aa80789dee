"""The file: a valid safetensors file whose tensors are the coded streams.

    8 bytes, little-endian: length of the header
    header, JSON:  {"__metadata__": {"format": "rotbits", "version": "1",
                                     "manifest": "...", "manifest_crc32": "..."},
                    "<stream>": {"dtype", "shape", "data_offsets"}, ...}
    the streams

The manifest is a JSON object that `codec` writes; this module adds a "streams" entry
with the dtype, the length and the CRC-32 of each, so that a flipped bit anywhere is
noticed before anything is decoded. Any safetensors library opens the file.
"""

from collections.abc import Mapping
import json
import os
import pathlib
import struct
import tempfile
from typing import Any
import zlib

import numpy as np

FORMAT = 'rotbits'
VERSION = 2
Manifest = dict[str, Any]

_DTYPES: dict[str, np.dtype[Any]] = {'U8': np.dtype('<u1'), 'U16': np.dtype('<u2')}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class ContainerError(ValueError):
  """A file that is not a rotbits file, or is damaged, or is of a later version."""


def pack(manifest: Manifest, streams: Mapping[str, np.ndarray]) -> bytes:
  """The file's bytes.

  Args:
    manifest: JSON values.
    streams: one-dimensional arrays, uint8 or uint16, by name.

  Returns:
    A safetensors file.
  """
  entries = {
    name: [_NAMES[stream.dtype], stream.size, zlib.crc32(stream.tobytes())]
    for name, stream in streams.items()
  }
  text = json.dumps({**manifest, 'streams': entries}, separators=(',', ':'))
  metadata = {
    'format': FORMAT,
    'version': str(VERSION),
    'manifest': text,
    'manifest_crc32': str(zlib.crc32(text.encode())),
  }
  # Not by the safetensors package, which writes metadata in an order of chance: the
  # same input must give the same bytes.
  header: dict[str, Any] = {'__metadata__': metadata}
  aligned = sorted(streams.items(), key=lambda item: -item[1].itemsize)
  offset = 0
  for name, stream in aligned:
    end = offset + stream.nbytes
    header[name] = {
      'dtype': _NAMES[stream.dtype],
      'shape': [stream.size],
      'data_offsets': [offset, end],
    }
    offset = end
  head = json.dumps(header, separators=(',', ':')).encode()
  head += b' ' * (-len(head) % 8)
  parts = [stream.tobytes() for _, stream in aligned]
  return b''.join([struct.pack('<Q', len(head)), head, *parts])


class Container:
  """A packed file, opened: its manifest, and its streams by name.

  Streams are views of the buffer they are read from and are checked when asked for.
  """

  def __init__(self, buffer: Any):
    """Reads the header.

    Args:
      buffer: bytes, or anything with the buffer protocol such as a memory map.

    Raises:
      ContainerError: if this is no rotbits file, or its header is damaged.
    """
    self._buffer = memoryview(buffer)
    self.size = self._buffer.nbytes
    header, start = _read_header(self._buffer)
    metadata = header.pop('__metadata__', None)
    if not isinstance(metadata, dict) or metadata.get('format') != FORMAT:
      raise ContainerError('not a rotbits file')
    if metadata.get('version') != str(VERSION):
      raise ContainerError(
        f'version {metadata.get("version")} of the format, this program reads {VERSION}'
      )
    text = str(metadata.get('manifest'))
    if metadata.get('manifest_crc32') != str(zlib.crc32(text.encode())):
      raise ContainerError('the manifest is damaged: its checksum differs')
    self.manifest: Manifest = json.loads(text)
    self._streams: dict[str, tuple[np.ndarray, int]] = {}
    entries = self.manifest.pop('streams')
    if set(entries) != set(header):
      raise ContainerError('the header and the manifest name different streams')
    total = start + sum(n * _DTYPES[dtype].itemsize for dtype, n, _ in entries.values())
    if total != self.size:
      raise ContainerError(
        f'the file is cut short or too long: {self.size} bytes, not {total}'
      )
    for name, (dtype, length, checksum) in entries.items():
      begin, end = _offsets(header[name], name, dtype, length)
      data = np.frombuffer(self._buffer[start + begin : start + end], _DTYPES[dtype])
      self._streams[name] = data, checksum

  def __contains__(self, name: str) -> bool:
    return name in self._streams

  def stream(self, name: str) -> np.ndarray:
    """A stream by name.

    Raises:
      ContainerError: if it is damaged or missing.
    """
    if name not in self._streams:
      raise ContainerError(f'{name}: no such stream')
    data, checksum = self._streams[name]
    if zlib.crc32(data.data) != checksum:
      raise ContainerError(f'{name}: the stream is damaged: its checksum differs')
    return data

  def nbytes(self, name: str) -> int:
    """Bytes of a stream."""
    return self._streams[name][0].nbytes

  def stream_bytes(self) -> int:
    """Bytes of all streams together; the rest of the file is the header."""
    return sum(self.nbytes(name) for name in self._streams)


def _read_header(buffer: memoryview) -> tuple[dict[str, Any], int]:
  """The header and where the streams start."""
  if buffer.nbytes < 8:
    raise ContainerError('not a rotbits file: it has fewer than 8 bytes')
  (length,) = struct.unpack('<Q', buffer[:8])
  if length > buffer.nbytes - 8:
    raise ContainerError('not a rotbits file, or cut short within its header')
  try:
    header = json.loads(bytes(buffer[8 : 8 + length]))
  except ValueError as error:
    raise ContainerError('not a rotbits file, or its header is damaged') from error
  if not isinstance(header, dict):
    raise ContainerError('not a rotbits file')
  return header, 8 + length


def _offsets(entry: Any, name: str, dtype: str, length: int) -> tuple[int, int]:
  """Where a stream lies, checked against what the manifest says of it."""
  size = length * _DTYPES[dtype].itemsize
  try:
    begin, end = entry['data_offsets']
    agrees = (entry['dtype'], entry['shape'], end - begin) == (dtype, [length], size)
  except (KeyError, TypeError, ValueError):
    agrees = False
  if not agrees:
    raise ContainerError(f'{name}: the header and the manifest disagree')
  return begin, end


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
  """Writes a file whole or not at all: to a temporary one that is then renamed."""
  path = pathlib.Path(path)
  handle, temporary = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
  try:
    with os.fdopen(handle, 'wb') as file:
      file.write(data)
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(temporary, 0o666 & ~mask)  # mkstemp's files are private
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise

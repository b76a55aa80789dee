"""The container: a valid safetensors file whose tensors are streams of bytes.

    8 bytes, little-endian: length of the header
    header, JSON, filled up with spaces:
        {"__metadata__": {"format": "rotbits", "version": "3",
                          "manifest_crc32": "..."},
         "<stream>": {"dtype": "U8", "shape": [n], "data_offsets": [begin, end]}, ...}
    the streams, one after the other

The stream `manifest` is the JSON object that `manifest` describes; it has the length
and the CRC-32 of every other stream. Streams are appended as they come: the room for
the header is known from their names before there is any. Any safetensors library opens
the file.
"""

from collections.abc import Iterable, Sequence
import json
import os
import pathlib
import struct
import threading
from typing import Any, BinaryIO

import numpy as np
from zlib_ng import zlib_ng

from rotbits_jax import strict_json

FORMAT = 'rotbits'
VERSION = 3
MANIFEST = 'manifest'

Readable = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
"""What a file can be read from: its path, its bytes, or a binary file that is open."""

_MOST = 10**15  # bytes of a file, to reserve room for the header
_MOST_HEADER = 100_000_000  # bytes; the safetensors library's own limit


class ContainerError(ValueError):
  """A file that is not a rotbits file, or is damaged, or is of another version."""


class StreamWriter:
  """Writes streams to a file, one after the other, and the header last."""

  def __init__(self, file: BinaryIO, names: Sequence[str]):
    """Reserves room for the header.

    Args:
      file: empty, open for writing, and seekable.
      names: of all streams that may come, without the manifest.
    """
    most = dict.fromkeys((*names, MANIFEST), (_MOST, _MOST))
    self._room = len(_header(most, 0xFFFFFFFF))
    self._names = {*names, MANIFEST}
    self._file = file
    self._streams: dict[str, tuple[int, int]] = {}
    self._end = self._next = self._crc = 0
    self._open: str | None = None
    file.write(bytes(8 + self._room))

  def append(self, name: str, parts: Iterable[Any]) -> tuple[int, int]:
    """Writes one stream.

    Args:
      name: of the stream.
      parts: its bytes, in pieces with the buffer protocol.

    Returns:
      The stream's length and its CRC-32.
    """
    for part in parts:
      self.extend(name, part)
    return self.close(name)

  def extend(self, name: str, part: Any) -> None:
    """Writes a piece of the stream that is open, or opens one."""
    if name not in self._names or name in self._streams:
      raise ValueError(f'{name}: no room was reserved for such a stream')
    if self._open not in (None, name):
      raise ValueError(f'{name}: the stream {self._open} is still open')
    self._open = name
    view = memoryview(np.ascontiguousarray(part)).cast('B')
    self._crc = zlib_ng.crc32(view, self._crc)
    self._file.write(view)
    self._next += view.nbytes

  def close(self, name: str) -> tuple[int, int]:
    """Ends a stream, which may be empty; see `append`."""
    self._streams[name] = self._end, self._next
    nbytes, crc = self._next - self._end, self._crc
    self._open, self._end, self._crc = None, self._next, 0
    return nbytes, crc

  def keep(self, name: str, nbytes: int) -> None:
    """Counts a stream that an earlier run has appended already."""
    self._streams[name] = self._end, self._end + nbytes
    self._end = self._next = self._end + nbytes
    self._file.seek(self.start + self._end)

  def finish(self, manifest: bytes) -> None:
    """Appends the manifest and writes the header."""
    _, crc = self.append(MANIFEST, [np.frombuffer(manifest, np.uint8)])
    header = _header(self._streams, crc)
    self._file.seek(0)
    self._file.write(struct.pack('<Q', self._room))
    self._file.write(header + b' ' * (self._room - len(header)))

  @property
  def start(self) -> int:
    """Where the first stream begins in the file."""
    return 8 + self._room


def _header(streams: dict[str, tuple[int, int]], manifest_crc32: int) -> bytes:
  metadata = {
    'format': FORMAT,
    'version': str(VERSION),
    'manifest_crc32': str(manifest_crc32),
  }
  header: dict[str, Any] = {'__metadata__': metadata}
  for name, (begin, end) in streams.items():
    header[name] = {
      'dtype': 'U8',
      'shape': [end - begin],
      'data_offsets': [begin, end],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  return text + b' ' * (-len(text) % 8)


class StreamReader:
  """The streams of a container.

  A stream is a view of a memory map of its own, so that its pages are released with it.
  """

  def __init__(self, source: Readable):
    """Reads the header.

    Raises:
      ContainerError: if this is no rotbits file, or its header is damaged.
      OSError: if the path cannot be read.
    """
    self._source, self._lock = source, threading.Lock()
    if isinstance(source, (str, os.PathLike)):
      self.name = os.fspath(source)
      self.size = pathlib.Path(source).stat().st_size
      if not pathlib.Path(source).is_file():
        raise ContainerError(f'{self.name}: not a file')
    elif isinstance(source, (bytes, bytearray, memoryview)):
      self.name, self.size = '', memoryview(source).nbytes
    else:
      self.name = str(getattr(source, 'name', ''))
      self.size = source.seek(0, os.SEEK_END)
    with self.errors():
      self._streams, self._start, self.manifest_crc32 = self._read_header()

  def errors(self) -> '_Named':
    """A context that puts the file's name before what is wrong with it."""
    return _Named(self.name)

  def names(self) -> list[str]:
    """Of the streams, in their order."""
    return list(self._streams)

  def nbytes(self, name: str) -> int:
    """Length of a stream."""
    begin, end = self._streams[name]
    return end - begin

  def stream(self, name: str) -> np.ndarray:
    """The bytes of a stream: uint8 `[n]`, read-only.

    Raises:
      ContainerError: if there is no such stream.
    """
    if name not in self._streams:
      raise ContainerError(f'{name}: no such stream')
    begin, end = self._streams[name]
    return self._bytes(self._start + begin, end - begin)

  def checked(self, name: str, nbytes: int, crc32: int) -> np.ndarray:
    """A stream like `stream`, which has this length and this CRC-32.

    Raises:
      ContainerError: if it is damaged or missing.
    """
    data = self.stream(name)
    if data.size != nbytes or zlib_ng.crc32(data) != crc32:
      raise ContainerError(f'{name}: the stream is damaged: its checksum differs')
    return data

  def _bytes(self, begin: int, count: int) -> np.ndarray:
    source = self._source
    if not count:
      return np.zeros(0, np.uint8)
    if isinstance(source, (str, os.PathLike)):
      # A plain array, since a memory map is slow to slice.
      return np.memmap(source, np.uint8, 'r', begin, (count,)).view(np.ndarray)
    if isinstance(source, (bytes, bytearray, memoryview)):
      return np.frombuffer(
        memoryview(source).cast('B')[begin : begin + count], np.uint8
      )
    with self._lock:  # units are read side by side
      source.seek(begin)
      data = np.frombuffer(source.read(count), np.uint8)
    if data.size != count:
      raise ContainerError('the file is cut short')
    return data

  def _read_header(self) -> tuple[dict[str, tuple[int, int]], int, int]:
    if self.size < 8:
      raise ContainerError('not a rotbits file: it has fewer than 8 bytes')
    (length,) = struct.unpack('<Q', self._bytes(0, 8).tobytes())
    if length > min(self.size - 8, _MOST_HEADER):
      raise ContainerError('not a rotbits file, or cut short within its header')
    header = parse_json(self._bytes(8, length).tobytes(), 'header')
    metadata = header.pop('__metadata__', None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get('format') != FORMAT:
      raise ContainerError('not a rotbits file')
    if metadata.get('version') != str(VERSION):
      raise ContainerError(
        f'version {str(metadata.get("version"))[:20]} of the format, '
        f'this program reads {VERSION}'
      )
    unknown = sorted(set(metadata) - {'format', 'version', 'manifest_crc32'})
    if unknown:
      raise ContainerError(f'the field {unknown[0][:40]!r} of the header is not known')
    crc = metadata.get('manifest_crc32')
    if not (isinstance(crc, str) and crc.isascii() and crc.isdigit() and len(crc) < 11):
      raise ContainerError('the header is damaged: it has no checksum of the manifest')
    streams: dict[str, tuple[int, int]] = {}
    end = 0
    for name, entry in header.items():
      size = _size(entry, end)
      if size is None:
        raise ContainerError(f'{name}: the header says nothing sensible of the stream')
      streams[name] = end, end + size
      end += size
    if 8 + length + end != self.size:
      raise ContainerError(
        f'the file is cut short or too long: {self.size} bytes, not {8 + length + end}'
      )
    if MANIFEST not in streams:
      raise ContainerError('the file has no manifest')
    return streams, 8 + length, int(crc)


def _size(entry: Any, begin: int) -> int | None:
  """Length of a stream that begins there; None if the header's entry is malformed."""
  if not isinstance(entry, dict) or set(entry) != {'dtype', 'shape', 'data_offsets'}:
    return None
  shape, offsets = entry['shape'], entry['data_offsets']
  if entry['dtype'] != 'U8' or not isinstance(shape, list) or len(shape) != 1:
    return None
  size = shape[0]
  if type(size) is not int or not 0 <= size < _MOST:
    return None
  return size if offsets == [begin, begin + size] else None


class _Named:
  def __init__(self, name: str):
    self._name = name

  def __enter__(self) -> None:
    return None

  def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
    named = self._name and isinstance(error, ContainerError)
    if named and not str(error).startswith(self._name):
      raise ContainerError(f'{self._name}: {error}') from error


def parse_json(data: bytes, where: str) -> Any:
  """JSON that a stranger may have written.

  Raises:
    ContainerError: if it is not JSON as `strict_json` has it.
  """
  try:
    return strict_json.loads(data)
  except ValueError as error:
    raise ContainerError(
      f'not a rotbits file, or its {where} is damaged: {error}'
    ) from error

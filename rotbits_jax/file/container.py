"""The container: a valid safetensors file whose tensors are streams of bytes.

    8 bytes, little-endian: length of the header
    header, JSON, padded with spaces:
        {"__metadata__": {"format": "rotbits", "version": "1",
                          "manifest_crc32": "..."},
         "<stream>": {"dtype": "U8", "shape": [n], "data_offsets": [begin, end]}, ...}
    the streams, one after the other

The stream `manifest` is the JSON object that the module `manifest` describes, deflated.
It contains the length and the CRC-32 of every other stream. The writer appends each
stream when it is ready. It writes the header last, into room that it reserves at the
start: the names of the streams bound its length. Any safetensors library opens the
file. A damaged file raises `ContainerError`.
"""

from collections.abc import Iterator, Sequence
import contextlib
import json
import os
import struct
import threading
from typing import Any, BinaryIO
import zlib

import numpy as np
from zlib_ng import zlib_ng

from rotbits_jax.system import files
from rotbits_jax.system import schema

FORMAT = 'rotbits'
VERSION = 1
MANIFEST = 'manifest'
_METADATA = '__metadata__'  # the header's one entry that is no stream

Readable = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
"""The path of a file, its bytes, or an open binary file."""

_MOST = 10**15  # greatest size of a file in bytes, from which the room follows
_MOST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_LEAST_TEXT = 1 << 20  # bytes that any manifest may inflate to
_MOST_RATIO = 64  # of the bytes of a larger one, which come from it
_SHOWN = 400  # characters of each end of an error's message


class ContainerError(ValueError):
  """Raised for a file that is not a valid rotbits file of this version.

  The message may repeat names from the file. The middle of a long message is left out.
  """

  def __init__(self, message: str):
    if len(message) > 2 * _SHOWN:
      message = f'{message[:_SHOWN]}...{message[-_SHOWN:]}'
    super().__init__(message)


def check_names(names: Sequence[str]) -> None:
  """Checks that the streams of a file can have these names.

  Raises:
    ValueError: naming the first that is repeated or that the container needs itself.
  """
  seen = {MANIFEST, _METADATA}
  for name in names:
    if name in seen:
      raise ValueError(f'{name}: the file has another entry of this name')
    seen.add(name)


class StreamWriter:
  """Writes streams to a file, one after the other, and the header last."""

  def __init__(self, file: BinaryIO, names: Sequence[str]):
    """Reserves room for the header.

    Args:
      file: an empty file, open for writing and seekable.
      names: names of all streams that may be written, without the manifest.

    Raises:
      ValueError: see `check_names`, or if a reader would refuse so long a header.
    """
    check_names(names)
    longest = dict.fromkeys((*names, MANIFEST), (_MOST, 2 * _MOST))
    self._room = len(_header(longest, 0xFFFFFFFF))
    if self._room > _MOST_HEADER:
      raise ValueError(f'{len(names)} streams are too many for one file')
    self._file = file
    self._streams: dict[str, tuple[int, int]] = {}
    self._end = 0
    file.write(bytes(8 + self._room))

  def append(self, name: str, data: Any) -> tuple[int, int]:
    """Writes a stream.

    Args:
      name: name of the stream.
      data: the bytes, which support the buffer protocol.

    Returns:
      The length of the stream, and its CRC-32.
    """
    view = memoryview(np.ascontiguousarray(data)).cast('B')
    self._file.write(view)
    self._streams[name] = self._end, self._end + view.nbytes
    self._end += view.nbytes
    return view.nbytes, zlib_ng.crc32(view)

  def finish(self, manifest: bytes) -> None:
    """Appends the text of the manifest, and writes the header."""
    packed = zlib_ng.compress(manifest, 9)
    if len(manifest) > _most_text(len(packed)):
      packed = zlib_ng.compress(manifest, 0)
    _, crc = self.append(MANIFEST, np.frombuffer(packed, np.uint8))
    header = _header(self._streams, crc)
    self._file.seek(0)
    self._file.write(struct.pack('<Q', self._room))
    self._file.write(header + b' ' * (self._room - len(header)))


def _most_text(nbytes: int) -> int:
  """Returns the greatest length of a manifest whose stream has these bytes."""
  return max(_LEAST_TEXT, _MOST_RATIO * nbytes)


def _header(streams: dict[str, tuple[int, int]], manifest_crc32: int) -> bytes:
  metadata = {
    'format': FORMAT,
    'version': str(VERSION),
    'manifest_crc32': str(manifest_crc32),
  }
  entries = {name: _entry(begin, end) for name, (begin, end) in streams.items()}
  header = {_METADATA: metadata, **entries}
  text = json.dumps(header, separators=(',', ':')).encode()
  return text + b' ' * (-len(text) % 8)


def _entry(begin: int, end: int) -> dict[str, Any]:
  """Returns the entry of a stream in the header, by its offsets."""
  return {'dtype': 'U8', 'shape': [end - begin], 'data_offsets': [begin, end]}


class StreamReader:
  """Reads the streams of a container."""

  def __init__(self, source: Readable):
    """Reads the header.

    Raises:
      ContainerError: if this is not a rotbits file, or if its header is damaged.
      OSError: if the path cannot be read.
    """
    self._source: Any = source
    self._lock, self._buffers = threading.Lock(), files.Buffers()
    if isinstance(source, (str, os.PathLike)):
      self._source = files.File.of(source)
      self.name, self.size = os.fspath(source), self._source.size
    elif isinstance(source, (bytes, bytearray, memoryview)):
      self._source = np.frombuffer(memoryview(source).cast('B'), np.uint8)
      self.name, self.size = '', self._source.size
    else:
      self.name = str(getattr(source, 'name', ''))
      self.size = source.seek(0, os.SEEK_END)
    with self.errors():
      self._streams, self._start, self.manifest_crc32 = self._read_header()

  @contextlib.contextmanager
  def errors(self) -> Iterator[None]:
    """Puts the name of the file before a `ContainerError`."""
    try:
      yield
    except ContainerError as error:
      if not self.name or str(error).startswith(self.name):
        raise
      raise ContainerError(f'{self.name}: {error}') from error

  def names(self) -> list[str]:
    """Returns the names of the streams, in the order of the file."""
    return list(self._streams)

  def nbytes(self, name: str) -> int:
    """Returns the length of a stream in bytes."""
    begin, end = self._streams[name]
    return end - begin

  def read(self, name: str, crc32: int | None = None) -> bytes:
    """Returns the bytes of a stream, see `checked`."""
    with self.checked(name, crc32) as data:
      return data.tobytes()

  def inflated(self, name: str, crc32: int, most: int) -> bytes:
    """Inflates a stream of the format of zlib, see `checked`.

    Args:
      name: name of the stream.
      crc32: the checksum that it must have.
      most: the greatest number of bytes of its content.
    """
    data, unpacker = self.read(name, crc32), zlib.decompressobj()
    try:
      content = unpacker.decompress(data, most + 1)
    except zlib.error as error:
      raise ContainerError(f'{name}: {error}') from error
    if len(content) > most or not unpacker.eof or unpacker.unused_data:
      raise ContainerError(f'{name}: it must inflate to {most} bytes at most')
    return content

  def manifest(self) -> bytes:
    """Returns the text of the manifest, see `inflated`."""
    most = _most_text(self.nbytes(MANIFEST))
    return self.inflated(MANIFEST, self.manifest_crc32, most)

  @contextlib.contextmanager
  def checked(self, name: str, crc32: int | None = None) -> Iterator[np.ndarray]:
    """Reads a stream.

    Args:
      name: name of the stream.
      crc32: the checksum that it must have; None for any.

    Yields:
      The bytes: uint8 `[n]`. They are valid until the context ends.
    """
    if name not in self._streams:
      raise ContainerError(f'{name}: no such stream')
    begin, end = self._streams[name]
    with self._bytes(self._start + begin, end - begin) as (data, crc):
      if crc32 not in (None, crc):
        raise ContainerError(f'{name}: the stream is damaged: its checksum differs')
      yield data

  @contextlib.contextmanager
  def _bytes(self, begin: int, count: int) -> Iterator[tuple[np.ndarray, int]]:
    """Reads a part of the file; yields it with its CRC-32."""
    if isinstance(self._source, files.File):
      with self._buffers.lend(count) as out:
        try:
          crc = self._source.read(begin, out)
        except files.ChangedError as error:
          raise ContainerError(str(error)) from error
        yield out, crc
      return
    if isinstance(self._source, np.ndarray):
      data = self._source[begin : begin + count]
    else:
      with self._lock:  # records are read side by side
        self._source.seek(begin)
        data = np.frombuffer(self._source.read(count), np.uint8)
    if data.size != count:
      raise ContainerError('the file is cut short')
    yield data, zlib_ng.crc32(data)

  def _read_header(self) -> tuple[dict[str, tuple[int, int]], int, int]:
    if self.size < 8:
      raise ContainerError('not a rotbits file: it has fewer than 8 bytes')
    with self._bytes(0, 8) as (data, _):
      (length,) = struct.unpack('<Q', data)
    if length > min(self.size - 8, _MOST_HEADER):
      raise ContainerError('not a rotbits file, or cut short within its header')
    with self._bytes(8, length) as (data, _):
      header = parse_json(data.tobytes(), 'header')
    metadata = header.pop(_METADATA, None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get('format') != FORMAT:
      raise ContainerError('not a rotbits file')
    if metadata.get('version') != str(VERSION):
      raise ContainerError(
        f'the file has version {metadata.get("version")} of the format, '
        f'but this program reads version {VERSION}'
      )
    unknown = sorted(set(metadata) - {'format', 'version', 'manifest_crc32'})
    if unknown:
      raise ContainerError(f'the field {unknown[0]!r} of the header is not known')
    crc = metadata.get('manifest_crc32')
    if not (isinstance(crc, str) and crc.isascii() and crc.isdigit() and len(crc) < 11):
      raise ContainerError('the header is damaged: it has no checksum of the manifest')
    streams: dict[str, tuple[int, int]] = {}
    end = 0
    for name, entry in header.items():
      size = _size(entry, end)
      if size is None:
        raise ContainerError(f'{name}: the header has a wrong entry for the stream')
      streams[name] = end, end + size
      end += size
    if 8 + length + end != self.size:
      raise ContainerError(
        'the file is cut short or too long: it must have '
        f'{8 + length + end} bytes, got {self.size}'
      )
    if MANIFEST not in streams:
      raise ContainerError('the file has no manifest')
    return streams, 8 + length, int(crc)


def _size(entry: Any, begin: int) -> int | None:
  """Returns the length of a stream by its entry in the header; None if it is wrong."""
  shape = entry.get('shape') if isinstance(entry, dict) else None
  size = shape[0] if isinstance(shape, list) and len(shape) == 1 else None
  if type(size) is not int or not 0 <= size < _MOST:
    return None
  return size if entry == _entry(begin, begin + size) else None


def parse_json(data: bytes, where: str) -> Any:
  """Parses JSON that may be untrusted."""
  try:
    return schema.parse(data)
  except ValueError as error:
    raise ContainerError(
      f'not a rotbits file, or its {where} is damaged: {error}'
    ) from error

"""The container: a valid safetensors file whose tensors are streams of bytes.

The page on the format describes it. A damaged file raises `ContainerError`.
"""

import collections
from collections.abc import Iterable, Iterator, Sequence
import contextlib
import io
import json
import os
import struct
from typing import Annotated, Any, BinaryIO, Literal
import zlib

import msgspec
import numpy as np
from zlib_ng import zlib_ng

from rotbits_jax.system import checksums
from rotbits_jax.system import files
from rotbits_jax.system import schema

VERSION = 1
MANIFEST = 'manifest'
_METADATA = '__metadata__'  # the header's one entry that is no stream

Readable = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
"""The path of a file, its bytes, or an open binary file, which is read whole."""

_MOST = 10**15  # greatest size of a file in bytes, from which the room follows
_MOST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_LEAST_TEXT = 1 << 20  # bytes that any manifest may inflate to
_MOST_RATIO = 16  # of the bytes of a larger one to those of the file
_LEAST_BYTES = 8  # of a manifest for each of its lists and objects, on average
_PIECE = 1 << 20  # bytes of a stream that are inflated at a time
_SHOWN = 400  # characters of each end of an error's message


class ContainerError(ValueError):
  """Raised for a file that is not a valid rotbits file of this version.

  The message may repeat names from the file. The middle of a long message is left out.
  """

  def __init__(self, message: str):
    if len(message) > 2 * _SHOWN:
      message = f'{message[:_SHOWN]}...{message[-_SHOWN:]}'
    super().__init__(message)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
  """Puts the name of a file or a part of one before errors about its content."""
  try:
    yield
  except ValueError as error:
    text = str(error)
    is_named = not name or text.startswith(f'{name}: ')
    raise ContainerError(text if is_named else f'{name}: {text}') from error


class _Metadata(schema.Object):
  format: Literal['rotbits']
  version: str
  manifest_crc32: Annotated[str, msgspec.Meta(pattern=r'\A[0-9]{1,10}\Z')]


class _Entry(schema.Object, kw_only=True):
  """The entry of a stream in the header."""

  dtype: Literal['U8']
  shape: tuple[schema.Size]
  data_offsets: tuple[schema.Size, schema.Size]


class StreamWriter:
  """Writes streams to a file, one after the other, and the header last."""

  def __init__(self, file: BinaryIO, names: Sequence[str]):
    """Reserves room for the header of an empty file, whose streams may have `names`."""
    counts = collections.Counter([MANIFEST, _METADATA, *names])
    if twice := [name for name, count in counts.items() if count > 1]:
      raise ValueError(f'{twice[0]}: the file has another entry of this name')
    longest = dict.fromkeys((*names, MANIFEST), (_MOST, 2 * _MOST))
    self._room = len(_header(longest, 0xFFFFFFFF))
    if self._room > _MOST_HEADER:
      raise ValueError(f'{len(names)} streams are too many for one file')
    self._file = file
    self._streams: dict[str, tuple[int, int]] = {}
    self._end = 0
    file.write(bytes(8 + self._room))

  def append(self, name: str, *pieces: Any) -> tuple[int, int]:
    """Writes a stream, given as buffers; returns its length and its CRC-32."""
    return self.append_all(name, pieces)

  def append_all(self, name: str, pieces: Iterable[Any]) -> tuple[int, int]:
    """Writes a stream as `append` does, given buffers one after the other."""
    start, crc = self._end, 0
    for piece in pieces:
      view = memoryview(np.ascontiguousarray(piece)).cast('B')
      self._file.write(view)
      self._end += view.nbytes
      crc = zlib_ng.crc32(view, crc)
    self._streams[name] = start, self._end
    return self._end - start, crc

  def sync(self) -> None:
    """Waits until the disk has all streams, unless the file is in memory."""
    with contextlib.suppress(io.UnsupportedOperation):
      os.fsync(self._file.fileno())

  def finish(self, manifest: bytes) -> None:
    """Appends the text of the manifest, and writes the header."""
    packed = zlib_ng.compress(manifest, 9)
    if len(manifest) > _most_text(8 + self._room + self._end + len(packed)):
      packed = zlib_ng.compress(manifest, 0)
    _, crc = self.append(MANIFEST, np.frombuffer(packed, np.uint8))
    header = _header(self._streams, crc)
    self._file.seek(0)
    self._file.write(struct.pack('<Q', self._room) + header.ljust(self._room))


def _most_text(nbytes: int) -> int:
  """Returns the greatest length of the manifest of a file of so many bytes."""
  return max(_LEAST_TEXT, _MOST_RATIO * nbytes)


def _header(streams: dict[str, tuple[int, int]], manifest_crc32: int) -> bytes:
  """Returns the JSON of the header, given the offsets of each stream."""
  crc = str(manifest_crc32)
  metadata = _Metadata(format='rotbits', version=str(VERSION), manifest_crc32=crc)
  header: dict[str, Any] = {_METADATA: schema.dump(metadata)}
  for name, (begin, end) in streams.items():
    header[name] = {'dtype': 'U8', 'shape': [end - begin], 'data_offsets': [begin, end]}
  text = json.dumps(header, separators=(',', ':')).encode()
  return text + b' ' * (-len(text) % 8)


class Stream:
  """A stream whose parts, uint8, are read from the file; then `check` checks them.

  Each byte is in one part. Threads may read parts, so memory holds only these.
  """

  dtype = np.dtype(np.uint8)

  def __init__(self, file: 'StreamReader', name: str):
    self.name, self.shape = name, (file.sizes[name],)
    self._file, self._begin = file, file.begins[name]
    self._pieces: list[tuple[int, tuple[int, int]]] = []  # starts; CRC-32s and sizes

  def read(self, start: int, out: np.ndarray) -> None:
    """Fills uint8 `[n]` with the bytes from `start` on."""
    crc = self._file.read(self._begin + start, out)
    self._pieces.append((start, (crc, out.size)))

  def check(self, crc32: int) -> None:
    """Compares the checksum."""
    if checksums.joined(piece for _, piece in sorted(self._pieces)) != crc32:
      raise ContainerError(f'{self.name}: the stream is damaged: its checksum differs')


class StreamReader:
  """Reads the streams of a container; `sizes` has their lengths in the file's order."""

  def __init__(self, source: Readable):
    """Reads the header."""
    self.name = str(getattr(source, 'name', ''))
    self.opened: files.File | None = None  # on disk
    if isinstance(source, (str, os.PathLike)):
      if os.path.isdir(source):
        text = 'a folder without an index of shards; load_checkpoint loads checkpoints'
        raise ContainerError(f'{source}: {text}')
      self.opened = files.File.of(source)
      self.name, self.size = str(self.opened.path), self.opened.size
    else:
      data: Any = source
      if not isinstance(source, (bytes, bytearray, memoryview)):
        source.seek(0)
        data = source.read()
      self._content = np.frombuffer(memoryview(data).cast('B'), np.uint8)
      self.size = self._content.size
    with naming(self.name):
      self.sizes, self.begins, self.manifest_crc32 = self._read_header()

  def checked(self, name: str, crc32: int) -> np.ndarray:
    """Returns a stream, uint8 `[n]`, which must have this checksum."""
    stream = Stream(self, name)
    stream.read(0, data := np.empty(stream.shape, np.uint8))
    stream.check(crc32)
    return data

  def inflated(self, name: str, crc32: int, most: int) -> bytes:
    """Inflates a stream of the format of zlib to at most so many bytes."""
    unpacker = zlib.decompressobj()
    try:
      content = unpacker.decompress(self.checked(name, crc32), most + 1)
    except zlib.error as error:
      raise ContainerError(f'{name}: {error}') from error
    if len(content) > most or not unpacker.eof or unpacker.unused_data:
      raise ContainerError(f'{name}: it must inflate to {most} bytes at most')
    return content

  def inflate_to(self, file: BinaryIO, name: str, crc32: int, size: int) -> None:
    """Inflates a stream of the format of zlib to a file, a piece at a time.

    Args:
      file: Where to write.
      name: The name of the stream.
      crc32: Its checksum.
      size: The number of bytes that it inflates to.
    """
    stream = Stream(self, name)
    (nbytes,) = stream.shape
    unpacker = zlib.decompressobj()
    left = size
    for start in range(0, nbytes, _PIECE):
      packed = np.empty(min(_PIECE, nbytes - start), np.uint8)
      stream.read(start, packed)
      pending: Any = packed
      while len(pending):
        try:
          content = unpacker.decompress(pending, _PIECE)
        except zlib.error as error:
          raise ContainerError(f'{name}: {error}') from error
        left -= len(content)
        if left < 0 or unpacker.unused_data or (not content and unpacker.eof):
          raise ContainerError(f'{name}: it must inflate to {size} bytes')
        file.write(content)
        pending = unpacker.unconsumed_tail
    content = unpacker.flush()
    file.write(content)
    stream.check(crc32)
    if left != len(content) or not unpacker.eof:
      raise ContainerError(f'{name}: it must inflate to {size} bytes')

  def manifest(self) -> bytes:
    """Returns the text of the manifest, which takes little memory when it is parsed."""
    text = self.inflated(MANIFEST, self.manifest_crc32, _most_text(self.size))
    most = max(len(text), _LEAST_TEXT) // _LEAST_BYTES
    if text.count(b'[') + text.count(b'{') > most:
      raise ContainerError(f'{MANIFEST}: too many lists and objects for its length')
    return text

  def read(self, begin: int, out: np.ndarray) -> int:
    """Fills uint8 `[n]` with a part of the file; returns its CRC-32."""
    if self.opened is None:
      out[...] = self._content[begin : begin + out.size]
      return zlib_ng.crc32(out)
    try:
      return self.opened.read(begin, out)
    except OSError as error:
      raise ContainerError(str(error)) from error

  def _read_header(self) -> tuple[dict[str, int], dict[str, int], int]:
    """Returns where streams begin and their sizes, by name, and a checksum."""
    if self.size < 8:
      raise ContainerError('not a rotbits file: it has fewer than 8 bytes')
    self.read(0, start := np.empty(8, np.uint8))
    (length,) = struct.unpack('<Q', start)
    if length > min(self.size - 8, _MOST_HEADER):
      raise ContainerError('not a rotbits file, or cut short within its header')
    self.read(8, header := np.empty(length, np.uint8))
    with naming('not a rotbits file, or its header is damaged'):
      values = schema.decode(dict[str, Any], header.tobytes())
      metadata = schema.load(_Metadata, values.pop(_METADATA, None), _METADATA)
      entries = schema.load(dict[str, _Entry], values)
    if metadata.version != str(VERSION):
      text = f'version {metadata.version} of the format, not version {VERSION}'
      raise ContainerError(f'the file has {text}')
    sizes, begins, end = {}, {}, 0
    for name, entry in entries.items():
      sizes[name], begins[name] = entry.shape[0], 8 + length + end
      if entry.data_offsets != (end, end + sizes[name]):
        raise ContainerError(f'{name}: the header has a wrong entry for the stream')
      end += sizes[name]
    if 8 + length + end != self.size or MANIFEST not in sizes:
      raise ContainerError('the file is cut short or too long, or has no manifest')
    return sizes, begins, int(metadata.manifest_crc32)

"""Files that are read without memory maps.

The system ends a process (SIGBUS) that touches a mapped page of a file which another
program has shortened meanwhile: a download that starts again, or a network file system.
Here a file that changes while it is read is an error.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import os
import pathlib
import stat
import threading

import numpy as np
from zlib_ng import zlib_ng

_PIECE = 1 << 19  # bytes that are read at a time, so that the cache holds them


class ChangedError(OSError):
  """Raised for a file that changed after it was opened."""


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
      OSError: if there is no such file, or if it is a folder, a pipe or a device.
    """
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):  # a pipe waits, and a device may have no end
      raise OSError(f'{path}: not a regular file')
    return cls(pathlib.Path(path), state.st_size, state.st_mtime_ns)

  def read(self, offset: int, out: np.ndarray) -> int:
    """Fills an array with the bytes at an offset.

    Args:
      offset: offset of the first byte.
      out: uint8 `[n]`, contiguous.

    Returns:
      The CRC-32 of the bytes.

    Raises:
      ChangedError: if the file changed after it was opened, or ends before.
      OSError: if it cannot be read.
    """
    with open(self.path, 'rb', buffering=0) as file:
      state = os.fstat(file.fileno())
      if (state.st_size, state.st_mtime_ns) != (self.size, self.modified):
        raise self._changed()
      file.seek(offset)
      left, crc = memoryview(out), 0
      while left:
        piece = left[:_PIECE]
        count = file.readinto(piece)
        if not count:
          raise self._changed()
        crc = zlib_ng.crc32(piece[:count], crc)
        left = left[count:]
    return crc

  def content(self) -> bytes:
    """Reads the whole file, see `read`."""
    data = np.empty(self.size, np.uint8)
    self.read(0, data)
    return data.tobytes()

  def _changed(self) -> ChangedError:
    """Returns the error about a file that changed."""
    return ChangedError(f'{self.path}: the file changed after it was opened')


class Buffers:
  """Memory that is lent again and again.

  Reading a file into new memory takes twice as long, because the system clears each new
  page. There are as many buffers as were lent at one time.
  """

  def __init__(self) -> None:
    self._free: list[np.ndarray] = []
    self._lock = threading.Lock()

  @contextlib.contextmanager
  def lend(self, size: int) -> Iterator[np.ndarray]:
    """Lends uint8 `[size]`, uninitialised, until the context ends."""
    with self._lock:
      self._free.sort(key=len)
      fits = [i for i, x in enumerate(self._free) if len(x) >= size]
      buffer = self._free.pop(fits[0] if fits else -1) if self._free else None
    if buffer is None or len(buffer) < size:
      buffer = np.empty(size, np.uint8)
    try:
      yield buffer[:size]
    finally:
      with self._lock:
        self._free.append(buffer)

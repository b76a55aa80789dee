"""Files that are read without memory maps.

The system ends a process (SIGBUS) that touches a mapped page of a file which another
program has shortened meanwhile. Here a file that changes while it is read is an error.
"""

import os
import pathlib
import stat
from typing import NamedTuple

import numpy as np
from zlib_ng import zlib_ng

_PIECE = 1 << 19  # bytes that are read at a time, so that the cache holds them


class File(NamedTuple):
  """A file with its size in bytes and its time of change in ns when it was opened."""

  path: pathlib.Path
  size: int
  modified: int

  @classmethod
  def of(cls, path: str | os.PathLike[str]) -> 'File':
    """Records the present state of a file; an OSError if it is none."""
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):  # a pipe waits, and a device may have no end
      raise OSError(f'{path}: not a regular file')
    return cls(pathlib.Path(path), state.st_size, state.st_mtime_ns)

  def read(self, offset: int, out: np.ndarray) -> int:
    """Fills uint8 `[n]`, contiguous, with the bytes at an offset; returns their CRC-32.

    A file that changed after it was opened, or that ends before, is an OSError.
    """
    with open(self.path, 'rb', buffering=0) as file:
      state = os.fstat(file.fileno())
      is_same = (state.st_size, state.st_mtime_ns) == (self.size, self.modified)
      file.seek(offset)
      left, crc = memoryview(out), 0
      while left:
        count = file.readinto(left[:_PIECE]) if is_same else 0
        if not count:
          raise OSError(f'{self.path}: the file changed after it was opened')
        crc = zlib_ng.crc32(left[:count], crc)
        left = left[count:]
    return crc

  def content(self) -> bytes:
    """Reads the whole file, see `read`."""
    data = np.empty(self.size, np.uint8)
    self.read(0, data)
    return data.tobytes()


def cache_folder() -> pathlib.Path:
  """Returns the user's folder of compiled programs and snapshots; it may be missing."""
  cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  path = os.environ.get('ROTBITS_JAX_CACHE') or f'{cache}/rotbits_jax'
  return pathlib.Path(path).expanduser()

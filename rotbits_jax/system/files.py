"""Files that are read without memory maps.

The system ends a process (SIGBUS) that touches a mapped page of a file which another
program has shortened meanwhile. Here a file that changes, or that another one replaces,
after it was opened is an error.
"""

import os
import pathlib
import re
import stat
from typing import NamedTuple

import numpy as np
from zlib_ng import zlib_ng

_PIECE = 1 << 20  # bytes that are read at a time, so the cache holds them


class File(NamedTuple):
  """A file in its state when it was opened."""

  path: pathlib.Path
  size: int  # in bytes
  # Device, inode, and the times of change of the content and of all else, in ns. Copies
  # may keep the size and the first time, and never have the others.
  identity: tuple[int, int, int, int]

  @classmethod
  def of(cls, path: str | os.PathLike[str], descriptor: int | None = None) -> 'File':
    """Records the present state of a file, perhaps opened; an OSError if it is none."""
    path = local_path(path)
    state = os.stat(path if descriptor is None else descriptor)
    if not stat.S_ISREG(state.st_mode):  # a pipe waits, and a device may have no end
      raise OSError(f'{path}: not a regular file')
    times = state.st_mtime_ns, state.st_ctime_ns
    return cls(path, state.st_size, (state.st_dev, state.st_ino, *times))

  def check(self, descriptor: int | None = None) -> None:
    """Checks that the present state is still that of the opening."""
    if self[1:] != File.of(self.path, descriptor)[1:]:
      raise OSError(f'{self.path}: the file changed after it was opened')

  def read(self, offset: int, out: np.ndarray) -> int:
    """Fills uint8 `[n]`, contiguous, with the bytes at an offset; returns their CRC-32.

    A file that changed after it was opened, or that ends before, is an OSError.
    """
    with open(self.path, 'rb', buffering=0) as file:
      file.seek(offset)
      left, crc = memoryview(out), 0
      while left and (count := file.readinto(left[:_PIECE])):
        crc = zlib_ng.crc32(left[:count], crc)
        left = left[count:]
      self.check(file.fileno())
    if left:
      raise OSError(f'{self.path}: the file ends before what is read of it')
    return crc

  def content(self, most: int) -> bytes:
    """Reads the whole file, see `read`; a ValueError says that it is too large."""
    if self.size > most:
      raise ValueError(f'the file has {self.size} bytes, more than {most}')
    data = np.empty(self.size, np.uint8)
    self.read(0, data)
    return data.tobytes()


def local_path(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns a path that a user gave, with `~` expanded.

  Raises:
    ValueError: if the path is a URL, such as that of a bucket.
  """
  # A `Path` has made one slash of two.
  slashes = '//' if isinstance(path, str) else '/'
  if match := re.match(f'([A-Za-z][A-Za-z0-9+.-]+):{slashes}', str(path)):
    raise ValueError(f'{path}: {_way_out(str(path), match[1])}')
  return pathlib.Path(os.path.expanduser(path))


def real_path(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns a path that a user gave without links; a loop of links stays as it is."""
  return pathlib.Path(os.path.realpath(local_path(path)))


def missing(path: str | os.PathLike[str]) -> str:
  """Returns why a path that does not exist cannot be read, and what may help."""
  text = 'there is no such file or directory'
  name = os.fspath(path)
  if not re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', name):
    return text
  return f'{text}; to download a model of that name: {_download(name)}'


def _way_out(url: str, scheme: str) -> str:
  """Returns what to do in place of reading or writing a URL."""
  if scheme.lower() != 'hf':
    return (
      f'only local paths are read and written; mount {scheme}:// as a folder '
      '(gcsfuse, s3fs), or copy its files with fsspec'
    )
  owner, *names = re.sub('^hf:/+', '', url, flags=re.IGNORECASE).split('/')
  name = '/'.join([owner, *names[:1]]).partition('@')[0]
  return f'only local paths are read and written; first: {_download(name)}'


def _download(name: str) -> str:
  """Returns the command that downloads a repository of Hugging Face."""
  return f'hf download {name} --local-dir={name.rpartition("/")[2]}'


def cache_folder() -> pathlib.Path:
  """Returns the user's folder of compiled programs and snapshots; it may be missing."""
  cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return local_path(os.environ.get('ROTBITS_JAX_CACHE') or f'{cache}/rotbits_jax')

"""Folders that one process holds, or several that work together.

A folder is held by a lock on a file in it. The system releases the lock when the
process ends, however it ends. The last holder removes the folder if nothing else is in
it.
"""

import contextlib
import errno
import functools
import os
import pathlib
import sys

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None  # type: ignore[assignment]

NAME = 'lock'
"""The name of the file with the lock of a folder."""


class Lock:
  """The lock of a folder; `is_real` is False where the file system has no locks."""

  def __init__(self, folder: pathlib.Path, flags: int = 0) -> None:
    """Opens the file with the lock, without taking it."""
    self._folder = folder
    self._handle: int | None = None
    self.is_real = fcntl is not None
    if fcntl is None:
      _warn('this system has no locks')
      return
    # To write, because NFS gives no exclusive lock of a file that is opened to read.
    flags |= os.O_RDWR | os.O_NOFOLLOW
    self._handle = os.open(folder / NAME, flags, 0o600)

  def take(self, *, shared: bool) -> bool:
    """Takes the lock, unless another process has it; returns whether it did."""
    if self._handle is None:
      return True
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
      fcntl.flock(self._handle, mode | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
      return False
    except OSError as error:
      self.is_real = False
      _warn(f'the file system has no locks ({error.strerror})')
    return True

  def has_name(self) -> bool:
    """Returns whether the file has its name, which the last holder removes."""
    if self._handle is None:
      return True
    try:
      state = (self._folder / NAME).lstat()
    except FileNotFoundError:
      return False
    return os.path.samestat(os.fstat(self._handle), state)

  def close(self) -> None:
    """Closes the file, which releases the lock."""
    if self._handle is not None:
      os.close(self._handle)
    self._handle = None

  def release(self) -> None:
    """Releases the lock. The last holder removes the folder, unless it has files."""
    try:
      if self.take(shared=False):
        (self._folder / NAME).unlink(missing_ok=True)
        for path in self._folder.iterdir():
          with contextlib.suppress(OSError):
            path.rmdir()
        self._folder.rmdir()
    except OSError:  # it has files, or is gone, or another process is in it
      pass
    finally:
      self.close()


def acquire(folder: pathlib.Path, *, shared: bool) -> Lock | None:
  """Locks a folder, which is made if it is missing; None if another process has it.

  Raises:
    OSError: if the folder cannot be made, or is a link.
  """
  while True:
    if folder.is_symlink():
      raise OSError(errno.EEXIST, 'a link of this name exists', str(folder))
    folder.mkdir(0o700, parents=True, exist_ok=True)
    try:
      lock = Lock(folder, os.O_CREAT)
    except FileNotFoundError:  # the last holder has removed the folder
      continue
    is_taken = lock.take(shared=shared)
    if is_taken and lock.has_name():
      return lock
    lock.close()
    if not is_taken:
      return None


def is_locked(folder: pathlib.Path) -> bool:
  """Returns whether a process holds a folder, which may be missing."""
  try:
    lock = Lock(folder)
  except OSError:
    return False
  is_free = lock.take(shared=False)
  lock.close()
  return not is_free


@functools.cache
def _warn(reason: str) -> None:
  """Says once on stderr that other writers are not noticed."""
  text = 'two processes that write to one path would not notice each other'
  print(f'rotbits: warning: {reason}: {text}', file=sys.stderr)

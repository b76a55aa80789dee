"""Writing of results, so that a result is either complete or not there.

The target of a result is the path to which it is written. The files are first written
to a staging folder and then moved to the target. Until then an old result stays:

    target = outputs.resolved(path)
    outputs.check(target, overwrite=False)         # before the work
    with outputs.fresh(outputs.staging(target)) as folder:
      ...                                          # writes folder / name
      outputs.move(folder / name, target)          # synced, then renamed

The staging folder is beside the target and is called `.<name>.partial`. Its name
depends on the target only, so that the next run finds the files that a killed run left.
It is locked, so that two runs do not write the same target. A target is a regular file,
a folder, or does not exist yet.
"""

from collections.abc import Iterator
import contextlib
import errno
import os
import pathlib
import shutil
import stat

try:
  import fcntl
except ImportError:  # on Windows, folders are not locked
  fcntl = None  # type: ignore[assignment]

Path = str | os.PathLike[str]


def resolved(path: Path) -> pathlib.Path:
  """Follows the symbolic links of a path; returns the path to write to.

  Raises:
    OSError: if the path is empty.
  """
  if not os.fspath(path):
    raise _error(errno.ENOENT, 'the path to write to is empty', "''")
  return pathlib.Path(os.path.realpath(path))


def check(target: pathlib.Path, *, overwrite: bool) -> None:
  """Checks, before the work, that a file can be written to a path.

  Args:
    target: the path. It must not be a symbolic link, see `resolved`.
    overwrite: whether an existing file may be replaced.

  Raises:
    OSError: if the path names something other than a regular file, if the file is
      read-only or must not be replaced, or if the folder does not exist or cannot be
      written.
  """
  if not target.parent.is_dir():
    folder = target.parent
    raise _error(errno.ENOTDIR, f'no such directory: {folder}', target)
  if os.path.lexists(target):
    mode = target.lstat().st_mode
    if stat.S_ISDIR(mode):
      raise _error(errno.EISDIR, 'is a directory, not a file to write', target)
    if not stat.S_ISREG(mode):
      raise _error(errno.EINVAL, 'is not a regular file, and is not replaced', target)
    if not overwrite:
      text = 'the file exists; it is replaced with --overwrite (overwrite=True) only'
      raise _error(errno.EEXIST, text, target)
    if not mode & 0o222:
      raise _error(errno.EACCES, 'the file is read-only', target)
  _check_writable(target.parent, target)


def directory_target(path: Path) -> pathlib.Path:
  """Follows the symbolic links of a directory; returns the directory to write to.

  Args:
    path: the directory. It need not exist.

  Raises:
    OSError: if the path names a file, or if the directory cannot be written. If it does
      not exist, the closest directory above it that exists must be writable.
  """
  target = resolved(path)
  for folder in (target, *target.parents):
    if os.path.lexists(folder):
      if not folder.is_dir():
        text = 'is a file, not a directory to write to'
        raise _error(errno.ENOTDIR, text, folder)
      _check_writable(folder, target)
      break
  return target


def staging(target: pathlib.Path) -> pathlib.Path:
  """Returns the path of the staging folder of a target."""
  return target.parent / f'.{target.name}.partial'


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Makes a folder and locks it. The lock of a killed process ends with the process.

  The caller must remove the folder.

  Raises:
    OSError: if the folder cannot be made, if it is a symbolic link, or if another
      process holds the lock.
  """
  handle = _lock(folder)
  try:
    yield folder
  finally:
    if handle is not None:
      os.close(handle)


@contextlib.contextmanager
def fresh(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Makes an empty, locked folder; removes it at the end.

  If folders above it did not exist, they are made. After an exception they are removed.
  """
  made = [parent for parent in folder.parents if not parent.exists()]
  folder.parent.mkdir(parents=True, exist_ok=True)
  try:
    with locked(folder):
      clear(folder)
      try:
        yield folder
      finally:
        shutil.rmtree(folder, ignore_errors=True)
  except BaseException:
    for parent in made:
      with contextlib.suppress(OSError):
        parent.rmdir()
    raise


def clear(folder: pathlib.Path) -> None:
  """Removes the content of a folder."""
  for path in folder.iterdir():
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    else:
      path.unlink()


def move(source: pathlib.Path, target: pathlib.Path) -> None:
  """Moves a complete file, or a folder of complete files, to its target.

  The content is written to the disk first, so a crash cannot leave an incomplete
  target. When the function returns, the new name is on the disk, too. If a file is
  replaced, the new file gets its mode.
  """
  for path in source.iterdir() if source.is_dir() else [source]:
    _sync(path)
  if source.is_dir():
    _sync(source)
  if target.is_file():
    os.chmod(source, stat.S_IMODE(target.stat().st_mode))
  os.replace(source, target)
  _sync(target.parent)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
  """Adds a path to system errors without a path, such as that of a full disk."""
  try:
    yield
  except OSError as error:
    if error.errno is None or error.filename is not None:
      raise
    raise _error(error.errno, error.strerror, path) from error


def _check_writable(folder: pathlib.Path, target: pathlib.Path) -> None:
  if not os.access(folder, os.W_OK | os.X_OK):
    raise _error(errno.EACCES, f'the directory {folder} cannot be written', target)


def _error(number: int, text: str | None, path: Path) -> OSError:
  return OSError(number, text, os.fspath(path))


def _lock(folder: pathlib.Path) -> int | None:
  folder.mkdir(parents=True, exist_ok=True)
  if fcntl is None:
    return None
  handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # The process that held the lock before may have removed the folder.
    if not folder.exists() or not os.path.samestat(os.fstat(handle), folder.lstat()):
      raise BlockingIOError
  except BlockingIOError as error:
    os.close(handle)
    raise _error(errno.EAGAIN, 'another process writes here', folder) from error
  except BaseException:
    os.close(handle)
    raise
  return handle


def _sync(path: pathlib.Path) -> None:
  """Waits until the content of a file or a folder is on the disk."""
  try:
    handle = os.open(path, os.O_RDONLY)
  except PermissionError:  # Windows cannot open folders
    return
  try:
    os.fsync(handle)
  finally:
    os.close(handle)

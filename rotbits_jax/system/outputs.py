"""Safe writing of results: a result appears complete, or the old one stays.

    target = outputs.resolved(path)
    outputs.check(target, overwrite=False)         # before the work
    with outputs.fresh(outputs.staging(target)) as folder:
      ...                                          # writes folder / name
      outputs.move(folder / name, target)          # syncs, then renames

The staging folder `.<name>.partial` beside a target is removed by the next run if this
one is killed. An OSError names the path that cannot be written.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import errno
import os
import pathlib
import shutil
import stat

Path = str | os.PathLike[str]


def resolved(path: Path) -> pathlib.Path:
  """Returns the target of a path, after following symbolic links."""
  if not os.fspath(path):
    raise OSError(errno.ENOENT, 'the path to write to is empty', "''")
  return pathlib.Path(os.path.realpath(path))


def check(target: pathlib.Path, *, overwrite: bool) -> None:
  """Checks, before the work, that a file can be written at a `resolved` path."""
  problem = None
  if not target.parent.is_dir():
    problem = errno.ENOTDIR, f'no such directory: {target.parent}'
  elif target.is_dir():
    problem = errno.EISDIR, 'is a directory, not a file to write'
  elif os.path.lexists(target) and not target.is_file():
    problem = errno.EINVAL, 'is not a regular file, and is not replaced'
  elif target.exists() and not overwrite:
    problem = errno.EEXIST, 'the file exists; use overwrite=True to replace it'
  elif target.exists() and not target.stat().st_mode & 0o222:
    problem = errno.EACCES, 'the file is read-only'
  if problem is not None:
    raise OSError(*problem, os.fspath(target))
  _check_writable(target.parent, target)


def directory_target(path: Path) -> pathlib.Path:
  """Returns the directory of a path, which need not exist but can be written."""
  target = resolved(path)
  folder = next(x for x in (target, *target.parents) if os.path.lexists(x))
  if not folder.is_dir():
    text = 'is a file, not a directory to write to'
    raise OSError(errno.ENOTDIR, text, os.fspath(folder))
  _check_writable(folder, target)
  return target


def _check_writable(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Checks that names in a folder can be written."""
  if not os.access(folder, os.W_OK | os.X_OK):
    text = f'the directory {folder} cannot be written'
    raise OSError(errno.EACCES, text, os.fspath(target))


def check_replaced(
  folder: pathlib.Path, is_replaced: Callable[[str], bool], *, overwrite: bool
) -> list[pathlib.Path]:
  """Checks that a folder, which may be missing, can be replaced by a new one.

  Args:
    folder: see `directory_target`.
    is_replaced: whether a file, given its relative path, may go with the folder.
    overwrite: whether a folder with files may be replaced.

  Returns:
    The files in it.
  """
  files = [x for x in folder.rglob('*') if x.is_symlink() or not x.is_dir()]
  for name in (file.relative_to(folder).as_posix() for file in files):
    if not overwrite:
      text = f'the folder has files, such as {name}; use overwrite=True to replace it'
      raise OSError(errno.EEXIST, text, os.fspath(folder))
    if not is_replaced(name):
      text = f'the folder is not replaced: {name} would be lost'
      raise OSError(errno.EEXIST, text, os.fspath(folder))
  return files


def staging(target: pathlib.Path) -> pathlib.Path:
  """Returns the hidden folder in which a target is prepared."""
  return target.parent / f'.{target.name}.partial'


@contextlib.contextmanager
def fresh(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Makes an empty folder and its parents, and removes it at the end.

  If an exception leaves the context, parents that it made are removed, too.
  """
  made = [parent for parent in folder.parents if not parent.exists()]
  try:
    if folder.is_symlink():  # it may lead elsewhere
      text = 'is not a folder, and is not replaced'
      raise OSError(errno.ENOTDIR, text, os.fspath(folder))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
      yield folder
    finally:
      shutil.rmtree(folder, ignore_errors=True)
  except BaseException:
    for parent in made:
      with contextlib.suppress(OSError):
        parent.rmdir()
    raise


def move(source: pathlib.Path, target: pathlib.Path) -> None:
  """Renames a complete file, or a folder of complete files, to its target.

  The content is on the disk before the name. A new file takes the mode of the one that
  it replaces. An older folder cannot be replaced at once: it is renamed, and removed at
  the end, or gets its name back after an exception.
  """
  for path in [source, *source.rglob('*')]:
    _sync(path)
  older = target.parent / f'.{target.name}.replaced'
  if target.is_file():
    source.chmod(stat.S_IMODE(target.stat().st_mode))
  try:
    if target.is_dir():
      shutil.rmtree(older, ignore_errors=True)
      target.rename(older)
    os.replace(source, target)
  except BaseException:
    if older.exists() and not target.exists():
      older.rename(target)
    raise
  _sync(target.parent)
  if target.is_dir():
    shutil.rmtree(older, ignore_errors=True)


def _sync(path: pathlib.Path) -> None:
  """Waits until the content of a file or a folder is on the disk."""
  with contextlib.suppress(PermissionError):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def divided(sizes: Mapping[str, int], most: int | None) -> list[tuple[str, ...]]:
  """Divides items, whose sizes are given, among at least one file.

  A file with several items has at most `most` bytes; None stands for one file.
  """
  groups: list[list[str]] = [[]]
  filled = 0
  for name, size in sizes.items():
    if most is not None and groups[-1] and filled + size > most:
      groups.append([])
      filled = 0
    groups[-1].append(name)
    filled += size
  return [tuple(group) for group in groups]


def numbered(stem: str, suffix: str, count: int) -> list[str]:
  """Returns the names of several files, like those of Hugging Face's shards."""
  return [f'{stem}-{i:05}-of-{count:05}{suffix}' for i in range(1, count + 1)]


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
  """Adds a path to system errors that do not name one, such as that of a full disk."""
  try:
    yield
  except OSError as error:
    if error.errno is None or error.filename is not None:
      raise
    raise OSError(error.errno, error.strerror, os.fspath(path)) from error

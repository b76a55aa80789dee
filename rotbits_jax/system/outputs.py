"""Safe writing of results: a result appears complete, or the old one stays.

    target = outputs.resolved(path)
    outputs.check(target, overwrite=False)         # before the work
    with outputs.fresh(outputs.staging(target)) as folder:
      ...                                          # writes folder / name
      outputs.move(folder / name, target)          # syncs, then renames

The next run removes the staging folder of one that was killed. An OSError names the
path that cannot be written.
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
  if not target.parent.is_dir():
    raise OSError(errno.ENOTDIR, f'no such directory: {target.parent}', str(target))
  if os.path.lexists(target) and not target.is_file():
    text = 'a directory or a device, not a regular file, is not replaced'
    number = errno.EISDIR if target.is_dir() else errno.EINVAL
    raise OSError(number, text, str(target))
  if target.exists() and not overwrite:
    text = 'the file exists; use overwrite=True to replace it'
    raise OSError(errno.EEXIST, text, str(target))
  if target.exists() and not target.stat().st_mode & 0o222:
    raise OSError(errno.EACCES, 'the file is read-only', str(target))
  _check_writable(target.parent, target)


def directory_target(path: Path) -> pathlib.Path:
  """Returns the directory of a path, which need not exist but can be written."""
  target = resolved(path)
  folder = next(x for x in (target, *target.parents) if os.path.lexists(x))
  if not folder.is_dir():
    raise OSError(errno.ENOTDIR, 'is a file, not a directory to write to', str(folder))
  _check_writable(folder, target)
  return target


def _check_writable(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Checks that names in a folder can be written."""
  if not os.access(folder, os.W_OK | os.X_OK):
    text = f'the directory {folder} cannot be written'
    raise OSError(errno.EACCES, text, str(target))


def check_replaced(
  folder: pathlib.Path, is_replaced: Callable[[str], bool], *, overwrite: bool
) -> list[pathlib.Path]:
  """Checks that a folder, which may be missing, can be replaced; returns its files.

  `is_replaced` says whether a file, given its relative path, may go with the folder.
  """
  files = [x for x in folder.rglob('*') if x.is_symlink() or not x.is_dir()]
  for name in (file.relative_to(folder).as_posix() for file in files):
    text = f'the folder is not replaced: {name} would be lost'
    if not overwrite:
      text = f'the folder has files, such as {name}; use overwrite=True to replace it'
    if not overwrite or not is_replaced(name):
      raise OSError(errno.EEXIST, text, str(folder))
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
      raise OSError(errno.ENOTDIR, 'is not a folder, and is not replaced', str(folder))
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
  try:
    handle = os.open(path, os.O_RDONLY)
  except PermissionError:
    return
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def divided(
  sizes: Mapping[str, int], most: int | None, stem: str, suffix: str
) -> dict[str, tuple[str, ...]]:
  """Divides items of these sizes among files of at most so many bytes, or one item.

  Returns the items by the names of the files, which are like Hugging Face's shards.
  """
  groups: list[list[str]] = [[]]
  filled = 0
  for name, size in sizes.items():
    if most is not None and groups[-1] and filled + size > most:
      groups.append([])
      filled = 0
    groups[-1].append(name)
    filled += size
  return {
    f'{stem}-{i:05}-of-{len(groups):05}{suffix}': tuple(group)
    for i, group in enumerate(groups, 1)
  }


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
  """Adds a path to system errors that do not name one, such as that of a full disk."""
  try:
    yield
  except OSError as error:
    if error.errno is None or error.filename is not None:
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error

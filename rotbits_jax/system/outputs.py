"""Safe writing of results: a result appears complete, or the old one stays.

    outputs.check(target, overwrite=False)  # before the work
    with outputs.fresh(outputs.staging(target)) as folder:
      ...  # writes folder / name
      outputs.move(folder / name, target)  # syncs, then renames

The next run removes the staging folder of one that was killed.
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import os
import pathlib
import shutil

from rotbits_jax.system import files as files_lib

Path = str | os.PathLike[str]


def check(target: pathlib.Path, *, overwrite: bool) -> None:
  """Checks, before the work, that a file can be written at a path without links."""
  if os.path.lexists(target) and not target.is_file():
    text = 'a directory or a device, not a regular file, is not replaced'
    raise OSError(errno.EISDIR, text, str(target))
  if target.exists() and not overwrite:
    text = 'the file exists; use overwrite=True to replace it'
    raise OSError(errno.EEXIST, text, str(target))
  with fresh(staging(target)):
    pass


def directory_target(path: Path) -> pathlib.Path:
  """Returns the directory of a path, which need not exist but can be written."""
  target = files_lib.local_path(path).resolve()
  if os.path.lexists(target) and not target.is_dir():
    raise OSError(errno.ENOTDIR, 'is a file, not a directory to write to', str(target))
  with fresh(staging(target)):
    return target


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
  """Makes an empty folder and its parents; removes it at the end, and empty parents."""
  shutil.rmtree(folder, ignore_errors=True)
  made = [parent for parent in folder.parents if not parent.exists()]
  try:
    folder.mkdir(parents=True)
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)
    for parent in made:
      with contextlib.suppress(OSError):
        parent.rmdir()


def move(source: pathlib.Path, target: pathlib.Path) -> None:
  """Renames a complete file, or a folder of complete files, to its target.

  The content is on the disk before the name. An older folder cannot be replaced at
  once: it is renamed, and removed at the end, or gets its name back.
  """
  for path in [source, *source.rglob('*')]:
    if path.is_file():
      with path.open('rb') as file:
        os.fsync(file.fileno())
  if not target.is_dir():
    os.replace(source, target)
    return
  older = target.parent / f'.{target.name}.replaced'
  shutil.rmtree(older, ignore_errors=True)
  target.rename(older)
  try:
    source.rename(target)
  except BaseException:
    older.rename(target)
    raise
  shutil.rmtree(older, ignore_errors=True)

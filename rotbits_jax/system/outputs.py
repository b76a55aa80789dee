"""Safe writing of results: a result appears complete, or the old one stays.

    outputs.check(target, overwrite=False)  # before the work; changes nothing
    with outputs.writer(target) as folder:
      ...  # writes folder / name
      outputs.move(folder / name, target)  # syncs, then renames

One process at a time writes a target. Until the end it holds a lock in the hidden
folder `.NAME.partial` beside the target, in which it prepares the result. The system
releases the lock of a process that is killed, and the next writer removes what that
process left. The processes of one job share `.NAME.DIGEST.partial`, whose files stay.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import contextvars
import errno
import glob
import os
import pathlib
import shutil
import stat
import time
import types
import uuid

from rotbits_jax.system import files as files_lib
from rotbits_jax.system import locks
from rotbits_jax.system import signals

Path = str | os.PathLike[str]

PATIENCE = 0.5
"""Seconds to wait for a lock, which another process may try for a moment."""

_PAUSE = 0.02  # seconds between two tries
# The hidden folders that this thread holds, and whether no other process can be in one.
_HELD = contextvars.ContextVar[Mapping[pathlib.Path, bool]](
  'held', default=types.MappingProxyType({})
)


# ---- checks before the work ----------------------------------------------------------


def check(target: pathlib.Path, *, overwrite: bool) -> None:
  """Checks, before the work, that a file can be written at a path without links."""
  if os.path.lexists(target) and not target.is_file():
    text = 'a directory or a device, not a regular file, is not replaced'
    raise OSError(errno.EISDIR, text, str(target))
  if target.exists() and not overwrite:
    text = 'the file exists; use overwrite=True to replace it'
    raise OSError(errno.EEXIST, text, str(target))
  _check_writable(target)


def directory_target(path: Path) -> pathlib.Path:
  """Returns the directory of a path, which need not exist but can be written."""
  target = files_lib.real_path(path)
  if os.path.lexists(target) and not target.is_dir():
    raise OSError(errno.ENOTDIR, 'is a file, not a directory to write to', str(target))
  _check_writable(target)
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


def _check_writable(target: pathlib.Path) -> None:
  """Checks that the folder of a target, or the one to make it in, takes new names."""
  folder = next(filter(os.path.lexists, target.parents), target)
  if not folder.is_dir():
    raise OSError(errno.ENOTDIR, f'{folder} is not a directory', str(target))
  if not os.access(folder, os.W_OK | os.X_OK):
    text = f'the directory {folder} cannot be written'
    raise OSError(errno.EACCES, text, str(target))


# ---- one writer for each target ------------------------------------------------------


@contextlib.contextmanager
def writer(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """Keeps other processes from a target; yields an empty folder to prepare it in.

  The folder and the parents of the target, if they remain empty, are removed at the
  end. What a killed writer left is removed, or is put back in the place of the target.

  Raises:
    OSError: if another process writes the target.
  """
  folder = staging(target) / uuid.uuid4().hex
  with _locked(target) as is_alone:
    try:
      with signals.unbroken():
        if is_alone:
          _clear(folder.parent)
        _settle(target)
        folder.mkdir()
      yield folder
    finally:
      with signals.unbroken():
        shutil.rmtree(folder, ignore_errors=True)
        _settle(target)


@contextlib.contextmanager
def job(
  target: pathlib.Path, digest: str, *, alone: bool, patience: float = PATIENCE
) -> Iterator[pathlib.Path]:
  """Yields the hidden folder of a job, whose files stay for the next process.

  Args:
    target: the path that gets the folder in the end.
    digest: 16 hexadecimal digits that the processes of the job share.
    alone: whether this process finishes the job: then no other one may write.
    patience: seconds to wait for other processes.

  Raises:
    OSError: if another process writes the target, and not for this job or not `alone`.
  """
  with _locked(target, digest, shared=not alone, patience=patience):
    folder = job_folder(target, digest)
    with signals.unbroken():
      if alone:
        _settle(target)
      folder.mkdir(exist_ok=True)
    yield folder


@contextlib.contextmanager
def reserved(*paths: Path) -> Iterator[None]:
  """Keeps other processes from targets that this thread writes in the context."""
  with contextlib.ExitStack() as stack:
    for path in paths:
      stack.enter_context(_locked(files_lib.real_path(path)))
    yield


def remove_stale(parent: pathlib.Path, name: str | None = None) -> None:
  """Removes the hidden folders that no process holds, of a target or of all."""
  for folder in _stagings(parent, name):
    with contextlib.suppress(OSError), signals.unbroken():
      lock = locks.acquire(folder, shared=False)
      if lock is None:
        continue
      if lock.is_real:
        _clear(folder)
      lock.release()


def staging(target: pathlib.Path, digest: str | None = None) -> pathlib.Path:
  """Returns the hidden folder in which a target, or a job for it, is prepared."""
  middle = '' if digest is None else f'.{digest}'
  return target.parent / f'.{target.name}{middle}.partial'


def job_folder(target: pathlib.Path, digest: str) -> pathlib.Path:
  """Returns the folder of the files of a job."""
  return staging(target, digest) / 'files'


def _stagings(parent: pathlib.Path, name: str | None) -> list[pathlib.Path]:
  """Returns the hidden folders of a target, or of all, that this thread lacks."""
  patterns = ['.*.partial']
  if name is not None:
    escaped = glob.escape(name)
    patterns = [f'.{escaped}.partial', f'.{escaped}.{"[0-9a-f]" * 16}.partial']
  folders = {folder for pattern in patterns for folder in parent.glob(pattern)}
  return sorted(folders - _HELD.get().keys())


@contextlib.contextmanager
def _locked(
  target: pathlib.Path,
  digest: str | None = None,
  *,
  shared: bool = False,
  patience: float = PATIENCE,
) -> Iterator[bool]:
  """Makes and locks a hidden folder; yields whether no other process can be in it.

  Args:
    target: the path that is written.
    digest: that of a job; other jobs for the target are refused.
    shared: whether other processes may have the same folder.
    patience: seconds to wait for them.
  """
  folder, held = staging(target, digest), _HELD.get()
  if folder in held:
    yield held[folder]
    return
  busy = OSError(errno.EBUSY, 'another process writes here', str(target))
  made = [parent for parent in folder.parents if not parent.exists()]
  end = time.monotonic() + patience
  lock = None
  try:
    while lock is None:
      with signals.unbroken():
        lock = locks.acquire(folder, shared=shared)
      if lock is None and time.monotonic() > end:
        raise busy
      time.sleep(0 if lock else _PAUSE)
    is_alone = lock.is_real and not shared
    _HELD.set({**held, folder: is_alone})
    if any(map(locks.is_locked, _stagings(target.parent, target.name))):
      raise busy
    yield is_alone
  finally:
    with signals.unbroken():
      _HELD.set(held)
      if lock is not None:
        lock.release()
      for parent in made:
        with contextlib.suppress(OSError):
          parent.rmdir()


def _clear(folder: pathlib.Path) -> None:
  """Removes all in a hidden folder but its lock."""
  for path in folder.iterdir():
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path, ignore_errors=True)
    elif path.name != locks.NAME:
      path.unlink(missing_ok=True)


# ---- changes that are whole ----------------------------------------------------------


def move(source: pathlib.Path, target: pathlib.Path) -> None:
  """Renames a complete file, or a folder of complete files, to its target.

  The content is on the disk before the name, and the name when the function returns.
  Files and folders that replace others get their modes. An older folder cannot be
  replaced at once: it is renamed, and removed at the end, or gets its name back.
  """
  for path in [source, *source.rglob('*')]:
    older = target / path.relative_to(source)
    _sync(path)
    if older.exists() and not older.is_symlink() and older.is_dir() == path.is_dir():
      # A folder is renamed only if it can be written.
      least = stat.S_IRWXU if path.is_dir() else 0
      path.chmod(stat.S_IMODE(older.stat().st_mode) | least)
  with signals.unbroken():
    if target.is_dir():
      shutil.rmtree(_replaced(target), ignore_errors=True)
      try:
        target.rename(_replaced(target))
        source.rename(target)
      finally:
        _settle(target)
    else:
      os.replace(source, target)
  _sync(target.parent)


def _replaced(target: pathlib.Path) -> pathlib.Path:
  """Returns the name of an older folder until the new one has its name."""
  return target.parent / f'.{target.name}.replaced'


def _settle(target: pathlib.Path) -> None:
  """Removes the older folder of a target, or gives it its name back."""
  older = _replaced(target)
  if not os.path.lexists(older):
    return
  if os.path.lexists(target):
    shutil.rmtree(older, ignore_errors=True)
  else:
    older.rename(target)


def _sync(path: pathlib.Path) -> None:
  """Waits until the content of a file, or the names in a folder, are on the disk."""
  try:
    handle = os.open(path, os.O_RDONLY)
  except PermissionError:  # no reading of a folder, and on Windows of none
    if path.is_dir():
      return
    raise
  try:
    os.fsync(handle)
  except OSError as error:  # some file systems do not sync folders
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):
      raise
  finally:
    os.close(handle)

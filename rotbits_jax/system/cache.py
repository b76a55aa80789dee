"""The cache of a user: compiled programs, and folders that are made once.

A folder of the cache is built in a hidden one beside it, which is locked, and gets its
name when it is complete; see `outputs`. The time of its last change is that of its last
use.
"""

from collections.abc import Callable
import contextlib
import os
import pathlib
import re
import sys
import time

from rotbits_jax.system import outputs

VARIABLE = 'ROTBITS_JAX_CACHE'
"""The environment variable that names the folder of the cache."""

DIGITS = 40
"""How many hexadecimal digits a name has, as in Hugging Face's cache."""

_FOLDERS = 'snapshots'
_NAME = f'[0-9a-f]{{{DIGITS}}}'
_CONTENT = 'content'
_SECONDS = 0.2  # between two looks at a folder that another process makes


def root() -> pathlib.Path | None:
  """Returns the folder of the cache; None if the user has no home.

  It is that of the variable, or `rotbits_jax` in XDG_CACHE_HOME or in ~/.cache. As that
  standard says, a path that is not absolute is ignored.
  """
  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  path = os.environ.get(VARIABLE) or os.path.join(cache, 'rotbits_jax')
  return pathlib.Path(path) if os.path.isabs(path) else None


def made(
  name: str, make: Callable[[pathlib.Path], None], *, show: bool
) -> pathlib.Path:
  """Returns a folder of the cache, which is made if it is not there.

  If another process makes it, this one waits.

  Args:
    name: name of the folder, `DIGITS` of a digest of all that determines the content.
    make: makes the folder at the path that it gets.
    show: whether to say on stderr that another process is waited for.

  Raises:
    OSError: if there is no cache, if it cannot be written, or if a file has the name.
  """
  target = _folders() / name
  while not _used(target):
    outputs.check_folder(target)
    try:
      with outputs.fresh(outputs.staging(target)) as folder:
        if not target.exists():  # else another process has made it meanwhile
          make(folder / _CONTENT)
          outputs.move(folder / _CONTENT, target)
    except BlockingIOError:
      if show:
        print(f'another process makes {target}; waiting for it', file=sys.stderr)
      show = False
      time.sleep(_SECONDS)
  return target


def prune(limit: int, *, keep: pathlib.Path | None = None) -> list[pathlib.Path]:
  """Removes folders of the cache, those first that were not used for the longest time.

  A folder that another process makes stays. The rest of one whose process was killed
  goes. Whatever else is there is not looked at: the variable may name any folder.

  Args:
    limit: greatest number of bytes of the folders that stay.
    keep: a folder that stays in any case.

  Returns:
    The folders that were removed.

  Raises:
    OSError: if there is no cache, or if a folder cannot be removed.
  """
  folders, uses = _folders(), {}
  names = {path.name: path for path in folders.glob('*')}
  for name, hidden in names.items():
    if re.fullmatch(rf'\.{_NAME}\.partial', name):
      with contextlib.suppress(BlockingIOError), outputs.fresh(hidden):
        pass
  for folder in [x for name, x in names.items() if re.fullmatch(_NAME, name)]:
    with contextlib.suppress(FileNotFoundError):  # another process removes it, too
      uses[folder] = folder.stat().st_mtime_ns, nbytes(folder)
  total, removed = sum(nbytes for _, nbytes in uses.values()), []
  for folder in sorted(uses, key=lambda x: uses[x]):
    if total > limit and folder != keep:
      with contextlib.suppress(BlockingIOError, FileNotFoundError):
        # It loses its name first, so that no process finds a part of it.
        with outputs.fresh(outputs.staging(folder)) as hidden:
          os.rename(folder, hidden / _CONTENT)
        removed.append(folder)
      total -= uses[folder][1]
  return removed


def nbytes(folder: pathlib.Path) -> int:
  """Returns the bytes of the files in a folder and below it."""
  return sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())


def _folders() -> pathlib.Path:
  """Returns the place of the folders, which need not exist.

  Raises:
    OSError: if there is no cache.
  """
  found = root()
  if found is None:
    raise OSError(f'there is no folder for a cache: set {VARIABLE} to an absolute path')
  return found / _FOLDERS


def _used(folder: pathlib.Path) -> bool:
  """Returns whether a folder is there, and notes that it is used now."""
  with contextlib.suppress(OSError):  # it may be missing, or another user's
    os.utime(folder)
  return folder.is_dir()

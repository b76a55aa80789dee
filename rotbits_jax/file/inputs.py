"""The files of inputs, which no output may replace."""

from collections.abc import Iterable
import os
import pathlib
from typing import Any

from rotbits_jax import checkpoints
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file import shards as shards_lib
from rotbits_jax.system import outputs


def check(targets: Iterable[pathlib.Path], inputs: Iterable[Any]) -> None:
  """Checks, before the work, that no file of an input is replaced.

  Args:
    targets: the files that are written, if they exist.
    inputs: paths of checkpoints and encoded files; opened checkpoints and files, with
      the bases of these; or lists of inputs. Those in memory are ignored.

  Raises:
    ValueError: if one would be replaced.
  """
  paths = _paths([*inputs])
  for target in filter(os.path.exists, targets):
    named = os.path.join(os.path.realpath(target.parent), target.name)
    places = {pathlib.Path(named), outputs.resolved(target)}
    for path in paths:
      if any(_belongs(place, path) for place in places):
        raise ValueError(f'{target}: it is a file of an input, {path}')


def _paths(given: Any) -> list[str | os.PathLike[str]]:
  """Returns the paths of an input and of its bases; those in memory have none."""
  if isinstance(given, reader_lib.Reader):
    given = given.inputs
  if type(given) in (list, tuple):  # but no Checkpoint, whose stem is no path
    return [path for part in given for path in _paths(part)]
  if isinstance(given, checkpoints.PlainFiles):
    return [given.path.parent, given.path]
  if isinstance(given, checkpoints.CheckpointReader):
    given = given.path
  return [given] if isinstance(given, str | os.PathLike) else []


def _belongs(file: pathlib.Path, path: str | os.PathLike[str]) -> bool:
  """Returns whether a file that exists belongs to the input at a path.

  Results of earlier runs (encoded files, pages, and decoded checkpoints in sub-folders)
  do not belong to the checkpoint in whose folder they are.
  """
  real = outputs.resolved(path)
  if shards_lib.is_encoded(path):
    folder = real.parent if real.name == shards_lib.INDEX else real
    return file == real or file.parent == folder
  is_alone = not real.exists()
  if file == real or is_alone:
    return file == real
  folder = pathlib.Path(
    os.path.realpath(path if real.is_dir() else os.path.dirname(path))
  )
  if shards_lib.is_result(file) or file.suffix == '.html':
    return False
  if os.access(folder, os.R_OK) and any(
    x.is_symlink() and outputs.resolved(x) == file for x in folder.iterdir()
  ):  # as in the cache of the Hugging Face Hub
    return True
  if not file.is_relative_to(folder):
    return False
  if file.parent == folder:
    return True
  if not real.is_dir():
    return False
  return not (file.parent / 'config.json').exists()

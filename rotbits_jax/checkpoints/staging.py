"""Weights files that are written a tensor at a time, and the files beside them.

The files are written to a hidden folder beside the target, `.<name>.partial`, and moved
into the target when all are complete, see `outputs`. A target that does not exist
appears at once. If the target exists, its config and weights are removed before
anything is moved, and the new ones are moved last; older weights that programs would
load in place of the new ones are removed, and other files stay. After an exception the
hidden folder is removed. If the process was killed, the next writer of the same target
removes it.
"""

import abc
from collections.abc import Collection, Iterable, Mapping
import contextlib
import itertools
import os
import pathlib
import shutil
from typing import Any, NamedTuple, Self

import numpy as np

from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import indices
from rotbits_jax.checkpoints import lazy
from rotbits_jax.checkpoints.contents import CONFIG
from rotbits_jax.system import outputs
from rotbits_jax.system import schema

_SHOWN = 8  # names listed in an error


class WeightsFile(NamedTuple):
  """The layout of a safetensors file.

  Attributes:
    name: path of the file in the folder of the checkpoint.
    header: the bytes before the tensors.
    places: the offset of each tensor in the file, by its name.
    nbytes: size of the file.
  """

  name: str
  header: bytes
  places: Mapping[str, int]
  nbytes: int


class TensorWriter(abc.ABC):
  """Writes the tensors of open weights files, in any order."""

  @abc.abstractmethod
  def add(self, name: str, pieces: Iterable[memoryview]) -> None:
    """Writes a tensor from its bytes in row-major order."""

  def close(self) -> None:  # noqa: B027
    """Completes the files, after all tensors have been added."""

  def abandon(self) -> None:  # noqa: B027
    """Closes files that are not complete; does nothing after `close`."""


class PlacedWriter(TensorWriter):
  """Writes weights files whose layouts are known. None is open between two tensors."""

  def __init__(self, folder: pathlib.Path):
    """Stores the folder of the files."""
    self._folder = folder
    self._places: dict[str, tuple[pathlib.Path, int]] = {}

  def make(self, layout: WeightsFile) -> None:
    """Makes a file, which must not exist, with its header."""
    path = self._folder / layout.name
    with path.open('xb') as file:
      file.write(layout.header)
      file.truncate(layout.nbytes)
    self._places |= {name: (path, at) for name, at in layout.places.items()}

  def add(self, name: str, pieces: Iterable[memoryview]) -> None:
    path, offset = self._places[name]
    with path.open('r+b') as file:
      file.seek(offset)
      for piece in pieces:
        file.write(piece)


class StagedWriter(abc.ABC):
  """Base class of the writers of checkpoints; a context manager."""

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    weights: Iterable[str],
    tensors: Iterable[str],
    files: Mapping[str, bytes],
    overwrite: bool,
  ):
    """Checks the names of the files. Nothing is written yet.

    Args:
      path: the target directory, which is made if it does not exist.
      weights: names of the weights files.
      tensors: names of the tensors in them.
      files: the files to put beside the weights, by name.
      overwrite: whether existing files may be replaced.

    Raises:
      CheckpointError: if a name is not that of a file, or is used twice.
    """
    self._path, self._overwrite = path, overwrite
    self._weights, self._files = list(weights), dict(files)
    self._missing = dict.fromkeys(tensors)
    self._stack: contextlib.ExitStack | None = None
    seen: set[str] = set()
    for name in (*self._weights, *self._files):
      if not schema.is_relative_path(name):
        raise errors.CheckpointError(f'{name!r} is not the name of a file')
      if name in seen:
        raise errors.CheckpointError(f'two files have the name {name}')
      seen.add(name)
    if clashing := sorted(seen & _folders(seen)):
      raise errors.CheckpointError(f'{clashing[0]} cannot be a file and a folder')

  @abc.abstractmethod
  def _open(self, folder: pathlib.Path) -> TensorWriter:
    """Makes the weights files in a folder."""

  def __enter__(self) -> Self:
    """Makes the hidden folder.

    Raises:
      CheckpointError: if the format does not support the dtype of a tensor.
      OSError: if the directory cannot be written, if a file in it must not be replaced,
        if the file system takes two names for one, or if another process writes to it.
    """
    self._directory = outputs.directory_target(self._path)
    if self._directory.exists():
      check_files(self._directory, self.names(), overwrite=self._overwrite)
    with contextlib.ExitStack() as stack:
      stack.enter_context(outputs.named(self._path))
      self._folder = stack.enter_context(outputs.fresh(_staging(self._directory)))
      for folder in _folders((*self._files, *self._weights)):
        (self._folder / folder).mkdir(parents=True, exist_ok=True)
      for name, content in self._files.items():
        # Where the file system ignores case, it may have another file of this name.
        with (self._folder / name).open('xb') as file:
          file.write(content)
      self._writer = self._open(self._folder)
      stack.callback(self._writer.abandon)
      self._stack = stack.pop_all()
    return self

  def __exit__(self, error_type: Any, error: Any, trace: Any) -> None:
    """Moves the files into place, or removes them after an exception.

    Raises:
      ValueError: if a tensor was not written.
    """
    stack, self._stack = self._stack, None
    assert stack is not None
    if error_type is not None:
      stack.__exit__(error_type, error, trace)  # names a full disk; the error goes on
      return
    with stack:
      if self._missing:
        shown = ', '.join(itertools.islice(self._missing, _SHOWN))
        raise ValueError(
          f'{len(self._missing)} tensors have not been written, such as {shown}'
        )
      self._writer.close()
      self._move()

  def names(self) -> set[str]:
    """Returns the names of the files that are written to the directory, or removed."""
    directory = outputs.directory_target(self._path)
    return {*self._files, *self._weights, *self._stale(directory)}

  def _stale(self, directory: pathlib.Path) -> set[str]:
    """Returns names of older weights, which may not exist, that new ones replace.

    Programs prefer safetensors to .bin files, which may stay beside them.
    """
    new = {*self._files, *self._weights}
    names = [(indices.INDEX, indices.WEIGHTS)]
    if new & {indices.TORCH_INDEX, indices.TORCH_WEIGHTS}:
      names.append((indices.TORCH_INDEX, indices.TORCH_WEIGHTS))
    elif new.isdisjoint(names[0]):
      return set()  # weights of another name stay beside these
    shards = (_shards(directory / index) for index, _ in names)
    return {*itertools.chain(*names, *shards)} - new

  def _check_open(self) -> None:
    if self._stack is None:
      raise ValueError('the writer is not open; it is a context manager')

  def _add(self, name: str, parts: Iterable[np.ndarray]) -> None:
    """Writes a tensor from its parts along the first axis."""
    self._check_open()
    if name not in self._missing:
      raise ValueError(f'{name} was written before')
    self._writer.add(name, itertools.chain.from_iterable(map(lazy.row_major, parts)))
    del self._missing[name]

  def _move(self) -> None:
    """Moves the files into their directory, or makes their folder the directory."""
    directory = self._directory
    if not directory.exists():
      outputs.move(self._folder, directory)
      return
    # A folder without its config, its weights and their index is not a checkpoint.
    # These are removed first and come last, so that a mixture of old and new files is
    # never taken for a checkpoint.
    found = (file for file in self._folder.rglob('*') if file.is_file())
    files = {file.relative_to(self._folder).as_posix(): file for file in found}
    for folder in _folders(files):
      (directory / folder).mkdir(parents=True, exist_ok=True)
    last = [*self._weights, indices.INDEX, indices.TORCH_INDEX, CONFIG]
    stale = self._stale(directory)
    for name in (*(name for name in reversed(last) if name in files), *stale):
      old = directory / name
      if name in files and old.exists():
        shutil.copymode(old, files[name])
      old.unlink(missing_ok=True)
    for name in (*(name for name in files if name not in last), *last):
      if name in files:
        outputs.move(files[name], directory / name)


def check_files(
  directory: pathlib.Path, names: Collection[str], *, overwrite: bool
) -> None:
  """Checks, before the work, that files can be written into a directory.

  Args:
    directory: a directory that exists, see `outputs.directory_target`.
    names: relative paths of the files, whose folders need not exist.
    overwrite: whether existing files may be replaced.

  Raises:
    OSError: if one cannot be written, or must not be replaced.
  """
  for folder in sorted(_folders(names)):
    outputs.check_folder(directory / folder)
  for name in names:
    if (directory / name).parent.exists():
      outputs.check(directory / name, overwrite=overwrite)


def _folders(names: Iterable[str]) -> set[str]:
  """Returns the folders that files with these relative paths are in."""
  parents = {x for name in names for x in pathlib.PurePosixPath(name).parents}
  return {x.as_posix() for x in parents} - {'.'}


def _shards(index: pathlib.Path) -> set[str]:
  """Returns the names of the shards of an older checkpoint; none without an index."""
  try:
    names = indices.parse(indices.read(index), str(index)).shards()
  except errors.CheckpointError:
    return set()
  suffix = '.bin' if index.name == indices.TORCH_INDEX else '.safetensors'
  return {name for name in names if name.endswith(suffix)}


def _staging(directory: pathlib.Path) -> pathlib.Path:
  """Returns the hidden folder from which files can be moved into a directory."""
  beside = outputs.staging(directory)
  # Files move only within a mount.
  return directory / beside.name if os.path.ismount(directory) else beside

"""Writing checkpoints: a folder of weights files and the files beside them.

The files are written to a hidden folder beside the target, `.<name>.partial`, and moved
into the target when all are complete, see `outputs`. A target that does not exist
appears at once. If the target exists, its config and weights are removed before
anything is moved, and the new ones are moved last; older weights that programs would
load in place of the new ones are removed, and other files stay. After an exception the
hidden folder is removed.

Raises:
  CheckpointError: if a required file is missing, if a name is not that of a file, or if
    the format does not support the dtype of a tensor.
"""

import abc
from collections.abc import Collection, Iterable, Mapping
import contextlib
import itertools
import os
import pathlib
import shutil
import typing
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import config as config_lib
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import families
from rotbits_jax.checkpoints import safetensors
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.checkpoints import torch_zip
from rotbits_jax.checkpoints import transformers
from rotbits_jax.checkpoints.families import CONFIG
from rotbits_jax.system import outputs
from rotbits_jax.system import schema

Format = Literal['safetensors', 'slicegpt', 'transformers']
Dtypes: TypeAlias = Mapping[str, DTypeLike] | np.dtype | type[Any] | str
_Entry: TypeAlias = tensors_lib.ExpectedTensor | transformers.GramEntry

_SHOWN = 8  # names listed in an error


class FolderWriter(abc.ABC):
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
    """
    self._path, self._overwrite = path, overwrite
    self._weights, self._files = list(weights), dict(files)
    self._missing = dict.fromkeys(tensors)
    self._places: dict[str, tuple[pathlib.Path, int]] = {}
    self._stack: contextlib.ExitStack | None = None
    names = [*self._weights, *self._files]
    for name in names:
      if not schema.is_relative_path(name):
        raise errors.CheckpointError(f'{name!r} is not the name of a file')
    if twice := {name for name in names if names.count(name) > 1}:
      raise errors.CheckpointError(f'two files have the name {min(twice)}')
    if clashing := sorted({*names} & _folders(names)):
      raise errors.CheckpointError(f'{clashing[0]} cannot be a file and a folder')

  @abc.abstractmethod
  def _open(self) -> None:
    """Makes the weights files in `self._folder`."""

  def _close(self) -> None:  # noqa: B027
    """Completes the weights files, after all tensors have been added."""

  def __enter__(self) -> Self:
    """Makes the hidden folder.

    Raises:
      OSError: if the directory cannot be written, if a file in it must not be replaced,
        if the file system takes two names for one, or if another process writes to it.
    """
    self._directory = outputs.directory_target(self._path)
    if self._directory.exists():
      check_files(self._directory, self.names(), overwrite=self._overwrite)
    with contextlib.ExitStack() as stack:
      stack.enter_context(outputs.named(self._path))
      staging = outputs.fresh(outputs.staging(self._directory))
      self._folder = stack.enter_context(staging)
      for folder in _folders((*self._files, *self._weights)):
        (self._folder / folder).mkdir(parents=True, exist_ok=True)
      for name, content in self._files.items():
        # Where the file system ignores case, it may have another file of this name.
        with (self._folder / name).open('xb') as file:
          file.write(content)
      self._open()
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
      self._close()
      self._move()

  def names(self) -> set[str]:
    """Returns the names of the files that are written to the directory, or removed."""
    directory = outputs.directory_target(self._path)
    return {*self._files, *self._weights, *self._stale(directory)}

  def _make(
    self, name: str, header: bytes, offsets: Mapping[str, int], nbytes: int
  ) -> None:
    """Makes a weights file with its header; the tensors follow at their offsets."""
    path = self._folder / name
    with path.open('xb') as file:
      file.truncate(nbytes)
      file.write(header)
    self._places |= {tensor: (path, offset) for tensor, offset in offsets.items()}

  def _write(self, name: str, pieces: Iterable[memoryview]) -> None:
    """Writes a tensor, given its bytes in row-major order, into its file."""
    path, offset = self._places[name]
    with path.open('r+b') as file:
      file.seek(offset)
      for piece in pieces:
        file.write(piece)

  def _add(self, name: str, arrays: Iterable[np.ndarray]) -> None:
    """Writes a tensor, given its parts along the first axis."""
    self._check_open()
    if name not in self._missing:
      raise ValueError(f'{name} was written before')
    pieces = map(tensors_lib.row_major, arrays)
    self._write(name, itertools.chain.from_iterable(pieces))
    del self._missing[name]

  def _check_open(self) -> None:
    """Raises ValueError outside the context."""
    if self._stack is None:
      raise ValueError('the writer is not open; it is a context manager')

  def _stale(self, directory: pathlib.Path) -> set[str]:
    """Returns names of older weights, which may not exist, that new ones replace."""
    new = {*self._files, *self._weights}
    if new.isdisjoint((safetensors.INDEX, safetensors.WEIGHTS)):
      return set()  # weights of another name stay beside these
    try:
      content = safetensors.read_index(directory / safetensors.INDEX)
      shards = safetensors.parse_index(content, safetensors.INDEX).shards()
    except errors.CheckpointError:  # there is none
      shards = {}
    older = {name for name in shards if name.endswith('.safetensors')}
    return (older | {safetensors.INDEX, safetensors.WEIGHTS}) - new

  def _move(self) -> None:
    """Moves the files into their directory, or makes their folder the directory."""
    directory = self._directory
    if not directory.exists():
      outputs.move(self._folder, directory)
      return
    # A folder without its config, its weights and their index is not a checkpoint.
    # These are removed first and come last, so that a mixture of old and new files is
    # never taken for a checkpoint.
    new = (file for file in self._folder.rglob('*') if file.is_file())
    files = {file.relative_to(self._folder).as_posix(): file for file in new}
    for folder in _folders(files):
      (directory / folder).mkdir(parents=True, exist_ok=True)
    last = [x for x in (*self._weights, safetensors.INDEX, CONFIG) if x in files]
    for name in (*reversed(last), *self._stale(directory)):
      old = directory / name
      if name in files and old.exists():
        shutil.copymode(old, files[name])
      old.unlink(missing_ok=True)
    for name in (*(name for name in files if name not in last), *last):
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


class CheckpointWriter(FolderWriter):
  """Writes the checkpoint of a model. Parameters are added one at a time.

  The class is a context manager:

    with CheckpointWriter(directory, config, dtypes=dtypes, files=files) as writer:
      for path, leaf in model.leaves():
        writer.add(path, leaf)

  Parameters come in any order. A tensor is written as soon as all parameters that it
  holds have been added, and is not kept in memory.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    config: models.ModelConfig,
    *,
    dtypes: Dtypes,
    files: Mapping[str, bytes],
    stem: str | None = None,
    format: Format = 'safetensors',
    shard_size: int | None = None,
    shortcuts: transformers.Ranks | None = None,
    buffers: Mapping[str, Any] | None = None,
    overwrite: bool = True,
  ):
    """Plans the files; nothing is written yet.

    Args:
      directory: the target directory, which is made if it does not exist.
      config: sizes and switches.
      dtypes: dtype of each parameter by its path in the model, for example
        'layers.3/attention/query/kernel' or 'embed/tokens'; or one dtype for all.
      files: content of the sidecar files beside the weights, by name. If an index is
        among them, and `shard_size` is None, the tensors are divided among files as it
        says.
      stem: file name, without suffix, that SliceGPT gives to the weights and the
        slicing JSON; only for a sliced model.
      format: 'safetensors' writes `model.safetensors`. 'slicegpt' writes `<stem>.pt` as
        SliceGPT does, and 'transformers' writes `model.safetensors` beside the code
        that transformers needs, see `transformers`; both only for a sliced model.
      shard_size: the greatest number of bytes of tensors in a safetensors file with
        more than one tensor; None for one file. Several files get names and an index as
        in Hugging Face's checkpoints.
      shortcuts: the columns of B and of C of each shortcut that 'transformers' stores
        as factors, by its path in the model; the other formats multiply them.
      buffers: tensors of the checkpoint that the forward pass does not use, by name.
        'transformers' leaves them out, because it computes them.
      overwrite: whether existing files may be replaced.

    Raises:
      ValueError: if the format does not suit the model, or a dtype is missing.
    """
    if format not in typing.get_args(Format):
      raise ValueError(
        f'format must be one of {", ".join(typing.get_args(Format))}, got {format!r}'
      )
    if format != 'safetensors' and not config.sliced:
      raise ValueError(
        f'only a sliced model has the format {format}; transformers loads a dense one '
        'from the format safetensors'
      )
    if shard_size is not None and (format == 'slicegpt' or shard_size < 1):
      raise ValueError(
        'shard_size must be positive and requires safetensors files, '
        f'got {shard_size} and {format}'
      )
    _check_sidecars(config, stem, files)
    self._stem, self._format = stem, format
    entries: Iterable[_Entry]
    if format == 'transformers':
      ranks, buffers = shortcuts or {}, {}
      entries = transformers.entries(config, ranks)
      files = transformers.sidecars(
        config, files, stem=stem, ranks=ranks, dtype=_dtype(dtypes, 'embed/tokens')
      )
    else:
      entries = itertools.chain(*tensors_lib.entries(config).values())
    self._buffers = {name: np.asarray(x) for name, x in (buffers or {}).items()}
    self._plan(entries, dtypes)
    files = dict(files)
    index = files.pop(safetensors.INDEX, None)
    if format == 'slicegpt':
      weights = [f'{stem}.pt']
    else:
      self._shards, metadata = self._divide(index, shard_size)
      weights = list(self._shards)
      if weights != [safetensors.WEIGHTS]:
        files[safetensors.INDEX] = safetensors.index_json(self._shards, metadata)
    super().__init__(
      directory,
      weights=weights,
      tensors=self._specs,
      files=files,
      overwrite=overwrite,
    )

  def __enter__(self) -> Self:
    super().__enter__()
    for name, buffer in self._buffers.items():
      self._add(name, [buffer])
    return self

  def add(self, path: str, leaf: Any) -> None:
    """Adds a parameter.

    Args:
      path: its path in the model, like 'layers.3/attention/query/kernel'.
      leaf: an array, or a structured leaf, which is materialized; but see `shortcuts`.

    Raises:
      ValueError: if the parameter is unknown, was added before, or does not have the
        planned shape and dtype; or if the writer is not open.
    """
    entry = self._entries.get(path)
    if entry is None:
      raise ValueError(f'{path}: the model has no such parameter')
    self._check_open()
    if path in self._added:  # a tensor of several parameters waits for the others
      raise ValueError(f'{path} was added before')
    expected = self._dtypes[path], entry.parameters()[path]
    got = np.dtype(leaf.dtype), tuple(leaf.shape)
    if got != expected:
      raise ValueError(
        f'{path}: expected {expected[0]} {expected[1]}, got {got[0]} {got[1]}'
      )
    self._added.add(path)
    self._waiting[path] = leaf
    if all(x in self._waiting for x in entry.paths):
      leaves = [self._waiting.pop(x) for x in entry.paths]
      for name, arrays in entry.write(leaves).items():
        self._add(name, arrays)

  def _plan(self, entries: Iterable[_Entry], dtypes: Dtypes) -> None:
    """Plans the tensors of the files."""
    self._dtypes: dict[str, np.dtype] = {}
    self._entries: dict[str, _Entry] = {}
    self._added: set[str] = set()
    self._waiting: dict[str, Any] = {}
    self._specs: dict[str, tensors_lib.TensorSpec] = {}
    for entry in entries:
      for path in entry.paths:
        self._entries[path] = entry
        self._dtypes[path] = _dtype(dtypes, path)
      dtype, *others = {self._dtypes[path] for path in entry.paths}
      if others:
        raise ValueError(f'{entry.name}: its parameters have several dtypes')
      for name, shape in entry.stored().items():
        self._specs[name] = tensors_lib.TensorSpec(shape, dtype)
    for name, buffer in self._buffers.items():
      self._specs[name] = tensors_lib.TensorSpec(buffer.shape, buffer.dtype)

  def _divide(
    self, index: bytes | None, shard_size: int | None
  ) -> tuple[dict[str, safetensors.Specs], Any]:
    """Divides the tensors among files: as an index says, if it is of these tensors.

    Returns:
      The tensors of each file, and the metadata of the index; None without it.
    """
    if index is not None and shard_size is None:
      parsed = safetensors.parse_index(index, safetensors.INDEX)
      if parsed.weight_map.keys() == self._specs.keys():
        divided: dict[str, safetensors.Specs] = {
          shard: {name: self._specs[name] for name in names}
          for shard, names in parsed.shards().items()
        }
        return divided, parsed.metadata
    return safetensors.plan_shards(self._specs, shard_size), None

  def _open(self) -> None:
    if self._format == 'slicegpt':
      path = self._folder / f'{self._stem}.pt'
      self._torch = torch_zip.TorchZipWriter(path, self._specs, str(self._stem))
      return
    for name, specs in self._shards.items():
      header, offsets = safetensors.layout(specs)
      nbytes = len(header) + sum(spec.nbytes for spec in specs.values())
      self._make(name, header, offsets, nbytes)

  def _write(self, name: str, pieces: Iterable[memoryview]) -> None:
    if self._format == 'slicegpt':
      self._torch.add(name, pieces)
    else:
      super()._write(name, pieces)

  def _close(self) -> None:
    if self._format == 'slicegpt':
      self._torch.close()


def _dtype(dtypes: Dtypes, path: str) -> np.dtype:
  """Returns the dtype of a parameter."""
  if not isinstance(dtypes, Mapping):
    return np.dtype(dtypes)
  if path not in dtypes:
    raise ValueError(f'{path}: its dtype is missing')
  return np.dtype(dtypes[path])


def _check_sidecars(
  config: models.ModelConfig, stem: str | None, files: Mapping[str, bytes]
) -> None:
  """Checks that the files make a checkpoint."""
  required = [CONFIG]
  if config.sliced:
    if stem is None:
      raise errors.CheckpointError('a sliced checkpoint needs a stem, got None')
    required.append(f'{stem}.json')
  for name in required:
    if name not in files:
      raise errors.CheckpointError(f'the file {name} is missing from the checkpoint')


def save_checkpoint(
  checkpoint: tensors_lib.Checkpoint,
  directory: str | os.PathLike[str],
  format: Format = 'safetensors',
  *,
  shard_size: int | None = None,
  overwrite: bool = True,
) -> None:
  """Saves a checkpoint with the tensor names, shapes and dtypes of the original.

  Structured leaves are materialized one layer at a time. Other files in the directory
  stay, except older weights that programs would load in place of the new ones.

  Args:
    checkpoint: the model and its sidecar files.
    directory: the directory, which is made if it does not exist.
    format: see `CheckpointWriter`.
    shard_size: see `CheckpointWriter`.
    overwrite: see `CheckpointWriter`.

  Raises:
    ValueError: if the format does not suit the model, if a file name is not valid, or
      if the `config.json` is that of another model.
    OSError: if the directory cannot be written, or a file must not be replaced.
  """
  model, files, stem = checkpoint
  leaves = tensors_lib.leaves_of(model)
  files = fitting_files(model, files, stem)
  with CheckpointWriter(
    directory,
    model.config,
    dtypes={path: np.dtype(leaf.dtype) for path, leaf in leaves.items()},
    files=files,
    stem=stem,
    format=format,
    shard_size=shard_size,
    shortcuts=transformers.thin_shortcuts(leaves),
    buffers=model.buffers,
    overwrite=overwrite,
  ) as writer:
    for path in list(leaves):
      writer.add(path, leaves.pop(path))


def fitting_files(
  model: models.Model, files: dict[str, bytes], stem: str | None
) -> dict[str, bytes]:
  """Returns sidecar files that do not tie a head that differs from the embedding.

  A checkpoint may store its tied head, and a training then changes both.

  Args:
    model: the model as it is stored.
    files: the files by name, of the checkpoint that the model was.
    stem: name of the slicing JSON among them.

  Raises:
    ValueError: if the files tell another config than that of the model.
  """
  families.check_files(files, model.config, stem)
  untied = families.with_own_head(files, model.config)
  if untied is files:
    return files
  families.parse_config(config_lib.parse_object(files[CONFIG], CONFIG))  # or leave it
  flat = structured.flatten(model.outer())
  pair = [flat.get('head/kernel'), flat.get('embed/tokens')]
  # Parts of arrays on other hosts are not compared: a head of its own is never wrong.
  known = all(
    structured.is_plain(x) and getattr(x, 'is_fully_addressable', True) for x in pair
  )
  if known:
    head, table = map(np.asarray, pair)
    known = structured.same_bits(head.T, table)
  return files if known else untied

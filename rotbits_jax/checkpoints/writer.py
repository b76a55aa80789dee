"""Writing checkpoints: a folder of weights files and the files beside them.

The files are written to a hidden folder beside the target, which takes the place of the
target when all are complete, see `outputs.move`. After an exception it is removed.

Raises:
  ValueError: if arguments do not suit each other or the model.
  OSError: if the directory cannot be written or must not be replaced.
"""

import collections
from collections.abc import Callable, Iterator, Mapping
import contextlib
import fnmatch
import itertools
import os
import pathlib
import typing
from typing import Any, BinaryIO, Literal, Self

import numpy as np
from numpy.typing import DTypeLike

from rotbits_jax import models
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import families
from rotbits_jax.checkpoints import folders
from rotbits_jax.checkpoints import safetensors
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.checkpoints import torch_zip
from rotbits_jax.checkpoints import transformers
from rotbits_jax.checkpoints.families import CONFIG
from rotbits_jax.system import outputs

Copy = Callable[[BinaryIO], None]
"""Writes the content of a file to an open one."""

Format = Literal['safetensors', 'slicegpt', 'transformers']

_OLDER_WEIGHTS = 'model*.safetensors*'  # that new weights replace


class FolderWriter:
  """Writes weights files, with tensors that come in any order, and other files."""

  def __init__(
    self,
    path: str | os.PathLike[str],
    weights: Mapping[str, bytes | safetensors.Specs],
    *,
    files: Mapping[str, bytes],
    copies: Mapping[str, Copy] | None = None,
    overwrite: bool = False,
  ):
    """Plans the files, which may replace those of an older checkpoint.

    Args:
      path: The folder.
      weights: By the relative path of each weights file, the header of a safetensors
        file, or the tensors of a PyTorch file.
      files: The content of files to put beside them, by relative path.
      copies: Functions that write other files, by relative path.
      overwrite: Whether an older checkpoint may be replaced.
    """
    self._path, self._weights = path, weights
    self._files, self._overwrite = files, overwrite
    self._copies = dict(copies or {})
    self.specs: dict[str, tensors_lib.TensorSpec] = {}  # of the tensors by name
    self._places: dict[str, tuple[str, int]] = {}  # name of the file, and offset in it
    for name in (*weights, *files, *self._copies):
      if not tensors_lib.is_relative_path(name):
        raise errors.CheckpointError(f'{name!r} is not the name of a file')
    counts = collections.Counter([*weights, *files, *self._copies])
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
      raise errors.CheckpointError(f'two files have the name {min(twice)}')
    places = {name: _places(name, content) for name, content in weights.items()}
    paths = folders.tensor_paths(places)
    for name, tensors in places.items():
      for tensor, (offset, spec) in tensors.items():
        path_of_tensor = paths[name][tensor]
        self.specs[path_of_tensor] = spec
        self._places[path_of_tensor] = name, offset
    self._missing = dict.fromkeys(self.specs)

  @contextlib.contextmanager
  def open(self) -> Iterator[Self]:
    """Makes the hidden folder; moves it into place at the end of the context."""
    target = outputs.directory_target(self._path)
    self.replaced()
    with outputs.writer(target) as self._folder:
      self.replaced()  # again, because no other process writes now
      self._archives: dict[str, torch_zip.TorchZipWriter] = {}
      for name, content in {**self._files, **self._weights}.items():
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
          # Where the file system ignores case, it may have another file of this name.
          with path.open('xb') as file:
            file.write(content)
        else:
          self._archives[name] = torch_zip.TorchZipWriter(path, content)
      for name, write in self._copies.items():
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open('xb') as file:
          write(file)
      yield self
      if count := len(self._missing):
        first = next(iter(self._missing))
        raise ValueError(f'{count} tensors have not been written, such as {first}')
      for archive in self._archives.values():
        archive.close()
      outputs.move(self._folder, target)

  def add_tensor(self, name: str, *arrays: np.ndarray) -> None:
    """Writes a tensor once, given its slices along the first axis."""
    pieces = itertools.chain.from_iterable(map(tensors_lib.row_major, arrays))
    file_name, offset = self._places[name]
    if file_name in self._archives:
      self._archives[file_name].add(name, pieces)
    else:
      with (self._folder / file_name).open('r+b') as file:
        file.seek(offset)
        file.writelines(pieces)
    del self._missing[name]

  def replaced(self) -> list[pathlib.Path]:
    """Returns the files of an older checkpoint that are replaced."""
    new = {*self._files, *self._weights, *self._copies}
    return outputs.check_replaced(
      outputs.directory_target(self._path),
      lambda name: name in new or fnmatch.fnmatch(name, _OLDER_WEIGHTS),
      overwrite=self._overwrite,
    )


def _places(
  name: str, content: bytes | safetensors.Specs
) -> dict[str, tuple[int, tensors_lib.TensorSpec]]:
  """Returns the offset and the spec of each tensor of a weights file."""
  if not isinstance(content, bytes):
    return {tensor: (0, spec) for tensor, spec in content.items()}
  with errors.named(name):
    return safetensors.places(content)


class CheckpointWriter(FolderWriter):
  """Writes the checkpoint of a model. Parameters are added one at a time.

    writer = CheckpointWriter(directory, config, dtypes=dtypes, files=files)
    with writer.open():
      for path, leaf in model.leaves():
        writer.add(path, leaf)

  They come in any order. A tensor is written as soon as all parameters that it holds
  have been added, and is not kept in memory.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    config: models.ModelConfig,
    *,
    dtypes: Mapping[str, DTypeLike],
    files: Mapping[str, bytes],
    stem: str | None = None,
    format: Format = 'safetensors',
    shard_size: int | None = None,
    buffers: Mapping[str, Any] | None = None,
    code: bool = False,
    copies: Mapping[str, Copy] | None = None,
    overwrite: bool = False,
  ):
    """Plans the files.

    Args:
      dtypes: dtype of each parameter by its path in the model, for example
        'layers.3/attention/query/kernel' or 'buffers/NAME'.
      files: content of the sidecar files, by name. An index among them divides the
        tensors among files, if `shard_size` is None.
      stem: name of a sliced model's `<stem>.pt` and slicing JSON.
      format: 'slicegpt' writes `<stem>.pt`, and 'transformers' the code that it needs;
        both are for sliced models.
      shard_size: the greatest number of bytes of tensors in a safetensors file with
        more than one tensor; None for one file.
      buffers: arrays or `TensorSpec`s of the tensors that the forward pass does not
        use, by name. 'transformers' computes them, so it leaves them out.
      copies: see `FolderWriter`.
      code: whether 'transformers' keeps Python modules among `files`, as others do.
    """
    formats = typing.get_args(Format)
    if format not in formats:
      raise ValueError(f'format must be one of {", ".join(formats)}, got {format!r}')
    if format != 'safetensors' and not config.sliced:
      text = 'transformers loads a dense one from the format safetensors'
      raise ValueError(f'only a sliced model has the format {format}; {text}')
    if shard_size is not None and (format == 'slicegpt' or shard_size < 1):
      text = f'got {shard_size} and {format}'
      raise ValueError(f'shard_size must be positive and needs safetensors, {text}')
    if config.sliced and stem is None:
      raise errors.CheckpointError('a sliced checkpoint needs a stem, got None')
    for name in [CONFIG, f'{stem}.json'] if config.sliced else [CONFIG]:
      if name not in files:
        raise errors.CheckpointError(f'the file {name} is missing from the checkpoint')
    buffers = buffers or {}
    entries = [*itertools.chain(*tensors_lib.entries(config, buffers).values())]
    shapes = {path: x for entry in entries for path, x in entry.parameters.items()}
    self._parameters = {
      path: tensors_lib.TensorSpec(shape, np.dtype(dtypes[path]))
      for path, shape in shapes.items()
    }
    if format == 'transformers':
      entries = [transformers.renamed(x) for x in entries if x.name not in buffers]
      kept = {name: x for name, x in files.items() if name != f'{stem}.json'}
      dtype = self._parameters['embed/tokens'].dtype
      files = transformers.sidecars(config, kept, dtype, code=code)
    specs: dict[str, tensors_lib.TensorSpec] = {}
    self._entries: dict[str, tensors_lib.ExpectedTensor] = {}
    for entry in entries:
      dtypes_of_entry = {self._parameters[path].dtype for path in entry.parameters}
      if len(dtypes_of_entry) > 1:
        raise ValueError(f'{entry.name}: its parameters have several dtypes')
      if entry.name in specs:
        raise errors.CheckpointError(f'two tensors have the name {entry.name}')
      specs[entry.name] = tensors_lib.TensorSpec(entry.shape, *dtypes_of_entry)
      self._entries |= dict.fromkeys(entry.parameters, entry)
    self._waiting: dict[str, Any] = {}
    files = dict(files)
    index = files.pop(safetensors.INDEX, None)
    weights: dict[str, Any] = {f'{stem}.pt': specs}
    if format != 'slicegpt':
      shards, new_index = safetensors.divided(specs, index, shard_size)
      weights = {name: safetensors.header(shard) for name, shard in shards.items()}
      files |= {} if new_index is None else {safetensors.INDEX: new_index}
    super().__init__(
      directory, weights, files=files, copies=copies, overwrite=overwrite
    )

  def add(self, path: str, leaf: Any) -> None:
    """Adds a parameter once: an array or a structured leaf, which is materialized."""
    if path not in self._parameters:
      raise ValueError(f'{path}: there is no such parameter, or it was added before')
    expected = self._parameters.pop(path)
    got = tensors_lib.TensorSpec(tuple(leaf.shape), np.dtype(leaf.dtype))
    if got != expected:
      raise ValueError(f'{path}: expected {expected}, got {got}')
    self._waiting[path] = leaf
    entry = self._entries.get(path)  # None for a buffer that is left out
    if entry and all(x in self._waiting for x in entry.parameters):
      leaves = [self._waiting.pop(x) for x in entry.parameters]
      self.add_tensor(entry.name, *entry.write(leaves))


def save_checkpoint(
  checkpoint: tensors_lib.Checkpoint,
  directory: str | os.PathLike[str],
  format: Format = 'safetensors',
  *,
  shard_size: int | None = None,
  overwrite: bool = False,
) -> None:
  """Saves a checkpoint with the tensor names, shapes and dtypes of the original.

  `CheckpointWriter` describes the arguments.
  """
  model, files, stem = checkpoint
  leaves = tensors_lib.leaves_of(model)
  writer = CheckpointWriter(
    directory,
    model.config,
    dtypes={path: np.dtype(leaf.dtype) for path, leaf in leaves.items()},
    files=families.with_own_head(files, model.config),
    stem=stem,
    format=format,
    shard_size=shard_size,
    buffers=model.buffers,
    overwrite=overwrite,
  )
  with writer.open():
    for path in list(leaves):
      writer.add(path, leaves.pop(path))

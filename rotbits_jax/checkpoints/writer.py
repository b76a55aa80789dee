"""Writing checkpoints: a folder of weights files and the files beside them.

The files are written to a hidden folder beside the target, which takes the place of the
target when all are complete, see `outputs.move`. After an exception it is removed.

Raises:
  CheckpointError: if a required file is missing, if a name is not that of a file, or if
    the format does not support the dtype of a tensor.
"""

from collections.abc import Iterable, Mapping
import contextlib
import fnmatch
import itertools
import os
import pathlib
import typing
from typing import Any, Literal, Self, TypeAlias

import msgspec
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
_OLDER_WEIGHTS = 'model*.safetensors*'  # that new weights replace


class FolderWriter:
  """Writes weights files and the files beside them. Tensors come in any order.

  The class is a context manager, see `CheckpointWriter`.

  Attributes:
    specs: the shape and dtype of each tensor by its name.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    weights: Mapping[str, bytes | safetensors.Specs],
    *,
    files: Mapping[str, bytes],
    overwrite: bool = True,
  ):
    """Plans the files; nothing is written yet.

    Args:
      path: the target directory, which is made if it does not exist.
      weights: by the name of each weights file, the header of a safetensors file, or
        the tensors of a PyTorch file.
      files: the files to put beside the weights, by name.
      overwrite: whether an existing checkpoint may be replaced.
    """
    self._path, self._weights = path, dict(weights)
    self._files, self._overwrite = dict(files), overwrite
    self._open_files: dict[str, safetensors.FileWriter | torch_zip.TorchZipWriter] = {}
    names = [*self._weights, *self._files]
    for name in names:
      if not schema.is_relative_path(name):
        raise errors.CheckpointError(f'{name!r} is not the name of a file')
      if names.count(name) > 1:
        raise errors.CheckpointError(f'two files have the name {name}')
    self.specs: dict[str, tensors_lib.TensorSpec] = {}
    self._file_of: dict[str, str] = {}
    for name, content in self._weights.items():
      if isinstance(content, bytes):
        placed = safetensors.places(content, name, any_dtype=True)
        specs: safetensors.Specs = {x: spec for x, (_, spec) in placed.items()}
      else:
        specs = content
      if twice := self.specs.keys() & specs.keys():
        raise errors.CheckpointError(f'two files have the tensor {min(twice)}')
      self.specs |= specs
      self._file_of |= dict.fromkeys(specs, name)
    self._missing = dict.fromkeys(self.specs)

  def __enter__(self) -> Self:
    """Makes the hidden folder.

    Raises:
      OSError: if the directory cannot be written or must not be replaced, if the file
        system takes two names for one, or if another process writes to it.
    """
    target = outputs.directory_target(self._path)
    self.replaced()
    with contextlib.ExitStack() as stack:
      stack.enter_context(outputs.named(self._path))
      folder = stack.enter_context(outputs.fresh(outputs.staging(target)))
      for name in (*self._files, *self._weights):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
      for name, data in self._files.items():
        # Where the file system ignores case, it may have another file of this name.
        with (folder / name).open('xb') as file:
          file.write(data)
      for name, content in self._weights.items():
        if isinstance(content, bytes):
          self._open_files[name] = safetensors.FileWriter(folder / name, content)
        else:
          self._open_files[name] = torch_zip.TorchZipWriter(folder / name, content)
      self._folder, self._target, self._stack = folder, target, stack.pop_all()
    return self

  def __exit__(self, error_type: Any, error: Any, trace: Any) -> None:
    """Moves the folder into place, or removes it after an exception.

    Raises:
      ValueError: if a tensor was not written.
    """
    if error_type is not None:
      self._stack.__exit__(error_type, error, trace)  # names a full disk
      return
    with self._stack:
      if self._missing:
        shown = ', '.join(itertools.islice(self._missing, _SHOWN))
        raise ValueError(
          f'{len(self._missing)} tensors have not been written, such as {shown}'
        )
      for file in self._open_files.values():
        file.close()
      outputs.move(self._folder, self._target)

  def add(self, name: str, *arrays: np.ndarray) -> None:
    """Writes a tensor, given its parts along the first axis.

    Raises:
      ValueError: if it was written before.
    """
    if name not in self._missing:
      raise ValueError(f'{name} was written before')
    pieces = map(tensors_lib.row_major, arrays)
    file = self._open_files[self._file_of[name]]
    file.add(name, itertools.chain.from_iterable(pieces))
    del self._missing[name]

  def replaced(self) -> list[pathlib.Path]:
    """Returns the files of an older checkpoint that are replaced.

    Raises:
      OSError: if they must not be replaced, or if another file would be lost.
    """
    return outputs.check_replaced(
      outputs.directory_target(self._path),
      lambda name: (
        name in {*self._files, *self._weights} or fnmatch.fnmatch(name, _OLDER_WEIGHTS)
      ),
      overwrite=self._overwrite,
    )


class CheckpointWriter:
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
      overwrite: whether an existing checkpoint may be replaced.

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
    weights: dict[str, Any] = {f'{stem}.pt': self._specs}
    if format != 'slicegpt':
      shards, metadata = self._divide(index, shard_size)
      weights = {name: safetensors.header(specs) for name, specs in shards.items()}
      if [*weights] != [safetensors.WEIGHTS]:
        files[safetensors.INDEX] = safetensors.index_json(shards, metadata)
    self._folder = FolderWriter(directory, weights, files=files, overwrite=overwrite)
    self.replaced = self._folder.replaced

  def __enter__(self) -> Self:
    """Makes the hidden folder, see `FolderWriter`."""
    self._folder.__enter__()
    for name, buffer in self._buffers.items():
      self._folder.add(name, buffer)
    return self

  def __exit__(self, *error: Any) -> None:
    """Moves the folder into place, see `FolderWriter`."""
    self._folder.__exit__(*error)

  def add(self, path: str, leaf: Any) -> None:
    """Adds a parameter.

    Args:
      path: its path in the model, like 'layers.3/attention/query/kernel'.
      leaf: an array, or a structured leaf, which is materialized; but see `shortcuts`.

    Raises:
      ValueError: if the parameter is unknown, was added before, or does not have the
        planned shape and dtype.
    """
    entry = self._entries.get(path)
    if entry is None:
      raise ValueError(f'{path}: the model has no such parameter')
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
        self._folder.add(name, *arrays)

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

  Structured leaves are materialized one layer at a time.

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
    files: the files by name, of the checkpoint that the model was. They are returned as
      they are if a config is missing or is not of a known family.
    stem: name of the slicing JSON among them.

  Raises:
    ValueError: if the config in the files is not that of the model. The message names
      the fields that differ.
  """
  config = model.config
  names = [CONFIG, f'{stem}.json'] if config.sliced else [CONFIG]
  if not files.keys() >= {*names}:
    return files
  try:
    parsed = [config_lib.parse_object(files[name], name) for name in names]
    of_files = families.parse_config(*parsed)
  except errors.CheckpointError:
    return files
  if is_untied := of_files.tied_head and not config.tied_head:
    of_files = msgspec.structs.replace(of_files, tied_head=False)
  fields = config.__struct_fields__
  differing = [x for x in fields if getattr(of_files, x) != getattr(config, x)]
  if differing:
    listed = ', '.join(names)
    raise ValueError(
      f'{listed}: the config of the model has another {", ".join(differing)}; '
      f'change {listed} in `files`, too'
    )
  if not is_untied:
    return files
  flat = structured.flatten(model.outer())
  head, table = flat['head/kernel'], flat['embed/tokens']
  is_plain = structured.is_plain(head) and structured.is_plain(table)
  if is_plain and structured.same_bits(np.asarray(head).T, np.asarray(table)):
    return files
  return families.with_own_head(files, config)

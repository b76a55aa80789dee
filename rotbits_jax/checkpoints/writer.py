"""Writing the checkpoint of a model one parameter at a time."""

from collections.abc import Iterable, Mapping
import itertools
import os
import pathlib
import typing
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from rotbits_jax import models
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import factors as factors_lib
from rotbits_jax.checkpoints import indices
from rotbits_jax.checkpoints import lazy
from rotbits_jax.checkpoints import safetensors_files
from rotbits_jax.checkpoints import staging
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.checkpoints import torch_zip
from rotbits_jax.checkpoints import transformers_files
from rotbits_jax.checkpoints.contents import CONFIG

Format = Literal['safetensors', 'slicegpt', 'transformers']
_Entry: TypeAlias = tensors_lib.ExpectedTensor | transformers_files.GramEntry
Dtypes: TypeAlias = Mapping[str, DTypeLike] | np.dtype | type[Any] | str


class CheckpointWriter(staging.StagedWriter):
  """Writes a checkpoint. Parameters are added one at a time, in any order.

  The class is a context manager:

    with CheckpointWriter(directory, config, dtypes=dtypes, files=files) as writer:
      for path, leaf in model.leaves():
        writer.add(path, leaf)

  A tensor is written as soon as all parameters that it holds have been added, and is
  not kept in memory. The files appear together at the end, see `staging`.
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
    factors: Mapping[str, tuple[int, str]] | None = None,
    shortcuts: transformers_files.Ranks | None = None,
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
        that transformers needs, see `transformers_files`; both only for a sliced model.
      shard_size: the greatest number of bytes of tensors in a safetensors file with
        more than one tensor; None for one file. Several files get names and an index as
        in Hugging Face's checkpoints.
      factors: rank and naming (a key of `FACTORS`) of each weight that is stored as two
        factors, by its path in the model. 'transformers' multiplies the factors.
      shortcuts: the columns of B and of C of each shortcut that 'transformers' stores
        as factors, by its path in the model; the other formats multiply them.
      buffers: tensors of the checkpoint that the forward pass does not use, by name.
        'transformers' leaves them out, because it computes them.
      overwrite: whether existing files may be replaced.

    Raises:
      ValueError: if the format does not suit the model, or a dtype is missing.
      CheckpointError: if a required file is missing, or a file name is not valid.
    """
    if format not in typing.get_args(Format):
      raise ValueError(
        f'format must be one of {", ".join(typing.get_args(Format))}, got {format!r}'
      )
    if format == 'slicegpt' and not config.sliced:
      raise ValueError('only a sliced model can be saved in the slicegpt format')
    if format == 'transformers' and not config.sliced:
      raise ValueError(
        'only a sliced model needs the format transformers: a dense model loads in '
        'transformers from the format safetensors'
      )
    if shard_size is not None and (format == 'slicegpt' or shard_size < 1):
      raise ValueError(
        'shard_size must be positive and requires safetensors files, '
        f'got {shard_size} and {format}'
      )
    _check_files(config, stem, files)
    self._stem, self._format = stem, format
    if format == 'transformers':
      ranks, factors, buffers = shortcuts or {}, {}, {}
      entries = transformers_files.entries(config, ranks)
      dtype = _dtype(dtypes, 'embed/tokens')
      files = transformers_files.sidecars(
        config, files, stem=stem, ranks=ranks, dtype=dtype
      )
    else:
      ranks, factors = {}, factors or {}
      rows = {path: factors_lib.Factored(*row) for path, row in factors.items()}
      entries = itertools.chain(*tensors_lib.entries(config, rows).values())
    self._buffers = {name: np.asarray(x) for name, x in (buffers or {}).items()}
    self._plan(entries, dtypes)
    if unknown := {*factors, *ranks} - self._entries.keys():
      raise ValueError(f'factors: no such parameters: {", ".join(sorted(unknown))}')
    files = dict(files)
    index = files.pop(indices.INDEX, None)
    if format == 'slicegpt':
      weights = [f'{stem}.pt']
    else:
      self._shards, metadata = self._divide(index, shard_size)
      weights = list(self._shards)
      if weights != [indices.WEIGHTS]:
        files[indices.INDEX] = indices.to_json(self._shards, metadata)
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
      leaf: an array, or a structured leaf, which is materialized unless it is stored as
        factors.

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
    self._check(entry, path, leaf)
    self._added.add(path)
    self._waiting[path] = leaf
    if all(own in self._waiting for own in entry.paths):
      leaves = [self._waiting.pop(own) for own in entry.paths]
      for name, parts in entry.write(leaves).items():
        self._add(name, parts)

  def _plan(self, entries: Iterable[_Entry], dtypes: Dtypes) -> None:
    """Plans the tensors of the files."""
    self._dtypes: dict[str, np.dtype] = {}
    self._entries: dict[str, _Entry] = {}
    self._added: set[str] = set()
    self._waiting: dict[str, Any] = {}
    self._specs: dict[str, lazy.TensorSpec] = {}
    for entry in entries:
      for path in entry.paths:
        self._entries[path] = entry
        self._dtypes[path] = _dtype(dtypes, path)
      found = {self._dtypes[path] for path in entry.paths}
      if len(found) > 1:
        raise ValueError(f'{entry.name}: its parts have several dtypes, got {found}')
      dtype = found.pop()
      for name, shape in entry.stored().items():
        self._specs[name] = lazy.TensorSpec(shape, dtype)
    for name, buffer in self._buffers.items():
      self._specs[name] = lazy.TensorSpec(buffer.shape, buffer.dtype)

  def _divide(
    self, index: bytes | None, shard_size: int | None
  ) -> tuple[dict[str, safetensors_files.Specs], Any]:
    """Divides the tensors among files: as an index says, if it is of these tensors.

    Returns:
      The tensors of each file, and the metadata of the index; None without it.
    """
    if index is not None and shard_size is None:
      parsed = indices.parse(index, indices.INDEX)
      shards = parsed.shards()
      if set().union(*shards.values()) == self._specs.keys():
        divided: dict[str, safetensors_files.Specs] = {
          shard: {name: self._specs[name] for name in names}
          for shard, names in shards.items()
        }
        return divided, parsed.metadata
    return safetensors_files.plan_shards(self._specs, shard_size), None

  def _open(self, folder: pathlib.Path) -> staging.TensorWriter:
    if self._format == 'slicegpt':
      path = folder / f'{self._stem}.pt'
      return torch_zip.TorchZipWriter(path, self._specs, str(self._stem))
    writer = staging.PlacedWriter(folder)
    for name, specs in self._shards.items():
      writer.make(safetensors_files.layout(name, specs))
    return writer

  def _check(self, entry: _Entry, path: str, leaf: Any) -> None:
    """Checks that a parameter is as planned.

    Raises:
      ValueError: if it is not.
    """
    expected = self._dtypes[path], entry.parameters()[path]
    got = np.dtype(leaf.dtype), tuple(leaf.shape)
    if got != expected:
      raise ValueError(
        f'{path}: expected {expected[0]} {expected[1]}, got {got[0]} {got[1]}'
      )
    entry.check(path, leaf)


def _dtype(dtypes: Dtypes, path: str) -> np.dtype:
  if not isinstance(dtypes, Mapping):
    return np.dtype(dtypes)
  if path not in dtypes:
    raise ValueError(f'{path}: its dtype is missing')
  return np.dtype(dtypes[path])


def _check_files(
  config: models.ModelConfig, stem: str | None, files: Mapping[str, bytes]
) -> None:
  """Checks that the files make a checkpoint.

  Raises:
    CheckpointError: if a required file is missing.
  """
  required = [CONFIG]
  if config.sliced:
    if stem is None:
      raise errors.CheckpointError('a sliced checkpoint needs a stem, got None')
    required.append(f'{stem}.json')
  for name in required:
    if name not in files:
      raise errors.CheckpointError(f'the file {name} is missing from the checkpoint')

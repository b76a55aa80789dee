"""Writing a checkpoint one layer at a time."""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import itertools
import os
import pathlib
import shutil
import typing
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import factors as factors_lib
from rotbits_jax.checkpoints import lazy
from rotbits_jax.checkpoints import safetensors_files
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.checkpoints import torch_zip
from rotbits_jax.checkpoints import transformers_files
from rotbits_jax.checkpoints.contents import CONFIG
from rotbits_jax.checkpoints.errors import CheckpointError
from rotbits_jax.checkpoints.safetensors_files import INDEX
from rotbits_jax.system import outputs

Format = Literal['safetensors', 'slicegpt', 'transformers']
Dtypes: TypeAlias = Mapping[str, DTypeLike] | np.dtype | type[Any] | str


class CheckpointWriter:
  """Writes a checkpoint. Layers are added one at a time, in any order.

  The class is a context manager:

    with CheckpointWriter(directory, config, dtypes=dtypes, files=files) as writer:
      writer.outer(outer)
      for index, layer in enumerate(layers):
        writer.layer(index, layer)

  Each tensor is written at once and not kept in memory. The files are written to a
  hidden directory beside the target, `.<name>.partial`. They are moved into the target
  when all are complete, see `outputs`. A target that does not exist appears at once. If
  the target exists, its config and weights are removed before anything is moved, and
  the new ones are moved last. Its other files stay, with two exceptions: the index of
  older weights is removed, and a `model.safetensors` is removed if shards replace it.
  After an exception the hidden directory is removed. If the process was killed, the
  next writer of the same target removes it.
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
      files: content of the sidecar files beside the weights, by name.
      stem: file name, without suffix, that SliceGPT gives to the weights and the
        slicing JSON; only for a sliced model.
      format: 'safetensors' writes `model.safetensors`. 'slicegpt' writes `<stem>.pt` as
        SliceGPT does, and 'transformers' writes `model.safetensors` beside the code
        that transformers needs, see `transformers_files`; both only for a sliced model.
      shard_size: the greatest number of bytes of tensors in a safetensors file with
        more than one tensor; None for one file. Several files get names and an index as
        in Hugging Face's checkpoints.
      factors: rank and naming (a key of `FACTORS`) of each weight that is stored as two
        factors, by its path in the model. For 'transformers' they are multiplied.
      shortcuts: for 'transformers', the columns of B and of C of each shortcut that is
        stored as factors, by its path in the model.
      buffers: tensors of the checkpoint that the forward pass does not use, by name.
        They are left out for 'transformers', which computes them.
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
    _check_required(config, stem, files)
    self._path, self._overwrite = directory, overwrite
    self._config, self._stem, self._format = config, stem, format
    self._buffers = {name: np.asarray(x) for name, x in (buffers or {}).items()}
    self._shortcuts: transformers_files.Ranks = {}
    if format == 'transformers':
      self._buffers, factors, self._shortcuts = {}, {}, shortcuts or {}
      dtype = _dtype(dtypes, 'embed/tokens')
      files = transformers_files.sidecars(
        config, files, stem=stem, ranks=self._shortcuts, dtype=dtype
      )
    self._plan(dtypes, factors or {})
    self._files = dict(files)
    if format == 'slicegpt':
      self._weights = [f'{stem}.pt']
    else:
      self._shards = safetensors_files.plan_shards(self._specs, shard_size)
      self._weights = list(self._shards)
    index = len(self._weights) > 1
    check_names((*files, *self._weights, *index * [INDEX]))
    if index:
      self._files[INDEX] = safetensors_files.index_json(self._shards)
    self._missing: set[str] = set()
    self._stack: contextlib.ExitStack | None = None

  def __enter__(self) -> 'CheckpointWriter':
    """Makes the staging directory.

    Raises:
      CheckpointError: if the format does not support the dtype of a tensor.
      OSError: if the directory cannot be written, if a file in it must not be replaced,
        or if another process writes to it.
    """
    self._directory = outputs.directory_target(self._path)
    if self._directory.exists():
      for name in (*self._files, *self._weights):
        outputs.check(self._directory / name, overwrite=self._overwrite)
    with contextlib.ExitStack() as stack:
      stack.enter_context(outputs.named(self._path))
      self._staging = stack.enter_context(outputs.fresh(staging(self._directory)))
      for name, content in self._files.items():
        (self._staging / name).write_bytes(content)
      if self._format == 'slicegpt':
        self._writer: safetensors_files.Writer | torch_zip.Writer = torch_zip.Writer(
          self._staging / self._weights[0], self._specs, str(self._stem)
        )
      else:
        self._writer = safetensors_files.Writer(self._staging, self._shards)
      stack.callback(self._writer.abandon)
      self._missing = set(self._specs)
      for name, buffer in self._buffers.items():
        self._add(name, [buffer])
      self._stack = stack.pop_all()
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    """Moves the files into place, or removes them after an exception.

    Raises:
      ValueError: if a tensor was not written.
    """
    stack, self._stack = self._stack, None
    assert stack is not None
    if kind is not None:
      stack.__exit__(kind, error, trace)  # names a full disk; the error goes on
      return
    with stack:
      if self._missing:
        shown = ', '.join(sorted(self._missing)[:8])
        raise ValueError(
          f'{len(self._missing)} tensors have not been written, such as {shown}'
        )
      self._writer.close()
      move(self._staging, self._directory, self._weights)

  def outer(self, params: models.Params) -> None:
    """Writes parameters outside the layers.

    The embedding and the head may be written by different calls.

    Args:
      params: nested dicts of arrays, as in `Model.outer`. Structured leaves are
        materialized, except weights that are stored as factors.

    Raises:
      ValueError: if a parameter is unknown, was written before, or does not have the
        planned shape and dtype.
    """
    self._write(None, params)

  def layer(self, index: int, params: models.Params) -> None:
    """Writes a layer; see `outer`.

    Args:
      index: the layer.
      params: nested dicts of arrays, as in `Model.layer`.

    Raises:
      ValueError: see `outer`.
      IndexError: if there is no such layer.
    """
    if not 0 <= index < self._config.num_layers:
      raise IndexError(f'the model has {self._config.num_layers} layers, got {index=}')
    self._write(index, params)

  def _entries(self, unit: int | None) -> Iterator[tensors_lib.Entry]:
    """Yields the tensors of a unit."""
    if self._format == 'transformers':
      return transformers_files.entries(self._config, unit, self._shortcuts)
    return tensors_lib.entries(self._config, unit)

  def _plan(
    self,
    dtypes: Dtypes,
    factors: Mapping[str, tuple[int, str]],
  ) -> None:
    """Plans the tensors of the files, and the shape and dtype of each parameter."""
    if isinstance(dtypes, Mapping):
      dtypes = dict(dtypes)
      for path in self._shortcuts:
        for factor in transformers_files.factor_paths(path):
          dtypes[factor] = _dtype(dtypes, path)
    self._expected: dict[str, lazy.TensorSpec] = {}
    self._specs: dict[str, lazy.TensorSpec] = {}
    self._factors: dict[str, factors_lib.Factored] = {}
    for unit in tensors_lib.units(self._config):
      prefix = tensors_lib.unit_name(unit)
      found: dict[str, Any] = {}
      for entry in self._entries(unit):
        paths = [prefix + path for path in entry.paths]
        for path, length in zip(paths, entry.lengths, strict=True):
          part = (length, *entry.shape[1:])
          shape = part[::-1] if entry.transposed else part
          self._expected[path] = lazy.TensorSpec(shape, _dtype(dtypes, path))
        parts = {self._expected[path].dtype for path in paths}
        if len(parts) > 1:
          raise ValueError(f'{entry.name}: its parts have several dtypes, got {parts}')
        dtype = parts.pop()
        found[entry.name] = lazy.TensorSpec(entry.shape, dtype)
        if len(paths) == 1 and paths[0] in factors:
          row = factors_lib.Factored(*factors[paths[0]])
          self._factors[paths[0]] = row
          rows, columns = entry.shape
          found[entry.name] = structured.LowRank(
            lazy.TensorSpec((rows, row.rank), dtype),
            lazy.TensorSpec((row.rank, columns), dtype),
            names=row.names,
          )
      self._specs |= factors_lib.split(found)
    if unknown := factors.keys() - self._expected.keys():
      raise ValueError(f'factors: no such parameters: {", ".join(sorted(unknown))}')
    self._specs |= {
      name: lazy.TensorSpec(x.shape, x.dtype) for name, x in self._buffers.items()
    }

  def _write(self, unit: int | None, params: models.Params) -> None:
    """Writes the tensors of a unit that hold the given parameters."""
    if self._stack is None:
      raise ValueError('the writer is not open; it is a context manager')
    prefix = tensors_lib.unit_name(unit)
    flat = structured.flatten(params)
    flat = transformers_files.split(flat, prefix, self._shortcuts)
    known = list(self._entries(unit))
    for path, leaf in flat.items():
      self._check(prefix + path, leaf)
      if isinstance(leaf, structured.FactorPair) and prefix + path not in self._factors:
        flat[path] = leaf.materialize()
    for entry in known:
      given = [path for path in entry.paths if path in flat]
      if given and len(given) < len(entry.paths):
        raise ValueError(f'{entry.name} needs all of {entry.paths}, got only {given}')
    for name, parts in tensors_lib.tensors_of(known, flat).items():
      self._add(name, parts)

  def _check(self, path: str, leaf: Any) -> None:
    """Checks that a parameter is as planned.

    Raises:
      ValueError: if it is not.
    """
    expected = self._expected.get(path)
    if expected is None:
      raise ValueError(f'{path}: the model has no such parameter')
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    if (shape, dtype) != (expected.shape, expected.dtype):
      raise ValueError(
        f'{path}: expected {expected.dtype} {expected.shape}, got {dtype} {shape}'
      )
    row = self._factors.get(path)
    if row is not None:
      is_pair = isinstance(leaf, structured.FactorPair)
      got = factors_lib.Factored(leaf.rank, leaf.names) if is_pair else None
      if got != row:
        raise ValueError(f'{path}: expected factors, {row}, got {got}')

  def _add(self, name: str, parts: list[np.ndarray]) -> None:
    """Writes a tensor from its parts along the first axis."""
    if name not in self._missing:
      raise ValueError(f'{name} was written before')
    self._writer.add(name, itertools.chain.from_iterable(map(lazy.row_major, parts)))
    self._missing.remove(name)


def move(staged: pathlib.Path, directory: pathlib.Path, weights: Iterable[str]) -> None:
  """Moves staged files into their directory, or makes their folder the directory.

  Args:
    staged: the folder of the files.
    directory: where they belong.
    weights: names of the weights files.
  """
  if not directory.exists():
    outputs.move(staged, directory)
    return
  # A folder without its config, its weights and their index is not a checkpoint. These
  # are removed first and come last, so that a mixture of old and new files is never
  # taken for a checkpoint.
  last = [*weights, INDEX, CONFIG]
  files = {file.name: file for file in staged.iterdir()}
  removed = [name for name in reversed(last) if name in files or name == INDEX]
  if INDEX in files:
    removed.append(safetensors_files.WEIGHTS)
  for name in removed:
    old = directory / name
    if name in files and old.exists():
      shutil.copymode(old, files[name])
    old.unlink(missing_ok=True)
  for name in (*(name for name in files if name not in last), *last):
    if name in files:
      outputs.move(files[name], directory / name)


def _dtype(dtypes: Dtypes, path: str) -> np.dtype:
  if not isinstance(dtypes, Mapping):
    return np.dtype(dtypes)
  if path not in dtypes:
    raise ValueError(f'{path}: its dtype is missing')
  return np.dtype(dtypes[path])


def _check_required(
  config: models.ModelConfig, stem: str | None, files: Mapping[str, bytes]
) -> None:
  """Checks that the files make a checkpoint.

  Raises:
    CheckpointError: if a required file is missing.
  """
  required = [CONFIG]
  if config.sliced:
    if stem is None:
      raise CheckpointError('a sliced checkpoint needs a stem, got None')
    required.append(f'{stem}.json')
  for name in required:
    if name not in files:
      raise CheckpointError(f'the file {name} is missing from the checkpoint')


def check_names(names: Iterable[str]) -> None:
  """Refuses names that are not those of different files.

  Raises:
    CheckpointError: naming the first such name.
  """
  seen = set()
  for name in names:
    if name in ('', '.', '..') or any(c in name for c in '/\\\0'):
      raise CheckpointError(f'{name!r} is not the name of a file')
    if name in seen:
      raise CheckpointError(f'{name} is the name of the weights and of another file')
    seen.add(name)


def staging(directory: pathlib.Path) -> pathlib.Path:
  """Returns the hidden directory from which files can be moved into a directory."""
  beside = outputs.staging(directory)
  if directory.exists() and directory.stat().st_dev != directory.parent.stat().st_dev:
    return directory / beside.name  # because files move only within a file system
  return beside

"""Reading checkpoints: a folder of weights, configs and tokenizer files.

The stem is the name that SliceGPT gives to the weights and the slicing JSON of a sliced
model, as in `<stem>.pt` and `<stem>.json`.

Raises:
  UnsupportedError: if the files are not a checkpoint of a known family; if a tensor is
    missing or unknown, or has a wrong shape or dtype; or if a head that must be tied
    differs from the embedding.
  CheckpointError: if a file is missing or damaged, or has changed.
"""

from collections.abc import Iterable, Mapping
import functools
import hashlib
import itertools
import json
import os
import pathlib
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import config as config_lib
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import families
from rotbits_jax.checkpoints import folder as folder_lib
from rotbits_jax.checkpoints import plain
from rotbits_jax.checkpoints import safetensors
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.checkpoints import torch_zip
from rotbits_jax.checkpoints.families import CONFIG
from rotbits_jax.system import schema

_DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
_SHOWN = 8  # names listed in an error


class CheckpointReader:
  """A checkpoint whose parameters are read when they are requested.

  Opening a checkpoint reads its names, shapes, dtypes and config. A record is a layer,
  or all parameters of a key outside the layers; see `models.names`. The parameters of a
  record are in memory until the caller deletes them.

  Attributes:
    config: sizes and switches. If the given config says that the head is tied, but the
      checkpoint stores a head, this config says that it is not tied.
    stored_as: None, because the parameters have their final dtype.
    records: names of the records: the layers, then those outside the layers.
    path: the weights file, or the index if there are several.
    files: bytes of the sidecar files (configs, tokenizer, license, code) beside the
      weights, by name.
    stem: file name, without suffix, that SliceGPT gave to the weights and the slicing
      JSON; None if the model is dense.
    left_out: names of files and folders beside the weights that are not kept; and the
      metadata of safetensors files, if it is not.
    elements: how many elements all tensors have.
    nbytes: how many bytes all tensors have.
  """

  stored_as = None

  def __init__(
    self,
    tensors: Mapping[str, tensors_lib.LazyTensor],
    config: models.ModelConfig,
    *,
    path: pathlib.Path | None = None,
    weights: Iterable[pathlib.Path] = (),
    files: Mapping[str, bytes] | None = None,
    stem: str | None = None,
    left_out: tuple[str, ...] = (),
  ):
    """Matches the tensors with the parameters that a model with this config has.

    The tensors have their names in the checkpoint. The files that hold them are `path`,
    which is None for tensors in memory, and `weights`.
    """
    self.path, self.files, self.stem = path, dict(files or {}), stem
    self.left_out = left_out
    opened = [x for x in (path, *weights) if x is not None]
    self._weights = [tensors_lib.opened(x) for x in opened]
    self._tensors = tensors
    try:
      self.config = _untied(tensors, config)
      self._entries = _match(tensors, self.config)
    except errors.CheckpointError as e:
      where = '' if path is None else f'{path}: '
      raise errors.UnsupportedError(f'{where}{e}') from e
    self._buffers = sorted(filter(families.is_buffer, tensors))
    buffers = [models.names.BUFFERS] if self._buffers else []
    self.records = (*self._entries, *buffers)
    self.elements = sum(tensor.size for tensor in tensors.values())
    self.nbytes = sum(tensor.nbytes for tensor in tensors.values())

  @property
  def input_bytes(self) -> int:
    """Size of the files that hold the tensors, without their index."""
    sizes = {file.path: file.size for file in self._weights}
    return sum(size for path, size in sizes.items() if path.suffix != '.json')

  def read(self, record: str) -> models.Params:
    """Reads one of `records`.

    Returns:
      Nested dicts, with the record as their only key. Leaves are NumPy arrays. Kernels
      are `[in, out]`.
    """
    if record == models.names.BUFFERS:
      return {record: {name: self._tensors[name].read() for name in self._buffers}}
    flat: models.Params = {}
    for entry in self._entries[record]:
      flat |= entry.read(self._tensors[entry.name].read())
    return structured.unflatten(flat)

  def specs(self, record: str) -> models.Params:
    """Returns the shapes and dtypes of one of `records`; nothing is read.

    That is the result of `read` with a `TensorSpec` in place of each array.
    """
    if record == models.names.BUFFERS:
      return {record: {name: self._tensors[name].spec for name in self._buffers}}
    return structured.unflatten(
      {
        path: tensors_lib.TensorSpec(shape, self._tensors[entry.name].dtype)
        for entry in self._entries[record]
        for path, shape in entry.parameters().items()
      }
    )

  def layer(self, index: int) -> models.Params:
    """Reads the parameters of a layer, with the keys of `Model.layer`.

    Raises:
      IndexError: if there is no such layer.
    """
    if not 0 <= index < self.config.num_layers:
      raise IndexError(f'the model has {self.config.num_layers} layers, got {index=}')
    name = models.names.layer(index)
    layer: models.Params = self.read(name)[name]
    return layer

  def outer(self) -> models.Params:
    """Reads the parameters outside the layers, see `read`."""
    params: models.Params = {}
    for record in self._entries:
      if models.names.layer_index(record) is None:
        params |= self.read(record)
    return params

  @functools.cached_property
  def buffers(self) -> dict[str, np.ndarray]:
    """The tensors that the forward pass does not use, by their names."""
    return dict(self.read(models.names.BUFFERS)[models.names.BUFFERS])

  def fingerprint(self) -> str:
    """Returns a digest of the files in their state when they were opened.

    It covers the config, the bytes of the sidecar files, and the names, sizes and times
    of change of the weights files. It also covers names, shapes and dtypes of the
    tensors, but not their elements, which are not read.
    """
    summary = {
      'weights': [(file.path.name, file.size, file.modified) for file in self._weights],
      'tensors': {
        name: (tensor.shape, tensor.dtype.name)
        for name, tensor in self._tensors.items()
      },
      'config': schema.dump(self.config),
      'files': {
        name: hashlib.sha256(content).hexdigest()
        for name, content in self.files.items()
      },
      'stem': self.stem,
    }
    return hashlib.sha256(json.dumps(summary, sort_keys=True).encode()).hexdigest()

  def load(self) -> tensors_lib.Checkpoint:
    """Reads the whole checkpoint into memory, as NumPy arrays."""
    params = self.outer()
    key = lambda index: models.stack_key(
      self.specs(models.names.layer(index))[models.names.layer(index)]
    )
    for layers in models.stack_ranges(range(self.config.num_layers), key):
      stack = models.stack_layers(map(self.layer, layers), len(layers))
      params[models.names.stack(layers)] = stack
    model = models.Model(params, self.buffers, self.config)
    return tensors_lib.Checkpoint(model, dict(self.files), self.stem)


def from_tensors(
  tensors: Mapping[str, np.ndarray], config: models.ModelConfig
) -> models.Model:
  """Makes a model from the tensors of a checkpoint, by their names there.

  If the config says that the head is tied, but there is a tensor for the head, it must
  equal the embedding. The model then has the head as a parameter, and its config says
  that the head is not tied.

  Returns:
    The model; its leaves are NumPy arrays of the tensors' dtypes.
  """
  known = {name: tensors_lib.LazyTensor.of(tensor) for name, tensor in tensors.items()}
  return CheckpointReader(known, config).load().model


def _match(
  tensors: Mapping[str, tensors_lib.LazyTensor], config: models.ModelConfig
) -> dict[str, list[tensors_lib.ExpectedTensor]]:
  """Returns the entries of all records, after checking the tensors."""
  if config.num_layers > len(tensors):  # before a table is made of what the config says
    raise errors.CheckpointError(
      f'tensors of the checkpoint: most are missing: there are {len(tensors)}, and the '
      f'config has {config.num_layers} layers'
    )
  records = tensors_lib.entries(config)
  expected = {entry.name: entry.shape for entry in itertools.chain(*records.values())}
  got = {name for name in tensors if not families.is_buffer(name)}
  problems = []
  states = {'missing': expected.keys() - got, 'unknown': got - expected.keys()}
  for state, names in states.items():
    if names:
      shown, more = ', '.join(sorted(names)[:_SHOWN]), len(names) - _SHOWN
      problems.append(f'{state}: {shown}' + (f' and {more} more' if more > 0 else ''))
  if problems:
    raise errors.CheckpointError(f'tensors of the checkpoint: {"; ".join(problems)}')
  for name, shape in expected.items():
    if tensors[name].shape != shape:
      raise errors.CheckpointError(
        f'{name}: expected shape {shape}, got {tensors[name].shape}'
      )
    if tensors[name].dtype not in _DTYPES:
      raise errors.CheckpointError(
        f'{name}: expected float16, bfloat16 or float32, got {tensors[name].dtype}'
      )
  return records


def _untied(
  tensors: Mapping[str, tensors_lib.LazyTensor], config: models.ModelConfig
) -> models.ModelConfig:
  """Returns the config of a checkpoint that may store its tied head."""
  untied = msgspec.structs.replace(config, tied_head=False)
  entries = tensors_lib.outer_entries(untied)
  head, embedding = (entries[x][0].name for x in ('head', 'embed'))
  if not config.tied_head or head not in tensors:
    return config
  a, b = tensors[head], tensors.get(embedding)
  if b is not None and (
    a.spec != b.spec or not structured.same_bits(a.read(), b.read())
  ):
    raise errors.CheckpointError(
      f'{head} differs from {embedding}, but the config says that they are tied'
    )
  return untied


# ---- folders -------------------------------------------------------------------------


def example(name: str = 'phi2-tiny-sliced-0.25') -> pathlib.Path:
  """Returns the folder of a small checkpoint of random weights, for examples.

  Args:
    name: 'phi2-tiny-sliced-0.25', 'phi2-tiny-dense' or 'llama-tiny-dense'.
  """
  package = pathlib.Path(__file__).parents[1]
  # setup.py copies some of the folders of the repository into the package.
  for folder in (package / 'testdata', package.parent / 'tests' / 'testdata'):
    if (folder / name / CONFIG).is_file():
      return folder / name
  raise errors.CheckpointError(f'there is no example {name!r}')


def load_checkpoint(path: str | os.PathLike[str]) -> tensors_lib.Checkpoint:
  """Loads a dense or a sliced checkpoint into memory, as NumPy arrays.

  Args:
    path: see `open_checkpoint`.
  """
  return open_checkpoint(path).load()


def open_any(path: str | os.PathLike[str]) -> CheckpointReader | plain.PlainFiles:
  """Opens a checkpoint, as plain tensors if it is not of a known family.

  Args:
    path: see `open_checkpoint`.
  """
  try:
    return open_checkpoint(path)
  except errors.UnsupportedError as e:
    return plain.open_plain(path, reason=str(e))


def open_checkpoint(path: str | os.PathLike[str]) -> CheckpointReader:
  """Opens a dense or a sliced checkpoint: names, shapes, dtypes and the config.

  Three types of directories are supported: Hugging Face's (`model.safetensors`,
  `pytorch_model.bin`, or shards and their index), SliceGPT's (`<name>_<sparsity>.pt`
  and `.json`), and the directories of `save_checkpoint`. Weights with shortcuts are
  taken as a sliced model.

  Args:
    path: the directory; or a weights file or index in it, if it has several.

  Returns:
    The checkpoint. It reads parameters only when they are requested.
  """
  weights = folder_lib.find_weights(pathlib.Path(path))
  is_torch = folder_lib.is_torch(weights)
  open_file = torch_zip.open_file if is_torch else safetensors.open_file
  shards: list[pathlib.Path] = []
  index: dict[str, bytes] = {}
  tensors: dict[str, tensors_lib.LazyTensor] = {}
  if weights.suffix == '.json':
    content = safetensors.read_index(weights)
    for shard, names in folder_lib.shards(weights, content).items():
      own_tensors = open_file(shard)
      if differing := sorted(own_tensors.keys() ^ {*names})[:_SHOWN]:
        raise errors.CheckpointError(
          f'{weights}: {shard.name} and the index differ in '
          f'{errors.cut(", ".join(differing))}'
        )
      tensors |= own_tensors
      shards.append(shard)
    if weights.name == safetensors.INDEX:  # the writer divides the tensors as it does
      index = {weights.name: content}
  else:
    tensors = open_file(weights)
  folder = weights.parent
  files, left_out = folder_lib.read_sidecars(folder, {weights, *shards}, index)
  if CONFIG not in files:
    is_link = ' other than a link that leaves the folder or leads nowhere'
    raise errors.UnsupportedError(
      f'{folder}: there is no {CONFIG}{is_link if CONFIG in left_out else ""}'
    )
  slicing_jsons = _slicing_jsons(files)
  stem = None
  if any(name.endswith(f'.{families.SHORTCUT_NAME}') for name in tensors):
    stem = _slicing_stem(weights, slicing_jsons.keys())
  others = [f'{x}.json' for x in sorted(slicing_jsons.keys() - {stem})]  # of models
  files = {name: content for name, content in files.items() if name not in others}
  metadata = [
    f'the metadata of {file.name}'
    for file in (shards or [weights])
    if not is_torch and safetensors.has_own_metadata(file)
  ]
  config_json = config_lib.parse_json(files[CONFIG], str(folder / CONFIG))
  try:
    slicing_json = None if stem is None else slicing_jsons[stem]
    config = families.parse_config(config_json, slicing_json)
  except errors.CheckpointError as e:
    raise errors.UnsupportedError(f'{weights}: {e}') from e
  return CheckpointReader(
    tensors,
    config,
    path=weights,
    weights=shards,
    files=files,
    stem=stem,
    left_out=(*left_out, *others, *metadata[:1]),
  )


def _slicing_jsons(files: Mapping[str, bytes]) -> dict[str, Any]:
  """Returns the slicing JSONs among the sidecar files, by their stems."""
  key = f'"{families.SLICING_KEY}"'.encode()
  parsed = {
    name.removesuffix('.json'): config_lib.parse_json(content, name)
    for name, content in files.items()
    if name.endswith('.json') and '/' not in name and key in content
  }
  return {
    stem: value
    for stem, value in parsed.items()
    if isinstance(value, dict) and families.SLICING_KEY in value
  }


def _slicing_stem(weights: pathlib.Path, stems: Iterable[str]) -> str:
  """Returns the stem of the slicing JSON that describes the weights."""
  stems = sorted(stems)
  if weights.suffix == '.pt':
    if weights.stem not in stems:
      raise errors.CheckpointError(
        f'{weights}: the slicing JSON {weights.stem}.json must be beside it'
      )
    return weights.stem
  if len(stems) != 1:
    names = errors.cut(', '.join(f'{stem}.json' for stem in stems)) or 'none'
    raise errors.CheckpointError(
      f'{weights}: a sliced model needs one slicing JSON beside it, got {names}'
    )
  return stems[0]

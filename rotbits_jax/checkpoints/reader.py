"""Reading checkpoints: a folder of weights, configs and tokenizer files.

The stem is the name that SliceGPT gives to a sliced model's weights and slicing JSON,
`<stem>.pt` and `<stem>.json`.

Raises:
  UnsupportedError: if the files are not a checkpoint of a known family, or a tensor is
    not one of its config.
  CheckpointError: if a file is missing or damaged, or has changed.
"""

from collections.abc import Mapping
import dataclasses
import functools
import itertools
import os
import pathlib
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import families
from rotbits_jax.checkpoints import folder as folder_lib
from rotbits_jax.checkpoints import safetensors
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.checkpoints.families import CONFIG
from rotbits_jax.checkpoints.families import SLICING_KEY

_DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
_SHORTCUT = f'.attn_shortcut{families.SHORTCUT_SUFFIX}'  # in every sliced layer


class PlainFiles(folder_lib.Folder):
  """The safetensors files of a checkpoint of any family.

  A record is a layer: its tensors have the same number in their names, like 3 in
  'transformer.h.3.attn.weight'. So is each expert of a layer, like expert 5 in
  'model.layers.3.mlp.experts.5.up_proj.weight', because a layer may have hundreds.
  Elsewhere weight and bias of one name are a record.

  `reason` says why the checkpoint is not opened as a model; None if nobody tried.
  """

  def __init__(self, folder: folder_lib.Folder, reason: str | None = None):
    super().__init__(**vars(folder))
    self.reason = reason
    for name, tensor in folder.tensors.items():
      if not all(name.split('/')):
        text = f'{name!r} cannot be the name of a tensor'
        raise errors.CheckpointError(f'{folder.path}: {text}')
      entry = tensors_lib.ExpectedTensor(name, tensor.shape, {name: tensor.shape})
      self.entries.setdefault(_record_of(name), []).append(entry)


def _record_of(tensor: str) -> str:
  """Returns the name of the record of a tensor, see `PlainFiles`."""
  words = tensor.split('.')
  numbers = [i for i, word in enumerate(words) if word.isdecimal()]
  experts = [i for i in numbers if i and words[i - 1] == 'experts']
  last = (*experts, *numbers, max(len(words) - 2, 0))[0] + 1
  return '.'.join(words[:last])


class CheckpointReader(folder_lib.Folder):
  """A checkpoint of a known family, whose tensors are the parameters of a model.

  `models.names` has the names of its records. The config of a checkpoint that stores
  its tied head says that the head is not tied.
  """

  config: models.ModelConfig

  def __init__(
    self, folder: folder_lib.Folder, config: models.ModelConfig, stem: str | None = None
  ):
    """Matches the tensors with the parameters that a model with this config has."""
    super().__init__(**vars(folder))
    try:
      self.config, self.stem = _untied(folder.tensors, config), stem
      self.entries = _match(folder.tensors, self.config)
    except errors.CheckpointError as e:
      where = '' if folder.path is None else f'{folder.path}: '
      raise errors.UnsupportedError(f'{where}{e}') from e

  def layer(self, index: int) -> models.Params:
    """Reads the parameters of a layer, with the keys of `Model.layer`."""
    name = models.names.layer(index)
    return dict(self.read(name)[name])

  def outer(self) -> models.Params:
    """Reads the parameters outside the layers, see `read`."""
    params: models.Params = {}
    for record in self.records:
      if record != models.names.BUFFERS and models.names.layer_index(record) is None:
        params |= self.read(record)
    return params

  @functools.cached_property
  def buffers(self) -> dict[str, np.ndarray]:
    """The tensors that the forward pass does not use, by their names."""
    record = models.names.BUFFERS
    return dict(self.read(record)[record]) if record in self.records else {}

  def load(self) -> tensors_lib.Checkpoint:
    """Reads the whole checkpoint into memory, as NumPy arrays."""
    params = self.outer()
    specs = map(self.specs, map(models.names.layer, range(self.config.num_layers)))
    keys = [models.stack_key(*layer.values()) for layer in specs]
    for layers in models.stack_ranges(range(len(keys)), keys.__getitem__):
      stack = models.stack_layers(map(self.layer, layers), len(layers))
      params[models.names.stack(layers)] = stack
    model = models.Model(params, self.buffers, self.config)
    return tensors_lib.Checkpoint(model, dict(self.files), self.stem)


def in_memory(
  tensors: Mapping[str, tensors_lib.LazyTensor],
  config: models.ModelConfig,
  files: Mapping[str, bytes] | None = None,
) -> CheckpointReader:
  """Opens tensors that are not in a folder, by their names in the checkpoint."""
  folder = folder_lib.Folder(None, tensors, dict(files or {}))
  return CheckpointReader(folder, config)


def from_tensors(
  tensors: Mapping[str, np.ndarray], config: models.ModelConfig
) -> models.Model:
  """Makes a model, of NumPy arrays, from the tensors of a checkpoint by name.

  If the config says that the head is tied, but there is a tensor for the head, it must
  equal the embedding; the model's config then says that the head is not tied.
  """
  lazy = {
    name: tensors_lib.LazyTensor(x.shape, x.dtype, functools.partial(np.asarray, x))
    for name, x in tensors.items()
  }
  return in_memory(lazy, config).load().model


def _match(
  tensors: Mapping[str, tensors_lib.LazyTensor], config: models.ModelConfig
) -> tensors_lib.Records:
  """Returns the entries of all records, after checking the tensors."""
  if config.num_layers > len(tensors):  # before a table is made of what the config says
    text = f'{len(tensors)} tensors are too few for {config.num_layers} layers'
    raise errors.CheckpointError(f'most are missing: {text}')
  buffers = {name: x for name, x in tensors.items() if families.is_buffer(name)}
  records = tensors_lib.entries(config, buffers)
  expected = {entry.name: entry.shape for entry in itertools.chain(*records.values())}
  wrong = [
    name
    for name in sorted(expected.keys() | tensors.keys())
    if name not in tensors
    or tensors[name].shape != expected.get(name)
    or not (name in buffers or tensors[name].dtype in _DTYPES)
  ]
  if wrong:
    name, tensor = wrong[0], tensors.get(wrong[0])
    got = 'none' if tensor is None else f'{tensor.dtype} {tensor.shape}'
    text = f'expected float16, bfloat16 or float32 {expected.get(name)}, got {got}'
    raise errors.CheckpointError(f'{len(wrong)} tensors do not fit; {name}: {text}')
  return records


def _untied(
  tensors: Mapping[str, tensors_lib.LazyTensor], config: models.ModelConfig
) -> models.ModelConfig:
  """Returns the config of a checkpoint that may store its tied head."""
  untied = msgspec.structs.replace(config, tied_head=False)
  entries = tensors_lib.outer_entries(untied)
  head, embedding = (tensors.get(entries[x][0].name) for x in ('head', 'embed'))
  if not config.tied_head or head is None:
    return config
  if embedding is not None and not (
    head.shape == embedding.shape
    and structured.same_bits(head.read(), embedding.read())
  ):
    name = entries['head'][0].name
    text = 'differs from the embedding, but the config says that they are tied'
    raise errors.CheckpointError(f'{name} {text}')
  return untied


def example(name: str = 'phi2-tiny-sliced-0.25') -> pathlib.Path:
  """Returns the folder of a small checkpoint: 'phi2-tiny-dense', 'llama-tiny-dense'."""
  package = pathlib.Path(__file__).parents[1]
  # setup.py copies some of the folders of the repository into the package.
  for folder in (package / 'testdata', package.parent / 'tests' / 'testdata'):
    if (folder / name / CONFIG).is_file():
      return folder / name
  raise errors.CheckpointError(f'there is no example {name!r}')


def load_checkpoint(path: str | os.PathLike[str]) -> tensors_lib.Checkpoint:
  """Loads a checkpoint into memory, as NumPy arrays; see `open_checkpoint`."""
  return open_checkpoint(path).load()


def open_any(path: str | os.PathLike[str]) -> CheckpointReader | PlainFiles:
  """Opens a checkpoint, as plain tensors if it is not of a known family."""
  try:
    return open_checkpoint(path)
  except errors.UnsupportedError as e:
    return open_plain(path, reason=str(e))


def open_plain(
  path: str | os.PathLike[str], *, reason: str | None = None
) -> PlainFiles:
  """Opens the safetensors files of a checkpoint of any family; see `PlainFiles`."""
  try:
    return PlainFiles(folder_lib.open_folder(path, plain=True), reason)
  except errors.UnsupportedError as e:
    raise errors.UnsupportedError(f'{reason}, and {e}' if reason else str(e)) from e


def open_checkpoint(path: str | os.PathLike[str]) -> CheckpointReader:
  """Opens a dense or a sliced checkpoint: names, shapes, dtypes and the config.

  Three types of directories are supported: Hugging Face's (`model.safetensors`,
  `pytorch_model.bin`, or shards and their index), SliceGPT's (`<name>_<sparsity>.pt`
  and `.json`), and the directories of `save_checkpoint`. Weights with shortcuts are
  taken as a sliced model. If a directory has several weights files or indices, `path`
  is that of one.
  """
  folder = folder_lib.open_folder(path, plain=False)
  weights, files = folder.path, folder.files
  assert weights is not None
  if CONFIG not in files:
    is_link = ' other than a link that leaves the folder or leads nowhere'
    text = f'there is no {CONFIG}{is_link if CONFIG in folder.left_out else ""}'
    raise errors.UnsupportedError(f'{weights.parent}: {text}')
  slicing_jsons, stem = _slicing_jsons(files), None
  if any(name.endswith(_SHORTCUT) for name in folder.tensors):
    stems = [weights.stem] if weights.suffix == '.pt' else [*slicing_jsons]
    if len(stems) != 1 or stems[0] not in slicing_jsons:
      text = errors.cut(', '.join(f'{x}.json' for x in stems))
      raise errors.CheckpointError(f'{weights}: one slicing JSON is needed: {text}')
    (stem,) = stems
  of_others = [f'{x}.json' for x in sorted(slicing_jsons.keys() - {stem})]
  metadata = [
    f'the metadata of {name}'
    for name, header in folder.headers.items()
    if safetensors.has_own_metadata(header)
  ]
  try:
    parsed = families.parse_object(files[CONFIG], CONFIG)
    config = families.parse_config(parsed, slicing_jsons.get(stem or ''))
  except errors.CheckpointError as e:
    raise errors.UnsupportedError(f'{weights}: {e}') from e
  kept = dataclasses.replace(
    folder,
    files={name: x for name, x in files.items() if name not in of_others},
    left_out=(*folder.left_out, *of_others, *metadata[:1]),
  )
  return CheckpointReader(kept, config, stem)


def _slicing_jsons(files: Mapping[str, bytes]) -> dict[str, Any]:
  """Returns the slicing JSONs among the sidecar files, by their stems."""
  key = f'"{SLICING_KEY}"'.encode()
  parsed = {
    name.removesuffix('.json'): families.parse_object(content, name)
    for name, content in files.items()
    if name.endswith('.json') and '/' not in name and key in content
    if content.lstrip().startswith(b'{')
  }
  return {stem: value for stem, value in parsed.items() if SLICING_KEY in value}

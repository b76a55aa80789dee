"""Reading checkpoints: a folder of weights and sidecar files, or tensors in memory.

The sidecar files are the files beside the weights: configs, tokenizer files and others.
The stem is the name that SliceGPT gives to a sliced model's weights and slicing JSON,
`<stem>.pt` and `<stem>.json`.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from rotbits_jax import models
from rotbits_jax import pool
from rotbits_jax import structured
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import families
from rotbits_jax.checkpoints import safetensors
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.checkpoints import torch_zip
from rotbits_jax.checkpoints.families import CONFIG
from rotbits_jax.system import files as files_lib
from rotbits_jax.system import host
from rotbits_jax.system import progress

_DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
_SHORTCUT = f'.attn_shortcut{families.SHORTCUT_SUFFIX}'  # in every sliced layer
_TORCH_WEIGHTS = 'pytorch_model.bin'
_TORCH_INDEX = f'{_TORCH_WEIGHTS}.index.json'

# Weights in other formats, arrays, and files that this package wrote.
_NO_SIDECARS = frozenset([
  '.bin', '.ckpt', '.gguf', '.ggml', '.h5', '.msgpack', '.npy', '.npz', '.onnx',
  '.onnx_data', '.ot', '.pb', '.pkl', '.pt', '.pth', '.rotbits', '.safetensors',
  '.tflite',
])  # fmt: skip
# How files that this package wrote begin, after the length of the header.
_ENCODED = b'{"__metadata__":{"format":"rotbits",'
_MOST_SIDECARS = 1 << 28  # bytes of all together, as many as an encoded file may have
_MOST_FILES = 1 << 12
# Sub-folders with the model in other formats, and with the leavings of a training.
_is_other = re.compile(
  'onnx.*|openvino|coreml|tflite|tf|flax|gguf|runs|logs|wandb|mlruns|__pycache__|'
  'checkpoint-[0-9]+|global_step[0-9]+'
).fullmatch
# Files that a Trainer of transformers leaves beside the weights.
_TRAINING = frozenset(['optimizer.pt', 'scheduler.pt', 'scaler.pt'])
_SHOWN = 8  # names listed in an error
_MANY_RECORDS, _SMALL_RECORD = 1 << 10, 1 << 12  # a count, and elements; see `_joined`


@dataclasses.dataclass(eq=False, repr=False)
class Folder:
  """An opened folder, or tensors in memory, which are read a record at a time."""

  path: pathlib.Path | None  # of the weights, or of the index or the folder of several
  tensors: Mapping[str, tensors_lib.LazyTensor]  # by name
  files: dict[str, bytes]  # the sidecar files by name
  opened: tuple[files_lib.File, ...] = ()  # the weights files
  headers: dict[str, bytes] = dataclasses.field(default_factory=dict)  # of safetensors
  left_out: tuple[str, ...] = ()  # files and folders beside the weights, not kept
  entries: tensors_lib.Records = dataclasses.field(default_factory=dict)
  config: models.ModelConfig | None = None  # None for plain tensors
  stem: str | None = None  # of a sliced model
  stored_as = None  # because the parameters have their final dtype

  @property
  def records(self) -> tuple[str, ...]:
    return tuple(self.entries)

  @property
  def input_bytes(self) -> int:
    """Size of the weights files."""
    return sum(file.size for file in self.opened)

  @property
  def nbytes(self) -> int:
    """Size of the tensors."""
    return sum(tensor.nbytes for tensor in self.tensors.values())

  def read(self, record: str) -> models.Params:
    """Reads a record: nested dicts with whole paths; kernels are `[in, out]`."""
    flat: models.Params = {}
    for entry in self.entries[record]:
      # Copies of transposed kernels, here, because their tensors then leave memory.
      arrays = entry.read(self.tensors[entry.name].read())
      flat |= {path: host.contiguous(array) for path, array in arrays.items()}
    return structured.unflatten(flat)

  def specs(self, record: str) -> models.Params:
    """Returns a `TensorSpec` in place of each array of `read`; nothing is read."""
    flat = {}
    for entry in self.entries[record]:
      dtype = self.tensors[entry.name].dtype
      for path, shape in entry.parameters.items():
        flat[path] = tensors_lib.TensorSpec(shape, dtype)
    return structured.unflatten(flat)

  def fingerprint(self) -> str:
    """Returns a digest of the files in their state when they were opened.

    Of weights files it covers headers, sizes and times of change, not the elements.
    """
    contents = {**self.files, **self.headers}
    summary = [
      [repr(self.config), self.stem],
      # Machines may give one file system other numbers of devices and inodes.
      [(x.path.name, x.size, x.identity[2:]) for x in self.opened],
      [(name, x.shape, x.dtype.name) for name, x in self.tensors.items()],
      [(name, hashlib.sha256(x).hexdigest()) for name, x in contents.items()],
    ]
    return hashlib.sha256(json.dumps(summary).encode()).hexdigest()


class PlainFiles(Folder):
  """The safetensors files of a checkpoint of any family.

  A record is a layer, like 'transformer.h.3', or an expert of one, like
  'model.layers.3.mlp.experts.5', because a layer may have hundreds. Elsewhere weight
  and bias of one name are a record. If there are more than 1,024, small ones that
  follow each other are one, with the name of the first.

  `reason` says why the checkpoint is not opened as a model; None if nobody tried.
  """

  def __init__(self, folder: Folder, reason: str | None = None):
    super().__init__(**vars(folder))
    self.reason = reason
    for name, tensor in folder.tensors.items():
      if not all(name.split('/')):
        text = f'{name!r} cannot be the name of a tensor'
        raise errors.CheckpointError(f'{folder.path}: {text}')
      entry = tensors_lib.ExpectedTensor(name, tensor.shape, {name: tensor.shape})
      self.entries.setdefault(_record_of(name), []).append(entry)
    if len(self.entries) > _MANY_RECORDS:
      self.entries = _joined(self.entries)


def _record_of(tensor: str) -> str:
  """Returns the name of the record of a tensor, see `PlainFiles`."""
  words = tensor.split('.')
  numbers = [i for i, word in enumerate(words) if word.isdecimal()]
  experts = [i for i in numbers if i and words[i - 1] == 'experts']
  last = (*experts, *numbers, max(len(words) - 2, 0))[0] + 1
  return '.'.join(words[:last])


def _joined(records: tensors_lib.Records) -> tensors_lib.Records:
  """Returns records of which small ones that follow each other are joined."""
  joined: tensors_lib.Records = {}
  last, room = '', 0
  for name, entries in records.items():
    size = sum(math.prod(entry.shape) for entry in entries)
    if size > room:
      last, room = name, _SMALL_RECORD
    joined.setdefault(last, []).extend(entries)
    room -= size
  return joined


class CheckpointReader(Folder):
  """A checkpoint of a known family, whose tensors are the parameters of a model.

  `models.names` has the names of its records. If the checkpoint stores its tied head,
  it must equal the embedding, and `config` says that the head is not tied.
  """

  config: models.ModelConfig

  def __init__(
    self, folder: Folder, config: models.ModelConfig, stem: str | None = None
  ):
    """Matches the tensors with the parameters that a model with this config has."""
    super().__init__(**vars(folder))
    self.config, self.stem = _untied(folder.tensors, config), stem
    self.entries = _match(folder.tensors, self.config)

  def layer(self, index: int) -> models.Params:
    """Reads the parameters of a layer, with the keys of `Model.layer`."""
    name = models.names.layer(index)
    return dict(self.read(name)[name])

  def outer(self) -> models.Params:
    """Reads the parameters outside the layers, see `read`."""
    return {name: self.read(name)[name] for name in models.outer_shapes(self.config)}

  @functools.cached_property
  def buffers(self) -> dict[str, np.ndarray]:
    """The tensors that the forward pass does not use, by their names."""
    record = models.names.BUFFERS
    return dict(self.read(record)[record]) if record in self.records else {}

  def load(
    self, layers: range | None = None, *, show_progress: bool = False
  ) -> tensors_lib.Checkpoint:
    """Reads the checkpoint, or some of its layers, into memory, as NumPy arrays."""
    layers = range(self.config.num_layers) if layers is None else layers
    name = models.names.layer
    specs = {i: self.specs(name(i))[name(i)] for i in layers}
    params: models.Params = {}
    rows: dict[str, np.ndarray] = {}
    for run in models.stack_ranges(layers, lambda i: models.stack_key(specs[i])):
      for path, spec in structured.flatten(specs[run.start]).items():
        stack = host.empty((len(run), *spec.shape), spec.dtype)
        params[f'{models.names.stack(run)}/{path}'] = stack
        rows |= {f'{name(i)}/{path}': stack[i - run.start, ...] for i in run}

    def copy(record: str) -> None:
      for path, array in structured.flatten(self.read(record)).items():
        contiguous = host.contiguous(array)
        if path in rows:
          rows[path][...] = contiguous
        else:
          params[path] = contiguous
        bar.update(array.nbytes)

    with progress.Progress('decode', self.nbytes, 'B', show=show_progress) as bar:
      pool.each(copy, [*models.outer_shapes(self.config), *map(name, layers)])
    model = models.Model(structured.unflatten(params), self.buffers, self.config)
    return tensors_lib.Checkpoint(model, dict(self.files), self.stem)


def from_tensors(
  tensors: Mapping[str, np.ndarray], config: models.ModelConfig
) -> models.Model:
  """Makes a model, of NumPy arrays, from the tensors of a checkpoint by name."""
  opened = lambda x: (x.shape, x.dtype, functools.partial(np.asarray, x))
  lazy = {k: tensors_lib.LazyTensor(*opened(x)) for k, x in tensors.items()}
  return CheckpointReader(Folder(None, lazy, {}), config).load().model


def _match(
  tensors: Mapping[str, tensors_lib.LazyTensor], config: models.ModelConfig
) -> tensors_lib.Records:
  """Returns the entries of all records, after checking the tensors."""
  buffers = {name: x for name, x in tensors.items() if families.BUFFERS.fullmatch(name)}
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
  if embedding and not structured.same_bits(head.read(), embedding.read()):
    text = 'differs from the embedding, but the config says that they are tied'
    raise errors.CheckpointError(f'{entries["head"][0].name} {text}')
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
  """Opens a checkpoint, as plain tensors if it is not one of a known family."""
  try:
    return open_checkpoint(path)
  except errors.CheckpointError as error:
    with contextlib.suppress(errors.CheckpointError):
      return PlainFiles(open_folder(path, plain=True), str(error))
    raise


def open_plain(path: str | os.PathLike[str]) -> PlainFiles:
  """Opens the safetensors files of a checkpoint of any family; see `PlainFiles`."""
  return PlainFiles(open_folder(path, plain=True))


def open_checkpoint(path: str | os.PathLike[str]) -> CheckpointReader:
  """Opens a dense or a sliced checkpoint: names, shapes, dtypes and the config.

  Directories are Hugging Face's (`model.safetensors`, `pytorch_model.bin`, or shards
  and their index), SliceGPT's (`<name>_<sparsity>.pt` and `.json`), or those of
  `save_checkpoint`. If one has several weights files or indices, `path` is that of one.
  """
  folder = open_folder(path, plain=False)
  weights, files = folder.path, folder.files
  assert weights is not None
  if CONFIG not in files:
    text = f'there is no {CONFIG}, or it is a link out of the folder'
    raise errors.CheckpointError(f'{weights.parent}: {text}')
  slicing_jsons, stem = _slicing_jsons(files), None
  if any(name.endswith(_SHORTCUT) for name in folder.tensors):
    stems = [weights.stem] if weights.suffix == '.pt' else [*slicing_jsons]
    if len(stems) != 1 or stems[0] not in slicing_jsons:
      text = errors.cut(', '.join(f'{x}.json' for x in stems))
      raise errors.CheckpointError(f'{weights}: one slicing JSON is needed: {text}')
    (stem,) = stems
  of_others = [f'{x}.json' for x in sorted(slicing_jsons.keys() - {stem})]
  kept = dataclasses.replace(
    folder,
    files={name: x for name, x in files.items() if name not in of_others},
    left_out=(*folder.left_out, *of_others),
  )
  with errors.named(weights):
    parsed = families.parse_object(files[CONFIG], CONFIG)
    config = families.parse_config(parsed, slicing_jsons.get(stem or ''))
    return CheckpointReader(kept, config, stem)


def _slicing_jsons(files: Mapping[str, bytes]) -> dict[str, Any]:
  """Returns the slicing JSONs among the sidecar files, by their stems."""
  key, parsed = 'embedding_dimensions', {}
  for name, content in files.items():
    has_key = f'"{key}"'.encode() in content and content.lstrip().startswith(b'{')
    if has_key and name.endswith('.json') and '/' not in name:
      parsed[name.removesuffix('.json')] = families.parse_object(content, name)
  return {stem: value for stem, value in parsed.items() if key in value}


# ---- the files of a folder -----------------------------------------------------------


def open_folder(path: str | os.PathLike[str], *, plain: bool) -> Folder:
  """Opens a folder; only names, shapes, dtypes and the sidecar files are read.

  If `plain`, the weights must be safetensors files, and any index is kept. Otherwise it
  must name the tensors, and is kept if the writer divides tensors as it says. A path of
  a file of weights has sidecar files only if there is a config beside it.
  """
  given = _snapshot(files_lib.local_path(path))
  listed, *others = _find_weights(given)
  is_torch = listed.suffix in ('.pt', '.bin') or listed.name.endswith(_TORCH_INDEX)
  if plain and is_torch:
    text = 'is not safetensors, in which any family is stored'
    raise errors.CheckpointError(f'{listed} {text}')
  shards: Mapping[str, Sequence[str] | None]
  shards = dict.fromkeys(x.name for x in (listed, *others))
  index: dict[str, bytes] = {}
  if listed.suffix == '.json':
    content = tensors_lib.content(listed, safetensors.MOST_INDEX)
    with errors.named(listed):
      shards, _ = safetensors.parse_index(content)
    if plain or listed.name == safetensors.INDEX:
      index = {listed.name: content}
  weights, headers = [], {}
  tensors: dict[str, tensors_lib.LazyTensor] = {}
  for shard, names in shards.items():
    if not tensors_lib.is_relative_path(shard, levels=1):  # nor could it be decoded
      text = f'{shard!r:.100} is not the name of a file of weights'
      raise errors.CheckpointError(f'{listed}: {text}')
    with errors.named(listed.parent / shard):
      file = files_lib.File.of(listed.parent / shard)
    weights.append(file)
    if is_torch:
      of_shard = torch_zip.open_file(file)
    else:
      headers[shard] = safetensors.read_header(file)
      of_shard = safetensors.open_tensors(file, headers[shard])
    if names is not None and not plain and (differing := of_shard.keys() ^ {*names}):
      text = errors.cut(', '.join(sorted(differing)[:_SHOWN]))
      raise errors.CheckpointError(f'{listed}: {shard} and the index differ in {text}')
    if twice := tensors.keys() & of_shard.keys():
      raise errors.CheckpointError(f'{file.path}: {min(twice)} is in another file, too')
    tensors |= of_shard
  no_sidecars = {listed, *(file.path for file in weights)}
  files, left_out = index, tuple[str, ...]()
  # The folder of a file may be any one, with other files of its owner.
  if given.is_dir() or (given.parent / CONFIG).exists():
    files, left_out = _read_sidecars(listed.parent, no_sidecars, index)
  found = listed.parent if others else listed
  return Folder(found, tensors, files, tuple(weights), headers, left_out)


def _snapshot(path: pathlib.Path) -> pathlib.Path:
  """Returns the snapshot in the folder `models--NAME` of Hugging Face's cache."""
  main = path / 'refs' / 'main'
  is_cache = path.name.startswith('models--') and main.is_file()
  return path / 'snapshots' / main.read_text().strip() if is_cache else path


def _find_weights(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the weights file of a folder, or the index of several, or all of these."""
  candidates = [path]
  if path.is_dir():
    candidates = sorted(x for x in path.glob('*.pt') if x.name not in _TRAINING)
    # Programs prefer these to safetensors of other names, such as an adapter's.
    for pattern in (
      safetensors.WEIGHTS, f'*{safetensors.SUFFIX}', _TORCH_WEIGHTS, _TORCH_INDEX,
      '*.safetensors',
    ):  # fmt: skip
      is_torch = pattern in (_TORCH_WEIGHTS, _TORCH_INDEX)
      if listed := sorted(path.glob(pattern)) if not (is_torch and candidates) else []:
        candidates += listed
        break
  elif not path.exists():
    raise errors.CheckpointError(f'{path}: {files_lib.missing(path)}')
  names = errors.cut(', '.join(x.name for x in candidates)) or 'none'
  endings = ('.bin', '.pt', '.safetensors', safetensors.SUFFIX, _TORCH_INDEX)
  is_set = all(x.suffix == '.safetensors' for x in candidates) and candidates
  if not (is_set or (len(candidates) == 1 and names.endswith(endings))):
    text = f'one file of weights, .safetensors, .pt or .bin, or an index; got {names}'
    raise errors.CheckpointError(f'{path}: expected {text}')
  return candidates


def _read_sidecars(
  root: pathlib.Path, weights: set[pathlib.Path], index: dict[str, bytes]
) -> tuple[dict[str, bytes], tuple[str, ...]]:
  """Returns the files beside the weights, and the names of visible ones left out."""
  files: dict[str, bytes] = {}
  left_out, room = [], _MOST_SIDECARS - sum(map(len, index.values()))
  for parent, folders, names in os.walk(root):
    base = pathlib.Path(parent)
    visible = [base / x for x in sorted(folders) if not x.startswith('.')]
    entered = [x for x in visible if not (_is_other(x.name) or x.is_symlink())]
    closed = (x for x in visible if x not in entered)
    left_out += [f'{x.relative_to(root).as_posix()}/' for x in closed]
    folders[:] = [x.name for x in entered]
    for file in sorted({base / name for name in names} - weights):
      name = file.relative_to(root).as_posix()
      if (
        file.suffix in _NO_SIDECARS
        or (base == root and name.endswith('.index.json'))
        or not _is_inside(file, root)
        or file.stat().st_size > room
        or len(files) == _MOST_FILES
        or not tensors_lib.is_relative_path(name)
        or (content := tensors_lib.content(file, room)).startswith(_ENCODED, 8)
      ):
        left_out.append(name)
      else:
        files[name] = content
        room -= len(content)
  return dict(sorted(files.items())) | index, tuple(sorted(left_out))


def _is_inside(file: pathlib.Path, root: pathlib.Path) -> bool:
  """Returns whether a path is that of a regular file in a folder."""
  # An untrusted folder may have links to private files. Those of Hugging Face's cache
  # lead from `snapshots/<revision>`, and from folders in it, into `blobs`.
  folder = pathlib.Path(os.path.realpath(root))
  real = pathlib.Path(os.path.realpath(file))
  revisions = (x for x in (folder, *folder.parents) if x.parent.name == 'snapshots')
  blobs = {x.parent.parent / 'blobs' for x in revisions}
  return real.is_file() and (real.is_relative_to(folder) or real.parent in blobs)

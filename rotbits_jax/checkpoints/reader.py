"""Reading checkpoints: a folder of weights and sidecar files, or tensors in memory.

The sidecar files are the files beside the weights: configs, tokenizer files and others.
The stem is the name that SliceGPT gives to a sliced model's weights and slicing JSON,
`<stem>.pt` and `<stem>.json`.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

import ml_dtypes
import msgspec
import numpy as np

from rotbits_jax import models
from rotbits_jax import pool
from rotbits_jax import structured
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import families
from rotbits_jax.checkpoints import folders
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
_WEIGHTS_ENDINGS = ('.bin', '.pt', '.safetensors', safetensors.SUFFIX, _TORCH_INDEX)

_WHOLE = folders.Selection()
_NOTHING = folders.Listing((), (), (), (), (), ())

_MOST_SIDECARS = 1 << 28  # bytes of all together, as many as an encoded file may have
_MOST_FILES = 1 << 12
_OPTIMIZER = 'optimizer.pt'  # which a Trainer of transformers leaves
_SHOWN = 8  # names listed in an error
_MANY_RECORDS, _SMALL_RECORD = 1 << 10, 1 << 12  # a count, and elements; see `_joined`


@dataclasses.dataclass(eq=False, repr=False)
class Folder:
  """An opened folder, or tensors in memory, which are read a record at a time.

  Files of the folder that are not weights are in `files`, which memory holds, or in
  `copies`, which are streamed. `missed` are those that would be lost with the folder.
  `left_out` are caches, encoded files, and files beside a weights file that was opened
  alone. `excluded` are those that the selection excludes. All are relative paths, with
  a slash at the end of folders.
  """

  path: pathlib.Path | None  # of the weights, or of the index or the folder of several
  tensors: Mapping[str, tensors_lib.LazyTensor]  # by name
  files: dict[str, bytes]  # the sidecar files by name
  opened: tuple[files_lib.File, ...] = ()  # the weights files
  headers: dict[str, bytes] = dataclasses.field(default_factory=dict)  # of safetensors
  given: pathlib.Path | None = None  # the path that was opened
  selection: folders.Selection = _WHOLE
  copies: dict[str, files_lib.File] = dataclasses.field(default_factory=dict)
  missed: tuple[str, ...] = ()
  left_out: tuple[str, ...] = ()
  excluded: tuple[str, ...] = ()
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
      [(name, x.size, x.identity[2:]) for name, x in self.copies.items()],
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


def open_any(
  path: str | os.PathLike[str], selection: folders.Selection = _WHOLE
) -> CheckpointReader | PlainFiles:
  """Opens a checkpoint, as plain tensors if it is not one of a known family."""
  try:
    return open_checkpoint(path, selection)
  except errors.CheckpointError as error:
    with contextlib.suppress(errors.CheckpointError):
      return PlainFiles(open_folder(path, selection, plain=True), str(error))
    raise


def open_plain(
  path: str | os.PathLike[str], selection: folders.Selection = _WHOLE
) -> PlainFiles:
  """Opens all safetensors files of a folder, of any family; see `PlainFiles`."""
  return PlainFiles(open_folder(path, selection, plain=True))


def open_checkpoint(
  path: str | os.PathLike[str], selection: folders.Selection = _WHOLE
) -> CheckpointReader:
  """Opens a dense or a sliced checkpoint: names, shapes, dtypes and the config.

  Directories are Hugging Face's (`model.safetensors`, `pytorch_model.bin`, or shards
  and their index), SliceGPT's (`<name>_<sparsity>.pt` and `.json`), or those of
  `save_checkpoint`. If one has several weights files or indices, `path` is that of one.
  Weights in sub-folders are not those of the model.
  """
  folder = open_folder(path, selection, plain=False)
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
    missed=(*folder.missed, *of_others),
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


def open_folder(
  path: str | os.PathLike[str],
  selection: folders.Selection = _WHOLE,
  *,
  plain: bool,
) -> Folder:
  """Opens a folder; only names, shapes, dtypes and the sidecar files are read.

  Args:
    path: The folder, one of its weights files, or the index of several. Beside a file,
      other files are taken only if there is a config among them.
    selection: Which files of the folder are stored.
    plain: Whether to take all safetensors files of the folder and its sub-folders, with
      their indices. Otherwise the weights are those of the model whose config the
      folder has, and an index must name their tensors.
  """
  given = _snapshot(files_lib.local_path(path))
  if not given.exists():
    raise errors.CheckpointError(f'{given}: {files_lib.missing(given)}')
  is_folder = given.is_dir()
  root = given if is_folder else given.parent
  # The folder of a file may be any one, with other files of its owner.
  listed = _NOTHING
  if is_folder or (root / CONFIG).exists():
    listed = folders.listing(root, selection)
  found = _find_weights(given, listed, plain=plain)
  opened = _open_weights(root, found, plain=plain)
  used = {*found, *opened.files}
  index = None
  if found[0] == safetensors.INDEX or (plain and found[0].endswith(safetensors.SUFFIX)):
    index = found[0]
  kept = _read_others(root, listed, used, index, selection, plain=plain)
  return Folder(
    path=root if len(found) > 1 else root / found[0],
    tensors=opened.tensors,
    files=kept.files,
    opened=tuple(opened.files.values()),
    headers=opened.headers,
    given=given,
    selection=selection,
    copies=kept.copies if is_folder else {},
    missed=kept.lost if is_folder else (),
    left_out=listed.ignored if is_folder else (*listed.ignored, *kept.lost),
    excluded=listed.excluded,
  )


def _snapshot(path: pathlib.Path) -> pathlib.Path:
  """Returns the snapshot in the folder `models--NAME` of Hugging Face's cache."""
  main = path / 'refs' / 'main'
  is_cache = path.name.startswith('models--') and main.is_file()
  return path / 'snapshots' / main.read_text().strip() if is_cache else path


def _find_weights(
  given: pathlib.Path, listed: folders.Listing, *, plain: bool
) -> list[str]:
  """Returns the weights files, or the index of several, as relative paths."""
  if not given.is_dir():
    found = [given.name]
  elif plain:
    _check_shards(given, listed)
    # Folders above those in them; the file with the shortest name is the main one.
    found = sorted(listed.safetensors, key=lambda x: (x.count('/'), len(x), x))
  else:
    at_root = (*listed.safetensors, *listed.weights, *listed.others)
    found = main_weights([name for name in at_root if '/' not in name])
  is_set = found and all(x.endswith(folders.SAFETENSORS) for x in found)
  if is_set or (len(found) == 1 and found[0].endswith(_WEIGHTS_ENDINGS)):
    return found
  _check_shards(given, listed)
  names = found or [x for x in listed.weights if '/' not in x]
  got = errors.cut(', '.join(names)) or 'none'
  raise errors.CheckpointError(
    f'{given}: expected one file of weights, .safetensors, .pt or .bin, or an index; '
    f'got {got}'
  )


def _check_shards(root: pathlib.Path, listed: folders.Listing) -> None:
  """Raises if a shard that an index names is missing, and was not excluded."""
  known = {*listed.safetensors, *listed.excluded}
  for index in listed.others:
    if not index.endswith(safetensors.SUFFIX):
      continue
    content = tensors_lib.content(root / index, safetensors.MOST_INDEX)
    with errors.named(root / index):
      shards, _ = safetensors.parse_index(content)
      folder = pathlib.PurePosixPath(index).parent
      for shard in shards:
        if (folder / shard).as_posix() not in known:
          raise errors.CheckpointError(f'the shard {errors.cut(shard)} is missing')


def main_weights(names: Sequence[str]) -> list[str]:
  """Returns the weights of the model of a folder: a file, an index, or several files.

  Args:
    names: The names of the files in the folder.
  """
  found = sorted(
    name
    for name in names
    if name.endswith('.pt') and name != _OPTIMIZER and not folders.is_small_state(name)
  )
  # Programs prefer these to safetensors of other names, such as an adapter's.
  for pattern in (
    safetensors.WEIGHTS, f'*{safetensors.SUFFIX}', _TORCH_WEIGHTS, _TORCH_INDEX,
    '*.safetensors',
  ):  # fmt: skip
    if found and pattern in (_TORCH_WEIGHTS, _TORCH_INDEX):
      continue
    matching = sorted(fnmatch.filter(names, pattern))
    if matching:
      return found + matching
  return found


def model_tensors(
  headers: Mapping[str, bytes], files: Mapping[str, bytes]
) -> dict[str, str]:
  """Returns the tensors of the model at the root of a folder of plain tensors.

  Args:
    headers: The headers of all safetensors files, by relative path.
    files: The other files, by relative path.

  Returns:
    The path of each tensor in the folder, see `folders.tensor_paths`, by its name.
  """
  paths = folders.tensor_paths({x: safetensors.places(y) for x, y in headers.items()})
  found = main_weights([name for name in (*headers, *files) if '/' not in name])
  if found and found[0].endswith(safetensors.SUFFIX):
    shards, _ = safetensors.parse_index(files[found[0]])
    found = [*shards]
  tensors: dict[str, str] = {}
  for file in found:
    tensors |= paths.get(file, {})
  return tensors


class _Opened(NamedTuple):
  """Opened weights files."""

  files: dict[str, files_lib.File]  # by relative path
  headers: dict[str, bytes]  # of safetensors files, by relative path
  tensors: dict[str, tensors_lib.LazyTensor]  # by name, or by path if `plain`


def _open_weights(root: pathlib.Path, found: Sequence[str], *, plain: bool) -> _Opened:
  """Opens weights files, or those of an index, see `_find_weights`."""
  listed = root / found[0]
  is_torch = found[0].endswith(('.pt', '.bin', _TORCH_INDEX))
  if plain and is_torch:
    raise errors.CheckpointError(
      f'{listed} is not safetensors, in which any family is stored'
    )
  shards: Mapping[str, Sequence[str] | None] = dict.fromkeys(found)
  if listed.suffix == '.json':
    content = tensors_lib.content(listed, safetensors.MOST_INDEX)
    with errors.named(listed):
      shards, _ = safetensors.parse_index(content)
  opened = _Opened({}, {}, {})
  by_file: dict[str, dict[str, tensors_lib.LazyTensor]] = {}
  for shard, names in shards.items():
    levels = shard.count('/') + 1 if shard in found else 1
    if not tensors_lib.is_relative_path(shard, levels):  # nor could it be decoded
      raise errors.CheckpointError(
        f'{listed}: {shard!r:.100} is not the name of a file of weights'
      )
    with errors.named(root / shard):
      file = files_lib.File.of(root / shard)
    opened.files[shard] = file
    if is_torch:
      by_file[shard] = torch_zip.open_file(file)
    else:
      opened.headers[shard] = safetensors.read_header(file)
      by_file[shard] = safetensors.open_tensors(file, opened.headers[shard])
    if names is not None and not plain:
      _check_index(listed, shard, {*names} ^ by_file[shard].keys())
  opened.tensors.update(_joined_tensors(root, by_file, plain=plain))
  return opened


def _check_index(index: pathlib.Path, shard: str, differing: set[str]) -> None:
  """Raises if an index and a shard differ in the names of tensors."""
  if differing:
    names = errors.cut(', '.join(sorted(differing)[:_SHOWN]))
    raise errors.CheckpointError(f'{index}: {shard} and the index differ in {names}')


def _joined_tensors(
  root: pathlib.Path,
  by_file: Mapping[str, Mapping[str, tensors_lib.LazyTensor]],
  *,
  plain: bool,
) -> dict[str, tensors_lib.LazyTensor]:
  """Returns the tensors of all files by path if `plain`, and else by name."""
  if plain:
    paths = folders.tensor_paths(by_file)
    return {
      paths[file][name]: tensor
      for file, tensors in by_file.items()
      for name, tensor in tensors.items()
    }
  joined: dict[str, tensors_lib.LazyTensor] = {}
  for file, tensors in by_file.items():
    twice = joined.keys() & tensors.keys()
    if twice:
      raise errors.CheckpointError(
        f'{root / file}: {min(twice)} is in another file, too'
      )
    joined |= tensors
  return joined


class _Others(NamedTuple):
  """The files of a folder that are not read as weights."""

  files: dict[str, bytes]  # by relative path
  copies: dict[str, files_lib.File]
  lost: tuple[str, ...]


def _read_others(
  root: pathlib.Path,
  listed: folders.Listing,
  used: set[str],
  index: str | None,
  selection: folders.Selection,
  *,
  plain: bool,
) -> _Others:
  """Reads the files beside the weights.

  Args:
    root: The folder.
    listed: Its files.
    used: Weights files that are read, and their index.
    index: The index that is kept, because the writer divides tensors as it says.
    selection: Whether weights in other formats, and large files, are kept.
    plain: Whether the index of every set of shards is kept.
  """
  of_weights = {*listed.weights, *listed.safetensors}
  if not plain:
    indices = (x for x in listed.others if x.endswith(safetensors.SUFFIX))
    of_weights |= {x for x in indices if x != index}
  large = sorted(of_weights - used)
  without_weights: list[str] = []
  if not selection.all_files:
    without_weights = folders.adapter_configs(listed.others, large, used)
  files: dict[str, bytes] = {}
  room = _MOST_SIDECARS
  for name in listed.others:
    if name in of_weights or name in without_weights or name == index:
      continue
    with errors.named(root / name):
      size = files_lib.File.of(root / name).size
    if size > room or len(files) == _MOST_FILES:
      large.append(name)
    else:
      files[name] = tensors_lib.content(root / name, room)
      room -= size
  if index is not None:
    files[index] = tensors_lib.content(root / index, safetensors.MOST_INDEX)
  lost = [*listed.lost, *without_weights]
  copies = {}
  if selection.all_files:
    copies = {name: files_lib.File.of(root / name) for name in large}
  else:
    lost += large
  return _Others(files, copies, tuple(sorted(lost)))

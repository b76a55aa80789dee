"""The folder of a checkpoint: which files are its weights, and which lie beside them.

The sidecar files are the files beside the weights: configs, tokenizer files and others.

Raises:
  UnsupportedError: if weights have dtypes that NumPy lacks, or must be safetensors and
    are not.
  CheckpointError: if a file is missing or damaged.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import os
import pathlib
import re

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import safetensors
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.checkpoints import torch_zip
from rotbits_jax.system import files as files_lib
from rotbits_jax.system import schema

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
_MOST_LEVELS = 7  # of sub-folders
# Sub-folders with the model in other formats, and with the leavings of a training.
_OTHER_FOLDERS = re.compile(
  'onnx.*|openvino|coreml|tflite|tf|flax|gguf|runs|logs|wandb|mlruns|__pycache__|'
  'checkpoint-[0-9]+|global_step[0-9]+'
)
# Files that a Trainer of transformers leaves beside the weights.
_TRAINING = frozenset(['optimizer.pt', 'scheduler.pt', 'scaler.pt'])
_SHOWN = 8  # names listed in an error


@dataclasses.dataclass(eq=False, repr=False)
class Folder:
  """An opened folder, or tensors in memory, which are read a record at a time.

  Attributes:
    path: the weights file, or the index of several; None for tensors in memory.
    tensors: the tensors by name.
    files: bytes of the sidecar files (configs, tokenizer, license, code) by name.
    weights: the weights files.
    headers: the header of each safetensors file by its name.
    left_out: names of files and folders beside the weights that are not kept.
    entries: the tensors of each record.
    config: sizes and switches of the model; None for plain tensors.
    stem: file name, without suffix, that SliceGPT gave to the weights; else None.
    stored_as: None, because the parameters have their final dtype.
  """

  path: pathlib.Path | None
  tensors: Mapping[str, tensors_lib.LazyTensor]
  files: dict[str, bytes]
  weights: tuple[files_lib.File, ...] = ()
  headers: dict[str, bytes] = dataclasses.field(default_factory=dict)
  left_out: tuple[str, ...] = ()
  entries: tensors_lib.Records = dataclasses.field(default_factory=dict)
  config: models.ModelConfig | None = None
  stem: str | None = None
  stored_as = None

  @property
  def records(self) -> tuple[str, ...]:
    return tuple(self.entries)

  @property
  def input_bytes(self) -> int:
    """Size of the weights files."""
    return sum(file.size for file in self.weights)

  @property
  def nbytes(self) -> int:
    """Size of the tensors."""
    return sum(tensor.nbytes for tensor in self.tensors.values())

  def read(self, record: str) -> models.Params:
    """Reads a record: nested dicts with whole paths; kernels are `[in, out]`."""
    flat: models.Params = {}
    for entry in self.entries[record]:
      flat |= entry.read(self.tensors[entry.name].read())
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
      [(file.path.name, file.size, file.modified) for file in self.weights],
      [(name, x.shape, x.dtype.name) for name, x in self.tensors.items()],
      [(name, hashlib.sha256(x).hexdigest()) for name, x in contents.items()],
    ]
    return hashlib.sha256(json.dumps(summary).encode()).hexdigest()


def open_folder(path: str | os.PathLike[str], *, plain: bool) -> Folder:
  """Opens a folder; only names, shapes, dtypes and the sidecar files are read.

  If `plain`, the weights must be safetensors files, of any dtypes, and the index is
  kept whatever it says. Otherwise it must name the tensors, and is kept if the writer
  divides tensors as it says.
  """
  listed = _find_weights(pathlib.Path(path))
  is_torch = listed.suffix in ('.pt', '.bin') or listed.name.endswith(_TORCH_INDEX)
  if plain and is_torch:
    text = 'is not safetensors, in which any family is stored'
    raise errors.UnsupportedError(f'{listed} {text}')
  shards: dict[str, list[str] | None] = {listed.name: None}
  index: dict[str, bytes] = {}
  if listed.suffix == '.json':
    content = tensors_lib.content(listed, safetensors.MOST_INDEX)
    with errors.named(listed):
      shards = {**safetensors.WeightIndex.parse(content).shards()}
    if plain or listed.name == safetensors.INDEX:
      index = {listed.name: content}
  weights, headers = [], {}
  tensors: dict[str, tensors_lib.LazyTensor] = {}
  for shard, names in shards.items():
    file = tensors_lib.opened(listed.parent / shard)
    weights.append(file)
    if is_torch:
      of_shard = torch_zip.open_file(file)
    else:
      headers[shard] = safetensors.read_header(file)
      of_shard = safetensors.open_tensors(file, headers[shard], any_dtype=plain)
    if names is not None and not plain and (differing := of_shard.keys() ^ {*names}):
      text = errors.cut(', '.join(sorted(differing)[:_SHOWN]))
      raise errors.CheckpointError(f'{listed}: {shard} and the index differ in {text}')
    if twice := tensors.keys() & of_shard.keys():
      raise errors.CheckpointError(f'{file.path}: {min(twice)} is in another file, too')
    tensors |= of_shard
  no_sidecars = {listed, *(file.path for file in weights)}
  files, left_out = _read_sidecars(listed.parent, no_sidecars, index)
  return Folder(listed, tensors, files, tuple(weights), headers, left_out)


def _find_weights(path: pathlib.Path) -> pathlib.Path:
  """Returns the weights file of a folder, or the index if there are several."""
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
    raise errors.CheckpointError(f'{path}: there is no such file or directory')
  names = errors.cut(', '.join(x.name for x in candidates)) or 'none'
  endings = ('.bin', '.pt', '.safetensors', safetensors.SUFFIX, _TORCH_INDEX)
  if len(candidates) != 1 or not names.endswith(endings):
    raise errors.CheckpointError(
      f'{path}: expected one file of weights, .safetensors, .pt or .bin, or the index '
      f'of several, as in *{safetensors.SUFFIX}; got {names}'
    )
  return candidates[0]


def _read_sidecars(
  root: pathlib.Path, weights: set[pathlib.Path], index: dict[str, bytes]
) -> tuple[dict[str, bytes], tuple[str, ...]]:
  """Reads the files beside the weights, and adds the index if it is kept.

  Also returns what is left out; hidden folders are left out without a word.
  """
  files: dict[str, bytes] = {}
  left_out, room = [], _MOST_SIDECARS - sum(map(len, index.values()))
  for parent, folders, names in os.walk(root):
    base = pathlib.Path(parent)
    entered = [x for x in sorted(folders) if _is_entered(base / x, root)]
    closed = [x for x in folders if x not in entered and not x.startswith('.')]
    left_out += [f'{(base / x).relative_to(root).as_posix()}/' for x in closed]
    folders[:] = entered
    for file in sorted({base / name for name in names} - weights):
      name = file.relative_to(root).as_posix()
      if (
        file.suffix in _NO_SIDECARS
        or (base == root and name.endswith('.index.json'))
        or not _is_inside(file, root)
        or file.stat().st_size > room
        or len(files) == _MOST_FILES
        or not schema.is_relative_path(name)
        or (content := tensors_lib.content(file, room)).startswith(_ENCODED, 8)
      ):
        left_out.append(name)
      else:
        files[name] = content
        room -= len(content)
  return dict(sorted(files.items())) | index, tuple(sorted(left_out))


def _is_entered(folder: pathlib.Path, root: pathlib.Path) -> bool:
  """Returns whether a sub-folder may have sidecar files."""
  if folder.name.startswith('.') or _OTHER_FOLDERS.fullmatch(folder.name):
    return False
  levels = len(folder.relative_to(root).parts)
  return levels <= _MOST_LEVELS and not folder.is_symlink() and any(folder.iterdir())


def _is_inside(file: pathlib.Path, root: pathlib.Path) -> bool:
  """Returns whether a path is that of a regular file in a folder.

  An untrusted folder may have links to private files, which encoding would give away.
  The links of Hugging Face's cache lead from `snapshots/<revision>`, and from folders
  in it, into `blobs`.
  """
  folder = pathlib.Path(os.path.realpath(root))
  real = pathlib.Path(os.path.realpath(file))
  revisions = (x for x in (folder, *folder.parents) if x.parent.name == 'snapshots')
  blobs = {x.parent.parent / 'blobs' for x in revisions}
  return real.is_file() and (real.is_relative_to(folder) or real.parent in blobs)

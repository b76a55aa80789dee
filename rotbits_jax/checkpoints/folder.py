"""The folder of a checkpoint: which files are its weights, and which lie beside them.

The sidecar files are the files beside the weights: configs, tokenizer files and, for a
sliced model, the slicing JSON with the segment widths.

Raises:
  CheckpointError: if a file is missing or damaged.
"""

from collections.abc import Collection, Iterator
import os
import pathlib
import re

from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import safetensors
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.system import schema

TORCH_WEIGHTS = 'pytorch_model.bin'
TORCH_INDEX = f'{TORCH_WEIGHTS}.index.json'

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


def find_weights(path: pathlib.Path) -> pathlib.Path:
  """Returns the weights file of a checkpoint, or the index if there are several.

  Args:
    path: the folder; or the file itself, if the folder has several.
  """
  if path.is_file():
    if path.suffix in ('.bin', '.pt', '.safetensors') or path.name.endswith(
      (safetensors.SUFFIX, TORCH_INDEX)
    ):
      return path
    raise errors.CheckpointError(
      f'{path}: weights are .safetensors, .bin or .pt files, or the index of several, '
      f'as in *{safetensors.SUFFIX}'
    )
  if not path.is_dir():
    raise errors.CheckpointError(f'{path}: there is no such file or directory')
  candidates = _candidates(path)
  if not candidates:
    raise errors.CheckpointError(
      f'{path}: there are no .pt or .safetensors files and no {TORCH_WEIGHTS}'
    )
  if len(candidates) > 1:
    names = errors.cut(', '.join(file.name for file in candidates))
    raise errors.CheckpointError(
      f'{path}: the path must name one of the weights files {names}'
    )
  return candidates[0]


def _candidates(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the weights files and indices in a folder, of which it should have one."""
  candidates = sorted(x for x in path.glob('*.pt') if x.name not in _TRAINING)
  if (path / safetensors.WEIGHTS).is_file():
    return [*candidates, path / safetensors.WEIGHTS]
  listed = sorted(path.glob(f'*{safetensors.SUFFIX}'))
  # Programs prefer these to safetensors of other names, such as an adapter's.
  torch = [path / x for x in (TORCH_WEIGHTS, TORCH_INDEX)]
  if not candidates and not listed:
    listed = [x for x in torch if x.is_file()][:1]
  return candidates + (listed or sorted(path.glob('*.safetensors')))


def is_torch(weights: pathlib.Path) -> bool:
  """Returns whether weights are PyTorch's, given the path of the file or the index."""
  return weights.suffix in ('.pt', '.bin') or weights.name.endswith(TORCH_INDEX)


def shards(index: pathlib.Path, content: bytes) -> dict[pathlib.Path, list[str]]:
  """Returns the names of the tensors in each shard of an index."""
  names = {}
  for shard, tensors in safetensors.parse_index(content, str(index)).shards().items():
    names[index.parent / shard] = tensors
    if not os.path.isfile(index.parent / shard):
      raise errors.CheckpointError(f'{index}: the shard {errors.cut(shard)} is missing')
  return names


def read_sidecars(
  root: pathlib.Path, weights: Collection[pathlib.Path], index: dict[str, bytes]
) -> tuple[dict[str, bytes], tuple[str, ...]]:
  """Reads the files beside the weights.

  Args:
    root: the folder of the checkpoint.
    weights: the weights files and their index.
    index: the content of the index by its name, if it is kept.

  Returns:
    The files and the index by their relative paths, and the paths of the files and
    folders that are no sidecars: other weights and arrays, other indices, large files,
    links that leave the folder or lead nowhere, other than regular files, names that
    cannot be printed, empty folders, and those that `_OTHER_FOLDERS` lists. Hidden
    folders are left out without a word.
  """
  files: dict[str, bytes] = {}
  left_out, room = [], _MOST_SIDECARS - sum(map(len, index.values()))
  for file in _walk(root):
    name = file.relative_to(root).as_posix()
    if file in weights:
      continue
    if file.is_dir():
      left_out.append(f'{name}/')
    elif (
      file.suffix in _NO_SIDECARS
      or (file.parent == root and name.endswith('.index.json'))
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
  return files | index, tuple(left_out)


def _walk(folder: pathlib.Path, levels: int = _MOST_LEVELS) -> Iterator[pathlib.Path]:
  """Yields the files in a folder and its sub-folders.

  It also yields the sub-folders that are not entered and those that are empty.
  """
  for file in sorted(folder.iterdir()):
    if not file.is_dir():
      yield file
    elif not file.name.startswith('.'):
      enters = levels and not _OTHER_FOLDERS.fullmatch(file.name)
      if enters and not file.is_symlink() and any(file.iterdir()):
        yield from _walk(file, levels - 1)
      else:
        yield file


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

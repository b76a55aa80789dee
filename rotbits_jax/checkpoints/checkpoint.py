"""Checkpoints on disk: directories of weights, configs and tokenizer files.

The sidecar files are the files beside the weights: configs, tokenizer files and, for a
sliced model, the slicing JSON with the segment widths. The stem is the name that
SliceGPT gives to the weights and the slicing JSON, as in `<stem>.pt` and `<stem>.json`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
import os
import pathlib
import re
from typing import Any

import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import attributes
from rotbits_jax.checkpoints import configs
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import families
from rotbits_jax.checkpoints import indices
from rotbits_jax.checkpoints import lazy
from rotbits_jax.checkpoints import plain
from rotbits_jax.checkpoints import reader as reader_lib
from rotbits_jax.checkpoints import safetensors_files
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.checkpoints import torch_zip
from rotbits_jax.checkpoints import transformers_files
from rotbits_jax.checkpoints import writer as writer_lib
from rotbits_jax.checkpoints.contents import CONFIG
from rotbits_jax.checkpoints.contents import Checkpoint
from rotbits_jax.checkpoints.writer import Format
from rotbits_jax.system import schema

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
# These list the parts of a model of diffusers, or of sentence-transformers.
_PIPELINES = ('model_index.json', 'modules.json')


def example(name: str = 'phi2-tiny-sliced-0.25') -> pathlib.Path:
  """Returns the folder of a small checkpoint of random weights, for examples.

  Args:
    name: 'phi2-tiny-sliced-0.25', 'phi2-tiny-dense' or 'llama-tiny-dense'.

  Raises:
    CheckpointError: if there is none of this name.
  """
  package = pathlib.Path(__file__).parents[1]
  # setup.py copies some of the folders of the repository into the package.
  for folder in (package / 'testdata', package.parent / 'tests' / 'testdata'):
    if (folder / name / CONFIG).is_file():
      return folder / name
  raise errors.CheckpointError(f'there is no example {name!r}')


def open_checkpoint(path: str | os.PathLike[str]) -> reader_lib.CheckpointReader:
  """Opens a dense or a sliced checkpoint: names, shapes, dtypes and the config.

  Three types of directories are supported: Hugging Face's (`model.safetensors`,
  `pytorch_model.bin`, or shards and their index), SliceGPT's (`<name>_<sparsity>.pt`
  and `.json`), and the directories of `save_checkpoint`. Weights with shortcuts are
  taken as a sliced model.

  Args:
    path: the directory; or a weights file or index in it, if it has several.

  Returns:
    The checkpoint. It reads parameters only when they are requested.

  Raises:
    UnsupportedError: if the files are not a checkpoint of a known family.
    CheckpointError: if a file is missing or damaged.
  """
  weights = _find_weights(pathlib.Path(path))
  is_torch = _is_torch(weights)
  open_file = torch_zip.open_file if is_torch else safetensors_files.open_file
  shards: list[pathlib.Path] = []
  content = b''
  if weights.suffix == '.json':
    content = indices.read(weights)
    tensors, shards = _open_shards(weights, content, open_file)
  else:
    tensors = open_file(weights)

  # The writer divides the tensors as the index does.
  index = {weights.name: content} if weights.name == indices.INDEX else {}
  files, left_out = _read_sidecars(weights.parent, {weights, *shards}, index)
  if CONFIG not in files:
    raise errors.UnsupportedError(
      f'{weights.parent}: there is no {CONFIG} other than a link that leaves the '
      'folder or leads nowhere'
      if CONFIG in left_out
      else f'{weights.parent}: there is no {CONFIG}'
    )
  config_json = _parse(weights.parent, files, CONFIG)
  stems = _slicing_stems(weights.parent, files)
  stem, slicing_json = None, None
  if any(name.endswith(f'.{families.SHORTCUT_NAME}') for name in tensors):
    stem = _slicing_stem(weights, stems)
    slicing_json = _parse(weights.parent, files, f'{stem}.json')
  others = [f'{other}.json' for other in sorted(stems - {stem})]  # of other models
  files = {name: content for name, content in files.items() if name not in others}
  metadata = () if is_torch else _own_metadata(shards or [weights])
  try:
    config = configs.parse_config(config_json, slicing_json)
  except errors.CheckpointError as e:
    raise errors.UnsupportedError(f'{weights}: {e}') from e
  return reader_lib.CheckpointReader(
    tensors,
    config,
    path=weights,
    weights=shards,
    files=files,
    stem=stem,
    left_out=(*left_out, *others, *metadata),
  )


def open_plain(
  path: str | os.PathLike[str], *, reason: str | None = None
) -> plain.PlainFiles:
  """Opens the safetensors files of a checkpoint of any family.

  Args:
    path: see `open_checkpoint`; a `config.json` is not needed. The weights may be in
      sub-folders, too.
    reason: why the checkpoint is not opened as a model, if there is a reason.

  Returns:
    The tensors, the headers of their files, and the other files.

  Raises:
    CheckpointError: if a file is missing or damaged, or is not safetensors.
  """
  place = pathlib.Path(path)
  root = place if place.is_dir() else place.parent
  weights = [] if is_divided(place) else [_find_weights(place)]
  nested = _nested_weights(root) if place.is_dir() else []
  first, index = (*weights, *nested)[0], dict[str, bytes]()
  if first.suffix == '.json':
    index = {first.name: indices.read(first)}
    weights = list(_shards(first, index[first.name]))
  if torch_files := [file for file in weights if _is_torch(file)]:
    why = f'{reason}, and ' if reason else ''
    raise errors.UnsupportedError(
      f'{why}{torch_files[0]} is not safetensors, in which any family is stored'
    )
  sidecars, left_out = _read_sidecars(root, {first, *weights, *nested}, index)
  return plain.PlainFiles(
    first,
    {file.relative_to(root).as_posix(): file for file in (*weights, *nested)},
    root=root,
    files=sidecars,
    left_out=left_out,
    reason=reason,
  )


def open_any(
  path: str | os.PathLike[str],
) -> reader_lib.CheckpointReader | plain.PlainFiles:
  """Opens a checkpoint, as plain tensors if it is not of a known family.

  Args:
    path: see `open_checkpoint`.

  Raises:
    CheckpointError: if a file is missing or damaged.
  """
  try:
    return open_checkpoint(path)
  except errors.UnsupportedError as e:
    return open_plain(path, reason=str(e))


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
  """Loads a dense or a sliced checkpoint into memory.

  Args:
    path: see `open_checkpoint`.

  Returns:
    The checkpoint; the model's leaves are NumPy arrays.

  Raises:
    CheckpointError: if the files are not a checkpoint of a known family.
  """
  return open_checkpoint(path).load()


def save_checkpoint(
  checkpoint: Checkpoint,
  directory: str | os.PathLike[str],
  format: Format = 'safetensors',
  *,
  shard_size: int | None = None,
  overwrite: bool = True,
) -> None:
  """Saves a checkpoint with the tensor names, shapes and dtypes of the original.

  Structured leaves are materialized one layer at a time; a pair of low-rank factors
  stays a pair. The files are written beside the directory and moved into it when all
  are complete. Other files in the directory stay, except older weights that programs
  would load in place of the new ones.

  Args:
    checkpoint: the model and its sidecar files.
    directory: the directory, which is made if it does not exist.
    format: see `CheckpointWriter`.
    shard_size: see `CheckpointWriter`.
    overwrite: see `CheckpointWriter`.

  Raises:
    CheckpointError: if the format does not support the dtype of a tensor.
    ValueError: if the format does not suit the model, if a file name is not valid, or
      if the `config.json` is that of another model.
    OSError: if the directory cannot be written, or a file must not be replaced.
  """
  model, files, stem = checkpoint
  leaves = tensors_lib.leaves_of(model)
  files = fitting_files(model, files, stem)
  with writer_lib.CheckpointWriter(
    directory,
    model.config,
    dtypes={path: np.dtype(leaf.dtype) for path, leaf in leaves.items()},
    files=files,
    stem=stem,
    format=format,
    shard_size=shard_size,
    factors=tensors_lib.factored_leaves(leaves),
    shortcuts=transformers_files.thin_shortcuts(leaves),
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
    files: the files by name, of the checkpoint that the model was.
    stem: name of the slicing JSON among them.

  Raises:
    CheckpointError: as for `configs.parse_config`.
    ValueError: if the files tell another config than that of the model.
  """
  configs.check_files(files, model.config, stem)
  untied = configs.with_own_head(files, model.config)
  if untied is files:
    return files
  configs.parse_config(attributes.parse_object(files[CONFIG], CONFIG))  # or leave it
  flat = structured.flatten(model.outer())
  pair = [flat.get('head/kernel'), flat.get('embed/tokens')]
  # Parts of arrays on other hosts are not compared: a head of its own is never wrong.
  known = all(
    structured.is_plain(x) and getattr(x, 'is_fully_addressable', True) for x in pair
  )
  if known:
    head, table = map(np.asarray, pair)
    known = structured.same_bits(head.T, table)
  return files if known else untied


def _find_weights(path: pathlib.Path) -> pathlib.Path:
  if path.is_file():
    if path.suffix in ('.bin', '.pt', '.safetensors') or path.name.endswith(
      (indices.SUFFIX, indices.TORCH_INDEX)
    ):
      return path
    raise errors.CheckpointError(
      f'{path}: weights are .safetensors, .bin or .pt files, or the index of several, '
      f', as in *{indices.SUFFIX}'
    )
  if not path.is_dir():
    raise errors.CheckpointError(f'{path}: there is no such file or directory')
  candidates = _candidates(path)
  if is_divided(path):
    raise errors.UnsupportedError(f'{path}: the weights are in sub-folders')
  if not candidates:
    raise errors.CheckpointError(
      f'{path}: there are no .pt or .safetensors files and no {indices.TORCH_WEIGHTS}'
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
  if (path / indices.WEIGHTS).is_file():
    candidates.append(path / indices.WEIGHTS)
  else:
    listed = sorted(path.glob(f'*{indices.SUFFIX}'))
    # Programs prefer these to safetensors of other names, such as an adapter's.
    torch = [path / x for x in (indices.TORCH_WEIGHTS, indices.TORCH_INDEX)]
    if not candidates and not listed:
      listed = [x for x in torch if x.is_file()][:1]
    candidates += listed or sorted(path.glob('*.safetensors'))
  return candidates


def is_divided(path: pathlib.Path) -> bool:
  """Returns whether a folder is that of a pipeline, with weights in sub-folders only.

  Other folders of folders may be collections of models, which nobody wants in one file.
  """
  is_pipeline = any((path / name).is_file() for name in _PIPELINES)
  return is_pipeline and not _candidates(path) and bool(_nested_weights(path))


def _nested_weights(root: pathlib.Path) -> list[pathlib.Path]:
  """Returns the safetensors files in the sub-folders of a folder."""
  return [
    file
    for file in _walk(root)
    if file.suffix == '.safetensors'
    and file.parent != root
    and _is_inside(file, root)
    and schema.is_relative_path(file.relative_to(root).as_posix())
  ]


def _shards(index: pathlib.Path, content: bytes) -> dict[pathlib.Path, list[str]]:
  """Returns the names of the tensors in each shard of an index.

  Raises:
    CheckpointError: if the content is not that of an index, or a shard is missing.
  """
  found = {}
  for name, tensors in indices.parse(content, str(index)).shards().items():
    found[index.parent / name] = tensors
    if not os.path.isfile(index.parent / name):
      raise errors.CheckpointError(f'{index}: the shard {errors.cut(name)} is missing')
  return found


def _open_shards(
  index: pathlib.Path,
  content: bytes,
  open_shard: Callable[[pathlib.Path], dict[str, lazy.LazyTensor]],
) -> tuple[dict[str, lazy.LazyTensor], list[pathlib.Path]]:
  """Opens the shards that an index lists.

  Args:
    index: path of the index.
    content: its content.
    open_shard: returns the tensors of a shard by name.

  Returns:
    The tensors by name, and the shards.

  Raises:
    CheckpointError: if the index is damaged, or if the shards do not hold exactly the
      tensors that it lists.
  """
  tensors: dict[str, lazy.LazyTensor] = {}
  shards = _shards(index, content)
  for path, listed in shards.items():
    found = open_shard(path)
    if differing := sorted(found.keys() ^ set(listed))[:8]:
      raise errors.CheckpointError(
        f'{index}: {path.name} and the index differ in '
        f'{errors.cut(", ".join(differing))}'
      )
    tensors |= found
  return tensors, list(shards)


def _own_metadata(weights: Iterable[pathlib.Path]) -> tuple[str, ...]:
  """Names the metadata of safetensors files that is not kept."""
  found = [file.name for file in weights if safetensors_files.has_own_metadata(file)]
  more = f' and {len(found) - 1} more' if found[1:] else ''
  return (f'the metadata of {found[0]}{more}',) if found else ()


def _is_torch(weights: pathlib.Path) -> bool:
  return weights.suffix in ('.pt', '.bin') or weights.name.endswith(indices.TORCH_INDEX)


def _read_sidecars(
  root: pathlib.Path, own: Collection[pathlib.Path], index: dict[str, bytes]
) -> tuple[dict[str, bytes], tuple[str, ...]]:
  """Reads the files beside the weights.

  Args:
    root: the folder of the checkpoint.
    own: the weights files and their index.
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
    if file in own:
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
      or (content := lazy.content(file, room)).startswith(_ENCODED, 8)
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


def _parse(directory: pathlib.Path, files: dict[str, bytes], name: str) -> Any:
  """Parses a sidecar file that is JSON."""
  return attributes.parse_json(files[name], str(directory / name))


def _slicing_stems(directory: pathlib.Path, files: dict[str, bytes]) -> set[str]:
  """Returns the stems of the slicing JSONs among the sidecar files."""
  key = f'"{configs.SLICING_KEY}"'.encode()
  own = [name for name in files if name.endswith('.json') and '/' not in name]
  names = [name for name in own if key in files[name]]
  return {
    name.removesuffix('.json')
    for name in names
    if isinstance(parsed := _parse(directory, files, name), dict)
    and configs.SLICING_KEY in parsed
  }


def _slicing_stem(weights: pathlib.Path, stems: set[str]) -> str:
  """Returns the stem of the slicing JSON that describes the weights."""
  if weights.suffix == '.pt':
    if weights.stem not in stems:
      raise errors.CheckpointError(
        f'{weights}: the slicing JSON {weights.stem}.json must be beside it'
      )
    return weights.stem
  if len(stems) != 1:
    names = errors.cut(', '.join(f'{stem}.json' for stem in sorted(stems))) or 'none'
    raise errors.CheckpointError(
      f'{weights}: a sliced model needs one slicing JSON beside it, got {names}'
    )
  return min(stems)

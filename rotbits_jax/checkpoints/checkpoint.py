"""Checkpoints on disk: a directory of weights, configs and tokenizer files."""

import json
import os
import pathlib
import tempfile
from typing import Any, Literal

from rotbits_jax.checkpoints import configs
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import gguf_files
from rotbits_jax.checkpoints import safetensors_files
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.checkpoints import torch_zip
from rotbits_jax.checkpoints.contents import CONFIG
from rotbits_jax.checkpoints.contents import Checkpoint

WEIGHTS = 'model.safetensors'
INDEX_SUFFIX = '.safetensors.index.json'

_SIDECAR_SUFFIXES = ('.json', '.txt', '.model', '.jinja')

Format = Literal['safetensors', 'slicegpt']


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
  """Loads a dense or a sliced checkpoint.

  Known are Hugging Face directories (`model.safetensors`, or shards and their
  index), what SliceGPT writes (`<name>_<sparsity>.pt` and `.json`), and what
  `save_checkpoint` writes. Weights with shortcuts are a sliced model's. A `.gguf`
  file is read as `gguf_files.read_gguf` does.

  Args:
    path: the directory, or the weights file (or index) in it where it has several, or
      a `.gguf` file.

  Returns:
    The checkpoint; the model's leaves are NumPy arrays.

  Raises:
    CheckpointError: if the files are not a checkpoint of a known family.
  """
  if pathlib.Path(path).suffix == '.gguf':
    return gguf_files.read_gguf(path)
  weights = _find_weights(pathlib.Path(path))
  if weights.suffix == '.pt':
    tensors = torch_zip.read(weights)
  elif weights.name.endswith(INDEX_SUFFIX):
    tensors = safetensors_files.read_sharded(weights)
  else:
    tensors = safetensors_files.read(weights)

  files = _read_sidecars(weights.parent)
  if CONFIG not in files:
    raise errors.CheckpointError(f'{weights.parent}: there is no {CONFIG}')
  config_json = _parse_json(weights.parent / CONFIG, files[CONFIG])
  slicings = _slicing_jsons(weights.parent, files)
  stem, slicing_json = None, None
  if tensors_lib.is_sliced(tensors):
    stem = _slicing_stem(weights, slicings)
    slicing_json = slicings[stem]
  for other in slicings.keys() - {stem}:
    del files[f'{other}.json']
  try:
    config = configs.parse_config(config_json, slicing_json)
    model = tensors_lib.from_tensors(tensors, config)
  except errors.CheckpointError as e:
    raise errors.CheckpointError(f'{weights}: {e}') from e
  return Checkpoint(model, files, stem)


def save_checkpoint(
  checkpoint: Checkpoint,
  directory: str | os.PathLike[str],
  format: Format = 'safetensors',
) -> None:
  """Saves a checkpoint with the tensor names, shapes and dtypes of the original.

  Structured leaves are materialized. Files are written beside the directory and
  moved into it when all are complete; other files in it stay.

  Args:
    checkpoint: the model and the files to put beside it.
    directory: made if it does not exist.
    format: 'safetensors' writes `model.safetensors`; 'slicegpt' writes `<stem>.pt`
      as SliceGPT does, for a sliced model.

  Raises:
    ValueError: if the format does not suit the model, or a file's name is not one.
  """
  model, files, stem = checkpoint
  if format not in ('safetensors', 'slicegpt'):
    raise ValueError(f"format must be 'safetensors' or 'slicegpt', got {format!r}")
  if format == 'slicegpt' and not model.config.sliced:
    raise ValueError('only a sliced model can be saved in the slicegpt format')
  required = [CONFIG]
  if model.config.sliced:
    if stem is None:
      raise ValueError('a sliced checkpoint needs a stem, got None')
    required.append(f'{stem}.json')
  weights = f'{stem}.pt' if format == 'slicegpt' else WEIGHTS
  for name in required:
    if name not in files:
      raise ValueError(f'the file {name} is missing from the checkpoint')
  for name in (*files, weights):
    if name in ('', '.', '..') or any(c in name for c in '/\\\0'):
      raise ValueError(f'{name!r} is not the name of a file')
  if weights in files:
    raise ValueError(f'{weights} is the name of the weights and of another file')

  directory = pathlib.Path(directory).absolute()
  directory.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=directory.parent, prefix='.saving-') as scratch:
    staging = pathlib.Path(scratch, directory.name)
    staging.mkdir()
    for name, content in files.items():
      (staging / name).write_bytes(content)
    tensors = tensors_lib.to_tensors(model)
    if format == 'slicegpt':
      torch_zip.write(staging / weights, tensors, str(stem))
    else:
      safetensors_files.write(staging / weights, tensors)
    if directory.exists():
      for file in staging.iterdir():
        os.replace(file, directory / file.name)
    else:
      os.rename(staging, directory)


def _find_weights(path: pathlib.Path) -> pathlib.Path:
  if path.is_file():
    if path.suffix in ('.pt', '.safetensors') or path.name.endswith(INDEX_SUFFIX):
      return path
    raise errors.CheckpointError(f'{path}: weights are .pt or .safetensors files')
  if not path.is_dir():
    raise errors.CheckpointError(f'{path}: there is no such file or directory')
  candidates = sorted(path.glob('*.pt'))
  if (path / WEIGHTS).is_file():
    candidates.append(path / WEIGHTS)
  else:
    indices = sorted(path.glob(f'*{INDEX_SUFFIX}'))
    candidates += indices or sorted(path.glob('*.safetensors'))
  if not candidates:
    raise errors.CheckpointError(f'{path}: there are no .pt or .safetensors files')
  if len(candidates) > 1:
    names = ', '.join(file.name for file in candidates)
    raise errors.CheckpointError(f'{path}: name one of the weights files {names}')
  return candidates[0]


def _read_sidecars(directory: pathlib.Path) -> dict[str, bytes]:
  return {
    file.name: file.read_bytes()
    for file in sorted(directory.iterdir())
    if file.suffix in _SIDECAR_SUFFIXES
    and not file.name.endswith('.index.json')
    and file.is_file()
  }


def _slicing_jsons(
  directory: pathlib.Path, files: dict[str, bytes]
) -> dict[str, dict[str, Any]]:
  """The slicing JSONs among the files, by stem."""
  found = {}
  for name, content in files.items():
    if name.endswith('.json') and f'"{configs.SLICING_KEY}"'.encode() in content:
      parsed = _parse_json(directory / name, content)
      if isinstance(parsed, dict) and configs.SLICING_KEY in parsed:
        found[name.removesuffix('.json')] = parsed
  return found


def _slicing_stem(weights: pathlib.Path, slicings: dict[str, dict[str, Any]]) -> str:
  """Which slicing JSON describes the weights."""
  if weights.suffix == '.pt':
    if weights.stem not in slicings:
      raise errors.CheckpointError(
        f'{weights}: the slicing JSON {weights.stem}.json must be beside it'
      )
    return weights.stem
  if len(slicings) != 1:
    names = ', '.join(f'{stem}.json' for stem in slicings) or 'none'
    raise errors.CheckpointError(
      f'{weights}: a sliced model needs one slicing JSON beside it, got {names}'
    )
  return next(iter(slicings))


def _parse_json(path: pathlib.Path, content: bytes) -> Any:
  try:
    return json.loads(content)
  except (ValueError, RecursionError) as e:
    raise errors.CheckpointError(f'{path}: not JSON: {e}') from e

"""Safetensors files: one file, or several shards with an index.

A shard is one of several files that share the tensors of a checkpoint. The index is a
JSON file that names the shard of each tensor. Tensors are read when they are requested,
and written one at a time.
"""

from collections.abc import Callable, Iterable, Mapping
import json
import os
import pathlib
import struct
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from rotbits_jax.checkpoints import attributes
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import lazy
from rotbits_jax.system import outputs

WEIGHTS = 'model.safetensors'
INDEX_SUFFIX = '.safetensors.index.json'
INDEX = f'model{INDEX_SUFFIX}'

_DTYPES: dict[str, np.dtype] = {
  'F64': np.dtype(np.float64),
  'I64': np.dtype(np.int64),
  'F32': np.dtype(np.float32),
  'I32': np.dtype(np.int32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'I16': np.dtype(np.int16),
  'I8': np.dtype(np.int8),
  'U8': np.dtype(np.uint8),
  'U64': np.dtype(np.uint64),
  'U32': np.dtype(np.uint32),
  'U16': np.dtype(np.uint16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'BOOL': np.dtype(np.bool_),
}

Specs = Mapping[str, lazy.TensorSpec]

# Bytes of a header or an index; the largest checkpoints have an index of 14 MB.
_MOST_JSON = 1 << 25


def open_file(path: str | os.PathLike[str]) -> dict[str, lazy.LazyTensor]:
  """Opens a safetensors file. Only its header is read.

  Args:
    path: the file.

  Returns:
    The tensors by name.

  Raises:
    CheckpointError: if the file is damaged or has a dtype that NumPy lacks.
  """
  file = lazy.File.of(path)
  tensors = {}
  for name, entry in _entries(file).items():
    if entry.code not in _DTYPES:
      raise errors.UnsupportedError(
        f'{path}: {name} has the dtype {entry.code}, which is not supported'
      )
    spec = lazy.TensorSpec(entry.shape, _DTYPES[entry.code])
    tensors[name] = lazy.in_file(file, entry.offset, spec)
  return tensors


def open_places(
  path: str | os.PathLike[str],
) -> dict[str, tuple[int, lazy.LazyTensor]]:
  """Opens a safetensors file with tensors of any dtype.

  Args:
    path: the file.

  Returns:
    Where each tensor begins in the file, and the tensor, by name. A tensor whose dtype
    NumPy lacks is given as its bytes.

  Raises:
    CheckpointError: if the file is damaged.
  """
  file = lazy.File.of(path)
  found = {}
  for name, entry in _entries(file).items():
    spec = lazy.TensorSpec((entry.nbytes,), np.dtype(np.uint8))
    if entry.code in _DTYPES:
      spec = lazy.TensorSpec(entry.shape, _DTYPES[entry.code])
    found[name] = entry.offset, lazy.in_file(file, entry.offset, spec)
  return found


class _Entry(NamedTuple):
  """What the header says of a tensor.

  Attributes:
    code: of the dtype.
    shape: of the tensor.
    offset: of its first byte in the file.
    nbytes: how many bytes it takes.
  """

  code: str
  shape: tuple[int, ...]
  offset: int
  nbytes: int


def _entries(file: lazy.File) -> dict[str, _Entry]:
  """Returns the tensors of a file by name."""
  try:
    # The library checks that the header is valid and that the tensors cover the file
    # exactly.
    with safetensors.safe_open(file.path, framework='np'):
      pass
  except safetensors.SafetensorError as e:
    raise errors.CheckpointError(f'{file.path}: {errors.cut(str(e))}') from e
  (header_size,) = struct.unpack('<Q', file.map(0, 8))
  found = {}
  content = bytes(file.map(8, header_size))
  header = attributes.parse_json(content, f'{file.path}: header', most=_MOST_JSON)
  for name, entry in header.items():
    if name != '__metadata__':
      lazy.check_name(name)
      begin, end = (8 + header_size + offset for offset in entry['data_offsets'])
      shape, code = tuple(entry['shape']), entry['dtype']
      if not lazy.numpy_holds(shape, _DTYPES.get(code, np.dtype(np.uint8))):
        raise errors.CheckpointError(
          f'{file.path}: {name} has shape {errors.cut(str(shape))}'
        )
      found[name] = _Entry(code, shape, begin, end - begin)
  return found


def read_index(path: pathlib.Path) -> bytes:
  """Returns the content of an index of shards.

  Raises:
    CheckpointError: if there is no such file, or it is larger than an index.
  """
  return lazy.File.of(path).read(_MOST_JSON)


def shards_of(index_path: str | os.PathLike[str]) -> list[pathlib.Path]:
  """Returns the shards that an index lists, by name.

  Args:
    index_path: the index.

  Raises:
    CheckpointError: if the index is malformed, or a shard is missing or elsewhere.
  """
  index_path = pathlib.Path(index_path)
  shards = []
  for shard in sorted(set(_weight_map(index_path).values())):
    if pathlib.PurePath(shard).name != shard:
      raise errors.CheckpointError(
        f'{index_path}: the shard {errors.cut(repr(shard))} must be in the same '
        'directory'
      )
    path = index_path.parent / shard
    if not os.path.isfile(path):  # False for a name that is too long, too
      raise errors.CheckpointError(
        f'{index_path}: the shard {errors.cut(shard)} is missing'
      )
    shards.append(path)
  return shards


def open_sharded(
  index_path: str | os.PathLike[str],
  open_shard: Callable[[pathlib.Path], dict[str, lazy.LazyTensor]] = open_file,
) -> tuple[dict[str, lazy.LazyTensor], list[pathlib.Path]]:
  """Opens the shards that a `*.index.json` lists.

  Args:
    index_path: the index.
    open_shard: gives the tensors of a shard by name.

  Returns:
    The tensors by name, and the shards.

  Raises:
    CheckpointError: if the index is damaged, or if the shards do not hold exactly the
      tensors that it lists.
  """
  listed: dict[str, set[str]] = {}
  for name, shard in _weight_map(pathlib.Path(index_path)).items():
    listed.setdefault(shard, set()).add(name)
  tensors, shards = {}, shards_of(index_path)
  for path in shards:
    found = open_shard(path)
    if found.keys() != listed[path.name]:
      raise errors.CheckpointError(
        f'{index_path}: {path.name} and the index differ in '
        f'{errors.cut(", ".join(sorted(found.keys() ^ listed[path.name])[:8]))}'
      )
    tensors.update(found)
  return tensors, shards


def plan_shards(specs: Specs, shard_size: int | None) -> dict[str, Specs]:
  """Divides tensors among files as Hugging Face does.

  Args:
    specs: the tensors by name.
    shard_size: the greatest number of bytes of tensors in a file with more than one
      tensor; None for one file.

  Returns:
    The tensors of each file, in order, by the name of the file. The name is
    `model.safetensors` if one file holds all tensors, or
    `model-00001-of-0000N.safetensors` and so on.
  """
  sizes = {name: spec.nbytes for name, spec in specs.items()}
  groups = outputs.divided(sizes, shard_size)
  names = [WEIGHTS]
  if len(groups) > 1:
    names = outputs.numbered('model', '.safetensors', len(groups))
  return {
    file: {name: specs[name] for name in group}
    for file, group in zip(names, groups, strict=True)
  }


def index_json(shards: Mapping[str, Specs]) -> bytes:
  """Makes the index of several files in the format of Hugging Face.

  Args:
    shards: the result of `plan_shards`.

  Returns:
    The content of the index file.
  """
  total = sum(spec.nbytes for shard in shards.values() for spec in shard.values())
  weight_map = {name: file for file, shard in shards.items() for name in shard}
  index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
  return (json.dumps(index, indent=2, sort_keys=True) + '\n').encode()


class Writer:
  """Writes safetensors files. Tensors are added one at a time, in any order.

  The constructor writes the headers, with the metadata that Hugging Face expects. A
  file is complete when all of its tensors have been added.
  """

  def __init__(self, directory: pathlib.Path, shards: Mapping[str, Specs]):
    """Makes the files.

    Args:
      directory: the directory of the files.
      shards: the tensors of each file by the name of the file.

    Raises:
      CheckpointError: if safetensors does not support a dtype.
    """
    self._places: dict[str, tuple[pathlib.Path, int]] = {}
    for file, specs in shards.items():
      path = directory / file
      offsets = _make(path, specs)
      self._places |= {name: (path, offset) for name, offset in offsets.items()}

  def add(self, name: str, pieces: Iterable[memoryview]) -> None:
    """Writes a tensor.

    Args:
      name: name of the tensor.
      pieces: bytes of the tensor in row-major order.
    """
    path, offset = self._places[name]
    with open(path, 'r+b') as file:
      file.seek(offset)
      for piece in pieces:
        file.write(piece)

  def close(self) -> None:
    """Does nothing, because no file is open between two tensors."""

  def abandon(self) -> None:
    """Does nothing, because no file is open between two tensors."""


def _weight_map(index_path: pathlib.Path) -> dict[str, str]:
  content = read_index(index_path)
  index = attributes.parse_json(content, str(index_path), most=_MOST_JSON)
  weight_map = index.get('weight_map') if isinstance(index, dict) else None
  if not isinstance(weight_map, dict) or not all(
    isinstance(shard, str) for shard in weight_map.values()
  ):
    raise errors.CheckpointError(f'{index_path}: weight_map must map names to files')
  return weight_map


def _make(path: pathlib.Path, specs: Specs) -> dict[str, int]:
  """Makes a file with a header and zeros; returns the offset of each tensor in it."""
  codes = {dtype: code for code, dtype in _DTYPES.items()}
  for name, spec in specs.items():
    if spec.dtype not in codes:
      raise errors.CheckpointError(
        f'{name}: safetensors files do not support {spec.dtype}'
      )
  # If tensors of wider dtypes come first, every tensor is aligned.
  order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  offsets, end = {}, 0
  for name in order:
    spec, begin = specs[name], end
    offsets[name], end = begin, begin + spec.nbytes
    header[name] = {
      'dtype': codes[spec.dtype],
      'shape': list(spec.shape),
      'data_offsets': [begin, end],
    }
  encoded = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
  encoded += b' ' * (-len(encoded) % 8)
  body = 8 + len(encoded)
  with open(path, 'wb') as file:
    file.write(struct.pack('<Q', len(encoded)) + encoded)
    file.truncate(body + end)
  return {name: body + offset for name, offset in offsets.items()}

"""Safetensors files and their index, read and written without the library.

A file is the length of a header (8 bytes), the header (JSON), and the tensors one after
the other. The index is a JSON file that names the file, or shard, of each tensor.
"""

from collections.abc import Mapping, Sequence
import functools
import itertools
import json
import struct
from typing import Any

import numpy as np

from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import families
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.system import files
from rotbits_jax.system import schema

WEIGHTS = 'model.safetensors'
SUFFIX = '.safetensors.index.json'
INDEX = f'model{SUFFIX}'

_DTYPES = {code: dtype for dtype, code, _ in tensors_lib.DTYPES}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MOST_HEADER = MOST_INDEX = 1 << 25  # bytes; large checkpoints have an index of 14 MB

Specs = Mapping[str, tensors_lib.TensorSpec]


class _Entry(schema.Object):
  """A tensor's entry in the header; offsets are counted from the end of the header."""

  dtype: str
  shape: tuple[schema.Size, ...]
  data_offsets: tuple[schema.Size, schema.Size]


def read_header(file: files.File) -> bytes:
  """Returns the header of a file, with the length in front of it."""
  (size,) = struct.unpack('<Q', tensors_lib.read(file, 0, 8)[0])
  if size > _MOST_HEADER:
    text = f'{size} bytes are more than {_MOST_HEADER}; is it a pointer of Git LFS?'
    raise errors.CheckpointError(f'{file.path}: header: {text}')
  return tensors_lib.read(file, 0, 8 + size)[0].tobytes()


def open_tensors(file: files.File, header: bytes) -> dict[str, tensors_lib.LazyTensor]:
  """Returns the tensors of a file by name, given its header; see `places`."""

  def read(offset: int, spec: tensors_lib.TensorSpec) -> np.ndarray:
    content, _ = tensors_lib.read(file, offset, spec.nbytes)
    return content.view(spec.dtype).reshape(spec.shape)

  with errors.named(file.path):
    placed = places(header)
    if len(header) + sum(spec.nbytes for _, spec in placed.values()) != file.size:
      raise errors.CheckpointError('the tensors do not fill the file')
  make = tensors_lib.LazyTensor
  return {
    name: make(spec.shape, spec.dtype, functools.partial(read, offset, spec))
    for name, (offset, spec) in placed.items()
  }


def places(header: bytes) -> dict[str, tuple[int, tensors_lib.TensorSpec]]:
  """Returns the offset of each tensor in a file, and its shape and dtype, by name.

  The tensors must follow the header, see `read_header`, without holes. One whose dtype
  NumPy lacks is taken as its bytes.
  """
  if int.from_bytes(header[:8], 'little') != len(header) - 8:
    raise errors.CheckpointError('header: its length is wrong')
  values = families.parse_object(header[8:], 'header', most=_MOST_HEADER)
  values.pop('__metadata__', None)
  with errors.named('header', ValueError):
    entries = schema.load(dict[str, _Entry], values)
  placed, end = {}, len(header)
  # Tensors without elements come first where several have one offset.
  for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
    begin, stop = entry.data_offsets
    spec = tensors_lib.TensorSpec((max(stop - begin, 0),), np.dtype(np.uint8))
    if entry.dtype in _DTYPES:
      spec = tensors_lib.TensorSpec(entry.shape, _DTYPES[entry.dtype])
    spec.check(name)
    if len(header) + begin != end or spec.nbytes != stop - begin:
      raise errors.CheckpointError(f'{name} has wrong offsets')
    placed[name] = end, spec
    end += spec.nbytes
  return {name: placed[name] for name in entries}


def header(specs: Specs) -> bytes:
  """Returns the header of a file with these tensors, and Hugging Face's metadata."""
  values: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  # If tensors of wider dtypes come first, every tensor is aligned.
  for tensor in sorted(specs, key=lambda x: (-specs[x].dtype.itemsize, x)):
    spec, begin = specs[tensor], end
    if spec.dtype not in _CODES:
      text = f'safetensors files do not support {spec.dtype}'
      raise errors.CheckpointError(f'{tensor}: {text}')
    end = begin + spec.nbytes
    offsets, code = (begin, end), _CODES[spec.dtype]
    values[tensor] = {'dtype': code, 'shape': spec.shape, 'data_offsets': offsets}
  encoded = json.dumps(values, separators=(',', ':'), ensure_ascii=False).encode()
  encoded += b' ' * (-len(encoded) % 8)
  return struct.pack('<Q', len(encoded)) + encoded


def parse_index(content: bytes) -> tuple[dict[str, Sequence[str]], Any]:
  """Parses an index: the names of the tensors in each shard, and the metadata."""
  value = families.parse_object(content, 'index', most=MOST_INDEX)
  with errors.named('index', ValueError):
    weight_map = schema.load(dict[str, str], value.get('weight_map'), 'weight_map')
  shards: dict[str, Any] = {name: [] for name in sorted({*weight_map.values()})}
  for tensor, name in weight_map.items():
    shards[name].append(tensor)
  return shards, value.get('metadata')


def divided(
  specs: Specs, index: bytes | None, shard_size: int | None
) -> tuple[dict[str, Specs], bytes | None]:
  """Divides tensors among files as an older index says, or as Hugging Face does.

  Returns the tensors of each file by its name, and the new index of several files.
  Without a `shard_size`, see `CheckpointWriter`, these are the files of the index.
  """
  sizes = {name: spec.nbytes for name, spec in specs.items()}
  names: Mapping[str, Sequence[str]] = {}
  metadata: Any = {}
  if index is not None and shard_size is None:
    names, metadata = parse_index(index)
  if sorted(itertools.chain(*names.values())) != sorted(specs):
    metadata, names = {}, shard_names(sizes, shard_size, 'model', '.safetensors')
    names = names if len(names) > 1 else {WEIGHTS: tuple(sizes)}
  shards: dict[str, Specs] = {
    file: {name: specs[name] for name in group} for file, group in names.items()
  }
  if [*shards] == [WEIGHTS]:
    return shards, None
  metadata = metadata if isinstance(metadata, dict) else {}
  weight_map = {name: file for file, shard in shards.items() for name in shard}
  total = {'total_size': sum(sizes.values())}
  content = {'metadata': metadata | total, 'weight_map': weight_map}
  return shards, families.to_json(content)


def shard_names(
  sizes: Mapping[str, int], most: int | None, stem: str, suffix: str
) -> dict[str, tuple[str, ...]]:
  """Divides items of these sizes among files of at most so many bytes, or one item.

  Returns the items by the names of the files, which are like Hugging Face's shards.
  """
  groups: list[list[str]] = [[]]
  filled = 0
  for name, size in sizes.items():
    if most is not None and groups[-1] and filled + size > most:
      groups.append([])
      filled = 0
    groups[-1].append(name)
    filled += size
  return {
    f'{stem}-{i:05}-of-{len(groups):05}{suffix}': tuple(group)
    for i, group in enumerate(groups, 1)
  }

"""Safetensors files, single and sharded, as memory-mapped arrays."""

import json
import mmap
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from rotbits_jax.checkpoints import errors

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
  'BOOL': np.dtype(np.bool_),
}


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Reads a safetensors file as read-only views of the memory-mapped file.

  Args:
    path: the file.

  Returns:
    The tensors by name.

  Raises:
    CheckpointError: if the file is damaged or has a dtype that NumPy lacks.
  """
  try:
    # The library checks that the header is well-formed and covers the file exactly.
    with safetensors.safe_open(path, framework='np'):
      pass
  except safetensors.SafetensorError as e:
    raise errors.CheckpointError(f'{path}: {e}') from e
  with open(path, 'rb') as file:
    data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
  (header_size,) = struct.unpack('<Q', data[:8])
  body = data[8 + header_size :]
  tensors = {}
  for name, entry in json.loads(bytes(data[8 : 8 + header_size])).items():
    if name == '__metadata__':
      continue
    if entry['dtype'] not in _DTYPES:
      raise errors.CheckpointError(f'{path}: {name} has dtype {entry["dtype"]}')
    begin, end = entry['data_offsets']
    flat = np.frombuffer(body[begin:end], _DTYPES[entry['dtype']])
    tensors[name] = flat.reshape(entry['shape'])
  return tensors


def read_sharded(index_path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Reads the shards that a `*.safetensors.index.json` lists.

  Args:
    index_path: the index.

  Returns:
    The tensors by name.

  Raises:
    CheckpointError: if the index is malformed or the shards do not hold exactly
      the tensors that it lists.
  """
  index_path = pathlib.Path(index_path)
  weight_map = _weight_map(index_path)
  tensors = {}
  for shard in sorted(set(weight_map.values())):
    if pathlib.PurePath(shard).name != shard:
      raise errors.CheckpointError(f'{index_path}: the shard {shard!r} is elsewhere')
    if not (index_path.parent / shard).is_file():
      raise errors.CheckpointError(f'{index_path}: the shard {shard} is missing')
    found = read(index_path.parent / shard)
    listed = {name for name, place in weight_map.items() if place == shard}
    if found.keys() != listed:
      raise errors.CheckpointError(
        f'{index_path}: {shard} and the index differ in '
        f'{", ".join(sorted(found.keys() ^ listed)[:8])}'
      )
    tensors.update(found)
  return tensors


def _weight_map(index_path: pathlib.Path) -> dict[str, str]:
  try:
    index: Any = json.loads(index_path.read_bytes())
  except ValueError as e:
    raise errors.CheckpointError(f'{index_path}: not JSON: {e}') from e
  weight_map = index.get('weight_map') if isinstance(index, dict) else None
  if not isinstance(weight_map, dict) or not all(
    isinstance(shard, str) for shard in weight_map.values()
  ):
    raise errors.CheckpointError(f'{index_path}: weight_map must map names to files')
  return weight_map


def write(path: str | pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  """Writes a safetensors file with the metadata that Hugging Face expects.

  One tensor at a time is made contiguous; the library's writer would need all.

  Args:
    path: the file.
    tensors: the tensors by name.

  Raises:
    CheckpointError: if safetensors has no such dtype.
  """
  codes = {dtype: code for code, dtype in _DTYPES.items()}
  for name, tensor in tensors.items():
    if tensor.dtype not in codes:
      raise errors.CheckpointError(f'{name}: safetensors files have no {tensor.dtype}')
  # Widest dtype first keeps every tensor aligned.
  order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  offset = 0
  for name in order:
    tensor = tensors[name]
    header[name] = {
      'dtype': codes[tensor.dtype],
      'shape': list(tensor.shape),
      'data_offsets': [offset, offset + tensor.nbytes],
    }
    offset += tensor.nbytes
  encoded = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
  encoded += b' ' * (-len(encoded) % 8)
  with open(path, 'wb') as file:
    file.write(struct.pack('<Q', len(encoded)) + encoded)
    for name in order:
      contiguous = np.ascontiguousarray(tensors[name]).reshape(-1)
      file.write(contiguous.view(np.uint8).data)

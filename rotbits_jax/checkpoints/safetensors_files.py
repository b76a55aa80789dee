"""Safetensors files, read and written without the library.

A file is the length of a header (8 bytes), the header (JSON), and the tensors one after
the other. The header has the dtype, the shape and the place of each tensor.
"""

from collections.abc import Mapping
import dataclasses
import json
import os
import struct
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rotbits_jax.checkpoints import attributes
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import indices
from rotbits_jax.checkpoints import lazy
from rotbits_jax.checkpoints import staging
from rotbits_jax.system import files
from rotbits_jax.system import outputs
from rotbits_jax.system import schema

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

_MOST_HEADER = 1 << 25  # bytes
_METADATA = '__metadata__'
_WRITTEN = {'format': 'pt'}  # the metadata that Hugging Face expects


@dataclasses.dataclass(frozen=True)
class _Entry:
  """A tensor's entry in the header.

  Attributes:
    dtype: the dtype code.
    shape: the tensor's shape.
    data_offsets: begin and end of its bytes, counted from the end of the header.
  """

  dtype: str
  shape: tuple[schema.Size, ...]
  data_offsets: tuple[schema.Size, schema.Size]


class Place(NamedTuple):
  """Where a tensor is in its file.

  Attributes:
    code: the dtype code of the header.
    offset: where the tensor begins in the file.
    spec: shape and dtype; those of its bytes if NumPy lacks the dtype.
  """

  code: str
  offset: int
  spec: lazy.TensorSpec


def open_file(path: str | os.PathLike[str]) -> dict[str, lazy.LazyTensor]:
  """Opens a safetensors file; returns the tensors by name. Only its header is read.

  Raises:
    CheckpointError: if the file is damaged or has a dtype that NumPy lacks.
  """
  file = lazy.opened(path)
  found = {}
  for name, place in places(read_header(file), file.size, str(path)).items():
    if place.code not in _DTYPES:
      raise errors.UnsupportedError(
        f'{path}: {name} has the dtype {errors.cut(place.code)}, which is not supported'
      )
    found[name] = lazy.in_file(file, place.offset, place.spec)
  return found


def has_own_metadata(path: str | os.PathLike[str]) -> bool:
  """Returns whether a file has metadata other than what `layout` puts into a header.

  Raises:
    CheckpointError: if the file is damaged.
  """
  values = _parse(read_header(lazy.opened(path)), str(path))
  return (values.get(_METADATA) or _WRITTEN) != _WRITTEN


def read_header(file: files.File) -> bytes:
  """Reads the bytes of a file before its tensors: the length of the header, and it.

  Raises:
    CheckpointError: if the file is damaged.
  """
  (size,) = struct.unpack('<Q', lazy.read(file, 0, 8))
  if size > _MOST_HEADER:
    raise errors.CheckpointError(
      f'{file.path}: header: {size} bytes are more than {_MOST_HEADER}'
    )
  return lazy.read(file, 0, 8 + size).tobytes()


def places(header: bytes, size: int | None, where: str) -> dict[str, Place]:
  """Finds the tensors of a file, which follow each other without holes.

  Args:
    header: see `read_header`.
    size: size of the file; None if it follows from the header.
    where: name of the file, for errors.

  Returns:
    The places by name, in the order of the header.

  Raises:
    CheckpointError: if the header is damaged.
  """
  values = _parse(header, where)
  values.pop(_METADATA, None)
  try:
    entries = {k: schema.load(_Entry, x, k[:40]) for k, x in values.items()}
  except schema.SchemaError as e:
    raise errors.CheckpointError(f'{where}: header: {errors.cut(str(e))}') from e
  found, end = {}, 0
  for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
    lazy.check_name(name)
    (begin, stop), shape = entry.data_offsets, entry.shape
    dtype = _DTYPES.get(entry.dtype)
    spec = lazy.TensorSpec((stop - begin,), np.dtype(np.uint8))
    if dtype is not None:
      spec = lazy.TensorSpec(shape, dtype)
    if not lazy.numpy_holds(spec.shape, spec.dtype):
      raise errors.CheckpointError(
        f'{where}: {name} has shape {errors.cut(str(shape))}'
      )
    if begin != end or stop < begin or spec.nbytes != stop - begin:
      raise errors.CheckpointError(f'{where}: {name} has wrong offsets')
    found[name] = Place(entry.dtype, len(header) + begin, spec)
    end = stop
  if size not in (None, len(header) + end):
    raise errors.CheckpointError(f'{where}: the tensors do not fill the file')
  return {name: found[name] for name in entries}


def _parse(header: bytes, where: str) -> dict[str, Any]:
  """Returns the values of a header, see `read_header`."""
  if header[:8] != struct.pack('<Q', len(header) - 8):
    raise errors.CheckpointError(f'{where}: header: its length is wrong')
  content = header[8:]
  return attributes.parse_object(content, f'{where}: header', most=_MOST_HEADER)


def to_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
  """Returns the content of a file with these tensors.

  Raises:
    CheckpointError: if safetensors does not support a dtype.
  """
  specs = {name: lazy.TensorSpec(x.shape, x.dtype) for name, x in tensors.items()}
  file = layout(indices.WEIGHTS, specs)
  parts = [np.ascontiguousarray(tensors[name]).tobytes() for name in file.places]
  return b''.join([file.header, *parts])


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
  names = [indices.WEIGHTS]
  if len(groups) > 1:
    names = outputs.numbered('model', '.safetensors', len(groups))
  return {
    file: {name: specs[name] for name in group}
    for file, group in zip(names, groups, strict=True)
  }


def layout(name: str, specs: Specs) -> staging.WeightsFile:
  """Returns the layout of a file, whose header has Hugging Face's metadata.

  Raises:
    CheckpointError: if safetensors does not support a dtype.
  """
  codes = {dtype: code for code, dtype in _DTYPES.items()}
  for tensor, spec in specs.items():
    if spec.dtype not in codes:
      raise errors.CheckpointError(
        f'{tensor}: safetensors files do not support {spec.dtype}'
      )
  # If tensors of wider dtypes come first, every tensor is aligned.
  order = sorted(specs, key=lambda x: (-specs[x].dtype.itemsize, x))
  header: dict[str, Any] = {_METADATA: _WRITTEN}
  offsets, end = {}, 0
  for tensor in order:
    spec, begin = specs[tensor], end
    offsets[tensor], end = begin, begin + spec.nbytes
    entry = _Entry(codes[spec.dtype], spec.shape, (begin, end))
    header[tensor] = schema.dump(entry)
  encoded = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
  encoded += b' ' * (-len(encoded) % 8)
  encoded = struct.pack('<Q', len(encoded)) + encoded
  start = len(encoded)
  offsets = {tensor: start + offset for tensor, offset in offsets.items()}
  return staging.WeightsFile(name, encoded, offsets, start + end)

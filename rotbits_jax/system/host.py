"""The host: JAX's device and settings, and arrays that NumPy and XLA share."""

from collections.abc import Iterator
import contextlib
import functools
import math
import mmap
import os
import weakref

import jax
import numpy as np

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


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
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

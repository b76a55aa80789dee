"""The host: JAX's device and settings, BLAS, and arrays that NumPy and XLA share."""

from collections.abc import Iterator
import contextlib
import functools
import math
import os

import jax
import numpy as np

_ALIGNMENT = 64  # XLA uses an array without a copy if its address is a multiple of this
_SINGLE = 1 << 18  # products of numbers for which BLAS takes no threads

# After a program frees an array of this size, the C library of Linux keeps what is
# freed for the next arrays. The system's pages cost more time than the work on them.
np.empty(31 << 20, np.uint8)


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


def small_products(
  left: np.ndarray, right: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
  """Returns the product of matrices, computed on this thread.

  The threads of BLAS, which it takes for many numbers, would wait for the coder's.
  """
  (rows, inner), columns = left.shape, right.shape[1]
  out = np.empty((rows, columns), left.dtype) if out is None else out
  half, count = max(rows, inner, columns) // 2, rows * inner * columns
  if count <= _SINGLE or os.environ.get('OPENBLAS_NUM_THREADS') == '1':
    np.matmul(left, right, out=out)
  elif rows >= max(inner, columns):
    for part in (slice(half), slice(half, None)):
      small_products(left[part], right, out[part])
  elif columns >= inner:
    small_products(right.T, left.T, out.T)
  else:
    small_products(left[:, :half], right[:half], out)
    out += small_products(left[:, half:], right[half:])
  return out


def empty(shape: tuple[int, ...], dtype: np.dtype | type | str) -> np.ndarray:
  """Returns an uninitialised array that `jax.device_put` uses without a copy."""
  item = np.dtype(dtype)
  size = math.prod(shape) * item.itemsize
  buffer = np.empty(size + _ALIGNMENT, np.uint8)
  start = -buffer.ctypes.data % _ALIGNMENT
  return buffer[start : start + size].view(item).reshape(shape)


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

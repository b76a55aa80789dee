"""The host as a JAX device, JAX's settings, and arrays that NumPy and XLA share."""

from collections.abc import Iterator
import contextlib
import functools
import math
import os

import jax
import numpy as np

_ALIGNMENT = 64  # XLA uses an array without a copy if its address is a multiple of this


@functools.cache
def device() -> jax.Device | None:
  """Returns the CPU; None if JAX was configured without it.

  JAX takes None as the default device.
  """
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:
    return None


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
  """Gives JAX the settings that this package is written for, in this thread.

  Users set others for their own programs. Functions are always compiled, because the
  loops of the coder would take hours without; weights may have NaNs; and NumPy arrays
  go to programs as they are.
  """
  with (
    jax.enable_x64(False),
    jax.numpy_rank_promotion('allow'),
    jax.numpy_dtype_promotion('standard'),
    jax.transfer_guard('allow'),
    jax.debug_nans(False),
    jax.debug_infs(False),
    jax.disable_jit(False),
  ):
    yield


def lapack_is_serial() -> bool:
  """Returns whether LAPACK uses one thread on the CPU, so that calls can be parallel.

  The threads of OpenBLAS wait for each other in loops. Of two cores of which others use
  one, they make a small decomposition many times slower.
  """
  return blas_is_serial() and jax.default_backend() == 'cpu'


def blas_is_serial() -> bool:
  """Returns whether the products of NumPy use one thread."""
  return os.environ.get('OPENBLAS_NUM_THREADS') == '1'


def empty(shape: tuple[int, ...], dtype: np.dtype | type | str) -> np.ndarray:
  """Returns an uninitialised array that `jax.device_put` uses without a copy.

  Args:
    shape: shape of the array.
    dtype: dtype of the array.

  Returns:
    The array, contiguous.
  """
  kind = np.dtype(dtype)
  size = math.prod(shape) * kind.itemsize
  buffer = np.empty(size + _ALIGNMENT, np.uint8)
  start = -buffer.ctypes.data % _ALIGNMENT
  return buffer[start : start + size].view(kind).reshape(shape)


def contiguous(array: np.ndarray) -> np.ndarray:
  """Returns the array in C order: the array itself if it is, else a copy."""
  if array.flags.c_contiguous:
    return array
  if array.ndim > 1 and array.dtype.itemsize <= 4:
    # JAX transposes small elements many times faster than NumPy does.
    return np.asarray(jax.device_put(array, device())).reshape(array.shape)
  return np.ascontiguousarray(array)

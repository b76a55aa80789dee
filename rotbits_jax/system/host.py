"""The host as a JAX device, and arrays in memory that NumPy and XLA share."""

import functools
import math

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

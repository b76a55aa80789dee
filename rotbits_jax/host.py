"""The host as a JAX device, and memory that NumPy and XLA share there."""

import functools
import math

import jax
import numpy as np

_ALIGNMENT = 64  # of the addresses that XLA takes without a copy


@functools.cache
def device() -> jax.Device | None:
  """Returns JAX's CPU; None, the default device, if JAX was told not to use the CPU."""
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:
    return None


def empty(shape: tuple[int, ...], dtype: np.dtype | type | str) -> np.ndarray:
  """Returns an uninitialised array that `jax.device_put` takes without a copy.

  Args:
    shape: of the array.
    dtype: of the array.

  Returns:
    The array, contiguous.
  """
  kind = np.dtype(dtype)
  size = math.prod(shape) * kind.itemsize
  buffer = np.empty(size + _ALIGNMENT, np.uint8)
  start = -buffer.ctypes.data % _ALIGNMENT
  return buffer[start : start + size].view(kind).reshape(shape)

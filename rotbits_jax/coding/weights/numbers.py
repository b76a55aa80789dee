"""Preparation of arrays for the coder: contiguous bit patterns, squares, alignment."""

import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax.system import host

_CHUNK = 1 << 18
_SHORT = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def contiguous(array: np.ndarray) -> np.ndarray:
  """Returns the array in C order: the array itself if it is, else a copy."""
  if array.flags.c_contiguous:
    return array
  if array.ndim > 1 and array.dtype.itemsize <= 4:
    # JAX transposes small numbers many times faster than NumPy does.
    return np.asarray(jax.device_put(array)).reshape(array.shape)
  return np.ascontiguousarray(array)


def bits(array: np.ndarray) -> np.ndarray:
  """Returns the bit patterns of a contiguous array: a view, unsigned integers `[n]`."""
  return array.reshape(-1).view(f'u{array.dtype.itemsize}')


def squares(matrix: np.ndarray) -> np.ndarray:
  """Returns the squares of numbers: float32 for float16, and float64 for other dtypes.

  The squares of float16 numbers do not overflow in float32.
  """
  if matrix.dtype == np.float16:
    wide = _widen(matrix)
    return np.multiply(wide, wide, out=wide)
  with np.errstate(invalid='ignore', over='ignore'):
    wide = _widen(matrix) if matrix.dtype in _SHORT else matrix
    return np.square(wide, dtype=np.float64)


def aligned(count: int, dtype: np.dtype | type) -> np.ndarray:
  """Returns zeros `[count]` at an address that XLA uses without a copy."""
  array = host.empty((count,), dtype)
  array[...] = 0
  return array


def _widen(matrix: np.ndarray) -> np.ndarray:
  """Converts to float32 with JAX, because NumPy is slow at it."""
  flat, wide = matrix.reshape(-1), np.empty(matrix.size, np.float32)
  staging = _staging(flat.dtype)
  for start in range(0, flat.size, _CHUNK):
    chunk = flat[start : start + _CHUNK]
    staging[: chunk.size] = chunk
    wide[start : start + _CHUNK] = np.asarray(_float32(staging))[: chunk.size]
  return wide.reshape(matrix.shape)


_local = threading.local()


def _staging(dtype: np.dtype) -> np.ndarray:
  """Returns this thread's buffer of `_CHUNK` numbers."""
  buffers = _local.__dict__.setdefault('buffers', {})
  if dtype not in buffers:
    buffers[dtype] = aligned(_CHUNK, np.uint16).view(dtype)
  return buffers[dtype]


@jax.jit
def _float32(values: jax.Array) -> jax.Array:
  return values.astype(jnp.float32)

"""The bits of floats as signed integers, and their exponents."""

import ml_dtypes
import numpy as np

MANTISSA_BITS = {
  np.dtype(np.float16): 10,
  np.dtype(ml_dtypes.bfloat16): 7,
  np.dtype(np.float32): 23,
  np.dtype(ml_dtypes.float8_e4m3fn): 3,
  np.dtype(ml_dtypes.float8_e5m2): 2,
}
"""The bits of the mantissa of floats that are coded relative to known ones."""


def bits_of(array: np.ndarray) -> np.ndarray:
  """Returns the bits of an array in C order, `[n]`."""
  return np.ascontiguousarray(array).reshape(-1).view(f'i{array.dtype.itemsize}')


def is_finite(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns whether the bits of floats are those of finite numbers."""
  infinite = np.array(np.inf, dtype).view(bits.dtype)
  return bits & np.iinfo(bits.dtype).max < infinite


def exponents(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns the exponents in the bits of floats, at least 1, int16; 0 for others."""
  mantissa = MANTISSA_BITS.get(dtype)
  if mantissa is None:
    return np.zeros(bits.shape, np.int16)
  magnitudes = bits & np.iinfo(bits.dtype).max
  return np.maximum(magnitudes >> mantissa, 1).astype(np.int16, copy=False)

"""Floats as integers: their ULP indices, differences of these, and their bits.

ULP indices count the numbers of a floating-point dtype upwards. The index of 0 is 0 and
that of -0 is -1. Neighbouring numbers have neighbouring indices, so a difference of
indices counts units in the last place. Bits are signed integers.
"""

import ml_dtypes
import numpy as np

MANTISSA_BITS = {
  np.dtype(np.float16): 10,
  np.dtype(ml_dtypes.bfloat16): 7,
  np.dtype(np.float32): 23,
  np.dtype(ml_dtypes.float8_e4m3fn): 3,
  np.dtype(ml_dtypes.float8_e5m2): 2,
}
"""The bits of the mantissa of the floats that have a level, see `difference`."""


def bits_of(array: np.ndarray) -> np.ndarray:
  """Returns the bits of an array in C order, `[n]`."""
  return np.ascontiguousarray(array).reshape(-1).view(f'i{array.dtype.itemsize}')


def differences(bits: np.ndarray, known: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns the differences of elements from known ones, both given by their bits.

  Those of floats are in ULPs and count away from zero, so a weight that decays has
  the same ones on both sides of zero.
  """
  if dtype.kind in 'iub':
    return bits - known
  sign = known & np.iinfo(known.dtype).min
  return _flipped(bits ^ sign) - (known ^ sign)


def moved(known: np.ndarray, off: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns the bits of elements: the inverse of `differences`."""
  if dtype.kind in 'iub':
    return known + off
  sign = known & np.iinfo(known.dtype).min
  return _flipped(off + (known ^ sign)) ^ sign


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


def _flipped(bits: np.ndarray) -> np.ndarray:
  """Returns integers, all bits but the sign of negative ones flipped."""
  # NumPy shifts slowly, and `where` branches.
  negative = (bits < 0).view(np.int8).astype(bits.dtype)
  negative *= np.iinfo(bits.dtype).max
  negative ^= bits
  return negative

"""Floats as integers: their ULP indices, differences of these, and their bits.

ULP indices count the numbers of a floating-point dtype upwards. The index of 0 is 0 and
that of -0 is -1. Neighbouring numbers have neighbouring indices, so a difference of
indices counts units in the last place.
"""

import ml_dtypes
import numpy as np

MANTISSA_BITS = {
  np.dtype(getattr(ml_dtypes, name, None) or name): bits
  for name, bits in {
    'float16': 10,
    'bfloat16': 7,
    'float32': 23,
    'float8_e4m3fn': 3,
    'float8_e5m2': 2,
  }.items()
}
"""The bits of the mantissa of the floats that have a level, see `difference`."""


def bits_of(array: np.ndarray) -> np.ndarray:
  """Returns the bits of an array in C order, as signed integers `[n]`."""
  return np.ascontiguousarray(array).reshape(-1).view(f'i{array.dtype.itemsize}')


def differences(bits: np.ndarray, known: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns the differences of integers, or those of floats in ULPs.

  Those of floats count away from zero, so that a weight that decays has the same ones
  on both sides of zero.

  Args:
    bits: bits of elements.
    known: bits of the elements from which these differ.
    dtype: their dtype.
  """
  if dtype.kind in 'iub':
    return bits - known
  sign = known & np.iinfo(known.dtype).min
  found = _flipped(bits ^ sign)
  found -= known ^ sign
  return found


def moved(known: np.ndarray, far: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns the bits of elements: the inverse of `differences`."""
  if dtype.kind in 'iub':
    return known + far
  sign = known & np.iinfo(known.dtype).min
  found = _flipped(far + (known ^ sign))
  found ^= sign
  return found


def is_finite(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns whether the bits of floats are those of finite numbers."""
  infinite = np.array(np.inf, dtype).view(bits.dtype)
  return bits & np.iinfo(bits.dtype).max < infinite


def _flipped(bits: np.ndarray) -> np.ndarray:
  """Returns integers, all bits but the sign of negative ones flipped."""
  # NumPy shifts slowly, and `where` branches.
  negative = (bits < 0).view(np.int8).astype(bits.dtype)
  negative *= np.iinfo(bits.dtype).max
  negative ^= bits
  return negative

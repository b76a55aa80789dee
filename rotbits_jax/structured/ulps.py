"""Floats as integers: their ULP indices, differences of these, and their bits.

ULP indices count the numbers of a floating-point dtype upwards. The index of 0 is 0 and
that of -0 is -1. Neighbouring numbers have neighbouring indices, so a difference of
indices counts units in the last place.
"""

from typing import Any

import numpy as np


def index(numbers: np.ndarray) -> np.ndarray:
  """Returns the ULP indices of numbers: signed integers of their width."""
  bits = np.ascontiguousarray(numbers).view(f'i{numbers.dtype.itemsize}')
  return _flipped(bits)


def number(indices: np.ndarray, dtype: Any) -> np.ndarray:
  """Returns the numbers with these ULP indices: the inverse of `index`."""
  return _flipped(indices).view(dtype)


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
  return index(bits ^ sign) - (known ^ sign)


def moved(known: np.ndarray, far: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns the bits of elements: the inverse of `differences`."""
  if dtype.kind in 'iub':
    return known + far
  sign = known & np.iinfo(known.dtype).min
  return number(far + (known ^ sign), known.dtype) ^ sign


def is_finite(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns whether the bits of floats are those of finite numbers."""
  infinite = np.array(np.inf, dtype).view(bits.dtype)
  return bits & np.iinfo(bits.dtype).max < infinite


def _flipped(bits: np.ndarray) -> np.ndarray:
  """Flips all bits but the sign of negative integers."""
  most = np.iinfo(bits.dtype).max
  return bits ^ (bits >> 8 * bits.dtype.itemsize - 1 & most)

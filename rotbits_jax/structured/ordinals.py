"""Ordinals: integers that count the numbers of a floating-point dtype upwards.

The ordinal of 0 is 0 and that of -0 is -1. Neighbouring numbers have neighbouring
ordinals, so a difference of ordinals counts the numbers between two numbers.
"""

from typing import Any

import numpy as np


def of_numbers(numbers: np.ndarray) -> np.ndarray:
  """Returns the ordinals of numbers: signed integers of their width."""
  bits = np.ascontiguousarray(numbers).view(f'i{numbers.dtype.itemsize}')
  return _flipped(bits)


def to_numbers(ordinals: np.ndarray, dtype: Any) -> np.ndarray:
  """Returns the numbers with these ordinals: the inverse of `of_numbers`."""
  return _flipped(ordinals).view(dtype)


def _flipped(bits: np.ndarray) -> np.ndarray:
  """Flips all bits but the sign of negative integers."""
  most = np.iinfo(bits.dtype).max
  return bits ^ (bits >> 8 * bits.dtype.itemsize - 1 & most)

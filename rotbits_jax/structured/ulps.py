"""ULP indices: integers that count the numbers of a floating-point dtype upwards.

The index of 0 is 0 and that of -0 is -1. Neighbouring numbers have neighbouring
indices, so a difference of indices counts units in the last place.
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


def _flipped(bits: np.ndarray) -> np.ndarray:
  """Flips all bits but the sign of negative integers."""
  most = np.iinfo(bits.dtype).max
  return bits ^ (bits >> 8 * bits.dtype.itemsize - 1 & most)

"""Products of matrices that have the same bits on every machine.

They are sums of integers below 2^53, which float64 adds exactly in any order. A number
is rounded to float32 first and then to its dtype, as every machine does it.
"""

import math

import numpy as np


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Returns the product of matrices of integers, float64, without any rounding.

  A product of which float64 may round a sum raises a ValueError.
  """
  # By Cauchy and Schwarz this bounds every partial sum.
  norm = lambda x: math.sqrt(float(np.einsum('ij,ij->i', x, x).max(initial=0)))
  if not norm(left) * norm(right.T) < 2.0**53 * (1 - 1e-6):
    raise ValueError('the numbers of a product are too large')
  return left @ right


def rounded(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns an array in another dtype; numbers too large for it become infinite."""
  with np.errstate(over='ignore'):
    return np.asarray(array).astype(np.float32).astype(dtype)

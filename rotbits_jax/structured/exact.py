"""Products of matrices that have the same bits on every machine, and those of a thread.

The former are sums of integers below 2^53, which float64 adds exactly in any order. A
number is rounded to float32 first and then to its dtype, as every machine does it.
"""

import math

import numpy as np

from rotbits_jax.system import host

_SINGLE = 1 << 18  # products of numbers for which BLAS takes no threads


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Returns the product of matrices of integers, float64, without any rounding.

  A product of which float64 may round a sum raises a ValueError.
  """
  # By Cauchy and Schwarz this bounds every partial sum.
  norm = lambda x: math.sqrt(float(np.einsum('ij,ij->i', x, x).max(initial=0)))
  if not norm(left) * norm(right.T) < 2.0**53 * (1 - 1e-6):
    raise ValueError('the numbers of a product are too large')
  return left @ right


def times(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
  """Returns `rows @ columns.T`, `[n, d]`, of vectors `[n, D]` and `[d, D]`."""
  (left, powers), (right, others) = map(integers, (rows, columns))
  return np.ldexp(product(left, right.T), -powers - others.T)


def integers(
  rows: np.ndarray, bits: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns rows `[n, D]` times powers of two as integers of so many bits, and powers.

  By default, their norms are at most 2^26. Numbers must be finite.
  """
  most = np.abs(rows).max(axis=1, initial=0, keepdims=True)
  if not np.isfinite(most).all():
    raise ValueError('a product needs finite numbers, got some that are not finite')
  bits = 26 - (rows.shape[1].bit_length() + 1) // 2 if bits is None else bits
  powers = bits - np.frexp(most)[1].astype(np.int32)
  return np.rint(np.ldexp(rows, powers)), powers


def rounded(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns an array in another dtype; numbers too large for it become infinite."""
  with np.errstate(over='ignore'):
    return np.asarray(array).astype(np.float32).astype(dtype)


def small_products(
  left: np.ndarray, right: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
  """Returns the product of matrices, computed on this thread.

  The threads of BLAS, which it takes for many numbers, would wait for the coder's.
  """
  (rows, inner), columns = left.shape, right.shape[1]
  out = np.empty((rows, columns), left.dtype) if out is None else out
  half, count = max(rows, inner, columns) // 2, rows * inner * columns
  if count <= _SINGLE or host.is_blas_single():
    np.matmul(left, right, out=out)
  elif rows >= max(inner, columns):
    for part in (slice(half), slice(half, None)):
      small_products(left[part], right, out[part])
  elif columns >= inner:
    small_products(right.T, left.T, out.T)
  else:
    small_products(left[:, :half], right[:half], out)
    out += small_products(left[:, half:], right[half:])
  return out

"""Tells rounding errors from changes that are as small.

A tensor of a sliced model is a product made of its base, see `recipe`, up to rounding
errors, which need not be stored. These are small, and independent of each other. What a
training adds may be as small, but few directions have most of it, or few rows.
"""

import numpy as np

from rotbits_jax.relative import factors
from rotbits_jax.structured import exact

_MOST_LINE, _MORE_IN_SHORT = 4, 8  # roundoffs of a row or column, and for one number
_SIGNS = 64  # vectors of random signs that tell whether errors are independent
_MOST_COHERENT = 1.5  # over what independent errors have; SliceGPT's have up to 1.1
_PART = 1 << 22  # numbers that are compared at once
_SMALL = 0.3, 1 / 32  # shares of median norms that small columns and rows count as


def explain(target: np.ndarray, product: np.ndarray, limit: float) -> bool:
  """Returns whether rounding errors explain how a tensor differs from a product.

  Both are rounded, `[R, C]` or `[C]`. C is a length of the residual stream, of which
  some dimensions may have nothing but errors. The limit is the greatest relative error
  in the Frobenius norm. That of a row or column may be four times as large.
  """
  target, product = map(np.atleast_2d, (target, product))
  step = max(_PART // max(target.shape[1], 1), 1)
  parts = (slice(i, i + step) for i in range(0, len(target), step))
  return all(_explain_part(target[x], product[x], limit) for x in parts)


@np.errstate(invalid='ignore', over='ignore')
def _explain_part(target: np.ndarray, product: np.ndarray, limit: float) -> bool:
  """Does it for some rows `[R, C]`."""
  target, product = target.astype(np.float64), product.astype(np.float64)
  errors, squares = np.square(target - product), np.square(target)
  if not errors.sum() <= limit**2 * squares.sum() < np.inf:
    return False
  for axis, least in enumerate(_SMALL):
    sizes = squares.mean(axis)
    sizes = np.maximum(sizes, least**2 * np.median(sizes))
    most = limit * (_MOST_LINE + _MORE_IN_SHORT / np.sqrt(target.shape[axis]))
    if not (errors.mean(axis) <= most**2 * sizes).all():
      return False
  sizes = np.sqrt(np.where(sizes > 0, sizes, 1))[:, None]  # rows of all sizes count
  return _are_independent((target - product) / sizes)


def _are_independent(errors: np.ndarray) -> bool:
  """Returns whether errors E `[R, C]` of any sizes are independent of each other.

  Then `|E^T E|^2` is on average the sum of the squares of `sum_j E_ij^2` for all i and
  of `sum_i E_ij^2` for all j, less that of `E_ij^4`. A change in few directions adds to
  it. It is estimated with random signs (Hutchinson).
  """
  tall = errors if len(errors) >= errors.shape[1] else errors.T
  squares = np.square(tall)
  expected = sum(float(np.square(squares.sum(axis)).sum()) for axis in (0, 1))
  signs = factors.random_signs(tall.shape[1], _SIGNS).astype(np.float64)
  images = exact.small_products(tall.T, exact.small_products(tall, signs))
  energy = float(np.square(images).sum()) / _SIGNS
  return energy <= _MOST_COHERENT * (expected - float(np.square(squares).sum()))

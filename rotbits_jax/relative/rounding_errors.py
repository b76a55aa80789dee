"""Tells rounding errors from changes that are as small.

A tensor of a sliced model is a product made of its base, see `recipe`, up to rounding
errors, which need not be stored. These are small, and independent of each other and of
the numbers. What a training adds may be as small, but few directions have most of it,
or it scales rows, columns or the whole tensor.

Shape letters: R rows and C columns.
"""

import math

import numpy as np

from rotbits_jax.relative import factors
from rotbits_jax.system import host

_MOST_WHOLE = 1.5  # roundoffs of a tensor whose rows and columns count alike
_MOST_LINE, _MOST_ELEMENT = 4, 12  # roundoffs of a row or column, and of a number
_MOST_RELATED = 0.05  # share of the errors that factors of rows or columns explain
_SIGNS = 64  # vectors of random signs that tell whether errors are independent
_MOST_COHERENT = 1.5  # over what independent errors have; SliceGPT's have up to 1.1
_PART = 1 << 22  # numbers that are compared at once
_SMALL = (
  0.3,
  1 / 32,
)  # shares of the median norms that smaller columns and rows count as


def explain(target: np.ndarray, product: np.ndarray, limit: float) -> bool:
  """Returns whether rounding errors explain how a tensor differs from a product.

  Args:
    target: the tensor, rounded: `[R, C]`, or `[C]`. C is a length of the residual
      stream, of which some dimensions may have nothing but errors.
    product: the product, rounded.
    limit: the greatest relative error in the Frobenius norm. That of a row or column
      may be four times as large.
  """
  target, product = map(np.atleast_2d, (target, product))
  step = max(-(-len(target) // max(-(-target.size // _PART), 1)), 1)
  parts = [slice(i, i + step) for i in range(0, len(target), step)]
  wide = lambda x: x.astype(np.float32)
  return all(_explain_part(wide(target[x]), wide(product[x]), limit) for x in parts)


def _explain_part(target: np.ndarray, product: np.ndarray, limit: float) -> bool:
  """Does it for some rows, float32 `[R, C]`."""
  scale = np.float32(np.abs(target).max(initial=0))
  if not scale or not np.isfinite(scale):
    return bool(np.isfinite(scale)) and not product.any()
  errors, target = (target - product) / scale, target / scale
  if not float(np.square(errors).sum()) <= limit**2 * float(np.square(target).sum()):
    return False
  # Rows of all sizes count alike, and so do columns.
  for axis in (1, 0):
    if target.shape[axis] > 1:
      sizes = np.sqrt(np.square(target).mean(axis, keepdims=True))
      sizes = np.maximum(sizes, _SMALL[axis] * np.median(sizes))
      sizes[sizes == 0] = 1
      errors, target = errors / sizes, target / sizes
  squares, mean = np.square(errors), float(np.square(target).mean())
  roundoffs = lambda square: math.sqrt(float(square) / mean) / limit
  lines = _MOST_LINE + (_MOST_ELEMENT - _MOST_LINE) / np.sqrt(squares.shape)
  # Large numbers have large errors.
  elements = limit * (_MOST_ELEMENT * math.sqrt(mean) + 2 * np.abs(target))
  return (
    roundoffs(squares.mean()) <= _MOST_WHOLE
    and all(roundoffs(squares.mean(i).max()) <= lines[i] for i in (0, 1))
    and bool((np.abs(errors) <= elements).all())
    and all(_are_unrelated(errors, target, axis) for axis in (0, 1))
    and _are_independent(errors)
  )


def _are_unrelated(errors: np.ndarray, target: np.ndarray, axis: int) -> bool:
  """Returns whether factors of rows or columns, as decay has, explain few errors."""
  along, sizes = errors * target, np.maximum(np.square(target).sum(axis), 1e-30)
  explained = float((np.square(along.sum(axis)) / sizes).sum())
  by_chance = float((np.square(along).sum(axis) / sizes).sum())
  return explained <= 4 * by_chance + _MOST_RELATED * float(np.square(errors).sum())


def _are_independent(errors: np.ndarray) -> bool:
  """Returns whether errors `[R, C]` of any sizes are independent of each other.

  If they are, and have the mean 0, the sum of the fourth powers of the singular values
  of the matrix E is, on average, that of the squares of `sum_j E_ij^2` for all i and of
  `sum_i E_ij^2` for all j, less that of `E_ij^4`. A change in few directions adds the
  fourth powers of its own singular values. The first sum is `|E^T E|^2`, estimated with
  random signs (Hutchinson).
  """
  tall = errors if len(errors) >= errors.shape[1] else errors.T
  tall = tall / (np.abs(errors).max() or 1)
  squares = np.square(tall)
  sums = [squares.sum(axis, dtype=np.float64) for axis in (0, 1)]
  expected = sum(float(x @ x) for x in sums) - float(np.square(squares).sum())
  signs = factors.random_signs(tall.shape[1], _SIGNS)
  images = host.small_products(tall.T, host.small_products(tall, signs))
  energy = float(np.square(images, dtype=np.float64).sum()) / _SIGNS
  return energy <= _MOST_COHERENT * expected

"""Tells rounding errors from changes that are as small.

A tensor of a sliced model is a product made of its base, see `fit`, up to
rounding errors, which need not be stored. These are small, and independent of each
other and of the numbers. What a training adds may be as small, but few directions have
most of it, or it scales rows, columns or the whole tensor.

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
_SMALL = 0.3  # share of the median norm of lines that smaller ones count as
_BESIDE = 0.1  # share of the norm of the base's vector that a smaller row counts as


def explain(
  target: np.ndarray, made: np.ndarray, limit: float, norms: np.ndarray | None = None
) -> bool:
  """Returns whether rounding errors explain how a tensor differs from a product.

  Args:
    target: the tensor, rounded: `[R, C]`, or `[C]`.
    made: the product, rounded.
    limit: the greatest relative error in the Frobenius norm. Where a row lies mostly
      beside the subspace, its error may be four times as large.
    norms: those of the vectors of the base whose products are the rows, `[R]`, if so.
  """
  given, found = map(np.atleast_2d, (target, made))
  parts = max(-(-given.size // _PART), 1)
  step = max(-(-len(given) // parts), 1)
  return all(
    _explain_part(
      given[rows].astype(np.float32),
      found[rows].astype(np.float32),
      limit,
      None if norms is None else norms[rows],
    )
    for rows in (slice(i, i + step) for i in range(0, len(given), step))
  )


def _explain_part(
  given: np.ndarray, found: np.ndarray, limit: float, norms: np.ndarray | None
) -> bool:
  """Does it for some rows: float32 `[R, C]`."""
  scale = np.float32(np.abs(given).max(initial=0))
  if not scale:
    return not found.any()
  if not np.isfinite(scale):
    return False
  errors, given = (given - found) / scale, given / scale
  if not float(np.square(errors).sum()) <= limit**2 * float(np.square(given).sum()):
    return False
  if not errors.any():
    return True
  # Rows of all sizes count alike, and so do columns.
  for axis in (1, 0):
    if given.shape[axis] > 1:
      sizes = np.sqrt(np.square(given).mean(axis, keepdims=True))
      least = _SMALL * (np.median(sizes) or sizes.max())
      if norms is not None and axis == 1:
        least = _BESIDE * norms[:, None] / (float(scale) * math.sqrt(given.shape[1]))
      sizes = np.maximum(sizes, least).astype(np.float32)
      sizes[sizes == 0] = 1
      errors, given = errors / sizes, given / sizes
  off, mean = np.square(errors), float(np.square(given).mean())
  greatest = [(float(off.mean()), _MOST_WHOLE)]
  for axis, length in enumerate(off.shape):
    most = _MOST_LINE + (_MOST_ELEMENT - _MOST_LINE) / math.sqrt(length)
    greatest.append((float(off.mean(axis).max()), most))
  # Large numbers have large errors.
  elements = limit * (_MOST_ELEMENT * math.sqrt(mean) + 2 * np.abs(given))
  return (
    all(own <= (most * limit) ** 2 * mean for own, most in greatest)
    and bool((np.abs(errors) <= elements).all())
    and (_are_random(errors, given) or _are_random(*_distinct(found, errors, given)))
  )


def _distinct(found: np.ndarray, *matrices: np.ndarray) -> list[np.ndarray]:
  """Returns matrices without rows and columns in which the product repeats others."""
  both = [found, *matrices]
  for _ in range(2):
    both = [np.ascontiguousarray(x.T) for x in both]
    lines = both[0].view(np.dtype((np.void, both[0][0].nbytes))).reshape(-1)
    kept = np.unique(lines, return_index=True)[1]
    both = [x[kept] for x in both]
  return both[1:]


def _are_random(errors: np.ndarray, given: np.ndarray) -> bool:
  return _are_unrelated(errors, given) and _are_independent(errors)


def _are_unrelated(errors: np.ndarray, given: np.ndarray) -> bool:
  """Returns whether factors of the whole, of rows and of columns explain few errors.

  Weight decay and learned scales are such factors.
  """
  along, sizes = errors * given, np.square(given)
  total, both = float(np.square(errors).sum()), np.square(along)
  for axis in (None, 0, 1):
    size = np.maximum(sizes.sum(axis), 1e-30)
    explained = float((np.square(along.sum(axis)) / size).sum())
    by_chance = float((both.sum(axis) / size).sum())
    if explained > 4 * by_chance + _MOST_RELATED * total:
      return False
  return True


def _are_independent(errors: np.ndarray) -> bool:
  """Returns whether errors `[R, C]` of any sizes are independent of each other.

  If they are, and have the mean 0, the sum of the fourth powers of the singular values
  of the matrix E is, on average, that of the squares of `sum_j E_ij^2` for all i and of
  `sum_i E_ij^2` for all j, less that of `E_ij^4`. A change in few directions adds the
  fourth powers of its own singular values. The first sum is `|E^T E|^2`, estimated with
  random signs (Hutchinson).
  """
  tall = errors if len(errors) >= errors.shape[1] else errors.T
  tall = tall / np.abs(errors).max()
  squares = np.square(tall)
  sums = [squares.sum(axis, dtype=np.float64) for axis in (0, 1)]
  expected = sum(float(x @ x) for x in sums) - float(np.square(squares).sum())
  signs = factors.random_signs(tall.shape[1], _SIGNS)
  turned = host.small_products(tall.T, host.small_products(tall, signs))
  found = float(np.square(turned, dtype=np.float64).sum()) / _SIGNS
  return found <= _MOST_COHERENT * expected

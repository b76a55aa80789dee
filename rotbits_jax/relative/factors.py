"""Finds a product of two small matrices that predicts differences from a base.

Many fine-tunes are the base plus such a product, or nearly so. A few rows tell whether
there is one: half of them a basis, and the others whether it saves anything. Shape
letters: R rows, C columns, k the rank.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import pool
from rotbits_jax.structured import ulps
from rotbits_jax.system import host

_LEAST = 64  # rows and columns of a matrix for which factors are tried
_RANK = 64  # the greatest that is tried
_SKETCHED = 1 << 10  # rows that tell the basis, and whether factors are worth it
_TYPICAL = 1 << 12  # elements that tell the rounding error of the dtype
_PART = 1 << 17  # elements whose differences fit a cache
_MORE = 8  # columns of a sketch beyond the rank
_FINER = 5  # the differences that are left, over the error of rounded factors
_MOST = (1 << 15) - 1


class Factors(NamedTuple):
  """A product that predicts differences, see `structured.difference`.

  Attributes:
    left: int16 `[R, k]`.
    right: int16 `[k, C]`.
    unit: the exponent of the power of two that is the unit of the product.
  """

  left: np.ndarray
  right: np.ndarray
  unit: int


def find(bits: np.ndarray, base: np.ndarray, dtype: np.dtype) -> Factors | None:
  """Finds factors.

  Args:
    bits: bits of the array, `[R, C]`, see `ulps.bits_of`.
    base: bits of its base, `[R, C]`.
    dtype: their dtype.

  Returns:
    The factors; None if none save more than they take.
  """
  mantissa = ulps.MANTISSA_BITS.get(dtype) if dtype.itemsize > 1 else None
  if mantissa is None or min(bits.shape) < _LEAST:
    return None
  with np.errstate(all='ignore'):
    typical = base.reshape(-1)[:: -(-base.size // _TYPICAL)]
    sizes = np.abs(widened(typical, dtype))
  sizes = sizes[np.isfinite(sizes)]
  if not sizes.size:
    return None
  # The rounding error of the dtype, at most numbers.
  least = float(np.median(sizes)) * 2.0 ** -(mantissa + 2)
  some = slice(None, None, -(-len(bits) // _SKETCHED))
  far = floats(bits[some], base[some], dtype)
  scale = float(np.abs(far).max(initial=0))
  if not 1e-30 < scale < 1e30:
    return None
  least /= scale
  far /= np.float32(scale)
  # Half of the rows are a basis, and the others tell whether it saves anything.
  basis = _basis(far[::2])
  if _product(*_projected(far[1::2], basis), basis, least, len(bits)) is None:
    return None
  basis = _basis(far)

  def job(rows: slice) -> tuple[np.ndarray, float]:
    part = floats(bits[rows], base[rows], dtype)
    part /= np.float32(scale)
    return _projected(part, basis)

  step = max(_PART // bits.shape[1], 1)
  parts = [slice(i, i + step) for i in range(0, len(bits), step)]
  tall, totals = zip(*pool.each(job, parts), strict=True)
  product = _product(np.concatenate(tall), sum(totals), basis, least, len(bits))
  if product is None:
    return None
  left, right, finest = product
  # The unit is a power of two, and so is its root.
  exponent = math.floor(math.log2(finest * math.sqrt(scale)))
  root = math.sqrt(scale) * 2.0**-exponent
  rounded = lambda x: np.rint(x * root).clip(-_MOST, _MOST).astype(np.int16)
  return Factors(rounded(left), rounded(right), 2 * exponent)


class _Product(NamedTuple):
  """Factors `[R, k]` and `[k, C]`, and the step to which they are rounded."""

  left: np.ndarray
  right: np.ndarray
  step: float


def _projected(far: np.ndarray, basis: np.ndarray) -> tuple[np.ndarray, float]:
  """Returns rows of differences times a basis, and the sum of the rows' squares."""
  with np.errstate(over='ignore', invalid='ignore'):
    squares = np.einsum('rc,rc->r', far, far)
    tall = host.small_products(far, basis)
  return tall, float(squares.sum(dtype=np.float64))


def _basis(far: np.ndarray) -> np.ndarray:
  """Returns an orthonormal basis `[C, k]` of most of the rows of differences."""
  width = min(_RANK + _MORE, min(far.shape) // 2)
  sketch = host.small_products(far, random_signs(far.shape[1], width))
  rows = host.small_products(far.T, sketch).astype(np.float64)
  energies, turn = np.linalg.eigh(host.small_products(rows.T, rows))
  turn /= np.sqrt(np.maximum(energies, 1e-12 * energies[-1] + 1e-300))
  return host.small_products(rows, turn).astype(np.float32)


def _product(
  tall: np.ndarray, total: float, basis: np.ndarray, least: float, rows: int
) -> _Product | None:
  """Finds the product of a rank that saves most.

  Args:
    tall: some rows of differences times the basis, `[r, k]`.
    total: the sum of the squares of these rows.
    basis: `[C, k]`.
    least: root mean square that no product removes.
    rows: the rows of the whole matrix.

  Returns:
    The product; None if none saves more than it takes, or if the differences of some
    rows are far too large.
  """
  with np.errstate(over='ignore', invalid='ignore'):
    squares = host.small_products(tall.T, tall).astype(np.float64)
  if not (np.isfinite(squares).all() and math.isfinite(total)):
    return None
  shape = len(tall), len(basis)
  size = shape[0] * shape[1]
  energies, turn = np.linalg.eigh(squares)
  energies, turn = energies[::-1].clip(0), turn[:, ::-1]
  rest = np.maximum(total - np.cumsum(energies), 0) / size + least**2
  ranks = np.arange(1, len(energies) + 1)
  # Both factors have the same mean squares, and are rounded to the same step.
  roots = np.sqrt(np.maximum(energies, 1e-30))
  square = np.cumsum(roots) * (1 / shape[0] + 1 / shape[1])
  steps = np.sqrt(12 * rest / np.maximum(square, 1e-30)) / _FINER
  with np.errstate(divide='ignore', invalid='ignore'):  # NaN where there is no rest
    numbers = np.log2(1 + np.sqrt(np.cumsum(roots) / ranks / min(shape)) / steps) + 2
    saved = np.log2((total / size + least**2) / rest) / 2 * rows * shape[1]
    saved -= numbers * ranks * (rows + shape[1])
  best = int(np.argmax(saved[:_RANK]))
  if not saved[best] > 0:  # also if it is NaN
    return None
  turned = turn[:, : best + 1]
  halves = np.sqrt(roots[: best + 1])
  left = host.small_products(tall, turned.astype(np.float32)) / halves
  right = halves[:, None] * host.small_products(basis, turned.astype(np.float32)).T
  largest = max(float(np.abs(x).max()) for x in (left, right))
  return _Product(left, right, max(float(steps[best]), 2 * largest / _MOST))


@functools.lru_cache(4)
def random_signs(rows: int, columns: int) -> np.ndarray:
  """Returns a matrix of 1 and -1, float32, that is the same each time."""
  signs = np.random.default_rng(0).integers(0, 2, (rows, columns), np.int8)
  return (2 * signs - 1).astype(np.float32)


def floats(bits: np.ndarray, known: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns the differences, float32; 0 for those not finite."""
  with np.errstate(all='ignore'):
    if dtype not in ulps.MANTISSA_BITS:
      return (bits - known).astype(np.float32)
    far = widened(bits, dtype)
    far -= widened(known, dtype)
    ends = far.max(initial=0), far.min(initial=0)
    if not np.isfinite(ends).all():
      far[~np.isfinite(far)] = 0
  return far


def widened(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns floats, given by their bits, as float32."""
  if ulps.MANTISSA_BITS.get(dtype) == 7:  # bfloat16, which NumPy converts slowly
    return (bits.astype(np.int32) << 16).view(np.float32)
  return np.ascontiguousarray(bits).view(dtype).astype(np.float32)

"""Finds a product of two small matrices that predicts differences from a base.

Many fine-tunes are the base plus such a product, or nearly so. A few rows tell whether
there is one: half of them a basis, and the others whether it saves anything. Shape
letters: R rows, C columns, k the rank.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from rotbits_jax.structured import difference
from rotbits_jax.structured import ulps
from rotbits_jax.system import host

_LEAST = 64  # rows and columns of a matrix for which factors are tried
_RANKS = (16, 64)  # the greatest rank that is tried first, and then
_SKETCHED = 1 << 5  # rows for each rank that tell whether factors are worth it
_BASIS = 1 << 10  # rows that tell the basis
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


def find(
  bits: np.ndarray, base: np.ndarray, dtype: np.dtype, run: difference.Run
) -> Factors | None:
  """Finds factors.

  Args:
    bits: bits of the array, `[R, C]`, see `ulps.bits_of`.
    base: bits of its base, `[R, C]`.
    dtype: their dtype.
    run: runs jobs for some rows.

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
  far, scale = np.zeros((0, bits.shape[1]), np.float32), 1.0
  for most in _RANKS:
    some = slice(None, None, -(-len(bits) // (_SKETCHED * most)))
    if len(far) < len(bits):
      far = floats(bits[some], base[some], dtype)
      scale = float(np.abs(far).max(initial=0))
      if not 1e-30 < scale < 1e30:
        return None
      far /= np.float32(scale)
    basis = _basis(far[::2], most)
    projected = _Projected.of(far[1::2], basis)
    found = _product(projected, basis, most, least / scale, len(bits))
    if found is None or len(found.right) < most:
      break
  if found is None:
    return None
  some = slice(None, None, -(-len(bits) // _BASIS))
  if len(far) < len(bits):
    far = floats(bits[some], base[some], dtype)
    far /= np.float32(scale)
  else:
    far = far[some]
  basis = _basis(far, most)

  def job(rows: slice) -> _Projected:
    own = floats(bits[rows], base[rows], dtype)
    own /= np.float32(scale)
    return _Projected.of(own, basis)

  step = max(_PART // bits.shape[1], 1)
  parts = [slice(i, i + step) for i in range(0, len(bits), step)]
  made = run([functools.partial(job, part) for part in parts])
  whole = _Projected(np.concatenate([x.tall for x in made]), sum(x.total for x in made))
  found = _product(whole, basis, most, least / scale, len(bits))
  if found is None:
    return None
  left, right, step = found
  # The unit is a power of two, and so is its root.
  exponent = math.floor(math.log2(step * math.sqrt(scale)))
  root = math.sqrt(scale) * 2.0**-exponent
  rounded = lambda x: np.rint(x * root).clip(-_MOST, _MOST).astype(np.int16)
  return Factors(rounded(left), rounded(right), 2 * exponent)


class _Projected(NamedTuple):
  """Rows of differences, projected onto a basis.

  Attributes:
    tall: their products with the basis, float32 `[r, k]`.
    total: the sum of their squares.
  """

  tall: np.ndarray
  total: float

  @classmethod
  def of(cls, far: np.ndarray, basis: np.ndarray) -> '_Projected':
    with np.errstate(over='ignore', invalid='ignore'):
      squares = np.einsum('rc,rc->r', far, far)
      tall = host.small_products(far, basis)
    return cls(tall, float(squares.sum(dtype=np.float64)))


class _Product(NamedTuple):
  """Factors `[R, k]` and `[k, C]`, and the step to which they are rounded."""

  left: np.ndarray
  right: np.ndarray
  step: float


def _basis(far: np.ndarray, most: int) -> np.ndarray:
  """Returns an orthonormal basis `[C, k]` of most of the rows of differences."""
  width = min(most + _MORE, min(far.shape) // 2)
  sketch = host.small_products(far, random_signs(far.shape[1], width))
  rows = host.small_products(far.T, sketch).astype(np.float64)
  energies, turn = np.linalg.eigh(host.small_products(rows.T, rows))
  turn /= np.sqrt(np.maximum(energies, 1e-12 * energies[-1] + 1e-300))
  return host.small_products(rows, turn).astype(np.float32)


def _product(
  projected: _Projected, basis: np.ndarray, most: int, least: float, rows: int
) -> _Product | None:
  """Finds the product of a rank that saves most.

  Args:
    projected: of some rows of differences, `[r, C]`.
    basis: of their rows, `[C, k]`.
    most: the greatest rank.
    least: root mean square that no product removes.
    rows: the rows of the whole matrix.

  Returns:
    The product; None if none saves more than it takes, or if the differences of some
    rows are far too large.
  """
  tall, total = projected
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
  best = int(np.argmax(saved[:most]))
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

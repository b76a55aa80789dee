"""Finds a product of two small matrices that predicts differences from a base.

Many fine-tunes are the base plus such a product, or nearly so. Shape letters: R rows, C
columns, k the rank, r some rows.
"""

import functools
import math
from typing import Any

import numpy as np

from rotbits_jax.structured import difference
from rotbits_jax.structured import exact
from rotbits_jax.structured import ulps

_LEAST = 64  # rows and columns of a matrix for which factors are tried
_RANK = 56  # the greatest that is tried
_SKETCHED = 1 << 9  # rows that tell the basis, and whether factors are worth it
_TYPICAL = 1 << 12  # elements that tell the rounding error of the dtype
_MORE = 8  # columns of a sketch beyond the rank
_SMALLEST = 1e-12  # of the squares of a sketch, over all
_FINER = 5  # the differences that are left, over the error of rounded factors
_MOST = (1 << 15) - 1


@np.errstate(all='ignore')
def find(bits: np.ndarray, base: np.ndarray, dtype: np.dtype) -> dict[str, Any]:
  """Finds fields of `structured.difference` for the bits `[R, C]` of two arrays.

  They are `left`, int16 `[R, k]`, `right`, int16 `[k, C]`, and `unit`; or nothing if no
  factors save more than they take.
  """
  if min(bits.shape) < _LEAST:
    return {}
  typical = _widened(base.reshape(-1)[:: -(-base.size // _TYPICAL)], dtype)
  # The rounding error of the dtype, at most numbers.
  least = float(np.median(np.abs(typical))) * 2.0 ** -(ulps.FORMATS[dtype].nmant + 2)
  some = slice(None, None, -(-len(bits) // _SKETCHED))
  off = floats(bits[some], base[some], dtype)
  # Half of the rows give the basis, and the others tell whether it saves anything.
  basis = _basis(off[::2])

  @np.errstate(all='ignore')  # in any thread
  def projected(off: np.ndarray) -> tuple[np.ndarray, float]:
    return exact.small_products(off, basis), float(np.einsum('rc,rc', off, off))

  if _product(*projected(off[1::2]), basis, least, len(bits)) is None:
    return {}
  job = lambda rows: projected(floats(bits[rows], base[rows], dtype))
  parts = difference.in_parts(job, len(bits), bits.shape[1])
  tall, totals = zip(*parts, strict=True)
  product = _product(np.concatenate(tall), sum(totals), basis, least, len(bits))
  if product is None:
    return {}
  exponent = math.floor(math.log2(product[2]))
  left, right = (np.rint(np.ldexp(x, -exponent)).astype(np.int16) for x in product[:2])
  return {'left': left, 'right': right, 'unit': 2 * exponent}


def _product(
  tall: np.ndarray,  # r rows of differences times the basis, [r, k]
  total: float,  # the sum of the squares of these rows
  basis: np.ndarray,  # [C, k]
  least: float,  # root mean square that no product removes
  rows: int,  # R, of the whole matrix
) -> tuple[np.ndarray, np.ndarray, float] | None:
  """Finds the factors `[r, k]`, `[k, C]` that save most, if any, and their step."""
  squares = exact.small_products(tall.T, tall).astype(np.float64)
  if not (np.isfinite(squares).all() and 0 < total < math.inf):
    return None
  (some, _), columns = tall.shape, len(basis)
  energies, vectors = np.linalg.eigh(squares)
  energies, vectors = energies[::-1].clip(0), vectors[:, ::-1]
  left_over = np.maximum(total - np.cumsum(energies), 0) / (some * columns) + least**2
  ranks = np.arange(1, len(energies) + 1)
  # Both factors have the same mean squares, and are rounded to the same step.
  roots = np.cumsum(np.sqrt(energies))
  steps = np.sqrt(12 * left_over / (roots * (1 / some + 1 / columns))) / _FINER
  numbers = np.log2(1 + np.sqrt(roots / ranks / min(some, columns)) / steps) + 2
  saved = np.log2((total / (some * columns) + least**2) / left_over) / 2
  saved = saved * rows * columns - numbers * ranks * (rows + columns)
  rank = int(np.argmax(saved[:_RANK])) + 1
  if not saved[rank - 1] > 0:  # also if it is NaN, because nothing is left
    return None
  turned = vectors[:, :rank].astype(np.float32)
  halves = np.sqrt(np.sqrt(energies[:rank])).astype(np.float32)
  left = exact.small_products(tall, turned) / halves
  right = halves[:, None] * exact.small_products(basis, turned).T
  largest = max(float(np.abs(x).max()) for x in (left, right))
  return left, right, max(float(steps[rank - 1]), 2 * largest / _MOST)


def _basis(off: np.ndarray) -> np.ndarray:
  """Returns an orthonormal basis `[C, k]` of most of the rows of differences."""
  width = min(_RANK + _MORE, min(off.shape) // 2)
  sketch = exact.small_products(off, random_signs(off.shape[1], width))
  rows = exact.small_products(off.T, sketch).astype(np.float64)
  squares = exact.small_products(rows.T, rows)
  least = np.finfo(float).tiny + _SMALLEST * np.trace(squares)
  if not np.isfinite(least):
    return rows.astype(np.float32)
  # By Cholesky, because a QR of the rows takes several times as long.
  lower = np.linalg.cholesky(squares + least * np.eye(width))
  return exact.small_products(rows, np.linalg.inv(lower).T).astype(np.float32)


@functools.lru_cache(4)
def random_signs(rows: int, columns: int) -> np.ndarray:
  """Returns a matrix of 1 and -1, float32, that is the same each time."""
  signs = np.random.default_rng(0).integers(0, 2, (rows, columns), np.int8)
  return (2 * signs - 1).astype(np.float32)


@np.errstate(all='ignore')
def floats(bits: np.ndarray, known: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns the differences, float32; 0 for those not finite."""
  if dtype not in ulps.FORMATS:
    return (bits - known).astype(np.float32)
  off = _widened(bits, dtype)
  off -= _widened(known, dtype)
  if not np.isfinite([off.max(initial=0), off.min(initial=0)]).all():
    off[~np.isfinite(off)] = 0
  return off


def _widened(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns floats, given by their bits, as float32."""
  if ulps.FORMATS[dtype].nmant == 7:  # bfloat16, which NumPy converts slowly
    return (bits.astype(np.int32) << 16).view(np.float32)
  return np.ascontiguousarray(bits).view(dtype).astype(np.float32)

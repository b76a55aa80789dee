"""Chooses how an array is stored beside one of a base, see `structured.relative`.

A fine-tune differs from its base by numbers whose scales depend on the row and the
column. Many fine-tunes are the base plus a product of two small matrices, or nearly so:
such a product is stored, where it saves more than it takes.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import structured
from rotbits_jax.coding import tables
from rotbits_jax.structured import relative

_SAMPLE = 1 << 17  # elements by which leaves are compared
_LINES = 1 << 10  # elements of a row, or of a column, that tell its scale
_LEAST_LINES = 16  # rows or columns for which scales of columns or rows are kept
_SPARSE = 1 / 16  # the greatest share of changed elements of a patch
_STEP = 1  # levels of a quarter of an octave
_OCTAVE = 4  # levels
_LOWEST = -6 * _OCTAVE  # differences of 2^-6 ULPs and less share a class
_NARROW = 3 * _OCTAVE  # the level from which int8 is too short for differences
_BAND = 6 * _OCTAVE
_LEAST = 1 << 12  # elements of an array for which classes are worth their arrays
_LEAF_BITS = 8 * 300  # of a leaf beside its arrays


def beside(target: np.ndarray, base: np.ndarray) -> Any:
  """Returns the leaf that stores an array beside one of a base.

  Args:
    target: the array.
    base: an array of the base.

  Returns:
    A structured leaf; None if the array takes fewer bytes alone, or cannot be stored
    beside this base.
  """
  dtype = target.dtype
  if not relative.fits(target.shape, dtype, base.shape, base.dtype):
    return None
  bits = relative.bits_of(target)
  known = relative.base_bits(base, target.shape, dtype)
  changed = int(np.count_nonzero(bits != known))
  if not changed:
    return structured.Same(target.shape, dtype.name)
  if dtype.itemsize > 4 or _is_sparse(bits, known, changed / bits.size, dtype):
    if changed > _SPARSE * bits.size:
      return None
    return structured.Patched.of(target, known)
  if bits.size < _LEAST:
    return None
  leaf = _relative(target, bits, known)
  if _bits_of_leaf(leaf, bits) > _bits_alone(bits, dtype):
    return None
  return leaf


def _is_sparse(
  bits: np.ndarray, base: np.ndarray, share: float, dtype: np.dtype
) -> bool:
  """Returns whether a mask of the changed elements is about as short as classes."""
  if share > _SPARSE:
    return False
  mantissa = relative.mantissa_bits(dtype)
  if mantissa is None:
    return True
  sample = slice(None, None, -(-bits.size // _SAMPLE))
  known = base[sample]
  changed = bits[sample] != known
  exponents = (known & np.iinfo(known.dtype).max) >> mantissa
  counts = np.bincount(exponents, minlength=1)
  own = np.bincount(exponents[changed], minlength=counts.size)
  alone = _binary_entropy(own.sum(), counts.sum())
  return float(_binary_entropy(own, counts).sum()) > 0.9 * float(alone)


def _binary_entropy(ones: Any, counts: Any) -> Any:
  """Returns the bits that tell which `ones` of `counts` elements are changed."""
  p = np.clip(ones / np.maximum(counts, 1), 1e-9, 1 - 1e-9)
  return -counts * (p * np.log2(p) + (1 - p) * np.log2(1 - p))


# ---- differences ---------------------------------------------------------------------


class _Factors(NamedTuple):
  """A product that predicts differences, see `structured.Relative`."""

  left: np.ndarray
  right: np.ndarray
  unit: int


class _Scales(NamedTuple):
  """Logarithms of the scales of rows and columns, in eighths of an octave."""

  rows: np.ndarray
  columns: np.ndarray | None


def _relative(
  target: np.ndarray, bits: np.ndarray, base: np.ndarray
) -> structured.Relative:
  dtype = target.dtype
  width = target.shape[-1] if target.ndim > 1 else bits.size
  if width < _LEAST_LINES:
    width = bits.size
  own, known = bits.reshape(-1, width), base.reshape(-1, width)
  equal = (own == known).all(axis=1)
  factors = _factors(own, known, dtype)
  draft = structured.Relative(
    row_scales=np.where(equal, relative.EQUAL, 0).astype(np.int16),
    column_scales=None,
    left=factors.left if factors else None,
    right=factors.right if factors else None,
    residuals=(),
    exceptions=None,
    values=None,
    lengths=target.shape,
    name=dtype.name,
    width=width,
    step=_STEP,
    first=_LOWEST,
    bands=_bands(dtype),
    unit=factors.unit if factors else 0,
  )
  blocks = list(draft.prediction(base))
  if factors:
    known = known.copy()
    for block in blocks:
      known[block.rows, block.columns] = block.bits
  scales = _scales(own, known, dtype)
  scales.rows[equal] = relative.EQUAL
  draft = dataclasses.replace(
    draft, row_scales=scales.rows, column_scales=scales.columns
  )
  return _with_residuals(draft, bits, blocks)


def _bands(dtype: np.dtype) -> tuple[int, ...]:
  """Returns the numbers of classes of bands, for differences up to half of a number."""
  mantissa = relative.mantissa_bits(dtype)
  highest = 8 * dtype.itemsize if mantissa is None else mantissa - 1
  edges = [_LOWEST, _NARROW]
  while edges[-1] < highest * _OCTAVE:
    edges.append(edges[-1] + _BAND)
  edges[-1] = highest * _OCTAVE
  return tuple(b - a for a, b in itertools.pairwise(edges) if b > a)


def _scales(bits: np.ndarray, base: np.ndarray, dtype: np.dtype) -> _Scales:
  """Measures the scales of the differences of rows and columns.

  The mean of square roots is used, because few large differences change it little.

  Args:
    bits: bits of the array, `[R, C]`.
    base: bits of its base, `[R, C]`.
    dtype: their dtype.
  """
  rows, columns = bits.shape
  few = slice(None, None, max(columns // _LINES, 1))
  some = slice(None, None, max(rows // _LINES, 1))
  if rows < _LEAST_LINES:
    of_rows, of_columns = _roots(bits, base, dtype).mean(axis=1), None
  else:
    sample = _roots(bits[:, few], base[:, few], dtype)
    of_rows = sample.mean(axis=1)
    other = _roots(bits[some], base[some], dtype)
    of_columns = _shares(other, of_rows[some], axis=0)
    of_rows = _shares(sample, of_columns[few], axis=1)
  bias = 0.0
  if (mantissa := relative.mantissa_bits(dtype)) is not None:
    one = int(np.array(1, dtype).view(bits.dtype)) >> mantissa
    bias = 8.0 * (one + mantissa)
  return _Scales(
    _logs(of_rows, bias), None if of_columns is None else _logs(of_columns, 0.0)
  )


def _shares(roots: np.ndarray, scales: np.ndarray, axis: int) -> np.ndarray:
  """Returns the mean of each line after division by the scales of the other lines."""
  weights = 1 / np.maximum(scales, 1e-30)
  weights[scales <= 0] = 0
  count = max(np.count_nonzero(weights), 1)
  found = roots @ weights if axis else weights @ roots
  return np.asarray(found / count)


def _logs(roots: np.ndarray, bias: float) -> np.ndarray:
  logs = np.round(16 * np.log2(np.maximum(roots, 1e-30)) + bias)
  bound = relative.MOST_SCALE
  return np.clip(logs, -bound, bound).astype(np.int16)


def _roots(bits: np.ndarray, base: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns the square roots of the absolute differences; 0 for those not finite."""
  roots = _far(bits, base, dtype)
  return np.sqrt(np.abs(roots, out=roots), out=roots)


def _far(bits: np.ndarray, base: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns the differences, float32; 0 for those not finite."""
  with np.errstate(all='ignore'):
    if dtype.kind in 'iub':
      return (bits - base).astype(np.float32)
    far = _wide(bits, dtype)
    far -= _wide(base, dtype)
    if not np.isfinite(far.sum()):
      far[~np.isfinite(far)] = 0
  return far


def _wide(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
  return np.ascontiguousarray(bits).view(dtype).astype(np.float32)


def _with_residuals(
  leaf: structured.Relative, bits: np.ndarray, blocks: Sequence[relative.Block]
) -> structured.Relative:
  """Returns the leaf with its residuals, exceptions and values.

  Args:
    leaf: the leaf without them.
    bits: bits of the array, `[n]`.
    blocks: the blocks of `leaf.prediction`.
  """
  dtype, count = leaf.dtype, sum(leaf.bands)
  target = bits.reshape(-1, leaf.width)
  pieces: list[list[np.ndarray]] = [[] for _ in range(count + 1)]
  for block in blocks:
    own = leaf.classes(block)
    wanted = np.ascontiguousarray(target[block.rows, block.columns]).reshape(-1)
    far = relative.indices(wanted, dtype) - relative.indices(
      block.bits.reshape(-1), dtype
    )
    order = np.argsort(own, kind='stable')
    ends = np.cumsum(np.bincount(own, minlength=count + 1)).tolist()
    sorted_ = far[order]
    for k, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
      if k == count:
        sorted_[begin:] = wanted[order[begin:]]
      if begin < end:
        pieces[k].append(sorted_[begin:end])
  edges = relative.edges_of(leaf.bands)
  empty = np.zeros(0, bits.dtype)
  joined = [
    np.concatenate([empty, *(x for own in pieces[a:b] for x in own)])
    for a, b in itertools.pairwise(edges)
  ]
  shortened = [_shortened(x) for x in joined]
  exceptions = np.concatenate([empty, *(x for _, x in shortened)])
  values = np.concatenate([empty, *pieces[count]])
  stored = relative.stored_dtype(dtype)
  return dataclasses.replace(
    leaf,
    residuals=tuple(relative.filled(x) for x, _ in shortened),
    exceptions=exceptions if exceptions.size else None,
    values=relative.filled(values.view(stored)) if values.size else None,
  )


def _shortened(far: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns differences in a shorter dtype, and those that it cannot hold."""
  for width in (1, 2):
    info = np.iinfo(f'i{width}')
    if width >= far.dtype.itemsize:
      break
    odd = (far <= info.min) | (far > info.max)
    if np.count_nonzero(odd) <= far.size // 512:
      return np.where(odd, info.min, far).astype(info.dtype), far[odd]
  return far, far[:0]


# ---- factors -------------------------------------------------------------------------

_LEAST_FACTORED = 64  # rows and columns of a matrix for which factors are tried
_RANKS = (16, 64)  # the greatest rank that is tried first, and then
_SKETCHED = 1 << 9  # rows that tell whether factors may be worth it
_TYPICAL = 1 << 14  # elements that tell the rounding error of the dtype
_MORE = 8  # columns of a sketch beyond the rank
_FINER = 5  # the differences that are left, over the error of rounded factors
_MOST = (1 << 15) - 1


def _factors(bits: np.ndarray, base: np.ndarray, dtype: np.dtype) -> _Factors | None:
  """Finds a product of small matrices that predicts the differences.

  Args:
    bits: bits of the array, `[R, C]`.
    base: bits of its base, `[R, C]`.
    dtype: their dtype.

  Returns:
    The factors; None if none save more than they take.
  """
  floats = relative.mantissa_bits(dtype) if dtype.itemsize > 1 else None
  if floats is None or min(bits.shape) < _LEAST_FACTORED:
    return None
  # Some rows tell whether there may be a product.
  some = slice(None, None, max(len(bits) // _SKETCHED, 1))
  with np.errstate(all='ignore'):
    sizes = np.abs(_wide(base.reshape(-1)[:: -(-base.size // _TYPICAL)], dtype))
  # The rounding error of the dtype, at most numbers.
  least = float(np.nanmedian(sizes)) * 2.0 ** -(floats + 2)
  far, scale = _differences(bits[some], base[some], dtype)
  if not 1e-30 < scale < 1e30:
    return None
  for most in _RANKS:
    basis = _basis(far, most)
    found = _product(far, basis, most, least / scale, len(bits))
    if found is None or len(found.right) < most:
      break
  if found is not None and len(far) < len(bits):
    far, scale = _differences(bits, base, dtype)
    found = _product(far, basis, most, least / scale, len(bits))
  if found is None or not scale < 1e30:
    return None
  left, right, step = found
  # The unit is a power of two, and so is its root.
  exponent = math.floor(math.log2(step * math.sqrt(scale)))
  root = math.sqrt(scale) * 2.0**-exponent
  rounded = lambda x: np.rint(x * root).clip(-_MOST, _MOST).astype(np.int16)
  return _Factors(rounded(left), rounded(right), 2 * exponent)


def _differences(
  bits: np.ndarray, base: np.ndarray, dtype: np.dtype
) -> tuple[np.ndarray, float]:
  """Returns the differences, float32, divided by the greatest; and the greatest."""
  far = _far(bits, base, dtype)
  scale = float(np.abs(far).max(initial=0))
  far /= np.float32(scale or 1)
  return far, scale


class _Product(NamedTuple):
  """Factors `[R, k]` and `[k, C]`, and the step to which they are rounded."""

  left: np.ndarray
  right: np.ndarray
  step: float


def _basis(far: np.ndarray, most: int) -> np.ndarray:
  """Returns an orthonormal basis `[C, k]` of most of the rows of differences."""
  width = min(most + _MORE, min(far.shape) // 2)
  sketch = relative.small_products(far, _random(far.shape[1], width))
  rows = relative.small_products(far.T, sketch).astype(np.float64)
  energies, turn = np.linalg.eigh(relative.small_products(rows.T, rows))
  turn /= np.sqrt(np.maximum(energies, 1e-12 * energies[-1] + 1e-300))
  return relative.small_products(rows, turn).astype(np.float32)


def _product(
  far: np.ndarray, basis: np.ndarray, most: int, least: float, rows: int
) -> _Product | None:
  """Finds the product of a rank that saves most.

  Args:
    far: float32 `[R, C]`, differences.
    basis: of their rows, `[C, k]`.
    most: the greatest rank.
    least: root mean square that no product removes.
    rows: the rows of the whole matrix, of which `far` may have some.

  Returns:
    The product; None if none saves more than it takes.
  """
  tall = relative.small_products(far, basis)
  squares = relative.small_products(tall.T, tall).astype(np.float64)
  energies, turn = np.linalg.eigh(squares)
  energies, turn = energies[::-1].clip(0), turn[:, ::-1]
  total = float(np.square(far).mean(axis=1, dtype=np.float64).sum()) * far.shape[1]
  rest = np.maximum(total - np.cumsum(energies), 0) / far.size + least**2
  ranks = np.arange(1, len(energies) + 1)
  # Both factors have the same mean squares, and are rounded to the same step.
  roots = np.sqrt(np.maximum(energies, 1e-30))
  square = np.cumsum(roots) * (1 / far.shape[0] + 1 / far.shape[1])
  steps = np.sqrt(12 * rest / np.maximum(square, 1e-30)) / _FINER
  numbers = np.log2(1 + np.sqrt(np.cumsum(roots) / ranks / min(far.shape)) / steps) + 2
  saved = np.log2((total / far.size + least**2) / rest) / 2 * rows * far.shape[1]
  saved -= numbers * ranks * (rows + far.shape[1])
  best = int(np.argmax(saved[:most]))
  if saved[best] <= 0:
    return None
  turned = turn[:, : best + 1]
  halves = np.sqrt(roots[: best + 1])
  left = relative.small_products(tall, turned.astype(np.float32)) / halves
  right = halves[:, None] * relative.small_products(basis, turned.astype(np.float32)).T
  largest = max(float(np.abs(x).max()) for x in (left, right))
  return _Product(left, right, max(float(steps[best]), 2 * largest / _MOST))


def _random(rows: int, columns: int) -> np.ndarray:
  return np.random.default_rng(0).standard_normal((rows, columns), np.float32)


# ---- the choice ----------------------------------------------------------------------


def _bits_of_leaf(leaf: structured.Relative, bits: np.ndarray) -> float:
  """Estimates the bits that a leaf takes."""
  total = float(_LEAF_BITS) + 4 * leaf.row_scales.size
  for factor in (leaf.left, leaf.right):
    if factor is not None:
      total += factor.size * math.log2(2 + 4 * float(np.abs(factor).mean()))
  if leaf.column_scales is not None:
    total += 6 * leaf.column_scales.size
  for array in leaf.residuals:
    total += _entropy(array.reshape(-1))
  if leaf.exceptions is not None:
    total += 8 * leaf.exceptions.nbytes
  if leaf.values is not None:
    values = leaf.values.reshape(-1).view(bits.dtype)
    total += _bits_alone(values, leaf.dtype)
  return total


_SEGMENTS = 64  # of a sorted array, whose entropies are measured


def _entropy(flat: np.ndarray) -> float:
  """Estimates the bits of an array of integers that is sorted by their sizes."""
  total = 0.0
  for part in np.array_split(flat, min(_SEGMENTS, flat.size // 256 + 1)):
    sample = part[:: max(part.size * _SEGMENTS // _SAMPLE, 1)]
    if sample.size:
      size = float(np.abs(sample.astype(np.float64)).mean())
      # The entropy of a geometric distribution of this mean, and the signs.
      some = size / (1 + size)
      total += part.size * (math.log2(1 + size) + some)
      total += part.size * size * math.log2(1 + 1 / size) if size else 0.0
  return total


def _bits_alone(bits: np.ndarray, dtype: np.dtype) -> float:
  """Estimates the bits that an array takes alone."""
  sample = bits[:: -(-bits.size // _SAMPLE)]
  mantissa = relative.mantissa_bits(dtype)
  found = np.unique(sample, return_counts=True)[1]
  cost = 8.0 * bits.dtype.itemsize
  if found.size <= sample.size // 16:  # more values than that are not seen in a sample
    cost = tables.entropy_bits(found) / sample.size
  if mantissa is not None and mantissa > 3:
    low = mantissa - 3
    top = np.bincount((sample & np.iinfo(bits.dtype).max) >> low)
    union: Any = np.bitwise_or.reduce(sample)  # type: ignore[call-overload]
    used = int(union) & ((1 << low) - 1)
    zeros = (used & -used).bit_length() - 1 if used else low
    raw = np.count_nonzero(sample) / sample.size * (low - zeros + 1)
    cost = min(tables.entropy_bits(top) / sample.size + float(raw), cost)
  return cost * bits.size

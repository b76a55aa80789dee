"""Chooses how an array is stored beside one of a base, see `structured.relative`.

A fine-tune differs from its base by numbers whose scales depend on the row and the
column. Many fine-tunes are the base plus a product of two small matrices, or nearly so:
such a product is stored, where it saves more than it takes. Weight decay moves the rows
of tokens that no text has; a drift stores that.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import structured
from rotbits_jax.coding import given
from rotbits_jax.coding import tables
from rotbits_jax.structured import division
from rotbits_jax.structured import relative
from rotbits_jax.structured import ulps

_SAMPLE = 1 << 15  # elements by which leaves are compared
_PART = 1 << 15  # elements whose differences fit a cache
_LINES = 1 << 9  # elements of a row, or of a column, that tell its scale
_FIRST = 16  # columns that most often tell that a row differs
_LEAST_LINES = 16  # rows or columns for which scales of columns or rows are kept
_SCALE_BITS = 9  # of a scale, and what its error in a short line seems to save
_FAR = 24  # eighths of an octave from which scales of lines are equally wrong
_SPARSE = 1 / 16  # the greatest share of changed elements of a patch
_OCTAVE = 4  # levels
_LOWEST = -6 * _OCTAVE  # differences of 2^-6 ULPs and less share a class
_FEW = 1 << 14  # elements that tell a drift, or how often an exponent changes
_LEAST_DRIFT = 1 / 4  # of the elements move one way more than the other; bits it saves
_LEAST = 1 << 12  # elements of an array for which classes are worth their arrays
_LEAF_BITS = 8 * 60  # of a leaf beside its arrays


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
  places = _changed(bits, known)
  if places is None:
    if dtype.itemsize > 4:
      return None
  elif not places.size:
    return structured.Same(target.shape, dtype.name)
  elif dtype.itemsize > 4 or _is_sparse(known, places, dtype):
    return structured.Patched.of(target, known, places)
  if bits.size < _LEAST:
    return None
  return _relative(target, bits, known, _bits_alone(bits, dtype))


def _changed(bits: np.ndarray, base: np.ndarray) -> np.ndarray | None:
  """Returns the indices of changed elements; None if there are many."""
  found, left = [np.zeros(0, np.int64)], _SPARSE * bits.size
  for start in range(0, bits.size, _PART):
    changed = bits[start : start + _PART] != base[start : start + _PART]
    left -= int(np.count_nonzero(changed))
    if left < 0:
      return None
    found.append(np.flatnonzero(changed) + start)
  return np.concatenate(found)


def _is_sparse(base: np.ndarray, places: np.ndarray, dtype: np.dtype) -> bool:
  """Returns whether gaps between changed elements are about as short as classes."""
  mantissa = relative.mantissa_bits(dtype)
  if mantissa is None:
    return True
  every, some = -(-base.size // _FEW), -(-places.size // _FEW)
  counts, own = (
    step * np.bincount((x & np.iinfo(x.dtype).max) >> mantissa, minlength=1 << 8)
    for x, step in ((base[::every], every), (base[places[::some]], some))
  )
  counts = np.maximum(counts, own)
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


def _relative(
  target: np.ndarray, bits: np.ndarray, base: np.ndarray, alone: float
) -> structured.Relative | None:
  """Returns the leaf of differences; None if it takes more bits than `alone`."""
  dtype = target.dtype
  width = target.shape[-1] if target.ndim > 1 else bits.size
  if width < _LEAST_LINES:
    width = bits.size
  wanted, known = bits.reshape(-1, width), base.reshape(-1, width)
  own = _differing(wanted, known)
  factors = _factors(wanted, known, dtype)
  draft = structured.Relative(
    head=np.zeros(0, np.uint8),
    left=factors.left if factors else None,
    right=factors.right if factors else None,
    drift=None,
    coded=np.zeros(0, np.uint8),
    values=None,
    lengths=target.shape,
    name=dtype.name,
    width=width,
    first=_LOWEST,
    parts=(),
    unit=factors.unit if factors else 0,
  )
  whole = own.size == len(wanted)
  some = None if whole else own
  known = draft.predicted(base, some)
  wanted = wanted if whole else wanted[own]
  if (drift := _drift(wanted.reshape(-1), known.reshape(-1), dtype)) is not None:
    draft = dataclasses.replace(draft, drift=drift)
    known = draft.predicted(base, some)
  rows = np.full(bits.size // width, relative.EQUAL, np.int16)
  rows[own], columns = _scales(wanted, known, dtype)
  head = relative.Head(rows, columns, *np.zeros((2, 0), np.uint8))
  return _coded(draft, head, wanted.reshape(-1), known, alone)


def _differing(bits: np.ndarray, known: np.ndarray) -> np.ndarray:
  """Returns the indices of the rows that differ."""
  found = np.zeros(len(bits), bool)
  for columns in (slice(_FIRST), slice(_FIRST, None)):  # most rows differ at once
    (left,) = np.nonzero(~found)
    if left.size:
      found[left] = (bits[left, columns] != known[left, columns]).any(axis=1)
  return np.flatnonzero(found)


def _drift(bits: np.ndarray, known: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
  """Returns the drift of elements, see `structured.Relative`; None if it saves little.

  Args:
    bits: bits of elements, `[n]`.
    known: the bits that predict them.
    dtype: their dtype.
  """
  mantissa = relative.mantissa_bits(dtype)
  if mantissa is None or dtype.itemsize == 1:
    return None
  sample = slice(None, None, -(-bits.size // _FEW))
  far = ulps.differences(bits[sample], known[sample], dtype).astype(np.int64)
  if abs(np.sign(far).mean()) < _LEAST_DRIFT:
    return None
  places = relative.drift_places(known[sample], mantissa)
  order = np.lexsort((far, places))
  counts = np.bincount(places, minlength=relative.DRIFTS)
  middle = np.minimum(np.cumsum(counts) - (counts + 1) // 2, far.size - 1)
  drift = np.where(counts, far[order[middle]], 0)
  saved = np.log2((1.0 + abs(far)) / (1 + abs(far - drift[places]))).mean()
  if saved < _LEAST_DRIFT or np.abs(drift).max() >= 1 << mantissa:
    return None
  return drift.astype(np.int32)


def _scales(
  bits: np.ndarray, base: np.ndarray, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
  """Measures the scales of the differences of rows and columns.

  The mean of square roots is used, because few large differences change it little.

  Args:
    bits: bits of the array, `[R, C]`.
    base: bits of its base, `[R, C]`.
    dtype: their dtype.
  """
  rows, columns = bits.shape
  few = slice(None, None, -(-columns // _LINES))
  some = slice(None, None, -(-rows // _LINES))
  sample = _roots(bits[some], base[some], dtype)
  if rows < _LEAST_LINES:
    of_rows, of_columns = sample.mean(axis=1), np.ones(columns)
  else:
    of_columns = _shares(sample, sample.mean(axis=1), axis=0)
    step = max(_PART // len(of_columns[few]), 1)
    parts = (slice(i, i + step, None) for i in range(0, rows, step))
    roots = (_roots(bits[x, few], base[x, few], dtype) for x in parts)
    of_rows = np.concatenate([_shares(x, of_columns[few], axis=1) for x in roots])
  bias = 0.0
  if (mantissa := relative.mantissa_bits(dtype)) is not None:
    one = int(np.array(1, dtype).view(bits.dtype)) >> mantissa
    bias = 8.0 * (one + mantissa)
  share = np.count_nonzero(sample) / sample.size
  return (
    _kept(_logs(of_rows, bias), share * columns),
    _kept(_logs(of_columns, 0.0), share * rows),
  )


def _kept(logs: np.ndarray, size: float) -> np.ndarray:
  """Returns the scales of lines, or one for all if they save less than they take.

  Numbers of a scale that is wrong by a factor of e^x take x^2 / ln 2 bits more.

  Args:
    logs: the scales, in eighths of an octave.
    size: the differences of a line that are not 0.
  """
  middle = float(np.median(logs))
  far = np.clip(logs - middle, -_FAR, _FAR)
  if size * float(np.square(far).mean()) * math.log(2) / 64 > _SCALE_BITS:
    return logs
  return np.full_like(logs, round(middle))


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
    ends = far.max(initial=0), far.min(initial=0)
    if not np.isfinite(ends).all():
      far[~np.isfinite(far)] = 0
  return far


def _wide(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
  if relative.mantissa_bits(dtype) == 7:  # bfloat16, which NumPy converts slowly
    return (bits.astype(np.int32) << 16).view(np.float32)
  return np.ascontiguousarray(bits).view(dtype).astype(np.float32)


def _coded(
  leaf: structured.Relative,
  head: relative.Head,
  bits: np.ndarray,
  known: np.ndarray,
  alone: float,
) -> structured.Relative | None:
  """Codes the differences; returns None if they take too many bits.

  Args:
    leaf: a draft, with factors.
    head: has the scales.
    bits: bits of the rows that differ, `[n]`.
    known: the bits that predict them, `[r, C]`.
    alone: the most bits.
  """
  dtype, mantissa = leaf.dtype, relative.mantissa_bits(leaf.dtype)
  # Differences in the last class are more than half of a number.
  width = 8 * dtype.itemsize
  highest = width if mantissa is None else mantissa - 1
  levels = np.arange(leaf.first, highest * _OCTAVE)
  shifts = [*division.shifts_of(levels, width).tolist(), width - 8]
  sums = head.sums(dtype, leaf.first)
  made = _symbols(bits, known.reshape(-1), sums, leaf.first, shifts, dtype)
  bands, of_bands = _bands(made.counts, shifts)
  head = head._replace(
    bands=np.array(bands, np.uint8), shifts=np.array(of_bands, np.uint8)
  )
  counts = np.add.reduceat(made.counts, np.cumsum([0, *bands[:-1]]))
  used, frequencies = counts.any(axis=1), np.zeros_like(counts)
  frequencies[:, 0] = tables.TOTAL
  frequencies[used] = tables.quantize(counts[used])
  leaf = dataclasses.replace(
    leaf,
    values=made.values if made.values.size else None,
    head=head.to_bytes(),
  )
  size = float((counts.sum(axis=1) * np.array(of_bands)).sum())
  size += float(_table_bits(counts).sum())
  if size + _side_bits(leaf) > alone:
    return None
  coded = given.encode(
    made.symbols, made.raw, made.classes, head.of_classes, frequencies, of_bands
  )
  return dataclasses.replace(
    leaf,
    coded=np.concatenate(coded),
    parts=tuple(x.size for x in coded),
  )


class _Symbols(NamedTuple):
  """The symbols and the raw bits of n elements.

  Attributes:
    classes: uint8 `[n]`.
    symbols: uint8 `[n]`.
    raw: the raw bits of elements that have some, for each block.
    values: the bits of elements with the symbol 0.
    counts: int64 `[classes, 256]`, how often each symbol occurs.
  """

  classes: np.ndarray
  symbols: np.ndarray
  raw: list[given.Raw]
  values: np.ndarray
  counts: np.ndarray


def _symbols(
  bits: np.ndarray,
  known: np.ndarray,
  sums: division.Sums,
  first: int,
  shifts: list[int],
  dtype: np.dtype,
) -> _Symbols:
  """Divides elements `[n]` into symbols and raw bits, see `structured.Relative`."""
  kind = division.Kind.of(dtype, relative.mantissa_bits(dtype))
  last, first_raw = len(shifts) - 1, shifts.count(0)
  classes, symbols = np.empty((2, bits.size), np.uint8)
  counts = np.zeros((len(shifts), given.ALPHABET), np.int64)
  raw, values = [], [bits[:0]]
  for part, _ in given.parts(bits.size):
    fill = functools.partial(sums.write, part.start)
    made = division.divide(bits[part], known[part], fill, kind, first, last)
    classes[part], symbols[part] = made.classes, made.symbols
    (at,) = np.nonzero(made.classes >= first_raw)
    raw.append(given.Raw(made.classes[at], made.raw[at]))
    values.append(bits[part][made.symbols == 0])
    counts += made.counts[: len(shifts)]
    del made  # or the next call copies these arrays, because they are used
  return _Symbols(classes, symbols, raw, np.concatenate(values), counts)


def _bands(counts: np.ndarray, shifts: Sequence[int]) -> tuple[list[int], list[int]]:
  """Puts neighbouring classes of one shift together where that saves bits.

  Args:
    counts: `[classes, 256]`.
    shifts: of the classes.

  Returns:
    The number of classes of each band, and its shift.
  """
  own, last = _table_bits(counts).tolist(), len(counts) - 1
  bands, of_bands, band, bits = [1], [shifts[0]], counts[0], own[0]
  for i in range(1, len(counts)):
    both, size = band + counts[i], math.inf
    if shifts[i] == of_bands[-1] and i < last:
      size = float(_table_bits(both)) if own[i] else bits
    if size <= bits + own[i]:
      bands[-1] += 1
      band, bits = both, size
    else:
      bands.append(1)
      of_bands.append(shifts[i])
      band, bits = counts[i], own[i]
  return bands, of_bands


def _table_bits(counts: np.ndarray) -> np.ndarray:
  """Returns the bits of symbols, counted `[..., 256]`, and of their tables: `[...]`."""
  total = counts.sum(axis=-1)
  alone = counts * np.log2(np.maximum(counts, 1))
  # A stored frequency takes about a byte.
  bits = total * np.log2(np.maximum(total, 1)) - alone.sum(axis=-1)
  return np.asarray(bits + 8 * np.count_nonzero(counts, axis=-1))


# ---- factors -------------------------------------------------------------------------

_LEAST_FACTORED = 64  # rows and columns of a matrix for which factors are tried
_RANKS = (16, 64)  # the greatest rank that is tried first, and then
_SKETCHED = 1 << 5  # rows for each rank that tell whether factors are worth it
_BASIS = 1 << 10  # rows that tell the basis
_TYPICAL = 1 << 12  # elements that tell the rounding error of the dtype
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
  with np.errstate(all='ignore'):
    sizes = np.abs(_wide(base.reshape(-1)[:: -(-base.size // _TYPICAL)], dtype))
  # The rounding error of the dtype, at most numbers.
  least = float(np.nanmedian(sizes)) * 2.0 ** -(floats + 2)
  far = bits[:0]
  for most in _RANKS:
    # Some rows tell a basis, and some others whether it saves anything.
    some = slice(None, None, -(-len(bits) // (_SKETCHED * most)))
    if len(far) < len(bits):
      far, scale = _differences(bits[some], base[some], dtype)
    if not 1e-30 < scale < 1e30:
      return None
    basis = _basis(far[::2], most)
    found = _product(far[1::2], basis, most, least / scale, len(bits))
    if found is None or len(found.right) < most:
      break
  if found is not None:
    if len(far) < len(bits):
      far, scale = _differences(bits, base, dtype)
    basis = _basis(far[:: -(-len(far) // _BASIS)], most)
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


@functools.lru_cache(4)
def _random(rows: int, columns: int) -> np.ndarray:
  signs = np.random.default_rng(0).integers(0, 2, (rows, columns), np.int8)
  return (2 * signs - 1).astype(np.float32)


# ---- the choice ----------------------------------------------------------------------


def _side_bits(leaf: structured.Relative) -> float:
  """Estimates the bits of a leaf beside its symbols and raw bits."""
  total = float(_LEAF_BITS) + 8 * leaf.head.size
  for factor in (leaf.left, leaf.right):
    if factor is not None:
      total += factor.size * math.log2(2 + 4 * float(np.abs(factor).mean()))
  return total if leaf.values is None else total + 8 * leaf.values.nbytes


def _bits_alone(bits: np.ndarray, dtype: np.dtype) -> float:
  """Estimates the bits that an array takes alone."""
  sample = bits[:: -(-bits.size // _SAMPLE)]
  mantissa = relative.mantissa_bits(dtype)
  if bits.itemsize > 2:
    found = np.unique(sample, return_counts=True)[1]
  else:
    counts = np.bincount(sample.view(f'u{bits.itemsize}'))
    found = counts[counts > 0]
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

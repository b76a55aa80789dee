"""Chooses how an array is stored beside a known one, see `structured.difference`.

A fine-tune differs from its base by numbers whose sizes depend on the row and the
column. Many fine-tunes are the base plus a product of two small matrices, or nearly so:
such a product is stored, where it saves more than it takes. Weight decay moves the rows
of tokens that no text has; a drift stores that.

Shape letters: R rows, C columns. Arrays are given by their bits, see `ulps.bits_of`.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import structured
from rotbits_jax.coding import coder
from rotbits_jax.coding import known as known_lib
from rotbits_jax.coding import pool
from rotbits_jax.relative import entries
from rotbits_jax.relative import factors as factors_lib
from rotbits_jax.structured import difference
from rotbits_jax.structured import tied
from rotbits_jax.structured import ulps

_SAMPLE = 1 << 15  # elements by which leaves are compared
_CHUNK = 1 << 18  # elements that fit a cache
_FIRST = 16  # columns that most often tell that a row differs
_SPARSE = 1 / 16  # the greatest share of few changed elements
_FEW = 1 << 14  # elements that tell a drift, or how often an exponent changes
_LEAST_DRIFT = 1 / 4  # of the elements move one way more than the other; bits it saves
_LEAST = 1 << 12  # elements of an array for which classes are worth their arrays
_LEAF_BYTES = 60  # of a leaf besides its arrays
_LEAST_LINES = 16  # rows or columns for which scales of columns or rows are kept
_WIDEST = 1 << 20  # columns
_LINES = 1 << 9  # elements of a row, or of a column, that tell its scale
_SCALE_BITS = 9  # of a scale, and what its error in a short line seems to save
_FAR = 24  # eighths of an octave from which scales of lines are equally wrong
_TINY = 1e-18  # of the scales by which roots are divided


class Measured(NamedTuple):
  """How to store an array beside a known one.

  Attributes:
    leaf: the leaf.
    classes: the class of each of its differences, uint8; None if they have none.
  """

  leaf: difference.Difference
  classes: np.ndarray | None = None

  @property
  def known(self) -> known_lib.Known | None:
    """What the decoder knows of the differences; None for nothing."""
    if self.classes is None:
      return None
    return known_lib.Known(self.classes, difference.class_shifts(self.leaf.dtype))

  def estimate(self) -> float:
    """Estimates the bytes of the leaf without coding it."""
    arrays = self.leaf.stored()[1]
    known = self.known
    places = {} if known is None else {list(arrays).index('differences'): known}
    return coder.estimate([*arrays.values()], places)


def beside(target: np.ndarray, known: np.ndarray) -> Measured | None:
  """Returns how to store an array beside a known one.

  Args:
    target: the array.
    known: the known array.

  Returns:
    None if the array takes fewer bytes alone, or cannot be stored beside this one.
  """
  dtype = target.dtype
  if not difference.fits(target.shape, dtype, known.shape, known.dtype):
    return None
  bits = ulps.bits_of(target)
  base = difference.known_bits(known, target.shape, dtype)
  draft = difference.Difference(lengths=target.shape, name=dtype.name)
  places = _changed(bits, base)
  if places is None:
    if dtype.itemsize > 4:
      return None
  elif not places.size:
    return Measured(draft)
  elif dtype.itemsize > 4 or _is_sparse(base, places, dtype):
    return Measured(_with_few(draft, bits[places], base[places], places))
  if bits.size < _LEAST:
    return None
  return _with_classes(draft, bits, base, _nbytes_alone(target))


def beside_head(
  table: np.ndarray,
  head: np.ndarray,
  map: np.ndarray,
  exponents: np.ndarray,
) -> Measured:
  """Returns how to store an embedding beside its product with the head.

  Args:
    table: the embedding `[V, d]`, float16 or bfloat16.
    head: `[D, V]`, finite.
    map: int32 `[D, d]`, below 2^23 in absolute value.
    exponents: integers `[D]`. Row k of T is `2^-exponents[k] map[k]`.
  """
  scale, shifts = tied.scale_of(head, map, exponents)
  made = tied.product(head, map, shifts, scale, table.dtype)
  draft = difference.Difference(
    lengths=table.shape, name=table.dtype.name, map=map, shifts=shifts, scale=scale
  )
  bits, known = ulps.bits_of(table), ulps.bits_of(made)
  found = _with_classes(draft, bits, known, math.inf, predicts=False)
  assert found is not None
  return found


def measured(leaf: difference.Difference, *needed: Any) -> Measured:
  """Returns a leaf with its classes, given the known array or what it `needs`."""
  return Measured(leaf, leaf.predict(*needed)[1].classes if leaf.has_classes else None)


# ---- few differences -----------------------------------------------------------------


def _changed(bits: np.ndarray, base: np.ndarray) -> np.ndarray | None:
  """Returns the indices of changed elements; None if there are many."""
  some = slice(None, None, -(-bits.size // _FEW) or 1)
  if np.count_nonzero(bits[some] != base[some]) > 2 * _SPARSE * _FEW:
    return None

  def job(part: slice) -> np.ndarray:
    return np.flatnonzero(bits[part] != base[part]) + part.start

  changed = difference.in_parts(job, bits.size, 1, pool.run)
  places = np.concatenate([np.zeros(0, np.int64), *changed])
  return places if places.size <= _SPARSE * bits.size else None


def _is_sparse(base: np.ndarray, places: np.ndarray, dtype: np.dtype) -> bool:
  """Returns whether gaps between changed elements are about as short as classes."""
  mantissa = ulps.MANTISSA_BITS.get(dtype)
  if mantissa is None:
    return True
  every, some = -(-base.size // _FEW), -(-places.size // _FEW)
  of_all, of_changed = (
    step * np.bincount((x & np.iinfo(x.dtype).max) >> mantissa, minlength=1 << 8)
    for x, step in ((base[::every], every), (base[places[::some]], some))
  )
  of_all = np.maximum(of_all, of_changed)
  alone = _binary_entropy(of_changed.sum(), of_all.sum())
  return float(_binary_entropy(of_changed, of_all).sum()) > 0.9 * float(alone)


def _binary_entropy(ones: Any, counts: Any) -> Any:
  """Returns the bits that tell which `ones` of `counts` elements are changed."""
  p = np.clip(ones / np.maximum(counts, 1), 1e-9, 1 - 1e-9)
  return -counts * (p * np.log2(p) + (1 - p) * np.log2(1 - p))


def _with_few(
  draft: difference.Difference, bits: np.ndarray, base: np.ndarray, places: np.ndarray
) -> difference.Difference:
  """Returns the leaf of few changed elements at some places."""
  far = ulps.differences(bits, base, draft.dtype)
  far = far.astype(np.promote_types(far.dtype, np.int16), copy=False)
  is_far = (far <= difference.FAR) | (far > 127)
  gaps = np.diff(places, prepend=-1) - 1
  ends = np.cumsum(gaps // difference.MOST_GAP + 1)
  cut = np.full(ends[-1], difference.MOST_GAP, np.uint16)
  cut[ends - 1] = gaps % difference.MOST_GAP
  return dataclasses.replace(
    draft,
    differences=np.where(is_far, difference.FAR, far).astype(np.int8),
    exceptions=bits[is_far] if is_far.any() else None,
    gaps=cut,
  )


# ---- differences with classes --------------------------------------------------------


def _with_classes(
  draft: difference.Difference,
  bits: np.ndarray,
  base: np.ndarray,
  most: float,
  *,
  predicts: bool = True,
) -> Measured | None:
  """Returns differences with classes; None if they take more bytes than `most`.

  Args:
    draft: the leaf without differences.
    bits: bits of the array, `[n]`.
    base: bits of the known array, `[n]`.
    most: the most bytes.
    predicts: whether factors and a drift are tried.
  """
  dtype, lengths = draft.dtype, draft.lengths
  width = lengths[-1] if len(lengths) > 1 else bits.size
  if not _LEAST_LINES <= width <= _WIDEST:
    width = bits.size
  if width > difference.LONGEST:
    return None
  wanted, known = bits.reshape(-1, width), base.reshape(-1, width)
  places = _differing(wanted, known) if predicts else np.arange(len(wanted))
  if places.size < len(wanted):
    is_equal = np.ones(len(wanted), bool)
    is_equal[places] = False
    equal = np.packbits(is_equal, bitorder='little')
    draft = dataclasses.replace(draft, equal=equal)
  zero = np.zeros(1, np.int16)
  draft = dataclasses.replace(draft, width=width, row_scales=zero, column_scales=zero)
  if predicts and (found := factors_lib.find(wanted, known, dtype)):
    draft = dataclasses.replace(draft, **found._asdict())
  wanted = wanted if places.size == len(wanted) else wanted[places]
  expected = draft.predicted_bits(base, pool.run)
  drift = _drift(wanted.reshape(-1), expected.reshape(-1), dtype)
  if predicts and drift is not None:
    draft = dataclasses.replace(draft, drift=drift)
    expected = draft.predicted_bits(base, pool.run)
  rows, columns = scales(wanted, expected, dtype)
  draft = dataclasses.replace(draft, row_scales=rows, column_scales=columns)
  made = difference.Prediction(expected, draft.classes(expected, pool.run))
  differences, exceptions = difference.divided(
    wanted.reshape(-1), made, dtype, pool.run
  )
  leaf = dataclasses.replace(draft, differences=differences, exceptions=exceptions)
  if _nbytes(leaf, made.classes) > most:
    return None
  return Measured(leaf, made.classes)


def _differing(bits: np.ndarray, known: np.ndarray) -> np.ndarray:
  """Returns the indices of the rows that differ."""
  # Most rows differ at once.
  found = (bits[:, :_FIRST] != known[:, :_FIRST]).any(axis=1)
  if not found.all():
    step = max(_CHUNK // bits.shape[1], 1)
    parts = (slice(i, i + step) for i in range(0, len(bits), step))
    found = np.concatenate([(bits[x] != known[x]).any(axis=1) for x in parts])
  return np.flatnonzero(found)


def _drift(bits: np.ndarray, known: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
  """Returns the drift of elements `[n]`; None if it saves little."""
  mantissa = ulps.MANTISSA_BITS.get(dtype)
  if mantissa is None or dtype.itemsize == 1:
    return None
  sample = slice(None, None, -(-bits.size // _FEW))
  far = ulps.differences(bits[sample], known[sample], dtype).astype(np.int64)
  if abs(np.sign(far).mean()) < _LEAST_DRIFT:
    return None
  places = difference.drift_places(known[sample], mantissa)
  order = np.lexsort((far, places))
  counts = np.bincount(places, minlength=difference.DRIFTS)
  middle = np.minimum(np.cumsum(counts) - (counts + 1) // 2, far.size - 1)
  drift = np.where(counts, far[order[middle]], 0)
  saved = np.log2((1.0 + abs(far)) / (1 + abs(far - drift[places]))).mean()
  if saved < _LEAST_DRIFT or np.abs(drift).max() >= 1 << mantissa:
    return None
  return drift.astype(np.int32)


def scales(
  bits: np.ndarray, known: np.ndarray, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
  """Measures the scales of the differences of rows and columns.

  The mean of square roots is used, because few large differences change it little. Some
  elements of each row and each column are enough.

  Args:
    bits: bits of the array, `[R, C]`.
    known: bits of the known array, `[R, C]`.
    dtype: their dtype.

  Returns:
    The scales of the rows and of the columns, int16, see `structured.difference`.
  """
  rows, columns = bits.shape
  some_rows, some_columns = (
    slice(None, None, max(length // _LINES, 1)) for length in bits.shape
  )
  of_columns, share = np.ones(columns), 1.0
  if rows >= _LEAST_LINES:
    roots = _roots(bits[some_rows], known[some_rows], dtype)
    share = float(np.count_nonzero(roots)) / roots.size
    of_some = roots.mean(axis=1, keepdims=True)
    present = max(np.count_nonzero(of_some), 1)
    roots = np.divide(roots, of_some, out=roots, where=of_some > 0)
    of_columns = roots.sum(axis=0, dtype=np.float64) / present
  weights = 1 / np.maximum(of_columns[some_columns], _TINY)
  weights = np.where(of_columns[some_columns], weights, 0).astype(np.float32)

  def job(part: slice) -> np.ndarray:
    roots = _roots(bits[part, some_columns], known[part, some_columns], dtype)
    with np.errstate(all='ignore'):
      return (roots * weights).sum(axis=1, dtype=np.float64)

  sums = np.concatenate(difference.in_parts(job, rows, weights.size))
  of_rows = sums / max(np.count_nonzero(weights), 1)
  bias = 0.0
  if (mantissa := ulps.MANTISSA_BITS.get(dtype)) is not None:
    one = int(np.array(1, dtype).view(bits.dtype)) >> mantissa
    bias = 8.0 * (one + mantissa)
  return (
    _kept(_logs(of_rows, bias), share * columns),
    _kept(_logs(of_columns, 0.0), share * rows),
  )


def _roots(bits: np.ndarray, known: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns the square roots of absolute differences, float32; 0 for those infinite."""
  far = factors_lib.floats(bits, known, dtype)
  np.abs(far, out=far)
  return np.sqrt(far, out=far)


def _logs(roots: np.ndarray, bias: float) -> np.ndarray:
  """Returns the scales of lines, in eighths of an octave."""
  logs = np.round(16 * np.log2(np.maximum(roots, 1e-30)) + bias)
  bound = difference.MOST_SCALE
  return np.clip(logs, -bound, bound).astype(np.int16)


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
  return np.full(1, round(middle), np.int16)


# ---- the choice ----------------------------------------------------------------------


def _nbytes(leaf: difference.Difference, classes: np.ndarray) -> float:
  """Estimates the bytes of a leaf from some of its differences."""
  stride = max(leaf.differences.size // _CHUNK, 1)
  known = known_lib.Known(
    np.ascontiguousarray(classes[::stride]), difference.class_shifts(leaf.dtype)
  )
  differences = coder.estimate([leaf.differences[::stride]], {0: known}) * stride
  # Scales and factors take about a byte of two each.
  others = structured.count_bytes(leaf) - leaf.differences.size
  return differences + others / 2 + _LEAF_BYTES


def _nbytes_alone(array: np.ndarray) -> float:
  """Estimates the bytes that an array takes alone from some of its elements."""
  sample = array.reshape(-1)[:: -(-array.size // _SAMPLE)]
  return coder.estimate([sample.view(entries.stored_dtype(sample.dtype.name))]) * (
    array.size / sample.size
  )

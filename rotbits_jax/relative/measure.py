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
from rotbits_jax.coding import pool
from rotbits_jax.relative import entries
from rotbits_jax.relative import factors
from rotbits_jax.relative import products
from rotbits_jax.structured import difference
from rotbits_jax.structured import tied
from rotbits_jax.structured import ulps
from rotbits_jax.system import checksums
from rotbits_jax.system import host

_SAMPLE = 1 << 15  # elements by which the bytes of an array alone are estimated
_MOST_SHARE = 0.98  # of these that a base is worth
_MORE = 1 << 16  # and those of its differences
_FEW = 1 << 14  # elements that tell a drift, or whether few elements changed
_SPARSE = 1 / 40  # share of changed elements up to which gaps are shorter than classes
_LEAST_DRIFT = 1 / 4  # bits of an element that it saves
_LEAST = 1 << 12  # elements of an array for which classes are worth their arrays
_LEAF_BYTES = 60  # of a leaf besides its arrays
_LEAST_LINES = 16  # rows or columns for which scales of columns or rows are kept
_WIDEST = 1 << 20  # columns
_LINES = 1 << 9  # elements of a row, or of a column, that tell its scale
_SCALE_BITS = 9  # of a scale, and what its error in a short line seems to save
_FAR = 24  # eighths of an octave from which scales of lines are equally wrong


class Measured(NamedTuple):
  """How to store an array beside a known one."""

  leaf: difference.Difference
  classes: np.ndarray | None = None  # uint8, of the differences; None if they have none
  known: entries.BaseArray | products.Product | None = None
  crc32: int = 0  # of the array that the leaf stands for

  def estimate(self) -> float:
    """Estimates the bytes of the leaf from some of its differences."""
    arrays, bits = self.leaf.stored()[1], 0.0
    if self.classes is not None:
      differences = arrays.pop('differences')
      some = slice(None, None, max(differences.size // _MORE, 1))
      # The entropy of the octave, given the class, and the bits below the highest one.
      octaves = np.frexp(np.abs(differences[some].astype(np.float64)))[1]
      places = self.classes[some].astype(int) * 64 + octaves
      counts = np.bincount(places, minlength=256 * 64).reshape(256, 64)
      whole = counts.sum(axis=1, keepdims=True)
      entropy = (counts * np.log2(np.maximum(whole, 1) / np.maximum(counts, 1))).sum()
      bits = (entropy + octaves.sum()) * differences.size / octaves.size
    # Scales and factors take about a byte of two each.
    return bits / 8 + sum(x.nbytes for x in arrays.values()) / 2 + _LEAF_BYTES


def beside(
  target: np.ndarray,
  array: np.ndarray,
  known: entries.BaseArray | products.Product | None = None,
) -> Measured | None:
  """Returns how to store an array beside a known one, of an entry of the manifest.

  The result is None if the array takes fewer bytes alone, or cannot be stored so.
  """
  target, dtype = host.contiguous(target), target.dtype
  if not difference.fits(target.shape, dtype, array.shape, array.dtype):
    return None
  bits = ulps.bits_of(target)
  base = difference.known_bits(array, target.shape, dtype)
  draft = difference.Difference(lengths=target.shape, name=dtype.name)
  places = _changed(bits, base)
  if places is not None:
    measured = Measured(_with_few(draft, bits[places], base[places], places))
  elif bits.size < _LEAST or dtype.itemsize > 4:
    return None
  else:
    measured = with_classes(draft, bits, base)
    sample = target.reshape(-1)[:: -(-target.size // _SAMPLE)]
    alone = coder.estimate([sample.view(entries.stored_dtype(dtype.name))])
    if measured.estimate() > _MOST_SHARE * alone * target.size / sample.size:
      return None
  nbytes = structured.count_bytes(measured.leaf)
  if entries.is_too_short(target.size, array.size, nbytes):
    return None
  return measured._replace(known=known, crc32=checksums.of_array(target))


def beside_head(
  table: np.ndarray,  # the embedding [V, d], float16 or bfloat16
  head: np.ndarray,  # [D, V], finite
  map: np.ndarray,  # int32 [D, d], below 2^23 in absolute value
  exponents: np.ndarray,  # integers [D]; row k of T is 2^-exponents[k] map[k]
) -> Measured:
  """Returns how to store an embedding beside its product with the head."""
  scale, shifts = tied.scale_of(head, map, exponents)
  product = tied.product(head, map, shifts, scale, table.dtype)
  draft = difference.Difference(
    lengths=table.shape, name=table.dtype.name, map=map, shifts=shifts, scale=scale
  )
  return with_classes(draft, ulps.bits_of(table), ulps.bits_of(product))


# ---- few differences -----------------------------------------------------------------


def _changed(bits: np.ndarray, base: np.ndarray) -> np.ndarray | None:
  """Returns the indices of changed elements; None if there are many."""
  some = slice(None, None, -(-bits.size // _FEW) or 1)
  sample = bits[some] != base[some]
  if np.count_nonzero(sample) > _SPARSE * sample.size:
    return None
  job = lambda part: np.flatnonzero(bits[part] != base[part]) + part.start
  changed = difference.in_parts(job, bits.size, 1, pool.run)
  return np.concatenate([np.zeros(0, np.int64), *changed])


def _with_few(
  draft: difference.Difference, bits: np.ndarray, base: np.ndarray, places: np.ndarray
) -> difference.Difference:
  """Returns the leaf of few changed elements at some places."""
  if not places.size:
    return draft
  wide = ulps.differences(bits, base, draft.dtype)
  narrow = wide.astype(np.int8)
  gaps = np.diff(places, prepend=-1) - 1
  ends = np.cumsum(gaps // difference.MOST_GAP + 1)
  cut = np.full(ends[-1], difference.MOST_GAP, np.uint16)
  cut[ends - 1] = gaps % difference.MOST_GAP
  differences = narrow if (narrow == wide).all() else wide
  return dataclasses.replace(draft, differences=differences, gaps=cut)


# ---- differences with classes --------------------------------------------------------


def with_classes(
  draft: difference.Difference, bits: np.ndarray, base: np.ndarray
) -> Measured:
  """Returns a leaf with classes for the bits `[n]` of an array and of the known one.

  Factors and a drift are tried, except beside a product with the head.
  """
  dtype, lengths = draft.dtype, draft.lengths
  width = lengths[-1] if len(lengths) > 1 else bits.size
  if not _LEAST_LINES <= width <= _WIDEST:
    width = bits.size
  leaf, expected = dataclasses.replace(draft, width=width), base
  matrix = lambda x: x.reshape(-1, width)
  is_predicted = draft.map is None and dtype in difference.ROUNDED
  for find in (factors.find, _drift) if is_predicted else ():
    if fields := find(matrix(bits), matrix(expected), dtype):
      leaf = dataclasses.replace(leaf, **fields)
      expected = leaf.predicted_bits(base, pool.run)
  rows, columns = _scales(matrix(bits), matrix(expected), dtype)
  job = lambda part: ulps.differences(bits[part], expected[part], dtype)
  differences = np.concatenate(difference.in_parts(job, bits.size, 1, pool.run))
  leaf = dataclasses.replace(
    leaf, row_scales=rows, column_scales=columns, differences=differences
  )
  return Measured(leaf, leaf.classes(expected, pool.run))


def _drift(bits: np.ndarray, known: np.ndarray, dtype: np.dtype) -> dict[str, Any]:
  """Finds the `drift` of elements `[R, C]`; nothing if it saves little."""
  mantissa, some = ulps.MANTISSA_BITS[dtype], slice(None, None, -(-bits.size // _FEW))
  bits, known = (x.reshape(-1)[some] for x in (bits, known))
  off = ulps.differences(bits, known, dtype).astype(np.int64)
  places = difference.drift_places(known, mantissa)
  order = np.lexsort((off, places))
  counts = np.bincount(places, minlength=difference.DRIFTS)
  middle = np.minimum(np.cumsum(counts) - (counts + 1) // 2, off.size - 1)
  drift = np.where(counts, off[order[middle]], 0)
  saved = np.log2((1.0 + abs(off)) / (1 + abs(off - drift[places]))).mean()
  if saved < _LEAST_DRIFT or np.abs(drift).max() >= 1 << mantissa:
    return {}
  return {'drift': drift.astype(np.int32)}


def _scales(
  bits: np.ndarray, known: np.ndarray, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
  """Measures the scales of rows and of columns of differences `[R, C]`."""
  rows, columns = bits.shape
  some_rows, some_columns = (
    slice(None, None, max(length // _LINES, 1)) for length in bits.shape
  )

  def roots_of(*part: slice) -> np.ndarray:
    # Few large differences change the mean of roots little.
    return np.sqrt(np.abs(factors.floats(bits[part], known[part], dtype)))

  sample = roots_of(some_rows)
  share, mean = np.count_nonzero(sample) / sample.size, float(sample.mean()) or 1
  of_columns = sample.mean(axis=0, dtype=np.float64) / mean
  if rows < _LEAST_LINES:
    of_columns[:] = 1
  means_of = lambda part: roots_of(part, some_columns).mean(axis=1, dtype=np.float64)
  parts = difference.in_parts(means_of, rows, min(columns, 2 * _LINES))
  of_rows, bias = np.concatenate(parts) / (of_columns[some_columns].mean() or 1), 0
  if (mantissa := ulps.MANTISSA_BITS.get(dtype)) is not None:
    one = int(np.array(1, dtype).view(bits.dtype)) >> mantissa
    bias = 8 * (one + mantissa)
  return _kept(of_rows, bias, share * columns), _kept(of_columns, 0, share * rows)


def _kept(roots: np.ndarray, bias: int, size: float) -> np.ndarray:
  """Returns the scales of lines of a size, or one if they save less than they take."""
  logs = np.round(16 * np.log2(np.maximum(roots, 1e-30)) + bias)
  logs = logs.clip(-difference.MOST_SCALE, difference.MOST_SCALE).astype(np.int16)
  middle = float(np.median(logs))
  far = np.clip(logs - middle, -_FAR, _FAR)
  # Numbers of a scale that is wrong by a factor of e^x take x^2 / ln 2 bits more.
  if size * float(np.square(far).mean()) * math.log(2) / 64 > _SCALE_BITS:
    return logs
  return np.full(1, round(middle), np.int16)

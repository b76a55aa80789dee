"""Chooses how an array is stored relative to a known one, see `structured.difference`.

A fine-tune differs from its base by numbers whose sizes depend on the row and the
column; a step of a training, by few ULPs where these are small.

Shape letters: R rows, C columns. Arrays are given by their bits, see `ulps.bits_of`.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import structured
from rotbits_jax.coding import coder
from rotbits_jax.coding import plans
from rotbits_jax.coding import pool
from rotbits_jax.coding import tables
from rotbits_jax.relative import entries
from rotbits_jax.relative import factors
from rotbits_jax.relative import products
from rotbits_jax.structured import difference
from rotbits_jax.structured import tied
from rotbits_jax.structured import ulps
from rotbits_jax.system import checksums
from rotbits_jax.system import host

_SAMPLE = 1 << 14  # elements that tell most choices
_LEAF_BYTES = 150  # of a leaf besides its arrays
_MOST_SHARE = 0.98  # of the bytes of an array alone, up to which a base is worth it
_SPARSE = 1 / 8  # share of changed elements up to which exponents tell the classes
_MANY = 1 << 15  # elements that tell how uneven rows and columns are
_UNEVEN = 2  # squared variation of rows or columns, beyond chance, up to which they do
_LEAST_DRIFT = 1 / 4  # bits of an element that it saves
_LEAST_LINES = 16  # rows or columns for which scales of columns or rows are kept
_LINES = 1 << 9  # elements of a row, or of a column, that tell its scale
_SCALE_BITS = 9  # of a scale, and what its error in a short line seems to save
_LARGEST = 16  # root of numbers of class 0 in a step; their differences are rarest
_FAR = 24  # eighths of an octave from which scales of lines are equally wrong


class Measured(NamedTuple):
  """How to store an array relative to a known one."""

  leaf: difference.Difference
  group: plans.Group | None = None  # of the differences; None if there are none
  known: entries.BaseArray | products.Product | None = None
  crc32: int = 0  # of the array that the leaf stands for

  def estimate(self) -> float:
    """Estimates the bytes of the arrays of a leaf with differences."""
    assert self.group is not None
    arrays = dataclasses.replace(self.leaf, differences=None).stored()[1]
    return self.group.nbytes + coder.estimate([*arrays.values()])


def beside(
  target: np.ndarray,
  array: np.ndarray,
  known: entries.BaseArray | products.Product | None = None,
) -> Measured | None:
  """Returns how to store an array beside a known one; None if better alone."""
  target, dtype = host.contiguous(target), target.dtype
  base = difference.known_bits(array, target.shape, dtype)
  if base is None:
    return None
  bits = ulps.bits_of(target)
  draft = difference.Difference(lengths=target.shape, name=dtype.name)
  changed = _changed(draft, bits, base)
  if changed is not None and not changed.any():
    measured = Measured(draft)
  elif dtype.itemsize > 4:
    return None
  elif changed is not None:
    flags = None if changed.all() else np.packbits(changed, bitorder='little')
    scale = 2 * difference.LOWEST + _scale_of(_LARGEST, dtype)
    leaf = dataclasses.replace(draft, changed=flags, common_scale=int(scale))
    measured = _measured(leaf, *map(leaf.changed_part, (bits, base)))
  else:
    measured = with_classes(draft, bits, base)
    # Scales and factors are there only where they save more than they take.
    some = slice(None, None, -(-target.size // _SAMPLE))
    alone = target.reshape(-1)[some].view(entries.stored_dtype(dtype.name))
    assert measured.group is not None
    nbytes = measured.group.nbytes * alone.size / target.size
    counts = np.unique(bits[some][::4], return_counts=True)[1]
    is_clear = 4 * nbytes < tables.entropy_bits(counts)  # half of what values take
    if not is_clear and nbytes + _LEAF_BYTES > _MOST_SHARE * coder.estimate([alone]):
      return None
  nbytes = structured.count_bytes(measured.leaf)
  measured = measured._replace(known=known, crc32=checksums.of_array(target))
  return None if entries.is_too_short(target.size, array.size, nbytes) else measured


def beside_head(
  table: np.ndarray,  # the embedding [V, d], float16 or bfloat16
  head: np.ndarray,  # [D, V], finite
  map: np.ndarray,  # int16 [D, d]
  scale: int,  # T is 2^-scale map
) -> Measured:
  """Returns how to store an embedding beside its product with the head."""
  product = tied.product(head, map, scale, table.dtype, pool.run)
  draft = difference.Difference(
    lengths=table.shape, name=table.dtype.name, map=map, scale=scale
  )
  return with_classes(draft, ulps.bits_of(table), ulps.bits_of(product))


# ---- few differences -----------------------------------------------------------------


def _width(shape: tuple[int, ...]) -> int:
  """Returns the columns of an array as a matrix; 1 if these have no scales."""
  width = shape[-1] if len(shape) > 1 else 1
  return width if width >= _LEAST_LINES else 1


def _changed(
  draft: difference.Difference, bits: np.ndarray, base: np.ndarray
) -> np.ndarray | None:
  """Returns whether blocks differ; None if many elements do, or mostly some rows'."""
  some = slice(None, None, -(-bits.size // _SAMPLE) or 1)
  if np.count_nonzero(bits[some] != base[some]) > _SPARSE * bits[some].size:
    return None
  differs = lambda part: (bits[part] != base[part]).any()
  changed = np.array(difference.in_parts(differs, bits.size, 1, pool.run), bool)
  if (width := _width(draft.lengths)) == 1 or not changed.any():
    return changed
  rows = np.flatnonzero(changed[np.arange(0, bits.size, width) // difference.BLOCK])
  rows = rows[:: max(rows.size * width // _MANY, 1)]
  target, known = (x.reshape(-1, width)[rows] for x in (bits, base))
  sample, exponents = target != known, ulps.exponents(known, draft.dtype)
  flat = exponents.reshape(-1)
  rates = np.bincount(flat, sample.reshape(-1)) / np.maximum(np.bincount(flat), 1)
  for axis in (0, 1):
    counts, means = sample.sum(axis), rates[exponents].sum(axis)
    if np.square(counts - means).sum() > (means + _UNEVEN * means**2).sum():
      return None
  return changed


def _scale_of(roots: Any, dtype: np.dtype | None = None) -> Any:
  """Returns scales in eighths of an octave, given roots of differences or of ratios."""
  bias, mantissa = 0, ulps.MANTISSA_BITS.get(dtype)
  if mantissa is not None:
    bias = 8 * ((int(ulps.bits_of(np.array(1, dtype))[0]) >> mantissa) + mantissa)
  scales = np.round(16 * np.log2(np.maximum(roots, 1e-30)) + bias)
  return scales.clip(-difference.MOST_SCALE, difference.MOST_SCALE).astype(np.int16)


# ---- differences with classes --------------------------------------------------------


def with_classes(
  draft: difference.Difference, bits: np.ndarray, base: np.ndarray
) -> Measured:
  """Returns a leaf with classes for the bits `[n]` of an array and of the known one.

  Factors and a drift are tried, except beside a product with the head.
  """
  dtype, width = draft.dtype, _width(draft.lengths)
  leaf, expected = dataclasses.replace(draft, width=width), base
  matrix = lambda x: x.reshape(-1, width)
  is_predicted = draft.map is None and dtype in difference.ROUNDED
  for find in (factors.find, _drift) if is_predicted else ():
    if fields := find(matrix(bits), matrix(expected), dtype):
      leaf = dataclasses.replace(leaf, **fields)
      expected = leaf.predicted_bits(base, pool.run)
  scales = _scales(matrix(bits), matrix(expected), dtype)
  return _measured(dataclasses.replace(leaf, **scales), bits, expected)


def _measured(
  leaf: difference.Difference, bits: np.ndarray, known: np.ndarray
) -> Measured:
  """Returns a leaf with all differences, and their group."""
  differences, of = np.empty_like(bits), ulps.differences
  job = lambda x: np.copyto(differences[x], of(bits[x], known[x], leaf.dtype))
  difference.in_parts(job, bits.size, 1, pool.run)
  leaf = dataclasses.replace(leaf, differences=differences)
  return Measured(leaf, plans.of_known(differences, leaf.classes(known, pool.run)))


def _drift(bits: np.ndarray, known: np.ndarray, dtype: np.dtype) -> dict[str, Any]:
  """Finds the `drift` of elements `[R, C]`; nothing if it saves little."""
  mantissa, some = (
    ulps.MANTISSA_BITS[dtype],
    slice(None, None, -(-bits.size // _SAMPLE)),
  )
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


def _scales(bits: np.ndarray, known: np.ndarray, dtype: np.dtype) -> dict[str, Any]:
  """Measures the scales of differences `[R, C]`; those of lines only where they pay."""
  rows, columns = bits.shape
  some_rows, some_columns = (
    slice(None, None, max(length // _LINES, 1)) for length in bits.shape
  )

  def roots_of(*part: slice) -> np.ndarray:
    # Few large differences change the mean of roots little.
    return np.sqrt(np.abs(factors.floats(bits[part], known[part], dtype)))

  sample = roots_of(some_rows)
  share, mean = np.count_nonzero(sample) / sample.size, float(sample.mean()) or 1
  scales: dict[str, Any] = {'common_scale': int(_scale_of(mean, dtype))}
  of_columns = sample.mean(axis=0, dtype=np.float64) / mean
  if rows < _LEAST_LINES:
    of_columns[:] = 1
  if columns > 1:
    means_of = lambda part: roots_of(part, some_columns).mean(axis=1, dtype=np.float64)
    parts = difference.in_parts(means_of, rows, min(columns, 2 * _LINES))
    of_rows = np.concatenate(parts) / (of_columns[some_columns].mean() or 1) / mean
    lines = ('row_scales', of_rows, columns), ('column_scales', of_columns, rows)
    for name, roots, size in lines:
      of_lines = _scale_of(roots)
      far = np.clip(of_lines - np.median(of_lines), -_FAR, _FAR)
      # Numbers of a scale that is wrong by a factor of e^x take x^2 / ln 2 bits more.
      saved = share * size * float(np.square(far).mean()) * math.log(2) / 64
      scales[name] = of_lines if saved > _SCALE_BITS else None
  return scales

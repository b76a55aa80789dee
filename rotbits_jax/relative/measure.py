"""Chooses how an array is stored relative to a known one, see `structured.difference`.

A fine-tune differs from its base by numbers whose sizes depend on the row and the
column; a step of a training, by few ULPs where these are small.

Shape letters: R rows, C columns. Arrays are given by their bits, see `ulps.bits_of`.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import pool
from rotbits_jax import structured
from rotbits_jax.coding import coder
from rotbits_jax.coding import plans
from rotbits_jax.coding import scales as scales_lib
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
_SPARSE = 1 / 4  # share of changed elements up to which exponents tell the classes
_RUN = 1 << 6  # neighbours of a sample, because a processor reads as many at once
_MANY = 1 << 15  # elements that tell how uneven rows and columns are
_UNEVEN = 2  # squared variation of rows or columns, beyond chance, up to which they do
_LEAST_DRIFT = 1 / 4  # bits of an element that it saves
_LEAST_LINES = 16  # rows or columns for which scales of columns or rows are kept
_LINES = 1 << 9  # elements of a row, or of a column, that tell its scale
_SCALE_BITS = 9  # of a scale, and what its error in a short line seems to save
_FAR = 12  # quarters of an octave from which scales of lines are equally wrong


class Measured(NamedTuple):
  """How to store an array relative to a known one. Checksums wait for the coding."""

  leaf: difference.Difference
  near: plans.Known | None = None  # relative to which elements are coded
  known: entries.BaseArray | products.Product | None = None
  crc32: Callable[[], int] = lambda: 0  # of the array that the leaf stands for
  of_known: Callable[[], int] = lambda: 0  # that of the base's array

  def estimate(self) -> float:
    """Estimates the bytes of the arrays of a leaf."""
    arrays = self.leaf.stored()[1]
    near = {i: self.near for i, x in enumerate(arrays) if x == 'elements' and self.near}
    return coder.estimate([*arrays.values()], near)


def beside(target: np.ndarray, array: np.ndarray) -> Measured | None:
  """Returns how to store an array beside a known one; None if better alone."""
  target = host.contiguous(target)
  base = difference.known_bits(array, target.shape, target.dtype)
  if base is None or (measured := _measured(target, base)) is None:
    return None
  nbytes, near = structured.count_bytes(measured.leaf), measured.near
  crc32 = functools.cache(lambda: checksums.of_array(target))
  if near is not None and measured.leaf.changed is None:  # all elements
    near = near._replace(crc32=crc32)
  measured = measured._replace(near=near, crc32=crc32)
  return None if entries.is_too_short(target.size, array.size, nbytes) else measured


def _measured(target: np.ndarray, base: np.ndarray) -> Measured | None:
  """Returns a result of `beside` without what it tells of the arrays."""
  bits, dtype = ulps.bits_of(target), target.dtype
  draft = difference.Difference(lengths=target.shape, name=dtype.name)
  changed = _changed(draft, bits, base)
  if changed is not None and not changed.any():
    return Measured(draft)
  if dtype.itemsize > 4:
    return None
  if changed is not None:
    flags = None if changed.all() else np.packbits(changed, bitorder='little')
    leaf = dataclasses.replace(draft, changed=flags)
    return with_elements(leaf, bits, base, is_sparse=True)
  measured = predicted(draft, bits, base)
  # Scales and factors are there only where they save more than they take.
  some = slice(None, None, -(-target.size // _SAMPLE))
  alone = target.reshape(-1)[some].view(entries.stored_dtype(dtype.name))
  nbytes = measured.estimate() * alone.size / target.size
  counts = np.unique(bits[some][::4], return_counts=True)[1]
  is_clear = 4 * nbytes < tables.entropy_bits(counts)  # half of the bytes alone
  most = math.inf if is_clear else _MOST_SHARE * coder.estimate([alone])
  return measured if nbytes + _LEAF_BYTES <= most else None


def beside_head(
  table: np.ndarray,  # the embedding [V, d], float16 or bfloat16
  head: np.ndarray,  # [D, V], finite
  map: np.ndarray,  # int16 [D, d]
  scale: int,  # T is 2^-scale map
) -> Measured:
  """Returns how to store an embedding beside its product with the head."""
  product = tied.product(head, map, scale, table.dtype)
  draft = difference.Difference(
    lengths=table.shape, name=table.dtype.name, map=map, scale=scale
  )
  return with_elements(draft, ulps.bits_of(table), ulps.bits_of(product))


def _width(shape: tuple[int, ...]) -> int:
  """Returns the columns of an array as a matrix; 1 if these have no scales."""
  width = shape[-1] if len(shape) > 1 else 1
  return width if width >= _LEAST_LINES else 1


def _changed(
  draft: difference.Difference, bits: np.ndarray, base: np.ndarray
) -> np.ndarray | None:
  """Returns whether blocks differ; None if many elements do, or mostly some rows'."""
  run, step = math.gcd(bits.size, _RUN), -(-bits.size // _MANY) or 1
  differs = np.not_equal(*(x.reshape(-1, run)[::step] for x in (bits, base)))
  if np.count_nonzero(differs) > _SPARSE * differs.size:
    return None
  block = difference.BLOCK
  changed = np.zeros(-(-bits.size // block), bool)
  changed[step * run * np.flatnonzero(differs.any(axis=1)) // block] = True
  parts = [slice(i, i + block) for i in block * np.flatnonzero(~changed)]
  changed[~changed] = pool.each(lambda x: (bits[x] != base[x]).any(), parts)
  if (width := _width(draft.lengths)) == 1 or not changed.any():
    return changed
  rows = np.flatnonzero(changed[np.arange(0, bits.size, width) // block])
  rows = rows[:: max(rows.size * width // _MANY, 1)]
  target, known = (x.reshape(-1, width)[rows] for x in (bits, base))
  sample, exponents = target != known, ulps.exponents(known, draft.dtype, np)
  flat = exponents.reshape(-1)
  rates = np.bincount(flat, sample.reshape(-1)) / np.maximum(np.bincount(flat), 1)
  expected = rates[exponents]
  for axis in (0, 1):
    counts, means = sample.sum(axis), expected.sum(axis)
    if np.square(counts - means).sum() > (means + _UNEVEN * means**2).sum():
      return None
  return changed


def predicted(
  draft: difference.Difference, bits: np.ndarray, base: np.ndarray
) -> Measured:
  """Returns a leaf with all elements, and with factors and a drift where they pay.

  `bits` `[n]` are those of the array and of the known one.
  """
  dtype, leaf, expected = draft.dtype, draft, base
  matrix = lambda x: x.reshape(-1, _width(draft.lengths))
  for find in (factors.find, _drift) if dtype in difference.ROUNDED else ():
    if fields := find(matrix(bits), matrix(expected), dtype):
      leaf = dataclasses.replace(leaf, **fields)
      expected = leaf.predicted_bits(base)
  return with_elements(leaf, bits, expected)


def with_elements(
  leaf: difference.Difference,
  bits: np.ndarray,
  known: np.ndarray,
  *,
  is_sparse: bool = False,
) -> Measured:
  """Returns a leaf with elements, given their bits and those of the known ones.

  Rows and columns of a sparse step have no scales.
  """
  shape, dtype = leaf.lengths, difference.coded_dtype(leaf.dtype)
  if leaf.changed is not None:
    bits, known = map(leaf.changed_part, (bits, known))
    shape = bits.shape
  elements: np.ndarray = bits.view(dtype).reshape(shape)  # type: ignore[arg-type]
  lines = _lines(elements, known, is_sparse)
  near = plans.Known(known.view(f'u{known.itemsize}'), lines)
  return Measured(dataclasses.replace(leaf, elements=elements), near)


def of_leaf(leaf: difference.Difference, *needed: Any) -> Measured:
  """Returns how a leaf is stored beside its known array, given the arrays it needs."""
  known = leaf.known(*needed)
  array = leaf.joined(known)
  measured = with_elements(leaf, ulps.bits_of(array), known)
  return measured._replace(crc32=lambda: checksums.of_array(array))


def _drift(bits: np.ndarray, known: np.ndarray, dtype: np.dtype) -> dict[str, Any]:
  """Finds the `drift` of elements `[R, C]`; nothing if it saves little."""
  mantissa = ulps.FORMATS[dtype].nmant
  some = slice(None, None, -(-bits.size // _SAMPLE))
  bits, known = (x.reshape(-1)[some] for x in (bits, known))
  off = bits.astype(np.int64) - known
  places = difference.drift_places(known, mantissa)
  order = np.lexsort((off, places))
  counts = np.bincount(places, minlength=difference.DRIFTS)
  middle = np.minimum(np.cumsum(counts) - (counts + 1) // 2, off.size - 1)
  drift = np.where(counts, off[order[middle]], 0)
  saved = np.log2((1.0 + abs(off)) / (1 + abs(off - drift[places]))).mean()
  if saved < _LEAST_DRIFT or np.abs(drift).max() >= 1 << mantissa:
    return {}
  return {'drift': drift.astype(np.int32)}


def _lines(
  elements: np.ndarray, known: np.ndarray, is_sparse: bool
) -> scales_lib.Lines:
  """Measures the sizes of differences from known bits; of lines only where they pay.

  They are in quarter octaves, relative to the least ULP of the dtype.
  """
  shape, dtype = elements.shape, elements.dtype
  width = math.gcd(elements.size, _RUN) if is_sparse else _width(shape)
  bits, known = (x.reshape(-1, width) for x in (ulps.bits_of(elements), known))
  some_rows = slice(None, None, max(len(bits) // max(_LINES, _MANY // width), 1))
  some_columns = slice(None, None, max(width // _LINES, 1))
  least = 0  # quarter octaves from the least ULP to 1
  if form := ulps.FORMATS.get(dtype):
    least = scales_lib.STEPS * ((1 << form.nexp - 1) - 1 + form.nmant)

  def roots_of(*part: slice) -> np.ndarray:
    # Few large differences change the mean of roots little.
    return np.sqrt(np.abs(factors.floats(bits[part], known[part], dtype)))

  def quarters(roots: Any) -> np.ndarray:
    octaves = 2 * np.log2(np.maximum(roots, 1e-30))  # finite if nothing differs
    return np.rint(scales_lib.STEPS * octaves).astype(int)

  sample = roots_of(some_rows)
  if is_sparse:
    # The size by which numbers move, of which rounding leaves few. Two octaves
    # less, because they move alike: bins hold more of them, and raw bits take time.
    root = np.sqrt(np.square(sample).mean(dtype=np.float64, keepdims=True))
    return quarters(root).reshape(-1) + least - 2 * scales_lib.STEPS, np.zeros(1, int)
  share, mean = np.count_nonzero(sample) / sample.size, float(sample.mean())
  lines = [np.zeros(1, int), np.zeros(1, int)]
  if width > 1 and mean > 0:
    of_columns = sample.mean(axis=0, dtype=np.float64) / mean
    if len(bits) < _LEAST_LINES:
      of_columns[:] = 1
    means_of = lambda part: roots_of(part, some_columns).mean(axis=1, dtype=np.float64)
    parts = difference.in_parts(means_of, len(bits), min(width, 2 * _LINES))
    of_rows = np.concatenate(parts) / (of_columns[some_columns].mean() or 1) / mean
    for axis, roots in enumerate((of_rows, of_columns)):
      scales = quarters(roots)
      far = np.clip(scales - np.median(scales), -_FAR, _FAR)
      # Numbers of a scale that is wrong by a factor of e^x take x^2 / ln 2 bits more.
      size = share * elements.size / roots.size
      if size * np.square(far).mean() * math.log(2) / 16 > _SCALE_BITS:
        lines[axis] = scales
  return lines[0] + quarters(mean) + least, lines[1]

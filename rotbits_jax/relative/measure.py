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
from rotbits_jax.coding import buffers
from rotbits_jax.coding import given
from rotbits_jax.coding import line_sums
from rotbits_jax.coding import pool
from rotbits_jax.coding import tables
from rotbits_jax.relative import factors as factors_lib
from rotbits_jax.relative import scales as scales_lib
from rotbits_jax.structured import division
from rotbits_jax.structured import relative
from rotbits_jax.structured import ulps

_SAMPLE = 1 << 15  # elements by which leaves are compared
_PART = 1 << 18  # elements that fit a cache
_FIRST = 16  # columns that most often tell that a row differs
_SPARSE = 1 / 16  # the greatest share of changed elements of a patch
_OCTAVE = 4  # levels
_LOWEST = -6 * _OCTAVE  # differences of 2^-6 ULPs and less share a class
_FEW = 1 << 14  # elements that tell a drift, or how often an exponent changes
_LEAST_DRIFT = 1 / 4  # of the elements move one way more than the other; bits it saves
_LEAST = 1 << 12  # elements of an array for which classes are worth their arrays
_LEAF_BITS = 8 * 60  # of a leaf beside its arrays


def beside(target: np.ndarray, base: np.ndarray, run: pool.Run = pool.in_turn) -> Any:
  """Returns the leaf that stores an array beside one of a base.

  Args:
    target: the array.
    base: an array of the base.
    run: runs jobs for parts of the array, such as `pool.run`.

  Returns:
    A structured leaf; None if the array takes fewer bytes alone, or cannot be stored
    beside this base.
  """
  dtype = target.dtype
  if not relative.fits(target.shape, dtype, base.shape, base.dtype):
    return None
  bits = relative.bits_of(target)
  known = relative.base_bits(base, target.shape, dtype)
  places = _changed(bits, known, run)
  if places is None:
    if dtype.itemsize > 4:
      return None
  elif not places.size:
    return structured.Same(target.shape, dtype.name)
  elif dtype.itemsize > 4 or _is_sparse(known, places, dtype):
    return structured.Patched.of(target, known, places, run)
  if bits.size < _LEAST:
    return None
  return _relative(target, bits, known, _bits_alone(bits, dtype), run)


def _changed(bits: np.ndarray, base: np.ndarray, run: pool.Run) -> np.ndarray | None:
  """Returns the indices of changed elements; None if there are many."""
  some = slice(None, None, -(-bits.size // _FEW) or 1)
  if np.count_nonzero(bits[some] != base[some]) > 2 * _SPARSE * _FEW:
    return None

  def job(start: int) -> np.ndarray:
    found = [np.zeros(0, np.int64)]
    for i in range(start, min(start + buffers.ROOM, bits.size), _PART):
      changed = bits[i : i + _PART] != base[i : i + _PART]
      if changed.any():
        found.append(np.flatnonzero(changed) + i)
    return np.concatenate(found)

  starts = range(0, bits.size, buffers.ROOM)
  found = run([functools.partial(job, start) for start in starts])
  places = np.concatenate([np.zeros(0, np.int64), *found])
  return places if places.size <= _SPARSE * bits.size else None


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


def _relative(
  target: np.ndarray,
  bits: np.ndarray,
  base: np.ndarray,
  alone: float,
  run: pool.Run,
) -> structured.Relative | None:
  """Returns the leaf of differences; None if it takes more bits than `alone`."""
  dtype = target.dtype
  width = target.shape[-1] if target.ndim > 1 else bits.size
  if not scales_lib.LEAST_LINES <= width <= buffers.ROOM:
    width = bits.size
  if width > relative.LONGEST:
    return None
  wanted, known = bits.reshape(-1, width), base.reshape(-1, width)
  own = _differing(wanted, known)
  factors = factors_lib.find(wanted, known, dtype, run)
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
  known = draft.predicted(base, some, run)
  wanted = wanted if whole else wanted[own]
  if (drift := _drift(wanted.reshape(-1), known.reshape(-1), dtype)) is not None:
    draft = dataclasses.replace(draft, drift=drift)
    known = draft.predicted(base, some, run)
  rows = np.full(bits.size // width, relative.EQUAL, np.int16)
  rows[own], columns = scales_lib.scales(wanted, known, dtype, run)
  head = relative.Head(rows, columns, *np.zeros((2, 0), np.uint8))
  return _coded(draft, head, wanted.reshape(-1), known, alone, run)


def _differing(bits: np.ndarray, known: np.ndarray) -> np.ndarray:
  """Returns the indices of the rows that differ."""
  # Most rows differ at once.
  found = (bits[:, :_FIRST] != known[:, :_FIRST]).any(axis=1)
  if not found.all():
    parts = line_sums.row_parts(bits.shape, _PART)
    found = np.concatenate([(bits[x] != known[x]).any(axis=1) for x in parts])
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


def _coded(
  leaf: structured.Relative,
  head: relative.Head,
  bits: np.ndarray,
  known: np.ndarray,
  alone: float,
  run: pool.Run,
) -> structured.Relative | None:
  """Codes the differences; returns None if they take too many bits.

  Args:
    leaf: a draft, with factors.
    head: has the scales.
    bits: bits of the rows that differ, `[n]`.
    known: the bits that predict them, `[r, C]`.
    alone: the most bits.
    run: see `beside`.
  """
  dtype, mantissa = leaf.dtype, relative.mantissa_bits(leaf.dtype)
  # Differences in the last class are more than half of a number.
  width = 8 * dtype.itemsize
  highest = width if mantissa is None else mantissa - 1
  levels = np.arange(leaf.first, highest * _OCTAVE)
  shifts = [*division.shifts_of(levels, width).tolist(), width - 8]
  sums = head.sums(dtype, leaf.first)
  made = _symbols(bits, known.reshape(-1), sums, leaf.first, shifts, dtype, run)
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
    made.symbols,
    made.raw,
    made.classes,
    head.of_classes,
    frequencies,
    of_bands,
    run=run,
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
  run: pool.Run,
) -> _Symbols:
  """Divides elements `[n]` into symbols and raw bits, see `structured.Relative`."""
  kind = division.Kind.of(dtype, relative.mantissa_bits(dtype))
  last, first_raw = len(shifts) - 1, shifts.count(0)
  classes, symbols = np.empty((2, bits.size), np.uint8)

  def job(part: slice) -> tuple[given.Raw, np.ndarray, np.ndarray]:
    fill = functools.partial(sums.write, part.start)
    own = bits[part]
    made = division.divide(own, known[part], fill, kind, first, last)
    classes[part], symbols[part] = made.classes, made.symbols
    (at,) = np.nonzero(made.classes >= first_raw)
    raw = given.Raw(made.classes[at], made.raw[at])
    counts = made.counts[: len(shifts)].astype(np.int64)
    values = own[made.symbols == 0] if counts[:, 0].any() else own[:0]
    return raw, values, counts

  jobs = [functools.partial(job, part) for part, _ in given.parts(bits.size)]
  raw, values, counts = zip(*run(jobs), strict=True)
  return _Symbols(
    classes, symbols, list(raw), np.concatenate(values), np.sum(counts, axis=0)
  )


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

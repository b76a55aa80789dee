"""Plans: chooses how each array of a record is stored.

An array is coded as it is or as several parts, see `sparse`. Parts of one layout form a
group, which shares frequency tables. A part that coding does not make smaller is stored
as it is. Scales, shifts and frequencies follow from samples: they only decide how many
bytes the numbers take.

Shape letters: n units, S numbers of a unit, N classes, K tables, A symbols.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax.coding import contexts as contexts_lib
from rotbits_jax.coding import formats
from rotbits_jax.coding import layouts
from rotbits_jax.coding import pool
from rotbits_jax.coding import scales as scales_lib
from rotbits_jax.coding import sparse
from rotbits_jax.coding import tables
from rotbits_jax.system import host

_FLOATS = 1 << 16  # units that tell frequencies
_INTEGERS = 1 << 20  # units of integers, because these have more tables
_SPARSE = 4  # part of these that suffices if most integers are 0
_LEAST_SAMPLE = 1 << 12  # units of a part
_SMALL = 1 << 12  # numbers of parts without finer bins
_RARE = 1 << 17  # a symbol that is rarer than one in so many is an exception
_GROUP_BYTES = 100  # of a group in the spec and of a block without words, about
_RAISED_CLASSES = 32  # of a part that shares a step
_OCTAVES = 63  # from the least scale of a group to the greatest
_BELOW = 4  # octaves from the scale of the first of them to the minimum exponent
_BINS_BELOW, _SEEN = 96, 128  # bins below the scale and in all that the window is among
_FINER_BYTES = 400  # that finer bins must save
_SHIFTED = 3  # octaves of the mean size of signed integers that symbols tell
_PLACE_BITS = 24  # of an exception, and those of the unit


class Part(NamedTuple):
  """A part of an array."""

  array: int  # index of the array in the record
  part: int  # index of the part in the array
  numbers: np.ndarray  # the part, contiguous


class Group(NamedTuple):
  """Parts of one layout, coded together."""

  layout: layouts.Layout
  contexts: contexts_lib.Contexts  # the classes of each part, and the tables
  parts: list[Part]
  nbytes: list[float]  # about how many bytes each part takes


class Plan(NamedTuple):
  """How the arrays of a record are stored."""

  arrays: list[np.ndarray]  # the arrays in C order
  zeros: list[sparse.Sparse | None]  # of arrays that are stored without their zeros
  groups: list[Group]  # the groups of parts that are coded
  plain: list[Part]  # the parts that are stored as they are


class _Draft(NamedTuple):
  """How a part is coded."""

  part: Part
  layout: layouts.Layout
  scales: contexts_lib.Scales  # their base may be any integer, unless classes are known
  min_exponent: int = 0  # of floats that share a step

  @property
  def span(self) -> int:
    """The number of classes."""
    return self.scales.greatest - self.scales.base + 1


def make(arrays: Sequence[np.ndarray], known: Mapping[int, np.ndarray]) -> Plan:
  """Plans a record of arrays; of the integers of some the classes are known."""
  whole = pool.each(host.contiguous, arrays)
  zeros, forms = [], pool.each(_divided, whole)
  parts: list[Part] = []
  for i, (form, numbers) in enumerate(forms):
    zeros.append(form)
    parts += [Part(i, j, x) for j, x in enumerate(numbers)]
  drafts = pool.each(_draft, [x for x in parts if x.array not in known])
  groups = pool.each(_group, _by_layout([x for x in drafts if x]))
  groups = [x for x in map(_smaller, groups) if x]
  for i, classes in known.items():
    (part,) = (x for x in parts if x.array == i)
    if classes.dtype != np.uint8 or classes.size != part.numbers.size:
      raise ValueError(
        f'{part.numbers.size} integers cannot have {classes.size} classes'
      )
    part = part._replace(numbers=part.numbers.reshape(-1, 1))
    scales = contexts_lib.known_scales(classes)
    draft = _Draft(part, layouts.Integers(part.numbers.dtype, 0), scales)
    some = part.numbers[:: -(-part.numbers.size // _LEAST_SAMPLE)]
    large = np.count_nonzero(np.abs(some.astype(np.int64)) >= layouts.WINDOW // 2)
    is_sparse = 8 * np.count_nonzero(some) + 8000 * large < some.size
    group = _group([draft], _SPARSE if is_sparse else 1, is_sparse=is_sparse)
    groups.append(group._replace(contexts=group.contexts._replace(is_known=True)))
  coded = {x[:2] for group in groups for x in group.parts}
  return Plan(whole, zeros, groups, [x for x in parts if x[:2] not in coded])


def _divided(array: np.ndarray) -> tuple[sparse.Sparse | None, list[np.ndarray]]:
  if array.dtype.itemsize == 8:
    return None, [array.reshape(-1).view(np.uint32).reshape(*array.shape, 2)]
  return (sparse.without_zeros(array) if array.size else None) or (None, [array])


def _smaller(group: Group) -> Group | None:
  """Returns the group without parts that coding does not make smaller."""
  plain = [x.numbers.nbytes for x in group.parts]
  kept = [i for i, nbytes in enumerate(group.nbytes) if nbytes < plain[i]]
  saved = sum(plain[i] - group.nbytes[i] for i in kept)
  if saved < len(contexts_lib.to_bytes(group.contexts)) + _GROUP_BYTES:
    return None
  pick = lambda values: [values[i] for i in kept]
  contexts = group.contexts._replace(scales=tuple(pick(group.contexts.scales)))
  return Group(group.layout, contexts, pick(group.parts), pick(group.nbytes))


# ---- layouts and scales --------------------------------------------------------------


def _draft(part: Part) -> _Draft | None:
  """Chooses a layout and scales; None for numbers that have no layout."""
  numbers, min_exponent = part.numbers, 0
  layout: layouts.Layout = layouts.Integers(numbers.dtype, 0)
  if numbers.size and numbers.dtype in layouts.FORMATS:
    bits = sparse.bit_patterns(numbers)
    layout, min_exponent = formats.of_floats(bits, numbers.dtype)
  elif not numbers.size or not layout.is_valid():
    return None
  scales = _scales(numbers, layout, min_exponent)
  draft = _Draft(part, layout, scales, min_exponent)
  choices = [draft]
  if scales.rows.size + scales.columns.size > 2 and layout.dtype.kind != 'u':
    choices.append(draft._replace(scales=scales_lib.shared(scales)))
  may_be_finer = numbers.size > _SMALL and layout.raw_bits > 1
  if may_be_finer or len(choices) > 1:
    costs = {_cost(x): x for x in choices}
    draft = costs[min(costs)]
  if may_be_finer and isinstance(layout, layouts.Floats):
    finer = dataclasses.replace(layout, raw_bits=layout.raw_bits - 1, top=2)
    fine = draft._replace(layout=finer)
    draft = fine if _cost(fine) + _FINER_BYTES < min(costs) else draft
  return draft


def _scales(
  array: np.ndarray, layout: layouts.Layout, min_exponent: int
) -> contexts_lib.Scales:
  """Measures a part. The least class of numbers that share a step is 0."""
  if isinstance(layout, layouts.Floats):
    scales = scales_lib.measure(array)
    if layout.raised:
      base = scales.base - scales_lib.STEPS * (min_exponent - _BELOW)
      scales = scales_lib.within(scales._replace(base=base), 0, _RAISED_CLASSES - 1)
    return scales
  if layout.bias:
    return scales_lib.measure(array)
  # The low and the high bits of 64 have a class each.
  classes = np.arange(2 if array.shape[-1:] == (2,) else 1, dtype=np.uint8)
  return contexts_lib.Scales(0, np.zeros(1, np.uint8), classes)


def _by_layout(drafts: Sequence[_Draft]) -> list[list[_Draft]]:
  """Puts parts of one layout together, those that share a step as long as they fit."""
  groups: dict[Any, list[_Draft]] = {}
  spans: dict[layouts.Layout, int] = {}
  for draft in drafts:
    span = spans.get(draft.layout, 0) + draft.span * draft.layout.raised
    spans[draft.layout] = span
    key = draft.layout, span // (contexts_lib.CLASSES - _RAISED_CLASSES)
    groups.setdefault(key, []).append(draft)
  return list(groups.values())


def _cost(draft: _Draft) -> float:
  """Returns about the bytes of a part with tables of its own."""
  group = _group([draft], 16)
  scales = sum(tables.entropy_bits(np.bincount(x)) for x in draft.scales[1:]) / 8
  return group.nbytes[0] + np.count_nonzero(group.contexts.frequencies) + scales


# ---- classes and tables --------------------------------------------------------------


def _group(
  drafts: list[_Draft], fraction: int = 1, *, is_sparse: bool = False
) -> Group:
  """Chooses the classes and the tables of parts of one layout by samples of them."""
  layout = drafts[0].layout
  scales, levels, octave = _classes(drafts)
  is_float = isinstance(layout, layouts.Floats)
  most = (_FLOATS // len(drafts) if is_float else _INTEGERS) // fraction
  samples = [
    _sample(*pair, max(most, _LEAST_SAMPLE))
    for pair in zip(drafts, scales, strict=True)
  ]
  if isinstance(layout, layouts.Integers):
    told = _shifts(samples, layout)[: len(levels)]
    if is_sparse:
      told[:] = 0  # the few large ones are exceptions
    steps = -(-int(told.max()) // layouts.MOST_RAW)
    layout = dataclasses.replace(layout, raw_bits=layouts.MOST_RAW * steps)
    raw_bits = told[:, None]
  else:
    told = np.repeat([x.min_exponent for x in drafts], [x.span for x in drafts])
    raw_bits = np.array(layout.raw_bits)
  counts = [_counts(x, layout, told, octave, len(levels)) for x in samples]
  rows = np.sum(counts, axis=0)
  # The symbols are those that occur most.
  ends = np.cumsum(np.append(0, rows.sum(axis=0)))
  first = int(np.argmax(ends[layout.alphabet :] - ends[: -layout.alphabet]))
  window, start = slice(first, first + layout.alphabet), 0
  if layout.most_tables == layouts.QUARTERS:
    table_of, rows, entries = levels, rows[:, window], np.zeros((0, 2), int)
    start = (octave << layout.top) + first - _BINS_BELOW
  else:
    table_of, rows = _merged(rows[:, window], np.argsort(levels, kind='stable'))
    entries = np.stack([table_of, told], 1)
  rows = np.where(rows * _RARE < rows.sum(axis=1, keepdims=True), 0, rows)
  if is_sparse:
    rows = np.maximum(rows, _unseen(rows))
  frequencies = _frequencies(rows, layout)
  exception = _PLACE_BITS + 8 * layout.size * layout.dtype.itemsize
  bits = tables.PRECISION - np.log2(np.maximum(frequencies, 0.5))
  bits = np.where(frequencies > 0, bits, exception)[table_of] + raw_bits
  nbytes = []
  for draft, draft_counts in zip(drafts, counts, strict=True):
    seen = draft_counts[:, window]
    size = draft.part.numbers.size
    numbers = max(size // layout.size, 1) * layout.size  # that are counted
    cost = (seen * bits).sum() + max(numbers - seen.sum(), 0) * exception
    nbytes.append(float(cost * size / numbers) / 8 + 2)
  contexts = contexts_lib.Contexts(tuple(scales), entries, start, frequencies)
  return Group(layout, contexts, [x.part for x in drafts], nbytes)


def _classes(
  drafts: Sequence[_Draft],
) -> tuple[list[contexts_lib.Scales], np.ndarray, int]:
  """Returns scales from class 0 on; the levels of the classes; and the octave of 0."""
  layout, most = drafts[0].layout, contexts_lib.CLASSES - 1
  if layout.raised or layout.dtype.kind == 'u':
    # The classes of the parts follow each other.
    levels = [x.scales.base + np.arange(x.span) for x in drafts]
    ends = itertools.accumulate(x.span for x in drafts)
    bases = [min(end, most + 1) - x.span for x, end in zip(drafts, ends, strict=True)]
    pairs = zip(drafts, bases, strict=True)
    scales = [x.scales._replace(base=base) for x, base in pairs]
    return scales, np.concatenate(levels)[: most + 1], 0
  classes = [y for x in drafts for y in (x.scales.base, x.scales.greatest)]
  octaves = np.array(classes) // scales_lib.STEPS
  # A lower scale may be that of an array of zeros.
  octave = max(int(octaves.min()), int(octaves.max()) - _OCTAVES)
  scales = []
  for draft in drafts:
    base = draft.scales.base - scales_lib.STEPS * octave
    scales.append(scales_lib.within(draft.scales._replace(base=base), 0, most))
  has_quarters = layout.most_tables == layouts.QUARTERS
  number = layouts.QUARTERS if has_quarters else 1 + max(x.greatest for x in scales)
  return scales, np.arange(number), octave


class _Sample(NamedTuple):
  """Units from all over a part."""

  units: np.ndarray  # `[n, S]`
  classes: np.ndarray  # int64 `[n]`
  weight: float  # how many units of the part one of the sample stands for


def _sample(draft: _Draft, scales: contexts_lib.Scales, most: int) -> _Sample:
  """Takes about `most` of the units of a part."""
  numbers, size = draft.part.numbers, draft.layout.size
  flat = numbers.reshape(-1)
  if isinstance(draft.layout, layouts.Floats):
    flat = sparse.bit_patterns(numbers)
  # A last number without a pair is left out.
  flat = flat[: flat.size // size * size] if flat.size >= size else flat.repeat(size)
  units = flat.reshape(-1, size)
  runs = formats.runs(len(units), most)
  classes = np.empty((len(runs), runs[0].stop), np.uint8)
  for row, run in zip(classes, runs, strict=True):
    scales.write(row, run.start, numbers.shape, size)
  sample = np.concatenate([units[run] for run in runs])
  return _Sample(sample, classes.astype(int).reshape(-1), len(units) / len(sample))


def _shifts(samples: Sequence[_Sample], layout: layouts.Integers) -> np.ndarray:
  """Returns the shift of each class, int64 `[256]`, so that few have no symbol."""
  classes = np.concatenate([x.classes for x in samples])
  sizes = np.concatenate([x.units.reshape(-1) for x in samples]).astype(np.float64)
  most = np.zeros(contexts_lib.CLASSES)
  if not layout.bias:
    np.maximum.at(most, classes, sizes)
    return np.clip(np.frexp(most)[1] - 8, 0, layouts.MOST_SHIFT)
  counts = np.bincount(classes, minlength=most.size)
  means = np.bincount(classes, np.abs(sizes), most.size) / np.maximum(counts, 1)
  means = np.log2(np.maximum(means, 1 / 64))
  # Four classes are an octave, about. A few great integers must not tell more.
  octaves = np.arange(most.size) / scales_lib.STEPS
  weights = np.where(means > 2, counts, 1e-9)  # small integers are rounded
  octaves += np.average(means - octaves, weights=weights)
  means = np.where(counts, np.clip(means, octaves - 3, octaves + 3), octaves)
  return np.clip(np.ceil(means) - _SHIFTED, 0, layouts.MOST_SHIFT).astype(int)


def _counts(
  sample: _Sample, layout: layouts.Layout, told: np.ndarray, octave: int, number: int
) -> np.ndarray:
  """Counts the symbols by class, or by table if a class tells one of four."""
  rows, alphabet = sample.classes, layout.alphabet
  if isinstance(layout, layouts.Integers):
    symbols = sample.units.astype(np.int64) >> told[rows][:, None]
    symbols += layout.bias
  elif layout.raised:
    symbols = layouts.bins_of(sample.units, layout, told[rows][:, None])
  else:
    symbols = layouts.bins_of(sample.units, layout, 1) + _BINS_BELOW
    symbols -= ((rows >> 2) + octave << layout.top)[:, None]
    rows, alphabet = rows & 3, _SEEN
  is_seen = (symbols >= 0) & (symbols < alphabet)
  places = (rows[:, None] * alphabet + symbols)[is_seen]
  counts = np.bincount(places, minlength=number * alphabet)
  return counts.reshape(number, alphabet) * sample.weight


def _unseen(counts: np.ndarray) -> np.ndarray:
  """Returns whether symbols may occur that samples of wide tables lack, `[K, A]`."""
  sizes = np.abs(np.arange(counts.shape[1]) - counts.shape[1] // 2)
  widest = np.where(counts > 0, sizes, 0).max(axis=1, keepdims=True)
  is_wide = 2 * counts.max(axis=1, keepdims=True) < counts.sum(axis=1, keepdims=True)
  return is_wide & (sizes <= 2 * widest)


def _merged(counts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Merges tables of neighbours in an order; returns that of each class, and counts."""
  rows = counts[order]
  is_first = np.append(True, rows[1:].any(axis=1))  # others have no symbols
  rows, row_of = rows[is_first], np.cumsum(is_first) - 1
  while True:
    bits = _table_bits(rows)
    saved = bits[:-1] + bits[1:] - _table_bits(rows[:-1] + rows[1:])
    around = np.pad(saved, 1, constant_values=-1.0)
    is_joined = (saved >= 0) & (saved >= around[:-2]) & (saved > around[2:])
    if not is_joined.any():
      break
    row_of = np.cumsum(np.append(True, ~is_joined))[row_of] - 1
    rows = np.add.reduceat(rows, np.flatnonzero(np.append(True, ~is_joined)))
  table_of = np.empty_like(row_of)
  table_of[order] = row_of
  return table_of, rows


def _table_bits(counts: np.ndarray) -> np.ndarray:
  """Returns about the bits of symbols and of their tables: `[...]`."""
  whole = np.maximum(counts.sum(axis=-1, keepdims=True), 1)
  shares = np.maximum(counts / whole, 1 / tables.TOTAL)
  bits = -(counts * np.log2(shares)).sum(axis=-1)
  return bits + 8 * np.count_nonzero(counts, axis=-1)


def _frequencies(counts: np.ndarray, layout: layouts.Layout) -> np.ndarray:
  """Returns frequencies in proportion to counts, of which pairs of bins have tables."""
  half = np.arange(layout.alphabet) < layout.alphabet // 2
  counts = np.where(counts.any(axis=1, keepdims=True), counts, half)
  try:
    frequencies = tables.quantize(counts)
    if isinstance(layout, layouts.Floats):
      tables.of_pairs(frequencies, layout.precision)
    return frequencies
  except ValueError:
    if len(counts) > 1:
      halves = np.array_split(counts, 2)
      return np.concatenate([_frequencies(x, layout) for x in halves])
    # A table with a pair that is too frequent becomes flatter.
    return _frequencies(counts + half * (1 + counts.sum() // 64), layout)

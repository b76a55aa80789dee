"""Plans: chooses how each array of a record is stored.

An array is coded as it is or as several parts, see `sparse`. Parts of one layout form a
group, which shares frequency tables. A part that coding does not make smaller is stored
as it is. Shifts and frequencies follow from samples: they only decide how many bytes
the numbers take.

Shape letters: n units, S numbers of a unit, N classes, K tables, A symbols.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
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

_RUNS = 64  # of neighbouring units, of which a sample consists
_SAMPLE = 1 << 16  # units that tell frequencies
_INTEGERS = 1 << 20  # units of integers, because these have more tables
_FEW = 1 << 12  # units that tell whether lines have scales
_SMALL = 1 << 12  # numbers of parts that share a layout
_RARE = 1 << 17  # an integer that is rarer than one in so many is an exception
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


def make(arrays: Sequence[np.ndarray], known: Mapping[int, np.ndarray]) -> Plan:
  """Plans a record of arrays; of the integers of some the classes are known."""
  whole = pool.each(host.contiguous, arrays)
  zeros, forms = [], pool.each(_divided, whole)
  parts: list[Part] = []
  for i, (form, numbers) in enumerate(forms):
    zeros.append(form)
    parts += [Part(i, j, x) for j, x in enumerate(numbers)]
  groups = _groups([x for x in parts if x.array not in known])
  for i, classes in known.items():
    (part,) = (x for x in parts if x.array == i)
    if classes.dtype != np.uint8 or classes.size != part.numbers.size:
      raise ValueError(
        f'{part.numbers.size} integers cannot have {classes.size} classes'
      )
    groups.append(_integer_group([part], classes.reshape(-1)))
  coded = {x[:2] for group in groups for x in group.parts}
  return Plan(whole, zeros, groups, [x for x in parts if x[:2] not in coded])


def _divided(array: np.ndarray) -> tuple[sparse.Sparse | None, list[np.ndarray]]:
  if array.dtype.itemsize == 8:
    return None, [array.reshape(-1).view(np.uint32).reshape(*array.shape, 2)]
  return (sparse.without_zeros(array) if array.size else None) or (None, [array])


def _groups(parts: Sequence[Part]) -> list[Group]:
  """Puts parts that coding makes smaller into groups."""
  floats, integers = list[Part](), dict[np.dtype, list[Part]]()
  for part in parts:
    dtype = part.numbers.dtype
    if part.numbers.size and dtype in layouts.FORMATS:
      floats.append(part)
    elif part.numbers.size and dtype.itemsize <= 4 and dtype.kind in 'iu':
      integers.setdefault(dtype, []).append(part)
  jobs = [functools.partial(_float_group, x) for x in _by_layout(floats)]
  jobs += [functools.partial(_integer_group, x) for x in integers.values()]
  return [x for x in map(_smaller, pool.run(jobs)) if x]


def _smaller(group: Group) -> Group | None:
  """Returns the group without parts that coding does not make smaller."""
  plain = [x.numbers.nbytes for x in group.parts]
  kept = [i for i, nbytes in enumerate(group.nbytes) if nbytes < plain[i]]
  saved = sum(plain[i] - group.nbytes[i] for i in kept)
  if saved < len(contexts_lib.to_bytes(group.contexts)) + _GROUP_BYTES:
    return None
  pick = lambda values: [values[i] for i in kept]
  contexts = group.contexts._replace(classes=tuple(pick(group.contexts.classes)))
  return Group(group.layout, contexts, pick(group.parts), pick(group.nbytes))


# ---- samples -------------------------------------------------------------------------


class _Sample(NamedTuple):
  """Units from all over a part."""

  units: np.ndarray  # `[n, S]`
  classes: np.ndarray  # int64 `[n]`
  weight: float  # how many units of the part one of the sample stands for


def _sample(
  units: np.ndarray, classes: contexts_lib.Classes, shape: contexts_lib.Shape, most: int
) -> _Sample:
  """Takes about `most` of the units `[n, S]` of a part of this shape."""
  runs = [slice(0, len(units))]
  if len(units) > most:
    run = most // _RUNS
    starts = np.linspace(0, len(units) - run, _RUNS).astype(int)
    runs = [slice(x, x + run) for x in starts.tolist()]
  sample = np.concatenate([units[run] for run in runs])
  places = np.empty((len(runs), runs[0].stop), np.uint8)
  for place, run in zip(places, runs, strict=True):
    contexts_lib.write(classes, place, run.start, shape, units.shape[1])
  return _Sample(sample, places.astype(int).reshape(-1), len(units) / len(sample))


def _counts(
  rows: np.ndarray, symbols: np.ndarray, alphabet: int, weight: float
) -> np.ndarray:
  """Counts the symbols `[n, S]` that are in an alphabet, by row: `[256, A]`."""
  places = (rows[:, None] * alphabet + symbols)[(symbols >= 0) & (symbols < alphabet)]
  counts = np.bincount(places, minlength=contexts_lib.CLASSES * alphabet)
  return counts.reshape(-1, alphabet) * weight


def _bits(counts: np.ndarray) -> np.ndarray:
  """Returns the bits of each symbol with tables of these counts or frequencies."""
  shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
  return -np.log2(np.maximum(shares, 2.0**-40))


def _nbytes(
  array: np.ndarray, counts: np.ndarray, bits: np.ndarray, layout: layouts.Layout
) -> float:
  """Returns about the bytes of a part, given the bits of each symbol: `[..., A]`."""
  numbers = max(array.size // layout.size, 1) * layout.size  # that are in the counts
  exception = _PLACE_BITS + 8 * layout.size * array.itemsize
  cost = (counts * bits).sum() + max(numbers - counts.sum(), 0) * exception
  raw_bits = layout.raw_bits if isinstance(layout, layouts.Floats) else 0
  return float(array.size * (cost / numbers + raw_bits)) / 8


def _merged(counts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Merges the tables of classes that are neighbours in an order, where it saves bits.

  Args:
    counts: those of the symbols of each class, `[N, A]`.
    order: the classes, in an order in which neighbours have similar tables.

  Returns:
    The table of each class, `[N]`; and the counts of the tables, `[K, A]`.
  """
  rows, row_of = counts[order], np.arange(len(order))
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


# ---- floats --------------------------------------------------------------------------


class _Draft(NamedTuple):
  """How a part of floats is coded."""

  part: Part
  layout: layouts.Floats
  min_exponent: int
  lines: scales_lib.Lines  # of steps, if small numbers share one

  def scales(self, octave: int) -> contexts_lib.Scales:
    """Returns the scales, counted from an octave unless small numbers share a step."""
    if self.layout.raised:
      return self.lines.scales(0, _RAISED_CLASSES - 1)
    lines = self.lines.above(scales_lib.STEPS * octave)
    return lines.scales(0, contexts_lib.CLASSES - 1)

  def counts(self, scales: contexts_lib.Scales, octave: int, most: int) -> np.ndarray:
    """Counts the bins of a sample: `[256, 32]` by class, or `[256, 128]` by table."""
    bits = sparse.bit_patterns(self.part.numbers)
    # A last number without a pair is left out.
    pairs = bits[: bits.size & ~1] if bits.size > 1 else np.repeat(bits, 2)
    shape = self.part.numbers.shape
    pairs, classes, weight = _sample(pairs.reshape(-1, 2), scales, shape, most)
    bins = layouts.bins_of(pairs, self.layout, self.min_exponent)
    if self.layout.raised:
      return _counts(classes, bins, layouts.BINS, weight)
    bins -= ((classes >> 2) + octave << self.layout.top)[:, None]
    return _counts(classes & 3, bins + _BINS_BELOW, _SEEN, weight)

  def ideal_bytes(self) -> float:
    """Returns about the bytes of the part with tables of its own."""
    octave = _octave([self])
    scales = self.scales(octave)
    counts = self.counts(scales, octave, _FEW)
    counts = counts[:, _window(counts)]
    cost = _nbytes(self.part.numbers, counts, _bits(counts), self.layout)
    return cost + scales.entropy_bytes


def _octave(drafts: Sequence[_Draft]) -> int:
  """Returns the octave of class 0; a lower scale may be that of an array of zeros."""
  octaves = np.array([x.lines.range for x in drafts]) // scales_lib.STEPS
  return max(int(octaves.min()), int(octaves.max()) - _OCTAVES)


def _window(counts: np.ndarray) -> slice:
  """Returns the places of the 32 bins with the most numbers."""
  ends = np.cumsum(np.append(0, counts.sum(axis=0)))
  place = int(np.argmax(ends[layouts.BINS :] - ends[: -layouts.BINS]))
  return slice(place, place + layouts.BINS)


def _by_layout(parts: Sequence[Part]) -> list[list[_Draft]]:
  """Puts floats of one layout together. Small parts of a dtype share theirs."""
  sets: dict[Any, list[Part]] = {}
  for part in parts:
    is_small = part.numbers.size <= _SMALL
    sets.setdefault(part.numbers.dtype if is_small else part[:2], []).append(part)
  drafts = itertools.chain(*pool.each(_drafts, sets.values()))
  groups: dict[tuple[layouts.Floats, int], list[_Draft]] = {}
  classes: dict[layouts.Floats, int] = {}
  # The parts of a group are in the order of the arrays.
  for draft in sorted(drafts, key=lambda x: x.part[:2]):
    count = 0
    if draft.layout.raised:  # each part has classes of its own
      scales = draft.scales(0)
      count = classes.get(draft.layout, 0) + scales.greatest - scales.base + 1
      classes[draft.layout] = count
    key = draft.layout, count // (contexts_lib.CLASSES - _RAISED_CLASSES)
    groups.setdefault(key, []).append(draft)
  return list(groups.values())


def _drafts(parts: list[Part]) -> list[_Draft]:
  """Chooses the layout of parts, and the scales of each of them."""
  bits = [sparse.bit_patterns(x.numbers) for x in parts]
  whole = bits[0] if len(bits) == 1 else np.concatenate(bits)
  layout, min_exponent = formats.of_floats(whole, parts[0].numbers.dtype)
  drafts = []
  for part in parts:
    lines = scales_lib.of_floats(part.numbers, layout)
    if layout.raised:
      lines = lines.above(scales_lib.STEPS * (min_exponent - _BELOW))
    draft = _Draft(part, layout, min_exponent, lines)
    choices = [draft._replace(lines=x) for x in lines.choices()]
    costs = {x.ideal_bytes(): x for x in choices}
    draft = costs[min(costs)]
    if len(parts) == 1 and layout.raw_bits > 1:
      finer = dataclasses.replace(layout, raw_bits=layout.raw_bits - 1, top=2)
      fine = draft._replace(layout=finer)
      draft = fine if fine.ideal_bytes() + _FINER_BYTES < min(costs) else draft
    drafts.append(draft)
  return drafts


def _float_group(drafts: list[_Draft]) -> Group:
  """Chooses the tables of floats."""
  layout, parts = drafts[0].layout, [x.part for x in drafts]
  octave, start = _octave(drafts), 0
  scales = [x.scales(octave) for x in drafts]
  levels, entries = np.arange(4), np.zeros((0, 2), np.int64)
  if layout.raised:
    # The classes of the parts follow each other.
    spans = [x.greatest - x.base + 1 for x in scales]
    bases = np.cumsum(spans) - spans
    pairs = zip(scales, spans, strict=True)
    levels = np.concatenate([x.base + np.arange(n) for x, n in pairs])
    scales = [x._replace(base=int(y)) for x, y in zip(scales, bases, strict=True)]
    exponents = np.repeat([x.min_exponent for x in drafts], spans)
  size = max(_SAMPLE // len(drafts), _FEW)
  counts = [
    x.counts(y, octave, size)[: len(levels)]
    for x, y in zip(drafts, scales, strict=True)
  ]
  table_of, rows = np.arange(4), np.sum(counts, axis=0)
  window = _window(rows)
  rows, counts = rows[:, window], [x[:, window] for x in counts]
  if layout.raised:
    table_of, rows = _merged(rows, np.argsort(levels, kind='stable'))
    entries = np.stack([table_of, exponents], 1)
  else:
    start = (octave << layout.top) + window.start - _BINS_BELOW
  frequencies = _frequencies(rows, layout.precision)
  bits = _bits(frequencies)[table_of]
  pairs = zip(parts, counts, strict=True)
  nbytes = [_nbytes(x.numbers, y, bits, layout) + 2 for x, y in pairs]
  contexts = contexts_lib.Contexts(tuple(scales), entries, start, frequencies)
  return Group(layout, contexts, parts, nbytes)


def _frequencies(counts: np.ndarray, precision: int) -> np.ndarray:
  """Returns the frequencies of bins.

  Equal counts are added to all until a table has room for the most frequent pair.
  """
  counts = np.where(counts.any(axis=1, keepdims=True), counts, 1)
  total, most = counts.sum(axis=1, keepdims=True), counts.max(axis=1, keepdims=True)
  share = np.sqrt(tables.MOST_PAIR / (1 << precision))
  while True:
    share *= 0.95
    more = np.maximum(most - share * total, 0) / (share * layouts.BINS - 1)
    shares = (counts + more) / (total + more * layouts.BINS)
    frequencies = tables.quantize(np.rint(shares * 2.0**30).astype(np.int64))
    try:
      tables.of_pairs(frequencies, precision)
    except ValueError:
      continue
    return frequencies


# ---- integers ------------------------------------------------------------------------


def _integer_group(parts: list[Part], known: np.ndarray | None = None) -> Group:
  """Chooses the scales, the shifts and the tables of integers of one dtype."""
  layout = layouts.Integers(parts[0].numbers.dtype, 0)
  if known is not None:
    classes: Sequence[contexts_lib.Classes] = [known]
  elif layout.bias:
    lines = pool.each(_integer_lines, [x.numbers for x in parts])
    least = min(x.range[0] for x in lines)
    classes = [x.above(least).scales(0, contexts_lib.CLASSES - 1) for x in lines]
  else:
    # Each array has a class; those of 64 bits have two, of low and of high bits.
    zero, two, last = np.zeros(1, np.uint8), np.arange(2, dtype=np.uint8), 127
    classes = [
      contexts_lib.Scales(
        2 * min(i, last), zero, two if x.numbers.shape[-1:] == (2,) else zero
      )
      for i, x in enumerate(parts)
    ]
  pairs = zip(parts, classes, strict=True)
  samples = [_integer_sample(x.numbers, y, _INTEGERS) for x, y in pairs]
  shifts = _shifts(samples, layout)
  counts = [_integer_counts(x, shifts, layout) for x in samples]
  number = 1 + max(int(x.max()) if x is known else x.greatest for x in classes)
  table_of, rows = _merged(np.sum(counts, axis=0)[:number], np.arange(number))
  rows[rows * _RARE < rows.sum(axis=1, keepdims=True)] = 0
  rows[~rows.any(axis=1)] = 1
  frequencies = tables.quantize(np.ceil(rows).astype(np.int64))
  exception = _PLACE_BITS + 8 * layout.dtype.itemsize
  bits = np.where(frequencies > 0, _bits(frequencies), exception)[table_of]
  bits += shifts[:number, None]
  steps = -(-int(shifts[:number].max()) // layouts.MOST_RAW)
  layout = dataclasses.replace(layout, raw_bits=layouts.MOST_RAW * steps)
  nbytes = [
    _nbytes(x.numbers, y[:number], bits, layout) + 1
    for x, y in zip(parts, counts, strict=True)
  ]
  entries = np.stack([table_of, shifts[:number]], 1)
  contexts = contexts_lib.Contexts(tuple(classes), entries, 0, frequencies)
  return Group(layout, contexts, parts, nbytes)


def _integer_lines(array: np.ndarray) -> scales_lib.Lines:
  """Chooses the scales of rows and columns, unless they cost more than they save."""
  layout, costs = layouts.Integers(array.dtype, 0), {}
  lines = scales_lib.of_integers(array)
  for draft in lines.choices():
    scales = draft.above(draft.range[0]).scales(0, contexts_lib.CLASSES - 1)
    sample = _integer_sample(array, scales, _SAMPLE)
    shifts = _shifts([sample], layout)
    counts = _integer_counts(sample, shifts, layout)
    bits = _bits(counts) + shifts[:, None]
    cost = _nbytes(array, counts, bits, layout)
    costs[cost + np.count_nonzero(counts) + scales.entropy_bytes] = draft
  return costs[min(costs)]


def _integer_sample(
  array: np.ndarray, classes: contexts_lib.Classes, most: int
) -> _Sample:
  return _sample(array.reshape(-1, 1), classes, array.shape, most)


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


def _integer_counts(
  sample: _Sample, shifts: np.ndarray, layout: layouts.Integers
) -> np.ndarray:
  """Counts the symbols of integers whose classes have these shifts: `[256, 256]`."""
  symbols = sample.units.astype(np.int64) >> shifts[sample.classes][:, None]
  symbols += layout.bias
  return _counts(sample.classes, symbols, layouts.WINDOW, sample.weight)

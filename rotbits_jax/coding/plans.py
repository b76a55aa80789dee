"""Plans: chooses how each array of a record is stored.

An array is coded as it is or as several parts, see `sparse`. Parts of one layout form a
group, which shares frequency tables. A part that coding does not make smaller is stored
as it is. Frequencies are those of a sample: they only decide how many bytes the numbers
take.

Shape letters: n units, S numbers of a unit, K tables, A symbols.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax.coding import contexts as contexts_lib
from rotbits_jax.coding import formats
from rotbits_jax.coding import known as known_lib
from rotbits_jax.coding import layouts
from rotbits_jax.coding import pool
from rotbits_jax.coding import scales as scales_lib
from rotbits_jax.coding import sparse
from rotbits_jax.coding import tables
from rotbits_jax.system import host

_SAMPLE, _RUN = 1 << 17, 1 << 10  # units that tell frequencies, in runs of neighbours
_INTEGERS = 1 << 20  # units of integers, because these have more tables
_FEW = 1 << 12  # units that tell whether lines have scales
_LARGE = 1 << 19  # numbers of parts that have tables of their own
_SMALL = 1 << 12  # numbers of parts that share a layout and tables
_RARE = 1 << 17  # an integer that is rarer than one in so many is an exception
_GROUP_BYTES = 100  # of a group in the spec and of a block without words, about
_RAISED_CLASSES = 32  # of a part that shares a step
_BELOW = 4  # octaves from the scale of the first of them to the minimum exponent
_FINER_BYTES = 400  # that finer bins must save
_PLACE_BITS = 24  # of an exception, and those of the unit
_INTEGER_CLASSES = 144
_SHIFTED = 6  # the octave of the classes of integers above which they have raw bits


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


def make(arrays: Sequence[np.ndarray], known: Mapping[int, known_lib.Known]) -> Plan:
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
    groups.append(_known_group(part, classes.check(part.numbers.size)))
  coded = {x[:2] for group in groups for x in group.parts}
  return Plan(whole, zeros, groups, [x for x in parts if x[:2] not in coded])


def _divided(array: np.ndarray) -> tuple[sparse.Sparse | None, list[np.ndarray]]:
  if array.size and array.dtype.itemsize == 8:
    return None, sparse.halves(array)
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
  if saved < len(contexts_lib.to_bytes(group.contexts, group.layout)) + _GROUP_BYTES:
    return None
  pick = lambda values: [values[i] for i in kept]
  contexts = group.contexts._replace(classes=tuple(pick(group.contexts.classes)))
  return Group(group.layout, contexts, pick(group.parts), pick(group.nbytes))


# ---- samples -------------------------------------------------------------------------


class _Sample(NamedTuple):
  """Units from all over a part."""

  tables: np.ndarray  # int64 `[n]`, the table of each unit
  symbols: np.ndarray  # int64 `[n, S]`, those of numbers, which may be out of bounds
  weight: float  # how many units of the part one of the sample stands for

  def counts(self, count: int, alphabet: int, first: int = 0) -> np.ndarray:
    """Counts symbols, from `first` on: `[K, A]`, in proportion to the whole part."""
    symbols = self.symbols - first
    inside = (symbols >= 0) & (symbols < alphabet)
    places = (self.tables[:, None] * alphabet + symbols)[inside]
    counts = np.bincount(places, minlength=count * alphabet)
    return counts.reshape(count, alphabet) * self.weight


def _sampled(
  units: np.ndarray,
  classes: contexts_lib.Scales | known_lib.Bands,
  shape: contexts_lib.Shape,
  most: int,
) -> tuple[np.ndarray, np.ndarray, float]:
  """Returns some of the units `[n, S]` of a part, their classes, and their weight."""
  runs = [slice(0, len(units))]
  if len(units) > most:
    starts = np.linspace(0, len(units) - _RUN, max(most // _RUN, 1)).astype(int)
    runs = [slice(x, x + _RUN) for x in starts.tolist()]
  sample = np.concatenate([units[run] for run in runs])
  places, size = np.empty(len(sample), np.uint8), runs[0].stop
  for i, run in enumerate(runs):  # which have one size
    classes.write(places[i * size : (i + 1) * size], run.start, shape, units.shape[1])
  return sample, places.astype(np.int64), len(units) / len(sample)


def _nbytes(
  array: np.ndarray, counts: np.ndarray, bits: np.ndarray, layout: layouts.Layout
) -> float:
  """Returns about the bytes of a part, given the bits of each symbol: `[K, A]`."""
  numbers = max(array.size // layout.size, 1) * layout.size  # that are in the counts
  exception = _PLACE_BITS + 8 * layout.size * array.itemsize
  cost = (counts * bits).sum() + max(numbers - counts.sum(), 0) * exception
  raw_bits = layout.raw_bits if isinstance(layout, layouts.Floats) else 0
  return float(array.size * (cost / numbers + raw_bits)) / 8


def _bits(counts: np.ndarray) -> np.ndarray:
  """Returns the bits of each symbol with tables of these counts or frequencies."""
  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  return -np.log2(np.maximum(shares, 2.0**-40))


def _everywhere(counts: np.ndarray) -> np.ndarray:
  """Gives tables without counts those of the nearest table that has some."""
  (used,) = np.nonzero(counts.any(axis=1))
  if not used.size:
    return np.ones_like(counts)
  nearest = np.abs(np.arange(len(counts))[:, None] - used).argmin(axis=1)
  return counts[used[nearest]]


# ---- floats --------------------------------------------------------------------------


class _Draft(NamedTuple):
  """How a part of floats is coded."""

  part: Part
  layout: layouts.Floats
  min_exponent: int
  lines: scales_lib.Lines  # their classes; tables if small numbers share a step

  @property
  def most(self) -> int:
    """The greatest class."""
    return _RAISED_CLASSES - 1 if self.layout.raised else 255

  def above(self, least: int) -> '_Draft':
    """Counts classes from a whole octave on, as offsets do, unless steps are shared."""
    octave = -(-least // scales_lib.STEPS) * scales_lib.STEPS
    if self.layout.raised:
      return self
    return self._replace(lines=self.lines.above(octave))

  def sample(self, scales: contexts_lib.Scales, most: int) -> _Sample:
    """Looks at pairs; a last number without a pair is left out."""
    bits = sparse.bit_patterns(self.part.numbers)
    pairs = bits[: bits.size & ~1] if bits.size > 1 else np.repeat(bits, 2)
    shape, top = self.part.numbers.shape, self.layout.top
    pairs, classes, weight = _sampled(pairs.reshape(-1, 2), scales, shape, most)
    bins = layouts.bins_of(pairs, self.layout, self.min_exponent)
    if self.layout.raised:
      return _Sample(classes - scales.base + scales.table, bins, weight)
    return _Sample(classes & 3, bins - (classes >> 2 << top)[:, None], weight)

  def ideal_bytes(self) -> float:
    """Returns about the bytes of the part with tables of its own."""
    scales = self.above(self.lines.range[0]).lines.scales(0, self.most)
    scales = scales._replace(table=scales.base)
    sample = self.sample(scales, _FEW)
    first = 0 if self.layout.raised else _first([sample])
    counts = sample.counts(int(sample.tables.max()) + 1, layouts.BINS, first)
    cost = _nbytes(self.part.numbers, counts, _bits(counts), self.layout)
    return cost + scales.entropy_bytes


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
      scales = draft.lines.scales(0, draft.most)
      count = classes.get(draft.layout, 0) + scales.greatest - scales.base + 1
      classes[draft.layout] = count
    key = draft.layout, count // (256 - _RAISED_CLASSES)
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
  layout, most = drafts[0].layout, drafts[0].most
  least = min(x.lines.range[0] for x in drafts)
  drafts = [x.above(least) for x in drafts]
  scales = [x.lines.scales(0, most) for x in drafts]
  count, size = 4, max(_SAMPLE // len(drafts), _RUN)
  if layout.raised:
    scales, count = _with_tables(drafts, scales)
  samples = [x.sample(y, size) for x, y in zip(drafts, scales, strict=True)]
  first = 0
  if not layout.raised:
    first = min(_first(samples), layout.most_offset)
    octaves = layout.most_offset - first >> layout.top
    scales = [x.lines.scales(0, min(most, 4 * octaves + 3)) for x in drafts]
  counts = [x.counts(count, layouts.BINS, first) for x in samples]
  frequencies = _frequencies(_everywhere(np.sum(counts, axis=0)), layout.precision)
  parts, bits = [x.part for x in drafts], _bits(frequencies)
  pairs = zip(parts, counts, strict=True)
  nbytes = [_nbytes(x.numbers, y, bits, layout) + 2 for x, y in pairs]
  numbers = np.array([] if layout.raised else [first], np.int64)
  contexts = contexts_lib.Contexts(tuple(scales), numbers, frequencies)
  return Group(layout, contexts, parts, nbytes)


def _with_tables(
  drafts: list[_Draft], scales: list[contexts_lib.Scales]
) -> tuple[list[contexts_lib.Scales], int]:
  """Gives each part that shares a step its classes and tables, and counts the tables.

  Large parts have tables of their own; others share those of equal classes.
  """
  pairs = [*zip(drafts, scales, strict=True)]
  shared = [x for draft, x in pairs if draft.part.numbers.size < _LARGE]
  least = min((x.base for x in shared), default=0)
  count = max((x.greatest + 1 for x in shared), default=least) - least
  placed, base = [], 0
  for draft, old in pairs:
    span, table = old.greatest - old.base + 1, old.base - least
    if draft.part.numbers.size >= _LARGE:
      table, count = count, count + span
    placed.append(old._replace(base=base, table=table, min_exponent=draft.min_exponent))
    base += span
  return placed, count


def _first(samples: Sequence[_Sample]) -> int:
  """Chooses the least offset, so that the fewest numbers are outside the bins."""
  least = min(int(x.symbols.min()) for x in samples)
  size = max(int(x.symbols.max()) for x in samples) - least + 1
  counts = np.zeros(size + layouts.BINS)
  for sample in samples:
    in_one_table = sample._replace(tables=0 * sample.tables)
    counts[:size] += in_one_table.counts(1, size, least)[0]
  ends = np.concatenate([[0], np.cumsum(counts)])
  return least + int(np.argmax(ends[layouts.BINS :] - ends[: -layouts.BINS]))


def _frequencies(counts: np.ndarray, precision: int) -> np.ndarray:
  """Returns the frequencies of bins.

  Equal counts are added to all until a table has room for the most frequent pair.
  """
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


def _integer_group(parts: list[Part]) -> Group:
  """Chooses the scales, the shifts and the tables of integers of one dtype."""
  arrays, dtype = [x.numbers for x in parts], parts[0].numbers.dtype
  if dtype.kind == 'i':
    lines = pool.each(_integer_lines, arrays)
    least = max(min(x.range[0] for x in lines), 0)
    most = max(min(max(x.range[1] for x in lines), _INTEGER_CLASSES - 1), least)
    scales = [x.above(least).scales(0, most - least) for x in lines]
    shifts = _class_shifts(least, most)
  else:
    few = len(parts) < layouts.Integers.most_tables // 2
    keys = []
    for i, array in enumerate(arrays):
      shift = max(int(array.max()).bit_length() - 8, 0)
      keys.append((shift, i if few and array.size > _SMALL else -1))
    distinct, zero = list(dict.fromkeys(keys)), np.zeros(1, np.uint8)
    scales = [contexts_lib.Scales(distinct.index(x), zero, zero) for x in keys]
    shifts = np.array([shift for shift, _ in distinct])
  counts = [
    _integer_counts(x, y, shifts, _INTEGERS)
    for x, y in zip(arrays, scales, strict=True)
  ]
  total = np.sum(counts, axis=0)
  total[total * _RARE < total.sum(axis=1, keepdims=True)] = 0
  frequencies = tables.quantize(np.ceil(_everywhere(total)).astype(np.int64))
  exception = _PLACE_BITS + 8 * dtype.itemsize
  bits = np.where(frequencies > 0, _bits(frequencies), exception)
  bits = bits + shifts[:, None]
  layout = layouts.Integers(dtype, int(shifts.max()))
  nbytes = [_nbytes(*x, bits, layout) + 1 for x in zip(arrays, counts, strict=True)]
  contexts = contexts_lib.Contexts(tuple(scales), shifts, frequencies)
  return Group(layout, contexts, parts, nbytes)


def _class_shifts(least: int, most: int) -> np.ndarray:
  """Returns the shifts of classes: with them, integers have few symbols."""
  octaves = np.arange(least, most + 1) // scales_lib.STEPS
  return np.clip(octaves - _SHIFTED, 0, layouts.MOST_SHIFT)


def _integer_lines(array: np.ndarray) -> scales_lib.Lines:
  """Chooses the scales of rows and columns, unless they cost more than they save."""
  lines, costs = scales_lib.of_integers(array), {}
  shifts = _class_shifts(0, _INTEGER_CLASSES - 1)
  for draft in lines.choices():
    scales = draft.scales(0, _INTEGER_CLASSES - 1)
    counts = _integer_counts(array, scales, shifts, _SAMPLE)
    bits = _bits(counts) + shifts[:, None]
    cost = _nbytes(array, counts, bits, layouts.Integers(array.dtype, 0))
    costs[cost + np.count_nonzero(counts) + scales.entropy_bytes] = draft
  return costs[min(costs)]


def _integer_counts(
  array: np.ndarray,
  classes: contexts_lib.Scales | known_lib.Bands,
  shifts: np.ndarray,
  most: int,
) -> np.ndarray:
  """Counts the symbols of integers whose classes have these shifts: `[K, 256]`."""
  units = array.reshape(-1, 1)
  units, places, weight = _sampled(units, classes, array.shape, most)
  symbols = units.astype(np.int64) >> shifts[places][:, None]
  symbols += layouts.Integers(array.dtype, 0).bias
  return _Sample(places, symbols, weight).counts(len(shifts), layouts.WINDOW)


def _known_group(part: Part, known: known_lib.Known) -> Group:
  """Puts neighbouring classes of one shift together where that saves bits."""
  shifts = np.array(known.shifts)
  each = known_lib.Bands(known, np.ones(len(shifts), np.uint8))
  counts = np.rint(_integer_counts(part.numbers, each, shifts, _INTEGERS))
  bits = _table_bits(counts).tolist()
  bands: list[tuple[int, int, np.ndarray, float]] = []  # shift, classes, counts, bits
  for shift, class_counts, cost in zip(known.shifts, counts, bits, strict=True):
    if bands and bands[-1][0] == shift:
      _, size, band_counts, band_cost = bands[-1]
      joined = band_counts + class_counts
      joined_cost = float(_table_bits(joined)) if cost else band_cost
      if joined_cost <= band_cost + cost:
        bands[-1] = shift, size + 1, joined, joined_cost
        continue
    bands.append((shift, 1, class_counts, cost))
  nbytes = float(counts.sum(axis=1) @ shifts + sum(x[3] for x in bands)) / 8
  frequencies = np.stack([x[2] for x in bands]).astype(np.int64)
  frequencies[~frequencies.any(axis=1), 0] = 1
  classes = known_lib.Bands(known, np.array([x[1] for x in bands], np.uint8))
  contexts = contexts_lib.Contexts(
    (classes,), classes.shifts, tables.quantize(frequencies)
  )
  layout = layouts.Integers(part.numbers.dtype, max(known.shifts))
  return Group(layout, contexts, [part], [nbytes])


def _table_bits(counts: np.ndarray) -> np.ndarray:
  """Returns about the bits of symbols and of their tables: `[...]`."""
  whole = np.maximum(counts.sum(axis=-1, keepdims=True), 1)
  shares = np.maximum(counts / whole, 1 / tables.TOTAL)
  bits = -(counts * np.log2(shares)).sum(axis=-1)
  return bits + 8 * np.count_nonzero(counts, axis=-1)

"""Plans: chooses how each array of a record is stored.

An array is coded as it is or as several parts, see `sparse`. Parts of one layout form a
group, which shares frequency tables. A part that coding does not make smaller is stored
as it is. Frequencies are those of a sample: they only decide how many bytes the numbers
take.

Shape letters: K tables, A symbols.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import contexts as contexts_lib
from rotbits_jax.coding import formats
from rotbits_jax.coding import known as known_lib
from rotbits_jax.coding import layouts
from rotbits_jax.coding import pool
from rotbits_jax.coding import scales as scales_lib
from rotbits_jax.coding import sparse
from rotbits_jax.coding import tables

_SAMPLE, _RUN = 1 << 17, 1 << 10  # units that tell frequencies, in runs of neighbours
_LARGE = 1 << 19  # numbers of parts that have tables of their own
_INTEGERS = 1 << 20  # that tell frequencies, because they have more tables
_FEW = 1 << 12  # units that tell whether lines have scales
_SMALL = 1 << 12  # numbers of parts that share what others have of their own
_RARE = 1 << 17  # an integer that is rarer than one in so many is an exception
_GROUP_BYTES = 100  # of a group in the spec and of a block without words, about
_RAISED_CLASSES = 32  # of a part that shares a step
_BELOW = 4  # octaves from the scale of the first of them to the minimum exponent
_FINER_BYTES = 400  # that finer bins must save
_EXCEPTION_BITS = 24  # and those of the unit
_INTEGER_CLASSES = 144
_SHIFTED = 6  # the octave of the classes of integers above which they have raw bits


class Part(NamedTuple):
  """A part of an array.

  Attributes:
    array: index of the array in the record.
    part: index of the part in the array.
    numbers: the part, contiguous.
  """

  array: int
  part: int
  numbers: np.ndarray


class Group(NamedTuple):
  """Parts of one layout, coded together.

  Attributes:
    layout: the layout.
    contexts: the classes of the units of each part, and the tables.
    parts: the parts.
    nbytes: about how many bytes each part takes.
  """

  layout: layouts.Layout
  contexts: contexts_lib.Contexts | known_lib.Bands
  parts: list[Part]
  nbytes: list[float]


def divided(
  arrays: Sequence[np.ndarray],
) -> tuple[list[sparse.Sparse | None], list[Part]]:
  """Divides arrays into parts.

  Args:
    arrays: arrays of dtypes in `specs.DTYPES`, contiguous.

  Returns:
    Where the zeros of each array are, if it is stored without them; and all parts.
  """
  forms: list[sparse.Sparse | None] = []
  parts: list[Part] = []
  for i, found in enumerate(pool.each(_of_array, arrays)):
    forms.append(found[0])
    parts += [Part(i, j, x) for j, x in enumerate(found[1])]
  return forms, parts


def _of_array(array: np.ndarray) -> tuple[sparse.Sparse | None, list[np.ndarray]]:
  if array.size and array.dtype.itemsize == 8:
    return None, sparse.halves(array)
  return (sparse.without_zeros(array) if array.size else None) or (None, [array])


def groups(parts: Sequence[Part]) -> list[Group]:
  """Puts parts that coding makes smaller into groups."""
  coded = [x for x in parts if x.numbers.size and x.numbers.itemsize <= 4]
  floats = [x for x in coded if x.numbers.dtype in layouts.FORMATS]
  integers: dict[np.dtype, list[Part]] = {}
  for part in coded:
    if part.numbers.dtype.kind in 'iu':
      integers.setdefault(part.numbers.dtype, []).append(part)
  jobs: list[Callable[[], Group]] = [
    functools.partial(_float_group, x) for x in _by_layout(floats)
  ]
  jobs += [functools.partial(_integer_group, x) for x in integers.values()]
  return [x for x in map(_smaller, pool.run(jobs)) if x]


def _smaller(group: Group) -> Group | None:
  """Returns the group without parts that coding does not make smaller."""
  pairs = zip(group.parts, group.nbytes, strict=True)
  kept = [i for i, (part, nbytes) in enumerate(pairs) if nbytes < part.numbers.nbytes]
  saved = sum(group.parts[i].numbers.nbytes - group.nbytes[i] for i in kept)
  assert isinstance(group.contexts, contexts_lib.Contexts)
  head = contexts_lib.to_bytes(group.contexts, group.layout)
  if saved < len(head) + _GROUP_BYTES:
    return None
  pick = lambda values: [values[i] for i in kept]
  contexts = group.contexts._replace(scales=tuple(pick(group.contexts.scales)))
  if isinstance(group.layout, layouts.Floats) and group.layout.raised:
    numbers = group.contexts.numbers.reshape(-1, 2)[kept].reshape(-1)
    contexts = contexts._replace(numbers=numbers)
  return Group(group.layout, contexts, pick(group.parts), pick(group.nbytes))


def sampled(units: int, most: int = _SAMPLE) -> Iterator[slice]:
  """Yields runs of units from all over an array, `most` in all."""
  if units <= most:
    yield slice(0, units)
    return
  starts = np.linspace(0, units - _RUN, max(most // _RUN, 1)).astype(int)
  yield from (slice(x, x + _RUN) for x in starts.tolist())


# ---- floats --------------------------------------------------------------------------


class _Draft(NamedTuple):
  """How a part of floats is coded.

  Attributes:
    part: the part.
    layout: its layout.
    least: its minimum exponent.
    lines: the classes of its rows and columns. If small numbers share a step, these
      are the numbers of tables.
  """

  part: Part
  layout: layouts.Floats
  least: int
  lines: scales_lib.Lines

  @property
  def most(self) -> int:
    """The greatest class."""
    return _RAISED_CLASSES - 1 if self.layout.raised else 255


def _by_layout(parts: Sequence[Part]) -> list[list[_Draft]]:
  """Puts floats of one layout together. Small parts of a dtype share theirs."""
  shared: dict[np.dtype, list[Part]] = {}
  sets = []
  for part in parts:
    if part.numbers.size > _SMALL:
      sets.append([part])
    else:
      shared.setdefault(part.numbers.dtype, []).append(part)
  sets += shared.values()
  drafts: dict[tuple[layouts.Floats, int], list[_Draft]] = {}
  classes: dict[layouts.Floats, int] = {}
  found = [draft for together in pool.each(_drafts, sets) for draft in together]
  # The parts of a group are in the order of the arrays.
  for draft in sorted(found, key=lambda x: x.part[:2]):
    count = 0
    if draft.layout.raised:  # classes of several minimum exponents
      scales = draft.lines.scales(0, draft.most)
      count = classes.get(draft.layout, 0) + scales.greatest - scales.base + 1
      classes[draft.layout] = count
    drafts.setdefault((draft.layout, count // (256 - _RAISED_CLASSES)), []).append(
      draft
    )
  return list(drafts.values())


def _drafts(parts: list[Part]) -> list[_Draft]:
  """Chooses the layout of parts, and the scales of each of them."""
  bits = [sparse.bit_patterns(x.numbers) for x in parts]
  whole = bits[0] if len(bits) == 1 else np.concatenate(bits)
  layout, least = formats.of_floats(whole, parts[0].numbers.dtype)
  drafts = []
  for part in parts:
    lines = scales_lib.of_floats(part.numbers, layout)
    if layout.raised:
      lines = lines.above(scales_lib.STEPS * (least - _BELOW))
    draft = _Draft(part, layout, least, lines)
    costs = {_ideal_bytes(draft): draft}
    if lines.rows.size > 1 or lines.columns.size > 1:
      flat = draft._replace(lines=lines.flat())
      costs[_ideal_bytes(flat)] = flat
    draft = costs[min(costs)]
    if len(parts) == 1 and layout.raw_bits > 1:
      finer = dataclasses.replace(layout, raw_bits=layout.raw_bits - 1, top=2)
      fine = draft._replace(layout=finer)
      draft = fine if _ideal_bytes(fine) + _FINER_BYTES < min(costs) else draft
    drafts.append(draft)
  return drafts


def _ideal_bytes(draft: _Draft) -> float:
  """Returns about the bytes of a part with tables of its own."""
  # Whole octaves are offsets.
  moved = draft.lines
  if not draft.layout.raised:
    moved = moved.above(-(-moved.range[0] // scales_lib.STEPS) * scales_lib.STEPS)
  scales = moved.scales(0, draft.most)
  sample = _sample(draft, scales, _FEW)
  first = 0 if draft.layout.raised else _first([sample])
  counts = _counts(sample, first, int(sample.table.max()) + 1)
  bits = sum(map(tables.entropy_bits, counts))
  bits += sum(tables.entropy_bits(np.bincount(x)) for x in scales[1:])
  bits += 2 * sample.whole * draft.layout.raw_bits
  outside = 2 * sample.whole - counts.sum()
  itemsize = draft.part.numbers.itemsize
  return float(bits + outside * (_EXCEPTION_BITS + 16 * itemsize)) / 8


def _float_group(drafts: list[_Draft]) -> Group:
  """Chooses the tables of floats."""
  layout, most = drafts[0].layout, drafts[0].most
  if not layout.raised:
    least = min(x.lines.range[0] for x in drafts)
    least = -(-least // scales_lib.STEPS) * scales_lib.STEPS
    drafts = [x._replace(lines=x.lines.above(least)) for x in drafts]
  size = max(_SAMPLE // len(drafts), _RUN)
  scales = [x.lines.scales(0, most) for x in drafts]
  samples = [_sample(x, y, size) for x, y in zip(drafts, scales, strict=True)]
  count, first, numbers = 4, 0, list[int]()
  if layout.raised:
    firsts, count = _first_tables(drafts, scales)
    next_class = 0
    for i, (draft, table) in enumerate(zip(drafts, firsts, strict=True)):
      of_pairs = samples[i].table - scales[i].base + table
      samples[i] = samples[i]._replace(table=of_pairs)
      scales[i] = scales[i]._replace(base=next_class)
      next_class = scales[i].greatest + 1
      numbers += [table, draft.least]
  else:
    first = min(_first(samples), layout.most_offset)
    numbers = [first]
    octaves = layout.most_offset - first >> layout.top
    most = min(most, 4 * octaves + 3)
    scales = [x.lines.scales(0, most) for x in drafts]
  counts = [_counts(x, first, count) for x in samples]
  frequencies = _frequencies(_everywhere(np.sum(counts, axis=0)), layout.precision)
  bits = -np.log2(np.maximum(frequencies, 0.5) / tables.TOTAL)
  nbytes = []
  for draft, of_part, sample in zip(drafts, counts, samples, strict=True):
    array = draft.part.numbers
    outside = 1 - of_part.sum() / (2 * sample.whole)
    each = (of_part * bits).sum() / max(of_part.sum(), 1) + layout.raw_bits
    each += outside * (_EXCEPTION_BITS + 16 * array.itemsize)
    nbytes.append(array.size * float(each) / 8 + 2)
  contexts = contexts_lib.Contexts(tuple(scales), np.array(numbers), frequencies)
  return Group(layout, contexts, [x.part for x in drafts], nbytes)


def _first_tables(
  drafts: list[_Draft], scales: list[contexts_lib.Scales]
) -> tuple[list[int], int]:
  """Returns the table of the least class of each part, and the number of tables.

  Large parts have tables of their own; others share those of equal classes.
  """
  alone = [x.part.numbers.size >= _LARGE for x in drafts]
  shared = [x for x, is_alone in zip(scales, alone, strict=True) if not is_alone]
  least = min((x.base for x in shared), default=0)
  count = max((x.greatest + 1 for x in shared), default=least) - least
  firsts = []
  for of_part, is_alone in zip(scales, alone, strict=True):
    firsts.append(count if is_alone else of_part.base - least)
    if is_alone:
      count += of_part.greatest - of_part.base + 1
  return firsts, count


class _Sample(NamedTuple):
  """Pairs of numbers of a part.

  Attributes:
    table: int64 `[n]`, the table of each pair.
    bins: int64 `[n, 2]`, the bin of each number, without the least offset.
    whole: how many pairs the part has.
  """

  table: np.ndarray
  bins: np.ndarray
  whole: int


def _sample(draft: _Draft, scales: contexts_lib.Scales, most: int) -> _Sample:
  """Looks at some pairs of a part, of which a last number without a pair is none."""
  array, layout = draft.part.numbers, draft.layout
  bits = sparse.bit_patterns(array)
  units = array.size // 2
  if not units:
    bits, units = np.repeat(bits, 2), 1
  bins, classes = [], []
  for run in sampled(units, most):
    of_run = np.empty(run.stop - run.start, np.uint8)
    scales.write(of_run, run.start, array.shape, 2)
    numbers = bits[2 * run.start : 2 * run.stop]
    bins.append(layouts.bins_of(numbers, layout, draft.least).reshape(-1, 2))
    classes.append(of_run)
  of_pairs = np.concatenate(classes).astype(np.int64)
  if layout.raised:
    return _Sample(of_pairs, np.concatenate(bins), units)
  offsets = (of_pairs >> 2 << layout.top)[:, None]
  return _Sample(of_pairs & 3, np.concatenate(bins) - offsets, units)


def _first(samples: Sequence[_Sample]) -> int:
  """Chooses the least offset, so that the fewest numbers are outside the bins."""
  least = min(int(x.bins.min()) for x in samples)
  size = max(int(x.bins.max()) for x in samples) - least + 1
  counts = np.zeros(size + layouts.BINS)
  for x in samples:
    of_part = np.bincount((x.bins - least).reshape(-1), minlength=size)
    counts[:size] += of_part * (x.whole / len(x.bins))
  ends = np.concatenate([[0], np.cumsum(counts)])
  return least + int(np.argmax(ends[layouts.BINS :] - ends[: -layouts.BINS]))


def _counts(sample: _Sample, first: int, count: int) -> np.ndarray:
  """Counts the bins of each table: `[K, 32]`."""
  bins = sample.bins - first
  inside = (bins >= 0) & (bins < layouts.BINS)
  places = (sample.table[:, None] * layouts.BINS + bins)[inside]
  counts = np.bincount(places, minlength=count * layouts.BINS)
  return counts.reshape(count, layouts.BINS) * (sample.whole / len(sample.bins))


def _everywhere(counts: np.ndarray) -> np.ndarray:
  """Gives tables without counts those of the nearest table that has some."""
  (used,) = np.nonzero(counts.any(axis=1))
  if not used.size:
    return np.ones_like(counts)
  nearest = np.abs(np.arange(len(counts))[:, None] - used).argmin(axis=1)
  return counts[used[nearest]]


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
  arrays = [x.numbers for x in parts]
  if arrays[0].dtype.kind == 'i':
    lines = pool.each(_integer_lines, arrays)
    least = max(min(x.range[0] for x in lines), 0)
    most = min(max(x.range[1] for x in lines), _INTEGER_CLASSES - 1)
    scales = [x.above(least).scales(0, max(most - least, 0)) for x in lines]
    shifts = _class_shifts(least, max(most, least))
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
    histogram(x, functools.partial(y.write, shape=x.shape, size=1), shifts)
    for x, y in zip(arrays, scales, strict=True)
  ]
  total = np.sum(counts, axis=0)
  total[total * _RARE < total.sum(axis=1, keepdims=True)] = 0
  frequencies = tables.quantize(np.ceil(_everywhere(total)).astype(np.int64))
  layout = layouts.Integers(arrays[0].dtype, int(shifts.max()))
  contexts = contexts_lib.Contexts(tuple(scales), shifts, frequencies)
  bits = -np.log2(np.maximum(frequencies, 0.5) / tables.TOTAL)
  bits = np.where(frequencies > 0, bits, _EXCEPTION_BITS + 8 * layout.dtype.itemsize)
  nbytes = [_integer_bytes(*x, bits, shifts) for x in zip(arrays, counts, strict=True)]
  return Group(layout, contexts, parts, nbytes)


def _class_shifts(least: int, most: int) -> np.ndarray:
  """Returns the shifts of classes: with them, integers have few symbols."""
  octaves = np.arange(least, most + 1) // scales_lib.STEPS
  return np.clip(octaves - _SHIFTED, 0, layouts.MOST_SHIFT)


def _integer_lines(array: np.ndarray) -> scales_lib.Lines:
  """Chooses the scales of rows and columns, unless they cost more than they save."""
  lines, costs = scales_lib.of_integers(array), {}
  for draft in {x.range: x for x in (lines, lines.flat())}.values():
    scales = draft.scales(0, _INTEGER_CLASSES - 1)
    shifts = _class_shifts(0, _INTEGER_CLASSES - 1)
    write = functools.partial(scales.write, shape=array.shape, size=1)
    counts = histogram(array, write, shifts, _SAMPLE)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    bits = 8 - np.log2(np.where(shares > 0, shares, 1))  # a frequency takes a byte
    cost = _integer_bytes(array, counts, bits - 8, shifts) + np.count_nonzero(counts)
    of_lines = sum(tables.entropy_bits(np.bincount(x)) for x in scales[1:]) / 8
    costs[cost + of_lines] = draft
  return costs[min(costs)]


def _integer_bytes(
  array: np.ndarray, counts: np.ndarray, bits: np.ndarray, shifts: np.ndarray
) -> float:
  """Returns about the bytes of integers, given counts and the bits of symbols."""
  cost = (counts * bits).sum() + counts.sum(axis=1) @ shifts
  outside = max(array.size - counts.sum(), 0)
  return float(cost + outside * (_EXCEPTION_BITS + 8 * array.itemsize)) / 8 + 1


def histogram(
  array: np.ndarray,
  write: Callable[[np.ndarray, int], None],
  shifts: np.ndarray,
  most: int = _INTEGERS,
) -> np.ndarray:
  """Counts the symbols of integers by a sample.

  Args:
    array: the integers, contiguous.
    write: takes uint8 `[n]` to write tables into, and the first of the n integers.
    shifts: the shift of each table.
    most: how many integers are counted.

  Returns:
    float64 `[K, 256]`, in proportion to all integers that have a symbol.
  """
  flat = array.reshape(-1)
  bias = layouts.Integers(array.dtype, 0).bias
  counts, seen = np.zeros(len(shifts) * layouts.WINDOW), 0
  for run in sampled(flat.size, most):
    numbers = flat[run].astype(np.int64)
    of_run = np.zeros(numbers.size, np.uint8)
    write(of_run, run.start)
    symbols = (numbers >> shifts[of_run]) + bias
    inside = (symbols >= 0) & (symbols < layouts.WINDOW)
    places = of_run.astype(np.int64) * layouts.WINDOW + symbols
    counts += np.bincount(places[inside], minlength=counts.size)
    seen += numbers.size
  return counts.reshape(-1, layouts.WINDOW) * (flat.size / max(seen, 1))


def known_group(part: Part, known: known_lib.Known) -> Group:
  """Returns the group of integers whose classes are known."""

  def write(out: np.ndarray, start: int) -> None:
    out[:] = known.classes[start : start + out.size]

  counts = histogram(part.numbers, write, np.array(known.shifts))
  bands, nbytes = known_lib.fit(known, np.rint(counts).astype(np.int64))
  layout = layouts.Integers(part.numbers.dtype, max(known.shifts))
  return Group(layout, bands, [part], [nbytes])

"""Plans: how each array of a record is stored, as the encoder chooses.

An array is coded as it is or as several parts, see `specs`. Parts of one layout form a
group, which shares frequency tables. A part that coding does not make smaller is stored
as it is. Scales, shifts and frequencies follow from samples: they only decide how many
bytes the elements take.

Shape letters: n units, S elements of a unit, N classes, K tables, A symbols.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax.coding import contexts as contexts_lib
from rotbits_jax.coding import layouts
from rotbits_jax.coding import pool
from rotbits_jax.coding import specs
from rotbits_jax.coding import statistics
from rotbits_jax.coding import tables
from rotbits_jax.system import host

_FLOATS = 1 << 16  # units that tell frequencies
_INTEGERS = 1 << 19  # units of integers, because these have more tables
_SIZES = 1 << 18  # integers that tell raw bits
_LEAST_SAMPLE = 1 << 12  # units of a part
_CHUNK = 1 << 16  # units that are counted at once, so that they fit the cache
_GROUP_BYTES = 100  # of a group in the spec and of a block without words, about
_OCTAVES = 63  # from the least scale of a group to the greatest
_BELOW = 4  # octaves from the scale of the first table to the minimum exponent
_EXPONENTS = contexts_lib.CLASSES // layouts.LEVELS  # minimum exponents of a group
_BINS_BELOW, _SEEN = 96, 128  # bins below the scale and in all that the window is among
_LEAST_INTEGER = 125  # the biased exponent of 1/4, the scale of the class 0 of integers
_SYMBOL_OCTAVES = 3  # of the mean size of signed integers, that symbols tell
_ROUNDS = 3  # by which the sum of frequencies of pairs becomes right
_ESCAPE_BITS = 24  # of an escape, and those of the unit
_MOST_SPREAD = 3  # of the scales of rows and columns of int8 in wide bins
# The share of the most frequent bin. Without a limit a pair would be too frequent.
_MOST_SHARE = {12: 0.66, tables.PRECISION: 0.33}


class Group(NamedTuple):
  """Parts of one layout, coded together."""

  layout: layouts.Layout
  contexts: contexts_lib.Contexts  # without scales if classes are known from elsewhere
  scales: list[contexts_lib.Scales]  # of each part
  parts: list[np.ndarray]  # contiguous
  places: list[int]  # those of the parts in the record
  nbytes: list[float]  # about how many bytes each part takes


class Plan(NamedTuple):
  """How the arrays of a record are stored."""

  arrays: list[np.ndarray]  # the arrays in C order
  zeros: list[specs.Zeros | None]  # of arrays that are stored without their zeros
  parts: list[np.ndarray]  # those of one array after the other
  groups: list[Group]  # the parts that are coded

  @property
  def plain(self) -> list[np.ndarray]:
    """The parts that are stored as they are."""
    coded = {place for group in self.groups for place in group.places}
    return [x for i, x in enumerate(self.parts) if i not in coded]


class _Draft(NamedTuple):
  """How a part is coded."""

  numbers: np.ndarray
  layout: layouts.Layout
  lines: statistics.Lines
  min_exponent: int = 0  # of floats that share a step
  place: int = 0  # that of the part in the record


class _Sample(NamedTuple):
  """Units from all over a part."""

  units: np.ndarray  # `[n, S]`
  classes: np.ndarray  # uint8 `[n]`
  weight: float  # how many units of the part one of the sample stands for


def make(arrays: Sequence[np.ndarray], known: Mapping[int, Group]) -> Plan:
  """Plans a record of arrays, of which some are groups of known classes."""
  for array in arrays:
    if np.asarray(array).dtype.name not in specs.DTYPES:
      raise ValueError(f'arrays of this dtype cannot be stored, got {array.dtype=}')
  whole = pool.each(host.contiguous, map(np.asarray, arrays))
  divided = pool.each(_divided, whole, [i in known for i in range(len(whole))])
  parts, drafts, last = list[np.ndarray](), list[_Draft](), list[Group]()
  for i, (_, numbers, of_parts) in enumerate(divided):
    drafts += [draft._replace(place=len(parts) + j) for j, draft in of_parts.items()]
    if i in known:
      last.append(known[i]._replace(places=[len(parts)]))
    parts += numbers
  groups = [x for x in map(_smaller, pool.each(_group, _by_layout(drafts))) if x]
  return Plan(whole, [form for form, *_ in divided], parts, groups + last)


def of_known(numbers: np.ndarray, classes: np.ndarray) -> Group:
  """Plans an array whose classes both sides know.

  Args:
    numbers: integers of at most 32 bits, at least one.
    classes: uint8 `[n]`, in C order. Integers of one class should be of similar size,
      and those of the fourth class above twice as large.
  """
  lines = np.zeros(1, int), np.zeros(1, int)
  draft = _Draft(numbers.reshape(-1, 1), layouts.Integers(numbers.dtype, 0), lines)
  group = _group([draft], contexts_lib.Scales(0, classes, np.zeros(1, np.uint8)))
  return group._replace(contexts=group.contexts._replace(scales=()))


def _divided(
  array: np.ndarray, is_known: bool
) -> tuple[specs.Zeros | None, list[np.ndarray], dict[int, _Draft]]:
  """Returns the form of an array, its parts, and how those are coded that can be."""
  form, parts, floats, min_exponent = None, [array], None, 0
  if array.size and array.dtype in layouts.FORMATS:
    bits = array.reshape(-1).view(f'u{array.itemsize}')
    floats, min_exponent = statistics.of_floats(bits, array.dtype)
    if statistics.has_zeros(bits, floats.raised):
      form, parts = _without_zeros(bits.reshape(-1, array.shape[-1]), array.dtype)
  elif specs.is_of_bytes(array.dtype):
    parts = [array.reshape(-1).view(np.uint8).reshape(-1, array.itemsize)]
  drafts: dict[int, _Draft] = {}
  for i, numbers in enumerate(() if is_known else parts):
    dtype = numbers.dtype
    layout: layouts.Layout = layouts.Integers(dtype, 0)
    if floats and dtype == array.dtype:
      layout = floats
    if not numbers.size or not layout.is_valid():
      continue
    if dtype.kind == 'i':
      layout = statistics.of_integers(numbers.reshape(-1))
    if form and i == 0:
      lines = statistics.densities(numbers)
    elif dtype == np.uint8:  # each byte of an element has a class
      lines = np.zeros(1, int), np.arange(1 if form else array.itemsize)
    else:
      lines = statistics.measure(numbers, layout.size)
      # Bins that are right for some lines are too wide for others.
      spread = np.std(lines[0]) + np.std(lines[1])
      if layout.raw_bits and dtype == np.int8 and spread > _MOST_SPREAD:
        layout = layouts.Integers(dtype, 0)
        lines = statistics.measure(numbers, layout.size)
    drafts[i] = _Draft(numbers, layout, lines, min_exponent)
  return form, parts, drafts


def _without_zeros(
  bits: np.ndarray, dtype: np.dtype
) -> tuple[specs.Zeros, list[np.ndarray]]:
  """Returns the form of floats with many zeros, given their rows, and its parts."""
  is_set = bits << 1 > 0
  values, negative = bits[is_set], bits[~is_set] > 0
  form = specs.Zeros(values.size, bool(negative.any()))
  signs = np.packbits(negative[: negative.size if form.negative else 0])
  return form, [np.packbits(is_set, axis=1), signs, values.view(dtype)]


def _by_layout(drafts: Sequence[_Draft]) -> list[list[_Draft]]:
  """Puts parts of one layout together whose minimum exponents a group can tell."""
  groups: dict[tuple[layouts.Layout, int], list[_Draft]] = {}
  least = min((x.min_exponent for x in drafts if x.layout.raised), default=0)
  for draft in drafts:
    exponents = (draft.min_exponent - least) // _EXPONENTS
    groups.setdefault((draft.layout, exponents), []).append(draft)
  return [*groups.values()]


def _smaller(group: Group) -> Group | None:
  """Returns the group without parts that coding does not make smaller."""
  saved = [x.nbytes - y for x, y in zip(group.parts, group.nbytes, strict=True)]
  kept = [i for i, nbytes in enumerate(saved) if nbytes > 0]
  head = len(contexts_lib.to_bytes(group.contexts)) + _GROUP_BYTES
  if sum(saved[i] for i in kept) < head:
    return None
  fields: list[Any] = [[x[i] for i in kept] for x in group[2:]]
  contexts = group.contexts._replace(scales=tuple(fields[0]))
  return Group(group.layout, contexts, *fields)


# ---- classes and tables --------------------------------------------------------------


def _group(drafts: list[_Draft], known: contexts_lib.Scales | None = None) -> Group:
  """Chooses the classes and the tables of parts of one layout by samples of them."""
  layout = drafts[0].layout
  scales, base = _classes(drafts) if known is None else ([known], np.zeros(1, int))
  several, seen, told = len(drafts), layout.alphabet, base
  most = _INTEGERS
  if isinstance(layout, layouts.Pairs):
    most = max(_FLOATS // several, _LEAST_SAMPLE)
    seen = seen if layout.raised else _SEEN
  samples = [_sample(*x, most) for x in zip(drafts, scales, strict=True)]
  if isinstance(layout, layouts.Integers):
    base = _shifts(samples, layout)
    raw_bits = min(-(-int(base.max()) // layouts.RAW) * layouts.RAW, layouts.MOST_RAW)
    layout = dataclasses.replace(layout, raw_bits=raw_bits)
    base = base[: layout.bases]
    told = layout.packed(base, np.arange(layout.most_tables))
  counts = [_counts(x, layout, told, seen) for x in samples]
  rows = np.sum(counts, axis=0)
  # The symbols are those that occur most; others are escapes.
  ends = np.cumsum(np.append(0, rows[:, :-1].sum(axis=0)))
  first = int(np.argmax(ends[layout.alphabet :] - ends[: -layout.alphabet]))
  window = slice(first, first + layout.alphabet)

  def divided(rows: np.ndarray) -> np.ndarray:
    coded = rows[:, window]
    return np.append(coded, (rows.sum(axis=1) - coded.sum(axis=1))[:, None], axis=1)

  is_first = np.append(True, rows[1:].any(axis=1))  # others have no symbols
  rows, table_of = _merged(divided(rows[is_first]))
  frequencies = _frequencies(rows, layout)
  bits = layout.stored_precision - np.log2(np.maximum(frequencies, 0.5))
  escape = _ESCAPE_BITS + 8 * layout.size * layout.dtype.itemsize
  bits = np.where(frequencies > 0, bits, escape)
  bits = np.append(bits, np.full((len(bits), 1), escape), axis=1)
  nbytes = []
  for draft, sample, of_draft in zip(drafts, samples, counts, strict=True):
    raw: float = layout.raw_bits
    if raw and isinstance(layout, layouts.Integers):
      raw = np.mean(told[sample.classes] >> 8)
    coded = (divided(of_draft[is_first]) * bits[table_of]).sum()
    nbytes.append(draft.numbers.size * float(coded / of_draft.sum() + raw) / 8 + 2)
  table_of = table_of[np.cumsum(is_first) - 1]
  contexts = contexts_lib.Contexts(tuple(scales), base + first, table_of, frequencies)
  parts, places = [x.numbers for x in drafts], [x.place for x in drafts]
  return Group(layout, contexts, scales, parts, places, nbytes)


def _classes(drafts: list[_Draft]) -> tuple[list[contexts_lib.Scales], np.ndarray]:
  """Returns scales whose classes a byte tells, and what these count from."""
  layout, classes = drafts[0].layout, contexts_lib.CLASSES
  if layout.raised:
    start, scales = min(x.min_exponent for x in drafts), []
    for draft in drafts:
      octave, exponent = draft.min_exponent - _BELOW, draft.min_exponent - start
      several = statistics.within(draft.lines, octave, layouts.LEVELS)
      scales.append(several._replace(base=several.base + layouts.LEVELS * exponent))
    return scales, np.array([start])
  if layout.type_name == 'floats':
    least = min(int(rows.min() + columns.min()) for _, _, (rows, columns), *_ in drafts)
    most = max(int(rows.max() + columns.max()) for _, _, (rows, columns), *_ in drafts)
    # A lower scale may be that of an array of zeros.
    octave = max(least // statistics.STEPS, most // statistics.STEPS - _OCTAVES)
    scales = [statistics.within(x.lines, octave, classes) for x in drafts]
    return scales, np.array([2 * octave - _BINS_BELOW])
  octave = 0 if layout.dtype == np.uint8 else _LEAST_INTEGER
  scales = [statistics.within(x.lines, octave, layout.most_tables) for x in drafts]
  if layout.type_name == 'codes':
    # Bins count from -128, and the window is among those around 0.
    return scales, np.array([(128 >> layout.raw_bits) - _SEEN // 2])
  if layout.dtype == np.uint8:  # masks share classes; those of others follow each other
    first = statistics.DENSITIES
    for i, draft in enumerate(drafts):
      if draft.lines[0].size == 1:
        count = draft.lines[1].size
        scales[i] = scales[i]._replace(base=min(first, classes - count))
        first += count
  return scales, np.zeros(1, int)


def _sample(draft: _Draft, scales: contexts_lib.Scales, most: int) -> _Sample:
  """Takes about `most` of the units of a part."""
  numbers, size = draft.numbers, draft.layout.size
  flat = numbers.reshape(-1)
  if isinstance(draft.layout, layouts.Pairs):
    flat = flat.view(f'u{numbers.itemsize}')
  # A last number without a pair is left out.
  flat = flat[: flat.size // size * size] if flat.size >= size else flat.repeat(size)
  units = flat.reshape(-1, size)
  runs = statistics.runs(len(units), most)
  classes = np.empty((len(runs), runs[0].stop), np.uint8)
  for row, run in zip(classes, runs, strict=True):
    scales.write(row, run.start, numbers.shape, size)
  sample = np.concatenate([units[run] for run in runs])
  return _Sample(sample, classes.reshape(-1), len(units) / len(sample))


def _shifts(samples: list[_Sample], layout: layouts.Integers) -> np.ndarray:
  """Returns the shift of each class, so that few integers have no symbol."""
  step, count = max(sum(len(x.units) for x in samples) // _SIZES, 1), layout.most_tables
  classes = np.concatenate([x.classes[::step] for x in samples])
  sizes = np.abs(np.concatenate([x.units[::step, 0] for x in samples]).astype(float))
  large = np.count_nonzero(sizes > 126)
  if 1000 * large < sizes.size or layout.dtype == np.uint8:
    # The few large ones are escapes. Raw bits would double the time of all others.
    return np.zeros(count, int)
  counts = np.bincount(classes, minlength=count)
  seen = np.flatnonzero(counts)
  # Roots, because a few great integers must not tell more.
  roots = np.bincount(classes, np.sqrt(sizes))[seen] / counts[seen]
  octaves = np.interp(np.arange(count), seen, 2 * np.log2(roots + 1e-9))
  return np.ceil(octaves - _SYMBOL_OCTAVES).clip(0, layouts.MOST_RAW).astype(int)


def _counts(
  sample: _Sample, layout: layouts.Layout, told: np.ndarray, seen: int
) -> np.ndarray:
  """Counts the first `seen` symbols of each table, and behind them the others."""
  width = seen + 1
  counts = np.zeros(layout.most_tables * width, int)
  for start in range(0, len(sample.units), _CHUNK):
    some = slice(start, start + _CHUNK)
    table_of, of_units = layout.told(sample.classes[some].astype(int), told)
    symbols = layout.symbols(sample.units[some], of_units[:, None]).astype(np.uint32)
    places = table_of[:, None] * width + np.minimum(symbols, np.uint32(seen))
    counts += np.bincount(places.reshape(-1), minlength=counts.size)
  return counts.reshape(-1, width) * sample.weight


def _merged(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Joins neighbours where this saves bytes; returns the sums, and that of each row."""
  table_of, some = np.arange(len(rows)), rows.any(axis=0)
  # A symbol of a table takes 16 bits, about.
  cost = lambda x: tables.entropy_bits(x) + 16 * np.count_nonzero(x, axis=-1)
  bits = cost(rows[:, some])
  while True:
    used = rows[:, some]
    joined = cost(used[:-1] + used[1:])
    saved = bits[:-1] + bits[1:] - joined
    around = np.pad(saved, 1, constant_values=-1.0)
    is_joined = (saved >= 0) & (saved >= around[:-2]) & (saved > around[2:])
    if not is_joined.any():
      return rows, table_of
    table_of = np.cumsum(np.append(True, ~is_joined))[table_of] - 1
    starts = np.flatnonzero(np.append(True, ~is_joined))
    bits[:-1] = np.where(is_joined, joined, bits[:-1])
    bits, rows = bits[starts], np.add.reduceat(rows, starts)


def _frequencies(counts: np.ndarray, layout: layouts.Layout) -> np.ndarray:
  """Returns frequencies in proportion to counts, which end with those of escapes."""
  if isinstance(layout, layouts.Integers):
    whole = counts.sum(axis=1, keepdims=True)
    is_rare = counts * (8 << layout.precision) < whole
    counts = np.where(is_rare, 0, np.ceil(counts))
    counts[:, -1:] += np.ceil(whole - counts.sum(axis=1, keepdims=True)).clip(1)
    return tables.quantize(counts, layout.precision)[:, :-1]
  half = np.arange(layout.alphabet) < layout.alphabet // 2
  coded, total = counts[:, :-1], 1 << layout.precision
  shares = np.where(coded.any(axis=1, keepdims=True), coded, half)
  shares = shares / shares.sum(axis=1, keepdims=True)
  most, even = shares.max(axis=1, keepdims=True), 2 / layout.alphabet
  excess = (most - _MOST_SHARE[layout.precision]) / np.maximum(most - even, 1e-9)
  shares += np.maximum(excess, 0) * (even * half - shares)
  weights = (shares[:, :, None] * shares[:, None]).reshape(len(shares), -1)[:, :-1]
  size = np.full((len(shares), 1), float(tables.TOTAL))
  for i in itertools.count():
    frequencies = np.rint(shares * size).astype(np.int64)
    pairs = tables.of_pairs(frequencies, layout.precision)
    used = pairs.sum(axis=1, keepdims=True)
    if i >= _ROUNDS and (used < total).all():
      break
    # Rounding should leave to the escape the slots of the pairs that have none.
    slots = total * np.where(pairs > 0, weights, 0).sum(axis=1, keepdims=True)
    size *= np.sqrt(np.minimum(slots, total - 1 - i) / used)
  return frequencies

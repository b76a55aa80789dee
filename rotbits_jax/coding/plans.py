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
_ESCAPE_BITS = 24  # of an escape, and those of the unit
_MOST_SPREAD = 3  # of the scales of rows and columns of int8 in wide bins
# The share of the most frequent bin. Without a limit a pair would be too frequent.
_MOST_SHARE = {12: 0.66, tables.PRECISION: 0.33}


class Part(NamedTuple):
  """A part that is coded."""

  place: int  # among the parts of all arrays
  numbers: np.ndarray  # contiguous
  scales: contexts_lib.Scales
  nbytes: float  # that it takes, about


class Group(NamedTuple):
  """Parts of one layout, coded together."""

  layout: layouts.Layout
  contexts: contexts_lib.Contexts
  parts: list[Part]
  is_known: bool = False  # whether the decoder knows the scales from elsewhere

  @property
  def stored_scales(self) -> list[contexts_lib.Scales]:
    return [] if self.is_known else [x.scales for x in self.parts]

  @property
  def nbytes(self) -> float:
    """The bytes that the parts take, about."""
    return sum(x.nbytes for x in self.parts)


class Plan(NamedTuple):
  """How the arrays of a record are stored."""

  arrays: list[np.ndarray]  # the arrays in C order
  parts: list[list[np.ndarray]]  # those of each array, see `specs.ArraySpec`
  groups: list[Group]  # the parts that are coded

  @property
  def plain(self) -> list[np.ndarray]:
    """The parts that are stored as they are."""
    coded = {part.place for group in self.groups for part in group.parts}
    parts = enumerate(itertools.chain(*self.parts))
    return [part for place, part in parts if place not in coded]


class _Draft(NamedTuple):
  """A part, and how it is coded."""

  numbers: np.ndarray
  layout: layouts.Layout | None = None  # None if it is stored as it is
  lines: statistics.Lines = (np.zeros(1, int), np.zeros(1, int))
  min_exponent: int = 0  # of floats that share a step


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
  drafts = [*itertools.chain(*divided)]
  # A group can tell minimum exponents that are not far apart.
  least = min((x.min_exponent for x in drafts if x.min_exponent), default=0)
  several: dict[Any, dict[int, _Draft]] = {}
  for i, draft in enumerate(drafts):
    if draft.layout:
      key = draft.layout, (draft.min_exponent - least) // _EXPONENTS
      several.setdefault(key, {})[i] = draft
  planned = pool.each(_group, (layout for layout, _ in several), several.values())
  groups = [group for group in map(_smaller, planned) if group]
  starts = [0, *itertools.accumulate(map(len, divided))]
  for i, group in known.items():
    groups.append(group._replace(parts=[group.parts[0]._replace(place=starts[i])]))
  return Plan(whole, [[x.numbers for x in several] for several in divided], groups)


def of_known(numbers: np.ndarray, classes: np.ndarray) -> Group:
  """Plans an array whose classes both sides know.

  Args:
    numbers: integers of at most 32 bits, at least one.
    classes: uint8 `[n]`, in C order. Integers of one class should be of similar size,
      and those of the fourth class above twice as large.
  """
  layout = layouts.Integers(numbers.dtype, 0)
  scales = contexts_lib.Scales(0, classes, np.zeros(1, np.uint8))
  group = _group(layout, {0: _Draft(numbers.reshape(-1, 1))}, scales)
  return group._replace(is_known=True)


def _divided(array: np.ndarray, is_known: bool) -> list[_Draft]:
  """Returns the parts of an array."""
  dtype, size = array.dtype, array.itemsize
  if is_known or not array.size or dtype.kind == 'b':
    return [_Draft(array)]
  of_bytes = layouts.Integers(np.dtype(np.uint8), 0)
  if dtype in layouts.FORMATS:
    bits = array.reshape(-1).view(f'u{size}')
    layout, min_exponent = statistics.of_floats(bits, dtype)
    floats = lambda x: _Draft(x, layout, statistics.measure(x, 2), min_exponent)
    if not statistics.has_zeros(bits, min_exponent > 0):
      return [floats(array)]
    rows = bits.reshape(-1, array.shape[-1])
    is_set = rows << 1 > 0
    mask, values = np.packbits(is_set, axis=1), rows[is_set].view(dtype)
    negative = rows[~is_set] > 0
    parts = [
      _Draft(mask, of_bytes, statistics.densities(mask)),
      floats(values) if values.size else _Draft(values),
    ]
    return parts + [_Draft(np.packbits(negative), of_bytes)] * bool(negative.any())
  if specs.is_of_bytes(dtype):
    array = array.reshape(-1).view(np.uint8).reshape(-1, size)
  if array.dtype == np.uint8:  # each byte of an element has a class
    return [_Draft(array, of_bytes, (np.zeros(1, int), np.arange(size)))]
  of_integers = statistics.of_integers(array.reshape(-1))
  lines = statistics.measure(array, of_integers.size)
  # Bins that are right for some lines are too wide for others.
  if of_integers.raw_bits and np.std(lines[0]) + np.std(lines[1]) > _MOST_SPREAD:
    of_integers = layouts.Integers(dtype, 0)
    lines = statistics.measure(array, of_integers.size)
  return [_Draft(array, of_integers, lines)]


def _smaller(group: Group) -> Group | None:
  """Returns the group without parts that coding does not make smaller."""
  kept = [x for x in group.parts if x.nbytes < x.numbers.nbytes]
  group = group._replace(parts=kept)
  head = len(contexts_lib.to_bytes(group.contexts, group.stored_scales)) + _GROUP_BYTES
  return group if group.nbytes + head < sum(x.numbers.nbytes for x in kept) else None


# ---- classes and tables --------------------------------------------------------------


def _group(
  layout: layouts.Layout,
  drafts: Mapping[int, _Draft],  # by the places of parts
  known: contexts_lib.Scales | None = None,
) -> Group:
  """Chooses the classes and the tables of parts of one layout by samples of them."""
  several = [*drafts.values()]
  scales, base = [known] if known else [], np.zeros(1, int)
  if not known:
    scales, base = _classes(several, layout)
  seen, told, most = layout.alphabet, base, _INTEGERS
  if isinstance(layout, layouts.Pairs):
    most = max(_FLOATS // len(several), _LEAST_SAMPLE)
    seen = seen if layout.raised else _SEEN
  numbers = [x.numbers for x in several]
  samples = [_sample(*x, layout, most) for x in zip(numbers, scales, strict=True)]
  if isinstance(layout, layouts.Integers):
    base = _shifts(samples, layout)
    raw_bits = min(-(-int(base.max()) // layouts.RAW) * layouts.RAW, layouts.MOST_RAW)
    layout = dataclasses.replace(layout, raw_bits=raw_bits)
    base = base[: layout.bases]
    told = layout.packed(base, np.arange(layout.most_tables))
  counts = np.stack([_counts(x, layout, told, seen) for x in samples])
  # The symbols are those that occur most; others are escapes.
  ends = np.cumsum(np.append(0, counts[..., :-1].sum(axis=(0, 1))))
  windows = ends[layout.alphabet :] - ends[: -layout.alphabet]
  # The middle one of equal windows: two of the last symbol would be an escape.
  first = int(np.median(np.flatnonzero(windows == windows.max())))
  coded = counts[..., first : first + layout.alphabet]
  escapes = counts.sum(axis=-1, keepdims=True) - coded.sum(axis=-1, keepdims=True)
  counts = np.append(coded, escapes, axis=-1)
  is_first = np.append(True, counts[:, 1:].any(axis=(0, 2)))  # others have no symbols
  rows, table_of = _merged(counts[:, is_first].sum(axis=0))
  table_of = table_of[np.cumsum(is_first) - 1]
  frequencies = _frequencies(rows, layout)
  contexts = contexts_lib.Contexts(base + first, table_of, frequencies)
  escape = _ESCAPE_BITS + 8 * layout.size * layout.dtype.itemsize
  bits = layout.stored_precision - np.log2(np.maximum(frequencies, 0.5))
  bits = np.pad(np.where(frequencies > 0, bits, escape), ((0, 0), (0, 1)))
  bits[:, -1] = escape
  each = (counts * bits[table_of]).sum(axis=(1, 2)) / counts.sum(axis=(1, 2))
  if isinstance(layout, layouts.Integers):
    each += [np.mean(told[x.classes] >> 8) for x in samples]
  else:
    each += layout.raw_bits
  nbytes = [x.size * y / 8 + 2 for x, y in zip(numbers, each.tolist(), strict=True)]
  parts = map(Part, drafts, numbers, scales, nbytes)
  return Group(layout, contexts, [*parts])


def _classes(
  drafts: Sequence[_Draft], layout: layouts.Layout
) -> tuple[list[contexts_lib.Scales], np.ndarray]:
  """Returns scales whose classes a byte tells, and what these count from."""
  scales = []
  if layout.dtype == np.uint8:
    # Masks share classes; those of others follow each other.
    base = statistics.DENSITIES
    for draft in drafts:
      rows, columns = (x.astype(np.uint8) for x in draft.lines)
      if rows.size > 1:
        scales.append(contexts_lib.Scales(0, rows, columns))
      else:
        own = base % contexts_lib.CLASSES
        scales.append(contexts_lib.Scales(own, np.zeros(1, np.uint8), columns))
        base += columns.size
    return scales, np.zeros(1, int)
  octave, base, count = _LEAST_INTEGER, 0, layout.most_tables
  least = min(x.min_exponent for x in drafts)
  if layout.type_name == 'floats':
    most = max(int(x.lines[0].max() + x.lines[1].max()) for x in drafts)
    octave, count = most // statistics.STEPS - _OCTAVES, contexts_lib.CLASSES
    base = 2 * octave - _BINS_BELOW
  elif layout.type_name == 'raised':
    base = least
  elif layout.type_name == 'codes':
    # Bins count from -128, and the window is among those around 0.
    base = (128 >> layout.raw_bits) - _SEEN // 2
  for draft in drafts:
    exponent = draft.min_exponent
    start = exponent - _BELOW if exponent else octave
    several = statistics.within(draft.lines, start, count)
    above = layouts.LEVELS * (exponent - least)
    scales.append(several._replace(base=several.base + above))
  return scales, np.array([base])


def _sample(
  numbers: np.ndarray, scales: contexts_lib.Scales, layout: layouts.Layout, most: int
) -> _Sample:
  """Takes about `most` of the units of a part."""
  flat, size = numbers.reshape(-1), layout.size
  if isinstance(layout, layouts.Pairs):
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
  """Returns frequencies in proportion to counts, which end with those of escapes.

  Symbols that are too rare for a slot are escapes.
  """
  is_pair = isinstance(layout, layouts.Pairs)
  size = np.full((len(counts), 1), float(1 << layout.stored_precision))
  # Spread over half of the bins, pairs of rare ones have slots.
  even = (np.arange(layout.alphabet) < layout.alphabet // 2) * (2 / layout.alphabet)
  coded = counts[:, : layout.alphabet]
  whole = (coded if is_pair else counts).sum(axis=1, keepdims=True)
  shares = np.where(whole > 0, coded / np.maximum(whole, 1), even)
  if is_pair:  # else a pair would be too frequent
    most = shares.max(axis=1, keepdims=True)
    excess = (most - _MOST_SHARE[layout.precision]) / np.maximum(most - even[0], 1e-9)
    shares += np.maximum(excess, 0) * (even - shares)
  while True:
    frequencies = np.rint(shares * size).astype(np.int64)
    used = tables.of_pairs(frequencies, layout.precision) if is_pair else frequencies
    used, room = used.sum(axis=1, keepdims=True), (1 << layout.precision) - 1
    if (used <= room).all():
      return frequencies
    size *= np.sqrt(room / np.maximum(used, room))

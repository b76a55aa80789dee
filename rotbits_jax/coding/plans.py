"""Plans: how each array of a record is stored, as the encoder chooses.

An array is coded as it is or as several parts, see `specs`. Parts of one layout form a
group, which shares frequency tables. A part that coding does not make smaller is stored
as it is. Scales, shifts and frequencies follow from samples: they only decide how many
bytes the elements take.
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
from rotbits_jax.coding import units as units_lib
from rotbits_jax.system import host

_UNITS = 1 << 16  # that tell frequencies
_BYTES = 1 << 19  # that do, because these have more tables
_SIZES = 1 << 13  # units that tell raw bits
_LEAST_SAMPLE = 1 << 12  # units of a part
_GROUP_BYTES = 100  # of a group in the spec and of a block without words, about
_OCTAVES = 63  # from the least scale of a group to the greatest
_BELOW = 4  # octaves from the scale of the first table to the minimum exponent
_EXPONENTS = units_lib.CLASSES // layouts.LEVELS  # minimum exponents of a group
_BINS_BELOW, _SEEN = 96, 128  # bins below the scale and in all that the window is among
_LEAST_CODE = 125  # the biased exponent of 1/4, the scale of the class 0 of codes
_ONE = 127  # the biased exponent of 1, in the scales of integers
_FAR, _FARTHEST = 1e-3, 5e-4  # shares of differences without a symbol, and too large
_ESCAPE_BITS = 24  # of an escape, and those of the unit
_MOST_SPREAD = 3  # of the scales of rows and columns of int8 in wide bins
# The share of the most frequent bin. Without a limit a pair would be too frequent.
_MOST_SHARE = {'floats': 0.33, 'raised': 0.66, 'codes': 0.66, 'bytes': 1}
_MOST_SHARE |= {'integers': 0.49, 'known': 0.49}  # of those that are not 0


class Known(NamedTuple):
  """The numbers that both sides know, relative to which an array is coded."""

  bits: np.ndarray  # unsigned integers `[n]`, of numbers near those of the array
  lines: statistics.Lines  # quarter octaves: sizes of differences over the least ULP


class Part(NamedTuple):
  """A part that is coded."""

  place: int  # among the parts of all arrays
  numbers: np.ndarray  # contiguous
  scales: contexts_lib.Scales
  nbytes: float  # that it takes, about
  known: np.ndarray | None  # unsigned integers `[n]`, known numbers


class Group(NamedTuple):
  """Parts of one layout, coded together."""

  layout: layouts.Layout
  contexts: contexts_lib.Contexts
  parts: list[Part]

  @property
  def scales(self) -> list[contexts_lib.Scales]:
    return [x.scales for x in self.parts]

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
  known: np.ndarray | None = None


def make(arrays: Sequence[np.ndarray], known: Mapping[int, Known]) -> Plan:
  """Plans a record of arrays, of which some are coded relative to known ones."""
  for array in arrays:
    if np.asarray(array).dtype.name not in specs.DTYPES:
      raise ValueError(f'arrays of this dtype cannot be stored, got {array.dtype=}')
  whole = pool.each(host.contiguous, map(np.asarray, arrays))
  divided = pool.each(_divided, whole, map(known.get, range(len(whole))))
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
  return Plan(whole, [[x.numbers for x in several] for several in divided], groups)


def _divided(array: np.ndarray, known: Known | None) -> list[_Draft]:
  """Returns the parts of an array."""
  dtype, size = array.dtype, array.itemsize
  if not array.size or dtype.kind == 'b':
    return [_Draft(array)]
  if known is not None:
    draft = _Draft(array, None, known.lines, known=known.bits)
    return [_with_raw_bits(layouts.Differences(dtype, 0, 'known'), draft)]
  of_bytes = layouts.Bytes(np.dtype(np.uint8), 0)
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
  lines = statistics.measure(array, 2)
  of_codes = statistics.of_codes(array.reshape(-1)) if dtype == np.int8 else None
  # Bins that are right for some lines are too wide for others.
  is_wide = np.std(lines[0]) + np.std(lines[1]) > _MOST_SPREAD
  if of_codes and not (of_codes.raw_bits and is_wide):
    return [_Draft(array, of_codes, lines)]
  return [_with_raw_bits(layouts.Differences(dtype, 0), _Draft(array, None, lines))]


def _with_raw_bits(layout: layouts.Differences, draft: _Draft) -> _Draft:
  """Returns the draft with a layout that has raw bits for all but a few differences."""
  (scales,), base = _classes([draft], layout)
  rows = _sample(draft, scales, layout, _SIZES)
  most = dataclasses.replace(layout, raw_bits=min(layouts.MOST_RAW, layout.width))
  bins = np.concatenate([layout.counted(x, base)[1] for x in rows])
  shifts = np.concatenate([most.counted(x, base)[2] for x in rows])
  # Raw bits take time.
  if np.count_nonzero(bins >= units_lib.BINS) > _FAR * np.count_nonzero(bins):
    most_shift = np.quantile(shifts, 1 - _FARTHEST).clip(1)
    raw_bits = layouts.RAW * int(np.ceil(most_shift / layouts.RAW))
    layout = dataclasses.replace(layout, raw_bits=raw_bits)
  return draft._replace(layout=layout)


def _smaller(group: Group) -> Group | None:
  """Returns the group without parts that coding does not make smaller."""
  kept = [x for x in group.parts if x.nbytes < x.numbers.nbytes]
  group = group._replace(parts=kept)
  head = len(contexts_lib.to_bytes(group.contexts, group.scales)) + _GROUP_BYTES
  return group if group.nbytes + head < sum(x.numbers.nbytes for x in kept) else None


def _group(layout: layouts.Layout, drafts: Mapping[int, _Draft]) -> Group:
  """Chooses the classes and the tables of parts of one layout by samples of them.

  The parts are given by their places.
  """
  several = [*drafts.values()]
  scales, base = _classes(several, layout)
  seen, most = layout.alphabet, max(_UNITS // len(several), _LEAST_SAMPLE)
  if isinstance(layout, layouts.Bytes):
    most = _BYTES
  elif layout.type_name in ('floats', 'codes'):
    seen = _SEEN
  samples = [_sample(*x, layout, most) for x in zip(several, scales, strict=True)]
  counted = [_counts(x, layout, base, seen) for x in samples]
  numbers, known = [x.numbers for x in several], [x.known for x in several]
  sizes, counts = np.array([x.size for x in numbers]), np.stack([x for x, _ in counted])
  counts = counts * (sizes / counts.sum(axis=(1, 2)))[:, None, None]
  # The symbols are those that occur most; others are escapes.
  ends = np.cumsum(np.append(0, counts[..., :-1].sum(axis=(0, 1))))
  windows = ends[layout.alphabet :] - ends[: -layout.alphabet]
  # The middle one of equal windows: two of the last symbol would be an escape.
  first = int(np.median(np.flatnonzero(windows == windows.max())))
  coded = counts[..., first : first + layout.alphabet]
  escapes = counts.sum(axis=-1, keepdims=True) - coded.sum(axis=-1, keepdims=True)
  counts = np.append(coded, escapes, axis=-1)
  rows, table_of = _merged(counts.sum(axis=0), layout.most_stored)
  frequencies = _frequencies(rows, layout)
  contexts = contexts_lib.Contexts(base + first, table_of, frequencies)
  escape = _ESCAPE_BITS + 8 * layout.size * layout.dtype.itemsize
  bits = layout.stored_precision - np.log2(np.maximum(frequencies, 0.5))
  bits = np.pad(np.where(frequencies > 0, bits, escape), ((0, 0), (0, 1)))
  bits[:, -1] = escape
  total = (counts * bits[table_of]).sum(axis=(1, 2)) + sizes * [x for _, x in counted]
  nbytes = (total / 8 + 2).tolist()
  return Group(layout, contexts, [*map(Part, drafts, numbers, scales, nbytes, known)])


def _classes(
  drafts: Sequence[_Draft], layout: layouts.Layout
) -> tuple[list[contexts_lib.Scales], np.ndarray]:
  """Returns scales whose classes fit a byte, and the base of the contexts."""
  scales = []
  if layout.dtype == np.uint8:
    # Masks share classes; those of others follow each other.
    base = statistics.DENSITIES
    for draft in drafts:
      rows, columns = (x.astype(np.uint8) for x in draft.lines)
      if rows.size > 1:
        scales.append(contexts_lib.Scales(0, rows, columns))
      else:
        own = base % units_lib.CLASSES
        scales.append(contexts_lib.Scales(own, np.zeros(1, np.uint8), columns))
        base += columns.size
    return scales, np.zeros(1, int)
  octave, base, count = _LEAST_CODE, 0, layout.most_tables
  least = min(x.min_exponent for x in drafts)
  if layout.type_name in ('floats', 'integers', 'known'):
    most = max(int(x.lines[0].max() + x.lines[1].max()) for x in drafts)
    octave, count = most // statistics.STEPS - _OCTAVES, units_lib.CLASSES
    base = 2 * octave - _BINS_BELOW
    if layout.type_name != 'floats':
      one = _ONE if layout.type_name == 'integers' else 0
      base = layouts.ONE_ULP + statistics.STEPS * (octave - one)
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
  draft: _Draft, scales: contexts_lib.Scales, layout: layouts.Layout, most: int
) -> list[units_lib.Row]:
  """Takes about `most` of the units of a part, in runs."""
  numbers, size, rows = draft.numbers, layout.size, list[units_lib.Row]()
  flat = numbers.reshape(-1).view(f'u{numbers.itemsize}')
  count = max(flat.size // size, 1)  # without a last number that has no pair
  for run in statistics.runs(count, most):
    classes = np.empty(run.stop - run.start, np.uint8)
    scales.write(classes, run.start, numbers.shape, size)
    some = slice(run.start * size, run.stop * size)
    units = np.resize(flat[some], (classes.size, size))
    known = np.zeros_like(units)
    if draft.known is not None:
      known = np.resize(draft.known[some], units.shape)
    rows.append(units_lib.Row(classes[:, None].astype(np.int32), known, units, []))
  return rows


def _counts(
  sample: Sequence[units_lib.Row], layout: layouts.Layout, base: np.ndarray, seen: int
) -> tuple[np.ndarray, float]:
  """Counts the first `seen` symbols of each table, and behind them the others.

  Also returns the mean number of raw bits of a number.
  """
  width, raw_bits = seen + 1, list[float]()
  counts = np.zeros(layout.most_tables * width, int)
  for row in sample:
    table_of, symbols, bits = layout.counted(row, base)
    places = table_of * width + np.minimum(symbols.astype(np.uint32), np.uint32(seen))
    counts += np.bincount(places.reshape(-1), minlength=counts.size)
    raw_bits.append(float(np.mean(bits)))
  return counts.reshape(-1, width), float(np.mean(raw_bits))


def _merged(rows: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Joins neighbours where this saves bytes, and until there are at most so many.

  Returns the sums, and that of each row.
  """
  is_first = np.append(True, rows[1:].any(axis=1))  # others have no symbols
  rows, table_of, some = rows[is_first], np.cumsum(is_first) - 1, rows.any(axis=0)
  # A symbol of a table takes 16 bits, about.
  cost = lambda x: tables.entropy_bits(x) + 16 * np.count_nonzero(x, axis=-1)
  bits = cost(rows[:, some])
  while True:
    used = rows[:, some]
    joined = cost(used[:-1] + used[1:])
    saved = bits[:-1] + bits[1:] - joined
    around = np.pad(saved, 1, constant_values=-np.inf)
    is_worth = (saved >= 0) | (len(rows) > most)
    is_joined = is_worth & (saved >= around[:-2]) & (saved > around[2:])
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
  size = np.full((len(counts), 1), float(1 << layout.stored_precision))
  # Spread over half of the bins, pairs of rare ones have slots.
  even = (np.arange(layout.alphabet) < layout.alphabet // 2) * (2 / layout.alphabet)
  coded = counts[:, : layout.alphabet]
  whole = counts if isinstance(layout, layouts.Bytes) else coded
  whole = whole.sum(axis=1, keepdims=True)
  shares = np.where(whole > 0, coded / np.maximum(whole, 1), even)
  limited = shares[:, 1:] if isinstance(layout, layouts.Differences) else shares
  most = limited.max(axis=1, keepdims=True)
  excess = (most - _MOST_SHARE[layout.type_name]) / np.maximum(most - even[0], 1e-9)
  shares += np.maximum(excess, 0) * (even - shares)
  room = (1 << layout.precision) - 1
  while True:
    frequencies = np.rint(shares * size).astype(np.int64)
    used = layout.frequencies(frequencies).sum(axis=1).reshape(len(counts), -1)
    if used.max() <= room:
      return frequencies
    size *= np.sqrt(room / np.maximum(used, room).max(axis=1, keepdims=True))

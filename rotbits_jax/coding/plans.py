"""Plans: how each array of a record is stored, as the encoder chooses.

An array is coded as it is or as several parts, see `specs`. Parts of one layout form a
group, which shares frequency tables. A part that coding does not make smaller is stored
as it is. Scales, shifts and frequencies follow from samples: they only decide how many
bytes the elements take.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import pool
from rotbits_jax.coding import contexts as contexts_lib
from rotbits_jax.coding import layouts
from rotbits_jax.coding import models
from rotbits_jax.coding import scales as scales_lib
from rotbits_jax.coding import specs
from rotbits_jax.coding import statistics
from rotbits_jax.coding import tables
from rotbits_jax.coding import units as units_lib
from rotbits_jax.structured import masks
from rotbits_jax.structured import ulps
from rotbits_jax.system import host

_UNITS = 1 << 16  # that tell frequencies
_BYTES = 1 << 19  # that do, because these have more tables
_SIZES = 1 << 13  # units that tell raw bits
_LEAST_SAMPLE = 1 << 12  # units of a part
_GROUP_BYTES = 100  # of a group in the spec and of a block without words, about
_BELOW = 4  # octaves from the scale of the first table to the minimum exponent
_EXPONENTS = 8  # minimum exponents of a group, which its classes tell
_ARRAYS_OF_BYTES = (units_lib.CLASSES - statistics.DENSITIES) // 8  # with own tables
_FAR, _FARTHEST = 1e-3, 5e-4  # shares of differences without a symbol, and too large
_ESCAPE_BITS = 24  # of an escape, and those of the unit


class Known(NamedTuple):
  """The numbers that both sides know, relative to which an array is coded."""

  bits: np.ndarray  # unsigned integers `[n]`, of numbers near those of the array
  lines: scales_lib.Lines  # quarter octaves: sizes of differences over the least ULP
  crc32: Callable[[], int] | None = None  # of the array itself, if others need it, too


@dataclasses.dataclass
class Part:
  """A part of an array, and how it is coded."""

  numbers: np.ndarray  # contiguous
  layout: Any = None  # one of `layouts`; None if it is stored as it is
  lines: scales_lib.Lines = (np.zeros(1, int), np.zeros(1, int))
  by_first: bool = False  # whether rows are along the first axis, see `scales`
  least: int = 0  # the minimum exponent of floats that share a step
  member: models.Member | None = None  # of a group to be chosen
  known: np.ndarray | None = None  # unsigned integers `[n]`, known numbers
  group: int | None = None  # the index of its group; None if it is stored as it is
  scales: Any = None  # `scales.Scales`
  nbytes: float = 0  # that it takes, about


class Group(NamedTuple):
  """Parts of one layout, coded together."""

  layout: layouts.Layout
  contexts: contexts_lib.Contexts
  head: bytes  # the contexts and the scales, serialised
  parts: list[Part]


class Plan(NamedTuple):
  """How the arrays of a record are stored."""

  arrays: list[np.ndarray]  # the arrays in C order
  parts: list[list[Part]]  # those of each array, see `specs.ArraySpec`
  groups: list[Group]  # the parts that are coded


def make(arrays: Sequence[np.ndarray], known: Mapping[int, Known]) -> Plan:
  """Plans a record of arrays, of which some are coded relative to known ones."""
  for array in arrays:
    if np.asarray(array).dtype.name not in specs.DTYPES:
      raise ValueError(f'arrays of this dtype cannot be stored, got {array.dtype=}')
  whole = pool.each(host.contiguous, map(np.asarray, arrays))
  places = range(len(whole))
  divided = pool.each(_divided, places, whole, map(known.get, places))
  alike = _alike([*itertools.chain(*divided)])
  ordered = sorted(alike, key=lambda x: x[0].layout.type_name == 'known')
  groups = [group for group in pool.each(_group, ordered) if group.parts]
  for i, group in enumerate(groups):
    for part in group.parts:
      part.group = i
  return Plan(whole, divided, groups)


def _alike(parts: Sequence[Part]) -> list[list[Part]]:
  """Returns the parts of each group; floats get their layout."""
  found = dict[Any, list[Part]]()
  several = dict[np.dtype, list[Part]]()
  least = min((x.least for x in parts if x.least), default=0)
  for part in parts:
    if part.member is not None:
      several.setdefault(part.numbers.dtype, []).append(part)
    elif part.layout:
      key = part.layout, (part.least - least) // _EXPONENTS
      found.setdefault(key, []).append(part)
  groups = [*found.values()]
  for dtype, of_dtype in several.items():
    members = [x.member for x in of_dtype if x.member is not None]
    for layout, places in models.grouped(members, dtype):
      group = [of_dtype[i] for i in places]
      for part in group:
        part.layout = layout
        if part.member is not None and layout.shared > 1:
          part.lines = part.member.fit.paired_lines
      groups.append(group)
  return groups


def _divided(place: int, array: np.ndarray, known: Known | None) -> list[Part]:
  """Returns the parts of the array of this place."""
  dtype, of_bytes = array.dtype, layouts.Bytes(np.dtype(np.uint8), 0)
  if array.size < 2 or dtype.kind == 'b':
    return [Part(array)]
  if known is not None:
    layout = layouts.Differences(dtype, 0, 'known')
    return [_with_raw_bits(Part(array, layout, known.lines, known=known.bits))]
  if statistics.has_zeros(array) and not _is_cheaper_whole(array):
    mask, values, *signs = masks.divided(array)
    of_mask = Part(mask, of_bytes, statistics.densities(mask))
    of_values = _divided(place, values, None)
    return [of_mask, *of_values, *(Part(x, of_bytes) for x in signs)]
  if dtype in ulps.FORMATS:
    return [_of_floats(array)]
  if specs.is_of_bytes(dtype):  # each byte of an element has a class
    array = array.reshape(-1, 1).view(np.uint8)
    first = statistics.DENSITIES + 8 * (place % _ARRAYS_OF_BYTES)
    return [Part(array, of_bytes, (np.full(1, first), np.arange(array.shape[1])))]
  if dtype == np.int8:
    lines = scales_lib.kept(array, 2)
    of_codes = statistics.of_codes(array.reshape(-1), lines)
    if of_codes:
      return [Part(array, of_codes, lines)]
  layout, lines = layouts.Differences(dtype, 0), scales_lib.kept(array, 1)
  return [_with_raw_bits(Part(array, layout, lines))]


def _is_cheaper_whole(array: np.ndarray) -> bool:
  """Returns whether floats cost less with their zeros, as rows and columns."""
  is_float = array.dtype in ulps.FORMATS
  return is_float and models.is_cheaper_whole(array)


def _of_floats(array: np.ndarray) -> Part:
  """Returns an array of floats with its scales, in whichever way takes fewest bits."""
  tail, least, saved = statistics.step_of(array)
  fit = models.fit(array)
  is_signed = statistics.has_signs(array)
  if least:
    raised = fit.pairs.pair_bits() + (1 - saved) * array.size
    if raised < fit.bits() + is_signed * array.size:
      layout = layouts.Pairs(array.dtype, max(tail, 1), 'raised')
      return Part(array, layout, scales_lib.kept(array, 2), least=least)
  member = models.Member(fit, array.size, tail, is_signed)
  return Part(array, None, fit.lines, fit.by_first, member=member)


def _with_raw_bits(part: Part) -> Part:
  """Returns differences with raw bits for all but a few of them."""
  (scales,), base = _classes([part])
  sample, layout = _sample(part, scales, _SIZES), part.layout
  bins = layout.counted(sample, base)[1]
  # Raw bits take time.
  if np.count_nonzero(bins >= units_lib.BINS) <= _FAR * np.count_nonzero(bins):
    return part
  most = dataclasses.replace(layout, raw_bits=min(layouts.MOST_RAW, layout.width))
  *_, shifts, times = most.counted(sample, base)
  by = {'weights': times, 'method': 'inverted_cdf'}
  shift = max(int(np.quantile(shifts, 1 - _FARTHEST, **by)), 1)
  part.layout = dataclasses.replace(layout, raw_bits=shift + -shift % layouts.RAW)
  return part


def _group(parts: Sequence[Part]) -> Group:
  """Chooses the classes and the tables of parts of one layout by samples of them.

  Returns a group without the parts that coding does not make smaller.
  """
  layout, (scales, base) = parts[0].layout, _classes(parts)
  most = max(_UNITS // len(parts), _LEAST_SAMPLE)
  most = _BYTES if isinstance(layout, layouts.Bytes) else most
  samples = [_sample(*x, most) for x in zip(parts, scales, strict=True)]
  counted = [layout.counted(x, base) for x in samples]
  first = _first_bin(counted, layout) if _has_first_bin(layout) else 0
  width = layout.alphabet + 1
  counts = np.zeros((len(parts), layout.most_tables, width))
  for of_part, (table_of, symbols, _, times) in zip(counts, counted, strict=True):
    symbols = (symbols - np.uint32(first)).clip(max=layout.alphabet)
    places = (table_of * width + symbols).reshape(-1)
    of_part.reshape(-1)[...] = np.bincount(places, times, of_part.size)
  sizes = np.array([x.numbers.size for x in parts])
  counts *= (sizes / counts.sum(axis=(1, 2)))[:, None, None]
  rows, table_of = _merged(counts.sum(axis=0), layout.most_stored)
  frequencies = _frequencies(rows, layout)
  contexts = contexts_lib.Contexts(base + first, table_of, frequencies)
  bits = _bits(frequencies, layout)[table_of]
  total = (counts * bits).sum(axis=(1, 2))
  total += sizes * [np.average(raw, weights=times) for *_, raw, times in counted]
  nbytes = (total / 8 + 2).tolist()
  for part, of_lines, size in zip(parts, scales, nbytes, strict=True):
    part.scales, part.nbytes = of_lines, size
  coded = [x for x in parts if x.nbytes < x.numbers.nbytes]
  head = contexts_lib.to_bytes(contexts, [x.scales for x in coded])
  saved = sum(x.numbers.nbytes - x.nbytes for x in coded)
  is_smaller = saved > len(head) + _GROUP_BYTES
  return Group(layout, contexts, head, coded if is_smaller else [])


def _has_first_bin(layout: layouts.Layout) -> bool:
  """Returns whether the bins of symbols are some of those that occur."""
  return isinstance(layout, layouts.Pairs) and not layout.raised


def _first_bin(counted: Sequence[tuple[Any, ...]], layout: layouts.Layout) -> int:
  """Returns the first one of the bins with symbols, which are those that occur most."""
  bins = np.concatenate([x for _, x, *_ in counted], axis=None)
  counts = np.bincount(bins.clip(max=layout.seen) + 1, minlength=layout.seen + 2)
  ends = np.cumsum(counts)
  covered = ends[layout.alphabet : -1] - ends[: -1 - layout.alphabet]
  best = np.flatnonzero(covered == np.max(covered))
  return int(best[best.size // 2])


def _bits(frequencies: np.ndarray, layout: layouts.Layout) -> np.ndarray:
  """Returns the bits of each symbol of stored tables, and last those of an escape."""
  escape = _ESCAPE_BITS + 8 * layout.size * layout.dtype.itemsize
  bits = layout.stored_precision - np.log2(np.maximum(frequencies, 0.5))
  bits = np.where(frequencies > 0, bits, escape)
  return np.append(bits, np.full((len(bits), 1), escape), axis=1)


def _classes(parts: Sequence[Part]) -> tuple[list[scales_lib.Scales], np.ndarray]:
  """Returns scales whose classes fit a byte, and the base of the contexts."""
  layout = parts[0].layout
  is_small = layout.type_name in ('raised', 'codes')
  count = layout.most_tables if is_small else units_lib.CLASSES
  most = max(int(sum(line.max() for line in x.lines)) for x in parts)
  octave = (most - count) // scales_lib.STEPS + 1
  least, scales = min(x.least for x in parts), []
  for part in parts:
    below = [line.max() - line for line in part.lines]
    start = part.least - _BELOW if layout.raised else octave
    top = int(sum(line.max() for line in part.lines)) - scales_lib.STEPS * start
    top = min(max(top, 0), count - 1)
    # Each has half of the room.
    below = [*map(np.minimum, below, (top // 2, top - top // 2))]
    base = top - int(sum(x.max() for x in below)) + count * (part.least - least)
    rows, columns = ((x.max() - x).astype(np.uint8) for x in below)
    rows = rows if rows.any() else rows[:1]
    columns = columns if columns.any() else columns[:1]
    first = base % units_lib.CLASSES
    scales.append(scales_lib.Scales(first, rows, columns, part.by_first))
  return scales, np.array([layout.base(octave, least)])


def _sample(part: Part, scales: scales_lib.Scales, most: int) -> units_lib.Row:
  """Takes about `most` of the units of a part, in runs."""
  numbers, layout, rows = part.numbers, part.layout, []
  size, shared = layout.size, layout.shared
  flat = numbers.reshape(-1).view(f'u{numbers.itemsize}')
  known = np.zeros(flat.size, flat.dtype) if part.known is None else part.known
  for run in scales_lib.runs(flat.size // size, most):
    classes = np.empty(run.stop - run.start, layout.class_type)
    some = slice(run.start * size, run.stop * size)
    scales.write(numbers.shape, shared, some.start // shared, classes.view(np.uint8))
    rows.append((classes[:, None], *(x[some].reshape(-1, size) for x in (flat, known))))
  classes, units, known = map(np.concatenate, zip(*rows, strict=True))
  return units_lib.Row(classes.astype(np.int32), known, units, [])


def _merged(rows: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Joins neighbours where this saves bytes, and until there are at most so many.

  Returns the sums, and that of each row.
  """
  is_first = np.append(True, rows[1:].any(axis=1))  # others have no symbols
  rows, table_of = rows[is_first], np.cumsum(is_first) - 1
  # A symbol of a table takes 16 bits, about.
  cost = lambda x: tables.entropy_bits(x) + 16 * np.count_nonzero(x, axis=-1)
  while True:
    bits = cost(rows)
    saved = bits[:-1] + bits[1:] - cost(rows[:-1] + rows[1:])
    around = np.concatenate([[-np.inf], saved, [-np.inf]])
    # The last ones to go are those that cost least.
    least = min(np.sort(saved)[most - len(rows)], 0) if len(rows) > most else 0
    is_worth = saved >= least
    is_joined = is_worth & (saved >= around[:-2]) & (saved > around[2:])
    if not is_joined.any():
      return rows, table_of
    is_first = np.append(True, ~is_joined)
    table_of = (np.cumsum(is_first) - 1)[table_of]
    rows = np.add.reduceat(rows, np.flatnonzero(is_first))


def _frequencies(counts: np.ndarray, layout: layouts.Layout) -> np.ndarray:
  """Returns frequencies in proportion to counts, which end with those of escapes.

  Symbols that are too rare for a slot are escapes.
  """
  size = np.full((len(counts), 1), float(1 << layout.stored_precision))
  # Spread over half of the bins, pairs of rare ones have slots.
  even = (np.arange(layout.alphabet) < layout.alphabet // 2) * (2 / layout.alphabet)
  coded = counts[:, : layout.alphabet]
  whole = (coded if layout.is_product else counts).sum(axis=1, keepdims=True)
  shares = np.where(whole > 0, coded / np.maximum(whole, 1), even)
  most = shares[:, layout.is_first_long :].max(axis=1, keepdims=True)
  excess = (most - layout.most_share) / np.maximum(most - even[0], 1e-9)
  shares += np.maximum(excess, 0) * (even - shares)
  room, less = (1 << layout.precision) - 1, 2.0**-14
  while True:
    slots = shares * size
    frequencies = np.rint(slots).astype(np.int64)
    frequencies += (frequencies < 1) & (slots > layout.least_share)
    used = layout.frequencies(frequencies).sum(axis=1).reshape(len(counts), -1)
    if used.max() <= room:
      return frequencies
    most, less = used.max(axis=1, keepdims=True), 2 * less  # rounding hides small steps
    size *= np.where(most > room, np.minimum(np.sqrt(room / most), 1 - less), 1)

"""Models: the scales, the layout and the group of each array of floats, by price.

The price of a model is the bits that a sample of the elements would take: the entropy
of their *bins*, which are magnitudes in half octaves relative to their scales, and the
bits of these scales. An array may have no scales, or scales of rows, of columns or of
both, in either matrix that `scales` takes it as.

Arrays whose bins are alike share tables, as a group. One with other bins has tables of
its own, where they and their group take fewer bits than what the shared ones cost.

What is chosen here affects only the size of a file and the time to decode it.

Shape letters: Q groups, B bins.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import layouts
from rotbits_jax.coding import scales as scales_lib
from rotbits_jax.coding import tables
from rotbits_jax.coding import units as units_lib
from rotbits_jax.structured import ulps

_SAMPLE = 1 << 13  # elements that tell the price of scales
_SHORT = 16  # elements of a last axis along which there are no rows
_LEAST_SCALED = 1 << 11  # elements of an array that may have scales
_BINS = 1 << 10
_MIDDLE = _BINS // 2  # the bin of elements of the size 1, of the scale 1

# What a group must save to be worth a block of its own: half a millisecond of decoding.
_GROUP_BITS = 8 * 300
_GROUP_SHARE = 0.004  # of the bits of its first array
_SYMBOL_BITS = 6  # of the count of a symbol of a table, compressed
_ESCAPE_BITS = 14  # of an element without a bin, in addition to its whole pair
_SLOWER = 0.004  # share of the bytes for which it is worth to decode singles
_MOST_GROUPS = 8  # of one dtype
_MOST_OCTAVES = 24  # between the scales of a group, because a byte tells the class


class Binned(NamedTuple):
  """The elements of an array in bins."""

  counts: np.ndarray  # float `[4, B]`, of elements by the quarter of their scale
  side: float  # bits of the scales
  width: int  # bits of an element

  def single_bits(self) -> float:
    """Returns the bits of elements that are coded one by one."""
    return _single_bits(self.counts) + self.side

  def pair_bits(self) -> float:
    """Returns the bits of elements that are coded in pairs."""
    return _pair_bits(self.counts, self.width) + self.side


class Fit(NamedTuple):
  """How an array is divided into bins, and what these cost."""

  lines: scales_lib.Lines  # of columns, those of each; pairs share one
  by_first: bool  # whether rows are along the first axis alone
  singles: Binned
  pairs: Binned

  def bits(self) -> float:
    """Returns about the bits of the bins and the scales."""
    return self.singles.single_bits()

  @property
  def paired_lines(self) -> scales_lib.Lines:
    """The scales of rows, and of pairs of columns."""
    return self.lines[0], scales_lib.paired(self.lines[1])


class _Choice(NamedTuple):
  """Scales that an array may have, see `Fit`."""

  lines: scales_lib.Lines
  by_first: bool


class Member(NamedTuple):
  """An array that is to join a group."""

  fit: Fit
  size: int
  tail: int  # bits of an element below its bin
  is_signed: bool

  @property
  def nbits(self) -> int:
    """The bits of the array as it is."""
    return self.size * self.fit.singles.width

  @property
  def octave(self) -> int:
    """The greatest scale in octaves."""
    scale = sum(int(x.max()) for x in self.fit.lines)
    return scale // scales_lib.STEPS


@dataclasses.dataclass
class _Group:
  """Arrays that share tables."""

  members: list[int]
  singles: np.ndarray  # float `[4, B]`, see `Binned`
  pairs: np.ndarray  # the same if columns share scales in pairs
  size: int
  tail: int
  is_signed: bool
  octave: int
  width: int  # bits of an element
  bits: float = 0.0

  @property
  def raw(self) -> int:
    """The bits of an element that have no model."""
    return self.tail + self.is_signed


class _Sample(NamedTuple):
  """Elements of an array and their places in it."""

  halves: np.ndarray  # int32, magnitudes in half octaves
  places: np.ndarray  # int64, indices in C order
  weight: float  # how many elements each stands for
  width: int  # bits of an element


# ---- scales --------------------------------------------------------------------------


def fit(array: np.ndarray) -> Fit:
  """Chooses the scales of an array of floats, contiguous and not empty."""
  sample = _sampled(array)
  level = np.rint(scales_lib.STEPS / 2 * np.mean(sample.halves)).astype(int)
  unscaled = _Choice((level.reshape(1), np.zeros(1, int)), by_first=False)
  choices = [unscaled]
  if array.size >= _LEAST_SCALED:
    choices += [
      _Choice(lines, by_first)
      for by_first in _orientations(array.shape)
      for lines in _candidates(array, by_first)
    ]
  singles = [_singles(sample, choice, array.shape) for choice in choices]
  best = 0
  if len(choices) > 1:
    best = int(np.argmin([binned.single_bits() for binned in singles]))
  pairs = _pairs(sample, choices[best], array.shape, singles[best])
  return Fit(*choices[best], singles[best], pairs)


def _orientations(shape: scales_lib.Shape) -> list[bool]:
  """Returns whether rows may be along the last axes, False, or the first one, True."""
  sizes = [scales_lib.matrix_shape(shape, 1, x) for x in (False, True)]
  choices = [False, True] if sizes[0] != sizes[1] else [False]
  if len(shape) > 2 and shape[-1] < _SHORT:
    choices = [True]
  return [x for x in choices if sizes[x][1] <= scales_lib.MOST_COLUMNS]


def is_cheaper_whole(array: np.ndarray) -> bool:
  """Returns whether an array costs less whole than as a mask and its other elements.

  These have no rows and columns, but zeros have no mantissa and no sign.
  """
  size, mantissa = array.size, ulps.FORMATS[array.dtype].nmant
  flat = array.reshape(-1)
  others = flat[flat != 0]
  zeros = size - others.size
  if others.size < _LEAST_SCALED:
    return False
  mask = float(tables.entropy_bits(np.array([zeros, others.size])))
  return fit(array).bits() + zeros * mantissa < fit(others).bits() + mask


def _candidates(array: np.ndarray, by_first: bool) -> Iterator[scales_lib.Lines]:
  """Yields scales of rows, of columns and of both, if they may save bits."""
  levels = scales_lib.measure(array, 1, by_first)
  choices = [
    [scales_lib.even(line), line] if saves else [scales_lib.even(line)]
    for line, saves in zip(levels.lines, levels.saves, strict=True)
  ]
  for rows, columns in itertools.product(*choices):
    if rows.size > 1 or columns.size > 1:
      yield rows, columns


def _sampled(array: np.ndarray) -> _Sample:
  """Takes a sample of elements, in runs."""
  form = ulps.FORMATS[array.dtype]
  flat = array.reshape(-1).view(f'u{array.itemsize}')
  places = scales_lib.runs(flat.size, _SAMPLE)
  magnitudes = np.concatenate([flat[x] for x in places]) << 1 >> 1
  halves = (magnitudes >> form.nmant - 1).astype(np.int32)
  indices = np.concatenate([np.arange(x.start, x.stop) for x in places])
  return _Sample(halves, indices, flat.size / halves.size, form.bits)


def _singles(sample: _Sample, choice: _Choice, shape: scales_lib.Shape) -> Binned:
  """Divides elements of an array into bins, each with the scale of its column."""
  width = scales_lib.matrix_shape(shape, 1, choice.by_first)[1]
  return _binned(sample, choice.lines, width, sample.places % width)


def _pairs(
  sample: _Sample, choice: _Choice, shape: scales_lib.Shape, singles: Binned
) -> Binned:
  """Divides elements into bins, where two columns share a scale; see `_singles`."""
  rows, columns = choice.lines
  if columns.size == 1:
    return singles
  width = scales_lib.matrix_shape(shape, 1, choice.by_first)[1]
  paired = scales_lib.paired(columns)
  if paired.size < columns.size:
    return _binned(sample, (rows, paired), width, sample.places % width // 2)
  # A pair has the scale of its first element.
  return _binned(sample, choice.lines, width, (sample.places & ~1) % width)


def _binned(
  sample: _Sample, lines: scales_lib.Lines, width: int, places: np.ndarray
) -> Binned:
  """Divides elements into bins.

  Args:
    sample: the elements.
    lines: all scales of rows and of columns.
    width: the elements of a row.
    places: the places of the elements among the scales of columns.
  """
  rows, columns = (line.astype(np.int32) for line in lines)
  scale = rows[sample.places // width] if rows.size > 1 else rows
  scale = scale + (columns[places] if columns.size > 1 else columns)
  bins = sample.halves - 2 * (scale >> 2) + _MIDDLE
  index = (scale & 3) * _BINS + bins.clip(0, _BINS - 1)
  counts = np.bincount(index, minlength=scales_lib.STEPS * _BINS)
  weighted = counts.reshape(scales_lib.STEPS, _BINS) * sample.weight
  return Binned(weighted, sum(map(scales_lib.line_bits, lines)), sample.width)


# ---- groups --------------------------------------------------------------------------


def grouped(
  members: Sequence[Member], dtype: np.dtype
) -> Iterator[tuple[layouts.Layout, list[int]]]:
  """Divides arrays of a dtype into groups.

  Args:
    members: the arrays.
    dtype: their dtype, of floats.

  Yields:
    The layout of a group, and the indices of its members in their order.
  """
  groups: list[_Group] = []
  order = sorted(range(len(members)), key=lambda i: -members[i].size)
  every = sum(x.fit.singles.counts + x.fit.pairs.counts for x in members)
  used = np.flatnonzero(np.any(every, axis=0))
  seen = slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 1)
  for i in order:
    if groups and members[i].nbits <= _GROUP_BITS:  # as are all that follow
      _join(groups, i, members[i], seen)
      continue
    alone = _with(None, i, members[i], seen)
    joined = [_with(x, i, members[i], seen) for x in groups]
    added = [x.bits - y.bits for x, y in zip(joined, groups, strict=True)]
    best = int(np.argmin(added)) if added else 0
    is_full = len(groups) == _MOST_GROUPS
    least = (1 + _GROUP_SHARE) * alone.bits + _GROUP_BITS
    if groups and (is_full or added[best] <= least):
      groups[best] = joined[best]
    else:
      groups.append(alone)
  for group in groups:
    yield _layout(group, dtype), sorted(group.members)


def _join(groups: list[_Group], i: int, member: Member, seen: slice) -> None:
  """Adds a member that is too small for a group of its own to one that takes it."""
  for place, group in enumerate(groups):
    if abs(group.octave - member.octave) <= _MOST_OCTAVES:
      groups[place] = _united(group, i, member, seen)
      return
  groups.append(_united(None, i, member, seen))


def _with(group: _Group | None, i: int, member: Member, seen: slice) -> _Group:
  """Returns a group with one more member, or one that has it alone, and its price."""
  joined = _united(group, i, member, seen)
  if group is not None and abs(group.octave - member.octave) > _MOST_OCTAVES:
    joined.bits = np.inf
  else:
    joined.bits = min(_costs(joined))
  return joined


def _united(group: _Group | None, i: int, member: Member, seen: slice) -> _Group:
  """Returns a group with one more member, or one that has it alone."""
  binned = member.fit.singles, member.fit.pairs
  singles, pairs = (x.counts[:, seen] for x in binned)
  raw = member.size, member.tail, member.is_signed
  joined = _Group([i], singles, pairs, *raw, member.octave, binned[0].width)
  if group is not None:
    joined.members = [*group.members, i]
    joined.singles = group.singles + singles
    joined.pairs = group.pairs + pairs
    joined.size += group.size
    joined.tail = max(group.tail, member.tail)
    joined.is_signed |= group.is_signed
    joined.octave = group.octave
  return joined


def _costs(group: _Group) -> tuple[float, float]:
  """Returns the bits of a group as pairs, and as singles and their time."""
  raw = group.size * group.raw
  single = _single_bits(group.singles)
  pairs = _pair_bits(group.pairs, group.width) if group.is_signed else np.inf
  return pairs + raw, single + raw + _SLOWER * (single + raw)


def _layout(group: _Group, dtype: np.dtype) -> layouts.Layout:
  """Returns the layout of a group."""
  pairs, single = _costs(group)
  if pairs <= single:
    return layouts.Pairs(dtype, group.raw)
  name = 'singles' if group.is_signed else 'positive'
  return layouts.Singles(dtype, group.raw, name)


def _single_bits(counts: np.ndarray) -> float:
  """Returns the bits of bins `[4, B]` that are coded one by one, and of tables."""
  sums = counts.sum(axis=1)
  used = counts[counts > 0]
  entropy = float(sums @ np.log2(np.maximum(sums, 1))) - float(used @ np.log2(used))
  return entropy + _SYMBOL_BITS * used.size


def _pair_bits(counts: np.ndarray, width: int) -> float:
  """Returns the bits of bins `[4, B]` that are coded in pairs, given their width."""
  total = counts.sum(axis=0)
  used = np.flatnonzero(total)
  if not used.size:
    return 0.0
  low = int(used[0])
  last = max(int(used[-1]) + 1 - units_lib.BINS, low)
  ends = np.cumsum(np.append(0, total[low : last + units_lib.BINS]))
  covered = ends[units_lib.BINS :] - ends[: -units_lib.BINS]
  if covered.size:
    first = low + int(np.argmax(covered))
    most = float(np.max(covered))
  else:  # all bins are among the last ones
    first = low
    most = float(ends[-1])
  coded = counts[:, first : first + units_lib.BINS]
  if (coded.max(axis=1) > layouts.MOST_SHARE * coded.sum(axis=1)).any():
    return np.inf
  escape = _ESCAPE_BITS + 2 * width
  return _single_bits(coded) + escape * (float(ends[-1]) - most)

r"""Layouts: how elements become symbols and raw bits, a *unit* at a time.

`coding` has the terms, and docs/format.md the rules; here are the reasons.

**Pairs.** A unit is two neighbours. Only the sizes of trained weights are predictable,
so an element has a *bin*: its magnitude in half octaves or, if small elements share a
step, in quarter octaves. Given their scale, neighbours are independent: the symbol of a
unit is its two bins, and its table is the product of the table of a bin with itself.
The class is the scale in quarter octaves. Its whole octaves give the *offset*, the bin
that counts as 0, and the remaining quarter selects one of four tables. Low bits that
are zero in all elements are not stored; elements that were widened from a shorter dtype
end in zeros.

Arrays may be rounded so that all small elements share one step. The *minimum exponent*
f is the greatest exponent whose step they share; that of IEEE 754 itself is 1. With f
above 1 magnitudes are *raised*: they count steps below f, as IEEE 754 defines subnormal
numbers. The class then gives f, and the scale above the step, which selects the table.

Two int8 are a pair, too. They have no signs: with the highest bit flipped, they are in
the order of their bit patterns. A bin has 2^r neighbouring integers, which r raw bits
distinguish.

**Singles.** Only distributions that are near normal have few bins, none of which is
frequent. Others have heavy tails, two sizes, or neighbours of different scales. Then
each number of a pair has its own symbol, one of 255 bins, and its own class. That takes
two lookups in place of one. Numbers without signs, such as squares, store none.

**Differences.** Two numbers near known ones, or two signed integers, are a pair of bins
with a sign. The exponent of the known number and the scales tell how large a difference
is in ULPs: the *level*. It gives the *shift*, the number of raw bits, and one of few
tables. Each number has its own, so two levels select the table of the pair.

The last symbol of a table is the *escape*: units without a symbol, and pairs of bins
that are too rare, are in lists after the block.

Shape letters: n units, L lanes, K tables.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding import units as units_lib
from rotbits_jax.structured import ulps

ONE_ULP = 64
"""The class of differences whose size is about 1."""

MOST_DIFFERENT = 8
"""The most tables of differences, of which each two have a table of pairs."""

RAW, MOST_RAW = 8, 24
"""The raw bits of a difference that are pushed at once, and in all."""

_BIAS = np.uint8(30)  # of bytes, of which 225 is rare in masks and codes

_PAIRS = 6  # bits of the index of a pair of tables of differences

MOST_SHARE = 0.33
"""The greatest share of a bin of floats that are coded as pairs."""


@dataclasses.dataclass(frozen=True)
class Pairs(units_lib.Base):
  """The layout of pairs of floats, and of int8 codes."""

  type_name: str = 'floats'  # or 'raised', if small floats share a step; or 'codes'

  def is_valid(self) -> bool:
    """Returns whether there is such a layout."""
    if self.type_name == 'codes':
      return self.dtype == np.int8 and self.raw_bits <= 3
    return self.dtype in ulps.FORMATS and 1 <= self.raw_bits <= self._low + 1

  @property
  def raised(self) -> bool:  # type: ignore[override]
    return self.type_name == 'raised'

  @property
  def format(self) -> ml_dtypes.finfo:
    return ulps.FORMATS[self.dtype]

  @property
  def precision(self) -> int:  # type: ignore[override]
    # Many tables are short, because the cache is small.
    return {'floats': tables.PRECISION, 'codes': 13, 'raised': 12}[self.type_name]

  @property
  def most_tables(self) -> int:  # type: ignore[override]
    return {'floats': 4, 'codes': 16, 'raised': 32}[self.type_name]

  @property
  def most_share(self) -> float:  # type: ignore[override]
    return {'floats': MOST_SHARE, 'codes': 0.46, 'raised': 0.66}[self.type_name]

  @property
  def is_relative(self) -> bool:
    """Whether bins are half octaves relative to the scale."""
    return self.type_name == 'floats'

  @property
  def is_biased(self) -> bool:
    """Whether the highest bit is flipped, so that signed integers are in order."""
    return self.type_name == 'codes'

  def base(self, octave: int, least: int) -> int:
    """Returns the offset of class 0, of the scale 2^octave; or the minimum exponent."""
    return 2 * octave - self.seen // 2 if self.is_relative else least

  @functools.cached_property
  def pieces(self) -> tuple[tuple[int, int], ...]:  # type: ignore[override]
    """The width and the lowest bit of each piece of the raw bits of a number."""
    low = self.raw_bits & ~7
    pieces = [(8, place) for place in range(0, low, 8)]
    for width in (4, 2, 1):
      if self.raw_bits & width:
        pieces.append((width, low))
        low += width
    return tuple(pieces)

  @property
  def _ones(self) -> int:
    """A one in the lowest bit of each number of a word."""
    return 1 | 1 << self.width if self.words == 1 else 1

  @property
  def _sign(self) -> int:
    """The number of sign bits of a number."""
    return 0 if self.type_name == 'codes' else 1

  @property
  def _low(self) -> int:
    """The number of bits below the bin, which has one or two of a mantissa."""
    return self.raw_bits if self.is_biased else self.format.nmant - 1 - self.raised

  def context(self, row: units_lib.Row, base: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """Returns the tables of units, and their offsets or minimum exponents.

    `base` has the offset of class 0, or its minimum exponent.
    """
    count, step = self.most_tables, 1 + self.is_relative
    steps = row.classes >> count.bit_length() - 1
    return row.classes & count - 1, steps * step + base[0]

  def counted(self, row: units_lib.Row, base: np.ndarray) -> tuple[Any, ...]:
    """Returns tables, bins and raw bits of units `[n, 2]` of classes `[n, 1]`: NumPy;
    and how often each of these occurs, if not once.

    Bins are uint32, and those below 32 are coded; plans count them.
    """
    table, told = self.context(row, base.astype(np.int32))
    return table, self._split(row.units, told, np)[0], self.raw_bits, None

  def _split(self, number: Any, told: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """Divides bit patterns into bins, uint32 of any value, and raw bits."""
    width, low, top = self.width, self._low, self.raw_bits - self._sign
    number = ulps.raised(number, self.format, told, xp) if self.raised else number
    number = number ^ number.dtype.type(128) if self.is_biased else number
    magnitude = number & number.dtype.type((1 << width - self._sign) - 1)
    bins = (magnitude >> low).astype(np.int32) - (0 if self.raised else told)
    bins = bins.view(np.uint32)
    raw = (magnitude & ((1 << low) - 1)) >> low - top
    return bins, raw | number >> width - 1 << top if self._sign else raw

  def bins(self, symbols: Any) -> Sequence[Any]:
    """Returns the bins of both numbers of units, uint32, given their symbols."""
    return symbols >> 5, symbols & units_lib.BINS - 1

  def offsets(self, told: Any) -> Sequence[Any]:
    """Returns the offset of the bin of each number of units, uint32."""
    return [0, 0] if self.raised else [told.astype(np.uint32)] * 2

  def join(self, symbols: Any, kept: list[Any], told: Any, xp: Any = jnp) -> list[Any]:
    """Makes the words of units, given symbols, uint32, and the result of `context`.

    `kept` are words that have the signs and the low bits. `xp` is JAX or NumPy.
    """
    offsets = self.offsets(told)
    bins = self.bins(symbols)
    bins = self._packed(*(x + y for x, y in zip(bins, offsets, strict=True)))
    highest = np.uint32(self._ones << self.width - 1)
    if self.is_biased:
      return [((bins[0] << self._low | kept[0]) ^ highest).astype(self.word)]
    if not self._sign:
      return [x << self._low | y for x, y in zip(bins, kept, strict=True)]
    words = [x << self._low | y & ~highest for x, y in zip(bins, kept, strict=True)]
    if self.raised:
      lower = lambda x: ulps.lowered(x, self.format, told, xp)
      words = self._packed(*map(lower, self._numbers(words)))
    return [y & highest | x for x, y in zip(words, kept, strict=True)]

  def raw(self, pop: units_lib.Pop, row: units_lib.Row, told: Any) -> list[jax.Array]:
    """Returns words that have the raw bits of units in their places."""
    raw = [jnp.zeros_like(told, jnp.uint32)] * self.words
    for (width, place), piece in zip(self.pieces, row.pieces, strict=True):
      mask = (1 << width) - 1
      fields = self._packed(piece & mask, piece >> width & mask)
      raw = [x | y << place for x, y in zip(raw, fields, strict=True)]
    top, ones = self.raw_bits - self._sign, np.uint32(self._ones)
    if not self._sign:
      return [x << self._low - top for x in raw]
    signs = [(x >> top & ones) << self.width - 1 for x in raw]
    tails = [(x & ones * np.uint32((1 << top) - 1)) << self._low - top for x in raw]
    return [x | y for x, y in zip(signs, tails, strict=True)]

  def divided(self, numbers: list[Any], told: Any) -> tuple[Any, ...]:
    """Returns the symbols of units; intervals of raw bits; and pieces of these."""
    bins, raw = zip(*(self._split(x, told) for x in numbers), strict=True)
    return units_lib.of_pair(*bins), [], self.planes(raw)

  def planes(self, raw: Any) -> list[jax.Array]:
    """Returns the pieces of the raw bits of both numbers of units."""
    pieces = []
    for bits, place in self.pieces:
      low, high = (x >> place & ((1 << bits) - 1) for x in raw)
      pieces.append(low | high << bits)
    return pieces


@dataclasses.dataclass(frozen=True)
class Singles(Pairs):
  """The layout of floats whose numbers have a symbol each, for any distribution."""

  type_name: str = 'singles'  # or 'positive', if no float has a sign

  alphabet: ClassVar[int] = 255  # of a stored table, which does not have the escape
  stored_precision: ClassVar[int] = 12
  symbol_bits: ClassVar[int] = 8
  shared: ClassVar[int] = 1
  pushes: ClassVar[int] = 2
  most_share: ClassVar[float] = 1
  most_tables: ClassVar[int] = 4
  precision: ClassVar[int] = 12
  is_product: ClassVar[bool] = False
  is_relative: ClassVar[bool] = True
  # An escape takes as many bits as all elements lose by so few slots.
  least_share: ClassVar[float] = 0.05
  seen: ClassVar[int] = 1 << 10

  def is_valid(self) -> bool:
    """Returns whether there is such a layout."""
    top = self.raw_bits - self._sign
    return self.dtype in ulps.FORMATS and 0 <= top <= self._low

  @property
  def _sign(self) -> int:
    return int(self.type_name == 'singles')

  def contexts(
    self, row: units_lib.Row, base: Any
  ) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Returns the table and the offset of each number of units; see `context`."""
    first, second = (
      self.context(units_lib.Row(x, None, None, []), base)
      for x in (row.classes & 255, row.classes >> 8)
    )
    return first, second

  def counted(self, row: units_lib.Row, base: np.ndarray) -> tuple[Any, ...]:
    """Returns tables, bins and raw bits of units `[n, 2]`; see `Pairs.counted`."""
    contexts = self.contexts(row, base.astype(np.int32))
    both = [np.hstack(x) for x in zip(*contexts, strict=True)]
    return both[0], self._split(row.units, both[1], np)[0], self.raw_bits, None

  def bins(self, symbols: Any) -> Sequence[Any]:
    """Returns the bins of both numbers of units, which are their symbols."""
    return symbols

  def offsets(self, told: Any) -> Sequence[Any]:
    """Returns the offset of the bin of each number of units, uint32."""
    return [x.astype(np.uint32) for x in told]

  def frequencies(self, counts: np.ndarray) -> np.ndarray:
    return counts

  def lists(self, symbols: np.ndarray, units: np.ndarray) -> list[np.ndarray]:
    """Returns the list of units at escapes, whole."""
    return [units]

  def listed(
    self, data: np.ndarray, units: np.ndarray, row: units_lib.Row, told: np.ndarray
  ) -> np.ndarray:
    """Returns the units at escapes, given their list; see `units.Base.listed`."""
    if data.size != units.size * self.word.itemsize:
      raise ValueError('the list of a block does not fit its escapes')
    return data.copy().view(self.word).reshape(-1, self.words)

  def decode_step(
    self, pop: units_lib.Pop, row: units_lib.Row, coder_tables: units_lib.Tables
  ) -> tuple[jax.Array, jax.Array]:
    """Decodes a unit of each lane, in a program; see `units.Base.decode_step`."""
    symbols, offsets = [], []
    for table, offset in self.contexts(row, coder_tables.told):
      symbols.append(self.popped(pop, table, None, coder_tables))
      offsets.append(offset)
    is_listed = (symbols[0] == self.escape) | (symbols[1] == self.escape)
    raw = self.raw(pop, row, offsets[0])
    words = self.join(symbols, raw, offsets)
    return jnp.stack(words, -1).astype(self.word), is_listed

  def encode_step(
    self, row: units_lib.Row, coder_tables: units_lib.Tables
  ) -> tuple[list[units_lib.Interval], list[jax.Array], jax.Array]:
    """Divides a unit of each lane, in a program; see `units.Base.encode_step`."""
    contexts = self.contexts(row, coder_tables.told)
    intervals, raw, is_listed = [], [], jnp.zeros(row.classes.shape, bool)
    numbers = self._numbers(row.units)
    for number, (table, offset) in zip(numbers, contexts, strict=True):
      bins, of_number = self._split(number, offset)
      symbol = jnp.minimum(bins, np.uint32(self.escape))
      (symbol,) = units_lib.once(coder_tables.told, symbol)
      interval, is_escape = self.interval(symbol, table, coder_tables)
      intervals.append(interval)
      raw.append(of_number)
      is_listed |= is_escape
    mark = jnp.where(is_listed, units_lib.MARKED, 0).astype(jnp.uint16)
    return intervals, self.planes(raw), mark


@dataclasses.dataclass(frozen=True)
class Differences(units_lib.Base):
  """The layout of differences from known numbers; or from 0, of signed integers."""

  type_name: str = 'integers'  # or 'known'

  is_first_long: ClassVar[bool] = True
  shared: ClassVar[int] = 1
  most_share: ClassVar[float] = 0.49
  most_stored: ClassVar[int] = MOST_DIFFERENT

  def is_valid(self) -> bool:
    """Returns whether there is such a layout."""
    is_float = self.type_name == 'known' and self.dtype in ulps.FORMATS
    fits = self.raw_bits in range(0, min(self.width, MOST_RAW) + 1, RAW)
    return fits and (is_float or self.dtype.kind == 'i')

  def base(self, octave: int, *_: Any) -> int:
    """Returns the level of class 0; see `Pairs.base`."""
    return ONE_ULP + 4 * octave

  @property
  def pushes(self) -> int:  # type: ignore[override]
    return 1 + self.raw_bits // RAW

  def level(self, classes: Any, known: Any, base: Any, xp: Any = jnp) -> Any:
    """Returns the level of each difference, int16.

    `known` is the known number of each class, `base` the level of class 0.
    """
    exponents = ulps.exponents(known, self.dtype, xp).astype(np.int32)
    level = xp.clip(classes + base - 4 * exponents, 0, units_lib.CLASSES - 1)
    return level.astype(np.int16)

  def shift(self, level: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """Returns the shift of differences of a level, uint32, and the level without it."""
    shift = xp.clip(level - ONE_ULP >> 2, 0, self.raw_bits)
    return shift.astype(np.uint32), level - 4 * shift

  def counted(self, row: units_lib.Row, base: np.ndarray) -> tuple[Any, ...]:
    """Returns levels, bins and shifts of numbers; see `Pairs.counted`.

    Numbers that did not change, most in a step, are one of each class and exponent.
    """
    units, known = row.units.reshape(-1), row.known.reshape(-1)
    classes = row.classes.astype(np.uint16).view(np.uint8).reshape(-1)
    changed, least = np.flatnonzero(units != known), classes.min()
    below = getattr(ulps.FORMATS.get(self.dtype), 'nmant', self.width - 1)
    both = (classes - least).astype(np.uint32) << 9 | known >> below
    counts = np.bincount(both)
    counts -= np.bincount(both[changed], minlength=counts.size)
    same = np.flatnonzero(counts > 0)  # faster, of truth values
    times = np.append(np.ones(changed.size, int), counts[same])
    near = (same & 511) << below
    known = np.append(known[changed], near).astype(np.uint32)
    units = np.append(units[changed], near).astype(np.uint32)
    classes = np.append(classes[changed], least + (same >> 9)).astype(np.int32)
    shift, level = self.shift(self.level(classes, known, np.int32(base[0]), np), np)
    off = ulps.differences(units, known, self.dtype, np)
    return level, folded(off >> shift.astype(np.int32)), shift, times

  def context(self, row: units_lib.Row, base: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """Returns the tables of units; and known numbers, shifts of both, how many slots
    are the first symbol's at least, and `base`, which is `Tables.told`.
    """
    zeros = xp.zeros_like(row.classes, np.uint32)
    known = [zeros, zeros] if row.known is None else self._numbers(row.known)
    several = zip((row.classes & 255, row.classes >> 8), known, strict=True)
    levels: Any = [self.level(*x, base[0], xp) for x in several]
    if xp is jnp:
      levels = units_lib.once(base, *levels)
    shifts: Any
    shifts, levels = zip(*(self.shift(x, xp) for x in levels), strict=True)
    table: Any = np.int16(0)
    least, *terms = base.astype(np.int16).reshape(3, MOST_DIFFERENT)
    for level, (term, *others) in zip(levels, terms, strict=True):
      for first, other in zip(least[1:], others, strict=True):
        term = xp.where(level >= first, other, term)
      table = table + term
    if xp is jnp:
      table, *shifts = units_lib.once(base, table, *shifts)
    slots = (table >> _PAIRS << 4).astype(np.int32)
    return table & (1 << _PAIRS) - 1, (known, shifts, slots, base)

  def _sizes(self, shifts: Any) -> list[tuple[Any, ...]]:
    """Returns the lowest bit of each piece of raw bits, and its sizes in both."""
    least = lambda x, low: jnp.minimum(jnp.maximum(x, low) - low, RAW)
    lows = range(0, self.raw_bits, RAW)
    return [(low, *(least(x, jnp.uint32(low)) for x in shifts)) for low in lows]

  def raw(self, pop: units_lib.Pop, row: units_lib.Row, context: Any) -> list[Any]:
    """Returns words that have the raw bits of units."""
    first = second = jnp.zeros_like(row.classes, jnp.uint32)
    for low, *sizes in self._sizes(context[1]):
      piece = pop(lambda x: x, lambda x, slot: (slot, 1), sizes[0] + sizes[1])
      first = first | piece >> sizes[1] << low
      second = second | rans.slot(piece, sizes[1]) << low
    return self._packed(first, second)

  def join(self, symbols: Any, raw: Any, context: Any, xp: Any = jnp) -> list[Any]:
    """Makes the words of units of symbols and words of raw bits, uint32."""
    bins, words = (symbols >> 5, symbols & 31), []
    several = zip(bins, self._numbers(raw), *context[:2], strict=True)
    for value, bits, known, shift in several:
      value = value >> 1 ^ np.uint32(0) - (value & 1)
      words.append(ulps.moved(known, value << shift | bits, self.dtype, xp))
    return self._packed(*(x & np.uint32((1 << self.width) - 1) for x in words))

  def divided(self, numbers: list[Any], context: Any) -> tuple[Any, ...]:
    """Returns the symbols of units, and the intervals of raw bits."""
    known, shifts, _, base = context
    pairs = zip(numbers, known, strict=True)
    off = units_lib.once(base, *(ulps.differences(*x, self.dtype) for x in pairs))
    bins = [folded(x >> y) for x, y in zip(off, shifts, strict=True)]
    intervals, raw = [], [x.view(jnp.uint32) for x in off]
    for low, *sizes in self._sizes(shifts):
      high, below = (rans.slot(x >> low, y) for x, y in zip(raw, sizes, strict=True))
      intervals.append((high << sizes[1] | below, 1, sizes[0] + sizes[1]))
    return units_lib.of_pair(*bins), intervals, []

  def frequencies(self, counts: np.ndarray) -> np.ndarray:
    """Returns those of each two of K tables, `[K^2, 1023]`."""
    several = counts.repeat(len(counts), axis=0), np.tile(counts, (len(counts), 1))
    return tables.of_pairs(*several, self.precision)

  def tables(
    self, base: np.ndarray, table_of: np.ndarray, counts: np.ndarray, *_: Any
  ) -> units_lib.Tables:
    """Makes the tables, given counts of bins `[K, 32]`; see `units.Base`."""
    if (count := len(counts)) > MOST_DIFFERENT:
      raise ValueError(f'{count} tables, more than {MOST_DIFFERENT}')
    rows = np.minimum(np.arange(MOST_DIFFERENT), count - 1)
    rows = (count * rows[:, None] + rows).reshape(-1)
    # The base, and then the first levels of tables.
    told = np.full(MOST_DIFFERENT, units_lib.CLASSES)
    told[:count] = np.flatnonzero(np.diff(table_of, prepend=-1))
    told[0] = base[0]
    # The sum of the terms of both levels is the index of their table and, above it, a
    # 16th of the slots that its first symbol has at least.
    slots = np.full(MOST_DIFFERENT, -256)
    slots[:count] = counts[:, 0] - tables.TOTAL >> 6
    indices = np.arange(MOST_DIFFERENT)
    terms = (slots << _PAIRS) + indices
    told = np.concatenate([told, terms + (256 << _PAIRS) + 7 * indices, terms])
    return super().tables(told, rows, counts)


@dataclasses.dataclass(frozen=True)
class Bytes(units_lib.Base):
  """The layout of bytes, one a unit. There are no raw bits."""

  type_name: str = 'bytes'

  is_product: ClassVar[bool] = False
  most_share: ClassVar[float] = 1
  alphabet: ClassVar[int] = 255  # of a stored table, which does not have the escape
  stored_precision: ClassVar[int] = 12
  symbol_bits: ClassVar[int] = 8
  size: ClassVar[int] = 1
  shared: ClassVar[int] = 1
  words: ClassVar[int] = 1
  word: ClassVar[np.dtype] = np.dtype(np.uint8)

  def is_valid(self) -> bool:
    """Returns whether there is such a layout."""
    return self.dtype == np.uint8 and not self.raw_bits

  def base(self, *_: Any) -> int:
    return 0

  def counted(self, row: units_lib.Row, base: np.ndarray) -> tuple[Any, ...]:
    """Returns the tables and the symbols of bytes; see `Pairs.counted`."""
    return row.classes, row.units + _BIAS, 0, None

  def context(self, row: units_lib.Row, base: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """Returns the tables of bytes; see `Pairs.context`."""
    return row.classes, None

  def raw(self, pop: units_lib.Pop, row: units_lib.Row, context: Any) -> list[Any]:
    return [jnp.uint32(0)]

  def join(self, symbols: Any, raw: Any, context: Any, xp: Any = jnp) -> list[Any]:
    """Makes bytes of symbols."""
    return [symbols - np.uint32(_BIAS) & 255]

  def divided(self, numbers: list[Any], context: Any) -> tuple[Any, ...]:
    """Returns the symbols of bytes; see `Pairs.divided`."""
    return numbers[0] + np.uint32(_BIAS) & 255, [], []

  def frequencies(self, counts: np.ndarray) -> np.ndarray:
    return counts


def folded(values: Any) -> Any:
  """Returns signed integers as uint32 in the order 0, -1, 1, -2, 2, ..."""
  return (values << 1 ^ values >> 31).view(np.uint32)


Layout = Pairs | Singles | Differences | Bytes

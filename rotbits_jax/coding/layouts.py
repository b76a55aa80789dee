r"""Layouts: how numbers become symbols and raw bits, a *unit* at a time.

The symbol of a unit is worth modelling and is coded; the raw bits are noise. A layout
belongs to one dtype. In each step every lane codes a unit. The *class* of a unit, a
byte that encoder and decoder know, tells its frequency table.

**Floats.** A unit is two neighbours. The bits of a float, from the top, are its sign,
its exponent and its mantissa of m bits. In trained weights only the sizes of numbers
are predictable, so a number has a *bin*, its magnitude in half octaves (t = 1) or, if
all numbers are within a few octaves, in quarter octaves (t = 2):

    bits     = [ sign | exponent | mantissa ]
    bin      = [ exponent | top t bits of the mantissa ] - offset       0 <= bin < 32
    raw bits = [ sign | low m - t bits of the mantissa ]

Given their scale, neighbours are independent: the symbol of a unit is its two bins, and
its table is the product of the table of a bin with itself. The class is the scale of
the unit in quarter octaves. The offset is `first` and the whole octaves of the scale;
the quarter that is left tells the table, so there are four. The last pair of bins, 31
and 31, means that the bins are found in a list behind the block; so do all pairs that
are too rare for a table.

The raw bits do not contain low bits that are zero in all numbers, because numbers that
were widened from a shorter dtype end in zeros.

Numbers may be rounded so that all small ones share one step. In IEEE 754 the exponents
0 and 1 share a step. The *minimum exponent* f is the greatest exponent that shares the
step of all exponents below it, so that of IEEE 754 itself is 1. A magnitude is
[ exponent | mantissa ]. With a minimum exponent f above 1 it is *raised*, that is
replaced by

    magnitude - (f - 1) 2^m                  if its exponent is at least f,
    the value divided by the step            otherwise.

The second line is an integer. Both lines give the same result for the exponent f,
because IEEE 754 defines subnormal numbers in this way. Exponents are biased, as they
are in the bits. Then bins are counted from the step, without an offset, and the table
is that of the scale above the step. The class tells the table and f.

**Integers.** A unit is a number x. Its class is the number of its table, and tells how
many raw bits it has, its *shift* s. With b = 128 for signed integers and 0 for others,

    n = x + b 2^s        symbol = n >> s < 256         raw bits = n & (2^s - 1)

The raw bits of integers are coded as symbols that are uniform, of at most 16 bits each.
Those of floats, which all have the same number, are cut into pieces, from the lowest
bit on: as many of 8 bits as there are, then one of 4, of 2 and of 1 where they are
needed. The pieces of one kind are a *plane*; see `blocks`.

Numbers that have no symbol are *exceptions*: any symbol is coded instead, and a list
behind the block has their bits.

Shape letters: L lanes, K tables.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax.coding import tables

BINS = 32
ESCAPE = BINS * BINS - 1
"""The symbol of a pair of bins that is in a list."""

WINDOW = 256
"""The number of symbols of integers."""

MOST_SHIFT = 24
_MOST_RAW = 16  # bits of a uniform symbol

# What a mark of a unit says, beside the pair of bins.
ESCAPED, EXCEPTION = 1 << 15, 1 << 14

Interval = tuple[jax.Array, jax.Array, int]
"""Starts and frequencies of the symbols of the lanes, and the precision."""

Pop = Callable[[Callable[[jax.Array], tuple[jax.Array, ...]], int], jax.Array]
"""Takes a function from slots to entries, starts and frequencies, and the precision.

It pops one symbol from each lane and returns the entries."""


class Format(NamedTuple):
  """How many bits of a dtype the exponent and the mantissa have."""

  width: int
  exponent: int
  mantissa: int


FORMATS = {
  np.dtype(np.float16): Format(width=16, exponent=5, mantissa=10),
  np.dtype(ml_dtypes.bfloat16): Format(width=16, exponent=8, mantissa=7),
  np.dtype(np.float32): Format(width=32, exponent=8, mantissa=23),
}
"""The dtypes of `Floats`."""


class Tables(NamedTuple):
  """The frequency tables of a layout, for its programs.

  Attributes:
    slots: `[K 2^precision]`, what each slot of a table stands for; uint32 of floats,
      uint8 of integers.
    intervals: uint32 `[K A]`, the interval of each of the A symbols of a table.
    classes: uint32 `[256]`, what a class tells: of integers the shift; of floats that
      share a step the table in the low 8 bits, and the minimum exponent above.
    start: uint32, of integers b, of others the least offset.
  """

  slots: np.ndarray
  intervals: np.ndarray
  classes: np.ndarray
  start: np.ndarray


@dataclasses.dataclass(frozen=True)
class Floats:
  """The layout of floats.

  Attributes:
    dtype: dtype of the numbers.
    raw_bits: raw bits of a number, with its sign.
    raised: whether small numbers share a step, and magnitudes are raised.
    top: t.
  """

  dtype: np.dtype
  raw_bits: int
  raised: bool = False
  top: int = 1

  type_name: ClassVar[str] = 'floats'
  size: ClassVar[int] = 2  # numbers of a unit
  words: ClassVar[int] = 1  # that a lane needs at most for a unit

  def is_valid(self) -> bool:
    """Returns whether there is such a layout."""
    return (
      self.dtype in FORMATS
      and 1 <= self.top <= 2
      and 1 <= self.raw_bits <= self.format.mantissa + 1 - self.top
    )

  @property
  def format(self) -> Format:
    return FORMATS[self.dtype]

  @property
  def program(self) -> Self:
    """The layout with which the programs that this one uses are compiled."""
    return self

  @property
  def precision(self) -> int:
    # There are many tables where steps are shared, and the cache is small.
    return 12 if self.raised else tables.PRECISION

  @property
  def most_tables(self) -> int:
    return 256 if self.raised else 4

  @property
  def most_offset(self) -> int:
    """The greatest offset: with a greater one numbers could look like a NaN."""
    return self.all_ones - BINS

  @property
  def all_ones(self) -> int:
    """The exponent and the top bits of the mantissa of some NaNs."""
    return (1 << self.format.exponent + self.top) - 1

  def unit_shape(self) -> tuple[int, ...]:
    """The shape of the words of a unit: one for numbers of 16 bits, else two."""
    return () if self.format.width == 16 else (2,)

  @property
  def unit_dtype(self) -> np.dtype:
    return np.dtype(np.uint32)

  @property
  def pieces(self) -> tuple[tuple[int, int], ...]:
    """The width and the lowest bit of each piece of the raw bits of a number."""
    low = self.raw_bits & ~7
    pieces = [(8, place) for place in range(0, low, 8)]
    for width in (4, 2, 1):
      if self.raw_bits & width:
        pieces.append((width, low))
        low += width
    return tuple(pieces)

  # A word has the fields of one number or of two; `ones` has a one in each of them.
  @property
  def _ones(self) -> int:
    return 1 if self.unit_shape() else 0x10001

  @property
  def _low(self) -> int:
    """The number of bits below the bin."""
    return self.format.mantissa - self.top

  def _fields(self, first: Any, second: Any) -> list[Any]:
    """Returns the words of a unit, given a field of each of its numbers."""
    return [first, second] if self.unit_shape() else [first | second << 16]

  def join(
    self, symbols: Any, kept: list[Any], classes: Any, start: Any, xp: Any = jnp
  ) -> list[Any]:
    """Makes the words of units.

    Args:
      symbols: uint32, pairs of bins.
      kept: words that have the signs and the low bits of the numbers.
      classes: uint32, the classes, or what they tell if steps are shared.
      start: that of `Tables`.
      xp: the module, JAX or NumPy.

    Returns:
      The words, uint32.
    """
    offset = 0 if self.raised else (classes >> 2 << self.top) + start
    pair = (symbols >> 5) + offset, (symbols & 31) + offset
    words = []
    for bins, word in zip(self._fields(*pair), kept, strict=True):
      sign = word & np.uint32(self._ones << self.format.width - 1)
      whole = bins << self._low | word ^ sign
      if self.raised:
        lower = functools.partial(
          lowered, form=self.format, min_exponent=classes >> 8, xp=xp
        )
        if self.unit_shape():
          whole = lower(whole)
        else:
          whole = lower(whole & 0xFFFF) | lower(whole >> 16) << 16
      words.append(sign | whole)
    return words

  @property
  def marker(self) -> np.uint32:
    """The bits that are set in a word whose bins are in a list."""
    return np.uint32(self._ones * self.all_ones << self._low)

  def decode_step(
    self, pop: Pop, classes: jax.Array, pieces: list[jax.Array], of: Any
  ) -> jax.Array:
    """Decodes a unit of each lane, in a program.

    Args:
      pop: pops a symbol.
      classes: uint32 `[L]`.
      pieces: uint32 `[L]`, the pieces of each unit.
      of: the `Tables`.

    Returns:
      The words, `[L, *unit_shape()]`.
    """
    if self.raised:
      classes = _get(of.classes, classes)
    table = classes & (255 if self.raised else 3)

    def lookup(slot: jax.Array) -> tuple[jax.Array, ...]:
      entry = _get(of.slots, table << self.precision | slot)
      return entry, slot - (entry >> 11 & 0x7FF), (entry & 0x7FF) + 1

    entry = pop(lookup, self.precision)
    raw = [jnp.zeros_like(entry) for _ in self._fields(entry, entry)]
    for (width, place), piece in zip(self.pieces, pieces, strict=True):
      pair = piece & ((1 << width) - 1), piece >> width & ((1 << width) - 1)
      fields = self._fields(*pair)
      raw = [x | field << place for x, field in zip(raw, fields, strict=True)]
    top, ones = self.raw_bits - 1, np.uint32(self._ones)
    kept = [
      (x >> top & ones) << self.format.width - 1
      | (x & ones * np.uint32((1 << top) - 1)) << self._low - top
      for x in raw
    ]
    words = self.join(entry >> 22, kept, classes, of.start)
    escaped = entry >= jnp.uint32(ESCAPE << 22)
    words = [
      jnp.where(escaped, x | self.marker, word)
      for x, word in zip(kept, words, strict=True)
    ]
    return jnp.stack(words, -1) if self.unit_shape() else words[0]

  def encode_step(
    self, classes: jax.Array, unit: jax.Array, of: Any
  ) -> tuple[list[Interval], list[jax.Array], jax.Array]:
    """Divides a unit of each lane, in a program.

    Args:
      classes: uint32 `[L]`.
      unit: the words.
      of: the `Tables`.

    Returns:
      The intervals in the order in which they are popped; the pieces, uint32; and the
      marks, uint16.
    """
    if self.raised:
      classes = _get(of.classes, classes)
    width, low, top = self.format.width, self._low, self.raw_bits - 1
    offset = jnp.uint32(0)
    if not self.raised:
      offset = (classes >> 2 << self.top) + of.start
    pair = (
      [unit[:, 0], unit[:, 1]] if self.unit_shape() else [unit & 0xFFFF, unit >> 16]
    )
    symbol, outside, raw = jnp.uint32(0), jnp.bool_(False), []
    for number in pair:
      # A number that looks like the marker is an exception.
      is_marker = number >> low & self.all_ones == self.all_ones
      if self.raised:
        number = raised(number, self.format, classes >> 8)
      magnitude = number & ((1 << width - 1) - 1)
      distance = ((magnitude >> low) - offset).astype(jnp.int32)
      within = jnp.where(is_marker, 0, jnp.clip(distance, 0, BINS - 1))
      symbol = symbol << 5 | within.astype(jnp.uint32)
      outside = outside | is_marker | (within != distance)
      raw.append(
        (magnitude & ((1 << low) - 1)) >> low - top | number >> width - 1 << top
      )
    pieces = [
      (raw[0] >> place & ((1 << bits) - 1))
      | (raw[1] >> place & ((1 << bits) - 1)) << bits
      for bits, place in self.pieces
    ]
    table = classes & (255 if self.raised else 3)
    entry = _get(of.intervals, table << 10 | symbol)
    mark = jnp.where(entry >> 31 > 0, ESCAPED | symbol, 0)
    mark = mark | jnp.where(outside, EXCEPTION, 0)
    interval = entry >> 11 & 0x3FFF, (entry & 0x7FF) + 1, self.precision
    return [interval], pieces, mark.astype(jnp.uint16)

  def tables(self, counts: np.ndarray, classes: np.ndarray, start: int) -> Tables:
    """Makes the tables.

    Args:
      counts: int64 `[K, 32]`, rows that add up to 2^14, of bins.
      classes: `[256]`, what the classes tell; empty unless steps are shared.
      start: the least offset.

    Raises:
      ValueError: if a pair of bins is too frequent.
    """
    frequencies = tables.of_pairs(counts, self.precision)
    starts = np.cumsum(frequencies, axis=1) - frequencies
    escape = frequencies[:, ESCAPE:] - 1, starts[:, ESCAPE:]
    listed = frequencies == 0
    listed[:, ESCAPE] = True
    intervals = np.where(
      listed,
      1 << 31 | escape[1] << 11 | escape[0],
      starts << 11 | frequencies - 1,
    )
    used, symbols = np.nonzero(frequencies)
    lengths = frequencies[used, symbols]
    entries = (symbols << 22) + lengths - 1 - (starts[used, symbols] << 11)
    slots = np.repeat(entries, lengths)
    slots += np.tile(np.arange(1 << self.precision) << 11, len(frequencies))
    return Tables(
      _filled(slots, self.most_tables << self.precision),
      _filled(intervals, self.most_tables * BINS * BINS),
      classes.astype(np.uint32),
      np.array(start).astype(np.uint32),
    )


@dataclasses.dataclass(frozen=True)
class Integers:
  """The layout of integers of at most 32 bits.

  Attributes:
    dtype: dtype of the numbers.
    raw_bits: the greatest shift of a table.
  """

  dtype: np.dtype
  raw_bits: int

  type_name: ClassVar[str] = 'integers'
  raised: ClassVar[bool] = False
  top: ClassVar[int] = 0
  size: ClassVar[int] = 1
  precision: ClassVar[int] = tables.PRECISION
  most_tables: ClassVar[int] = 256
  pieces: ClassVar[tuple[tuple[int, int], ...]] = ()

  def is_valid(self) -> bool:
    """Returns whether there is such a layout."""
    known = self.dtype.kind in 'iu' and self.dtype.itemsize <= 4
    return known and 0 <= self.raw_bits <= MOST_SHIFT

  @property
  def program(self) -> Self:
    """The layout with which the programs that this one uses are compiled."""
    return dataclasses.replace(
      self, raw_bits=-(-self.raw_bits // _MOST_RAW) * _MOST_RAW
    )

  @property
  def words(self) -> int:
    return 1 + -(-self.raw_bits // _MOST_RAW)

  def unit_shape(self) -> tuple[int, ...]:
    return ()

  @property
  def unit_dtype(self) -> np.dtype:
    return np.dtype(f'u{self.dtype.itemsize}')

  @property
  def bias(self) -> int:
    """B."""
    return WINDOW // 2 if self.dtype.kind == 'i' else 0

  def _raw(self, shift: jax.Array) -> list[jax.Array]:
    """Returns the bits of each uniform symbol, that of the highest bits first."""
    sizes = []
    for _ in range(1, self.words):
      sizes.append(jnp.minimum(shift, _MOST_RAW))
      shift = shift - sizes[-1]
    return sizes

  def decode_step(
    self, pop: Pop, classes: jax.Array, pieces: list[jax.Array], of: Any
  ) -> jax.Array:
    """Decodes a number of each lane; see `Floats.decode_step`."""
    del pieces

    def lookup(slot: jax.Array) -> tuple[jax.Array, ...]:
      symbol = _get(of.slots, classes << self.precision | slot).astype(jnp.uint32)
      return symbol, *_interval(_get(of.intervals, classes << 8 | symbol))

    number = pop(lookup, self.precision) - of.start
    if self.words > 1:
      for size in self._raw(_get(of.classes, classes)):

        def uniform(slot: jax.Array, size: jax.Array = size) -> tuple[jax.Array, ...]:
          rest = _MOST_RAW - size
          raw = slot >> rest
          return raw, raw << rest, jnp.uint32(1) << rest

        number = number << size | pop(uniform, _MOST_RAW)
    return number.astype(self.unit_dtype)

  def encode_step(
    self, classes: jax.Array, unit: jax.Array, of: Any
  ) -> tuple[list[Interval], list[jax.Array], jax.Array]:
    """Divides a number of each lane; see `Floats.encode_step`."""
    signed = unit.view(self.dtype).astype(np.int32 if self.bias else np.uint32)
    shift = jnp.zeros_like(classes)
    if self.words > 1:
      shift = _get(of.classes, classes)
    # The shift of signed integers copies the sign.
    top = (signed >> shift.astype(signed.dtype)).view(jnp.uint32) + of.start
    symbol = jnp.minimum(top, WINDOW - 1)
    entry = _get(of.intervals, classes << 8 | symbol)
    intervals = [(*_interval(entry), self.precision)]
    left = shift
    for size in self._raw(shift):
      left = left - size
      raw = signed.view(jnp.uint32) >> left & (jnp.uint32(1) << size) - jnp.uint32(1)
      rest = _MOST_RAW - size
      intervals.append((raw << rest, jnp.uint32(1) << rest, _MOST_RAW))
    mark = jnp.where((symbol != top) | (entry >> 31 > 0), EXCEPTION, 0)
    return intervals, [], mark.astype(jnp.uint16)

  def tables(self, frequencies: np.ndarray, shifts: np.ndarray) -> Tables:
    """Makes the tables, of frequencies `[K, 256]` and shifts `[K]`."""
    starts = np.cumsum(frequencies, axis=1) - frequencies
    # A symbol that does not occur is an exception, coded as the most frequent one.
    best = np.argmax(frequencies, axis=1, keepdims=True)
    intervals = (frequencies - 1) << 14 | starts
    other = 1 << 31 | np.take_along_axis(intervals, best, axis=1)
    _, symbols = np.nonzero(frequencies)
    owners = np.repeat(symbols, frequencies[frequencies > 0])
    size = self.most_tables
    return Tables(
      _filled(owners, size << self.precision, np.uint8),
      _filled(np.where(frequencies > 0, intervals, other), size * WINDOW),
      _filled(shifts, size),
      np.array(self.bias, np.uint32),
    )


Layout = Floats | Integers


def _get(array: jax.Array, index: jax.Array) -> jax.Array:
  return array.at[index].get(mode='promise_in_bounds')


def _interval(entry: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Unpacks the start and the frequency of integers."""
  return entry & 0x3FFF, (entry >> 14 & 0x3FFF) + 1


def _filled(
  values: np.ndarray, size: int, dtype: type[np.generic] = np.uint32
) -> np.ndarray:
  """Returns values, flat, and zeros behind them."""
  filled = np.zeros(size, dtype)
  filled[: values.size] = values.reshape(-1)
  return filled


def bins_of(numbers: np.ndarray, layout: Floats, min_exponent: int) -> np.ndarray:
  """Returns the bins of bit patterns without an offset, int64.

  Those of numbers that share a step, whose minimum exponent is above 1, are raised.
  """
  form, kind = layout.format, numbers.dtype.type
  low = form.mantissa - layout.top
  tops = lambda x: (x & kind((1 << form.width - 1) - 1)) >> low
  bins = tops(numbers)
  if min_exponent > 1:
    steps = tops(raised(numbers, form, min_exponent, np))
    bins = np.where(bins == layout.all_ones, bins, steps)
  return bins.astype(np.int64)


# ---- numbers that share a step -------------------------------------------------------


def raised(bits: Any, form: Format, min_exponent: Any, xp: Any = jnp) -> Any:
  """Replaces the magnitudes in bit patterns by those of a minimum exponent.

  Args:
    bits: unsigned integers at least as wide as the numbers. Numbers with a lower
      exponent must be multiples of the step of the minimum exponent.
    form: format of the dtype.
    min_exponent: f, an integer of at least 1; it may be traced. 1 changes nothing.
    xp: the module, JAX or NumPy.

  Returns:
    Unsigned integers of the same shape and width.
  """
  kind, top = bits.dtype.type, form.mantissa
  magnitude = bits & kind((1 << form.width - 1) - 1)
  least = xp.asarray(min_exponent).astype(bits.dtype)
  exponent = xp.maximum(magnitude >> top, kind(1))
  shift = xp.where(exponent < least, least - exponent, kind(0))
  leading = (magnitude >> top > 0).astype(bits.dtype) << top
  significand = magnitude & kind((1 << top) - 1) | leading
  steps = significand >> xp.minimum(shift, kind(form.width - 1))
  return bits - magnitude | xp.where(
    shift > 0, steps, magnitude - (least - kind(1) << top)
  )


def lowered(magnitude: Any, form: Format, min_exponent: Any, xp: Any = jnp) -> Any:
  """Restores magnitudes, uint32: the inverse of `raised`."""
  top, width = form.mantissa, form.width
  least = xp.asarray(min_exponent).astype(np.int32)
  # A float32 holds an integer below 2^24 exactly, and its bits tell the exponent.
  wide = magnitude.astype(np.float32).view(np.int32)
  below = least - np.int32(127 + top)
  normal = ((wide >> (23 - top)) + (below << top)).view(np.uint32)
  subnormal = magnitude << xp.clip(least - 1, 0, width - 1).astype(np.uint32)
  small = xp.where((wide >> 23) + below >= 1, normal, subnormal)
  small = xp.where(magnitude > 0, small, np.uint32(0))
  large = magnitude + ((least - 1) << top).astype(np.uint32)
  return xp.where(magnitude >> top > 0, large, small) & np.uint32((1 << width - 1) - 1)

r"""Layouts: how numbers become symbols and raw bits, a *unit* at a time.

The symbol of a unit is worth modelling and is coded; the raw bits are noise. The
*class* of a unit, a byte that encoder and decoder know, tells its frequency table.
docs/format.md has the rules; here are the reasons.

**Floats.** A unit is two neighbours. In trained weights only the sizes of numbers are
predictable, so a number has a *bin*, its magnitude in half octaves or, if small numbers
share a step, in quarter octaves. Given their scale, neighbours are independent: the
symbol of a unit is its two bins, and its table is the product of the table of a bin
with itself. The class is the scale in quarter octaves. Its whole octaves tell the
*offset*, the bin that counts as 0, and the quarter that is left tells one of four
tables. Low bits that are zero in all numbers are not stored, because numbers that were
widened from a shorter dtype end in zeros.

Numbers may be rounded so that all small ones share one step. The *minimum exponent* f
is the greatest exponent whose step they all share; that of IEEE 754 itself is 1. With f
above 1 magnitudes are *raised*: they count steps below f, as IEEE 754 defines subnormal
numbers. Then the class tells f and the scale above the step, which tells the table.

**Integers.** A unit is a number, signed or a byte. Its class tells its table and how
many raw bits it has, its *shift*.

Units without a symbol, and pairs of bins that are too rare, are *escapes*: one symbol
of each table says that they are in lists behind the block.

Shape letters: L lanes, K tables.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

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

QUARTERS = 4
"""The tables of floats that share no step: a class, in quarter octaves, tells one."""

LEVELS = 32
"""The tables of floats that share a step, and the classes of each minimum exponent."""

MOST_SHIFT = 24
MOST_RAW = 16  # bits of a uniform symbol
_FEW_TABLES = 16  # of integers; larger arrays of tables take time to fill

ESCAPED = 1 << 15  # of the mark of a unit, beside the pair of bins

Interval = tuple[jax.Array, jax.Array, int]
"""Starts and frequencies of the symbols of the lanes, and the precision."""

Pop = Callable[[Callable[[jax.Array], tuple[jax.Array, ...]], int], jax.Array]
"""Takes a function from slots to entries, starts and frequencies, and the precision.

It pops one symbol from each lane and returns the entries."""


FORMATS = {
  np.dtype(x): ml_dtypes.finfo(x) for x in (np.float16, ml_dtypes.bfloat16, np.float32)
}
"""The dtypes of `Floats`, with the bits of their exponents and mantissas."""


class Tables(NamedTuple):
  """The frequency tables of a layout, for its programs."""

  # The entry of each slot of a table: `[K 2^precision]`, uint32 of floats, uint8 of
  # integers.
  slots: np.ndarray
  intervals: np.ndarray  # uint32 `[K A]`, those of the A symbols of each table
  base: np.ndarray  # int32 `[1]` or `[256]`, see `told`


@dataclasses.dataclass(frozen=True)
class Floats:
  """The layout of floats."""

  dtype: np.dtype
  raw_bits: int  # raw bits of a number, with its sign
  raised: bool = False  # whether small numbers share a step, and magnitudes are raised

  type_name: ClassVar[str] = 'floats'
  alphabet: ClassVar[int] = BINS  # of a stored table
  size: ClassVar[int] = 2  # numbers of a unit
  pushes: ClassVar[int] = 1  # of a unit
  word: ClassVar[np.dtype] = np.dtype(np.uint32)  # units are words of this dtype

  def is_valid(self) -> bool:
    """Returns whether there is such a layout."""
    return self.dtype in FORMATS and 1 <= self.raw_bits <= self._low + 1

  @property
  def format(self) -> ml_dtypes.finfo:
    return FORMATS[self.dtype]

  @property
  def top(self) -> int:
    """The number t, of bits of the mantissa that belong to a bin."""
    return 1 + self.raised

  @property
  def precision(self) -> int:
    # There are many tables where steps are shared, and the cache is small.
    return 12 if self.raised else tables.PRECISION

  @property
  def most_tables(self) -> int:
    return LEVELS if self.raised else QUARTERS

  @property
  def limits(self) -> tuple[int, int]:
    """The least and the greatest minimum exponent or offset."""
    return (2, 255) if self.raised else (-(1 << 15), 1 << 15)

  @property
  def words(self) -> int:
    """The words of a unit: one has two numbers of 16 bits, or one of 32 bits."""
    return self.format.bits // 16

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

  @property
  def _ones(self) -> int:
    """A one in the lowest bit of each number of a word."""
    return 0x10001 if self.words == 1 else 1

  @property
  def _low(self) -> int:
    """The number of bits below the bin."""
    return self.format.nmant - self.top

  def _packed(self, first: Any, second: Any) -> list[Any]:
    """Returns the words of a unit, given a field of each of its numbers."""
    return [first | second << 16] if self.words == 1 else [first, second]

  def told(self, classes: Any, base: Any) -> tuple[Any, Any]:
    """Returns what int32 classes tell: tables, and offsets or minimum exponents.

    `base` has the offset of class 0, or its minimum exponent.
    """
    if self.raised:
      return classes & 31, (classes >> 5) + base[0]
    return classes & 3, (classes >> 2 << self.top) + base[0]

  def symbols(self, numbers: np.ndarray, told: np.ndarray) -> np.ndarray:
    """Returns the bins of bit patterns, int64, in NumPy; `told` is that of `told`."""
    form, unsigned = self.format, numbers.dtype.type
    if self.raised:
      numbers = raised(numbers, form, told, np)
    tops = (numbers & unsigned((1 << form.bits - 1) - 1)) >> self._low
    return tops.astype(np.int64) - (0 if self.raised else told)

  def join(self, symbols: Any, kept: list[Any], told: Any, xp: Any = jnp) -> list[Any]:
    """Makes the words of units, uint32, in JAX or NumPy.

    Args:
      symbols: uint32, pairs of bins.
      kept: words that have the signs and the low bits of the numbers.
      told: int32, the offsets or minimum exponents of the units.
      xp: the module, JAX or NumPy.
    """
    offset = 0 if self.raised else told.astype(np.uint32)
    bins = self._packed((symbols >> 5) + offset, (symbols & 31) + offset)
    sign = np.uint32(self._ones << self.format.bits - 1)
    words = [x << self._low | y & ~sign for x, y in zip(bins, kept, strict=True)]
    if self.raised:
      lower = lambda x: lowered(x, self.format, told, xp)
      if self.words == 1:
        words = [lower(words[0] & 0xFFFF) | lower(words[0] >> 16) << 16]
      else:
        words = [lower(x) for x in words]
    return [y & sign | x for x, y in zip(words, kept, strict=True)]

  def decode_step(
    self, pop: Pop, classes: jax.Array, pieces: list[jax.Array], coder_tables: Tables
  ) -> tuple[jax.Array, ...]:
    """Decodes a unit of each lane, in a program.

    Args:
      pop: pops a symbol.
      classes: int32 `[L]`.
      pieces: uint32 `[L]`, the pieces of each unit.
      coder_tables: the tables.

    Returns:
      The words of the units, `[L, words]`; and uint8 `[L]`: 1 at escapes, where the
      words are those that `join` needs.
    """
    table, told = self.told(classes, coder_tables.base)

    def lookup(slot: jax.Array) -> tuple[jax.Array, ...]:
      place = table.astype(jnp.uint32) << self.precision | slot
      entry = _get(coder_tables.slots, place)
      return entry, slot - (entry >> 11 & 0x7FF), (entry & 0x7FF) + 1

    entry = pop(lookup, self.precision)
    raw = [jnp.zeros_like(entry)] * self.words
    for (width, place), piece in zip(self.pieces, pieces, strict=True):
      mask = (1 << width) - 1
      fields = self._packed(piece & mask, piece >> width & mask)
      raw = [x | y << place for x, y in zip(raw, fields, strict=True)]
    top, ones = self.raw_bits - 1, np.uint32(self._ones)
    kept = [
      (x >> top & ones) << self.format.bits - 1
      | (x & ones * np.uint32((1 << top) - 1)) << self._low - top
      for x in raw
    ]
    words = self.join(entry >> 22, kept, told)
    is_listed = entry >= jnp.uint32(ESCAPE << 22)
    pairs = zip(kept, words, strict=True)
    words = [jnp.where(is_listed, x, y) for x, y in pairs]
    return jnp.stack(words, -1), is_listed.astype(jnp.uint8)

  def encode_step(
    self, classes: jax.Array, unit: jax.Array, coder_tables: Tables
  ) -> tuple[list[Interval], list[jax.Array], jax.Array]:
    """Divides a unit of each lane, `[L, words]`, in a program.

    Returns:
      The intervals in the order in which they are popped; the pieces, uint32; and the
      marks, uint16.
    """
    table, told = self.told(classes, coder_tables.base)
    offset = 0 if self.raised else told
    width, low, top = self.format.bits, self._low, self.raw_bits - 1
    numbers = [unit[:, 0] & 0xFFFF, unit[:, 0] >> 16]
    if self.words == 2:
      numbers = [unit[:, 0], unit[:, 1]]
    symbol, outside, raw = jnp.uint32(0), jnp.bool_(False), []
    for number in numbers:
      if self.raised:
        number = raised(number, self.format, told)
      magnitude = number & ((1 << width - 1) - 1)
      distance = (magnitude >> low).astype(jnp.int32) - offset
      within = jnp.clip(distance, 0, BINS - 1)
      symbol = symbol << 5 | within.astype(jnp.uint32)
      outside = outside | (within != distance)
      tail = magnitude & ((1 << low) - 1)
      raw.append(tail >> low - top | number >> width - 1 << top)
    pieces = []
    for bits, place in self.pieces:
      first, second = (x >> place & ((1 << bits) - 1) for x in raw)
      pieces.append(first | second << bits)
    symbol = jnp.where(outside, jnp.uint32(ESCAPE), symbol)
    place = table.astype(jnp.uint32) << 10 | symbol
    entry = _get(coder_tables.intervals, place)
    mark = jnp.where(entry >> 31 > 0, ESCAPED | symbol, 0)
    interval = entry >> 11 & 0x3FFF, (entry & 0x7FF) + 1, self.precision
    return [interval], pieces, mark.astype(jnp.uint16)

  def tables(self, counts: np.ndarray, base: np.ndarray) -> Tables:
    """Makes the tables, or raises a ValueError if a pair of bins is too frequent.

    Args:
      counts: int64 `[K, 32]`, rows that add up to 2^14, of bins.
      base: see `told`.
    """
    frequencies = tables.of_pairs(counts, self.precision)
    starts = np.cumsum(frequencies, axis=1) - frequencies
    intervals = starts << 11 | frequencies - 1
    listed = 1 << 31 | intervals[:, ESCAPE:]
    intervals = np.where(frequencies > 0, intervals, listed)
    intervals[:, ESCAPE:] = listed
    # A slot has its symbol, its distance from the start, and the frequency less 1.
    used, symbols = np.nonzero(frequencies)
    lengths, starts = frequencies[used, symbols], starts[used, symbols]
    entries = ((symbols << 22) - (starts << 11) + lengths - 1).astype(np.uint32)
    slots = np.repeat(entries, lengths).reshape(len(counts), -1)
    slots += np.arange(1 << self.precision, dtype=np.uint32) << np.uint32(11)
    intervals = intervals.astype(np.uint32)
    return Tables(slots.reshape(-1), intervals.reshape(-1), base.astype(np.int32))


@dataclasses.dataclass(frozen=True)
class Integers:
  """The layout of bytes, and of signed integers of at most 32 bits."""

  dtype: np.dtype
  raw_bits: int  # at least the shift of each class, and a multiple of 16

  type_name: ClassVar[str] = 'integers'
  alphabet: ClassVar[int] = WINDOW
  raised: ClassVar[bool] = False
  size: ClassVar[int] = 1
  words: ClassVar[int] = 1
  precision: ClassVar[int] = tables.PRECISION
  most_tables: ClassVar[int] = 256
  pieces: ClassVar[tuple[tuple[int, int], ...]] = ()

  def is_valid(self) -> bool:
    """Returns whether there is such a layout."""
    is_integer = self.dtype.name in ('uint8', 'int8', 'int16', 'int32')
    return is_integer and self.raw_bits in (0, MOST_RAW, 2 * MOST_RAW)

  @property
  def pushes(self) -> int:
    return 1 + self.raw_bits // MOST_RAW

  @property
  def word(self) -> np.dtype:
    return np.dtype(f'u{self.dtype.itemsize}')

  @property
  def limits(self) -> tuple[int, int]:
    """The least and the greatest shift."""
    return 0, min(self.raw_bits, MOST_SHIFT)

  @property
  def bias(self) -> int:
    """The number b."""
    return WINDOW // 2 if self.dtype.kind == 'i' else 0

  def told(self, classes: Any, base: Any) -> tuple[Any, Any]:
    """Returns what int32 classes tell: tables, and shifts, which `base` lists."""
    return classes, _get(base, classes)

  def symbols(self, numbers: np.ndarray, told: np.ndarray) -> np.ndarray:
    """Returns symbols, int64, in NumPy; others than 0 to 255 are not coded."""
    return (numbers.astype(np.int64) >> told) + self.bias

  def _raw_sizes(self, shift: jax.Array) -> list[jax.Array]:
    """Returns the bits of each uniform symbol, that of the highest bits first."""
    sizes = []
    for _ in range(1, self.pushes):
      sizes.append(jnp.minimum(shift, MOST_RAW))
      shift = shift - sizes[-1]
    return sizes

  def decode_step(
    self, pop: Pop, classes: jax.Array, pieces: list[jax.Array], coder_tables: Tables
  ) -> tuple[jax.Array, ...]:
    """Decodes a number of each lane; see `Floats.decode_step`."""
    del pieces
    table, shift = _unpacked(classes, coder_tables)

    def lookup(slot: jax.Array) -> tuple[jax.Array, ...]:
      symbol = _get(coder_tables.slots, table << self.precision | slot)
      symbol = symbol.astype(jnp.uint32)
      entry = _get(coder_tables.intervals, table * (WINDOW + 1) + symbol)
      # The escape of a table is marked in the entry.
      return symbol | entry >> 31 << 8, *_interval(entry)

    def uniform(size: jax.Array, slot: jax.Array) -> tuple[jax.Array, ...]:
      rest = MOST_RAW - size
      raw = slot >> rest
      return raw, raw << rest, jnp.uint32(1) << rest

    symbol = pop(lookup, self.precision)
    number = (symbol & 255) - jnp.uint32(self.bias)
    for size in self._raw_sizes(shift):
      raw = pop(functools.partial(uniform, size), MOST_RAW)
      number = number << size | raw
    return number.astype(self.word)[:, None], (symbol >> 8).astype(jnp.uint8)

  def encode_step(
    self, classes: jax.Array, unit: jax.Array, coder_tables: Tables
  ) -> tuple[list[Interval], list[jax.Array], jax.Array]:
    """Divides a number of each lane; see `Floats.encode_step`."""
    signed = unit[:, 0].view(self.dtype).astype(np.int32 if self.bias else np.uint32)
    table, left = _unpacked(classes, coder_tables)
    # The shift of signed integers copies the sign.
    top = (signed >> left.astype(signed.dtype)).view(jnp.uint32) + jnp.uint32(self.bias)
    symbol = jnp.minimum(top, WINDOW)
    entry = _get(coder_tables.intervals, table * (WINDOW + 1) + symbol)
    intervals = [(*_interval(entry), self.precision)]
    for size in self._raw_sizes(left):
      left = left - size
      raw = signed.view(jnp.uint32) >> left & (jnp.uint32(1) << size) - jnp.uint32(1)
      rest = MOST_RAW - size
      intervals.append((raw << rest, jnp.uint32(1) << rest, MOST_RAW))
    mark = jnp.where(entry >> 31 > 0, ESCAPED | ESCAPE, 0)
    return intervals, [], mark.astype(jnp.uint16)

  def tables(self, frequencies: np.ndarray, base: np.ndarray) -> Tables:
    """Makes the tables, given frequencies `[K, 256]`; see `Floats.tables`."""
    # Neighbours that have the same table share it, because a table is large.
    is_first = np.append(True, (frequencies[1:] != frequencies[:-1]).any(axis=1))
    packed = base.astype(np.int64) << 8 | np.cumsum(is_first) - 1
    frequencies = frequencies[is_first]
    starts = np.cumsum(frequencies, axis=1) - frequencies
    used = np.where(frequencies > 0, frequencies, 1 << 15)[:, ::-1]
    escape = WINDOW - 1 - np.argmin(used, axis=1, keepdims=True)
    intervals = (frequencies - 1) << 14 | starts
    listed = 1 << 31 | np.take_along_axis(intervals, escape, axis=1)
    is_told = (frequencies > 0) & (np.arange(WINDOW) != escape)
    if self.dtype.itemsize == 1:
      is_told |= (frequencies > 0).all(axis=1, keepdims=True)
    intervals = np.where(is_told, intervals, listed)
    intervals = np.append(intervals, listed, axis=1)  # of what has no symbol
    _, symbols = np.nonzero(frequencies)
    owners = np.repeat(symbols, frequencies[frequencies > 0])
    size = _FEW_TABLES if len(frequencies) <= _FEW_TABLES else self.most_tables
    return Tables(
      _filled(owners, size << self.precision, np.uint8),
      _filled(intervals, size * (WINDOW + 1)),
      _filled(packed, self.most_tables, np.int32),
    )


Layout = Floats | Integers


def _get(array: Any, index: jax.Array) -> jax.Array:
  if isinstance(array, np.ndarray):
    return array[index]
  return array.at[index].get(mode='promise_in_bounds')


def _unpacked(classes: jax.Array, coder_tables: Tables) -> tuple[jax.Array, jax.Array]:
  """Returns the tables and the shifts of classes of integers, uint32."""
  packed = _get(coder_tables.base, classes).astype(jnp.uint32)
  return packed & 255, packed >> 8


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


# ---- numbers that share a step -------------------------------------------------------


def raised(bits: Any, form: ml_dtypes.finfo, min_exponent: Any, xp: Any = jnp) -> Any:
  """Replaces the magnitudes in bit patterns by those of a minimum exponent.

  Args:
    bits: unsigned integers at least as wide as the numbers. Numbers with a lower
      exponent must be multiples of the step of the minimum exponent.
    form: format of the dtype.
    min_exponent: f, an integer of at least 1; it may be traced. 1 changes nothing.
    xp: the module, JAX or NumPy.
  """
  unsigned, top = bits.dtype.type, form.nmant
  magnitude = bits & unsigned((1 << form.bits - 1) - 1)
  least = xp.asarray(min_exponent).astype(bits.dtype)
  exponent = xp.maximum(magnitude >> top, unsigned(1))
  shift = xp.where(exponent < least, least - exponent, unsigned(0))
  leading = (magnitude >> top > 0).astype(bits.dtype) << top
  significand = magnitude & unsigned((1 << top) - 1) | leading
  steps = significand >> xp.minimum(shift, unsigned(form.bits - 1))
  return bits - magnitude | xp.where(
    shift > 0, steps, magnitude - (least - unsigned(1) << top)
  )


def lowered(
  magnitude: Any, form: ml_dtypes.finfo, min_exponent: Any, xp: Any = jnp
) -> Any:
  """Restores magnitudes, uint32: the inverse of `raised`."""
  top, width = form.nmant, form.bits
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

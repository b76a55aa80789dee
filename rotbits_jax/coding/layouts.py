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

**Integers.** A unit is one integer. Its class selects its table and its *shift*, the
number of its raw bits.

The last symbol of a table is the *escape*: units without a symbol, and pairs of bins
that are too rare, are in lists after the block. One lookup gives the symbol of a slot
and its interval.

Shape letters: n units, L lanes, K tables.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax.coding import rans
from rotbits_jax.coding import tables

FORMATS = {
  np.dtype(x): ml_dtypes.finfo(x) for x in (np.float16, ml_dtypes.bfloat16, np.float32)
}
"""The dtypes of floats, with the bits of their exponents and mantissas."""

BINS = 32

QUARTERS = 4
"""The tables of floats that share no step: a class, in quarter octaves, tells one."""

LEVELS = 32
"""The tables of floats that share a step, and the classes of each minimum exponent."""

RAW, MOST_RAW = 16, 24
"""The raw bits of integers that are pushed at once, and in all."""

MARKED = 1 << 15
"""The bit of the mark of a unit that is in a list, above its symbol."""

_FEW_TABLES = 16  # of integers; larger arrays of tables take time to fill

Interval = tuple[jax.Array, jax.Array | int, jax.Array | int]
"""Starts and frequencies of the symbols of the lanes, and the precision."""

Pop = Callable[[Callable[[jax.Array], tuple[Any, ...]], Any], jax.Array]
"""Pops a symbol from each lane and returns its entry, given a function from slots to
entries, starts and frequencies; and the precision."""


class Tables(NamedTuple):
  """The frequency tables of a layout, for its programs. A symbol has b bits."""

  # uint32 `[K 2^precision]`, of each slot: its symbol; and in (32 - b) // 2 bits each
  # its distance from the start of the symbol, and the frequency less 1.
  slots: np.ndarray
  # uint32 `[K 2^b]`, of each symbol: whether units are listed, in the highest bit; the
  # start; in 12 bits the frequency less 1. Those of the escape if units are listed.
  intervals: np.ndarray
  told: np.ndarray  # int32, see `Layout.told`


@dataclasses.dataclass(frozen=True)
class Pairs:
  """The layout of pairs of floats, and of int8 codes."""

  dtype: np.dtype
  raw_bits: int  # raw bits of a number, with the sign of a float
  type_name: str = 'floats'  # or 'raised', if small floats share a step; or 'codes'

  alphabet: ClassVar[int] = BINS  # of a stored table
  stored_precision: ClassVar[int] = tables.PRECISION  # of a stored table
  symbol_bits: ClassVar[int] = 10
  size: ClassVar[int] = 2  # numbers of a unit
  bases: ClassVar[int] = 1  # integers from which `told` counts
  pushes: ClassVar[int] = 1  # of a unit

  def is_valid(self) -> bool:
    """Returns whether there is such a layout."""
    if self.type_name == 'codes':
      return self.dtype == np.int8 and self.raw_bits <= 3
    return self.dtype in FORMATS and 1 <= self.raw_bits <= self._low + 1

  @property
  def raised(self) -> bool:
    return self.type_name == 'raised'

  @property
  def format(self) -> ml_dtypes.finfo:
    return FORMATS[self.dtype]

  @property
  def width(self) -> int:
    """The bits of a number."""
    return 8 * self.dtype.itemsize

  @property
  def top(self) -> int:
    """The number t, of bits of the mantissa that belong to a bin."""
    return 1 + self.raised

  @property
  def precision(self) -> int:
    # The others have many tables, and the cache is small.
    return tables.PRECISION if self.type_name == 'floats' else 12

  @property
  def most_tables(self) -> int:
    return QUARTERS if self.type_name == 'floats' else LEVELS

  @property
  def words(self) -> int:
    """The words of a unit: one has two numbers, or one of 32 bits."""
    return max(self.width // 16, 1)

  @property
  def word(self) -> np.dtype:
    """The dtype of these words."""
    return np.dtype(np.uint16 if self.width == 8 else np.uint32)

  @functools.cached_property
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
    return 1 | 1 << self.width if self.words == 1 else 1

  @property
  def _sign(self) -> int:
    """The number of sign bits of a number."""
    return 0 if self.type_name == 'codes' else 1

  @property
  def _low(self) -> int:
    """The number of bits below the bin."""
    return self.format.nmant - self.top if self._sign else self.raw_bits

  def _packed(self, first: Any, second: Any) -> list[Any]:
    """Returns the words of a unit, given a field of each of its numbers."""
    return [first | second << self.width] if self.words == 1 else [first, second]

  def told(self, classes: Any, base: Any) -> tuple[Any, Any]:
    """Returns what int32 classes tell: tables, and offsets or minimum exponents.

    `base` has the offset of class 0, or its minimum exponent.
    """
    if self.most_tables == LEVELS:
      return classes & 31, (classes >> 5) + base[0]
    return classes & 3, (classes >> 2 << self.top) + base[0]

  def symbols(self, numbers: np.ndarray, told: np.ndarray) -> np.ndarray:
    """Returns the bins of bit patterns, in NumPy; those below 32 are coded."""
    return self._split(numbers, told, np)[0]

  def _split(self, number: Any, told: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """Divides bit patterns into bins, int32 of any value, and raw bits."""
    width, low, top = self.width, self._low, self.raw_bits - self._sign
    number = raised(number, self.format, told, xp) if self.raised else number
    number = number if self._sign else number ^ number.dtype.type(128)
    magnitude = number & number.dtype.type((1 << width - self._sign) - 1)
    bins = (magnitude >> low).astype(np.int32) - (0 if self.raised else told)
    raw = (magnitude & ((1 << low) - 1)) >> low - top
    return bins, raw | number >> width - 1 << top if self._sign else raw

  def _kept(self, raw: jax.Array) -> jax.Array:
    """Returns words that have raw bits in their places."""
    if not self._sign:
      return raw
    top, ones = self.raw_bits - 1, np.uint32(self._ones)
    tail = raw & ones * np.uint32((1 << top) - 1)
    return (raw >> top & ones) << self.width - 1 | tail << self._low - top

  def join(self, symbols: Any, kept: list[Any], told: Any, xp: Any = jnp) -> list[Any]:
    """Makes the words of units of symbols, uint32, and of what `told` returned, int32.

    `kept` are words that have the signs and the low bits. `xp` is JAX or NumPy.
    """
    offset = 0 if self.raised else told.astype(np.uint32)
    bins = self._packed((symbols >> 5) + offset, (symbols & 31) + offset)
    highest = np.uint32(self._ones << self.width - 1)
    if not self._sign:
      return [((bins[0] << self._low | kept[0]) ^ highest).astype(self.word)]
    words = [x << self._low | y & ~highest for x, y in zip(bins, kept, strict=True)]
    if self.raised:
      lower = lambda x: lowered(x, self.format, told, xp)
      if self.words == 1:
        words = [lower(words[0] & 0xFFFF) | lower(words[0] >> 16) << 16]
      else:
        words = [lower(x) for x in words]
    return [y & highest | x for x, y in zip(words, kept, strict=True)]

  def decode_step(
    self, pop: Pop, classes: jax.Array, pieces: list[jax.Array], coder_tables: Tables
  ) -> tuple[jax.Array, ...]:
    """Decodes a unit of each lane, in a program.

    Classes are int32 `[L]`, and pieces of raw bits uint32 `[L]`. Returns the words of
    the units, `[L, words]`; and whether each is an escape, whose words are those that
    `join` needs.
    """
    table, told = self.told(classes, coder_tables.told)
    symbol, is_listed = _popped(pop, table, coder_tables, self)
    raw = [jnp.zeros_like(symbol)] * self.words
    for (width, place), piece in zip(self.pieces, pieces, strict=True):
      mask = (1 << width) - 1
      fields = self._packed(piece & mask, piece >> width & mask)
      raw = [x | y << place for x, y in zip(raw, fields, strict=True)]
    kept = [self._kept(x) for x in raw]
    pairs = zip(kept, self.join(symbol, kept, told), strict=True)
    words = [jnp.where(is_listed, x, y) for x, y in pairs]
    return jnp.stack(words, -1).astype(self.word), is_listed

  def encode_step(
    self, classes: jax.Array, unit: jax.Array, coder_tables: Tables
  ) -> tuple[list[Interval], list[jax.Array], jax.Array]:
    """Divides a unit of each lane, `[L, words]`, in a program.

    Returns the intervals in the order in which they are popped; the pieces, uint32; and
    the marks, uint16: that of a unit in a list is its symbol and `MARKED`.
    """
    table, told = self.told(classes, coder_tables.told)
    numbers = [*unit.astype(jnp.uint32).T]
    if self.words == 1:
      numbers = [numbers[0] & ((1 << self.width) - 1), numbers[0] >> self.width]
    (first, first_raw), (second, second_raw) = (self._split(x, told) for x in numbers)
    pieces = []
    for bits, place in self.pieces:
      low, high = (x >> place & ((1 << bits) - 1) for x in (first_raw, second_raw))
      pieces.append(low | high << bits)
    bins = (first | second).astype(jnp.uint32)
    symbol = jnp.where(bins < BINS, first << 5 | second, 1023).astype(jnp.uint32)
    interval, mark = _pushed(symbol, table, coder_tables, self)
    return [interval], pieces, mark

  def lists(self, symbols: np.ndarray, units: np.ndarray) -> list[np.ndarray]:
    """Returns the lists of units at escapes: their symbols, and others whole."""
    bits = np.unpackbits(symbols.astype('>u2').view(np.uint8)).reshape(-1, 16)
    return [np.packbits(bits[:, 6:]), units[symbols == 1023]]

  def listed(
    self, data: np.ndarray, units: np.ndarray, classes: np.ndarray, base: np.ndarray
  ) -> np.ndarray:
    """Returns the units at escapes, given their lists and their decoded words."""
    bits = np.zeros((len(units), 16), np.uint8)
    bits[:, 6:] = np.unpackbits(data, count=10 * len(units)).reshape(-1, 10)
    symbols = np.packbits(bits).view('>u2').astype(np.uint32)
    told = self.told(classes, base)[1]
    joined = np.stack(self.join(symbols, [*units.T], told, np), -1)
    is_whole = symbols == 1023
    joined[is_whole] = _whole(data[-(-10 * len(units) // 8) :], units[is_whole])
    return joined

  def tables(
    self, base: np.ndarray, table_of: np.ndarray, counts: np.ndarray
  ) -> Tables:
    """Makes the tables, given counts of bins `[K, 32]`, and the row of each table."""
    slots, intervals = _entries(tables.of_pairs(counts, self.precision), self)
    rows = slots[table_of].reshape(-1), intervals[table_of].reshape(-1)
    return Tables(*rows, base.astype(np.int32))


@dataclasses.dataclass(frozen=True)
class Integers:
  """The layout of bytes, and of signed integers of at most 32 bits."""

  dtype: np.dtype
  raw_bits: int  # the greatest shift

  type_name: ClassVar[str] = 'integers'
  raised: ClassVar[bool] = False
  alphabet: ClassVar[int] = 255  # of a stored table, which does not have the escape
  stored_precision: ClassVar[int] = 12
  precision: ClassVar[int] = 12
  symbol_bits: ClassVar[int] = 8
  size: ClassVar[int] = 1
  words: ClassVar[int] = 1
  most_tables: ClassVar[int] = 256
  pieces: ClassVar[tuple[tuple[int, int], ...]] = ()

  def is_valid(self) -> bool:
    """Returns whether there is such a layout."""
    is_integer = self.dtype.name in ('uint8', 'int8', 'int16', 'int32')
    return is_integer and self.raw_bits in (0, RAW, MOST_RAW)

  @property
  def bases(self) -> int:
    return self.most_tables if self.raw_bits else 1

  @property
  def pushes(self) -> int:
    return 1 + -(-self.raw_bits // RAW)

  @property
  def word(self) -> np.dtype:
    return np.dtype(f'u{self.dtype.itemsize}')

  @property
  def bias(self) -> int:
    """The symbol of 0. Of bytes 225 is the escape, which is rare in masks and codes."""
    return 30 if self.dtype == np.uint8 else 128

  def packed(self, base: np.ndarray, table_of: np.ndarray) -> np.ndarray:
    """Returns what each class tells, given its shift and its table."""
    shifts = base.clip(0, self.raw_bits)
    return (shifts << 8 | table_of).astype(np.int32)

  def told(self, classes: Any, packed: Any) -> tuple[Any, Any]:
    """Returns what int32 classes tell: tables and shifts, which `packed` lists."""
    entry = packed[classes]
    if not isinstance(packed, np.ndarray):
      entry = packed.at[classes].get(mode='promise_in_bounds')
    return entry & 255, entry >> 8

  def symbols(self, numbers: Any, told: Any) -> Any:
    """Returns symbols, uint32; a shift of signed integers copies the sign."""
    symbols = ((numbers.astype(np.int32) >> told) + self.bias).view(np.uint32)
    return symbols & 255 if self.dtype.itemsize == 1 else symbols.clip(max=255)

  def _raw_sizes(self, shift: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Returns the sizes of pieces of raw bits, from the highest, and of the rest."""
    left, sizes = shift.astype(jnp.uint32), []
    for _ in range(1, self.pushes):
      size = jnp.minimum(left, RAW)
      left = left - size
      sizes.append((size, left))
    return sizes

  def decode_step(
    self, pop: Pop, classes: jax.Array, pieces: list[jax.Array], coder_tables: Tables
  ) -> tuple[jax.Array, ...]:
    """Decodes a number of each lane; see `Pairs.decode_step`."""
    del pieces
    table, shift = self.told(classes, coder_tables.told)
    symbol, is_listed = _popped(pop, table, coder_tables, self)
    number = symbol - jnp.uint32(self.bias)
    for size, _ in self._raw_sizes(shift):
      number = number << size | pop(lambda slot: (slot, slot, 1), size)
    return number.astype(self.word)[:, None], is_listed

  def encode_step(
    self, classes: jax.Array, unit: jax.Array, coder_tables: Tables
  ) -> tuple[list[Interval], list[jax.Array], jax.Array]:
    """Divides a number of each lane; see `Pairs.encode_step`."""
    table, shift = self.told(classes, coder_tables.told)
    signed = unit[:, 0].view(f'i{self.dtype.itemsize}').astype(jnp.int32)
    symbol = self.symbols(signed, shift)
    interval, mark = _pushed(symbol, table, coder_tables, self)
    intervals = [interval]
    for size, left in self._raw_sizes(shift):
      intervals.append((rans.slot(signed.view(jnp.uint32) >> left, size), 1, size))
    return intervals, [], mark

  def lists(self, symbols: np.ndarray, units: np.ndarray) -> list[np.ndarray]:
    """Returns the list of units at escapes."""
    return [units]

  def listed(
    self, data: np.ndarray, units: np.ndarray, classes: np.ndarray, base: np.ndarray
  ) -> np.ndarray:
    """Returns the units at escapes, given their list."""
    return _whole(data, units)

  def tables(
    self, base: np.ndarray, table_of: np.ndarray, frequencies: np.ndarray
  ) -> Tables:
    """Makes the tables, given frequencies `[K, 255]`; see `Pairs.tables`."""
    few = len(frequencies) <= _FEW_TABLES
    missing = (_FEW_TABLES if few else self.most_tables) - len(frequencies)
    slots, intervals = (
      np.pad(x, ((0, missing), (0, 0))).reshape(-1) for x in _entries(frequencies, self)
    )
    return Tables(slots, intervals, self.packed(base, table_of))


Layout = Pairs | Integers


# ---- symbols -------------------------------------------------------------------------


def _get(array: Any, table: jax.Array, width: int, index: jax.Array) -> jax.Array:
  """Returns elements of tables of 2^width entries each."""
  place = table.astype(jnp.uint32) << width | index
  return array.at[place].get(mode='promise_in_bounds')


def _popped(
  pop: Pop, table: jax.Array, coder_tables: Tables, layout: Layout
) -> tuple[jax.Array, jax.Array]:
  """Pops symbols, uint32; returns them, and whether each is the escape."""
  field = (32 - layout.symbol_bits) // 2
  mask = (1 << field) - 1

  def lookup(slot: jax.Array) -> tuple[jax.Array, ...]:
    entry = _get(coder_tables.slots, table, layout.precision, slot)
    return entry, slot - (entry >> field & mask), (entry & mask) + 1

  symbol = pop(lookup, layout.precision) >> 2 * field
  return symbol, symbol == (1 << layout.symbol_bits) - 1


def _pushed(
  symbol: jax.Array, table: jax.Array, coder_tables: Tables, layout: Layout
) -> tuple[Interval, jax.Array]:
  """Returns the intervals of symbols, uint32, and the marks of their units."""
  entry = _get(coder_tables.intervals, table, layout.symbol_bits, symbol)
  mark = jnp.where(entry >> 31 > 0, MARKED | symbol, 0).astype(jnp.uint16)
  return (entry >> 12 & 0x3FFF, (entry & 0xFFF) + 1, layout.precision), mark


def _entries(frequencies: np.ndarray, layout: Layout) -> tuple[np.ndarray, ...]:
  """Returns the rows of slots and of intervals, see `Tables`, of all but the escape.

  Raises a ValueError if no slot is left to the escape, or if a symbol has too many.
  """
  field = (32 - layout.symbol_bits) // 2
  left = (1 << layout.precision) - frequencies.sum(axis=1, keepdims=True)
  frequencies = np.concatenate([frequencies, left], axis=1)
  if left.min() < 1 or frequencies.max() > 1 << field:
    raise ValueError(f'a symbol has more than {1 << field} slots, or the escape none')
  starts = np.cumsum(frequencies, axis=1) - frequencies
  intervals = starts << 12 | frequencies - 1
  escape = 1 << 31 | intervals[:, -1:]
  intervals = np.where(frequencies > 0, intervals, escape)
  intervals[:, -1:] = escape
  used, symbols = np.nonzero(frequencies)
  lengths, starts = frequencies[used, symbols], starts[used, symbols]
  entries = (symbols << 2 * field) - (starts << field) + lengths - 1
  slots = np.repeat(entries.astype(np.uint32), lengths).reshape(len(frequencies), -1)
  slots += np.arange(1 << layout.precision, dtype=np.uint32) << np.uint32(field)
  return slots, intervals.astype(np.uint32)


def _whole(data: np.ndarray, units: np.ndarray) -> np.ndarray:
  """Returns the units of a list, uint8, which are as many as the given ones."""
  if data.size != units.nbytes:
    raise ValueError('the lists of a block do not fit its escapes')
  return np.ascontiguousarray(data).view(units.dtype).reshape(units.shape)


# ---- numbers that share a step -------------------------------------------------------


def raised(bits: Any, form: ml_dtypes.finfo, min_exponent: Any, xp: Any = jnp) -> Any:
  """Replaces the magnitudes in bit patterns by those of a minimum exponent.

  Numbers with a lower exponent must be multiples of its step. The minimum exponent 1
  changes nothing. `xp` is the module, JAX or NumPy.
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
  shift = xp.minimum(xp.maximum(least, 1) - 1, width - 1)
  subnormal = magnitude << shift.astype(np.uint32)
  small = xp.where((wide >> 23) + below >= 1, normal, subnormal)
  small = xp.where(magnitude > 0, small, np.uint32(0))
  large = magnitude + ((least - 1) << top).astype(np.uint32)
  return xp.where(magnitude >> top > 0, large, small) & np.uint32((1 << width - 1) - 1)

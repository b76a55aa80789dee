"""Units: the numbers that are coded together, and the tables of their symbols.

All `layouts` share them. One lookup gives the symbol of a slot and its interval, and
one gives the interval of a symbol.

Shape letters: n units, L lanes, K tables.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.system import host

BINS = 32

CLASSES = 256
"""The number of classes that a byte can tell."""

MARKED = 1 << 15
"""The bit of the mark of a unit that is in a list, above its symbol."""

OTHER = 1023
"""The symbol of pairs that have no symbol; one of bytes tells the byte."""

Interval = tuple[jax.Array, jax.Array | int, jax.Array | int]
"""Starts and frequencies of the symbols of the lanes, and the precision."""

Pop = Callable[[Callable[..., Any], Callable[..., tuple[Any, Any]], Any], jax.Array]
"""Pops a symbol from each lane and returns its entry, given functions from slots to
entries, and from both to starts and frequencies; and the precision."""


class Tables(NamedTuple):
  """The frequency tables of a layout, for its programs. A symbol has b bits."""

  # uint32 `[K 2^precision]`, of each slot: its symbol; and in (32 - b) // 2 bits each
  # its distance from the start of the symbol, and the frequency less 1.
  slots: np.ndarray
  # uint32 `[K 2^b]`, of each symbol: whether units are listed, in the highest bit; the
  # start; in 12 bits the frequency less 1. Those of the escape if units are listed.
  intervals: np.ndarray
  told: np.ndarray  # int32, the `base` of the method `context`


class Row(NamedTuple):
  """A unit of each lane, as a program gets it."""

  classes: Any  # int32 `[L]`, of the first number in the lowest byte
  known: Any  # list of words of known units, uint32 `[L]`; or None
  units: Any  # the same of units, to encode
  pieces: list[jax.Array]  # uint32 `[L]`, of the planes, to decode


@dataclasses.dataclass(frozen=True)
class Base:
  """The base of all layouts, whose units are two numbers unless they say otherwise."""

  dtype: np.dtype
  raw_bits: int  # of a number, with the sign of a float; of a difference, the most

  alphabet: ClassVar[int] = BINS  # of a stored table
  stored_precision: ClassVar[int] = tables.PRECISION  # of a stored table
  symbol_bits: ClassVar[int] = 10
  size: ClassVar[int] = 2  # numbers of a unit
  shared: ClassVar[int] = 2  # numbers that share a class
  most_tables: ClassVar[int] = CLASSES  # one of each class
  most_stored: ClassVar[int] = CLASSES  # of these, others equal the ones before them
  most_share: ClassVar[float] = 0.5  # of a bin, so that no pair is too frequent
  precision: ClassVar[int] = 12
  pushes: ClassVar[int] = 1  # of a unit
  pieces: ClassVar[tuple[tuple[int, int], ...]] = ()  # of raw bits in planes
  raised: ClassVar[bool] = False
  is_product: ClassVar[bool] = True  # whether tables are products of stored ones
  least_share: ClassVar[float] = 0.5  # of a slot, with which a symbol has one
  seen: ClassVar[int] = 256  # bins of which `alphabet` are chosen
  # Whether the first symbol may have more slots than a field of `Tables.slots` tells.
  is_first_long: ClassVar[bool] = False

  @property
  def escape(self) -> int:
    """The last symbol."""
    return (1 << self.symbol_bits) - 1

  @property
  def class_type(self) -> np.dtype:
    """The dtype of the classes of a unit: one has all its bytes."""
    return np.dtype(f'u{self.size // self.shared}')

  @property
  def width(self) -> int:
    """The bits of a number."""
    return 8 * self.dtype.itemsize

  @property
  def words(self) -> int:
    """The words of a unit: one has two numbers, or one of 32 bits."""
    return max(self.width // 16, 1)

  @property
  def word(self) -> np.dtype:
    """The dtype of these words."""
    return np.dtype(np.uint16 if self.width == 8 else np.uint32)

  def _packed(self, first: Any, second: Any) -> list[Any]:
    """Returns the words of a unit, given a field of each of its numbers."""
    return [first | second << self.width] if self.words == 1 else [first, second]

  def _numbers(self, words: list[Any]) -> list[Any]:
    """Returns the two numbers of units, given their words, uint32."""
    if self.words > 1:
      return words
    return [words[0] & ((1 << self.width) - 1), words[0] >> self.width]

  def frequencies(self, counts: np.ndarray) -> np.ndarray:
    """Returns those of symbols before the escape, given stored tables."""
    return tables.of_pairs(counts, counts, self.precision)

  def tables(
    self, base: Any, table_of: np.ndarray, counts: np.ndarray, scales: Any = ()
  ) -> Tables:
    """Makes tables of K stored ones, given which each is; of bytes, those of scales."""
    rows = entries(self.frequencies(counts), self)
    ends = [sum(int(f(y)) for y in x) for x in scales for f in (np.min, np.max)]
    fits = max(ends, default=CLASSES) < len(table_of) == CLASSES
    used = slice(min(ends), max(ends) + 1) if fits else slice(None)
    # Aligned, so that JAX uses them where they are.
    slots, intervals = (host.empty((len(table_of), x.shape[1]), x.dtype) for x in rows)
    for stored, array in zip(rows, (slots, intervals), strict=True):
      np.take(stored, table_of[used], 0, array[used], 'clip')
    return Tables(slots.reshape(-1), intervals.reshape(-1), base.astype(np.int32))

  def lists(self, symbols: np.ndarray, units: np.ndarray) -> list[np.ndarray]:
    """Returns the lists of units at escapes: their symbols, and others whole."""
    bits = np.unpackbits(symbols.astype('>u2').view(np.uint8)).reshape(-1, 16)
    return [np.packbits(bits[:, -self.symbol_bits :]), units[symbols == OTHER]]

  def listed(
    self: Any, data: np.ndarray, units: np.ndarray, row: Row, told: np.ndarray
  ) -> np.ndarray:
    """Returns the units at escapes, given their lists and their decoded words."""
    bits, width = np.zeros((len(units), 16), np.uint8), self.symbol_bits
    flat = np.unpackbits(data, count=width * len(units))
    bits[:, -width:] = flat.reshape(-1, width)
    symbols = np.packbits(bits).view('>u2').astype(np.uint32)
    _, context = self.context(row, told, np)
    words = self.join(symbols, [*units.astype(np.uint32).T], context, np)
    joined = np.stack(words, -1).astype(self.word)
    whole, is_whole = data[-(-flat.size // 8) :], symbols == OTHER
    if whole.size != joined[is_whole].nbytes:
      raise ValueError('the lists of a block do not fit its escapes')
    joined[is_whole] = whole.copy().view(self.word).reshape(-1, self.words)
    return joined

  def decode_step(
    self: Any, pop: Pop, row: Row, coder_tables: Tables
  ) -> tuple[jax.Array, jax.Array]:
    """Decodes a unit of each lane, in a program.

    Returns the words of the units, `[L, words]`; and whether each is an escape, whose
    words are those that `join` needs.
    """
    table, context = self.context(row, coder_tables.told)
    symbol = self.popped(pop, table, context, coder_tables)
    is_listed, raw = symbol == self.escape, self.raw(pop, row, context)
    pairs = zip(raw, self.join(symbol, raw, context), strict=True)
    words = [jnp.where(is_listed, x, y) for x, y in pairs]
    return jnp.stack(words, -1).astype(self.word), is_listed

  def popped(
    self: Any, pop: Pop, table: jax.Array, context: Any, coder_tables: Tables
  ) -> jax.Array:
    """Pops a symbol of a table from each lane, given the result of `context`."""
    field = (32 - self.symbol_bits) // 2
    mask = (1 << field) - 1

    def find(slot: jax.Array) -> jax.Array:
      if self.is_first_long:  # its slots are alike, and the cache holds one of them
        slot = jnp.where(slot.view(jnp.int32) < context[2], jnp.uint32(0), slot)
      return _get(coder_tables.slots, table, self.precision, slot)

    def split(entry: jax.Array, slot: jax.Array) -> tuple[Any, Any]:
      distance, less = entry >> field & mask, entry & mask
      if self.is_first_long:
        is_first = entry < 1 << 2 * field
        distance = jnp.where(is_first, slot, distance)
        less = jnp.where(is_first, entry, less)
      return slot - distance, less + 1

    return pop(find, split, self.precision) >> 2 * field

  def encode_step(
    self: Any, row: Row, coder_tables: Tables
  ) -> tuple[list[Interval], list[jax.Array], jax.Array]:
    """Divides a unit of each lane, in a program.

    Returns the intervals in the order in which they are popped; the pieces, uint32; and
    the marks, uint16: that of a unit in a list is its symbol and `MARKED`.
    """
    table, context = self.context(row, coder_tables.told)
    symbol, raw, pieces = self.divided(self._numbers(row.units), context)
    (symbol,) = once(coder_tables.told, symbol)
    interval, is_escape = self.interval(symbol, table, coder_tables)
    mark = jnp.where(is_escape, MARKED | symbol, 0).astype(jnp.uint16)
    return [interval, *raw], pieces, mark

  def interval(
    self: Any, symbol: jax.Array, table: jax.Array, coder_tables: Tables
  ) -> tuple[Interval, jax.Array]:
    """Returns the interval of a symbol of each lane, and whether it is the escape's."""
    entry = _get(coder_tables.intervals, table, self.symbol_bits, symbol)
    interval = entry >> 12 & 0x3FFF, (entry & 0xFFF) + 1, self.precision
    return interval, entry >> 31 > 0


# ---- symbols -------------------------------------------------------------------------


def of_pair(first: jax.Array, second: jax.Array) -> jax.Array:
  """Returns the symbols of pairs of bins, uint32."""
  return jnp.where((first | second) < BINS, first << 5 | second, jnp.uint32(OTHER))


def once(told: Any, *values: Any) -> tuple[Any, ...]:
  """Returns values that XLA must not compute again for each use, in each lane.

  A branch that is never taken prevents it, because no `Tables.told` are that small; a
  barrier does with JAX 0.12 only.
  """
  zeros = lambda *x: tuple(map(jnp.zeros_like, x))
  return jax.lax.cond(told[0] < -(1 << 20), zeros, lambda *x: x, *values)


def _get(array: Any, table: jax.Array, width: int, index: jax.Array) -> jax.Array:
  """Returns elements of tables of 2^width entries each."""
  place = table.astype(jnp.uint32) << width | index
  return array.at[place].get(mode='promise_in_bounds')


def entries(frequencies: np.ndarray, layout: Any) -> tuple[np.ndarray, ...]:
  """Returns the rows of slots and of intervals, see `Tables`, of all but the escape.

  Raises a ValueError if no slot is left to the escape, or if a symbol has too many.
  """
  field = (32 - layout.symbol_bits) // 2
  left = (1 << layout.precision) - frequencies.sum(axis=1, keepdims=True)
  frequencies = np.concatenate([frequencies, left], axis=1)
  most = frequencies[:, layout.is_first_long :].max()
  if min(left.min(), frequencies.min() + 1) < 1 or most > 1 << field:
    raise ValueError(f'a symbol has more than {1 << field} slots, or the escape none')
  used = np.flatnonzero(frequencies > 0)  # faster, of truth values
  symbols, lengths = used & layout.escape, frequencies.reshape(-1)[used]
  starts = np.cumsum(lengths) - lengths & (1 << layout.precision) - 1
  coded = (starts << 12 | lengths - 1).astype(np.uint32)
  coded[symbols == layout.escape] |= np.uint32(1 << 31)
  intervals = np.repeat(coded[symbols == layout.escape], frequencies.shape[1])
  intervals[used] = coded
  entries = (symbols << 2 * field) - (starts << field) + lengths - 1
  slots = np.repeat(entries.astype(np.uint32), lengths).reshape(len(frequencies), -1)
  place = np.arange(1 << layout.precision, dtype=np.uint32)
  slots += place << np.uint32(field)
  if layout.is_first_long:
    first = frequencies[:, :1].astype(np.uint32)
    np.copyto(slots, first - 1, where=place < first)
  return slots, intervals.reshape(frequencies.shape)

r"""Codecs: pairs of functions that push a symbol onto a message and pop it again.

For every codec and every message m, `pop(push(m, x)) == (m, x)` and
`push(*pop(m)) == m`. Because of the second identity a codec can also *sample*: it pops
a symbol from a message that holds other data. Bits-back coding needs this.

    >>> import jax.numpy as jnp
    >>> codec = uniform(jnp.full(8, 3, jnp.uint32))
    >>> message = codec.push(rans.empty(lanes=4), jnp.arange(8))
    >>> round(rans.content_bits(message))  # 8 integers of 3 bits
    24
    >>> message, symbols = codec.pop(message)
    >>> symbols.tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]

A symbol is an array, or a PyTree of arrays, of any shape. Its entries are dealt out to
the lanes of the message in row-major order. So the definition of a codec does not
depend on the number of lanes, and all lanes get equally many entries, up to one.

Reference: J. Townsend, T. Bird, D. Barber, Practical lossless compression with latent
variables using bits back coding, ICLR 2019, algorithm 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from rotbits_jax.coding import rans
from rotbits_jax.coding import tables

_MOST_BITS = 16


class Codec(NamedTuple):
  """A pair of pure functions that are exact inverses and can be jitted."""

  # Takes a message and a symbol; returns the message with the symbol on top.
  push: Callable[[rans.Message, Any], rans.Message]
  # Takes a message; returns the message without its top symbol, and that symbol.
  pop: Callable[[rans.Message], tuple[rans.Message, Any]]


def serial(
  *entries: Codec,
  split: Callable[[Any], tuple[Any, ...]] = tuple,
  join: Callable[[tuple[Any, ...]], Any] = tuple,
) -> Codec:
  """Returns the codec of a tuple, given the codecs of its entries.

  The last entry is pushed last, so it is on top of the message. Other symbols are split
  into such tuples, and joined again.
  """

  def push(message: rans.Message, symbol: Any) -> rans.Message:
    for codec, entry in zip(entries, split(symbol), strict=True):
      message = codec.push(message, entry)
    return message

  def pop(message: rans.Message) -> tuple[rans.Message, Any]:
    popped: tuple[Any, ...] = ()
    for codec in reversed(entries):
      message, entry = codec.pop(message)
      popped = entry, *popped
    return message, join(popped)

  return Codec(push, pop)


def uniform(bits: jax.Array, dtype: DTypeLike = jnp.uint32) -> Codec:
  """Returns the codec of uniform integers of so many bits each, uint32 from 0 to 16."""

  def interval(symbol: jax.Array, bits: jax.Array) -> rans.Pair:
    below = _MOST_BITS - bits
    return symbol << below, jnp.uint32(1) << below

  owner = lambda slot, bits: slot >> (_MOST_BITS - bits)
  return _dealt(bits, 0, interval, owner, _MOST_BITS, dtype)


def categorical(
  contexts: jax.Array, frequencies: np.ndarray, dtype: DTypeLike = jnp.uint32
) -> Codec:
  """Returns the codec of symbols from a small alphabet, each under one of K tables.

  `contexts` has the index of each symbol's table; a symbol of the index K is always 0,
  and costs no bits. Each row of the frequencies `[K, A]` adds up to `tables.TOTAL`.
  Pushing a symbol whose frequency is 0 corrupts the message. `pop` searches the tables
  by bisection, so it needs no list of slots for each table.
  """
  count, alphabet = frequencies.shape
  depth = (alphabet - 1).bit_length()
  width = 1 + (1 << depth)
  # On the host, because XLA is slow to fold constants. The table K has the symbol 0.
  rows = np.append(frequencies, tables.TOTAL * np.eye(1, alphabet, dtype=int), axis=0)
  ends = np.pad(np.cumsum(rows, axis=1, dtype=np.uint32), ((0, 0), (1, 0)))
  ends = np.pad(ends, ((0, 0), (0, width - alphabet - 1)), mode='edge')
  starts = jnp.asarray(ends.reshape(-1))
  take = lambda index: starts.at[index].get(mode='promise_in_bounds')

  def interval(symbol: jax.Array, context: jax.Array) -> rans.Pair:
    index = context * width + symbol
    start = take(index)
    return start, take(index + 1) - start

  def owner(slot: jax.Array, context: jax.Array) -> jax.Array:
    index = context * width
    for bit in reversed(range(depth)):
      middle = index + jnp.uint32(1 << bit)
      index = jnp.where(take(middle) <= slot, middle, index)
    return index - context * width

  return _dealt(contexts, count, interval, owner, tables.PRECISION, dtype)


def _dealt(
  contexts: jax.Array,
  void: int,
  interval: Callable[[jax.Array, jax.Array], rans.Pair],
  owner: Callable[[jax.Array, jax.Array], jax.Array],
  precision: int,
  dtype: DTypeLike,
) -> Codec:
  """Returns the codec of symbols that are dealt out to lanes; see `rans.pop_all`."""
  # Places without a symbol have the context `void`, in which 0 owns all slots.

  def deal(values: jax.Array, lanes: int, fill: int) -> jax.Array:
    flat = jnp.asarray(values).astype(jnp.uint32).reshape(-1)
    flat = jnp.pad(flat, (0, -flat.size % lanes), constant_values=fill)
    return flat.reshape(-1, lanes)

  def push(message: rans.Message, symbols: jax.Array) -> rans.Message:
    symbol = deal(symbols, message.lanes, 0)
    context = deal(contexts, message.lanes, void)
    return rans.push_all(message, *interval(symbol, context), precision)

  def pop(message: rans.Message) -> tuple[rans.Message, jax.Array]:
    context = deal(contexts, message.lanes, void)
    message, symbols = rans.pop_all(message, context, owner, interval, precision)
    symbols = symbols.reshape(-1)[: contexts.size].astype(dtype)
    return message, symbols.reshape(contexts.shape)

  return Codec(push, pop)

r"""Codecs: pairs of functions that push symbols onto a message and pop them again.

For every codec and every message m, `pop(push(m, x)) == (m, x)` and
`push(*pop(m)) == m`. Because of the second identity a codec can also *sample*: it pops
symbols from a message that holds other data. Bits-back coding needs this.

    >>> import jax.numpy as jnp
    >>> codec = uniform(jnp.full(8, 3, jnp.uint32))
    >>> message = rans.stacked(jnp.zeros((1, 4), jnp.uint16))  # 4 lanes
    >>> message = codec.push(message, jnp.arange(8, dtype=jnp.uint16))
    >>> round(rans.content_bits(message))  # 8 integers of 3 bits
    24
    >>> message, symbols = codec.pop(message)
    >>> symbols.tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]

The symbols of a codec are dealt out to the lanes of the message in turn. So its
definition does not depend on the number of lanes, and all lanes get equally many
symbols, up to one.

Shape letters: S symbols, N lanes, T symbols of a lane.

Reference: J. Townsend, T. Bird, D. Barber, Practical lossless compression with latent
variables using bits back coding, ICLR 2019, algorithm 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.system import native

_MOST_BITS = 16

_Pair = tuple[jax.Array, jax.Array]


class Codec(NamedTuple):
  """A pair of pure functions that are exact inverses and can be jitted."""

  # Takes a message and symbols, uint16 [S]; returns the message with these on top.
  push: Callable[[rans.Message, jax.Array], rans.Message]
  # Takes a message; returns the message without its top symbols, and these.
  pop: Callable[[rans.Message], tuple[rans.Message, jax.Array]]


def uniform(bits: jax.Array) -> Codec:
  """Returns the codec of uniform integers of so many bits each, uint32 from 0 to 16."""

  def interval(symbol: jax.Array, bits: jax.Array) -> _Pair:
    below = _MOST_BITS - bits
    return symbol << below, jnp.uint32(1) << below

  owner = lambda slot, bits: slot >> (_MOST_BITS - bits)
  return _dealt(bits, 0, interval, owner, _MOST_BITS)


def categorical(contexts: jax.Array, frequencies: np.ndarray) -> Codec:
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

  def interval(symbol: jax.Array, context: jax.Array) -> _Pair:
    index = context * width + symbol
    start = take(index)
    return start, take(index + 1) - start

  def owner(slot: jax.Array, context: jax.Array) -> jax.Array:
    index = context * width
    for bit in reversed(range(depth)):
      middle = index + jnp.uint32(1 << bit)
      index = jnp.where(take(middle) <= slot, middle, index)
    return index - context * width

  return _dealt(contexts, count, interval, owner, tables.PRECISION)


def _dealt(
  contexts: jax.Array,
  void: int,
  interval: Callable[[jax.Array, jax.Array], _Pair],
  owner: Callable[[jax.Array, jax.Array], jax.Array],
  precision: int,
) -> Codec:
  """Returns the codec of symbols that are dealt out to lanes.

  `interval` takes symbols and their contexts, and returns starts and frequencies.
  `owner` takes slots and contexts, and returns the symbols that own the slots. The last
  lanes may have no symbol: they have the context `void`, in which 0 owns all slots.
  """
  if not contexts.size:  # XLA would abort
    raise ValueError('expected at least one symbol')

  def deal(values: jax.Array, lanes: int, fill: int) -> jax.Array:
    flat = jnp.asarray(values).astype(jnp.uint32)
    flat = jnp.pad(flat, (0, -flat.size % lanes), constant_values=fill)
    return flat.reshape(-1, lanes)

  def push(message: rans.Message, symbols: jax.Array) -> rans.Message:
    def loop(state: jax.Array, intervals: _Pair) -> Any:
      def step(state: jax.Array, interval: _Pair) -> tuple[jax.Array, _Pair]:
        state, word, moved = rans.push_step(state, *interval, precision)
        return state, (word, moved)

      # The first symbol comes last, on top of the message.
      return jax.lax.scan(step, state, intervals, reverse=True)

    context = deal(contexts, message.lanes, void)
    intervals = interval(deal(symbols, message.lanes, 0), context)
    state, words = native.loop(loop)(message.state, intervals)
    words, moved = (x[::-1] for x in words)  # in the order of pushes
    stacks = jnp.pad(message.words, ((0, 0), (0, len(words))))
    sizes = message.size + jnp.cumsum(moved, axis=0, dtype=jnp.int32)
    # A word that does not move is put beyond the stack, and dropped.
    place = jnp.where(moved, sizes - 1, stacks.shape[1])
    lane = jnp.arange(message.lanes, dtype=jnp.int32)
    stacks = stacks.at[lane, place].set(words, mode='drop')
    return rans.Message(state, stacks, sizes[-1])

  def pop(message: rans.Message) -> tuple[rans.Message, jax.Array]:
    room = message.words.shape[1]

    def loop(carry: _Pair, words: jax.Array, contexts: jax.Array) -> Any:
      first = jnp.arange(message.lanes, dtype=jnp.int32) * room

      def step(carry: _Pair, context: jax.Array) -> tuple[_Pair, jax.Array]:
        state, size = carry
        symbol = owner(rans.slot(state, precision), context)
        top = first + jnp.clip(size, 1, room) - 1  # any word if the stack is empty
        word = words.at[top].get(mode='promise_in_bounds')
        state, taken = rans.pop_step(state, word, *interval(symbol, context), precision)
        return (state, size - taken.astype(jnp.int32)), symbol

      return jax.lax.scan(step, carry, contexts)

    carry, context = (message.state, message.size), deal(contexts, message.lanes, void)
    flat = message.words.reshape(-1)
    (state, size), symbols = native.loop(loop)(carry, flat, context)
    size = jnp.where(size < 0, rans.DRY, size)
    symbols = symbols.reshape(-1)[: contexts.size].astype(jnp.uint16)
    return rans.Message(state, message.words, size), symbols

  return Codec(push, pop)

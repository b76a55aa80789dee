r"""Codecs: pairs of functions that push a symbol onto a message and pop it again.

For every codec and every message, `pop(push(m, x)) == (m, x)` and
`push(*pop(m)) == m`. The second is what lets a codec *sample* from a message that
holds other data, which is what bits-back coding does.

A symbol is an array (or a PyTree of arrays) of any shape. Its entries are dealt out to
the message's lanes in row-major order, so a codec does not depend on the number of
lanes, and all lanes are used alike.

Reference: J. Townsend, T. Bird, D. Barber, Practical lossless compression with latent
variables using bits back coding, ICLR 2019.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import rans
from rotbits_jax.coding import tables

# So that symbols of 16 bits are exactly uniform.
_SLOT_BITS = 16


class Codec(NamedTuple):
  """Exact inverses of each other, pure and jittable."""

  push: Callable[[rans.Message, Any], rans.Message]
  pop: Callable[[rans.Message], tuple[rans.Message, Any]]


def certain(value: Any) -> Codec:
  """The codec of a symbol that is known: it costs nothing."""
  return Codec(push=lambda message, _: message, pop=lambda message: (message, value))


def deferred(make: Callable[[], Codec]) -> Codec:
  """The codec that `make` returns, made in each use.

  So what it is made from is computed where it is used, under `jit` for instance, and is
  not a large constant of the compiled program.
  """
  return Codec(
    push=lambda message, symbol: make().push(message, symbol),
    pop=lambda message: make().pop(message),
  )


def serial(*parts: Codec) -> Codec:
  """The codec of a tuple, its last entry on top of the message."""

  def push(message: rans.Message, symbols: tuple[Any, ...]) -> rans.Message:
    for part, symbol in zip(parts, symbols, strict=True):
      message = part.push(message, symbol)
    return message

  def pop(message: rans.Message) -> tuple[rans.Message, tuple[Any, ...]]:
    symbols: list[Any] = []
    for part in reversed(parts):
      message, symbol = part.pop(message)
      symbols.insert(0, symbol)
    return message, tuple(symbols)

  return Codec(push, pop)


def uniform(sizes: jax.Array) -> Codec:
  """The codec of integers, each uniform on `[0, size)`.

  The integer u owns the slots from floor(2^16 u / size) on: exactly uniform for powers
  of two, and within 2^-16 of it otherwise.

  Args:
    sizes: unsigned integers, from 1 to 2^16. A size of 1 costs nothing.

  Returns:
    A codec of uint32 arrays of the same shape.
  """
  sizes = jnp.asarray(sizes).astype(jnp.uint32)

  def start_of(symbol: jax.Array, size: jax.Array) -> jax.Array:
    # The end of the last integer's slots, 2^16, may not be reached by way of 2^32.
    start = (symbol << _SLOT_BITS) // size
    return jnp.where(symbol == size, jnp.uint32(1 << _SLOT_BITS), start)

  def push(message: rans.Message, symbols: jax.Array) -> rans.Message:
    size = _deal(sizes, message.lanes, 1)
    symbol = _deal(symbols.astype(jnp.uint32), message.lanes, 0)
    start = start_of(symbol, size)
    intervals = start, start_of(symbol + 1, size) - start
    return rans.push_all(message, intervals, lambda x: x, _SLOT_BITS)

  def lookup(
    slot: jax.Array, size: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    # The greatest u with floor(2^16 u / size) <= slot; 2^32 - 1 is right where
    # (slot + 1) * size wraps to 0.
    symbol = ((slot + 1) * size - 1) >> _SLOT_BITS
    start = start_of(symbol, size)
    return symbol, start, start_of(symbol + 1, size) - start

  def pop(message: rans.Message) -> tuple[rans.Message, jax.Array]:
    size = _deal(sizes, message.lanes, 1)
    message, symbols = rans.pop_all(message, size, lookup, _SLOT_BITS)
    return message, _collect(symbols, sizes.shape)

  return Codec(push, pop)


def categorical(contexts: jax.Array, frequencies: jax.Array | np.ndarray) -> Codec:
  """The codec of symbols from small alphabets, each under one of many tables.

  The tables are searched by bisection, in place of one list of slots for each (see
  `rotbits_jax.coding.categorical`, for few tables and many symbols).

  Args:
    contexts: unsigned integers: the table of each symbol.
    frequencies: unsigned integers `[K, A]`, each row adding up to
      `tables.TOTAL`. A symbol whose
      frequency is 0 corrupts the message.

  Returns:
    A codec of uint32 arrays of the same shape as `contexts`.
  """
  contexts = jnp.asarray(contexts).astype(jnp.uint32)
  count, alphabet = frequencies.shape
  depth = (alphabet - 1).bit_length()
  width = 1 << depth
  # The last table is for places that hold no symbol: one symbol owns all the slots.
  # Constant tables stay on the host: XLA is slow to fold them.
  xp = np if isinstance(frequencies, np.ndarray) else jnp
  void = tables.TOTAL * xp.eye(1, alphabet, dtype=xp.uint32)
  rows = xp.concatenate([frequencies.astype(xp.uint32), void])
  starts = xp.cumsum(rows, axis=1, dtype=xp.uint32) - rows
  padding = (0, 0), (0, width - alphabet)
  starts = jnp.asarray(
    xp.pad(starts, padding, constant_values=tables.TOTAL).reshape(-1)
  )
  rows = jnp.asarray(xp.pad(rows, padding).reshape(-1))

  def take(values: jax.Array, index: jax.Array) -> jax.Array:
    return values.at[index].get(mode='promise_in_bounds')

  def push(message: rans.Message, symbols: jax.Array) -> rans.Message:
    context = _deal(contexts, message.lanes, count)
    symbol = _deal(symbols.astype(jnp.uint32), message.lanes, 0)
    index = context * width + symbol
    intervals = take(starts, index), take(rows, index)
    return rans.push_all(message, intervals, lambda x: x, tables.PRECISION)

  def lookup(
    slot: jax.Array, context: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    index = context * width
    for bit in reversed(range(depth)):
      middle = index + jnp.uint32(1 << bit)
      index = jnp.where(take(starts, middle) <= slot, middle, index)
    return index - context * width, take(starts, index), take(rows, index)

  def pop(message: rans.Message) -> tuple[rans.Message, jax.Array]:
    context = _deal(contexts, message.lanes, count)
    message, symbols = rans.pop_all(message, context, lookup, tables.PRECISION)
    return message, _collect(symbols, contexts.shape)

  return Codec(push, pop)


def _deal(x: jax.Array, lanes: int, fill: int) -> jax.Array:
  """Deals an array's entries out to the lanes: `[T, N]`, padded with `fill`."""
  x = x.reshape(-1)
  return jnp.pad(x, (0, -x.size % lanes), constant_values=fill).reshape(-1, lanes)


def _collect(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The inverse of `_deal`."""
  size = 1
  for n in shape:
    size *= n
  return x.reshape(-1)[:size].reshape(shape)

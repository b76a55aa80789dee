"""Symbols from small alphabets, each under one of several frequency tables.

Shape letters: T symbols a lane, N lanes, K tables, A symbols of the alphabet.
"""

import jax
import jax.numpy as jnp

from rotbits_jax.coding import rans
from rotbits_jax.coding import tables


def push(
  message: rans.Message, symbols: jax.Array, contexts: jax.Array, intervals: jax.Array
) -> rans.Message:
  """Pushes T symbols a lane, so that `pop` returns them in order.

  Args:
    message: the message, N lanes.
    symbols: unsigned integers `[T, N]`, below A.
    contexts: unsigned integers `[T, N]`: the table of each symbol, or K for a place
      that holds no symbol and leaves its lane as it is.
    intervals: uint32 `[K, A]`, from `tables.pack_intervals`. A symbol whose
      frequency is 0 corrupts the message.

  Returns:
    The message with the symbols on top.
  """
  entries = _with_void(intervals).reshape(-1)
  alphabet = intervals.shape[1]

  def interval(x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    symbol, context = (y.astype(jnp.uint32) for y in x)
    index = context * alphabet + symbol
    return _unpack(entries.at[index].get(mode='promise_in_bounds'))

  return rans.push_all(message, (symbols, contexts), interval, tables.PRECISION)


def pop(
  message: rans.Message, contexts: jax.Array, intervals: jax.Array, slots: jax.Array
) -> tuple[rans.Message, jax.Array]:
  """Pops T symbols a lane: the inverse of `push`.

  Args:
    message: the message, N lanes.
    contexts: as in `push`.
    intervals: as in `push`.
    slots: uint8 or uint16 `[K, 2^14]`, from `tables.slots`.

  Returns:
    The message and the symbols, `[T, N]`, of the slots' dtype; anything where a place
    holds none.
  """
  entries = _with_void(intervals).reshape(-1)
  owners = jnp.concatenate([slots, jnp.zeros_like(slots[:1])]).reshape(-1)
  alphabet = intervals.shape[1]

  def lookup(
    slot: jax.Array, context: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    context = context.astype(jnp.uint32)
    symbol = owners.at[context << tables.PRECISION | slot].get(mode='promise_in_bounds')
    index = context * alphabet + symbol.astype(jnp.uint32)
    return symbol, *_unpack(entries.at[index].get(mode='promise_in_bounds'))

  return rans.pop_all(message, contexts, lookup, tables.PRECISION)


def _with_void(intervals: jax.Array) -> jax.Array:
  """Adds the table whose every symbol has the whole interval and costs nothing."""
  void = jnp.full_like(intervals[:1], (tables.TOTAL - 1) << 16)
  return jnp.concatenate([intervals, void])


def _unpack(entry: jax.Array) -> tuple[jax.Array, jax.Array]:
  return entry & 0xFFFF, (entry >> 16) + 1

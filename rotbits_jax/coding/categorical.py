"""Fast coding of symbols from a small alphabet, each under one of a few tables.

A table is a frequency table of `tables`. The context of a symbol is the index of its
table. `codecs.categorical` is the counterpart for many tables and few symbols.

Shape letters: T symbols per lane, N lanes, K tables, A symbols in the alphabet.
"""

import jax
import jax.numpy as jnp

from rotbits_jax.coding import rans
from rotbits_jax.coding import tables


def push(
  message: rans.Message, symbols: jax.Array, contexts: jax.Array, intervals: jax.Array
) -> rans.Message:
  """Pushes T symbols onto each lane, so that `pop` returns them in order.

  Args:
    message: the message, with N lanes.
    symbols: unsigned integers `[T, N]`, below A.
    contexts: unsigned integers `[T, N]`, the table of each symbol. A context of K
      marks a place without a symbol; such a place does not change its lane.
    intervals: uint32 `[K, A]`, from `tables.pack_intervals`. Pushing a symbol whose
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
  """Pops T symbols from each lane: the inverse of `push`.

  Args:
    message: the message, with N lanes.
    contexts: as in `push`.
    intervals: as in `push`.
    slots: uint8 or uint16 `[K, 2^14]`, from `tables.slots`.

  Returns:
    The message without the symbols; and the symbols, `[T, N]`, in the dtype of `slots`.
    The value at a place without a symbol is arbitrary.
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
  """Appends a table in which every symbol owns the whole interval and costs no bits."""
  void = jnp.full_like(intervals[:1], (tables.TOTAL - 1) << 16)
  return jnp.concatenate([intervals, void])


def _unpack(entry: jax.Array) -> tuple[jax.Array, jax.Array]:
  return entry & 0xFFFF, (entry >> 16) + 1

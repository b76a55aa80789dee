r"""Codecs: pairs of functions that push symbols onto a message and pop them again.

For every codec and every message m with enough words and room,
`pop(push(m, x)) == (m, x)` and `push(*pop(m)) == m`. Because of the second identity a
codec can also *sample*: it pops symbols from a message that holds other data. Bits-back
coding needs this, see `bits_back`.

    >>> import jax.numpy as jnp
    >>> codec = uniform(jnp.full(8, 3, jnp.uint32))
    >>> message = rans.stacked(jnp.zeros((1, 4), jnp.uint16), room=1)  # 4 lanes
    >>> message = codec.push(message, jnp.arange(8, dtype=jnp.uint16))
    >>> round(rans.content_bits(message))  # 8 integers of 3 bits
    24
    >>> message, symbols = codec.pop(message)
    >>> symbols.tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]

`uniform` and `categorical` code arrays of symbols, which are dealt out to the lanes of
the message in turn. So their definition does not depend on the number of lanes, and all
lanes get equally many symbols, up to one. `serial` and `bits_back` make codecs of
codecs. All keep the shapes of a message, so `jax.lax.scan` can carry it over many
pushes or pops. Its lanes may be divided over the devices of a mesh.

Shape letters: S symbols, N lanes, T symbols of a lane, K tables, A symbols in the
alphabet.

Reference: J. Townsend, T. Bird, D. Barber, Practical lossless compression with latent
variables using bits back coding, ICLR 2019, algorithm 1.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.system import native

_MOST_BITS = 16

_Pair = tuple[jax.Array, jax.Array]
_Interval = Callable[[jax.Array, jax.Array], _Pair]
"""Takes symbols and contexts; returns the starts and lengths of their intervals."""
_Owner = Callable[[jax.Array, jax.Array], jax.Array]
"""Takes slots and contexts; returns the symbols that own the slots."""


class Codec(NamedTuple):
  """A pair of pure functions that are exact inverses and can be jitted."""

  # Takes a message and a symbol, such as uint16 [S]; returns the message with both.
  push: Callable[[rans.Message, Any], rans.Message]
  # Takes a message; returns the message without its top symbol, and this.
  pop: Callable[[rans.Message], tuple[rans.Message, Any]]


# ---- codecs of codecs --------------------------------------------------------------


def serial(*codecs: Codec) -> Codec:
  """Returns the codec of a tuple (x_1, ..., x_n) of independent symbols.

      p(x_1, ..., x_n) = p_1(x_1) ... p_n(x_n)

  The last symbol is on top of the message.
  """

  def push(message: rans.Message, symbols: tuple[Any, ...]) -> rans.Message:
    for codec, symbol in zip(codecs, symbols, strict=True):
      message = codec.push(message, symbol)
    return message

  def pop(message: rans.Message) -> tuple[rans.Message, tuple[Any, ...]]:
    symbols = []
    for codec in reversed(codecs):
      message, symbol = codec.pop(message)
      symbols.append(symbol)
    return message, tuple(reversed(symbols))

  return Codec(push, pop)


def bits_back(
  prior: Codec,
  likelihood: Callable[[Any], Codec],
  posterior: Callable[[Any], Codec],
) -> Codec:
  """Returns the codec of symbols x that have a latent variable z.

  To push x, z is popped from the message, as a sample of q(z | x); then x and z are
  pushed. The decoder pops them, and pushes back the bits from which z was sampled. So
  x costs on average

      E_q[-log p(x | z) - log p(z) + log q(z | x)] = -log p(x) + KL(q || p(z | x)),

  the negative evidence lower bound, and exactly -log p(x) with the exact posterior.

  Args:
    prior: the codec of z, p(z).
    likelihood: takes z and returns the codec of x, p(x | z).
    posterior: takes x and returns the codec of z, q(z | x). It may be inexact, but not
      differ by a bit between encoder and decoder.

  Returns:
    The codec of x. A message must hold the bits of a sample before a push.
  """

  def push(message: rans.Message, x: Any) -> rans.Message:
    message, z = posterior(x).pop(message)
    message = likelihood(z).push(message, x)
    return prior.push(message, z)

  def pop(message: rans.Message) -> tuple[rans.Message, Any]:
    message, z = prior.pop(message)
    message, x = likelihood(z).pop(message)
    return posterior(x).push(message, z), x

  return Codec(push, pop)


# ---- codecs of arrays --------------------------------------------------------------


def uniform(bits: jax.Array) -> Codec:
  """Returns the codec of uniform integers, uint16 `[S]`, with p(x) = 2^-bits.

  Args:
    bits: integers `[S]` from 0 to 16, the size of each symbol.

  Raises:
    ValueError: if the bits have another shape, dtype or, unless they are traced, value.
  """
  _check_indices(bits, 'bits', _MOST_BITS)

  def interval(symbol: jax.Array, bits: jax.Array) -> _Pair:
    below = _MOST_BITS - bits
    return symbol << below, jnp.uint32(1) << below

  def owner(slot: jax.Array, bits: jax.Array) -> jax.Array:
    return slot >> (_MOST_BITS - bits)

  return _dealt(bits, 0, interval, owner, _MOST_BITS)


def categorical(contexts: jax.Array, frequencies: np.ndarray | jax.Array) -> Codec:
  """Returns the codec of symbols from a small alphabet, each under one of K tables.

      p(x) = frequencies[context, x] / tables.TOTAL

  Pushing a symbol whose frequency is 0 corrupts the message. `pop` searches the tables
  by bisection, so it needs no list of slots for each table.

  Args:
    contexts: integers `[S]`, the index of each symbol's table. A symbol of the index K
      is always 0, and costs no bits.
    frequencies: integers `[K, A]`, of which each row adds up to `tables.TOTAL`.
      Constant ones should be NumPy arrays, because XLA is slow to fold constants.

  Raises:
    ValueError: if an argument has another shape, dtype or, unless it is traced, value.
  """
  _check_frequencies(frequencies)
  count, alphabet = frequencies.shape
  _check_indices(contexts, 'contexts', count)
  depth = (alphabet - 1).bit_length()
  width = 1 + (1 << depth)
  starts = jnp.asarray(_starts(frequencies, width)).reshape(-1)

  def take(index: jax.Array) -> jax.Array:
    return starts.at[index].get(mode='promise_in_bounds')

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


def _starts(frequencies: np.ndarray | jax.Array, width: int) -> np.ndarray | jax.Array:
  """Returns the starts of all intervals, uint32 `[K + 1, width]`, ends behind them.

  In the last table, the symbol 0 owns all slots.
  """
  xp = jnp if isinstance(frequencies, jax.Array) else np
  alphabet = frequencies.shape[1]
  void = tables.TOTAL * xp.eye(1, alphabet, dtype=xp.uint32)
  rows = xp.concatenate([frequencies.astype(xp.uint32), void])
  ends = xp.cumsum(rows, axis=1, dtype=xp.uint32)
  ends = xp.pad(ends, ((0, 0), (1, 0)))
  return xp.pad(ends, ((0, 0), (0, width - alphabet - 1)), mode='edge')


def _check_indices(values: jax.Array, name: str, most: int) -> None:
  """Raises a ValueError if values are not integers `[S]`, S >= 1, from 0 to `most`."""
  if values.ndim != 1 or not values.size:  # of no symbols, XLA would abort
    raise ValueError(f'{name} must be [S], S >= 1, got {name}.shape={values.shape}')
  if not jnp.issubdtype(values.dtype, jnp.integer):
    raise ValueError(f'{name} must be integers, got {name}.dtype={values.dtype}')
  if isinstance(values, jax.core.Tracer):
    return
  known: Any = np.asarray(values)
  least = int(np.min(known))
  greatest = int(np.max(known))
  if least < 0 or greatest > most:
    raise ValueError(f'{name} must be from 0 to {most}, got {least} to {greatest}')


def _check_frequencies(frequencies: np.ndarray | jax.Array) -> None:
  """Raises a ValueError if frequencies are not integers `[K, A]` of the right sums."""
  if frequencies.ndim != 2 or not frequencies.size:
    raise ValueError(f'frequencies must be [K, A], got {frequencies.shape=}')
  if not jnp.issubdtype(frequencies.dtype, jnp.integer):
    raise ValueError(f'frequencies must be integers, got {frequencies.dtype=}')
  if isinstance(frequencies, jax.core.Tracer):
    return
  rows = np.asarray(frequencies).astype(np.int64)
  totals: Any = rows.sum(axis=1)
  if (rows < 0).any() or (totals != tables.TOTAL).any():
    raise ValueError(
      f'each row of frequencies must be non-negative and add up to {tables.TOTAL}, got '
      f'sums from {totals.min()} to {totals.max()}'
    )


# ---- symbols in lanes --------------------------------------------------------------


def _dealt(
  contexts: jax.Array, void: int, interval: _Interval, owner: _Owner, precision: int
) -> Codec:
  """Returns the codec of symbols `[S]` that are dealt out to lanes.

  The last lanes may have no symbol: they have the context `void`, in which the symbol 0
  owns all slots.
  """

  def push(message: rans.Message, symbols: jax.Array) -> rans.Message:
    if symbols.shape != contexts.shape:
      raise ValueError(f'symbols must be [{contexts.size}], got {symbols.shape=}')
    lane_contexts = _deal(contexts, message.lanes, void)
    lane_symbols = _deal(symbols, message.lanes, 0)
    return push_all(message, interval(lane_symbols, lane_contexts), precision)

  def pop(message: rans.Message) -> tuple[rans.Message, jax.Array]:
    lane_contexts = _deal(contexts, message.lanes, void)
    message, symbols = pop_all(message, lane_contexts, interval, owner, precision)
    return message, symbols.reshape(-1)[: contexts.size].astype(jnp.uint16)

  return Codec(push, pop)


def _deal(values: jax.Array, lanes: int, fill: int) -> jax.Array:
  """Deals values `[S]` out to lanes: uint32 `[T, N]`, with `fill` at the end."""
  flat = jnp.asarray(values).astype(jnp.uint32)
  flat = jnp.pad(flat, (0, -flat.size % lanes), constant_values=fill)
  return flat.reshape(-1, lanes)


def push_all(message: rans.Message, intervals: _Pair, precision: int) -> rans.Message:
  """Pushes T symbols onto each lane, the first one last, so it comes on top.

  Args:
    message: the message.
    intervals: the starts and lengths of the symbols' intervals, uint32 `[T, N]` each.
    precision: of the intervals, see `rans.push_step`.

  Returns:
    The message. Words beyond its capacity are lost, and its size counts them.
  """
  push = functools.partial(_push_all, precision=precision)
  places = _explicit_places(message)
  if places is None:
    return push(message, intervals)
  return jax.sharding.auto_axes(push, out_sharding=places)(message, intervals)


def _push_all(
  message: rans.Message, intervals: _Pair, *, precision: int
) -> rans.Message:
  """Pushes symbols onto lanes that are along no `Explicit` axis."""

  def step(state: jax.Array, interval: _Pair) -> tuple[jax.Array, _Pair]:
    state, word, moved = rans.push_step(state, *interval, precision)
    return state, (word, moved)

  def loop(state: jax.Array, intervals: _Pair) -> tuple[jax.Array, _Pair]:
    return jax.lax.scan(step, state, intervals, reverse=True)

  state, (words, moved) = native.loop(loop)(message.state, intervals)
  words = words[::-1]  # in the order of pushes
  moved = moved[::-1]
  sizes = message.size + jnp.cumsum(moved, axis=0, dtype=jnp.int32)
  # A word that does not move is put beyond the stack, and dropped.
  places = jnp.where(moved, sizes - 1, message.capacity)
  put = jax.vmap(lambda stack, place, word: stack.at[place].set(word, mode='drop'))
  return rans.Message(state, put(message.words, places.T, words.T), sizes[-1])


def pop_all(
  message: rans.Message,
  contexts: jax.Array,
  interval: _Interval,
  owner: _Owner,
  precision: int,
) -> tuple[rans.Message, jax.Array]:
  """Pops T symbols from each lane: the inverse of `push_all`.

  Args:
    message: the message.
    contexts: uint32 `[T, N]`, the context of each symbol.
    interval: returns the intervals of symbols in contexts.
    owner: returns the symbols that own slots in contexts.
    precision: of the intervals, see `rans.push_step`.

  Returns:
    The message and the symbols, uint32 `[T, N]`.
  """
  pop = functools.partial(_pop_all, interval=interval, owner=owner, precision=precision)
  places = _explicit_places(message)
  if places is None:
    return pop(message, contexts)
  whole = jax.sharding.NamedSharding(places.state.mesh, jax.P())
  return jax.sharding.auto_axes(pop, out_sharding=(places, whole))(message, contexts)


def _pop_all(
  message: rans.Message,
  contexts: jax.Array,
  *,
  interval: _Interval,
  owner: _Owner,
  precision: int,
) -> tuple[rans.Message, jax.Array]:
  """Pops symbols from lanes that are along no `Explicit` axis."""
  # A stack of no words gets one to look at, which is never taken.
  missing = 0 if message.capacity else 1
  stacks = jnp.pad(message.words, ((0, 0), (0, missing)))
  capacity = message.capacity + missing

  def loop(carry: _Pair, words: jax.Array, contexts: jax.Array) -> Any:
    # Mapped over lanes, because indices of two axes would gather the words of all
    # devices in every step.
    look = jax.vmap(lambda stack, top: stack.at[top].get(mode='promise_in_bounds'))

    def step(carry: _Pair, context: jax.Array) -> tuple[_Pair, jax.Array]:
      state, size = carry
      symbol = owner(rans.slot(state, precision), context)
      # Any word serves if the stack is empty or overflowed.
      word = look(words, jnp.clip(size, 1, capacity) - 1)
      state, taken = rans.pop_step(state, word, *interval(symbol, context), precision)
      return (state, size - taken.astype(jnp.int32)), symbol

    return jax.lax.scan(step, carry, contexts)

  carry = message.state, message.size
  (state, size), symbols = native.loop(loop)(carry, stacks, contexts)
  size = jnp.where(size < 0, rans.DRY, size)
  size = jnp.where(message.size > message.capacity, rans.OVERFLOWN, size)
  return rans.Message(state, message.words, size), symbols


def _explicit_places(message: rans.Message) -> Any:
  """Returns the shardings of a message along `Explicit` axes of a mesh, or None.

  Along these, JAX asks for the sharding of every gather and scatter. Along `Auto` axes,
  XLA chooses it.
  """
  shardings = [jax.typeof(x).sharding for x in message]
  for sharding in shardings:
    if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
      place = functools.partial(jax.sharding.NamedSharding, sharding.mesh)
      places: list[Any] = [place(x.spec) for x in shardings]
      return rans.Message(*places)
  return None

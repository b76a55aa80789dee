r"""Range asymmetric numeral systems (rANS), many lanes side by side.

A message is a stack of symbols: what was pushed last is popped first. Each lane keeps
a state x in [2^16, 2^32) and a stack of 16-bit words. A symbol that owns the interval
[start, start + frequency) of [0, 2^precision) is pushed by

    x' = (x // frequency) * 2^precision + x % frequency + start,

after moving the low 16 bits of x to the stack if x' would not fit; `pop` undoes both.
Every step is integer arithmetic on uint32, so a message means the same on every
device. `push` and `pop` are exact inverses in both orders: symbols may also be *popped*
from a message that holds other data, which is what bits-back coding does.

Functions take one symbol a lane and are pure; callers scan, vmap and jit them.
Nothing here raises on overflow or underflow: both leave a trace in the message that
`check` turns into an error on the host.

Shape letters: N lanes, C capacity in words of a lane's stack.

References:
  J. Duda, Asymmetric numeral systems, arXiv 1311.2540.
  F. Giesen, Interleaved entropy coders, arXiv 1402.3392.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Lookup = Callable[[jax.Array], tuple[Any, jax.Array, jax.Array]]


class Message(NamedTuple):
  """A stack of coded symbols."""

  state: jax.Array  # uint32 [N], at least 2^16
  words: jax.Array  # uint16 [C + 1, N]; the last row is scratch
  size: jax.Array  # int32 [N], words on each lane's stack
  lowest: jax.Array  # int32 [N], the least size so far; below 0 after underflow
  highest: jax.Array  # int32 [N], the greatest size so far; above C after overflow

  @property
  def lanes(self) -> int:
    return self.state.shape[0]

  @property
  def capacity(self) -> int:
    return self.words.shape[0] - 1


class MessageError(ValueError):
  """A message that overflowed its capacity or ran dry."""


def empty(lanes: int, capacity: int) -> Message:
  """A message without content, with room for `capacity` words a lane."""
  return seeded(jnp.zeros(lanes, jnp.uint16), capacity)


def seeded(payload: jax.Array, capacity: int) -> Message:
  """A message whose states hold 16 bits of payload each: uint16 `[N]`.

  An empty state has room for them, so they cost nothing; when all that was pushed has
  been popped again, `payload` reads them back.
  """
  # Three arrays, not one thrice: a caller may donate the message's buffers.
  size, lowest, highest = (jnp.zeros(payload.shape, jnp.int32) for _ in range(3))
  return Message(
    state=payload.astype(jnp.uint32) | jnp.uint32(1 << 16),
    words=jnp.zeros((capacity + 1, *payload.shape), jnp.uint16),
    size=size,
    lowest=lowest,
    highest=highest,
  )


def stacked(words: jax.Array, capacity: int) -> Message:
  """A message that holds words: uint16 `[W, N]`, W from 1 to capacity + 1.

  The last row is the payload of the states, see `seeded`, and the others are the
  stacks. What pops symbols from it may take almost 16 (W - 1) bits of every lane.
  """
  message, depth = seeded(words[-1], capacity), words.shape[0] - 1
  size, lowest, highest = (x + depth for x in message[2:])
  stacks = message.words.at[:depth].set(words[:-1])
  return Message(message.state, stacks, size, lowest, highest)


def payload(message: Message) -> jax.Array:
  """What `seeded` put under the content: uint16 `[N]`."""
  return message.state.astype(jnp.uint16)


def push(
  message: Message, start: jax.Array, frequency: jax.Array, precision: int
) -> Message:
  """Pushes one symbol a lane.

  Args:
    message: the message.
    start: uint32 `[N]`, where each symbol's interval begins.
    frequency: uint32 `[N]`, the interval's length, at least 1. A frequency of
      2^precision with start 0 leaves the lane as it is.
    precision: the intervals divide [0, 2^precision); 10 to 16.

  Returns:
    The message with the symbols on top.
  """
  _check_precision(precision)
  lanes = message.state, message.words.reshape(-1), message.size
  return _pushed(message, _push_step(lanes, start, frequency, precision))


def pop(message: Message, lookup: Lookup, precision: int) -> tuple[Message, Any]:
  """Pops one symbol a lane: the inverse of `push`.

  Args:
    message: the message.
    lookup: takes a number in [0, 2^precision) a lane, uint32 `[N]`, and returns the
      symbol whose interval holds it, and that interval's start and frequency.
    precision: as in `push`.

  Returns:
    The message without the symbols, and the symbols.
  """
  _check_precision(precision)
  words = message.words.reshape(-1)
  lanes, symbol = _pop_step((message.state, message.size), words, lookup, precision)
  return _popped(message, lanes), symbol


def push_all(
  message: Message,
  symbols: Any,
  interval: Callable[[Any], tuple[jax.Array, jax.Array]],
  precision: int,
) -> Message:
  """Pushes T symbols a lane, the last one first, so that `pop_all` has them in order.

  Args:
    message: the message.
    symbols: a PyTree of arrays `[T, ...]`.
    interval: takes the symbols of one step and returns start and frequency, as `push`
      takes them.
    precision: as in `push`.

  Returns:
    The message with the symbols on top.
  """
  _check_precision(precision)

  def step(lanes: _Pushing, x: Any) -> tuple[_Pushing, None]:
    return _push_step(lanes, *interval(x), precision), None

  lanes = message.state, message.words.reshape(-1), message.size
  return _pushed(message, jax.lax.scan(step, lanes, symbols, reverse=True)[0])


def pop_all(
  message: Message,
  contexts: Any,
  lookup: Callable[[jax.Array, Any], tuple[Any, jax.Array, jax.Array]],
  precision: int,
  *,
  length: int | None = None,
) -> tuple[Message, Any]:
  """Pops T symbols a lane: the inverse of `push_all`.

  Args:
    message: the message.
    contexts: a PyTree of arrays `[T, ...]`, or None.
    lookup: as in `pop`, with the contexts of one step as a second argument.
    precision: as in `push`.
    length: T, where there are no contexts.

  Returns:
    The message without the symbols, and the symbols, `[T, ...]`.
  """
  _check_precision(precision)
  words = message.words.reshape(-1)

  def step(lanes: _Popping, x: Any) -> tuple[_Popping, Any]:
    return _pop_step(lanes, words, lambda slot: lookup(slot, x), precision)

  lanes = message.state, message.size
  lanes, symbols = jax.lax.scan(step, lanes, contexts, length=length)
  return _popped(message, lanes), symbols


_Pushing = tuple[jax.Array, jax.Array, jax.Array]  # state, words flat, size
_Popping = tuple[jax.Array, jax.Array]  # state, size


def _push_step(
  lanes: _Pushing, start: jax.Array, frequency: jax.Array, precision: int
) -> _Pushing:
  state, words, size = lanes
  count = state.shape[0]
  # The word is written whether the lane is full or not: if it is not, the size stays
  # and the next push overwrites it. This keeps the scatter free of masks. Flat indices,
  # since XLA for CPU does not vectorise two-dimensional ones.
  row = jnp.minimum(size, words.shape[0] // max(count, 1) - 1)
  words = words.at[row * count + jnp.arange(count)].set(
    state.astype(jnp.uint16), mode='promise_in_bounds', unique_indices=True
  )
  state, full = push_state(state, start, frequency, precision)
  return state, words, size + full.astype(jnp.int32)


def _pop_step(
  lanes: _Popping, words: jax.Array, lookup: Lookup, precision: int
) -> tuple[_Popping, Any]:
  state, size = lanes
  count = state.shape[0]
  slot = state & jnp.uint32((1 << precision) - 1)
  symbol, start, frequency = lookup(slot)
  state, dry = pop_state(state, start, frequency, precision)
  size = size - dry.astype(jnp.int32)
  # After underflow the size is negative; clipping keeps the read defined.
  row = jnp.clip(size, 0, words.shape[0] // max(count, 1) - 1)
  word = words.at[row * count + jnp.arange(count)].get(mode='promise_in_bounds')
  state = jnp.where(dry, (state << 16) | word.astype(jnp.uint32), state)
  return (state, size), symbol


def _pushed(message: Message, lanes: _Pushing) -> Message:
  state, words, size = lanes
  return Message(
    state=state,
    words=words.reshape(message.words.shape),
    size=size,
    lowest=message.lowest,
    # Sizes only grow in a push, so the last is the greatest.
    highest=jnp.maximum(message.highest, size),
  )


def _popped(message: Message, lanes: _Popping) -> Message:
  state, size = lanes
  # Sizes only shrink in a pop, so the last is the least.
  lowest = jnp.minimum(message.lowest, size)
  return message._replace(state=state, size=size, lowest=lowest)


def push_state(
  state: jax.Array, start: jax.Array, frequency: jax.Array, precision: int
) -> tuple[jax.Array, jax.Array]:
  """What a push does to the states.

  Args:
    state: uint32 `[N]`.
    start: as in `push`.
    frequency: as in `push`.
    precision: as in `push`.

  Returns:
    The new states; and whether the low 16 bits of the old one move to the stack.
  """
  full = (state >> 16) >= (frequency << (16 - precision))
  state = jnp.where(full, state >> 16, state)
  quotient, remainder = _divmod(state, frequency)
  return (quotient << precision) + remainder + start, full


def pop_state(
  state: jax.Array, start: jax.Array, frequency: jax.Array, precision: int
) -> tuple[jax.Array, jax.Array]:
  """What a pop does to the states, before words are read.

  Args:
    state: uint32 `[N]`.
    start: uint32 `[N]`, of the interval that holds the state's low bits.
    frequency: uint32 `[N]`, likewise.
    precision: as in `push`.

  Returns:
    The new states; and whether they are to be shifted to make room for a word.
  """
  slot = state & jnp.uint32((1 << precision) - 1)
  state = frequency * (state >> precision) + slot - start
  return state, state < jnp.uint32(1 << 16)


def _check_precision(precision: int) -> None:
  """The quotient of a state by a frequency is below 2^(32 - precision)."""
  if not 10 <= precision <= 16:
    raise ValueError(f'precision must be from 10 to 16, got {precision=}')


def _divmod(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Exact `divmod` of uint32, for x < y * 2^22 and y <= 2^16.

  A float32 quotient below 2^22 is off by at most one whatever the device's rounding;
  the integer remainder tells which way. Four times faster than integer division.
  """
  quotient = (x.astype(jnp.float32) / y.astype(jnp.float32)).astype(jnp.uint32)
  remainder = (x - quotient * y).astype(jnp.int32)
  divisor = y.astype(jnp.int32)
  low, high = remainder < 0, remainder >= divisor
  quotient = quotient - low.astype(jnp.uint32) + high.astype(jnp.uint32)
  remainder = remainder + jnp.where(low, divisor, 0) - jnp.where(high, divisor, 0)
  return quotient, remainder.astype(jnp.uint32)


def check(message: Message) -> Message:
  """Raises if the message ever overflowed or ran dry; else returns it. Not for `jit`.

  Raises:
    MessageError: says how many bits were missing, or how many words too many.
  """
  missing = -np.minimum(np.asarray(message.lowest), 0).sum()
  if missing:
    raise MessageError(f'the message ran dry: {16 * missing} bits were missing')
  excess = int(np.max(message.highest, initial=0)) - message.capacity
  if excess > 0:
    raise MessageError(
      f'the message overflowed: a lane needs {excess} words more than its '
      f'capacity of {message.capacity}'
    )
  return message


def content_bits(message: Message) -> float:
  """The information in the message, in bits: words and logarithms of the states."""
  states = np.log2(np.asarray(message.state, np.float64)) - 16
  return float(16 * np.asarray(message.size, np.int64).sum() + states.sum())


def to_words(message: Message) -> np.ndarray:
  """The message as uint16: states, sizes, then the stacks from the bottom up.

  Layout: the least size (2 words, low first), the bytes b of a size (1 word, 1 or 2),
  the states' low halves `[N]`, their high halves `[N]`, the sizes less the least one
  in b bytes each, and for each stack row in turn the words of the lanes that reach it.

  Raises:
    MessageError: if the message overflowed or ran dry, or if its lanes' sizes differ
      by 2^16 or more.
  """
  check(message)
  state, size = np.asarray(message.state), np.asarray(message.size)
  base = int(size.min()) if size.size else 0
  excess = size - base
  if excess.max(initial=0) > 0xFFFF:
    raise MessageError('the sizes of the lanes differ by 2^16 words or more')
  width = 1 if excess.max(initial=0) <= 0xFF else 2
  packed = excess.astype(f'<u{width}')
  packed = np.pad(packed, (0, packed.nbytes % 2)).view(np.uint16)
  rows = np.arange(size.max(initial=0))[:, None] < size
  return np.concatenate(
    [
      np.array([base & 0xFFFF, base >> 16, width], np.uint16),
      state.astype(np.uint16),
      (state >> 16).astype(np.uint16),
      packed,
      np.asarray(message.words)[: rows.shape[0]][rows],
    ]
  )


def from_words(words: np.ndarray, lanes: int, capacity: int | None = None) -> Message:
  """The inverse of `to_words`.

  Args:
    words: uint16.
    lanes: N.
    capacity: room for words in a lane; as much as the message needs by default.

  Returns:
    The message.

  Raises:
    MessageError: if these words are not a message of that many lanes.
  """
  width = int(words[2]) if words.size > 2 else 0
  start = 3 + 2 * lanes  # of the sizes
  stop = start + -(-lanes * width // 2)
  if width not in (1, 2) or words.size < stop:
    raise MessageError(f'the words are not a message of {lanes} lanes')
  base = int(words[0]) | int(words[1]) << 16
  low, high = words[3:start].astype(np.uint32).reshape(2, lanes)
  size = words[start:stop].view(f'<u{width}')[:lanes].astype(np.int64) + base
  stacks = words[stop:]
  if stacks.size != size.sum() or not high.all():
    raise MessageError('the words are not a message')
  depth = int(np.max(size, initial=0))
  capacity = depth if capacity is None else capacity
  if depth > capacity:
    raise MessageError(f'{depth} words a lane do not fit a capacity of {capacity}')
  rows = np.zeros((capacity + 1, lanes), np.uint16)
  rows[np.arange(capacity + 1)[:, None] < size] = stacks
  size32 = jnp.asarray(size, jnp.int32)
  return Message(
    state=jnp.asarray(low | high << 16),
    words=jnp.asarray(rows),
    size=size32,
    lowest=size32,
    highest=size32,
  )

r"""Range asymmetric numeral systems (rANS), many lanes side by side.

A message is a stack of symbols: the symbol that was pushed last is popped first. It is
divided into lanes, which code independently of each other. Each lane has a state x in
[2^16, 2^32) and a stack of 16-bit words. A symbol owns an interval
[start, start + frequency) of [0, 2^precision); its probability is
frequency / 2^precision. To push it is to set

    x' = (x // frequency) * 2^precision + x % frequency + start.

If x' would not fit into 32 bits, the low 16 bits of x are moved to the stack first.
`pop` undoes both steps. Every step is integer arithmetic on uint32, so a message means
the same on every device. `push` and `pop` are exact inverses in both orders. Therefore
symbols may also be *popped* from a message that holds other data, as bits-back coding
does.

All functions are pure. `push` and `pop` take one symbol per lane; `push_all` and
`pop_all` scan over many. A message overflows if a lane needs more words than its
capacity; it underflows, or runs dry, if a lane is asked for more words than it has.
Neither raises an error under `jit`. Both are recorded in the message, and `check`
raises the error on the host.

Shape letters: N lanes, C capacity of a lane's stack in words.

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
  """Raised for a message that overflowed, that ran dry, or that is not valid."""


def empty(lanes: int, capacity: int) -> Message:
  """Returns a message without content; each lane has room for `capacity` words."""
  return seeded(jnp.zeros(lanes, jnp.uint16), capacity)


def seeded(payload: jax.Array, capacity: int) -> Message:
  """Returns a message whose states hold 16 bits of payload each.

  The payload costs no bits, because an empty state has room for it. When all symbols
  have been popped again, the function `payload` reads it back.

  Args:
    payload: uint16 `[N]`.
    capacity: C.
  """
  # Three arrays and not one thrice, because a caller may donate the message's buffers.
  size, lowest, highest = (jnp.zeros(payload.shape, jnp.int32) for _ in range(3))
  return Message(
    state=payload.astype(jnp.uint32) | jnp.uint32(1 << 16),
    words=jnp.zeros((capacity + 1, *payload.shape), jnp.uint16),
    size=size,
    lowest=lowest,
    highest=highest,
  )


def stacked(words: jax.Array, capacity: int) -> Message:
  """Returns a message that holds the given words.

  The last row becomes the payload of the states (see `seeded`), and the rows before it
  become the stacks. A caller may pop symbols of almost 16 (W - 1) bits from every lane.

  Args:
    words: uint16 `[W, N]`, with W from 1 to C + 1.
    capacity: C.
  """
  message, depth = seeded(words[-1], capacity), words.shape[0] - 1
  size, lowest, highest = (x + depth for x in message[2:])
  stacks = message.words.at[:depth].set(words[:-1])
  return Message(message.state, stacks, size, lowest, highest)


def unstacked(message: Message) -> np.ndarray:
  """Returns the words that `stacked` made a message of. Not for use under `jit`.

  Raises:
    MessageError: if `stacked` cannot have made it.
  """
  state, size = np.asarray(message.state), np.asarray(message.size)
  if (state >> 16 != 1).any() or (size != size[0]).any():
    raise MessageError('the message is not one of words alone')
  return np.concatenate([np.asarray(message.words)[: size[0]], payload(message)[None]])


def payload(message: Message) -> jax.Array:
  """Returns the payload that `seeded` put below the content: uint16 `[N]`."""
  return message.state.astype(jnp.uint16)


def push(
  message: Message, start: jax.Array, frequency: jax.Array, precision: int
) -> Message:
  """Pushes one symbol onto each lane.

  Args:
    message: the message.
    start: uint32 `[N]`, the start of each symbol's interval.
    frequency: uint32 `[N]`, the length of each interval, at least 1. A frequency of
      2^precision with start 0 does not change the lane.
    precision: the intervals divide [0, 2^precision); from 10 to 16.

  Returns:
    The message with the symbols on top.
  """
  _check_precision(precision)
  lanes = message.state, message.words.reshape(-1), message.size
  return _pushed(message, _push_step(lanes, start, frequency, precision))


def pop(message: Message, lookup: Lookup, precision: int) -> tuple[Message, Any]:
  """Pops one symbol from each lane: the inverse of `push`.

  Args:
    message: the message.
    lookup: takes one slot for each lane, uint32 `[N]`; a slot is an integer in
      [0, 2^precision). Returns the symbols whose intervals contain the slots, and the
      starts and frequencies of these intervals.
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
  """Pushes T symbols onto each lane, the last one first.

  In this order, `pop_all` returns the first one first.

  Args:
    message: the message.
    symbols: a PyTree of arrays `[T, ...]`.
    interval: takes the symbols of one step; returns their starts and frequencies, as
      in `push`.
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
  """Pops T symbols from each lane: the inverse of `push_all`.

  Args:
    message: the message.
    contexts: a PyTree of arrays `[T, ...]`, or None.
    lookup: as in `pop`; its second argument is the contexts of one step.
    precision: as in `push`.
    length: T; needed only if `contexts` is None.

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


_Pushing = tuple[jax.Array, jax.Array, jax.Array]  # state, flat words, size
_Popping = tuple[jax.Array, jax.Array]  # state, size


def _push_step(
  lanes: _Pushing, start: jax.Array, frequency: jax.Array, precision: int
) -> _Pushing:
  state, words, size = lanes
  count = state.shape[0]
  # Every lane writes a word, because the scatter then needs no mask. If the lane is not
  # full, its size does not grow and the next push overwrites the word. The indices are
  # flat, because XLA for CPU does not vectorise a scatter with two-dimensional ones.
  row = jnp.minimum(size, words.shape[0] // max(count, 1) - 1)
  words = words.at[row * count + jnp.arange(count, dtype=jnp.int32)].set(
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
  # After underflow the size is negative. Clipping keeps the index in bounds.
  row = jnp.clip(size, 0, words.shape[0] // max(count, 1) - 1)
  word = words.at[row * count + jnp.arange(count, dtype=jnp.int32)].get(
    mode='promise_in_bounds'
  )
  state = jnp.where(dry, (state << 16) | word.astype(jnp.uint32), state)
  return (state, size), symbol


def _pushed(message: Message, lanes: _Pushing) -> Message:
  state, words, size = lanes
  return Message(
    state=state,
    words=words.reshape(message.words.shape),
    size=size,
    lowest=message.lowest,
    # Sizes only grow in a push, so the last size is the greatest.
    highest=jnp.maximum(message.highest, size),
  )


def _popped(message: Message, lanes: _Popping) -> Message:
  state, size = lanes
  # Sizes only shrink in a pop, so the last size is the least.
  lowest = jnp.minimum(message.lowest, size)
  return message._replace(state=state, size=size, lowest=lowest)


def push_state(
  state: jax.Array, start: jax.Array, frequency: jax.Array, precision: int
) -> tuple[jax.Array, jax.Array]:
  """Computes the states after a push.

  Args:
    state: uint32 `[N]`.
    start: as in `push`.
    frequency: as in `push`.
    precision: as in `push`.

  Returns:
    The new states; and whether the low 16 bits of each old state move to the stack,
    bool `[N]`.
  """
  full = (state >> 16) >= (frequency << (16 - precision))
  state = jnp.where(full, state >> 16, state)
  quotient, remainder = _divmod(state, frequency)
  return (quotient << precision) + remainder + start, full


def pop_state(
  state: jax.Array, start: jax.Array, frequency: jax.Array, precision: int
) -> tuple[jax.Array, jax.Array]:
  """Computes the states after a pop, before words are read from the stacks.

  Args:
    state: uint32 `[N]`.
    start: uint32 `[N]`, start of the interval that contains the slot of the state. The
      slot is the low `precision` bits.
    frequency: uint32 `[N]`, length of that interval.
    precision: as in `push`.

  Returns:
    The new states; and whether each must still be shifted by 16 bits to take in a word
    from its stack, bool `[N]`.
  """
  slot = state & jnp.uint32((1 << precision) - 1)
  state = frequency * (state >> precision) + slot - start
  return state, state < jnp.uint32(1 << 16)


def _check_precision(precision: int) -> None:
  """Raises an error unless the precision is from 10 to 16.

  A push divides a state by a frequency. The quotient is below 2^(32 - precision), and
  `_divmod` needs a quotient below 2^22.
  """
  if not 10 <= precision <= 16:
    raise ValueError(f'precision must be from 10 to 16, got {precision=}')


def _divmod(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes the exact `divmod` of uint32 for x < y * 2^22 and y <= 2^16.

  A float32 quotient below 2^22 is wrong by at most one, however the device rounds. The
  sign and size of the integer remainder tell in which direction. This is four times
  faster than integer division.
  """
  quotient = (x.astype(jnp.float32) / y.astype(jnp.float32)).astype(jnp.uint32)
  remainder = (x - quotient * y).astype(jnp.int32)
  divisor = y.astype(jnp.int32)
  low, high = remainder < 0, remainder >= divisor
  quotient = quotient - low.astype(jnp.uint32) + high.astype(jnp.uint32)
  remainder = remainder + jnp.where(low, divisor, 0) - jnp.where(high, divisor, 0)
  return quotient, remainder.astype(jnp.uint32)


def check(message: Message) -> Message:
  """Returns the message if it never overflowed nor ran dry. Not for use under `jit`.

  Raises:
    MessageError: if it did. The error says how many bits were missing, or by how many
      words a lane exceeded its capacity.
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


def check_empty(message: Message) -> None:
  """Checks that exactly the content of a message has been popped.

  Raises:
    MessageError: if content is left, or if more was popped than the message held.
  """
  check(message)
  if np.any(np.asarray(message.size)) or np.any(np.asarray(message.state) != 1 << 16):
    raise MessageError('the message holds more than it should')


def content_bits(message: Message) -> float:
  """Returns the content of the message in bits.

  A word counts 16 bits, and a state x counts log2(x) - 16 bits.
  """
  states = np.log2(np.asarray(message.state, np.float64)) - 16
  return float(16 * np.asarray(message.size, np.int64).sum() + states.sum())


def to_words(message: Message) -> np.ndarray:
  """Serialises a message into uint16 words.

  The words are, in this order:

  * the least size of a lane's stack, 2 words, the low half first;
  * b, the number of bytes of a size below: 1 word, 1 or 2;
  * the low halves of the states, N words, then their high halves, N words;
  * the size of each stack minus the least size, b bytes each, padded to whole words;
  * the stacks, row by row from the bottom: the words of the lanes that reach the row.

  Raises:
    MessageError: if the message overflowed or ran dry, or if its lanes' sizes differ
      by 2^16 or more.
  """
  check(message)
  state, size = np.asarray(message.state), np.asarray(message.size)
  base = int(size.min()) if size.size else 0
  excess = size - base
  if excess.max(initial=0) > 0xFFFF:
    raise MessageError('the sizes of the lanes differ by 2^16 or more words')
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
  """Makes a message from its words: the inverse of `to_words`.

  Args:
    words: uint16.
    lanes: N.
    capacity: C; by default the size of the largest stack.

  Returns:
    The message.

  Raises:
    MessageError: if the words are not a message with N lanes, or if a stack has more
      than C words.
  """
  width = int(words[2]) if words.size > 2 else 0
  start = 3 + 2 * lanes  # where the sizes begin
  stop = start + -(-lanes * width // 2)
  if width not in (1, 2) or words.size < stop:
    raise MessageError(f'the words are not a message with {lanes} lanes')
  base = int(words[0]) | int(words[1]) << 16
  low, high = words[3:start].astype(np.uint32).reshape(2, lanes)
  size = words[start:stop].view(f'<u{width}')[:lanes].astype(np.int64) + base
  stacks = words[stop:]
  if stacks.size != size.sum() or not high.all():
    raise MessageError(f'the words are not a message with {lanes} lanes')
  depth = int(np.max(size, initial=0))
  capacity = depth if capacity is None else capacity
  if depth > capacity:
    raise MessageError(f'a lane has {depth} words, but its capacity is {capacity}')
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

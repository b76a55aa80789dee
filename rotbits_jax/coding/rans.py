r"""Range asymmetric numeral systems (rANS), many lanes side by side.

A message is a stack of symbols: the symbol that was pushed last is popped first. It is
divided into lanes, which code independently of each other. Each lane has a state x in
[2^16, 2^32) and a stack of 16-bit words. A symbol owns an interval of the *slots*
0 .. 2^precision - 1:

    0            start         start + frequency                  2^precision
    |--------------|###################|-------------------------------|
      symbols before      the symbol             symbols after it

Its probability is frequency / 2^precision. To push it is to set

    x' = (x // frequency) * 2^precision + x % frequency + start.

So x' % 2^precision is a slot of the symbol, which tells the decoder what to pop. If x'
would not fit into 32 bits, the low 16 bits of x move to the stack first. To pop undoes
both steps. `push_step` and `pop_step` are these steps; `codecs` and `blocks` use them.
They are integer arithmetic on uint32, so a message means the same on every device, and
exact inverses in both orders, which bits-back coding needs.

A message has a fixed capacity, so its arrays keep their shapes, and `jax.lax.scan` can
carry it. A lane *runs dry* if more words are popped than it has, and *overflows* if
more are pushed than it has room for. Neither raises an error under `jit`. Both are
values of `size`, which later pushes and pops keep; `check` raises a ValueError on the
host.

Shape letters: N lanes, C words that a lane has room for.

References:
  J. Duda, Asymmetric numeral systems, arXiv 1311.2540.
  F. Giesen, Interleaved entropy coders, arXiv 1402.3392.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DRY = -(1 << 30)
"""The size of a lane from which too many words were popped, whatever is pushed then."""

OVERFLOWN = 1 << 30
"""The size of a lane that was popped after it overflowed, whatever is popped then."""


class Message(NamedTuple):
  """A stack of coded symbols.

  `a == b` compares the words that two messages hold. It waits for the device, so it
  does not work under `jit`.
  """

  state: jax.Array  # uint32 [N], at least 2^16
  words: jax.Array  # uint16 [N, C], the stack of each lane from its bottom
  size: jax.Array  # int32 [N], words of each stack; below 0 dry, above C overflown

  @property
  def lanes(self) -> int:
    return self.words.shape[0]

  @property
  def capacity(self) -> int:
    return self.words.shape[-1]

  def __eq__(self, other: object) -> bool:
    """Whether states, sizes and the words below the sizes are equal."""
    if not isinstance(other, Message) or self.lanes != other.lanes:
      return False
    same_state = np.array_equal(self.state, other.state)
    if not same_state or not np.array_equal(self.size, other.size):
      return False
    shared = min(self.capacity, other.capacity)
    is_used = np.arange(shared) < np.asarray(self.size)[..., None]
    is_same = np.asarray(self.words[..., :shared] == other.words[..., :shared])
    return bool((is_same | ~is_used).all())

  def __ne__(self, other: object) -> bool:
    return not self == other


def push_step(
  state: jax.Array,
  start: jax.Array,
  frequency: jax.Array | int,
  precision: jax.Array | int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Pushes a symbol onto each state.

  Args:
    state: uint32 `[N]`.
    start: uint32 `[N]`, the start of each symbol's interval.
    frequency: uint32 `[N]`, the length of each interval, at least 1. A frequency of
      2^precision with start 0 does not change the lane. It is 1 for raw bits.
    precision: from 10 to 16; of raw bits uint32 `[N]`, from 0 to 16.

  Returns:
    The new states, uint32; the low words of the old states, uint16; and whether each
    low word moves to its stack, bool.
  """
  word = state.astype(jnp.uint16)
  moved = (state >> 16 << precision) >> 16 >= jnp.uint32(frequency)
  state = jnp.where(moved, state >> 16, state)
  if isinstance(frequency, int):
    return (state << precision) + start, word, moved
  quotient, remainder = _divmod(state, frequency)
  return (quotient << precision) + remainder + start, word, moved


def pop_step(
  state: jax.Array,
  word: jax.Array,
  start: jax.Array,
  frequency: jax.Array | int,
  precision: jax.Array | int,
  keep: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> tuple[jax.Array, jax.Array]:
  """Pops a symbol from each state: the inverse of `push_step`.

      x = frequency * (x' // 2^precision) + x' % 2^precision - start.

  Args:
    state: uint32 `[N]`.
    word: uint16 `[N]`, the word on top of each stack.
    start: uint32 `[N]`, the start of the interval that contains the `slot`.
    frequency: uint32 `[N]`, the length of that interval.
    precision: that of `push_step`.
    keep: a function of the states before they take words, which returns them.

  Returns:
    The new states, uint32; and whether each took its word, bool `[N]`.
  """
  state = keep(frequency * (state >> precision) + slot(state, precision) - start)
  taken = state < jnp.uint32(1 << 16)
  return jnp.where(taken, state << 16 | word.astype(jnp.uint32), state), taken


def slot(state: jax.Array, precision: jax.Array | int) -> jax.Array:
  """Returns the slot of each state, its low bits, which tells the symbol on top."""
  return state & ((jnp.uint32(1) << precision) - jnp.uint32(1))


def _divmod(dividend: jax.Array, divisor: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes the exact `divmod` of uint32 for quotients below 2^22, divisors to 2^16.

  A float32 quotient below 2^22 is wrong by at most one, however the device rounds. The
  sign and size of the integer remainder tell in which direction. This is four times
  faster than integer division.
  """
  ratio = dividend.astype(jnp.float32) / divisor.astype(jnp.float32)
  quotient = ratio.astype(jnp.uint32)
  remainder = (dividend - quotient * divisor).astype(jnp.int32)
  signed = divisor.astype(jnp.int32)
  low, high = remainder < 0, remainder >= signed
  quotient = quotient - low.astype(jnp.uint32) + high.astype(jnp.uint32)
  remainder = remainder + jnp.where(low, signed, 0) - jnp.where(high, signed, 0)
  return quotient, remainder.astype(jnp.uint32)


def stacked(words: jax.Array, *, room: int = 0) -> Message:
  """Returns a message that holds the given words.

  The last row becomes the low halves of the states. It costs no bits, because an empty
  state has room for 16 bits. The rows before it become the stacks. A caller may pop
  symbols of almost 16 (R - 1) bits from every lane.

  >>> message = stacked(jnp.zeros((3, 2), jnp.uint16), room=5)
  >>> message.lanes, message.capacity, message.size.tolist()
  (2, 7, [2, 2])

  Args:
    words: uint16 `[R, N]`, R >= 1.
    room: the words that may be pushed to each lane, in addition to the given ones.

  Returns:
    The message, with a capacity of C = R - 1 + room words per lane.

  Raises:
    ValueError: if the words have another shape or dtype, or the room is negative.
  """
  if words.ndim != 2 or not words.size or words.dtype != jnp.uint16:
    raise ValueError(
      f'words must be uint16 [R, N] with R, N >= 1, got {words.shape=}, {words.dtype=}'
    )
  if room < 0:
    raise ValueError(f'room must not be negative, got {room=}')
  rows = jnp.asarray(words)
  size = jnp.full(rows.shape[1], rows.shape[0] - 1, jnp.int32)
  state = rows[-1].astype(jnp.uint32) | jnp.uint32(1 << 16)
  return Message(state, jnp.pad(rows[:-1].T, ((0, 0), (0, room))), size)


def unstacked(message: Message) -> np.ndarray:
  """Returns the words that `stacked` made a message of. Not for use under `jit`."""
  state, words, size = map(np.asarray, check(message))
  if (state >> 16 != 1).any() or (size != size[0]).any():
    raise ValueError('the message is not one of words alone')
  rows = words[:, : size[0]].T
  return np.concatenate([rows, state.astype(np.uint16)[None]])


def check(message: Message) -> Message:
  """Returns a message that neither ran dry nor overflowed. Not for use under `jit`.

  Raises:
    ValueError: if a lane ran dry or overflowed, now or before.
  """
  size = np.asarray(message.size)
  if (size < 0).any():
    raise ValueError('the message ran dry')
  if (size > message.capacity).any():
    raise ValueError(
      f'the message overflowed: a lane has room for {message.capacity} words, see the '
      'argument `room` of rans.stacked'
    )
  return message


def content_bits(message: Message) -> float:
  """Returns the content of the message in bits. Not for use under `jit`.

  A word counts 16 bits, and a state x counts log2(x) - 16 bits.
  """
  state, _, size = map(np.asarray, check(message))
  states = np.log2(state.astype(np.float64)) - 16
  return float(16 * size.sum(dtype=np.int64) + states.sum())


def to_words(message: Message) -> np.ndarray:
  """Serialises a message of fewer than 2^16 words a lane: uint16, the head last."""
  state, words, size = map(np.asarray, check(message))
  used = words[np.arange(words.shape[1]) < size[:, None]]
  return np.concatenate([used, state.view(np.uint16), size.astype(np.uint16)])


def from_words(pop: Callable[[int], np.ndarray], lanes: int, room: int) -> Message:
  """Makes a message from its words, the inverse of `to_words`.

  Args:
    pop: removes a number of words from the end of a stream, and returns them.
    lanes: N.
    room: C. All messages with the same room share a compiled program.

  Returns:
    The message.

  Raises:
    ValueError: if the words are no message, or a lane has more than `room` words.
  """
  state, size, _ = split_words(pop(3 * lanes), lanes)
  if size.max() > room:
    raise ValueError(f'a lane has {size.max()} words, more than {room}')
  rows = np.zeros((lanes, room), np.uint16)
  rows[np.arange(room) < size[:, None]] = pop(int(size.sum()))
  return Message(jnp.asarray(state), jnp.asarray(rows), jnp.asarray(size, jnp.int32))


def split_words(
  words: np.ndarray, lanes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Divides words, uint16, that begin with the head of a message; see docs/format.md.

  Returns the states, uint32 `[N]`; the sizes, int64 `[N]`; and the other words.
  """
  state, size, others = np.split(words, [2 * lanes, 3 * lanes])
  if size.size < lanes or not state[1::2].all():
    raise ValueError(f'the words are not a message with {lanes} lanes')
  return state.view(np.uint32), size.astype(np.int64), others

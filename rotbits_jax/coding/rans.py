r"""Range asymmetric numeral systems (rANS), many lanes side by side.

A message is a stack of symbols: the symbol that was pushed last is popped first. It is
divided into lanes, which code independently of each other. Each lane has a state x in
[2^16, 2^32) and a stack of 16-bit words. A symbol owns an interval
[start, start + frequency) of [0, 2^precision); its probability is
frequency / 2^precision. To push it is to set

    x' = (x // frequency) * 2^precision + x % frequency + start.

If x' would not fit into 32 bits, the low 16 bits of x move to the stack first. To pop
undoes both steps. `push_step` and `pop_step` are these steps; `codecs` and `blocks` use
them. They are integer arithmetic on uint32, so a message means the same on every
device, and exact inverses in both orders, which bits-back coding needs.

A message runs dry if a lane is asked for more words than it has. That raises no error
under `jit`, but is recorded in the message, and `check` raises a ValueError on the
host, as functions do that read damaged words.

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


class Message(NamedTuple):
  """A stack of coded symbols."""

  state: jax.Array  # uint32 [N], at least 2^16
  words: jax.Array  # uint16 [N, C], the stack of each lane from its bottom
  size: jax.Array  # int32 [N], words on each lane's stack; below 0 if it ran dry

  @property
  def lanes(self) -> int:
    return self.words.shape[0]


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

  Returns the new states, uint32; the low words of the old states, uint16; and whether
  each low word moves to its stack, bool.
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

  `word`, uint16 `[N]`, is on top of each stack, and the interval is that which contains
  the slot. Returns the new states, and whether each took its word, bool `[N]`.
  `keep` gets the states before they take words.
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


def stacked(words: jax.Array) -> Message:
  """Returns a message that holds the given words, uint16 `[C, N]`.

  The last row becomes the low halves of the states. It costs no bits, because an empty
  state has room for 16 bits. The rows before it become the stacks. A caller may pop
  symbols of almost 16 (C - 1) bits from every lane.
  """
  size = jnp.full(words.shape[1], words.shape[0] - 1, jnp.int32)
  state = words[-1].astype(jnp.uint32) | jnp.uint32(1 << 16)
  return Message(state, words.T, size)


def unstacked(message: Message) -> np.ndarray:
  """Returns the words that `stacked` made a message of. Not for use under `jit`."""
  state, size = np.asarray(message.state), np.asarray(message.size)
  if (state >> 16 != 1).any() or (size != size[0]).any():
    raise ValueError('the message is not one of words alone')
  rows = np.asarray(message.words)[:, : size[0]].T
  return np.concatenate([rows, state.astype(np.uint16)[None]])


def check(message: Message) -> Message:
  """Returns a message that never ran dry, or raises a ValueError. Not under `jit`."""
  if (np.asarray(message.size) < 0).any():
    raise ValueError('the message ran dry')
  return message


def content_bits(message: Message) -> float:
  """Returns the content of the message in bits. Not for use under `jit`.

  A word counts 16 bits, and a state x counts log2(x) - 16 bits.
  """
  states = np.log2(np.asarray(message.state, np.float64)) - 16
  return float(16 * np.asarray(message.size, np.int64).sum() + states.sum())


def to_words(message: Message) -> np.ndarray:
  """Serialises a message of fewer than 2^16 words a lane: uint16, the head last."""
  state, words, size = map(np.asarray, check(message))
  used = words[np.arange(words.shape[1]) < size[:, None]]
  return np.concatenate([used, state.view(np.uint16), size.astype(np.uint16)])


def from_words(pop: Callable[[int], np.ndarray], lanes: int, room: int) -> Message:
  """Makes a message from its words, the inverse of `to_words`.

  `pop` takes so many words from their end. Each lane gets `room` words, so all messages
  with as much room share a program. A ValueError says that it needs more room.
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

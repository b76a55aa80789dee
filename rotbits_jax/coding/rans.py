r"""Range asymmetric numeral systems (rANS), many lanes side by side.

A message is a stack of symbols: the symbol that was pushed last is popped first. It is
divided into lanes, which code independently of each other. Each lane has a state x in
[2^16, 2^32) and a stack of 16-bit words. A symbol owns an interval
[start, start + frequency) of [0, 2^precision); its probability is
frequency / 2^precision. To push it is to set

    x' = (x // frequency) * 2^precision + x % frequency + start.

If x' would not fit into 32 bits, the low 16 bits of x move to the stack first. To pop
undoes both steps. `push_step` and `pop_step` are these steps; everything that codes
uses them. They are integer arithmetic on uint32, so a message means the same on every
device. They are exact inverses in both orders. Therefore symbols may also be *popped*
from a message that holds other data, as bits-back coding does.

    >>> import jax.numpy as jnp
    >>> frequencies = jnp.array([1, 1023], jnp.uint32)  # 10 bits, and hardly any
    >>> starts = jnp.array([0, 1], jnp.uint32)
    >>> interval = lambda symbol: (starts[symbol], frequencies[symbol])
    >>> symbols = jnp.array([[1], [0], [1]])  # of one lane
    >>> message = push_all(empty(lanes=1, capacity=4), symbols, interval, precision=10)
    >>> round(content_bits(message))
    10
    >>> owner = lambda slot: (slot > 0).astype(jnp.int32)
    >>> lookup = lambda slot, _: (owner(slot), *interval(owner(slot)))
    >>> pop_all(message, None, lookup, precision=10, length=3)[1].tolist()
    [[1], [0], [1]]

All functions but those that say so are pure and can be jitted. A message overflows if a
lane needs more words than its capacity; it underflows, or runs dry, if a lane is asked
for more words than it has. Neither raises an error under `jit`. Both are recorded in
the message, and `check` raises the error on the host.

Shape letters: N lanes, C capacity of a lane's stack in words, T symbols of a lane.

References:
  J. Duda, Asymmetric numeral systems, arXiv 1311.2540.
  F. Giesen, Interleaved entropy coders, arXiv 1402.3392.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.system import native

Interval = tuple[jax.Array, jax.Array]
"""The start and the frequency of a symbol for each lane, uint32 `[N]`."""

Lookup = Callable[..., tuple[Any, jax.Array, jax.Array]]


class Message(NamedTuple):
  """A stack of coded symbols."""

  state: jax.Array  # uint32 [N], at least 2^16
  words: jax.Array  # uint16 [N, C], the stack of each lane from its bottom
  size: jax.Array  # int32 [N], words on each lane's stack
  lowest: jax.Array  # int32 [N], the least size so far; below 0 after underflow
  highest: jax.Array  # int32 [N], the greatest size so far; above C after overflow

  @property
  def lanes(self) -> int:
    return self.words.shape[0]

  @property
  def capacity(self) -> int:
    return self.words.shape[1]


class MessageError(ValueError):
  """Raised for a message that overflowed, that ran dry, or that is not valid."""


# ---- the two steps -------------------------------------------------------------------


def push_step(
  state: jax.Array, start: jax.Array, frequency: jax.Array, precision: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Pushes a symbol onto each state.

  Args:
    state: uint32 `[N]`.
    start: uint32 `[N]`, the start of each symbol's interval.
    frequency: uint32 `[N]`, the length of each interval, at least 1. A frequency of
      2^precision with start 0 does not change the lane.
    precision: the intervals divide [0, 2^precision); from 10 to 16.

  Returns:
    The new states, uint32 `[N]`; the low words of the old states, uint16 `[N]`; and
    whether each low word moves to its stack, bool `[N]`.
  """
  word = state.astype(jnp.uint16)
  moved = (state >> 16) >= (frequency << (16 - precision))
  state = jnp.where(moved, state >> 16, state)
  quotient, remainder = _divmod(state, frequency)
  return (quotient << precision) + remainder + start, word, moved


def pop_step(
  state: jax.Array,
  word: jax.Array,
  start: jax.Array,
  frequency: jax.Array,
  precision: int,
) -> tuple[jax.Array, jax.Array]:
  """Pops a symbol from each state: the inverse of `push_step`.

  Args:
    state: uint32 `[N]`.
    word: uint16 `[N]`, the word on top of each stack.
    start: uint32 `[N]`, start of the interval that contains the slot of the state. The
      slot is the low `precision` bits.
    frequency: uint32 `[N]`, length of that interval.
    precision: as in `push_step`.

  Returns:
    The new states, uint32 `[N]`; and whether each took its word, bool `[N]`.
  """
  state = frequency * (state >> precision) + _slot(state, precision) - start
  taken = state < jnp.uint32(1 << 16)
  return jnp.where(taken, state << 16 | word.astype(jnp.uint32), state), taken


def _slot(state: jax.Array, precision: int) -> jax.Array:
  return state & jnp.uint32((1 << precision) - 1)


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


def _check_precision(precision: int) -> None:
  """Raises an error unless the precision is from 10 to 16.

  A push divides a state by a frequency. The quotient is below 2^(32 - precision), and
  `_divmod` needs a quotient below 2^22.
  """
  if not 10 <= precision <= 16:
    raise ValueError(f'precision must be from 10 to 16, got {precision=}')


# ---- messages ------------------------------------------------------------------------


def empty(lanes: int, capacity: int) -> Message:
  """Returns a message without content; each lane has room for `capacity` words."""
  return stacked(jnp.zeros((1, lanes), jnp.uint16), capacity)


def stacked(words: jax.Array, capacity: int) -> Message:
  """Returns a message that holds the given words.

  The last row becomes the low halves of the states. It costs no bits, because an empty
  state has room for 16 bits. The rows before it become the stacks. A caller may pop
  symbols of almost 16 (W - 1) bits from every lane.

  Args:
    words: uint16 `[W, N]`, with W from 1 to C + 1.
    capacity: C, at least 1.
  """
  if capacity < 1:
    raise ValueError(f'capacity must be at least 1, got {capacity=}')
  depth, lanes = words.shape[0] - 1, words.shape[1]
  size = jnp.full(lanes, depth, jnp.int32)
  stacks = jnp.zeros((lanes, capacity), jnp.uint16).at[:, :depth].set(words[:-1].T)
  state = words[-1].astype(jnp.uint32) | jnp.uint32(1 << 16)
  return Message(state, stacks, size, size, size)


def unstacked(message: Message) -> np.ndarray:
  """Returns the words that `stacked` made a message of. Not for use under `jit`.

  Raises:
    MessageError: if `stacked` cannot have made it.
  """
  state, size = np.asarray(message.state), np.asarray(message.size)
  if (state >> 16 != 1).any() or (size != size[0]).any():
    raise MessageError('the message is not one of words alone')
  rows = np.asarray(message.words)[:, : size[0]].T
  return np.concatenate([rows, state.astype(np.uint16)[None]])


# ---- symbols -------------------------------------------------------------------------


def push_all(
  message: Message,
  symbols: Any,
  interval: Callable[[Any], Interval],
  precision: int,
) -> Message:
  """Pushes T symbols onto each lane, the last one first.

  In this order, `pop_all` returns the first one first.

  Args:
    message: the message.
    symbols: a PyTree of arrays `[T, ...]`.
    interval: takes the symbols of one row; returns their starts and frequencies.
    precision: as in `push_step`.

  Returns:
    The message with the symbols on top.
  """
  _check_precision(precision)
  total = len(jax.tree.leaves(symbols)[0])

  def rows(state: jax.Array, symbols: Any, out: Any) -> Any:
    def step(i: jax.Array, carry: Any) -> Any:
      state, out = carry
      start, frequency = interval(_row(symbols, total - 1 - i))
      state, *found = push_step(state, start, frequency, precision)
      return state, _with_row(out, i, tuple(found))

    return jax.lax.fori_loop(0, total, step, (state, out)) if total else (state, out)

  out = tuple(jnp.zeros((total, message.lanes), x) for x in (jnp.uint16, bool))
  state, found = native.loop(rows)(message.state, symbols, out)
  words, moved = found
  # A word that does not move is put beyond the capacity, and dropped.
  counts = jnp.cumsum(moved, axis=0, dtype=jnp.int32)
  place = jnp.where(moved, message.size[None] + counts - 1, message.capacity)
  lane = jnp.arange(message.lanes, dtype=jnp.int32)[None]
  stacks = message.words.at[lane, place].set(words, mode='drop')
  size = message.size + counts[-1] if total else message.size
  highest = jnp.maximum(message.highest, size)
  return Message(state, stacks, size, message.lowest, highest)


def pop_all(
  message: Message,
  contexts: Any,
  lookup: Lookup,
  precision: int,
  *,
  length: int | None = None,
) -> tuple[Message, Any]:
  """Pops T symbols from each lane: the inverse of `push_all`.

  Args:
    message: the message.
    contexts: a PyTree of arrays `[T, ...]`, or None.
    lookup: takes one slot for each lane, uint32 `[N]`, an integer in
      [0, 2^precision); and the contexts of one row. Returns the symbols whose intervals
      contain the slots, and the starts and frequencies of these intervals.
    precision: as in `push_step`.
    length: T; needed only if `contexts` is None.

  Returns:
    The message without the symbols, and the symbols, `[T, ...]`.
  """
  _check_precision(precision)
  total = len(jax.tree.leaves(contexts)[0]) if length is None else length

  def rows(state: jax.Array, size: jax.Array, words: jax.Array, contexts: Any) -> Any:
    def symbols(state: jax.Array, context: Any) -> Any:
      return lookup(_slot(state, precision), context)

    def step(t: jax.Array, carry: Any) -> Any:
      state, size, out = carry
      symbol, start, frequency = symbols(state, _row(contexts, t))
      word = _top(words, size)
      state, taken = pop_step(state, word, start, frequency, precision)
      return state, size - taken.astype(jnp.int32), _with_row(out, t, symbol)

    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), contexts)
    shapes = jax.eval_shape(symbols, state, row)[0]
    out = jax.tree.map(lambda x: jnp.zeros((total, *x.shape), x.dtype), shapes)
    carry = state, size, out
    return jax.lax.fori_loop(0, total, step, carry) if total else carry

  state, size, popped = native.loop(rows)(
    message.state, message.size, message.words.reshape(-1), contexts
  )
  lowest = jnp.minimum(message.lowest, size)
  return Message(state, message.words, size, lowest, message.highest), popped


def _top(words: jax.Array, size: jax.Array) -> jax.Array:
  """Returns the word on top of each stack, or any word if the stack is empty."""
  capacity = words.size // size.size
  start = jnp.arange(size.size, dtype=jnp.int32) * capacity
  index = start + jnp.clip(size, 1, capacity) - 1
  return words.at[index].get(mode='promise_in_bounds')


def _row(rows: Any, i: jax.Array) -> Any:
  take = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
  return jax.tree.map(take, rows)


def _with_row(rows: Any, i: jax.Array, row: Any) -> Any:
  put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0)
  return jax.tree.map(put, rows, row)


# ---- on the host ---------------------------------------------------------------------


def check(message: Message) -> Message:
  """Returns the message if it never overflowed nor ran dry. Not for use under `jit`.

  Raises:
    MessageError: if it did. The error says how many bits were missing, or by how many
      words a lane exceeded its capacity.
  """
  missing = -np.minimum(np.asarray(message.lowest), 0).sum()
  if missing:
    raise MessageError(f'the message ran dry: {16 * missing} bits were missing')
  excess = int(np.asarray(message.highest).max(initial=0)) - message.capacity
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
  """Returns the content of the message in bits. Not for use under `jit`.

  A word counts 16 bits, and a state x counts log2(x) - 16 bits.
  """
  states = np.log2(np.asarray(message.state, np.float64)) - 16
  return float(16 * np.asarray(message.size, np.int64).sum() + states.sum())


def to_words(message: Message) -> np.ndarray:
  """Serialises a message into uint16 words; `split_words` describes them.

  Raises:
    MessageError: if the message overflowed or ran dry, or if its lanes' sizes differ
      by 2^16 or more.
  """
  check(message)
  size = np.asarray(message.size)
  used = np.arange(message.capacity) < size[:, None]
  return join_words(np.asarray(message.state), size, np.asarray(message.words)[used])


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
  state, size, stacks = split_words(words, lanes)
  if stacks.size != size.sum():
    raise MessageError(f'the words are not a message with {lanes} lanes')
  depth = int(np.max(size, initial=1))
  capacity = depth if capacity is None else capacity
  if depth > capacity:
    raise MessageError(f'a lane has {depth} words, but its capacity is {capacity}')
  rows = np.zeros((lanes, capacity), np.uint16)
  rows[np.arange(capacity) < size[:, None]] = stacks
  size32 = jnp.asarray(size, jnp.int32)
  return Message(jnp.asarray(state), jnp.asarray(rows), size32, size32, size32)


def join_words(state: np.ndarray, size: np.ndarray, stacks: np.ndarray) -> np.ndarray:
  """Serialises the parts of a message: the inverse of `split_words`."""
  base = int(size.min()) if size.size else 0
  excess = size - base
  if excess.max(initial=0) > 0xFFFF:
    raise MessageError('the sizes of the lanes differ by 2^16 or more words')
  width = 1 if excess.max(initial=0) <= 0xFF else 2
  packed = excess.astype(f'<u{width}').view(np.uint8)
  packed = np.pad(packed, (0, packed.size % 2)).view('<u2')
  low, high = state.astype(np.uint16), (state >> 16).astype(np.uint16)
  head = np.array([base & 0xFFFF, base >> 16, width], np.uint16)
  return np.concatenate([head, low, high, packed, stacks])


def split_words(
  words: np.ndarray, lanes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Finds the parts of a serialised message in its words.

  The words are, in this order:

  * the least size of a lane's stack, 2 words, the low half first;
  * b, the number of bytes of a size below: 1 word, 1 or 2;
  * the low halves of the states, N words, then their high halves, N words;
  * the size of each stack minus the least size, b bytes each, padded to whole words;
  * the stacks, lane after lane, each from its bottom.

  Args:
    words: uint16.
    lanes: N.

  Returns:
    The states, uint32 `[N]`; the sizes, int64 `[N]`; and the other words, which begin
    with the stacks.

  Raises:
    MessageError: if the words are not a message with N lanes.
  """
  width = int(words[2]) if words.size > 2 else 0
  start = 3 + 2 * lanes  # where the sizes begin
  stop = start + -(-lanes * width // 2)
  if width not in (1, 2) or words.size < stop:
    raise MessageError(f'the words are not a message with {lanes} lanes')
  base = int(words[0]) | int(words[1]) << 16
  low, high = words[3:start].astype(np.uint32).reshape(2, lanes)
  size = words[start:stop].view(f'<u{width}')[:lanes].astype(np.int64) + base
  if not high.all():
    raise MessageError(f'the words are not a message with {lanes} lanes')
  return low | high << 16, size, words[stop:]

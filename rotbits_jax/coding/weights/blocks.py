"""Blocks of numbers: the programs that code them, and their bytes.

Number i of a block is number i // n of lane i % n, so that a step of all lanes reads
and writes a row of n neighbours. Every lane is a rANS coder with 16-bit words, see
`rans`, that starts from the state 0, and the decoder ends there. (A message of `rans`
starts from 2^16. The decoder of a block needs no such bound, because it knows how many
words a lane has. This saves a byte a lane.) A program always runs N lanes. Those beyond
n decode what is not used, and the next row overwrites it. All blocks of a layout share
a program, because the numbers of lanes and steps are arguments.

Shape letters: N lanes of the program, n lanes in use, T steps, S capacity in numbers.
"""

from collections.abc import Callable
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import numbers
from rotbits_jax.coding.weights import planes

LANES = 64
"""N."""

CAPACITY = 1 << 20
"""The most numbers of a block."""

STEPS = 1 << 14
"""The most steps of a block."""

_SMALL = 1 << 14  # the capacity of the programs of small blocks


class Tables(NamedTuple):
  """Frequency tables as the programs use them.

  Their count K is 16, 64, 256 or 1024, so that few sizes are compiled. The last table
  stands where there is no number.
  """

  intervals: np.ndarray  # uint32 [K, A], see tables.pack_intervals
  slots: np.ndarray | None  # uint8 or uint16 [K, 2^14], see tables.slots

  @property
  def void(self) -> int:
    return self.intervals.shape[0] - 1

  @property
  def context_dtype(self) -> np.dtype:
    return np.dtype(np.uint8 if self.void < 256 else np.uint16)


def tables_of(frequencies: np.ndarray, decoding: bool) -> Tables:
  """The tables of frequencies, int64 `[K, A]`; rows of zeros are not used."""
  count = next(size for size in (16, 64, 256, 1024) if size > len(frequencies))
  padded = np.zeros((count, frequencies.shape[1]), np.int64)
  padded[: len(frequencies)] = frequencies
  unused = ~padded.any(axis=1)
  padded[unused, 0] = tables.TOTAL
  slots = numbers.aligned_copy(tables.slots(padded)) if decoding else None
  intervals = tables.pack_intervals(padded)
  # A symbol that is certain takes no bits and leaves a lane as it is: here, any symbol.
  intervals[unused] = intervals[unused, :1]
  return Tables(numbers.aligned_copy(intervals), slots)


def lanes_for(count: int, layout: layouts.Layout) -> int:
  """How many lanes blocks of so many numbers use.

  A lane costs about 3 bytes, and a program takes as long for one as for N. Of about as
  many lanes, those are taken that waste least at the ends of planes.
  """
  most = min(max(count // 4096, 1), LANES)
  allowed = [n for n in range(max(most - 7, 1), most + 1) if -(-count // n) <= STEPS]
  return min(reversed(allowed), key=lambda n: 2 * n + rest_size(count, n, layout))


def rest_size(count: int, lanes: int, layout: layouts.Layout) -> int:
  """The bytes of the rests of a block of so many numbers."""
  return sum(planes.sizes(count, lanes, layout.rest))


def decode_block(
  out: jax.Array,
  words: jax.Array,
  states: jax.Array,
  starts: jax.Array,
  ends: jax.Array,
  contexts: jax.Array,
  rests: jax.Array,
  plane_starts: jax.Array,
  intervals: jax.Array,
  slots: jax.Array,
  lanes: jax.Array,
  steps: jax.Array,
  layout_step: jax.Array,
  *,
  layout: layouts.Layout,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Decodes a block. Pure, for one block: `vmap` it for more.

  Args:
    out: unsigned `[S + 2 N]`, of the layout, to be written to.
    words: uint16 `[S]`, each lane's in the order in which it reads them.
    states: uint32 `[N]`.
    starts: int32 `[N]`, where each lane's words start.
    ends: int32 `[N]`, where they end.
    contexts: uint8 or uint16 `[S + 2 N]`, the table of each number.
    rests: uint8, see `planes.read`.
    plane_starts: int32, likewise.
    intervals: see `Tables`.
    slots: see `Tables`.
    lanes: int32, n.
    steps: int32, T.
    layout_step: int32, the step of the numbers' layout.
    layout: `Layout.program` of that layout.

  Returns:
    `out` with the numbers' bit patterns; the states, and where each lane stopped.
  """
  count, alphabet = states.shape[0], intervals.shape[1]
  entries, owners = intervals.reshape(-1), slots.reshape(-1)
  mask, last = jnp.uint32(tables.TOTAL - 1), words.shape[0] - 1

  def step(
    t: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    out, state, position = carry
    row = t * lanes
    context = jax.lax.dynamic_slice(contexts, (row,), (count,)).astype(jnp.uint32)
    slot = state & mask
    owner = context << tables.PRECISION | slot
    symbol = owners.at[owner].get(mode='promise_in_bounds').astype(jnp.uint32)
    entry = entries.at[context * alphabet + symbol].get(mode='promise_in_bounds')
    frequency, start = (entry >> 16) + 1, entry & 0xFFFF
    state, dry = rans.pop_state(state, start, frequency, tables.PRECISION)
    dry &= position < ends
    word = words.at[jnp.minimum(position, last)].get(mode='promise_in_bounds')
    state = jnp.where(dry, (state << 16) | word.astype(jnp.uint32), state)
    rest = planes.read(
      rests, plane_starts, t, lanes, layout.rest, layout.unsigned, count
    )
    patterns = layout.join(symbol, rest, layout_step)
    out = jax.lax.dynamic_update_slice(out, patterns, (row,))
    return out, state, position + dry.astype(jnp.int32)

  return jax.lax.fori_loop(0, steps, step, (out, states, starts))


def encode_block(
  words: jax.Array,
  moved: jax.Array,
  bits: jax.Array,
  contexts: jax.Array,
  intervals: jax.Array,
  lanes: jax.Array,
  steps: jax.Array,
  layout_step: jax.Array,
  *,
  layout: layouts.Layout,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Encodes a block: the inverse of `decode_block`.

  Args:
    words: uint16 `[T, N]`, of the greatest T, to be written to.
    moved: bool, likewise.
    bits: unsigned `[S + 2 N]`, the numbers' bit patterns.
    contexts: as in `decode_block`.
    intervals: as in `decode_block`.
    lanes: int32, n.
    steps: int32, T.
    layout_step: as in `decode_block`.
    layout: as in `decode_block`.

  Returns:
    For each number, the word that the lane may have moved away and whether it has, in
    steps from 0 to T; uint32 `[N]`, the states; unsigned `[S + 2 N]`, the rests.
  """
  count, alphabet = LANES, intervals.shape[1]
  symbols, rests = layout.split(bits, layout_step)
  entries = intervals.reshape(-1)

  def step(
    i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    words, moved, state = carry
    t = steps - 1 - i
    row = t * lanes
    context = jax.lax.dynamic_slice(contexts, (row,), (count,)).astype(jnp.uint32)
    symbol = jax.lax.dynamic_slice(symbols, (row,), (count,)).astype(jnp.uint32)
    entry = entries.at[context * alphabet + symbol].get(mode='promise_in_bounds')
    frequency, start = (entry >> 16) + 1, entry & 0xFFFF
    low = state.astype(jnp.uint16)
    state, full = rans.push_state(state, start, frequency, tables.PRECISION)
    words = jax.lax.dynamic_update_slice(words, low[None], (t, 0))
    moved = jax.lax.dynamic_update_slice(moved, full[None], (t, 0))
    return words, moved, state

  state = jnp.zeros(count, jnp.uint32)
  words, moved, state = jax.lax.fori_loop(0, steps, step, (words, moved, state))
  return words, moved, state, rests


def count_block(
  bits: jax.Array,
  contexts: jax.Array,
  layout_step: jax.Array,
  *,
  layout: layouts.Layout,
  labels: int,
) -> jax.Array:
  """How often each symbol occurs in each context.

  Args:
    bits: unsigned `[S + 2 N]`, bit patterns.
    contexts: uint8, likewise: below `labels`, or `labels` where there is no number.
    layout_step: as in `decode_block`.
    layout: as in `decode_block`.
    labels: bound of the contexts.

  Returns:
    int32 `[labels, A]`.
  """
  symbols, _ = layout.split(bits, layout_step)
  index = contexts.astype(jnp.int32) * layout.alphabet + symbols.astype(jnp.int32)
  counts = jnp.zeros((labels + 1) * layout.alphabet, jnp.int32)
  width = 2 * LANES  # divides [S + 2 N]
  grid = index.reshape(-1, width)
  add = lambda i, x: x.at[grid[i]].add(1, mode='promise_in_bounds')
  counts = jax.lax.fori_loop(0, grid.shape[0], add, counts)
  return counts.reshape(-1, layout.alphabet)[:-1]


# ---- one block on the host -----------------------------------------------------------

Fill = Callable[[np.ndarray, np.ndarray], None]
"""Writes the bit patterns and the contexts of a block's numbers."""


def encode(
  fill: Fill, count: int, lanes: int, layout: layouts.Layout, made: Tables
) -> tuple[np.ndarray, np.ndarray]:
  """Encodes a block on this thread.

  Args:
    fill: writes the numbers and their contexts into arrays `[count]`.
    count: of numbers, at least 1, in at most `STEPS` steps.
    lanes: n.
    layout: of the numbers.
    made: the tables.

  Returns:
    The states, sizes and words of the lanes, see `decode`, and the planes of the rests:
    uint8 each.
  """
  steps, memory = -(-count // lanes), _buffers(count)
  bits, contexts = memory.numbers(layout.unsigned), memory.contexts(made, count)
  fill(bits[:count], contexts[:count])
  words, moved, state, rests = _encode(
    memory.take('words', jnp.uint16),
    memory.take('moved', jnp.bool_),
    bits,
    contexts,
    made.intervals,
    np.int32(lanes),
    np.int32(steps),
    np.int32(layout.step),
    layout=layout.program,
  )
  # Lane by lane: what the decoder reads first is first.
  used = np.ascontiguousarray(np.asarray(moved)[:steps, :lanes].T)
  stream = np.ascontiguousarray(np.asarray(words)[:steps, :lanes].T)[used]
  sizes = np.count_nonzero(used, axis=1)
  memory.keep('words', words)
  memory.keep('moved', moved)
  least = int(sizes.min())
  width = 1 if int(sizes.max()) - least < 256 else 2
  packed = (sizes - least).astype(f'<u{width}').view(np.uint8)
  parts = [
    np.asarray(state)[:lanes].astype('<u4').view(np.uint8),
    np.array([least, width], '<u2').view(np.uint8),
    np.pad(packed, (0, packed.size % 2)),
    stream.astype('<u2', copy=False).view(np.uint8),
  ]
  packed_rests = planes.pack(np.asarray(rests)[:count], lanes, layout.rest)
  return np.concatenate(parts), packed_rests


def decode(
  coded: np.ndarray,
  rests: np.ndarray,
  fill: Callable[[np.ndarray], None],
  write: Callable[[np.ndarray], None],
  count: int,
  lanes: int,
  layout: layouts.Layout,
  made: Tables,
) -> None:
  """Decodes a block on this thread: the inverse of `encode`.

  Args:
    coded: uint8: the states, uint32 `[n]`; the least size, uint16; the bytes b of a
      size, 1 or 2, uint16; the sizes in words less the least one, b bytes each, and a
      byte 0 if that makes an odd number; the words of lane after lane, uint16. All
      with the low byte first.
    rests: uint8, `sum(planes.sizes(count, lanes, layout.rest))`.
    fill: writes the contexts of the numbers into an array `[count]`.
    write: takes the bit patterns, unsigned `[count]`, and copies them.
    count: as in `encode`.
    lanes: as in `encode`.
    layout: as in `encode`.
    made: the tables.

  Raises:
    ValueError: if the bytes are not a block of so many numbers.
  """
  head = 4 * lanes + 4
  if coded.size < head or coded.size % 2:
    raise ValueError(f'{coded.size} bytes are not a block of {lanes} lanes')
  least, width = coded[4 * lanes : head].view('<u2').tolist()
  stop = head + -(-lanes * width // 2) * 2
  if width not in (1, 2) or coded.size < stop:
    raise ValueError('the sizes of the lanes of a block are damaged')
  sizes = coded[head : head + lanes * width].view(f'<u{width}').astype(np.int32) + least
  steps, memory = -(-count // lanes), _buffers(count)
  if 2 * int(sizes.sum()) != coded.size - stop or int(sizes.max()) > steps:
    raise ValueError('the sizes of the lanes of a block are damaged')
  words = memory.host('words', memory.capacity + LANES, np.uint16)
  words[: (coded.size - stop) // 2] = coded[stop:].view('<u2')
  states = np.zeros(LANES, np.uint32)
  states[:lanes] = coded[: 4 * lanes].view('<u4')
  starts, ends = np.zeros((2, LANES), np.int32)
  ends[:lanes] = np.cumsum(sizes)
  starts[:lanes] = ends[:lanes] - sizes
  plane_sizes = planes.sizes(count, lanes, layout.rest)
  # A plane may be rounded up to whole rows, and a row is read to its end.
  room = memory.capacity * layout.rest // 8 + (2 * len(plane_sizes) + 1) * LANES
  noise = memory.host('rests', room, np.uint8)
  noise[: rests.size] = rests
  contexts = memory.contexts(made, count)
  fill(contexts[:count])
  out, state, position = _decode(
    memory.take('out', layout.unsigned),
    words,
    states,
    starts,
    ends,
    contexts,
    noise,
    np.cumsum([0, *plane_sizes], dtype=np.int32)[:-1],
    made.intervals,
    made.slots,
    np.int32(lanes),
    np.int32(steps),
    np.int32(layout.step),
    layout=layout.program,
  )
  ended = np.asarray(position) == ends
  write(np.asarray(out)[:count])
  memory.keep('out', out)
  if not (ended[:lanes].all() and not np.asarray(state)[:lanes].any()):
    raise ValueError('the lanes of a block do not hold just its numbers')


def count(fill: Fill, count: int, layout: layouts.Layout, labels: int) -> np.ndarray:
  """How often each symbol of a block occurs under each label, on this thread.

  Args:
    fill: as in `encode`, with labels for contexts.
    count: of numbers.
    layout: of the numbers.
    labels: bound of the labels, at most 255.

  Returns:
    int64 `[labels, A]`.
  """
  memory = _buffers(count)
  padded = next(size for size in (1, 15, 63, 255) if size >= labels)
  bits = memory.numbers(layout.unsigned)
  contexts = memory.host('labels', memory.capacity + 2 * LANES, np.uint8)
  contexts[count:] = padded
  fill(bits[:count], contexts[:count])
  counts = _count(
    bits, contexts, np.int32(layout.step), layout=layout.program, labels=padded
  )
  return np.asarray(counts)[:labels].astype(np.int64)


class _Buffers:
  """Memory for a block that a thread keeps and uses again, zeros at first.

  Fresh memory costs more than what is done with it here, and XLA takes an aligned
  buffer without a copy.
  """

  def __init__(self, capacity: int) -> None:
    self.capacity = capacity
    self._host: dict[tuple[str, str], np.ndarray] = {}
    self._donated: dict[tuple[str, str], jax.Array] = {}

  def host(self, name: str, count: int, dtype: np.dtype | type) -> np.ndarray:
    """NumPy's buffer of this name, at least so long."""
    key = name, np.dtype(dtype).name
    if key not in self._host or self._host[key].size < count:
      self._host[key] = numbers.aligned(count, dtype)
    return self._host[key]

  def numbers(self, dtype: np.dtype) -> np.ndarray:
    return self.host('numbers', self.capacity + 2 * LANES, dtype)

  def contexts(self, made: Tables, count: int) -> np.ndarray:
    """For contexts; those of places without a number are set."""
    size = self.capacity + 2 * LANES
    contexts = self.host('contexts', size, made.context_dtype)
    contexts[count : count + 2 * LANES] = made.void
    return contexts

  def take(self, name: str, dtype: Any) -> jax.Array:
    """JAX's buffer, to be donated, and given back by `keep`."""
    if name == 'out':
      shape: tuple[int, ...] = (self.capacity + 2 * LANES,)
    else:
      shape = (STEPS, LANES)
    array = self._donated.pop((name, np.dtype(dtype).name), None)
    return jnp.zeros(shape, dtype) if array is None else array

  def keep(self, name: str, array: jax.Array) -> None:
    self._donated[name, array.dtype.name] = array


_local = threading.local()


def _buffers(count: int) -> _Buffers:
  """This thread's buffers for a block of so many numbers."""
  capacity = _SMALL if count <= _SMALL else CAPACITY
  own = _local.__dict__.setdefault('buffers', {})
  if capacity not in own:
    own[capacity] = _Buffers(capacity)
  return own[capacity]


_decode = jax.jit(decode_block, static_argnames='layout', donate_argnums=0)
_encode = jax.jit(encode_block, static_argnames='layout', donate_argnums=(0, 1))
_count = jax.jit(count_block, static_argnames=('layout', 'labels'))

"""Blocks of numbers: the programs that code them, and their bytes.

A block is a run of numbers that is coded on its own. Number i of a block is number
i // n of lane i % n. So in each step the lanes read and write a row of n neighbouring
numbers. Each number has a symbol, which is coded with the frequency table of its
context, and a rest, which is stored in planes (see `planes`).

A lane is a rANS coder with 16-bit words, see `rans`. The encoder of a lane starts from
the state 0, and its decoder ends there. (A message of `rans` starts from 2^16 instead.
The decoder of a block needs no such bound, because it knows how many words a lane has.
This saves a byte per lane.)

The blocks of a layout share compiled programs, because the number of lanes and the
number of steps are arguments. A program always runs N lanes. The results of lanes from
n on are not used; the next row overwrites them.

Shape letters: N lanes of the program, n lanes in use, T steps, S capacity in numbers,
K tables, A symbols in the alphabet.
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
from rotbits_jax.system import host

LANES = 64
"""The greatest n, and N of the programs that encode."""

_DECODER_LANES = (LANES // 2, LANES)  # N of the programs that decode

CAPACITY = 1 << 20
"""The greatest number of numbers in a block."""

STEPS = 1 << 14
"""The greatest number of steps in a block."""

_SMALL = 1 << 14  # the capacity of the programs of small blocks

# The room for the words of a lane. It is no multiple of a large power of two, because
# the words of all lanes would then compete for the same places in the CPU's cache.
_ROW = STEPS + 96


class Tables(NamedTuple):
  """Frequency tables in the form that the programs use.

  Their number K is 16, 64, 256 or 1024, so that programs for few sizes are compiled.
  The last table is the context of places without a number.
  """

  intervals: np.ndarray  # uint32 [K, A], see tables.pack_intervals
  slots: np.ndarray | None  # uint8 or uint16 [K, 2^14], see tables.slots

  @property
  def void(self) -> int:
    return self.intervals.shape[0] - 1

  @property
  def context_dtype(self) -> np.dtype:
    return np.dtype(np.uint8 if self.void < 256 else np.uint16)


def padded_count(count: int) -> int:
  """Returns the K of `Tables` for a number of tables below 1024."""
  return next(size for size in (16, 64, 256, 1024) if size > count)


def tables_of(frequencies: np.ndarray, decoding: bool) -> Tables:
  """Makes the tables of some frequencies.

  Args:
    frequencies: int64 `[k, A]` with k < 1024. A row of zeros is a table that is not
      used.
    decoding: whether to compute the slots, which only the decoder needs.
  """
  count, alphabet = padded_count(len(frequencies)), frequencies.shape[1]
  (used,) = np.nonzero(frequencies.any(axis=1))
  frequencies = frequencies[used]
  # In an unused table every symbol owns the whole interval. Coding it costs no bits and
  # does not change the lane.
  intervals = host.empty((count, alphabet), np.uint32)
  intervals[...] = (tables.TOTAL - 1) << 16
  intervals[used] = tables.pack_intervals(frequencies)
  if not decoding:
    return Tables(intervals, None)
  owners = tables.slots(frequencies)
  slots = host.empty((count, tables.TOTAL), owners.dtype)
  slots[...] = 0
  slots[used] = owners
  return Tables(intervals, slots)


def lanes_for(count: int) -> int:
  """Returns the number of lanes for blocks of `count` numbers.

  A step of a program takes equally long for any n, so more lanes are faster. A lane
  costs about 3 bytes, so a block of few numbers gets fewer lanes.
  """
  return min(max(count // 4096, 1), LANES)


def rest_size(count: int, lanes: int, layout: layouts.Layout) -> int:
  """Returns the number of bytes of the rests in a block of `count` numbers."""
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
  """Decodes one block. The function is pure; `vmap` it to decode more.

  Args:
    out: unsigned integers `[S + 2 N]` of the layout. The numbers are written into it.
    words: uint16 `[S]`, the words of all lanes. The words of a lane are consecutive, in
      the order in which the lane reads them.
    states: uint32 `[N]`.
    starts: int32 `[N]`, where the words of each lane start.
    ends: int32 `[N]`, where the words of each lane end.
    contexts: uint8 or uint16 `[S + 2 N]`, the index of each number's table.
    rests: uint8, the planes; see `planes.read`.
    plane_starts: int32, where each plane starts; see `planes.read`.
    intervals: see `Tables`.
    slots: see `Tables`.
    lanes: int32, n.
    steps: int32, T.
    layout_step: int32, the step of the numbers' layout.
    layout: `Layout.program` of that layout.

  Returns:
    `out` with the bit patterns of the numbers; the states, uint32 `[N]`; and the place
    in `words` where each lane stopped, int32 `[N]`.
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
  """Encodes one block: the inverse of `decode_block`.

  Args:
    words: uint16 `[N, _ROW]`, an array to write into.
    moved: bool `[N, _ROW]`, an array to write into.
    bits: unsigned integers `[S + 2 N]`, the bit patterns of the numbers.
    contexts: as in `decode_block`.
    intervals: as in `decode_block`.
    lanes: int32, n.
    steps: int32, T.
    layout_step: as in `decode_block`.
    layout: as in `decode_block`.

  Returns:
    `words` with the low 16 bits of each state before each step; `moved`, which tells
    whether the lane moved these bits to its words; the states, uint32 `[N]`; and the
    rests, unsigned integers `[S + 2 N]`. Only the steps below T are set.
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
    words = jax.lax.dynamic_update_slice(words, low[:, None], (0, t))
    moved = jax.lax.dynamic_update_slice(moved, full[:, None], (0, t))
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
  """Counts how often each symbol occurs in each context.

  Args:
    bits: unsigned integers `[S + 2 N]`, the bit patterns of the numbers.
    contexts: uint8 `[S + 2 N]`, below `labels`; equal to `labels` at places without a
      number.
    layout_step: as in `decode_block`.
    layout: as in `decode_block`.
    labels: the number of contexts.

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
"""A function that writes the bit patterns and the contexts of a block's numbers."""


def encode(
  fill: Fill, count: int, lanes: int, layout: layouts.Layout, made: Tables
) -> tuple[np.ndarray, np.ndarray]:
  """Encodes a block on this thread.

  Args:
    fill: writes the bit patterns and the contexts of the numbers into two arrays
      `[count]`.
    count: number of numbers, from 1 to `CAPACITY`; at most `STEPS` for each lane.
    lanes: n.
    layout: layout of the numbers.
    made: the tables.

  Returns:
    Two arrays of uint8: the states, sizes and words of the lanes, see `decode`; and the
    planes of the rests.
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
  # The words of a lane are consecutive, in the order in which the decoder reads them.
  used = np.asarray(moved)[:lanes, :steps]
  stream = np.asarray(words)[:lanes, :steps][used]
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
    coded: uint8. In this order: the states, uint32 `[n]`; the least size of a lane in
      words, uint16; b, the bytes of a size below, 1 or 2, uint16; the sizes of the
      lanes minus the least size, b bytes each; a byte 0 if the sizes have an odd number
      of bytes; the words of lane after lane, uint16. All have the low byte first.
    rests: uint8 `[rest_size(count, lanes, layout)]`, the planes of the rests.
    fill: writes the contexts of the numbers into an array `[count]`.
    write: takes the bit patterns, unsigned integers `[count]`, and copies them. The
      array is valid only until `write` returns.
    count: as in `encode`.
    lanes: as in `encode`.
    layout: as in `encode`.
    made: the tables.

  Raises:
    ValueError: if the bytes are not a block of `count` numbers.
  """
  head = 4 * lanes + 4
  if coded.size < head or coded.size % 2:
    raise ValueError(f'{coded.size} bytes are not a block with {lanes} lanes')
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
  run = next(n for n in _DECODER_LANES if n >= lanes)
  states = np.zeros(run, np.uint32)
  states[:lanes] = coded[: 4 * lanes].view('<u4')
  starts, ends = np.zeros((2, run), np.int32)
  ends[:lanes] = np.cumsum(sizes)
  starts[:lanes] = ends[:lanes] - sizes
  plane_sizes = planes.sizes(count, lanes, layout.rest)
  # The room is greater than the planes, because a plane may be rounded up to whole rows
  # and because a read always takes N bytes.
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
    raise ValueError('the lanes of a block hold more or less than its numbers')


def count(fill: Fill, count: int, layout: layouts.Layout, labels: int) -> np.ndarray:
  """Counts how often each symbol of a block occurs with each label, on this thread.

  Args:
    fill: as in `encode`; it writes labels in place of contexts.
    count: number of numbers.
    layout: layout of the numbers.
    labels: the number of labels, at most 255.

  Returns:
    int64 `[labels, A]`.
  """
  memory = _buffers(count)
  padded = next(size for size in (15, 63, 255) if size >= labels)
  bits = memory.numbers(layout.unsigned)
  contexts = memory.host('labels', memory.capacity + 2 * LANES, np.uint8)
  contexts[count:] = padded
  fill(bits[:count], contexts[:count])
  counts = _count(
    bits, contexts, np.int32(layout.step), layout=layout.program, labels=padded
  )
  return np.asarray(counts)[:labels].astype(np.int64)


class _Buffers:
  """Memory for a block, which a thread keeps and uses again. It is zero at first.

  It is kept because fresh memory costs more time than the work on it does. It is
  aligned because XLA then uses it without a copy.
  """

  def __init__(self, capacity: int) -> None:
    self.capacity = capacity
    self._host: dict[tuple[str, np.dtype], np.ndarray] = {}
    self._donated: dict[tuple[str, np.dtype], jax.Array] = {}

  def host(self, name: str, count: int, dtype: np.dtype | type) -> np.ndarray:
    """Returns the NumPy buffer of this name, with at least `count` entries."""
    key = name, np.dtype(dtype)
    if key not in self._host or self._host[key].size < count:
      self._host[key] = numbers.aligned(count, dtype)
    return self._host[key]

  def numbers(self, dtype: np.dtype) -> np.ndarray:
    return self.host('numbers', self.capacity + 2 * LANES, dtype)

  def contexts(self, made: Tables, count: int) -> np.ndarray:
    """Returns a buffer for contexts, set to `void` at places without a number."""
    size = self.capacity + 2 * LANES
    contexts = self.host('contexts', size, made.context_dtype)
    contexts[count : count + 2 * LANES] = made.void
    return contexts

  def take(self, name: str, dtype: Any) -> jax.Array:
    """Returns a JAX buffer to donate; `keep` gives the result back."""
    if name == 'out':
      shape: tuple[int, ...] = (self.capacity + 2 * LANES,)
    else:
      shape = (LANES, _ROW)
    array = self._donated.pop((name, np.dtype(dtype)), None)
    return jnp.zeros(shape, dtype) if array is None else array

  def keep(self, name: str, array: jax.Array) -> None:
    self._donated[name, array.dtype] = array


_local = threading.local()


def _buffers(count: int) -> _Buffers:
  """Returns this thread's buffers for a block of `count` numbers."""
  capacity = _SMALL if count <= _SMALL else CAPACITY
  own = _local.__dict__.setdefault('buffers', {})
  if capacity not in own:
    own[capacity] = _Buffers(capacity)
  return own[capacity]


_decode = jax.jit(decode_block, static_argnames='layout', donate_argnums=0)
_encode = jax.jit(encode_block, static_argnames='layout', donate_argnums=(0, 1))
_count = jax.jit(count_block, static_argnames=('layout', 'labels'))

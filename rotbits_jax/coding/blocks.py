"""Blocks: up to 2^20 elements that are coded on their own.

A block is a `rans.Message` of the elements' symbols, and then the planes of their raw
bits. Element i is in lane i % n and row i // n, so in each step the lanes code n
neighbouring elements. A *context* is the index of an element's frequency table, which
encoder and decoder know; the table tells how many raw bits the element has, see
`layouts`. A *plane* is the pieces of one kind of all elements that have one, in their
order.

All blocks share the programs that push and pop, because these know neither
layouts nor the number of elements: they code rows of 64 lanes, of which some may be
void.

Shape letters: n elements, N lanes in use, T rows, K tables, A symbols in use.
"""

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import buffers
from rotbits_jax.coding import layouts
from rotbits_jax.coding import pool
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables as tables_lib
from rotbits_jax.system import native

LANES = 64
"""The greatest N, and the number of lanes of the programs."""

STEPS = buffers.ROOM // LANES
"""The greatest T."""

CAPACITY = buffers.ROOM
"""The greatest n."""

MAX_TABLES = 255
"""The greatest K. With one more table, for places without an element, a byte tells it.
"""

MAX_ENTRIES = 1 << 20
"""The greatest (K + 1) * A."""

# The stacks are no multiple of a large power of two apart, because their tops would
# then compete for the same places in the CPU's cache.
_STACK = STEPS + 96

Fill = Callable[[np.ndarray], None]
"""A function that writes into an array `[n]`."""


class Tables(NamedTuple):
  """Frequency tables, and the shifts of their elements.

  The last table is that of places without an element: its first symbol owns the whole
  interval, so that coding it changes nothing.

  Attributes:
    frequencies: int64 `[K + 1, A]`.
    shifts: uint8 `[K + 1]`, the raw bits of the elements of each table.
  """

  frequencies: np.ndarray
  shifts: np.ndarray

  @classmethod
  def make(cls, frequencies: np.ndarray, shifts: Sequence[int] | int) -> 'Tables':
    """Makes the tables.

    Args:
      frequencies: int64 `[K, A]`. A row of zeros is a table that is not used.
      shifts: those of the K tables.
    """
    void = np.zeros((1, frequencies.shape[1]), np.int64)
    void[0, 0] = tables_lib.TOTAL
    rows = np.concatenate([frequencies, void])
    rows[~rows.any(axis=1)] = void
    of_tables = np.zeros(len(rows), np.uint8)
    of_tables[:-1] = shifts
    return cls(rows, of_tables)

  @property
  def void(self) -> int:
    """The index of the last table, K."""
    return len(self.frequencies) - 1

  @property
  def alphabet(self) -> np.uint32:
    return np.uint32(self.frequencies.shape[1])

  def entries(self) -> np.ndarray:
    """Returns `tables.pack_intervals`, flat, the first of uint32 `[2^20]`."""
    pack = tables_lib.pack_intervals
    return buffers.filled('entries', MAX_ENTRIES, np.uint32, self.frequencies, pack)

  def slots(self) -> np.ndarray:
    """Returns `tables.slots`, flat, the first of uint8 or uint16 `[2^22]`."""
    size = (MAX_TABLES + 1) * tables_lib.TOTAL
    dtype = tables_lib.slots_dtype(int(self.alphabet))
    return buffers.filled('slots', size, dtype, self.frequencies, tables_lib.slots)


def lanes_for(count: int, nbytes: float) -> int:
  """Returns the number of lanes for blocks.

  A step of a program takes equally long for any number of lanes, so more lanes are
  faster. A lane costs about 4 bytes, so a block of few elements that take few bytes
  gets fewer lanes.

  Args:
    count: the elements of a block.
    nbytes: about how many bytes it takes.
  """
  return min(max(count // 8192, int(nbytes) // 2048, 1), LANES)


def divided(count: int) -> int:
  """Returns the elements of each of few blocks of similar sizes.

  The last one may have fewer.

  Args:
    count: the number of elements, at least 1.
  """
  return -(-count // -(-count // CAPACITY))


# ---- one block -----------------------------------------------------------------------


def encode(
  bits: Fill,
  contexts: Fill,
  count: int,
  lanes: int,
  layout: layouts.Layout,
  tables: Tables,
) -> np.ndarray:
  """Encodes a block on this thread.

  Args:
    bits: writes the bit patterns of the elements.
    contexts: writes their contexts.
    count: n, from 1 to `CAPACITY`; at most `STEPS` for each lane.
    lanes: N.
    layout: layout of the elements.
    tables: the tables.

  Returns:
    The words of the message, and the planes: uint8.
  """
  patterns = buffers.scratch('bits', buffers.ROOM, layout.unsigned)
  bits(patterns[:count])
  places = buffers.scratch('contexts', buffers.ROOM, np.uint8)
  contexts(places[:count])
  # The symbols of a row's void places are 0.
  patterns[count : count + LANES] = layout.first
  places[count : count + LANES] = tables.void
  program = layout.program
  names = ['symbols', *(f'piece {i}' for i in range(len(program.pieces)))]
  dtypes = [np.uint16, *(np.uint8 for _ in program.pieces)]
  divided = layouts.split(
    tuple(
      buffers.taken(name, buffers.ROOM, dtype)
      for name, dtype in zip(names, dtypes, strict=True)
    ),
    patterns,
    _shifts(places, tables, layout),
    layout.unsigned.type(layout.min_exponent),
    np.int32(count),
    layout=program,
  )
  planes = []
  for piece, values in zip(program.pieces, divided[1:], strict=True):
    values = np.asarray(values)[:count]
    if _differ(layout):
      has = piece.is_in(tables.shifts)[places[:count]]
      values = values[np.flatnonzero(has)]  # a mask takes longer
    planes.append(packed(values, piece.width))
  words = push(divided[0], places, count, lanes, tables)
  for name, array in zip(names, divided, strict=True):
    buffers.keep(name, array)
  return np.concatenate([words, *planes])


def decode(
  data: np.ndarray,
  contexts: Fill,
  count: int,
  lanes: int,
  layout: layouts.Layout,
  tables: Tables,
  write: Callable[[np.ndarray], None],
) -> None:
  """Decodes a block on this thread: the inverse of `encode`, with its arguments.

  `write` takes the bit patterns of the elements, unsigned integers `[n]`, and copies
  them; the array is used again afterwards.

  Raises:
    ValueError: if the bytes are not a block of n elements.
  """
  places = buffers.scratch('contexts', buffers.ROOM, np.uint8)
  contexts(places[:count])
  program, sizes = layout.program, [count] * len(layout.program.pieces)
  masks: list[np.ndarray | None] = [None] * len(program.pieces)
  if _differ(layout):
    masks = [x.is_in(tables.shifts)[places[:count]] for x in program.pieces]
    sizes = [int(np.count_nonzero(mask)) for mask in masks]
  pairs = list(zip(program.pieces, sizes, strict=True))
  sizes = [-(-size * piece.width // 8) for piece, size in pairs]
  if sum(sizes) > data.size:
    raise ValueError(f'a block of {data.size} bytes has too few raw bits')
  end = data.size - sum(sizes)
  symbols = pop(data[:end], places, count, lanes, tables)
  pieces = []
  for i, ((piece, number), size, mask) in enumerate(
    zip(pairs, sizes, masks, strict=True)
  ):
    values = buffers.scratch(f'piece {i}', buffers.ROOM, np.uint8)
    unpack(data[end : end + size], piece.width, values[:number])
    if mask is not None:
      present = values[:number].copy()
      values[:count] = 0
      values[np.flatnonzero(mask)] = present
    pieces.append(values)
    end += size
  joined = layouts.join(
    buffers.taken('bits', buffers.ROOM, layout.unsigned),
    symbols,
    tuple(pieces),
    _shifts(places, tables, layout),
    layout.unsigned.type(layout.min_exponent),
    np.int32(count),
    layout=program,
  )
  write(np.asarray(joined)[:count])
  buffers.keep('bits', joined)


def _differ(layout: layouts.Layout) -> bool:
  """Returns whether the shifts of elements differ."""
  return isinstance(layout, layouts.Difference)


def _shifts(
  contexts: np.ndarray, tables: Tables, layout: layouts.Layout
) -> layouts.Shifts | None:
  """Returns the shifts for the programs of a layout."""
  if not _differ(layout):
    return None
  of_tables = np.zeros(MAX_TABLES + 1, np.uint8)
  of_tables[: tables.shifts.size] = tables.shifts
  return layouts.Shifts(contexts, of_tables)


# ---- the symbols ---------------------------------------------------------------------


def push(
  symbols: jax.Array, contexts: np.ndarray, count: int, lanes: int, tables: Tables
) -> np.ndarray:
  """Returns the words of a message of n symbols, uint8.

  The symbols are uint16 `[2^20]`, with 0 in the void places of a row.
  """
  state, size, stacks = _push(
    buffers.taken('pushed', LANES * _STACK, np.uint16),
    _dealt(symbols, count, lanes, 'symbols', 0),
    _dealt(contexts, count, lanes, 'rows of contexts', tables.void),
    tables.entries(),
    tables.alphabet,
    np.int32(-(-count // lanes)),
  )
  sizes, rows = np.asarray(size)[:lanes], np.asarray(stacks).reshape(LANES, _STACK)
  words = [row[:n] for row, n in zip(rows[:lanes], sizes.tolist(), strict=True)]
  coded = rans.join_words(np.asarray(state)[:lanes], sizes, np.concatenate(words))
  buffers.keep('pushed', stacks)
  return coded.view(np.uint8)


@functools.cache
def compile_push() -> None:
  """Starts to compile the program that pushes symbols, once in a process.

  It takes as long as all that an encoder does before with its first few arrays.
  """

  def job() -> None:
    symbols, contexts = (np.zeros(buffers.ROOM, x) for x in (np.uint16, np.uint8))
    tables = Tables.make(np.zeros((1, 1), np.int64), 0)
    push(symbols, contexts, 1, 1, tables)  # type: ignore[arg-type]

  pool.start(job)


def pop(
  data: np.ndarray, contexts: np.ndarray, count: int, lanes: int, tables: Tables
) -> np.ndarray:
  """Returns the symbols of a message: the inverse of `push`.

  The symbols are uint16 `[2^20]`, the first n. The next call on this thread uses the
  array again.

  Raises:
    ValueError: if the bytes are not a message of n symbols.
  """
  if data.size % 2:
    raise ValueError(f'{data.size} bytes are not whole words')
  state, size, words = rans.split_words(data.view('<u2'), lanes)
  steps = -(-count // lanes)
  if int(size.max()) > steps:
    raise ValueError('a lane of a block has more words than elements')
  stacks = buffers.scratch('stacks', LANES * _STACK, np.uint16).reshape(LANES, _STACK)
  ends = np.cumsum(size).tolist()
  for lane, end in enumerate(ends):
    lane_words = words[end - int(size[lane]) : end]
    stacks[lane, : lane_words.size] = lane_words
  states = np.full(LANES, 1 << 16, np.uint32)
  states[:lanes] = state
  sizes = np.zeros(LANES, np.int32)
  sizes[:lanes] = size
  *popped, symbols = _pop(
    buffers.taken('symbols', buffers.ROOM, np.uint16),
    rans.Message(states, stacks, sizes, sizes, sizes),  # type: ignore[arg-type]
    _dealt(contexts, count, lanes, 'rows of contexts', tables.void),
    tables.entries(),
    tables.slots(),
    tables.alphabet,
    np.int32(steps),
  )
  # The sizes only fall, so the last ones are the least.
  state, left = map(np.asarray, popped)
  rans.check_empty(rans.Message(state, stacks, left, left, sizes))  # type: ignore[arg-type]
  flat = np.asarray(symbols)
  if lanes < LANES:
    rows = flat.reshape(-1, LANES)
    flat = buffers.scratch('symbols', buffers.ROOM, np.uint16)
    flat[: steps * lanes] = rows[:steps, :lanes].reshape(-1)
  buffers.keep('symbols', symbols)
  return flat


def _dealt(
  flat: np.ndarray | jax.Array, count: int, lanes: int, name: str, void: int
) -> np.ndarray | jax.Array:
  """Deals elements out to lanes: rows of 64, with `void` elsewhere, flat."""
  steps = -(-count // lanes)
  if lanes == LANES:
    if isinstance(flat, np.ndarray):
      flat[count : steps * lanes] = void
    return flat
  dealt = np.full(steps * lanes, void, flat.dtype)
  dealt[:count] = np.asarray(flat)[:count]
  buffer = buffers.scratch(name, buffers.ROOM, flat.dtype)
  rows = buffer[: steps * LANES].reshape(steps, LANES)
  rows[:, :lanes] = dealt.reshape(steps, lanes)
  rows[:, lanes:] = void
  return buffer


# ---- the planes ----------------------------------------------------------------------


def packed(pieces: np.ndarray, width: int) -> np.ndarray:
  """Returns the plane of pieces, uint8 `[n]` below 2^width.

  The plane has `m = ceil(n width / 8)` bytes. Byte j holds, from its lowest bits on,
  the pieces of the elements j, j + m, j + 2 m, and so on.
  """
  size = -(-pieces.size * width // 8)
  plane = pieces[:size].copy()
  for k in range(1, 8 // width):
    part = pieces[k * size : (k + 1) * size]
    # NumPy multiplies bytes many times faster than it shifts them.
    plane[: part.size] |= part * np.uint8(1 << k * width)
  return plane


def unpack(plane: np.ndarray, width: int, out: np.ndarray) -> None:
  """Writes the pieces of a plane, `[n]`: the inverse of `packed`."""
  if width == 8:
    out[:] = plane
    return
  for k in range(8 // width):
    part = out[k * plane.size : (k + 1) * plane.size]
    np.right_shift(plane[: part.size], np.uint8(k * width), out=part)
  np.bitwise_and(out, np.uint8((1 << width) - 1), out=out)


# ---- programs ------------------------------------------------------------------------


def _interval(
  entries: jax.Array, context: jax.Array, symbol: jax.Array, alphabet: jax.Array
) -> rans.Interval:
  index = context.astype(jnp.uint32) * alphabet + symbol.astype(jnp.uint32)
  entry = entries.at[index].get(mode='promise_in_bounds')
  return entry & 0xFFFF, (entry >> 16) + 1


_MOVED = 16  # words that one step moves to their stacks


@functools.partial(jax.jit, donate_argnums=0)
def _push(
  stacks: jax.Array,  # uint16 [64 _STACK]
  symbols: jax.Array,  # uint16 [64 T]
  contexts: jax.Array,  # uint8 [64 T]
  entries: jax.Array,
  alphabet: jax.Array,
  steps: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  def loop(
    stacks: jax.Array,
    symbols: jax.Array,
    contexts: jax.Array,
    entries: jax.Array,
    alphabet: jax.Array,
    steps: jax.Array,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      state, size, stacks = carry
      row = lambda x: jax.lax.dynamic_index_in_dim(x, steps - 1 - i, 0, False)
      interval = _interval(entries, row(contexts), row(symbols), alphabet)
      state, word, moved = rans.push_step(state, *interval, tables_lib.PRECISION)
      place = first + size

      def put(j: jax.Array, stacks: jax.Array) -> jax.Array:
        # A word that does not move is put there, too, and the next one replaces it.
        part = lambda x: jax.lax.dynamic_slice(x, (j * _MOVED,), (_MOVED,))
        for top, at in zip(part(word), part(place), strict=True):
          stacks = jax.lax.dynamic_update_index_in_dim(stacks, top, at, 0)
        return stacks

      stacks = jax.lax.fori_loop(0, LANES // _MOVED, put, stacks)
      return state, size + moved.astype(jnp.uint32), stacks

    # Unsigned, because it takes time to see whether signed indices are below 0.
    first = jnp.arange(LANES, dtype=jnp.uint32) * _STACK
    state, size = jnp.full(LANES, 1 << 16, jnp.uint32), jnp.zeros(LANES, jnp.uint32)
    return jax.lax.fori_loop(0, steps, step, (state, size, stacks))

  rows = symbols.reshape(-1, LANES), contexts.reshape(-1, LANES)
  return native.loop(loop)(stacks, *rows, entries, alphabet, steps)


# Where the CPU has registers of 512 bits, they save a tenth of the time.
_WIDE = {'xla_cpu_prefer_vector_width': 512}


@functools.partial(jax.jit, donate_argnums=0, compiler_options=_WIDE)
def _pop(
  out: jax.Array,  # uint16 [64 T]
  message: rans.Message,
  contexts: jax.Array,  # uint8 [64 T]
  entries: jax.Array,
  slots: jax.Array,
  alphabet: jax.Array,
  steps: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  def lookup(
    slot: jax.Array, context: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    owner = context.astype(jnp.uint32) << tables_lib.PRECISION | slot
    symbol = slots.at[owner].get(mode='promise_in_bounds').astype(jnp.uint16)
    return symbol, *_interval(entries, context, symbol, alphabet)

  rows = contexts.reshape(-1, LANES)
  message, symbols = rans.pop_all(
    message,
    rows,
    lookup,
    tables_lib.PRECISION,
    steps=steps,
    out=out.reshape(-1, LANES),
  )
  return message.state, message.size, symbols.reshape(-1)

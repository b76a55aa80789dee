"""Blocks: up to 2^20 elements that are coded on their own.

A block is a `rans.Message` of the elements' symbols. Element i is in lane i % n and row
i // n, so in each step the lanes code n neighbouring elements. The raw bits of the
elements are cut into *pieces* of 8, 4, 2 or 1 bits, see `layouts.piece_widths`. The
pieces of one width are a *plane*.

All blocks share the programs that push and pop, because these know neither
layouts nor the number of elements: they code rows of 64 lanes, of which some may be
void.

Shape letters: n elements, N lanes in use, T rows, K tables, A symbols in use.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import buffers
from rotbits_jax.coding.weights import contexts as contexts_lib
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import pool
from rotbits_jax.system import native

LANES = 64
"""The greatest N, and the number of lanes of the programs."""

STEPS = buffers.ROOM // LANES
"""The greatest T."""

CAPACITY = buffers.ROOM
"""The greatest n."""

# The stacks are no multiple of a large power of two apart, because their tops would
# then compete for the same places in the CPU's cache.
_STACK = STEPS + 96

Fill = Callable[[np.ndarray], None]
"""A function that writes into an array `[n]`."""


class Tables(NamedTuple):
  """Frequency tables.

  Attributes:
    frequencies: int64 `[K + 1, A]`. The last table is that of places without an
      element: its first symbol owns the whole interval, so that coding it changes
      nothing.
  """

  frequencies: np.ndarray

  @property
  def void(self) -> int:
    """The index of the last table, K."""
    return len(self.frequencies) - 1

  @property
  def alphabet(self) -> np.uint32:
    return np.uint32(self.frequencies.shape[1])

  def entries(self) -> np.ndarray:
    """Returns `tables.pack_intervals`, flat, the first of uint32 `[2^20]`."""
    return buffers.filled(
      'entries',
      contexts_lib.MAX_ENTRIES,
      np.uint32,
      self.frequencies,
      tables.pack_intervals,
    )

  def slots(self) -> np.ndarray:
    """Returns `tables.slots`, flat, the first of uint8 or uint16 `[2^22]`."""
    size = (contexts_lib.MAX_TABLES + 1) * tables.TOTAL
    kind = tables.slots_dtype(int(self.alphabet))
    return buffers.filled('slots', size, kind, self.frequencies, tables.slots)


def tables_of(frequencies: np.ndarray) -> Tables:
  """Makes the tables of frequencies.

  Args:
    frequencies: int64 `[K, A]`. A row of zeros is a table that is not used.
  """
  void = np.zeros((1, frequencies.shape[1]), np.int64)
  void[0, 0] = tables.TOTAL
  rows = np.concatenate([frequencies, void])
  rows[~rows.any(axis=1)] = void
  return Tables(rows)


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
      state, word, moved = rans.push_step(state, *interval, tables.PRECISION)
      place = first + size

      def put(j: jax.Array, stacks: jax.Array) -> jax.Array:
        # A word that does not move is put there, too, and the next one replaces it.
        part = lambda x: jax.lax.dynamic_slice(x, (j * _MOVED,), (_MOVED,))
        for own, at in zip(part(word), part(place), strict=True):
          stacks = jax.lax.dynamic_update_index_in_dim(stacks, own, at, 0)
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
    owner = context.astype(jnp.uint32) << tables.PRECISION | slot
    symbol = slots.at[owner].get(mode='promise_in_bounds').astype(jnp.uint16)
    return symbol, *_interval(entries, context, symbol, alphabet)

  rows = contexts.reshape(-1, LANES)
  message, symbols = rans.pop_all(
    message,
    rows,
    lookup,
    tables.PRECISION,
    steps=steps,
    out=out.reshape(-1, LANES),
  )
  return message.state, message.size, symbols.reshape(-1)


# ---- one block on the host -----------------------------------------------------------


def encode(
  bits: Fill,
  contexts: Fill,
  count: int,
  lanes: int,
  layout: layouts.Layout,
  made: Tables,
) -> tuple[np.ndarray, list[np.ndarray]]:
  """Encodes a block on this thread.

  Args:
    bits: writes the bit patterns of the elements.
    contexts: writes the index of each element's table.
    count: n, from 1 to `CAPACITY`; at most `STEPS` for each lane.
    lanes: N.
    layout: layout of the elements.
    made: the tables.

  Returns:
    The words of the message, and the planes: uint8.
  """
  patterns = buffers.scratch('bits', buffers.ROOM, layout.unsigned)
  bits(patterns[:count])
  patterns[count : count + LANES] = 0  # the symbols of a row's void places are 0
  widths = layouts.piece_widths(layout.raw_bits)
  names = ['symbols', *(f'piece {i}' for i in range(len(widths)))]
  kinds = [np.uint16, *(np.uint8 for _ in widths)]
  pairs = zip(names, kinds, strict=True)
  found = layouts.split(
    tuple(buffers.taken(name, buffers.ROOM, kind) for name, kind in pairs),
    patterns,
    layout.unsigned.type(layout.min_exponent),
    np.int32(count),
    layout=layout.program,
  )
  coded = push(found[0], contexts, count, lanes, made)
  planes = [
    packed(np.asarray(piece)[:count], width)
    for piece, width in zip(found[1:], widths, strict=True)
  ]
  for name, array in zip(names, found, strict=True):
    buffers.keep(name, array)
  return coded, planes


def push(
  symbols: np.ndarray | jax.Array,
  contexts: Fill,
  count: int,
  lanes: int,
  made: Tables,
) -> np.ndarray:
  """Encodes symbols on this thread, with the other arguments of `encode`.

  The symbols are uint16, at least n; a jax.Array has 0 in a row's void places.

  Returns:
    The words of the message: uint8.
  """
  steps = -(-count // lanes)
  places = buffers.scratch('contexts', buffers.ROOM, np.uint8)
  contexts(places[:count])
  state, size, stacks = _push(
    buffers.taken('pushed', LANES * _STACK, np.uint16),
    _dealt(symbols, count, lanes, 'symbols', 0),
    _dealt(places, count, lanes, 'rows of contexts', made.void),
    made.entries(),
    made.alphabet,
    np.int32(steps),
  )
  sizes, rows = np.asarray(size)[:lanes], np.asarray(stacks).reshape(LANES, _STACK)
  words = [row[:n] for row, n in zip(rows[:lanes], sizes.tolist(), strict=True)]
  coded = rans.join_words(np.asarray(state)[:lanes], sizes, np.concatenate(words))
  buffers.keep('pushed', stacks)
  return coded.view(np.uint8)


@functools.cache
def compile_push() -> None:
  """Starts to compile the program of `push`, once in a process.

  It takes as long as all that an encoder does before with its first few arrays.
  """
  made = tables_of(np.zeros((1, 1), np.int64))
  fill = lambda out: out.fill(0)
  pool.start(lambda: push(np.zeros(1, np.uint16), fill, 1, 1, made))


def decode(
  coded: np.ndarray,
  planes: np.ndarray,
  contexts: Fill,
  count: int,
  lanes: int,
  layout: layouts.Layout,
  made: Tables,
  write: Callable[[np.ndarray], None],
) -> None:
  """Decodes a block on this thread: the inverse of `encode`, with its arguments.

  The planes are uint8 `[planes_size(n, layout)]`, one after the other. `write` takes
  the bit patterns of the elements, unsigned integers `[n]`, and copies them; the array
  is used again afterwards.

  Raises:
    ValueError: if the bytes are not a block of n elements.
  """
  symbols = pop(coded, contexts, count, lanes, made)
  bits = _join(symbols, planes, count, layout)
  write(np.asarray(bits)[:count])
  buffers.keep('bits', bits)


def pop(
  coded: np.ndarray, contexts: Fill, count: int, lanes: int, made: Tables
) -> np.ndarray:
  """Decodes symbols on this thread: the inverse of `push`, with its arguments.

  Returns:
    uint16 `[2^20]`, of which the first n are the symbols. The next call on this thread
    uses the array again.

  Raises:
    ValueError: if the bytes are not a block of n elements.
  """
  if coded.size % 2:
    raise ValueError(f'{coded.size} bytes are not whole words')
  state, size, words = rans.split_words(coded.view('<u2'), lanes)
  steps = -(-count // lanes)
  if int(size.max()) > steps:
    raise ValueError('a lane of a block has more words than elements')
  places = buffers.scratch('contexts', buffers.ROOM, np.uint8)
  stacks = buffers.scratch('stacks', LANES * _STACK, np.uint16).reshape(LANES, _STACK)
  contexts(places[:count])
  ends = np.cumsum(size).tolist()
  for lane, end in enumerate(ends):
    own = words[end - int(size[lane]) : end]
    stacks[lane, : own.size] = own
  states = np.full(LANES, 1 << 16, np.uint32)
  states[:lanes] = state
  sizes = np.zeros(LANES, np.int32)
  sizes[:lanes] = size
  *popped, symbols = _pop(
    buffers.taken('symbols', buffers.ROOM, np.uint16),
    rans.Message(states, stacks, sizes, sizes, sizes),  # type: ignore[arg-type]
    _dealt(places, count, lanes, 'rows of contexts', made.void),
    made.entries(),
    made.slots(),
    made.alphabet,
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


def planes_size(count: int, layout: layouts.Layout) -> int:
  """Returns the number of bytes of the planes of a block of `count` elements."""
  return sum(-(-count * b // 8) for b in layouts.piece_widths(layout.raw_bits))


def _join(
  symbols: np.ndarray, planes: np.ndarray, count: int, layout: layouts.Layout
) -> jax.Array:
  """Returns the bit patterns of elements, given their symbols and the planes."""
  pieces, position = [], 0
  for i, width in enumerate(layouts.piece_widths(layout.raw_bits)):
    size = -(-count * width // 8)
    piece = buffers.scratch(f'piece {i}', buffers.ROOM, np.uint8)
    unpack(planes[position : position + size], width, piece[:count])
    pieces.append(piece)
    position += size
  return layouts.join(
    buffers.taken('bits', buffers.ROOM, layout.unsigned),
    symbols,
    tuple(pieces),
    layout.unsigned.type(layout.min_exponent),
    np.int32(count),
    layout=layout.program,
  )


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


def _dealt(
  flat: np.ndarray | jax.Array, count: int, lanes: int, name: str, void: int
) -> np.ndarray | jax.Array:
  """Deals elements `[n]` out to lanes: rows of 64, with `void` elsewhere, flat."""
  steps = -(-count // lanes)
  if flat.size == buffers.ROOM and lanes == LANES:
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

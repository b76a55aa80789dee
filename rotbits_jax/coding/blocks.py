"""Blocks: up to 2^19 units that are coded on their own.

A block is a `rans.Message`; then the planes; then the list of pairs of
bins, 10 bits each, the highest first; then the exceptions: the place of each unit, 3
bytes, and then the bits of each unit. Integers have neither planes nor the list. Unit i
is in lane i % L and row i // L of L lanes, so in each step these code L neighbouring
units. The last row is filled up with the last unit. There are 32 lanes, which suits the
registers of processors; or 4, which take fewer bytes, for up to 2^16 units.

A plane has the pieces of one kind, rows of L units. A unit's part of it is the piece
of its first number, in the lower bits, and that of its second. Rows of less than a byte
a unit share bytes, the first row being in the lowest bits.

All blocks of a layout share the programs that encode and decode, which do not know the
number of units.

Shape letters: n units, L lanes, T rows, K tables.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import buffers
from rotbits_jax.coding import layouts
from rotbits_jax.coding import rans
from rotbits_jax.system import native

LANES, FEW_LANES = 32, 4
ROWS = 1 << 14
"""The greatest T."""

CAPACITY = LANES * ROWS
"""The greatest n."""

LEAST_BYTES = 2 * (3 + 2 * FEW_LANES) + FEW_LANES
"""Bytes of a block without words."""

_PLACE = 3  # bytes

Fill = Callable[[np.ndarray], None]
"""A function that writes into an array."""


def capacity_of(units: int) -> int:
  """Returns the units of each of few blocks of similar sizes.

  The last one may have fewer.

  Args:
    units: their number, at least 1.
  """
  return -(-units // -(-units // CAPACITY))


def lanes_of(count: int) -> int:
  """Returns the lanes of a block of so many units."""
  return FEW_LANES if count <= FEW_LANES * ROWS else LANES


def _plane_shape(width: int, rows: int, lanes: int) -> tuple[int, np.dtype]:
  """Returns the shape of a plane of pieces of so many bits, and its dtype."""
  if width == 8:
    return rows * lanes, np.dtype(np.uint16)
  return -(-rows * width // 4) * lanes, np.dtype(np.uint8)


def encode(
  units: Fill, classes: Fill, count: int, layout: layouts.Layout, of: layouts.Tables
) -> np.ndarray:
  """Encodes a block on this thread.

  Args:
    units: writes the bit patterns of the numbers, unsigned integers.
    classes: writes the class of each unit, uint8 `[n]`.
    count: n, from 1 to `CAPACITY`.
    layout: layout of the numbers.
    of: the tables.

  Returns:
    The block, uint8.
  """
  lanes = lanes_of(count)
  rows, room = -(-count // lanes), lanes * ROWS
  values = buffers.scratch('units', (room, *layout.unit_shape()), layout.unit_dtype)
  places = buffers.scratch('classes', (room,), np.uint8)
  units(values[:count].reshape(-1).view(f'u{layout.dtype.itemsize}'))
  classes(places[:count])
  values[count : rows * lanes] = values[count - 1]
  places[count : rows * lanes] = places[count - 1]
  stack = ROWS * layout.words + _APART
  planes_of = lambda rows: [_plane_shape(x, rows, lanes) for x, _ in layout.pieces]
  kinds = [(lanes * stack, np.dtype(np.uint16)), (room, np.dtype(np.uint16))]
  kinds += planes_of(ROWS)
  names = ['words', 'marks', *(f'plane {i}' for i in range(len(layout.pieces)))]
  out = tuple(
    buffers.taken(name, (size,), dtype)
    for name, (size, dtype) in zip(names, kinds, strict=True)
  )
  state, lengths, out = _encode(
    out, values, places, of, np.int32(rows), layout=layout.program, lanes=lanes
  )
  words, marks, *planes = map(np.asarray, out)
  lengths = np.asarray(lengths).astype(np.int64)
  stacks = zip(words.reshape(lanes, stack), lengths.tolist(), strict=True)
  tops = np.concatenate([row[:n] for row, n in stacks])
  parts = [rans.join_words(np.asarray(state), lengths, tops)]
  pairs = zip(planes, planes_of(rows), strict=True)
  parts += [plane[:size] for plane, (size, _) in pairs]
  # The last unit is marked again where it fills the row.
  marked = np.flatnonzero(marks[: rows * lanes])
  found = marks[marked]
  parts.append(_packed(found[found & layouts.ESCAPED > 0] & layouts.ESCAPE))
  places_of = marked[(found & layouts.EXCEPTION > 0) & (marked < count)]
  parts += [_as_places(places_of), values[places_of]]
  data = np.concatenate([x.reshape(-1).view(np.uint8) for x in parts])
  for name, array in zip(names, out, strict=True):
    buffers.keep(name, array)
  return data


def decode(
  data: np.ndarray,
  classes: Fill,
  count: int,
  layout: layouts.Layout,
  of: layouts.Tables,
  write: Callable[[np.ndarray, np.ndarray, np.ndarray], None],
) -> None:
  """Decodes a block on this thread: the inverse of `encode`, with its arguments.

  `write` takes the bit patterns of the numbers and copies them, because the array is
  used again. It also takes the indices of numbers that have other bits, in their order,
  and these bits.

  Raises:
    ValueError: if the bytes are not a block of n units.
  """
  lanes = lanes_of(count)
  rows, room = -(-count // lanes), lanes * ROWS
  states, lengths, rest = rans.split_words(data[: data.size & ~1].view('<u2'), lanes)
  most, total = rows * layout.words, int(lengths.sum())
  if int(lengths.max()) > most or total > rest.size:
    raise ValueError('a lane of a block has more words than units')
  # A lane whose words run out reads those of others, at most `most` below its own.
  below = ROWS * layout.words
  words = buffers.scratch('words', (below + lanes * below,), np.uint16)
  words[below : below + total] = rest[:total]
  tops = (below - 1 + np.cumsum(lengths)).astype(np.uint32)
  end = data.size - 2 * (rest.size - total) - (data.size & 1)
  planes = []
  for i, (width, _) in enumerate(layout.pieces):
    size, dtype = _plane_shape(width, ROWS, lanes)
    plane = buffers.scratch(f'plane {i}', (size,), dtype)
    used = _plane_shape(width, rows, lanes)[0] * dtype.itemsize
    part = data[end : end + used]
    if part.size < used:
      raise ValueError(f'a block of {data.size} bytes has too few raw bits')
    plane.view(np.uint8)[:used] = part
    planes.append(plane)
    end += used
  places = buffers.scratch('classes', (room,), np.uint8)
  classes(places[:count])
  places[count : rows * lanes] = places[count - 1]
  out = buffers.taken('units', (room, *layout.unit_shape()), layout.unit_dtype)
  state, ends, out = _decode(
    out,
    states,
    tops,
    words,
    places,
    tuple(planes),
    of,
    np.int32(rows),
    layout=layout.program,
  )
  if np.any(np.asarray(state) != 1 << 16) or np.any(np.asarray(ends) != tops - lengths):
    raise rans.MessageError('a block has more or fewer words than its units need')
  units = np.asarray(out)[: rows * lanes]
  size, listed = _listed(units, data[end:], places, layout, of)
  lists = [listed, _exceptions(data[end + size :], units[:count])]
  unsigned = f'u{layout.dtype.itemsize}'
  indices = np.concatenate([x[0] for x in lists])
  order = np.argsort(indices, kind='stable')
  indices = indices[order]
  # An exception comes after the pair of bins of its unit, and replaces it.
  is_last = np.append(indices[1:] != indices[:-1], True)[: order.size]
  kept = is_last & (indices < count)
  bits = np.concatenate([x[1] for x in lists])[order[kept]]
  numbers = indices[kept, None] * layout.size + np.arange(layout.size)
  write(
    units[:count].reshape(-1).view(unsigned),
    numbers.reshape(-1),
    bits.reshape(-1).view(unsigned),
  )
  buffers.keep('units', out)


# ---- the lists -----------------------------------------------------------------------


def _packed(pairs: np.ndarray) -> np.ndarray:
  """Packs pairs of bins, 10 bits each."""
  bits = np.unpackbits(pairs.astype('>u2').view(np.uint8)).reshape(-1, 16)
  return np.packbits(bits[:, 6:])


def _listed(
  units: np.ndarray,
  data: np.ndarray,
  classes: np.ndarray,
  layout: layouts.Layout,
  of: layouts.Tables,
) -> tuple[int, tuple[np.ndarray, np.ndarray]]:
  """Returns the bytes of the list of pairs, the units in it, and their bits."""
  if isinstance(layout, layouts.Integers):
    return 0, (np.zeros(0, np.int64), units[:0])
  is_listed = (units & layout.marker) == layout.marker
  if layout.unit_shape():
    is_listed = is_listed[:, 0] & is_listed[:, 1]
  listed = np.flatnonzero(is_listed)
  size = -(-10 * listed.size // 8)
  if size > data.size:
    raise ValueError('a block has too few pairs of bins')
  bits = np.unpackbits(data[:size], count=10 * listed.size).reshape(-1, 10)
  pairs = (bits @ (1 << np.arange(9, -1, -1))).astype(np.uint32)
  kept = units[listed] & ~layout.marker
  fields = [kept[:, 0], kept[:, 1]] if layout.unit_shape() else [kept]
  told = classes[listed].astype(np.uint32)
  told = of.classes[told] if layout.raised else told
  words = layout.join(pairs, fields, told, of.start, np)
  return size, (listed, np.stack(words, -1) if layout.unit_shape() else words[0])


def _as_places(places: np.ndarray) -> np.ndarray:
  return places.astype('<u4').view(np.uint8).reshape(-1, 4)[:, :_PLACE]


def _exceptions(data: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the units whose bits are in the list, and their bits."""
  number, left = divmod(data.size, units[:1].nbytes + _PLACE)
  places = np.zeros((number, 4), np.uint8)
  places[:, :_PLACE] = data[: number * _PLACE].reshape(-1, _PLACE)
  indices = places.reshape(-1).view('<u4').astype(np.int64)
  if left or np.any(indices >= len(units)):
    raise ValueError('the exceptions of a block do not fit it')
  bits = np.ascontiguousarray(data[number * _PLACE :]).view(units.dtype)
  return indices, bits.reshape(number, *units.shape[1:])


# ---- programs ------------------------------------------------------------------------

# The stacks are no multiple of a large power of two apart, because their tops would
# then compete for the same places in the CPU's cache.
_APART = 96

# Where the CPU has registers of 512 bits, they save a tenth of the time.
_WIDE = {'xla_cpu_prefer_vector_width': 512}


def _row(array: jax.Array, t: Any) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(array, t, keepdims=False)


def _put(array: jax.Array, row: jax.Array, t: Any) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(array, row, t, 0)


def _rows(array: jax.Array, lanes: int, shape: tuple[int, ...] = ()) -> jax.Array:
  return array.reshape(-1, lanes, *shape)


@functools.partial(
  jax.jit, static_argnames='layout', donate_argnums=0, compiler_options=_WIDE
)
def _decode(
  out: jax.Array,
  state: jax.Array,
  tops: jax.Array,
  words: jax.Array,
  classes: jax.Array,
  planes: tuple[jax.Array, ...],
  of: layouts.Tables,
  rows: jax.Array,
  *,
  layout: layouts.Layout,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Decodes rows of units; `tops` are the places of the words that lanes take next."""
  shape = out.shape

  def loop(
    out: Any, state: Any, tops: Any, words: Any, classes: Any, *others: Any
  ) -> Any:
    planes, of, rows = others

    def step(t: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      state, tops, out = carry
      place = t.astype(jnp.uint32)

      def pop(lookup: Callable[..., Any], precision: int) -> jax.Array:
        nonlocal state, tops
        slot = state & jnp.uint32((1 << precision) - 1)
        entry, start, frequency = lookup(slot)
        word = words.at[tops].get(mode='promise_in_bounds')
        state, taken = rans.pop_step(state, word, start, frequency, precision)
        tops = tops - taken.astype(jnp.uint32)
        return entry

      pieces = []
      for (width, _), plane in zip(layout.pieces, planes, strict=True):
        shared = max(4 // width, 1)  # rows in a byte
        row = _row(plane, place // shared).astype(jnp.uint32)
        pieces.append(row >> place % shared * (2 * width))
      unit = layout.decode_step(pop, _row(classes, t).astype(jnp.uint32), pieces, of)
      return state, tops, _put(out, unit, t)

    return jax.lax.fori_loop(0, rows, step, (state, tops, out))

  lanes = state.size
  rows_of = tuple(_rows(x, lanes) for x in planes)
  state, tops, out = native.loop(loop)(
    _rows(out, lanes, shape[1:]),
    state,
    tops,
    words,
    _rows(classes, lanes),
    rows_of,
    of,
    rows,
  )
  return state, tops, out.reshape(shape)


@functools.partial(jax.jit, static_argnames=('layout', 'lanes'), donate_argnums=0)
def _encode(
  out: tuple[jax.Array, ...],
  units: jax.Array,
  classes: jax.Array,
  of: layouts.Tables,
  rows: jax.Array,
  *,
  layout: layouts.Layout,
  lanes: int,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
  """Encodes rows of units, the last one first.

  `out` are the stacks of the lanes, the marks and the planes. Returns the states, the
  lengths of the stacks, and `out`.
  """
  words, marks, *planes = out
  shapes = [x.shape for x in out]

  def loop(out: Any, units: Any, classes: Any, of: Any, rows: Any) -> Any:
    def push(
      interval: layouts.Interval, state: jax.Array, sizes: jax.Array, words: jax.Array
    ) -> tuple[jax.Array, ...]:
      state, word, moved = rans.push_step(state, *interval)
      # A word that does not move is put there, too, and the next one replaces it.
      for top, at in zip(word, first + sizes, strict=True):
        words = jax.lax.dynamic_update_index_in_dim(words, top, at, 0)
      return state, sizes + moved.astype(jnp.uint32), words

    def step(i: jax.Array, carry: Any) -> Any:
      state, sizes, parts, (words, marks, *planes) = carry
      t = rows - 1 - i
      place = t.astype(jnp.uint32)
      intervals, pieces, mark = layout.encode_step(
        _row(classes, t).astype(jnp.uint32), _row(units, t), of
      )
      for interval in reversed(intervals):
        state, sizes, words = push(interval, state, sizes, words)
      joined = []
      quadruples = zip(layout.pieces, pieces, parts, range(len(planes)), strict=True)
      for (width, _), piece, part, index in quadruples:
        # Rows that share bytes come in turn, the highest first.
        joined.append((part << 2 * width | piece) if width < 4 else piece)
        shared = max(4 // width, 1)
        row = joined[-1].astype(planes[index].dtype)
        planes[index] = _put(planes[index], row, place // shared)
      return state, sizes, tuple(joined), (words, _put(marks, mark, t), *planes)

    # Unsigned, because it takes time to see whether signed indices are below 0.
    stack = out[0].size // lanes
    first = jnp.arange(lanes, dtype=jnp.uint32) * stack
    parts = tuple(jnp.zeros(lanes, jnp.uint32) for _ in layout.pieces)
    carry = (
      jnp.full(lanes, 1 << 16, jnp.uint32),
      jnp.zeros(lanes, jnp.uint32),
      parts,
      out,
    )
    state, sizes, _, out = jax.lax.fori_loop(0, rows, step, carry)
    return state, sizes, out

  state, sizes, out = native.loop(loop)(
    (words, *(_rows(x, lanes) for x in (marks, *planes))),
    _rows(units, lanes, layout.unit_shape()),
    _rows(classes, lanes),
    of,
    rows,
  )
  reshaped = [x.reshape(shape) for x, shape in zip(out, shapes, strict=True)]
  return state, sizes, tuple(reshaped)

"""Blocks: up to 2^20 units that are coded on their own.

A block is a `rans.Message`; then the planes of raw bits; then the lists of escapes; see
docs/format.md. Unit i is in lane i % L and row i // L of L lanes, so in each step these
code L neighbouring units. The last row is filled up with the last unit. There are 32
lanes, which suits the registers of processors; or 4, which take fewer bytes, for up to
2^16 units. All blocks of a layout share the programs that encode and decode, which do
not know the number of units. They have 32 lanes, and code those of 4 eight times.

Shape letters: n units of W words, L lanes, T rows.
"""

import bisect
from collections.abc import Callable, Sequence
import functools
import itertools
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import layouts
from rotbits_jax.coding import rans
from rotbits_jax.coding import scales as scales_lib
from rotbits_jax.coding import units as units_lib
from rotbits_jax.system import checksums as checksums_lib
from rotbits_jax.system import host
from rotbits_jax.system import native

LANES, FEW_LANES = 32, 4
_FEW = 1 << 16  # units with few lanes

CAPACITY = 1 << 20
"""The greatest n."""

ROWS = CAPACITY // LANES
"""The greatest T."""

LEAST_BYTES = 6 * FEW_LANES
"""Bytes of a block without words."""

# Bytes of a thread's buffer: a unit has up to 6 of words, 6 of planes and 10 of lists.
_BUFFER = 24 * CAPACITY

# The stacks are no multiple of a large power of two apart, because their tops would
# then compete for the same places in the CPU's cache.
_APART = 96

# Wide vectors, of which LLVM makes fewer if it unrolls more.
_OPTIONS = {'xla_cpu_prefer_vector_width': 512, 'xla_backend_optimization_level': 2}

compiled = functools.partial(
  jax.jit, static_argnames='layout', donate_argnums=0, compiler_options=_OPTIONS
)
"""Compiles a program for `run`."""


class Span(NamedTuple):
  """Units of a block that follow each other in a part."""

  place: slice  # of the units in the block
  some: slice  # of the numbers in the part; one may be missing in the last unit
  numbers: np.ndarray  # bit patterns of the whole part
  known: np.ndarray | None  # the known numbers of the part, if there are any
  classes: Callable[[np.ndarray], None]  # writes them, see `scales_lib.Scales`
  is_even: bool  # whether all units of the part have one class
  part: int  # index of the part


class Field(NamedTuple):
  """A field of the units of a block, as the programs get it."""

  words: np.ndarray  # those of `CAPACITY` units, and room to align the first one
  first: np.int32  # the place of the first unit
  stride: np.int32  # from a row to the next one; 0 if all rows are alike
  at: np.int32 = np.int32(-1)  # the index of a row that may lie partly outside
  edge: np.ndarray | None = None  # the words of that row

  @property
  def width(self) -> int:
    """The words of a unit."""
    return self.words.size // (ROWS * LANES)

  def take(self, units: np.ndarray, lanes: int) -> np.ndarray:
    """Returns some of the units: `[n, width]`."""
    places = self.first + units // lanes * self.stride + units % lanes * self.width
    taken = self.words.take(places[:, None] + np.arange(self.width), mode='clip')
    if self.edge is not None:
      is_edge = units // lanes == self.at
      taken[is_edge] = self.edge.reshape(-1, self.width)[units[is_edge] % lanes]
    return taken


def capacity(layout: layouts.Layout) -> int:
  """Returns the most units of a block: 16 bits must tell how many words a lane has."""
  return CAPACITY // (1 + (layout.pushes > 2))


def divide(
  parts: Sequence[np.ndarray],
  known: Sequence[np.ndarray | None],
  scales: Sequence[scales_lib.Scales],
  layout: layouts.Layout,
) -> list[list[Span]]:
  """Divides contiguous parts into few blocks alike, of whole rows but for the last one.

  Known numbers are bit patterns, `[n]`.
  """
  size, shared = layout.size, layout.shared
  counts = [-(-part.size // size) for part in parts]
  ends = np.cumsum(counts).tolist()
  count, rows = -(-ends[-1] // capacity(layout)), -(-ends[-1] // LANES)
  starts = [LANES * (i * rows // count) for i in range(count)]
  blocks: list[list[Span]] = [[] for _ in starts]
  for start, end in itertools.pairwise(sorted({*ends, *starts})):
    i, block = bisect.bisect(ends, start), bisect.bisect(starts, start) - 1
    first, shape = start - ends[i] + counts[i], parts[i].shape
    bits = parts[i].reshape(-1).view(f'u{parts[i].itemsize}')
    some = slice(first * size, min((first + end - start) * size, bits.size))
    write = functools.partial(scales[i].write, shape, shared, some.start // shared)
    place = slice(start - starts[block], end - starts[block])
    is_even = scales[i].rows.size == scales[i].columns.size == 1
    blocks[block].append(Span(place, some, bits, known[i], write, is_even, i))
  return blocks


def _grid(count: int) -> tuple[int, int]:
  """Returns the rows and the lanes of a block of so many units."""
  lanes = FEW_LANES if count <= _FEW else LANES
  return -(-count // lanes), lanes


def _sharing(width: int) -> int:
  """Returns how many rows share the bytes of a plane of pieces of so many bits."""
  return max(4 // width, 1)


def _plane_bytes(width: int, rows: int, lanes: int) -> int:
  """Returns the bytes of a plane of pieces of so many bits."""
  return -(-rows * width // 4) * lanes


def _field(name: str, spans: Sequence[Span], words: int, word: np.dtype) -> Any:
  """Returns a field of the units of a block; None if they do not have it.

  A unit that lacks an element has its first one twice. The last unit fills its row, and
  the units of few lanes come again in the other lanes.
  """
  first, *others = spans
  values, count = getattr(first, name), spans[-1].place.stop
  if values is None:
    return None
  (rows, lanes), is_class = _grid(count), callable(values)
  size, stride = ROWS * LANES * words + host.ALIGNMENT // word.itemsize, LANES * words
  edge: Any = None if is_class else _scratch(f'edge of {name}', (stride,), word)
  is_part = lanes == LANES and not is_class and not others
  if is_part and (window := _window(first.some, values, size, edge)):
    return window
  array = _scratch(name, (size,), word)
  if is_class and first.is_even and not others:
    values(array[:LANES].view(np.uint8))
    return Field(array, np.int32(0), np.int32(0))
  units = array[: ROWS * stride].reshape(-1, words)
  for span in spans:
    flat, values = units[span.place].reshape(-1), getattr(span, name)
    flat = flat.view(np.uint8 if is_class else values.dtype)
    some = flat[: span.some.stop - span.some.start]  # all, if two share a class
    values(some) if is_class else np.copyto(some, values[span.some])
    flat[some.size :] = some[-1]
  units[count : rows * lanes] = units[count - 1]
  if lanes < LANES:
    few = units[: rows * lanes].reshape(rows, 1, lanes, words).copy()
    units[: rows * LANES].reshape(rows, LANES // lanes, lanes, words)[...] = few
  return Field(array, np.int32(0), np.int32(stride), edge=edge)


def _window(some: slice, array: np.ndarray, size: int, edge: np.ndarray) -> Any:
  """Returns so many aligned words around some elements, which are rows of all lanes.

  None if the array does not have them. The first or the last row may lie partly
  outside, because memory of NumPy is not aligned; `edge` gets its words. Rows of bytes
  are shorter than the alignment, so that two may lie outside: these are copied.
  """
  word, stride = edge.dtype, edge.size
  each, step = word.itemsize // array.itemsize, host.ALIGNMENT // word.itemsize
  words = array[: array.size // each * each].view(word)
  skipped = -words.ctypes.data % host.ALIGNMENT // word.itemsize
  start, stop = some.start // each, some.stop // each
  first = max((min(start, words.size - size) - skipped) // step, 0) * step + skipped
  if first + size > words.size or (some.stop - some.start) % (each * stride):
    return None
  if max(first - start, stop - first - size) > stride:
    return None
  place = start if start < first else stop - stride
  edge[:] = words[place : place + stride]
  at, window = np.int32((place - start) // stride), words[first : first + size]
  return Field(window, np.int32(start - first), np.int32(stride), at, edge)


def _few(array: np.ndarray, count: int) -> np.ndarray:
  """Returns the units of rows of all lanes, and perhaps others: `[count, words]`."""
  rows, lanes = _grid(count)
  return array[:rows, :lanes].reshape(rows * lanes, -1)[:count]


def encode(
  spans: Sequence[Span], layout: layouts.Layout, coder_tables: units_lib.Tables
) -> np.ndarray:
  """Encodes a block, 1 to `CAPACITY` units, on this thread: uint8."""
  count = spans[-1].place.stop
  rows, lanes = _grid(count)
  inputs = [_field(x, spans, layout.words, layout.word) for x in ('numbers', 'known')]
  inputs.append(_field('classes', spans, 1, layout.class_type))
  stack = ROWS * layout.pushes + _APART
  shapes: list[Any] = [((LANES, stack), np.uint16), ((ROWS, LANES), np.uint16)]
  for width, _ in layout.pieces:
    dtype = np.uint16 if width == 8 else np.uint8
    shapes.append(((ROWS // _sharing(width), LANES), dtype))
  arguments = *inputs, coder_tables, np.int32(rows)
  (state, lengths), (words, marks, *planes) = run(_encode, shapes, layout, *arguments)
  state, lengths = state[:lanes], lengths[:lanes].astype(np.uint16)
  stacks = zip(words, lengths.tolist(), strict=False)
  parts = [state, lengths, *(x[:n] for x, n in stacks)]
  for (width, _), plane in zip(layout.pieces, planes, strict=True):
    parts.append(plane[: -(-rows // _sharing(width)), :lanes])
  marks = _few(marks, rows * lanes).reshape(-1, 4)
  fours = np.flatnonzero(marks.view(np.uint64) > 0)  # few
  escaped = (4 * fours[:, None] + np.arange(4))[marks[fours] > 0]
  escaped = escaped[escaped < count]
  marks, units = marks.reshape(-1)[escaped], inputs[0].take(escaped, lanes)
  parts += layout.lists(marks - units_lib.MARKED, units)
  return np.concatenate([x.reshape(-1).view(np.uint8) for x in parts])


def decode(
  read: Callable[[np.ndarray], None],
  nbytes: int,
  spans: Sequence[Span],
  layout: layouts.Layout,
  coder_tables: units_lib.Tables,
) -> list[tuple[int, tuple[int, int]]]:
  """Decodes a block on this thread into `spans`: the inverse of `encode`.

  `read` fills an array with the bytes of the block, which are used where they lie. If
  they are not a block of as many numbers, a ValueError is raised.

  Returns for each span the part, and the CRC-32 and the size of the decoded bytes,
  which are in the cache.
  """
  count = spans[-1].place.stop
  rows, lanes = _grid(count)
  # A lane whose words run out reads those of others, at most so many below its own.
  below = ROWS * layout.pushes
  buffer = _scratch('block', (_BUFFER,), np.uint8)
  data = buffer[2 * below :][:nbytes]
  if data.size < nbytes:
    raise ValueError(f'a block of {count} units cannot have {nbytes} bytes')
  read(data)
  state, lengths, left = rans.split_words(data[: nbytes & ~1].view('<u2'), lanes)
  total = int(lengths.sum())
  if int(lengths.max()) > rows * layout.pushes or total > left.size:
    raise ValueError('a lane of a block has more words than units')
  first = below + nbytes // 2 - left.size
  tops = first - 1 + np.cumsum(lengths)
  ends = [2 * (first + total)]
  for width, _ in layout.pieces:
    ends.append(ends[-1] + _plane_bytes(width, rows, lanes))
  lists = buffer[ends[-1] : 2 * below + nbytes]
  if ends[-1] > 2 * below + nbytes:
    raise ValueError(f'a block of {nbytes} bytes has too few raw bits')
  every = [np.tile(x, LANES // lanes) for x in (state, tops)]
  places = np.concatenate([*every, ends, [rows, lanes]]).astype(np.uint32)
  classes: Any = _field('classes', spans, 1, layout.class_type)
  known = _field('known', spans, layout.words, layout.word)
  shapes = [((ROWS, LANES, layout.words), layout.word), ((ROWS, LANES), bool)]
  arguments = places, buffer.view(np.uint16), buffer, classes, known
  (state, bottoms), out = run(_decode, shapes, layout, *arguments, coder_tables)
  if (state != 1 << 16).any() or (bottoms[:lanes] != tops - lengths).any():
    raise ValueError('a block has more or fewer words than its units need')
  units, marks = (_few(x, count) for x in out)
  escaped = np.flatnonzero(marks)
  words = lambda x: [*x.take(escaped, lanes).astype(np.uint32).T]
  of_units = words(classes)[0].view(np.int32)
  row = units_lib.Row(of_units, None if known is None else words(known), None, [])
  listed = layout.listed(lists, units[escaped], row, coder_tables.told)
  checksums = []
  for place, of_span, bits, *_, part in spans:
    numbers = bits[of_span]
    some = slice(*np.searchsorted(escaped, [place.start, place.stop]))
    whole, missing = numbers, -numbers.size % layout.size
    if missing:  # in the last unit
      whole = np.empty(numbers.size + missing, numbers.dtype)
    of_units = whole.view(layout.word).reshape(-1, layout.words)
    of_units[...] = units[place]
    of_units[escaped[some] - place.start] = listed[some]
    if missing:
      numbers[...] = whole[:-missing]
    checksums.append((part, (checksums_lib.of_array(numbers), numbers.nbytes)))
  return checksums


# ---- arrays that a thread uses again -------------------------------------------------

# Fresh memory costs more time than the work on it does. The arrays are aligned because
# XLA then uses them without a copy.
_local = threading.local()


def _scratch(name: str, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
  """Returns this thread's array of this name, shape and dtype."""
  arrays = _local.__dict__.setdefault('scratch', {})
  key = name, shape, np.dtype(dtype)
  if key not in arrays:
    arrays[key] = host.empty(shape, dtype)
  return arrays[key]


def run(
  program: Any, shapes: Sequence[Any], layout: Any, *arguments: Any
) -> tuple[np.ndarray, list[np.ndarray]]:
  """Runs a program that fills arrays of these shapes and dtypes.

  Returns its first result and the arrays, which this thread's next call overwrites.
  """
  donated = _local.__dict__.setdefault('donated', {})
  key = program, *shapes
  out = donated.pop(key, None)
  if out is None:  # a program that makes zeros would have to be compiled
    # On a device like the tables, and so what the program returns: it compiles once.
    out = tuple(jax.device_put(np.zeros(*x), host.device()) for x in shapes)
  result, donated[key] = program(out, *arguments, layout=layout)
  return np.asarray(result), [np.asarray(x) for x in donated[key]]


# ---- programs ------------------------------------------------------------------------


def _given(t: Any, classes: Any, known: Any, units: Any, pieces: Any) -> units_lib.Row:
  """Returns a row of the inputs of a program."""

  def row(field: Any) -> Any:
    if field is None:
      return None
    place, size = field.first + t * field.stride, LANES * field.width
    some = jax.lax.dynamic_slice(field.words, (place.astype(jnp.uint32),), (size,))
    if field.edge is not None:
      some = jnp.where(t == field.at, field.edge, some)
    return [*some.reshape(LANES, -1).astype(jnp.uint32).T]

  of_units = row(classes)[0].astype(jnp.int32)
  return units_lib.Row(of_units, row(known), row(units), pieces)


def _put(array: jax.Array, row: jax.Array, t: Any) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(array, row, t, 0)


@compiled
def _decode(*arguments: Any, layout: layouts.Layout) -> tuple[jax.Array, ...]:
  """Decodes rows of units; returns the states with the places of words, and `out`.

  Places are the states, those of the words of lanes, those of planes; rows and lanes.
  """

  def loop(*operands: Any) -> Any:
    out, places, words, buffer, classes, known, coder_tables = operands
    state, tops, (*planes, rows, lanes) = jnp.split(places, [LANES, 2 * LANES])
    once = functools.partial(units_lib.once, coder_tables.told)
    most = np.uint32((1 << 22) - 1)  # of places of words, with which XLA would compare

    def step(t: jax.Array, carry: Any) -> Any:
      state, tops, out = carry

      def pop(find: Any, split: Callable[..., tuple[Any, Any]], precision: Any) -> Any:
        nonlocal state, tops

        def popped(state: jax.Array, tops: jax.Array) -> tuple[jax.Array, ...]:
          slot = rans.slot(state, precision)
          # Scalars, because XLA makes no vector gathers, but shuffles, which are slow.
          word = jnp.zeros(LANES, words.dtype)
          for lane, top in enumerate(tops & most):
            some = jax.lax.dynamic_slice(words, (top,), (1,))
            word = jax.lax.dynamic_update_slice(word, some, (np.uint32(lane),))
          # A word is loaded as a vector long after it was stored, or the CPU waits.
          entry, word = once(find(slot), word)
          interval, keep = split(entry, slot), lambda x: once(x)[0]
          state, taken = rans.pop_step(state, word, *interval, precision, keep)
          return entry, state, tops - taken.astype(jnp.uint32)

        if isinstance(precision, int):
          entry, state, tops = popped(state, tops)
        else:  # raw bits, which few rows have in a step of a training
          several = popped, lambda *x: (jnp.zeros_like(state), *x), state, tops
          entry, state, tops = jax.lax.cond((precision > 0).any(), *several)
        return entry

      pieces = []
      for i, (width, _) in enumerate(layout.pieces):
        shared = _sharing(width)
        data, at = (words, planes[i] >> 1) if width == 8 else (buffer, planes[i])
        # Shifts, because JAX traces `//` and `%` as programs of their own.
        at += (t >> shared.bit_length() - 1) * lanes
        row = jax.lax.dynamic_slice_in_dim(data, at, LANES).astype(jnp.uint32)
        pieces.append(row >> (t & shared - 1) * (2 * width))
      given = _given(t, classes, known, None, pieces)
      rows_of = layout.decode_step(pop, given, coder_tables)
      out = tuple(_put(x, y, t) for x, y in zip(out, rows_of, strict=True))
      return state, tops, out

    state, tops, out = jax.lax.fori_loop(np.uint32(0), rows, step, (state, tops, out))
    return jnp.stack([state, tops]), out

  return native.loop(loop)(*arguments)


@compiled
def _encode(*arguments: Any, layout: layouts.Layout) -> tuple[jax.Array, ...]:
  """Encodes rows of units; returns the states with the lengths of stacks, and `out`."""

  def loop(*operands: Any) -> Any:
    out, units, known, classes, coder_tables, rows = operands
    # A lane has fewer words than that. XLA would compare each place with the last one.
    most = np.uint32(min(layout.pushes, 2) * ROWS - 1)

    def push(carry: Any, *interval: Any, is_first: bool = False) -> Any:
      state, sizes, words = carry
      # A word that does not move is put there, too, and the next one replaces it.
      tops = zip(state.astype(jnp.uint16), sizes & most, strict=True)
      for lane, (word, place) in enumerate(tops):
        at = np.uint32(lane), place
        words = jax.lax.dynamic_update_slice(words, word[None, None], at)
      if is_first:  # If what follows depends on the words, XLA copies nothing for them.
        state, sizes = (x | words[0, 0].astype(jnp.uint32) >> 16 for x in carry[:2])
      state, _, moved = rans.push_step(state, *interval)
      sizes += moved.astype(jnp.uint32)
      return *units_lib.once(coder_tables.told, state, sizes), words

    def step(i: jax.Array, carry: Any) -> Any:
      state, sizes, parts, (words, marks, *planes) = carry
      t = rows - 1 - i
      given = _given(t, classes, known, units, [])
      intervals, pieces, mark = layout.encode_step(given, coder_tables)
      coder = state, sizes, words
      if not isinstance(intervals[-1][-1], int):
        # Few rows have the highest raw bits. A loop of no turn or one pushes them,
        # because XLA would copy the stacks for a conditional.
        *intervals, raw = intervals
        turns = jnp.any(raw[-1] > 0).astype(jnp.int32)
        coder = jax.lax.fori_loop(0, turns, lambda _, x: push(x, *raw), coder)
      for k, interval in enumerate(reversed(intervals)):
        coder = push(coder, *interval, is_first=k < 1)
      state, sizes, words = coder
      for k, (width, _) in enumerate(layout.pieces):
        # Rows that share bytes come in turn, the highest first.
        part = parts[k] | pieces[k] if width < 4 else pieces[k]
        parts[k] = part << 2 * width if width < 4 else parts[k]
        row = t.astype(jnp.uint32) // _sharing(width)
        planes[k] = _put(planes[k], part.astype(planes[k].dtype), row)
      return state, sizes, parts, (words, _put(marks, mark, t), *planes)

    state = jnp.full(LANES, 1 << 16, jnp.uint32)
    nothing = jnp.zeros(LANES, jnp.uint32)
    carry = state, nothing, [nothing] * len(layout.pieces), out
    state, sizes, _, out = jax.lax.fori_loop(0, rows, step, carry)
    return jnp.stack([state, sizes]), out

  return native.loop(loop)(*arguments)

"""Numbers whose contexts the decoder knows: coded with one frequency table for each.

An element has a symbol below 256 and s raw bits; its context tells the table and the
shift s. Contexts without raw bits come before the others. First come the tables, see
`tables.to_bytes`, and then blocks of equally many elements, of which the last one has
fewer. A block is a message of the symbols, see `weights.blocks`, and then the raw bits.
Those of an element are cut into pieces from the lowest on, see `layouts.piece_widths`:
of 8 bits and then of 4, 2 and 1, each at most once. Planes follow each other: the first
pieces of 8 bits of all elements that have one, the second ones, the third ones, and the
pieces of 4, of 2 and of 1 bits. `blocks.packed` packs a plane.

Shape letters: n elements, m elements with raw bits, K contexts.
"""

from collections.abc import Callable, Iterator, Sequence
import functools

import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import blocks
from rotbits_jax.coding.weights import buffers
from rotbits_jax.coding.weights import pool

ALPHABET = 256
MOST_SHIFT = 24

Write = Callable[[int, np.ndarray, np.ndarray, np.ndarray], None]
"""Takes the decoded elements of a block, see `decode`."""


def encode(
  symbols: np.ndarray,
  raw: np.ndarray,
  contexts: np.ndarray,
  frequencies: np.ndarray,
  shifts: Sequence[int],
) -> list[np.ndarray]:
  """Encodes elements on this thread.

  Args:
    symbols: uint8 `[n]`.
    raw: uint32 `[m]`, the raw bits of the elements that have some, in their order.
    contexts: uint8 `[n]`.
    frequencies: int64 `[K, 256]`, the tables.
    shifts: the number of raw bits of an element of each context.

  Returns:
    The bytes of the tables, and those of each block: uint8.
  """
  made, taken = blocks.tables_of(frequencies, decoding=False), 0
  found = [np.frombuffer(tables.to_bytes(frequencies), np.uint8)]
  of_contexts, first = np.array(shifts, np.uint8), _first(shifts)
  for part, lanes in _blocks(symbols.size):
    own = contexts[part]
    widened = buffers.scratch('given', blocks.CAPACITY, np.uint16)
    widened[: own.size] = symbols[part]
    fill = functools.partial(_copy, own)
    pieces = [blocks.push(widened, fill, own.size, lanes, made)]
    (at,) = np.nonzero(own >= first)
    some = of_contexts[own[at]]
    bits = raw[taken : taken + some.size]
    taken += some.size
    for width, select, low in _planes(some):
      piece = (np.compress(select, bits) >> low).astype(np.uint8)
      pieces.append(blocks.packed(piece & np.uint8((1 << width) - 1), width))
    found.append(np.concatenate(pieces))
  return found


def decode(
  data: np.ndarray,
  sizes: Sequence[int],
  contexts: np.ndarray,
  shifts: Sequence[int],
  write: Write,
) -> np.ndarray:
  """Decodes elements: the inverse of `encode`.

  Args:
    data: uint8, the results of `encode`, one after the other.
    sizes: the number of bytes of the tables, and of each block.
    contexts: as in `encode`.
    shifts: as in `encode`.
    write: takes the index of the first element of a block; its symbols, uint16; the
      indices, within the block, of the elements with raw bits; and the bits of these,
      the symbol above the raw ones, int32. The arrays are used again afterwards.

  Returns:
    The indices of the elements of the symbol 0, in order.

  Raises:
    ValueError: if the bytes do not have these elements.
  """
  parts = list(_blocks(contexts.size))
  if len(parts) + 1 != len(sizes) or sum(sizes) != data.size:
    raise ValueError(
      f'{contexts.size} elements cannot be in {data.size} bytes of {len(sizes)} parts'
    )
  frequencies = tables.from_bytes(data[: sizes[0]].tobytes(), len(shifts), ALPHABET)
  made = blocks.tables_of(frequencies, decoding=True)
  of_contexts, first = np.array(shifts, np.uint8), _first(shifts)
  ends = np.cumsum(sizes, dtype=np.int64).tolist()

  def job(part: slice, lanes: int, own: np.ndarray) -> np.ndarray:
    places = contexts[part]
    (at,) = np.nonzero(places >= first)
    some = of_contexts[places[at]]
    planes = [(*plane, -(-_count(plane[1]) * plane[0] // 8)) for plane in _planes(some)]
    words = own.size - sum(plane[-1] for plane in planes)
    if words < 0:
      raise ValueError(f'a block of {own.size} bytes has too few raw bits')
    fill = functools.partial(_copy, places)
    symbols = blocks.pop(own[:words], fill, places.size, lanes, made)[: places.size]
    raw, end = symbols[at].astype(np.uint32) << some, words
    for width, select, low, size in planes:
      piece = np.empty(_count(select), np.uint8)
      blocks.unpack(own[end : end + size], width, piece)
      raw[select] |= piece.astype(np.uint32) << low
      end += size
    write(part.start, symbols, at, raw.view(np.int32))
    return np.flatnonzero(symbols == 0) + part.start

  jobs = [
    functools.partial(job, *pair, data[end - size : end])
    for pair, size, end in zip(parts, sizes[1:], ends[1:], strict=True)
  ]
  return np.concatenate([np.zeros(0, np.int64), *pool.run(jobs)])


def _first(shifts: Sequence[int]) -> int:
  """Returns the first context with raw bits.

  Raises:
    ValueError: if one without raw bits comes later.
  """
  first = sum(x == 0 for x in shifts)
  if any(shifts[:first]):
    raise ValueError('contexts without raw bits come last')
  return first


def looked_up(table: np.ndarray, indices: np.ndarray) -> np.ndarray:
  """Returns the entries of a short table, uint8, at indices, uint8 `[n]`."""
  # NumPy would make wide integers of the indices first.
  whole = np.zeros(256, np.uint8)
  whole[: table.size] = table
  return np.frombuffer(indices.tobytes().translate(whole.tobytes()), np.uint8)


def _blocks(count: int) -> Iterator[tuple[slice, int]]:
  """Yields the elements of each block, and its lanes."""
  if not count:
    return
  elements, lanes = blocks.divided(count)
  for start in range(0, count, elements):
    yield slice(start, min(start + elements, count)), lanes


def _planes(shifts: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
  """Yields the planes that have a piece.

  Args:
    shifts: uint8 `[m]`.

  Yields:
    The width of pieces; bool `[m]`, the elements that have one; and how many bits of
    each of these elements are below it.
  """
  for low in range(0, int(shifts.max(initial=0)) & ~7, 8):
    select = shifts >= low + 8
    yield 8, select, np.array(low, np.uint8)
  for width in (4, 2, 1):
    select = (shifts & np.uint8(width)) > 0
    if select.any():
      yield width, select, shifts[select] & np.uint8(256 - 2 * width)


def _count(select: np.ndarray) -> int:
  return int(np.count_nonzero(select))


def _copy(array: np.ndarray, out: np.ndarray) -> None:
  out[:] = array

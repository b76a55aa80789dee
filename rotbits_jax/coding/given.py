"""Numbers whose contexts the decoder knows: coded with one frequency table for each.

An element has a symbol below 256 and s raw bits; its context tells the table and the
shift s. Contexts without raw bits come before the others. First come the tables, see
`tables.to_bytes`, and then blocks of equally many elements, of which the last one has
fewer. A block is a message of the symbols, see `weights.blocks`, and then the planes of
the raw bits, see `pieces`.

Shape letters: n elements, m elements with raw bits, K contexts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
from typing import NamedTuple, TypeVar

import numpy as np

from rotbits_jax.coding import blocks
from rotbits_jax.coding import buffers
from rotbits_jax.coding import pieces
from rotbits_jax.coding import pool
from rotbits_jax.coding import tables

ALPHABET = 256
MOST_SHIFT = 24
LANE = blocks.STEPS // 2

Pop = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Takes the contexts of a block, uint8 `[n]`; decodes its elements.

Returns the symbols, uint16 `[2^20]`, the first n of them; the indices of the elements
with raw bits; and the raw bits of these, uint32. The symbols are used again afterwards.
"""

_Result = TypeVar('_Result')


class Raw(NamedTuple):
  """The elements of a block that have raw bits, in order.

  Attributes:
    contexts: uint8 `[m]`.
    bits: unsigned integers `[m]`, the raw bits.
  """

  contexts: np.ndarray
  bits: np.ndarray


def encode(
  symbols: np.ndarray,
  raw: Iterable[Raw],
  contexts: np.ndarray,
  owners: np.ndarray,
  frequencies: np.ndarray,
  shifts: Sequence[int],
  lane: int = LANE,
  run: pool.Run = pool.in_turn,
) -> list[np.ndarray]:
  """Encodes elements.

  Args:
    symbols: uint8 `[n]`.
    raw: the raw bits, for each block of `parts`.
    contexts: uint8 `[n]`.
    owners: the table of each context, uint8.
    frequencies: int64 `[K, 256]`, the tables.
    shifts: the number of raw bits of an element of each table.
    lane: see `parts`.
    run: runs the jobs of blocks, such as `pool.run`.

  Returns:
    The bytes of the tables, and those of each block: uint8. A decoder knows the tables
    of elements by their order in `frequencies`, and not these contexts.
  """
  made = blocks.Tables.make(frequencies[owners], 0)
  of_contexts = np.array(shifts, np.uint8)[owners]

  def job(part: slice, lanes: int, own: Raw) -> np.ndarray:
    count = part.stop - part.start
    widened = buffers.scratch('given', buffers.ROOM, np.uint16)
    widened[:count] = symbols[part]
    places = _places(contexts[part])
    planes = [blocks.push(widened, places, count, lanes, made)]
    planes += pieces.cut(own.bits, of_contexts[own.contexts])
    return np.concatenate(planes)

  pairs = zip(parts(symbols.size, lane), raw, strict=True)
  jobs = [functools.partial(job, *part, own) for part, own in pairs]
  return [np.frombuffer(tables.to_bytes(frequencies), np.uint8), *run(jobs)]


def decode(
  data: np.ndarray,
  sizes: Sequence[int],
  count: int,
  shifts: Sequence[int],
  job: Callable[[slice, Pop], _Result],
  lane: int = LANE,
) -> list[_Result]:
  """Decodes elements: the inverse of `encode`.

  Args:
    data: uint8, the results of `encode`, one after the other.
    sizes: the number of bytes of the tables, and of each block.
    count: n.
    shifts: as in `encode`.
    job: takes the places of the elements of a block, and a function that decodes them.
    lane: see `parts`.

  Returns:
    The results of `job`, in order.

  Raises:
    ValueError: if the bytes do not have these elements.
  """
  own = list(parts(count, lane))
  if len(own) + 1 != len(sizes) or sum(sizes) != data.size:
    raise ValueError(
      f'{count} elements cannot be in {data.size} bytes of {len(sizes)} parts'
    )
  frequencies = tables.from_bytes(data[: sizes[0]].tobytes(), len(shifts), ALPHABET)
  made = blocks.Tables.make(frequencies, 0)
  of_contexts = np.array(shifts, np.uint8)
  first = sum(x == 0 for x in shifts)  # the first context with raw bits
  if any(shifts[:first]):
    raise ValueError('contexts without raw bits come last')
  ends = np.cumsum(sizes, dtype=np.int64).tolist()

  def pop(
    own: np.ndarray, lanes: int, contexts: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    (at,) = np.nonzero(contexts >= first)
    some = of_contexts[contexts[at]]
    words = own.size - pieces.size(some)
    if words < 0:
      raise ValueError(f'a block of {own.size} bytes has too few raw bits')
    places = _places(contexts)
    symbols = blocks.pop(own[:words], places, contexts.size, lanes, made)
    return symbols, at, pieces.joined(own[words:], some)

  jobs = [
    functools.partial(job, part, functools.partial(pop, data[end - size : end], lanes))
    for (part, lanes), size, end in zip(own, sizes[1:], ends[1:], strict=True)
  ]
  return pool.run(jobs)


def parts(count: int, lane: int = LANE) -> Iterator[tuple[slice, int]]:
  """Yields the places of the elements of each block, and its lanes.

  Args:
    count: n.
    lane: the elements for which a block gets one more lane, at most `LANE`. A lane
      takes about 4 bytes, and the time of a block is that of a lane.
  """
  if not count:
    return
  elements = blocks.divided(count)
  lanes = min(max(elements // lane, 1), blocks.LANES)
  for start in range(0, count, elements):
    yield slice(start, min(start + elements, count)), lanes


def _places(contexts: np.ndarray) -> np.ndarray:
  """Returns contexts in an array of this thread."""
  found = buffers.scratch('contexts', buffers.ROOM, np.uint8)
  found[: contexts.size] = contexts
  return found

"""Several arrays as one unit of coded streams that decodes on its own.

    array -> symbols, rests             plans.plan
    symbols of all arrays -> 'rans'     one message of many lanes
    lines and tables -> 'tables'        contexts.fit
    rests -> 'raw'                      bit-packed; whole arrays where that is no longer

The first words of 'raw' travel as the payload of the message's empty states, where they
cost nothing. Where the order of lines does not matter (the neurons of an MLP), it is
popped from the message before the symbols are pushed: see `permutation`. There must be
bits to pop then, so the message holds more of 'raw'.

The streams and the specs of the arrays are all that decoding needs, and all its
decisions are made by integers.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import categorical
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding.bits_back import permutation
from rotbits_jax.coding.weights import contexts
from rotbits_jax.coding.weights import floats
from rotbits_jax.coding.weights import plans
from rotbits_jax.coding.weights import scales

Streams = dict[str, np.ndarray]

STREAMS = ('rans', 'tables', 'raw')
"""Names of the streams of a unit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraySpec:
  """What is known of one array before its streams are read.

  Attributes:
    shape: of the array.
    dtype: its name.
    rest: low bits of each number that are stored as they are, beside its symbol (the
      sign among them, for floats; zeros that all numbers end in are not); None where
      the whole array is stored as it is.
  """

  shape: tuple[int, ...]
  dtype: str
  rest: int | None = None

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def raw_size(self) -> int:
    """Bytes of the array in the raw stream."""
    if self.rest is None:
      return self.size * plans.DTYPES[self.dtype].itemsize
    return floats.packed_size(self.size, self.rest)

  @property
  def form(self) -> scales.Format:
    """The format of the symbols, of an array that is coded."""
    return scales.format_of(plans.DTYPES[self.dtype], self.rest or 0)

  def to_json(self) -> list[Any]:
    """The spec as a JSON value."""
    return [self.dtype, list(self.shape), self.rest]

  @classmethod
  def from_json(cls, value: Sequence[Any]) -> 'ArraySpec':
    """The inverse of `to_json`.

    Raises:
      ValueError: if the value is not a spec.
    """
    dtype, shape, rest = value
    if dtype not in plans.DTYPES:
      raise ValueError(f'an array of unknown dtype {dtype!r}')
    return cls(dtype=dtype, shape=tuple(shape), rest=rest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitSpec:
  """What is known of a unit before its streams are read.

  Attributes:
    arrays: their specs.
    lanes: N, of the message; 0 if there is none.
    exchangeable: (index, axis) of each array whose lines along that axis are stored in
      an order that was popped from the message.
  """

  arrays: tuple[ArraySpec, ...]
  lanes: int
  exchangeable: tuple[tuple[int, int], ...] = ()

  @property
  def coded(self) -> tuple[ArraySpec, ...]:
    return tuple(spec for spec in self.arrays if spec.rest is not None)

  @property
  def raw_order(self) -> tuple[list[int], list[int]]:
    """Indices of the arrays as they follow each other in the raw stream, in two parts.

    What the message holds first is from the first part: it must be known before the
    exchangeable arrays are, which are the second.
    """
    last = [index for index, _ in self.exchangeable]
    return [i for i in range(len(self.arrays)) if i not in last], last

  @property
  def depth(self) -> int:
    """Words of raw bytes in each lane before anything is popped or pushed."""
    if not self.exchangeable:
      return 1
    index, axis = self.exchangeable[0]
    count = self.arrays[index].shape[axis]
    # What an order takes from a lane at most: its numbers below F. The lowest word
    # cannot be popped, and another makes up for what the pops waste.
    bits = -(-count // self.lanes) * (count - 1).bit_length()
    return -(-bits // 16) + 2

  @property
  def seed_size(self) -> int:
    """Bytes of the raw arrays that travel in the message."""
    return 2 * self.lanes * self.depth if self.lanes else 0

  def to_json(self) -> dict[str, Any]:
    """The spec as a JSON value, without the arrays'."""
    return {'lanes': self.lanes, 'exchangeable': [list(x) for x in self.exchangeable]}

  @classmethod
  def from_json(
    cls, value: Mapping[str, Any], arrays: Sequence[ArraySpec]
  ) -> 'UnitSpec':
    """The inverse of `to_json`, given the arrays' specs."""
    return cls(
      arrays=tuple(arrays),
      lanes=value['lanes'],
      exchangeable=tuple((index, axis) for index, axis in value['exchangeable']),
    )


class Encoded(NamedTuple):
  """What `encode` returns.

  Attributes:
    unit: the spec.
    streams: 'rans' (uint16), 'raw' (uint8), 'tables' (uint8); empty ones are left out.
    arrays: as `decode` gives them back: exchangeable lines are in another order.
    order_bits: what that order saved.
  """

  unit: UnitSpec
  streams: Streams
  arrays: list[np.ndarray]
  order_bits: float


def encode(
  arrays: Sequence[np.ndarray],
  *,
  numbers_per_lane: int,
  exchangeable: Mapping[int, int] | None = None,
) -> Encoded:
  """Codes arrays as one unit.

  Args:
    arrays: of dtypes in `plans.DTYPES`.
    numbers_per_lane: least count of coded numbers that a lane is opened for. A lane
      costs 2 to 3 bytes; few lanes make a slow coder.
    exchangeable: indices of arrays, and the axis of each along which its lines may be
      put in another order, in the same for all these arrays. F lines save log2 F! bits.
      They are left as they are where the axes are not of one length, or where the other
      arrays hold too few bits.

  Returns:
    The spec, the streams and the arrays as they are stored.

  Raises:
    ValueError: if a dtype cannot be stored, or there is no such array or axis.
  """
  exchanged = _exchanged([array.shape for array in arrays], exchangeable or {})
  planned = [plans.plan(np.asarray(array)) for array in arrays]
  if sum(plan.saved for plan in planned) < _HEADER_BYTES:
    planned = [plans.Plan(plan.array) for plan in planned]
  unit = _unit(planned, numbers_per_lane, exchanged)
  first, last = unit.raw_order
  raw = _concatenate(planned[i].raw() for i in first)
  streams: Streams = {}
  order_bits = 0.0
  if unit.lanes:
    seed = np.zeros(unit.seed_size, np.uint8)
    seed[: raw.size], raw = raw[: seed.size], raw[seed.size :]
    message = _seeded(seed, unit)
    if unit.exchangeable:
      before = rans.content_bits(message)
      message, order = _pop_order(message, _rows(unit, [p.array for p in planned]))
      order_bits = before - rans.content_bits(message)
      for i, axis in unit.exchangeable:
        planned[i] = planned[i].take(order, axis)
    coded = [plan.coded for plan in planned if plan.coded]
    model, bits = contexts.fit(
      [part.form for part in coded],
      [part.lines for part in coded],
      [part.counts for part in coded],
    )
    symbols = np.concatenate([part.symbols.reshape(-1) for part in coded])
    message = _push(message, symbols, unit, model, bits)
    streams['rans'] = rans.to_words(message)
    streams['tables'] = np.frombuffer(contexts.to_bytes(model), np.uint8)
  raw = _concatenate([raw, *(planned[i].raw() for i in last)])
  if raw.size:
    streams['raw'] = raw
  return Encoded(unit, streams, [plan.array for plan in planned], order_bits)


def decode(unit: UnitSpec, streams: Mapping[str, np.ndarray]) -> list[np.ndarray]:
  """The inverse of `encode`.

  Args:
    unit: the spec.
    streams: the streams; 'rans' uint16, the others uint8.

  Returns:
    The arrays as they are stored, bit for bit.

  Raises:
    ValueError: if the streams do not fit the spec.
  """
  raw = streams.get('raw', np.zeros(0, np.uint8))
  expected = sum(spec.raw_size for spec in unit.arrays)
  # The seed is filled up with zeros if there are too few raw bytes for it.
  if raw.size != max(expected - unit.seed_size, 0):
    raise ValueError(
      f'{raw.size} raw bytes beside the message, where the arrays take {expected} '
      f'and the message holds {unit.seed_size}'
    )
  first, last = unit.raw_order
  start = sum(unit.arrays[i].raw_size for i in first) - unit.seed_size
  symbols: list[np.ndarray | None] = [None] * len(unit.arrays)
  arrays: dict[int, np.ndarray] = {}
  if unit.lanes:
    message, symbols = _pop(unit, streams)
    arrays |= _restored(unit, last, symbols, raw[max(start, 0) :])
    if unit.exchangeable:
      message = _push_order(message, unit, _rows(unit, arrays))
    raw = np.concatenate([_seed(message, unit), raw])
  arrays |= _restored(unit, first, symbols, raw)
  return [arrays[i] for i in range(len(unit.arrays))]


# Two streams more take about as much in the header of a file.
_HEADER_BYTES = 256


def _exchanged(
  shapes: list[tuple[int, ...]], exchangeable: Mapping[int, int]
) -> tuple[tuple[int, int], ...]:
  """The arrays whose lines may be exchanged, with their axes; none if they disagree."""
  for index, axis in exchangeable.items():
    if not (0 <= index < len(shapes) and 0 <= axis < len(shapes[index])):
      raise ValueError(f'no axis {axis} of array {index} to exchange lines along')
  counts = {shapes[index][axis] for index, axis in exchangeable.items()}
  if len(counts) != 1 or counts <= {0, 1}:
    return ()
  return tuple(sorted(exchangeable.items()))


def _unit(
  planned: list[plans.Plan],
  numbers_per_lane: int,
  exchanged: tuple[tuple[int, int], ...],
) -> UnitSpec:
  """The spec of the unit, with `exchanged` if there are bits to choose an order by."""
  specs = tuple(
    ArraySpec(
      shape=plan.array.shape,
      dtype=plan.array.dtype.name,
      rest=plan.coded.rest if plan.coded else None,
    )
    for plan in planned
  )
  count = sum(spec.size for spec in specs if spec.rest is not None)
  if not count:
    return UnitSpec(arrays=specs, lanes=0)
  lanes = 1 << max(count // numbers_per_lane, 1).bit_length() - 1
  unit = UnitSpec(arrays=specs, lanes=lanes, exchangeable=exchanged)
  first, _ = unit.raw_order
  enough = sum(specs[i].raw_size for i in first) >= unit.seed_size
  return unit if enough else dataclasses.replace(unit, exchangeable=())


# ---- the message ---------------------------------------------------------------------


def _seeded(seed: np.ndarray, unit: UnitSpec) -> rans.Message:
  """A message of raw bytes."""
  words = seed.view('<u2').astype(np.uint16).reshape(unit.depth, unit.lanes)
  return _stacked(words, unit.depth)


def _seed(message: rans.Message, unit: UnitSpec) -> np.ndarray:
  """The inverse of `_seeded`."""
  rans.check(message)
  size, state = np.asarray(message.size), np.asarray(message.state)
  if np.any(size != unit.depth - 1) or np.any(state >> 16 != 1):
    raise ValueError('the message does not hold just the symbols of its arrays')
  stacks = np.asarray(message.words)[: unit.depth - 1]
  words = np.concatenate([stacks, rans.payload(message)[None]])
  return words.astype('<u2').reshape(-1).view(np.uint8)


def _rows(
  unit: UnitSpec, arrays: Sequence[np.ndarray] | Mapping[int, np.ndarray]
) -> np.ndarray:
  """The exchangeable lines as bytes, all arrays' side by side: uint8 `[F, C]`."""
  rows = []
  for index, axis in unit.exchangeable:
    lines = np.moveaxis(arrays[index], axis, 0)
    flat = np.ascontiguousarray(lines).reshape(len(lines), -1)
    rows.append(flat.view(np.uint8))
  return np.concatenate(rows, axis=1)


def _pop_order(
  message: rans.Message, rows: np.ndarray
) -> tuple[rans.Message, np.ndarray]:
  """Pops the order in which rows are to be stored."""
  order, starts = permutation.canonical_order(rows)
  message, arrangement = _pop_arrangement(message, starts)
  return rans.check(message), order[np.asarray(arrangement)]


def _push_order(
  message: rans.Message, unit: UnitSpec, rows: np.ndarray
) -> rans.Message:
  """The inverse of `_pop_order`, given the rows as they are stored."""
  order, starts = permutation.canonical_order(rows)
  return _push_arrangement(_with_room(message, unit.depth), starts, order)


def _with_room(message: rans.Message, capacity: int) -> rans.Message:
  """The message with room for so many words a lane; words beyond are lost."""
  words = np.asarray(message.words)[: capacity + 1]
  words = np.pad(words, ((0, capacity + 1 - len(words)), (0, 0)))
  return message._replace(words=jnp.asarray(words), highest=message.size)


def _context_grid(unit: UnitSpec, model: contexts.Model) -> np.ndarray:
  """The table of each place in the grid of symbols: uint8 or uint16 `[T, N]`.

  T is rounded up to one of eight lengths an octave, so that units of about the same
  size share one compiled coder; places left over hold no symbol.
  """
  void = _padded_tables(len(model.normal))
  dtype = np.dtype(np.uint8 if void < 256 else np.uint16)
  flat = model.contexts([spec.shape for spec in unit.coded], dtype)
  steps = -(-flat.size // unit.lanes)
  grain = 1 << max(steps.bit_length() - 4, 0)
  steps = -(-steps // grain) * grain
  padding = np.full(steps * unit.lanes - flat.size, void, flat.dtype)
  return np.concatenate([flat, padding]).reshape(steps, unit.lanes)


def _padded_tables(count: int) -> int:
  """16, 64, 256, ...: few sizes, to share compiled coders."""
  return 16 << max((count - 1).bit_length() - 3, 0) // 2 * 2


def _pad_tables(table: np.ndarray) -> np.ndarray:
  """Repeats the last table, see `_padded_tables`."""
  extra = _padded_tables(len(table)) - len(table)
  return np.concatenate([table, np.repeat(table[-1:], extra, axis=0)])


def _padded_capacity(words: int) -> int:
  """The next power of two, to share compiled coders."""
  return 1 << (words - 1).bit_length()


def _push(
  message: rans.Message,
  symbols: np.ndarray,
  unit: UnitSpec,
  model: contexts.Model,
  bits: float,
) -> rans.Message:
  """Pushes symbols `[n]` that take so many bits.

  The message gets little room to spare, and more if a lane overflows.
  """
  grid = _context_grid(unit, model)
  steps, lanes = grid.shape
  padded = np.zeros(grid.size, np.uint16)
  padded[: symbols.size] = symbols
  intervals = tables.pack_intervals(_pad_tables(model.frequencies))
  # Every 16-bit symbol moves at most one word to the stack.
  most = steps + unit.depth
  capacity = int(1.25 * bits / 16 / lanes) + unit.depth + 64
  while True:
    capacity = min(_padded_capacity(capacity), most)
    pushed = _push_grid(
      _with_room(message, capacity), padded.reshape(grid.shape), grid, intervals
    )
    if capacity == most or np.asarray(pushed.highest).max() <= capacity:
      return pushed
    capacity *= 2


def _pop(
  unit: UnitSpec, streams: Mapping[str, np.ndarray]
) -> tuple[rans.Message, list[np.ndarray | None]]:
  """The message without the symbols, and the symbols of each array that is coded."""
  coded = unit.coded
  model = contexts.from_bytes(
    streams['tables'].tobytes(),
    [spec.form for spec in coded],
    [spec.shape for spec in coded],
  )
  message = rans.from_words(streams['rans'], unit.lanes)
  message = _with_room(message, _padded_capacity(message.capacity))
  frequencies = _pad_tables(model.frequencies)
  message, grid = _pop_grid(
    message,
    _context_grid(unit, model),
    tables.pack_intervals(frequencies),
    tables.slots(frequencies),
  )
  rans.check(message)
  flat, position = np.asarray(grid).reshape(-1), 0
  symbols: list[np.ndarray | None] = []
  for spec in unit.arrays:
    size = spec.size if spec.rest is not None else 0
    symbols.append(flat[position : position + size] if size else None)
    position += size
  return message, symbols


def _restored(
  unit: UnitSpec,
  indices: list[int],
  symbols: list[np.ndarray | None],
  raw: np.ndarray,
) -> dict[int, np.ndarray]:
  """Arrays by index, from their symbols and their part of the raw stream."""
  arrays, position = {}, 0
  for i in indices:
    spec = unit.arrays[i]
    part = raw[position : position + spec.raw_size]
    position += spec.raw_size
    dtype = plans.DTYPES[spec.dtype]
    arrays[i] = plans.restore(symbols[i], part, spec.shape, dtype, spec.rest or 0)
  return arrays


def _concatenate(parts: Iterable[np.ndarray]) -> np.ndarray:
  return np.concatenate([np.zeros(0, np.uint8), *parts])


_stacked = jax.jit(rans.stacked, static_argnums=1)
_push_grid = jax.jit(categorical.push)
_pop_grid = jax.jit(categorical.pop)


@jax.jit
def _pop_arrangement(
  message: rans.Message, starts: jax.Array
) -> tuple[rans.Message, jax.Array]:
  return permutation.arrangements(starts).pop(message)


@jax.jit
def _push_arrangement(
  message: rans.Message, starts: jax.Array, order: jax.Array
) -> rans.Message:
  codec = permutation.arrangements(starts)
  return codec.push(message, permutation.inverse(order))

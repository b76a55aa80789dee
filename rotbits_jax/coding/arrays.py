"""Several arrays as one unit of coded streams that decodes on its own.

    array -> symbols, rests           floats.split
    symbols of all arrays -> 'rans'   one message of many lanes, one table an array
    tables -> 'tables'
    rests -> 'raw'                    bit-packed; whole arrays where that is no longer

The first words of 'raw' travel as the payload of the message's empty states, where they
cost nothing. The streams and the specs of the arrays are all that decoding needs, and
all its decisions are made by integers.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax.coding import categorical
from rotbits_jax.coding import floats
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables

Streams = dict[str, np.ndarray]

STREAMS = ('rans', 'tables', 'raw')
"""Names of the streams of a unit."""

DTYPES = {
  np.dtype(d).name: np.dtype(d)
  for d in (
    *(ml_dtypes.bfloat16, np.float16, np.float32, np.float64, np.bool_),
    *(np.int8, np.int16, np.int32, np.int64),
    *(np.uint8, np.uint16, np.uint32, np.uint64),
  )
}
"""Dtypes that can be stored, by name; all but those in `floats.LAYOUTS` as they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraySpec:
  """What is known of one array before its streams are read.

  Attributes:
    shape: of the array.
    dtype: its name.
    shift: low bits of the rests that are zero throughout and are not stored; None
      where the whole array is stored as it is.
  """

  shape: tuple[int, ...]
  dtype: str
  shift: int | None = None

  @property
  def size(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64))

  @property
  def layout(self) -> floats.Layout:
    return floats.LAYOUTS[DTYPES[self.dtype]]

  @property
  def raw_size(self) -> int:
    """Bytes of the array in the raw stream."""
    if self.shift is None:
      return self.size * DTYPES[self.dtype].itemsize
    return floats.packed_size(self.size, self.layout.rest_bits - self.shift)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitSpec:
  """What is known of a unit before its streams are read: arrays and N lanes."""

  arrays: tuple[ArraySpec, ...]
  lanes: int

  @property
  def coded(self) -> tuple[ArraySpec, ...]:
    return tuple(spec for spec in self.arrays if spec.shift is not None)

  @property
  def alphabet(self) -> int:
    return max((spec.layout.alphabet for spec in self.coded), default=0)


def encode(
  arrays: list[np.ndarray], *, numbers_per_lane: int
) -> tuple[UnitSpec, Streams]:
  """Codes arrays as one unit.

  Args:
    arrays: of dtypes in `DTYPES`.
    numbers_per_lane: least count of coded numbers that a lane is opened for. A lane
      costs 2 bytes; few lanes make a slow coder.

  Returns:
    The spec and the streams 'rans' (uint16), 'raw' (uint8), 'tables' (uint8); empty
    ones are left out.

  Raises:
    ValueError: if a dtype cannot be stored.
  """
  specs, symbols, raws, frequencies = [], [], [], []
  for array in arrays:
    spec, raw, coded = _plan(array)
    specs.append(spec)
    raws.append(raw)
    if coded is not None:
      symbols.append(coded[0])
      frequencies.append(coded[1])
  count = sum(x.size for x in symbols)
  lanes = 1 << max(count // numbers_per_lane, 1).bit_length() - 1 if count else 0
  unit = UnitSpec(arrays=tuple(specs), lanes=lanes)
  raw = np.concatenate([np.zeros(0, np.uint8), *raws])
  streams: Streams = {}
  if count:
    contexts = _contexts(unit)
    grid = np.zeros(contexts.size, np.uint16)
    grid[:count] = np.concatenate(symbols)
    table = np.stack([np.pad(f, (0, unit.alphabet - f.size)) for f in frequencies])
    payload, raw = _take_payload(raw, lanes)
    # Every 16-bit symbol moves at most one word to the stack.
    bits = sum(
      tables.cost_bits(np.bincount(s, minlength=f.size), f)
      for s, f in zip(symbols, frequencies, strict=True)
    )
    message = _push_until_it_fits(
      payload, grid.reshape(contexts.shape), contexts, _pad_tables(table), bits
    )
    streams['rans'] = rans.to_words(message)
    streams['tables'] = np.frombuffer(tables.to_bytes(table), np.uint8)
  if raw.size:
    streams['raw'] = raw
  return unit, streams


def decode(unit: UnitSpec, streams: Mapping[str, np.ndarray]) -> list[np.ndarray]:
  """The inverse of `encode`.

  Args:
    unit: the spec.
    streams: the streams; 'rans' uint16, the others uint8.

  Returns:
    The arrays, bit for bit.

  Raises:
    ValueError: if the streams do not fit the spec.
  """
  raw = streams.get('raw', np.zeros(0, np.uint8))
  coded, symbols = unit.coded, np.zeros(0, np.uint16)
  if coded:
    table = tables.from_bytes(streams['tables'].tobytes(), len(coded), unit.alphabet)
    message = rans.from_words(streams['rans'], unit.lanes)
    padded = _pad_tables(table)
    message, grid = _pop(
      message, _contexts(unit), tables.pack_intervals(padded), tables.slots(padded)
    )
    rans.check(message)
    if np.any(message.size) or np.any(message.state >> 16 != 1):
      raise ValueError('the message holds more than the symbols of its arrays')
    symbols = np.asarray(grid).reshape(-1)
    raw = np.concatenate([np.asarray(rans.payload(message)).view(np.uint8), raw])
  expected = sum(spec.raw_size for spec in unit.arrays)
  # The payload may have been filled up with zeros.
  if not expected <= raw.size <= max(expected, 2 * unit.lanes):
    raise ValueError(f'{raw.size} raw bytes, where the arrays take {expected}')
  arrays, position, taken = [], 0, 0
  for spec in unit.arrays:
    part = raw[position : position + spec.raw_size]
    position += spec.raw_size
    dtype = DTYPES[spec.dtype]
    if spec.shift is None:
      array = part.view(dtype) if part.size else np.zeros(0, dtype)
    else:
      width = spec.layout.rest_bits
      rests = floats.unpack_bits(part, spec.size, width - spec.shift)
      rests = rests << np.uint32(spec.shift) if spec.shift < width else rests
      array = np.asarray(_join(symbols[taken : taken + spec.size], rests, spec.dtype))
      taken += spec.size
    arrays.append(array.reshape(spec.shape))
  return arrays


def _plan(
  array: np.ndarray,
) -> tuple[ArraySpec, np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
  """Spec, raw bytes, and symbols with their table where coding them saves bytes."""
  if array.dtype.name not in DTYPES:
    raise ValueError(f'numbers of this dtype cannot be stored, got {array.dtype=}')
  plain = ArraySpec(shape=array.shape, dtype=array.dtype.name)
  flat = np.ascontiguousarray(array).reshape(-1)
  if array.dtype in floats.LAYOUTS and array.size:
    symbols, rests = (np.asarray(x) for x in _split(flat))
    width = plain.layout.rest_bits
    shift = floats.trailing_zeros(rests, width)
    spec = dataclasses.replace(plain, shift=shift)
    counts = np.bincount(symbols, minlength=spec.layout.alphabet)
    frequencies = tables.quantize(counts)
    cost = tables.cost_bits(counts, frequencies) / 8 + spec.raw_size
    if cost + len(tables.to_bytes(frequencies[None])) < flat.nbytes:
      packed = rests >> rests.dtype.type(shift) if shift < width else rests
      raw = floats.pack_bits(packed, width - shift)
      return spec, raw, (symbols, frequencies)
  return plain, flat.view(np.uint8) if flat.size else np.zeros(0, np.uint8), None


def _contexts(unit: UnitSpec) -> np.ndarray:
  """The table of each place in the grid of symbols: uint8 or uint16 `[T, N]`.

  T is rounded up to one of eight lengths an octave, so that units of about the same
  size share one compiled coder; places left over hold no symbol.
  """
  sizes = [spec.size for spec in unit.coded]
  steps = -(-sum(sizes) // unit.lanes)
  grain = 1 << max(steps.bit_length() - 4, 0)
  steps = -(-steps // grain) * grain
  void = _padded_count(len(sizes))
  dtype = np.uint8 if void < 256 else np.uint16
  contexts = np.full(steps * unit.lanes, void, dtype)
  contexts[: sum(sizes)] = np.repeat(np.arange(len(sizes), dtype=dtype), sizes)
  return contexts.reshape(steps, unit.lanes)


def _padded_count(count: int) -> int:
  return 1 << (count - 1).bit_length()


def _pad_tables(table: np.ndarray) -> np.ndarray:
  """Repeats the last table up to a power of two, to share compiled coders."""
  extra = _padded_count(len(table)) - len(table)
  return np.concatenate([table, np.repeat(table[-1:], extra, axis=0)])


def _take_payload(raw: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray]:
  """Two bytes a lane from the front of the raw stream, zeros where it is shorter."""
  head = np.zeros(2 * lanes, np.uint8)
  taken = min(head.size, raw.size)
  head[:taken] = raw[:taken]
  return head.view('<u2').astype(np.uint16), raw[taken:]


def _push_until_it_fits(
  payload: np.ndarray,
  symbols: np.ndarray,
  contexts: np.ndarray,
  table: np.ndarray,
  bits: float,
) -> rans.Message:
  """Pushes into a message with little room to spare, and more if a lane overflows."""
  steps, lanes = symbols.shape
  capacity = int(1.25 * bits / 16 / lanes) + 64
  while True:
    # Capacities of a few sizes only, to share compiled coders.
    capacity = min(1 << (capacity - 1).bit_length(), steps)
    message = _push(
      rans.seeded(jnp.asarray(payload), capacity),
      symbols,
      contexts,
      tables.pack_intervals(table),
    )
    if capacity == steps or int(np.max(message.highest)) <= capacity:
      return message
    capacity *= 2


_push = jax.jit(categorical.push)
_pop = jax.jit(categorical.pop)
_split = jax.jit(floats.split)


@functools.partial(jax.jit, static_argnames='dtype')
def _join(symbols: Any, rests: Any, dtype: str) -> jax.Array:
  return floats.join(symbols, rests, DTYPES[dtype])

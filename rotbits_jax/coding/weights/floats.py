"""Floating-point numbers as a symbol worth modelling and bits that are noise.

The bits of a number, from the top, are its sign, its exponent and its mantissa. In
trained weights only the exponent and the first bits of the mantissa are predictable.
They become the symbol. The sign and the low bits of the mantissa cannot be compressed;
they become the rest, which is stored unchanged.

    bits   = [ sign | exponent e | mantissa m ]
    symbol = [ exponent e | top t of the mantissa ]        t = min(3, m)
    rest   = [ sign | low m - t of the mantissa ]

Numbers may be rounded so that all small ones share one step. In IEEE 754 the numbers
with the exponents 0 and 1 share a step. The *floor* f is the greatest exponent whose
numbers share the step of all numbers below them, so IEEE 754 itself has the floor 1. A
magnitude is [ exponent | mantissa ]. With a floor f it is replaced by

    magnitude - (f - 1) 2^m                  if its exponent is at least f,
    the value divided by the step            otherwise.

The second line is an integer. Both lines give the same result for numbers with the
exponent f, because IEEE 754 defines subnormal numbers in this way. Exponents are
biased, as they are in the bits.
"""

from collections.abc import Iterator
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

MODELLED_MANTISSA_BITS = 3


class Layout(NamedTuple):
  """How many bits of a dtype the exponent and the mantissa have."""

  width: int
  exponent: int
  mantissa: int

  @property
  def modelled_mantissa(self) -> int:
    return min(MODELLED_MANTISSA_BITS, self.mantissa)

  @property
  def alphabet(self) -> int:
    return 1 << (self.exponent + self.modelled_mantissa)

  @property
  def rest_bits(self) -> int:
    return self.width - self.exponent - self.modelled_mantissa


LAYOUTS = {
  np.dtype(np.float16): Layout(width=16, exponent=5, mantissa=10),
  np.dtype(ml_dtypes.bfloat16): Layout(width=16, exponent=8, mantissa=7),
  np.dtype(np.float32): Layout(width=32, exponent=8, mantissa=23),
}
"""The dtypes whose numbers are divided in this way."""


def split(values: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Divides numbers into symbols and rests.

  Args:
    values: an array of a dtype in `LAYOUTS`.

  Returns:
    Symbols, uint16, and rests, uint16 or uint32 as wide as the numbers; same shape.
  """
  layout = LAYOUTS[np.dtype(values.dtype)]
  unsigned = jnp.dtype(f'uint{layout.width}')
  return split_bits(jax.lax.bitcast_convert_type(values, unsigned), layout)


def join(symbols: jax.Array, rests: jax.Array, dtype: np.dtype) -> jax.Array:
  """Returns the numbers with these symbols and rests: the inverse of `split`."""
  layout = LAYOUTS[np.dtype(dtype)]
  return jax.lax.bitcast_convert_type(join_bits(symbols, rests, layout), dtype)


def split_bits(bits: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
  """Does the same as `split` for bit patterns: unsigned integers of the same width."""
  kind = bits.dtype.type
  low = layout.rest_bits - 1
  symbols = (bits >> low) & kind(layout.alphabet - 1)
  sign = bits >> (layout.width - 1)
  return symbols.astype(jnp.uint16), sign << low | bits & kind((1 << low) - 1)


def join_bits(symbols: jax.Array, rests: jax.Array, layout: Layout) -> jax.Array:
  """Returns the bit patterns: the inverse of `split_bits`."""
  unsigned = jnp.dtype(f'uint{layout.width}')
  low = layout.rest_bits - 1
  rests = rests.astype(unsigned)
  sign = (rests >> low) << (layout.width - 1)
  mantissa = rests & unsigned.type((1 << low) - 1)
  return sign | symbols.astype(unsigned) << low | mantissa


def raise_floor(bits: jax.Array, layout: Layout, floor: Any) -> jax.Array:
  """Replaces the magnitudes in bit patterns by those of a floor; see the module.

  Args:
    bits: unsigned integers as wide as the numbers. Numbers with an exponent below the
      floor must be multiples of the floor's step.
    layout: layout of the dtype.
    floor: f, an integer of at least 1; it may be traced. 1 changes nothing.

  Returns:
    Unsigned integers of the same shape and width.
  """
  kind, top = bits.dtype.type, layout.mantissa
  magnitude = bits & kind((1 << layout.width - 1) - 1)
  floor = jnp.asarray(floor).astype(bits.dtype)
  exponent = jnp.maximum(magnitude >> top, kind(1))
  shift = jnp.where(exponent < floor, floor - exponent, kind(0))
  steps = _significand(magnitude, top) >> jnp.minimum(shift, kind(layout.width - 1))
  raised = jnp.where(shift > 0, steps, magnitude - (floor - kind(1) << top))
  return bits - magnitude | raised


def lower_floor(bits: jax.Array, layout: Layout, floor: Any) -> jax.Array:
  """Restores the magnitudes: the inverse of `raise_floor`."""
  kind, top = bits.dtype.type, layout.mantissa
  magnitude = bits & kind((1 << layout.width - 1) - 1)
  floor = jnp.asarray(floor).astype(jnp.int32)
  # A float32 holds an integer below 2^24 exactly, and its bits tell the exponent.
  wide = jax.lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32)
  below = floor - jnp.int32(127 + top)
  normal = ((wide >> (23 - top)) + (below << top)).astype(bits.dtype)
  subnormal = magnitude << jnp.clip(floor - 1, 0, layout.width - 1).astype(bits.dtype)
  small = jnp.where((wide >> 23) + below >= 1, normal, subnormal)
  small = jnp.where(magnitude > 0, small, kind(0))
  large = magnitude + ((floor - 1) << top).astype(bits.dtype)
  return bits - magnitude | jnp.where(magnitude >> top > 0, large, small)


class Survey(NamedTuple):
  """Properties of some numbers.

  Attributes:
    used: the union of their bit patterns.
    greatest: the greatest of their magnitudes.
    lowest: an exponent. All numbers are multiples of the step that the floor
      `lowest + 1` has, and not of a coarser one; it may be negative or large.
    exponents: the sum of the exponents of the numbers that are not 0.
    count: how many numbers are not 0.
    negative_zeros: 1 if a number is -0, else 0.
  """

  used: Any
  greatest: Any
  lowest: Any
  exponents: Any
  count: Any
  negative_zeros: Any


_CHUNK = 1 << 18


def survey(bits: np.ndarray, layout: Layout) -> Survey:
  """Looks at the bit patterns of numbers, unsigned integers `[n]`, not empty."""
  found = [jax.device_get(_survey(part, layout)) for part in _chunks(bits)]
  columns = Survey(*(list(map(int, column)) for column in zip(*found, strict=True)))
  return Survey(
    used=functools.reduce(operator.or_, columns.used),
    greatest=max(columns.greatest),
    lowest=min(columns.lowest),
    exponents=sum(columns.exponents),
    count=sum(columns.count),
    negative_zeros=max(columns.negative_zeros),
  )


def _chunks(bits: np.ndarray) -> Iterator[np.ndarray]:
  """Yields parts of one size, which is the size of their compiled program."""
  for start in range(0, bits.size, _CHUNK):
    part = bits[start : start + _CHUNK]
    size = _CHUNK if bits.size > _SMALL_CHUNK else _SMALL_CHUNK
    if part.size < size:
      part = np.concatenate([part, np.zeros(size - part.size, part.dtype)])
    yield part


_SMALL_CHUNK = 1 << 12


@functools.partial(jax.jit, static_argnums=1)
def _survey(bits: jax.Array, layout: Layout) -> Survey:
  kind, top = bits.dtype.type, layout.mantissa
  magnitude = bits & kind((1 << layout.width - 1) - 1)
  exponent = jnp.maximum(magnitude >> top, kind(1)).astype(jnp.int32)
  significand = _significand(magnitude, top)
  lowest = significand & (kind(0) - significand)
  # A float32 holds a power of two exactly, and its bits tell the exponent.
  wide = jax.lax.bitcast_convert_type(lowest.astype(jnp.float32), jnp.int32)
  present = magnitude > 0
  lowest = jnp.where(present, exponent - 1 + (wide >> 23) - 127, 1 << 30)
  return Survey(
    used=_or(bits),
    greatest=magnitude.max(),
    lowest=lowest.min(),
    exponents=jnp.where(present, exponent, 0).sum(dtype=jnp.int32),
    count=present.sum(dtype=jnp.int32),
    negative_zeros=((bits > 0) & ~present).max(),
  )


def divisor(bits: np.ndarray, layout: Layout, unit: int) -> int:
  """Returns 7, 5 or 3 if all numbers are multiples of that times 2^unit, else 1.

  Args:
    bits: bit patterns of numbers, unsigned integers `[n]`. The numbers are multiples of
      2^unit and less than 2^23 times that.
    layout: layout of the dtype.
    unit: exponent of a power of two.
  """
  lowest = unit - 1 + (1 << layout.exponent - 1) - 1 + layout.mantissa
  common = np.ones(3, bool)
  for part in _chunks(bits):
    common &= np.asarray(_divisible(part, np.int32(lowest), layout))
  return next((d for d, all in zip((7, 5, 3), common, strict=True) if all), 1)


@functools.partial(jax.jit, static_argnums=2)
def _divisible(bits: jax.Array, lowest: jax.Array, layout: Layout) -> jax.Array:
  magnitude = bits & bits.dtype.type((1 << layout.width - 1) - 1)
  exponent = jnp.maximum(magnitude >> layout.mantissa, 1).astype(jnp.int32)
  significand = _significand(magnitude, layout.mantissa).astype(jnp.uint32)
  shift = exponent - 1 - lowest
  whole = jnp.where(
    shift >= 0,
    significand << jnp.clip(shift, 0, 31).astype(jnp.uint32),
    significand >> jnp.clip(-shift, 0, 31).astype(jnp.uint32),
  )
  return jnp.stack([jnp.all(whole % d == 0) for d in (7, 5, 3)])


def _or(bits: jax.Array) -> jax.Array:
  return jax.lax.reduce(bits, bits.dtype.type(0), jax.lax.bitwise_or, (0,))


def _significand(magnitude: jax.Array, top: int) -> jax.Array:
  """Returns the mantissa, with the leading 1 that normal numbers have."""
  kind = magnitude.dtype.type
  leading = (magnitude >> top > 0).astype(magnitude.dtype) << top
  return magnitude & kind((1 << top) - 1) | leading


def pack_bits(values: np.ndarray, width: int) -> np.ndarray:
  """Packs unsigned integers of `width` bits densely.

  Args:
    values: unsigned integers `[n]` below 2^width.
    width: number of bits of an integer.

  Returns:
    uint8 `[packed_size(n, width)]`: the low `width // 8` bytes as planes of n bytes,
    then the bits above them as planes of ceil(n / 8) bytes.
  """
  planes = [(values >> np.uint8(8 * i)).astype(np.uint8) for i in range(width // 8)] + [
    np.packbits((values >> np.uint8(i)).astype(np.uint8) & 1)
    for i in range(width // 8 * 8, width)
  ]
  return np.concatenate([np.zeros(0, np.uint8), *planes])


def unpack_bits(data: np.ndarray, count: int, width: int) -> np.ndarray:
  """Returns the integers, uint32 `[count]`: the inverse of `pack_bits`."""
  values = np.zeros(count, np.uint32)
  position = 0
  for i in range(width // 8):
    values |= data[position : position + count].astype(np.uint32) << np.uint32(8 * i)
    position += count
  plane_size = -(-count // 8)
  for i in range(width // 8 * 8, width):
    plane = np.unpackbits(data[position : position + plane_size], count=count)
    values |= plane.astype(np.uint32) << np.uint32(i)
    position += plane_size
  return values


def packed_size(count: int, width: int) -> int:
  """Returns the number of bytes that `pack_bits` makes of `count` integers."""
  return count * (width // 8) + -(-count // 8) * (width % 8)

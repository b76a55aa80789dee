"""Floating-point numbers as a symbol worth modelling and bits that are noise.

A number's bits, from the top, are sign, exponent, mantissa. Of trained weights only
the exponent and the first bits of the mantissa are predictable: they become the symbol;
the sign and the rest of the mantissa are incompressible and are stored as they are.

    bits   = [ sign | exponent e | mantissa m ]
    symbol = [ exponent e | top t of the mantissa ]        t = min(3, m)
    rest   = [ sign | low m - t of the mantissa ]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

MODELLED_MANTISSA_BITS = 3


class Layout(NamedTuple):
  """How the bits of a dtype divide."""

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
"""The dtypes whose numbers are modelled."""


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
  """The inverse of `split`."""
  layout = LAYOUTS[np.dtype(dtype)]
  return jax.lax.bitcast_convert_type(join_bits(symbols, rests, layout), dtype)


def split_bits(bits: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
  """`split`, of bit patterns: unsigned integers as wide as the numbers."""
  kind = bits.dtype.type
  low = layout.rest_bits - 1
  symbols = (bits >> low) & kind(layout.alphabet - 1)
  sign = bits >> (layout.width - 1)
  return symbols.astype(jnp.uint16), sign << low | bits & kind((1 << low) - 1)


def join_bits(symbols: jax.Array, rests: jax.Array, layout: Layout) -> jax.Array:
  """The inverse of `split_bits`."""
  unsigned = jnp.dtype(f'uint{layout.width}')
  low = layout.rest_bits - 1
  rests = rests.astype(unsigned)
  sign = (rests >> low) << (layout.width - 1)
  mantissa = rests & unsigned.type((1 << low) - 1)
  return sign | symbols.astype(unsigned) << low | mantissa


def pack_bits(values: np.ndarray, width: int) -> np.ndarray:
  """Unsigned integers of `width` bits, densely.

  Args:
    values: unsigned integers `[n]` below 2^width.
    width: bits of each.

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
  """The inverse of `pack_bits`, for `count` values: uint32 `[count]`."""
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
  """Bytes that `pack_bits` makes of `count` values."""
  return count * (width // 8) + -(-count // 8) * (width % 8)

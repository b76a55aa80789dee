"""Short integers as a symbol worth modelling and low bits that are stored as they are.

Signed ones are folded first, 0, -1, 1, -2, ... to 0, 1, 2, 3, ..., so that small
magnitudes are small symbols. Of the number n >= 0 that this gives,

    symbol = n >> low        rest = n & (2^low - 1)

Numbers are given as bit patterns: unsigned integers of their width.
"""

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = tuple(np.dtype(d) for d in (np.int8, np.uint8, np.int16, np.uint16))
"""The integers that are modelled."""

MODELLED_BITS = 14
"""Symbols of int16 and uint16 are below 2^14, because larger tables are too slow."""


def least_low(largest: int, least: int, signed: bool, bits: int) -> int:
  """Returns the least `low` for which all symbols are below 2^bits.

  Args:
    largest: the largest number.
    least: the least number.
    signed: whether numbers are folded.
    bits: bits of a symbol.
  """
  folded = max(2 * largest, -2 * least - 1) if signed else largest
  return max(folded.bit_length() - bits, 0)


def cells(alphabet: int, low: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the cells of the symbols of signed numbers, as `layouts.Layout.cells`."""
  symbols = np.arange(alphabet, dtype=np.int64)
  zeros = np.zeros_like(symbols)
  if low:
    return 2 * symbols + 1, zeros + low - 2, zeros
  return (symbols + 1) // 2, zeros, zeros


def split_bits(bits: jax.Array, low: int, signed: bool) -> tuple[jax.Array, jax.Array]:
  """Divides numbers into symbols and rests.

  Args:
    bits: uint8 or uint16.
    low: bits of the rests, at least `least_low` of the numbers.
    signed: whether they are two's complements.

  Returns:
    Symbols, uint16, and rests, as wide as the numbers; same shape.
  """
  kind = bits.dtype.type
  if signed:
    sign = bits >> (8 * bits.dtype.itemsize - 1)
    bits = (bits << 1) ^ (kind(0) - sign)
  return (bits >> low).astype(jnp.uint16), bits & kind((1 << low) - 1)


def join_bits(
  symbols: jax.Array, rests: jax.Array, low: int, dtype: np.dtype
) -> jax.Array:
  """The inverse of `split_bits`, for numbers of this dtype."""
  unsigned = jnp.dtype(f'uint{8 * dtype.itemsize}')
  folded = symbols.astype(unsigned) << low | rests.astype(unsigned)
  if dtype.kind == 'u':
    return folded
  return (folded >> 1) ^ (unsigned.type(0) - (folded & unsigned.type(1)))

"""Short integers: the top bits are the symbol, the low bits are the rest.

Signed integers are folded first: 0, -1, 1, -2, ... become 0, 1, 2, 3, ... Then small
magnitudes have small symbols. For the folded integer n,

    symbol = n >> low        rest = n & (2^low - 1)

The functions take and return bit patterns: unsigned integers of the same width.
"""

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = tuple(np.dtype(d) for d in (np.int8, np.uint8, np.int16, np.uint16))
"""The dtypes that have such symbols."""

MODELLED_BITS = 14
"""Symbols of int16 and uint16 are below 2^14, because larger tables are too slow."""


def least_low(largest: int, least: int, signed: bool, bits: int) -> int:
  """Returns the least `low` for which all symbols are below 2^bits.

  Args:
    largest: the largest number.
    least: the least number.
    signed: whether the numbers are folded.
    bits: number of bits of a symbol.
  """
  folded = max(2 * largest, -2 * least - 1) if signed else largest
  return max(folded.bit_length() - bits, 0)


def cells(alphabet: int, low: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns what `layouts.Layout.cells` returns, for signed integers."""
  symbols = np.arange(alphabet, dtype=np.int64)
  zeros = np.zeros_like(symbols)
  if low:
    return 2 * symbols + 1, zeros + low - 2, zeros
  return (symbols + 1) // 2, zeros, zeros


def split_bits(bits: jax.Array, low: int, signed: bool) -> tuple[jax.Array, jax.Array]:
  """Divides integers into symbols and rests.

  Args:
    bits: bit patterns, uint8 or uint16.
    low: number of bits of a rest, at least `least_low` of the integers.
    signed: whether the integers are signed, in two's complement.

  Returns:
    The symbols, uint16, and the rests, which are as wide as the integers. Both have the
    shape of `bits`.
  """
  kind = bits.dtype.type
  if signed:
    sign = bits >> (8 * bits.dtype.itemsize - 1)
    bits = (bits << 1) ^ (kind(0) - sign)
  return (bits >> low).astype(jnp.uint16), bits & kind((1 << low) - 1)


def join_bits(
  symbols: jax.Array, rests: jax.Array, low: int, dtype: np.dtype
) -> jax.Array:
  """Returns the bit patterns of integers of a dtype: the inverse of `split_bits`."""
  unsigned = jnp.dtype(f'uint{8 * dtype.itemsize}')
  folded = symbols.astype(unsigned) << low | rests.astype(unsigned)
  if dtype.kind == 'u':
    return folded
  return (folded >> 1) ^ (unsigned.type(0) - (folded & unsigned.type(1)))

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
"""A table has no more symbols; outliers beyond cost all numbers a bit an octave."""


def least_low(values: np.ndarray) -> int:
  """The least `low` for which all symbols are below 2^`MODELLED_BITS`."""
  largest, least = int(values.max(initial=0)), int(values.min(initial=0))
  folded = largest if values.dtype.kind == 'u' else max(2 * largest, -2 * least - 1)
  return max(folded.bit_length() - MODELLED_BITS, 0)


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

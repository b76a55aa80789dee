"""Short integers as a symbol worth modelling and low bits that are stored as they are.

Signed ones are folded first, 0, -1, 1, -2, ... to 0, 1, 2, 3, ..., so that small
magnitudes are small symbols. Of the number n >= 0 that this gives,

    symbol = n >> low        rest = n & (2^low - 1)

Host code, NumPy only: there is next to nothing to compute.
"""

import numpy as np

DTYPES = tuple(np.dtype(d) for d in (np.int8, np.uint8, np.int16, np.uint16))
"""The integers that are modelled."""

MODELLED_BITS = 14
"""A table has no more symbols; outliers beyond cost all numbers a bit an octave."""


def least_low(values: np.ndarray) -> int:
  """The least `low` for which all symbols are below 2^`MODELLED_BITS`."""
  folded = _fold(values)
  return max(int(folded.max(initial=0)).bit_length() - MODELLED_BITS, 0)


def split(values: np.ndarray, low: int) -> tuple[np.ndarray, np.ndarray]:
  """Divides numbers into symbols and rests.

  Args:
    values: an array of a dtype in `DTYPES`.
    low: bits of the rests, at least `least_low(values)`.

  Returns:
    Symbols, uint16, and rests, as wide as the numbers; same shape.
  """
  folded = _fold(values)
  kind = folded.dtype.type
  return (folded >> kind(low)).astype(np.uint16), folded & kind((1 << low) - 1)


def join(
  symbols: np.ndarray, rests: np.ndarray, low: int, dtype: np.dtype
) -> np.ndarray:
  """The inverse of `split`."""
  unsigned = np.dtype(f'u{dtype.itemsize}')
  folded = symbols.astype(unsigned) << unsigned.type(low) | rests.astype(unsigned)
  if dtype.kind == 'u':
    return folded
  one = unsigned.type(1)
  return ((folded >> one) ^ (unsigned.type(0) - (folded & one))).view(dtype)


def _fold(values: np.ndarray) -> np.ndarray:
  if values.dtype.kind == 'u':
    return values
  width = 8 * values.dtype.itemsize
  return ((values << 1) ^ (values >> (width - 1))).view(f'u{values.dtype.itemsize}')

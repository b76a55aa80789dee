"""Grids: the numbers that quantised arrays have before they are scaled."""

import functools
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

Name = Literal['int8', 'int4', 'float8_e4m3fn', 'float8_e5m2', 'float4_e2m1fn']


class Grid(NamedTuple):
  """The magnitudes of a dtype."""

  magnitudes: np.ndarray  # float32, ascending from 0
  # Indices of those that the greatest element of a block may have, likely ones first.
  tops: tuple[int, ...]
  unit: float | None = None  # of a grid of 4 bits, which numbers count

  def nearest(self, numbers: np.ndarray) -> tuple[np.ndarray, Any]:
    """Returns the magnitudes next to numbers that are not negative, and their gaps.

    The gap of a magnitude is its distance to the next one, below or above.
    """
    most = len(self.magnitudes) - 1
    if self.magnitudes[most] == most:  # integers
      return np.minimum(np.rint(numbers), most), 1
    # A number of 16 bits is the least one of those that begin with its bits, and a
    # border between two magnitudes is such a number.
    high = (numbers.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.intp)
    magnitudes, gaps = _nearest(self.magnitudes.tobytes())
    return magnitudes.take(high, mode='clip'), gaps.take(high, mode='clip')


@functools.cache
def _nearest(magnitudes: bytes) -> tuple[np.ndarray, np.ndarray]:
  """Returns the result of `Grid.nearest` for float32 that begin with 16 bits."""
  floats = np.frombuffer(magnitudes, np.float32)
  numbers = (np.arange(1 << 15, dtype=np.uint32) << np.uint32(16)).view(np.float32)
  index = np.searchsorted((floats[1:] + floats[:-1]) / 2, numbers, side='right')
  gaps = np.pad(np.diff(floats), 1, constant_values=np.inf)
  return floats[index], np.minimum(gaps[1:], gaps[:-1])[index]


def _floats(dtype: type, tops: tuple[int, ...], unit: float | None = None) -> Grid:
  bits = np.arange(1 << ml_dtypes.finfo(dtype).bits - 1, dtype=np.uint8)
  magnitudes = bits.view(dtype).astype(np.float32)
  return Grid(magnitudes[np.isfinite(magnitudes)], tops, unit)


# The greatest element has the greatest code, unless the scale is a power of two or was
# rounded. Codes of 4 bits less a zero point are integers up to 15. Codes of 6 bits are
# int8, too.
GRIDS: dict[Name, Grid] = {
  'float4_e2m1fn': _floats(ml_dtypes.float4_e2m1fn, (7, 6, 5, 4, 3), 0.5),
  'int4': Grid(
    np.arange(16, dtype=np.float32), (7, 8, *range(15, 8, -1), *range(6, 0, -1)), 1.0
  ),
  'float8_e5m2': _floats(ml_dtypes.float8_e5m2, (123, 122, 121, 120)),
  'float8_e4m3fn': _floats(ml_dtypes.float8_e4m3fn, tuple(range(126, 118, -1))),
  'int8': Grid(
    np.arange(129, dtype=np.float32), (127, 128, 31, 32, 63, *range(126, 119, -1))
  ),
}
"""The grids by name, those of the fewest magnitudes first."""


# Leaves store float8 as it is, and others as int8; those of 4 bits from -16 to 15.


def holds(name: Name, numbers: np.ndarray) -> bool:
  """Returns whether stored numbers are of a grid."""
  grid, dtype = GRIDS[name], numbers.dtype
  if not name.startswith('float8'):
    is_small = grid.unit is None or (numbers.min() >= -16 and numbers.max() <= 15)
    return bool(dtype == np.int8 and is_small)
  if dtype.name != name:
    return False
  bits: Any = numbers.view(np.uint8)
  most = len(grid.magnitudes) - 1
  return bool(bits.view(np.int8).max() <= most and bits.max() <= most + 128)


def floats(name: Name, numbers: Any) -> Any:
  """Returns the float32 of stored numbers, given as uint8, of NumPy or JAX."""
  if not name.startswith('float8'):
    return numbers.view(np.int8).astype(np.float32)
  if isinstance(numbers, np.ndarray):
    return _float8(name).take(numbers, mode='clip')
  # XLA converts float8 slowly, and has no subnormal float32.
  form, bits = ml_dtypes.finfo(name), numbers.astype(np.uint32)
  magnitude = bits & 0x7F
  normal = (magnitude << 23 - form.nmant) + np.uint32(126 + form.minexp << 23)
  step = np.float32(2.0 ** (form.minexp - form.nmant))
  subnormal = (magnitude.astype(np.float32) * step).view(np.uint32)
  whole = jnp.where(magnitude >> form.nmant > 0, normal, subnormal)
  return (whole | (bits & 0x80) << 24).view(np.float32)


@functools.cache
def _float8(name: Name) -> np.ndarray:
  """Returns the float32 of each bit pattern of a float8 dtype."""
  bits = np.arange(256, dtype=np.uint8)
  return bits.view(getattr(ml_dtypes, name)).astype(np.float32)


def float8(name: Name, floats: np.ndarray) -> np.ndarray:
  """Returns numbers of a float8 grid, given their float32: the inverse of `floats`."""
  form = ml_dtypes.finfo(name)
  factor = np.float32(2.0 ** -(form.minexp + 14))
  bits = (floats * factor).astype(np.float16).view(np.int16) >> 10 - form.nmant
  return (bits >> 8 & 0x80 | bits & 0x7F).astype(np.uint8).view(form.dtype)

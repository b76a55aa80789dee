"""Grids: the numbers that quantised arrays have before they are scaled."""

from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np

Name = Literal['int8', 'int4', 'float8_e4m3fn', 'float8_e5m2', 'float4_e2m1fn']

NEGATIVE_ZERO = -16


class Grid(NamedTuple):
  """The magnitudes of a dtype."""

  magnitudes: np.ndarray  # float32, ascending from 0
  # Indices of those that the greatest element of a block may have, likely ones first.
  tops: tuple[int, ...]
  unit: float | None = None  # of a grid of 4 bits: int8 counts units, and -16 is -0

  def nearest(self, numbers: np.ndarray) -> np.ndarray:
    """Returns the indices of the magnitudes next to numbers that are not negative."""
    magnitudes, most = self.magnitudes, len(self.magnitudes) - 1
    if magnitudes[most] == most:  # integers
      return np.minimum(np.rint(numbers), most).astype(np.uint8)
    borders = (magnitudes[1:] + magnitudes[:-1]) / 2
    return np.searchsorted(borders, numbers.astype(np.float32)).astype(np.uint8)

  def table(self, dtype: np.dtype) -> np.ndarray:
    """Returns the stored number of each magnitude, and then that of its negative."""
    numbers = np.append(self.magnitudes, -self.magnitudes)
    if self.unit:
      numbers /= self.unit
      numbers[len(self.magnitudes)] = NEGATIVE_ZERO
    return np.clip(numbers, -128, 127).astype(dtype) if dtype == np.int8 else numbers


def _floats(dtype: type, tops: tuple[int, ...], unit: float | None = None) -> Grid:
  bits = np.arange(1 << ml_dtypes.finfo(dtype).bits - 1, dtype=np.uint8)
  magnitudes = bits.view(dtype).astype(np.float32)
  return Grid(magnitudes[np.isfinite(magnitudes)], tops, unit)


# The greatest element has the greatest code, unless the scale is a power of two or was
# rounded. Codes of 4 bits less a zero point are integers up to 15.
GRIDS: dict[Name, Grid] = {
  'float4_e2m1fn': _floats(ml_dtypes.float4_e2m1fn, (7, 6, 5, 4, 3), 0.5),
  'int4': Grid(
    np.arange(16, dtype=np.float32),
    (7, 8, 15, *range(14, 8, -1), 6, 5, 4, 3, 2, 1),
    1.0,
  ),
  'float8_e5m2': _floats(ml_dtypes.float8_e5m2, (123, 122, 121, 120)),
  'float8_e4m3fn': _floats(ml_dtypes.float8_e4m3fn, (126, *range(125, 118, -1))),
  'int8': Grid(np.arange(129, dtype=np.float32), (127, 128, 126, 125)),
}
"""The grids by name, those of the fewest magnitudes first."""

"""Integers whose classes encoder and decoder know from elsewhere.

Neighbouring classes of one shift may share a frequency table; they are a *band*. See
`layouts` for the shift of a table.

Shape letters: n elements, K classes.
"""

from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import layouts


class Known(NamedTuple):
  """The classes of the integers of an array, which encoder and decoder know."""

  classes: np.ndarray  # uint8 `[n]`, the class of each element in C order
  # The shift of each of the K classes, from 0 to `layouts.MOST_SHIFT`. Of a class with
  # the shift s, elements x outside -2^(s + 7) <= x < 2^(s + 7) take more bits than
  # without coding.
  shifts: tuple[int, ...]

  def check(self, size: int) -> 'Known':
    """Returns itself if it fits an array of this size, else raises a ValueError."""
    if self.classes.shape != (size,) or self.classes.dtype != np.uint8:
      raise ValueError(f'{size} elements cannot have {self.classes.shape=}')
    count = len(self.shifts)
    if not 0 < count <= 256 or self.classes.max(initial=0) >= count:
      raise ValueError(f'the classes of an array must be below {count}')
    if not 0 <= min(self.shifts) <= max(self.shifts) <= layouts.MOST_SHIFT:
      raise ValueError(f'shifts must be from 0 to {layouts.MOST_SHIFT}')
    return self


class Bands(NamedTuple):
  """The bands of an array of known classes."""

  known: Known
  sizes: np.ndarray  # uint8, how many neighbouring classes each band has

  @property
  def shifts(self) -> np.ndarray:
    """The shift of each band; the classes of a band must have the same."""
    firsts = np.cumsum(self.sizes, dtype=int) - self.sizes
    shifts = np.array(self.known.shifts)[firsts]
    if np.any(np.repeat(shifts, self.sizes) != self.known.shifts):
      raise ValueError('the classes of a band have different shifts')
    return shifts

  def write(
    self, out: np.ndarray, start: int, shape: tuple[int, ...], size: int
  ) -> None:
    """Writes the band of each element, as `contexts.Scales.write` does."""
    del shape, size
    bands = np.repeat(np.arange(self.sizes.size, dtype=np.uint8), self.sizes)
    classes = self.known.classes[start : start + out.size]
    np.take(bands, classes, out=out, mode='clip')

"""The contexts of integers whose classes encoder and decoder know from elsewhere.

Neighbouring classes of one shift may share a frequency table; they are a *band*. See
`layouts` for the shift of a table.

Shape letters: n elements, K classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import blocks
from rotbits_jax.coding import contexts
from rotbits_jax.coding import layouts
from rotbits_jax.coding import tables

ALPHABET = 256


class Known(NamedTuple):
  """What encoder and decoder know of the integers of an array.

  Attributes:
    classes: uint8 `[n]`, the class of each element in C order.
    shifts: the shift of each of the K classes, from 0 to `layouts.MOST_SHIFT`; an
      element x of a class with the shift s has -2^(s + 7) <= x < 2^(s + 7).
  """

  classes: np.ndarray
  shifts: tuple[int, ...]

  def check(self, size: int) -> 'Known':
    """Returns itself if it fits an array of this size.

    Raises:
      ValueError: if it does not.
    """
    if self.classes.shape != (size,) or self.classes.dtype != np.uint8:
      raise ValueError(f'{size} elements cannot have {self.classes.shape=}')
    count = len(self.shifts)
    if not 0 < count <= blocks.MAX_TABLES or self.classes.max(initial=0) >= count:
      raise ValueError(f'the classes of an array must be below {count}')
    if not 0 <= min(self.shifts) <= max(self.shifts) <= layouts.MOST_SHIFT:
      raise ValueError(f'shifts must be from 0 to {layouts.MOST_SHIFT}')
    return self


class Bands(NamedTuple):
  """The tables with which an array of known classes is coded.

  Attributes:
    known: the classes.
    sizes: uint8, how many neighbouring classes each band has.
    frequencies: int64, the table of each band, `[., 256]`.
  """

  known: Known
  sizes: np.ndarray
  frequencies: np.ndarray

  @property
  def _of_classes(self) -> np.ndarray:
    return np.repeat(np.arange(self.sizes.size, dtype=np.uint8), self.sizes)

  def tables(self, layout: layouts.Layout) -> blocks.Tables:
    del layout
    firsts = np.cumsum(self.sizes, dtype=int) - self.sizes
    shifts = np.array(self.known.shifts)[firsts]
    return blocks.Tables.make(self.frequencies, shifts)

  def write(
    self, out: np.ndarray, index: int, start: int, shape: tuple[int, ...]
  ) -> None:
    """Writes the index of each element's table, as `contexts.Contexts.write` does."""
    del index, shape
    classes = self.known.classes[start : start + out.size]
    np.take(self._of_classes, classes, out=out, mode='clip')


def fit(known: Known, counts: np.ndarray) -> tuple[Bands, float]:
  """Puts neighbouring classes of one shift together where that saves bits.

  Args:
    known: the classes.
    counts: int64 `[K, 256]`, how often each symbol occurs in each class.

  Returns:
    The bands; and about how many bytes they and the elements take.
  """
  bits = _table_bits(counts).tolist()
  bands: list[tuple[int, int, np.ndarray, float]] = []  # first, classes, counts, bits
  for i, shift in enumerate(known.shifts):
    if bands and known.shifts[bands[-1][0]] == shift:
      first, size, band_counts, cost = bands[-1]
      both = float(_table_bits(band_counts + counts[i])) if bits[i] else cost
      if both <= cost + bits[i]:
        bands[-1] = first, size + 1, band_counts + counts[i], both
        continue
    bands.append((i, 1, counts[i], bits[i]))
  raw = float(counts.sum(axis=1) @ np.array(known.shifts))
  nbytes = (raw + sum(x[3] for x in bands)) / 8
  sizes = np.array([x[1] for x in bands], np.uint8)
  frequencies = np.stack([x[2] for x in bands])
  frequencies[~frequencies.any(axis=1), 0] = 1
  return Bands(known, sizes, tables.quantize(frequencies)), nbytes


def _table_bits(counts: np.ndarray) -> np.ndarray:
  """Returns about the bits of symbols and of their tables: `[...]`."""
  whole = np.maximum(counts.sum(axis=-1, keepdims=True), 1)
  coded = tables.cost_bits(counts, np.maximum(counts * (tables.TOTAL / whole), 1))
  return coded + 8 * np.count_nonzero(counts, axis=-1)


def to_bytes(bands: Bands) -> bytes:
  """Serialises bands: their sizes, deflated, and their tables."""
  return contexts.deflate(bands.sizes.tobytes()) + tables.to_bytes(bands.frequencies)


def from_bytes(data: bytes, known: Known) -> Bands:
  """Makes bands from bytes: the inverse of `to_bytes`.

  Raises:
    ValueError: if the bytes are not bands of such classes.
  """
  sizes, data = contexts.inflate(data, len(known.shifts))
  if not sizes.all() or int(sizes.sum()) != len(known.shifts):
    raise ValueError(f'{sizes.size} bands do not have {len(known.shifts)} classes')
  if any(len(set(shifts)) > 1 for shifts in _divided(known.shifts, sizes)):
    raise ValueError('the classes of a band have different shifts')
  return Bands(known, sizes, tables.from_bytes(data, sizes.size, ALPHABET))


def _divided(shifts: Sequence[int], sizes: np.ndarray) -> list[np.ndarray]:
  """Returns the shifts of the classes of each band."""
  return np.split(np.array(shifts), np.cumsum(sizes, dtype=int)[:-1])

"""The contexts of integers whose classes encoder and decoder know from elsewhere.

Neighbouring classes of one shift may share a frequency table; they are a *band*. See
`layouts` for the shift of a table.

Shape letters: n elements, K classes.
"""

from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import contexts
from rotbits_jax.coding import layouts
from rotbits_jax.coding import tables


class Known(NamedTuple):
  """What encoder and decoder know of the integers of an array.

  Attributes:
    classes: uint8 `[n]`, the class of each element in C order.
    shifts: the shift of each of the K classes, from 0 to `layouts.MOST_SHIFT`. Of a
      class with the shift s, elements x outside -2^(s + 7) <= x < 2^(s + 7) take more
      bits than without coding.
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
    if not 0 < count <= 256 or self.classes.max(initial=0) >= count:
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

  def tables(self, layout: layouts.Integers) -> layouts.Tables:
    firsts = np.cumsum(self.sizes, dtype=int) - self.sizes
    return layout.tables(self.frequencies, np.array(self.known.shifts)[firsts])

  def write(
    self, out: np.ndarray, index: int, start: int, shape: contexts.Shape, size: int
  ) -> None:
    """Writes the band of each element, as `contexts.Contexts.write` does."""
    del index, shape, size
    of_classes = np.repeat(np.arange(self.sizes.size, dtype=np.uint8), self.sizes)
    classes = self.known.classes[start : start + out.size]
    np.take(of_classes, classes, out=out, mode='clip')


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
  sizes = np.array([x[1] for x in bands]).astype(np.uint8)
  frequencies = np.stack([x[2] for x in bands])
  frequencies[~frequencies.any(axis=1), 0] = 1
  return Bands(known, sizes, tables.quantize(frequencies)), nbytes


def _table_bits(counts: np.ndarray) -> np.ndarray:
  """Returns about the bits of symbols and of their tables: `[...]`."""
  whole = np.maximum(counts.sum(axis=-1, keepdims=True), 1)
  owned = np.maximum(counts / whole, 1 / tables.TOTAL)
  return -(counts * np.log2(owned)).sum(axis=-1) + 8 * np.count_nonzero(counts, axis=-1)


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
  of_bands = np.split(np.array(known.shifts), np.cumsum(sizes, dtype=int)[:-1])
  if any(len({*shifts.tolist()}) > 1 for shifts in of_bands):
    raise ValueError('the classes of a band have different shifts')
  rows = tables.from_bytes(data, sizes.size, layouts.WINDOW)
  return Bands(known, sizes, rows)

"""The contexts of a group: the classes of its units and the frequency tables.

All arrays of a group have one layout, see `layouts`. The rows and columns of an array
have *scales*, in steps of a quarter octave: the class of a unit is the sum of a base
and those of its row and its column. A rotated matrix is nearly normally distributed,
and so are trained weights; their standard deviation depends on the row, on the column,
or on both as a product. So few tables serve many arrays. An array is taken as a matrix:
its last axis is that of columns, and all others together are that of rows. A unit of
two numbers has the row of its first one; two columns share a scale if C is even.

The encoder chooses the scales and the tables, and the decoder reads them. Classes that
both know from elsewhere take no bytes.

Shape letters: M arrays of the group, R rows, C columns, K tables, A symbols, N classes.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import blocks
from rotbits_jax.coding import layouts
from rotbits_jax.coding import tables

CLASSES = 256
"""The greatest N."""

Shape = tuple[int, ...]


def matrix_shape(shape: Shape) -> tuple[int, int]:
  """Returns R and C of an array: the product of all axes but the last; the last."""
  return math.prod(shape[:-1]), math.prod(shape[-1:])


def line_sizes(shape: Shape, size: int) -> tuple[int, int]:
  """Returns how many scales rows and columns have, if units have `size` numbers."""
  rows, columns = matrix_shape(shape)
  return rows, columns if columns % size else columns // size


class Scales(NamedTuple):
  """The scales of the rows and columns of an array."""

  base: int  # the class to which they are added; from 0 to 255 in a file
  rows: np.ndarray  # uint8 `[R]`, or `[1]` if all rows have the same
  columns: np.ndarray  # the same for columns, see `line_sizes`

  @property
  def greatest(self) -> int:
    """The greatest class that may occur."""
    return self.base + int(self.rows.max()) + int(self.columns.max())

  def write(self, out: np.ndarray, start: int, shape: Shape, size: int) -> None:
    """Writes the classes, uint8 `[n]`, of units from `start` on in C order.

    Args:
      out: where to write them.
      start: the first unit, counted within the array.
      shape: shape of the array.
      size: numbers of a unit.
    """
    if self.rows.size == self.columns.size == 1:
      out[:] = self.base + int(self.rows[0]) + int(self.columns[0])
      return
    width = line_sizes(shape, size)[1]
    step = size if matrix_shape(shape)[1] % size else 1  # from a unit to the next one
    first, last = start * step, (start + out.size - 1) * step + 1
    low, high = first // width, -(-last // width)
    rows = self.rows[low:high] if self.rows.size > 1 else self.rows
    terms = (rows + np.uint8(self.base))[:, None], self.columns
    if step == 1 and first == low * width and last == high * width:
      np.add(*terms, out=out.reshape(-1, width))
      return
    grid = np.add(*terms, out=np.empty((high - low, width), np.uint8))
    out[:] = grid.reshape(-1)[first - low * width :: step][: out.size]


def known_scales(classes: np.ndarray) -> Scales:
  """Returns classes that are known from elsewhere, as those of the rows `[R, 1]`."""
  return Scales(0, classes.reshape(-1), np.zeros(1, np.uint8))


class Contexts(NamedTuple):
  """The classes of the units of M arrays, and their tables."""

  scales: tuple[Scales, ...]  # those of each array
  # int64 `[N, 2]`, see `layouts`: the table of each class, and its shift or minimum
  # exponent. Floats that share no step have `[0, 2]`, and an offset.
  entries: np.ndarray
  start: int  # the least offset of a bin, else 0
  frequencies: np.ndarray  # int64 `[K, A]`
  # Whether the classes are known from elsewhere. They are rows of an array `[R, 1]`.
  is_known: bool = False

  def tables(self, layout: layouts.Layout) -> layouts.Tables:
    """Returns the tables for the programs of the layout."""
    classes = np.zeros(CLASSES, np.uint32)
    classes[: len(self.entries)] = self.entries[:, 0] | self.entries[:, 1] << 8
    return layout.tables(self.frequencies, classes, self.start)


# ---- bytes ---------------------------------------------------------------------------


def to_bytes(contexts: Contexts) -> bytes:
  """Serialises contexts; `from_bytes` describes the bytes."""
  entries = contexts.entries
  sizes = np.array([len(contexts.frequencies), len(entries), contexts.start])
  heads, lines = list[int](), list[bytes]()
  for base, rows, columns in () if contexts.is_known else contexts.scales:
    heads += [(rows.size > 1) + 2 * (columns.size > 1), base]
    # A scale that all lines share is part of the base.
    lines += [x.tobytes() for x in (rows, columns) if x.size > 1]
  parts = [sizes.astype('<i2'), np.diff(entries.T, prepend=0).astype(np.uint8)]
  data = b''.join([*(x.tobytes() for x in parts), bytes(heads), *lines])
  return tables.deflate(data) + tables.to_bytes(contexts.frequencies)


def from_bytes(
  data: bytes, layout: layouts.Layout, shapes: Sequence[Shape]
) -> Contexts:
  """Makes contexts from bytes: the inverse of `to_bytes`.

  The bytes are a raw Deflate stream and stored tables, see `tables.from_bytes`. The
  stream has K, N and the least offset, int16 each; the tables of the N classes, and
  then what else these tell, uint8, each as the difference from the one before; and for
  each array a mode and the base, uint8 each. The mode is 1 if rows differ, plus 2 if
  columns differ. Then follow the scales of the rows and columns that differ, uint8.

  Args:
    data: the bytes.
    layout: the layout.
    shapes: the shapes of the M arrays; none if their classes are known.
  """
  lengths = [line_sizes(shape, layout.size) for shape in shapes]
  most = 6 + 2 * CLASSES + sum(2 + sum(x) for x in lengths)
  head, data = tables.inflate(data, most)
  count, number, start = head[:6].view('<i2').tolist() if head.size >= 6 else (0, 0, 0)
  end = 6 + 2 * number
  position = end + 2 * len(shapes)
  has_entries = layout.most_tables != layouts.QUARTERS
  least, numbers = layouts.QUARTERS, range(1)
  if has_entries:
    least, numbers = 1, range(1, CLASSES + 1)
  if (
    not least <= count <= layout.most_tables
    or number not in numbers
    or head.size < position
  ):
    raise ValueError(f'the contexts of {count} tables are cut short or too many')
  entries = np.cumsum(head[6:end].reshape(2, -1), axis=1, dtype=np.uint8)
  layout.check_entries(entries)
  if has_entries and entries[0].max() >= count:
    raise ValueError(f'a class needs one of {count} tables')
  classes = []
  for (mode, base), line_lengths in zip(
    head[end:position].reshape(-1, 2).tolist(), lengths, strict=True
  ):
    lines = [np.zeros(1, np.uint8), np.zeros(1, np.uint8)]
    for axis, length in enumerate(line_lengths):
      if mode >> axis & 1:
        lines[axis] = head[position : position + length]
        position += length
        if lines[axis].size != length or not length:
          raise ValueError('the scales of the arrays are cut short')
    scales = Scales(base, *lines)
    # A block of few units makes the classes of whole rows.
    if mode > 3 or (mode and line_lengths[1] > blocks.CAPACITY):
      raise ValueError(f'scales cannot have the mode {mode}')
    if scales.greatest >= (number if has_entries else CLASSES):
      raise ValueError(f'scales do not fit {number} classes')
    classes.append(scales)
  if head.size != position:
    raise ValueError(f'the scales need {position} bytes, got {head.size}')
  frequencies = tables.from_bytes(data, count, layout.alphabet)
  return Contexts(tuple(classes), entries.T.astype(np.int64), start, frequencies)

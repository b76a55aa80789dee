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

Shape letters: M arrays of the group, R rows, C columns, K tables, A symbols.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import blocks
from rotbits_jax.coding import layouts
from rotbits_jax.coding import tables

CLASSES = 256
"""The number of classes that a byte can tell."""

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
  base: np.ndarray  # int32 `[1]`, or the shift of each class `[K]`; see `told`
  frequencies: np.ndarray  # int64 `[K, A]`
  # Whether the classes are known from elsewhere. They are rows of an array `[R, 1]`.
  is_known: bool = False


# ---- bytes ---------------------------------------------------------------------------


def to_bytes(contexts: Contexts) -> bytes:
  """Serialises contexts; docs/format.md describes the bytes."""
  heads, lines = list[int](), list[bytes]()
  for base, rows, columns in () if contexts.is_known else contexts.scales:
    heads += [(rows.size > 1) + 2 * (columns.size > 1), base]
    # A scale that all lines share is part of the base.
    lines += [x.tobytes() for x in (rows, columns) if x.size > 1]
  told = np.diff(contexts.base, prepend=0).astype('<i2')
  is_new = np.diff(contexts.frequencies, axis=0, prepend=0).any(axis=1)
  count = np.array(len(is_new), '<i2')
  head = b''.join([count.tobytes(), told.tobytes(), bytes(heads), *lines])
  frequencies = tables.to_bytes(contexts.frequencies[is_new])
  return tables.deflate(head + is_new.tobytes() + frequencies)


def from_bytes(
  data: bytes,
  layout: layouts.Layout,
  shapes: Sequence[Shape],
  known: Scales | None = None,
) -> Contexts:
  """Makes contexts from bytes: the inverse of `to_bytes`.

  Args:
    data: the bytes.
    layout: the layout.
    shapes: the shapes of the M arrays; none if their classes are known.
    known: the scales of known classes.
  """
  lengths = [line_sizes(shape, layout.size) for shape in shapes]
  most = 4 + sum(2 + sum(x) for x in lengths)
  most += layout.most_tables * (3 + 2 * layout.alphabet)
  content = tables.inflate(data, most)
  count = int.from_bytes(content[:2].tobytes(), 'little')
  heads = 4 if isinstance(layout, layouts.Floats) else 2 + 2 * count
  position = heads + 2 * len(shapes)
  if content.size < position:
    raise ValueError('the contexts are cut short')
  told = np.cumsum(content[2:heads].view('<i2'), dtype=np.int32)
  classes = [] if known is None else [known]
  for (mode, base), line_lengths in zip(
    content[heads:position].reshape(-1, 2).tolist(), lengths, strict=True
  ):
    # A block of few units makes the classes of whole rows.
    if mode > 3 or (mode and line_lengths[1] > blocks.CAPACITY):
      raise ValueError(f'scales cannot have the mode {mode}')
    lines = [np.zeros(1, np.uint8), np.zeros(1, np.uint8)]
    for axis, length in enumerate(line_lengths):
      if mode >> axis & 1:
        lines[axis] = content[position : position + length]
        position += length
        if lines[axis].size != length or not length:
          raise ValueError('the scales of the arrays are cut short')
    classes.append(Scales(base, *lines))
  is_new = content[position : position + count]
  if count < 1 or is_new.size != count or is_new[0] != 1 or is_new.max() > 1:
    raise ValueError(f'{is_new.size} tables of {count}')
  frequencies = tables.from_bytes(content[position + count :], layout.alphabet)
  if len(frequencies) != np.count_nonzero(is_new):
    raise ValueError(f'{len(frequencies)} frequencies of {count} tables')
  frequencies = frequencies[np.cumsum(is_new) - 1]
  greatest = max(x.greatest for x in classes)
  least = layout.most_tables - 1 if isinstance(layout, layouts.Floats) else greatest
  if greatest >= CLASSES or not least < count <= layout.most_tables:
    raise ValueError(f'{greatest + 1} classes for {count} tables')
  values, (low, high) = layout.told(np.arange(greatest + 1), told)[1], layout.limits
  if values.min() < low or values.max() > high:
    raise ValueError(f'classes cannot tell {values.min()} to {values.max()}')
  return Contexts(tuple(classes), told, frequencies, known is not None)

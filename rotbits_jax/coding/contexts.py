"""The contexts of a group: the classes of its units and the frequency tables.

All arrays of a group have one layout, see `layouts`. The rows and columns of an array
have *scales*, in steps of a quarter octave: the class of a unit is the sum of a base
and those of its row and its column. A rotated matrix is nearly normally distributed,
and so are trained weights; their standard deviation depends on the row, on the column,
or on both as a product. So few tables serve many arrays. An array is taken as a matrix:
its last axis is that of columns, and all others together are that of rows. A unit of
two numbers has the row of its first one; two columns share a scale if C is even.

The encoder chooses the scales and the tables, and the decoder reads them.

Shape letters: M arrays of the group, R rows, C columns, K tables, A symbols.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import blocks
from rotbits_jax.coding import known as known_lib
from rotbits_jax.coding import layouts
from rotbits_jax.coding import tables

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

  base: int  # the class to which they are added
  rows: np.ndarray  # uint8 `[R]`, or `[1]` if all rows have the same
  columns: np.ndarray  # the same for columns, see `line_sizes`
  table: int = 0  # the table of the class `base`, if small floats share a step
  min_exponent: int = 1  # that of the array, if small floats share a step

  @property
  def greatest(self) -> int:
    """The greatest class that may occur."""
    return self.base + int(self.rows.max()) + int(self.columns.max())

  @property
  def entropy_bytes(self) -> float:
    return sum(tables.entropy_bits(np.bincount(x)) for x in self[1:3]) / 8

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


class Contexts(NamedTuple):
  """The classes of the units of M arrays, and their tables."""

  classes: tuple[Scales | known_lib.Bands, ...]  # the classes of each array
  # int64. Of integers, the K shifts; of floats, the least offset of a bin, but none if
  # steps are shared.
  numbers: np.ndarray
  frequencies: np.ndarray  # int64 `[K, A]`

  @property
  def is_known(self) -> bool:
    return isinstance(self.classes[0], known_lib.Bands)

  def tables(self, layout: layouts.Layout) -> layouts.Tables:
    """Returns the tables for the programs of the layout."""
    if isinstance(layout, layouts.Integers):
      return layout.tables(self.frequencies, self.numbers)
    if not layout.raised:
      return layout.tables(self.frequencies, self.numbers[:0], int(self.numbers[0]))
    meanings = np.zeros(256, np.int64)
    for scales in self.classes:
      assert isinstance(scales, Scales)
      classes = np.arange(scales.base, scales.greatest + 1)
      table = classes - scales.base + scales.table
      meanings[classes] = table | scales.min_exponent << 8
    return layout.tables(self.frequencies, meanings, 0)


# ---- bytes ---------------------------------------------------------------------------


def to_bytes(contexts: Contexts, layout: layouts.Layout) -> bytes:
  """Serialises contexts; `from_bytes` describes the bytes."""
  heads, lines, numbers = [], [], contexts.numbers.tolist()
  for classes in contexts.classes:
    if isinstance(classes, known_lib.Bands):
      lines.append(classes.sizes.tobytes())
      continue
    rows, columns = classes.rows, classes.columns
    heads += [(rows.size > 1) + 2 * (columns.size > 1), classes.base]
    # A scale that all lines share is part of the base.
    lines += [x.tobytes() for x in (rows, columns) if x.size > 1]
    if layout.raised:
      numbers += [classes.table, classes.min_exponent]
  head = np.array([len(contexts.frequencies), *numbers]).astype('<i2').tobytes()
  head = b'' if contexts.is_known else head + np.array(heads, np.uint8).tobytes()
  return tables.deflate(head + b''.join(lines)) + tables.to_bytes(contexts.frequencies)


def from_bytes(
  data: bytes,
  layout: layouts.Layout,
  shapes: Sequence[Shape],
  known: known_lib.Known | None = None,
) -> Contexts:
  """Makes contexts from bytes: the inverse of `to_bytes`.

  The bytes are a raw Deflate stream and stored tables, see `tables.from_bytes`. The
  stream has K, uint16; then int16 each: the least offset of a bin of floats, the table
  and the minimum exponent of each array if steps are shared, or the K shifts; for each
  array a mode and the base, uint8 each. The mode is 1 if rows differ, plus 2 if columns
  differ. Then follow the scales of the rows and columns that differ, uint8. If the
  classes are known, the stream has the sizes of the bands, uint8, and nothing else.

  Args:
    data: the bytes.
    layout: the layout.
    shapes: the shapes of the M arrays.
    known: the classes of the only array, if they are known.
  """
  is_float, is_raised = isinstance(layout, layouts.Floats), layout.raised
  alphabet = layouts.BINS if is_float else layouts.WINDOW
  if known is not None:
    sizes, data = tables.inflate(data, len(known.shifts))
    if not sizes.all() or int(sizes.sum()) != len(known.shifts):
      raise ValueError(f'{sizes.size} bands do not have {len(known.shifts)} classes')
    bands = known_lib.Bands(known, sizes)
    frequencies = tables.from_bytes(data, sizes.size, alphabet)
    return Contexts((bands,), bands.shifts, frequencies)
  lengths = [line_sizes(shape, layout.size) for shape in shapes]
  most = 2 + 2 * layout.most_tables + 6 * len(shapes) + sum(map(sum, lengths))
  head, data = tables.inflate(data, most)
  count = int(head[:2].view('<u2')[0]) if head.size > 1 else 0
  end = 2 + 2 * (2 * len(shapes) if is_raised else 1 if is_float else count)
  position = end + 2 * len(shapes)
  if not 0 < count <= layout.most_tables or head.size < position:
    raise ValueError(f'the contexts of {count} tables are cut short or too many')
  numbers = head[2:end].view('<i2').astype(np.int64)
  if not is_float and (np.any(numbers < 0) or np.max(numbers) != layout.raw_bits):
    raise ValueError(f'the shifts of tables must be up to {layout.raw_bits}')
  starts = numbers.reshape(-1, 2).tolist() if is_raised else [[0, 1]] * len(shapes)
  classes = []
  for (mode, base), start, line_lengths in zip(
    head[end:position].reshape(-1, 2).tolist(), starts, lengths, strict=True
  ):
    lines = [np.zeros(1, np.uint8), np.zeros(1, np.uint8)]
    for axis, length in enumerate(line_lengths):
      if mode >> axis & 1:
        lines[axis] = head[position : position + length]
        position += length
        if lines[axis].size != length or not length:
          raise ValueError('the scales of the arrays are cut short')
    scales = Scales(base, lines[0], lines[1], *start)
    last_table = scales.table + scales.greatest - base
    has_tables = 0 <= scales.table <= last_table < count and scales.min_exponent > 1
    if (
      mode > 3
      or scales.greatest >= (256 if is_float else count)
      or (is_raised and not has_tables)
      # A block of few units makes the classes of whole rows.
      or (mode and line_lengths[1] > blocks.CAPACITY)
    ):
      raise ValueError(f'scales of the mode {mode} do not fit {count} tables')
    classes.append(scales)
  if head.size != position or (is_float and not is_raised and count != 4):
    raise ValueError(f'the scales need {position} bytes, got {head.size}')
  numbers = numbers[:0] if is_raised else numbers
  return Contexts(tuple(classes), numbers, tables.from_bytes(data, count, alphabet))

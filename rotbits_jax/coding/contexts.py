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
import zlib

import numpy as np
from zlib_ng import zlib_ng

from rotbits_jax.coding import blocks
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
  """The scales of the rows and columns of an array.

  Attributes:
    base: the class to which they are added.
    rows: uint8 `[R]`, or `[1]` if all rows have the same.
    columns: the same for columns, see `line_sizes`.
  """

  base: int
  rows: np.ndarray
  columns: np.ndarray

  @property
  def greatest(self) -> int:
    """The greatest class that may occur."""
    return self.base + int(self.rows.max()) + int(self.columns.max())

  def write(self, out: np.ndarray, start: int, shape: Shape, size: int) -> None:
    """Writes the classes of units.

    Args:
      out: uint8 `[n]` to write into.
      start: the first unit, counted within the array in C order.
      shape: shape of the array.
      size: numbers of a unit.
    """
    if self.rows.size == self.columns.size == 1:
      out[:] = self.base + int(self.rows[0]) + int(self.columns[0])
      return
    width = line_sizes(shape, size)[1]
    step = size if width % size and width == shape[-1] else 1
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
  """The classes of the units of M arrays, and their tables.

  Attributes:
    scales: the scales of each array.
    numbers: int64. Of floats, the least offset of a bin; or, if steps are shared, the
      table of the least class and the minimum exponent of each array. Of integers, the
      K shifts.
    frequencies: int64 `[K, A]`.
  """

  scales: tuple[Scales, ...]
  numbers: np.ndarray
  frequencies: np.ndarray

  def tables(self, layout: layouts.Layout) -> layouts.Tables:
    if isinstance(layout, layouts.Integers):
      return layout.tables(self.frequencies, self.numbers)
    if not layout.raised:
      return layout.tables(self.frequencies, self.numbers[:0], int(self.numbers[0]))
    classes = np.zeros(256, np.int64)
    for scales, (table, least) in zip(
      self.scales, self.numbers.reshape(-1, 2).tolist(), strict=True
    ):
      span = np.arange(scales.base, scales.greatest + 1)
      classes[span] = span - scales.base + table | least << 8
    return layout.tables(self.frequencies, classes, 0)

  def write(
    self, out: np.ndarray, index: int, start: int, shape: Shape, size: int
  ) -> None:
    """Writes the classes of units of an array, as `Scales.write` does."""
    self.scales[index].write(out, start, shape, size)


# ---- bytes ---------------------------------------------------------------------------


def to_bytes(contexts: Contexts, layout: layouts.Layout) -> bytes:
  """Serialises contexts; `from_bytes` describes the bytes."""
  heads, lines = [], []
  for scales in contexts.scales:
    heads += [(scales.rows.size > 1) + 2 * (scales.columns.size > 1), scales.base]
    # A scale that all lines share is part of the base.
    lines += [x.tobytes() for x in (scales.rows, scales.columns) if x.size > 1]
  numbers = contexts.numbers.astype('<i2')
  count = np.array([len(contexts.frequencies)], '<u2')
  head = count.tobytes() + numbers.tobytes() + np.array(heads, np.uint8).tobytes()
  return deflate(head + b''.join(lines)) + tables.to_bytes(contexts.frequencies)


def from_bytes(
  data: bytes, layout: layouts.Layout, shapes: Sequence[Shape]
) -> Contexts:
  """Makes contexts from bytes: the inverse of `to_bytes`.

  The bytes are a raw Deflate stream and stored tables, see `tables.from_bytes`. The
  stream has K, uint16; the `numbers` of `Contexts`, int16 each; for each array a mode
  and the base, uint8 each. The mode is 1 if rows differ, plus 2 if columns differ. Then
  follow the scales of the rows and columns that differ, uint8.

  Args:
    data: the bytes.
    layout: the layout.
    shapes: the shapes of the M arrays.

  Returns:
    The contexts.

  Raises:
    ValueError: if the bytes are not contexts of such arrays.
  """
  sizes = [line_sizes(shape, layout.size) for shape in shapes]
  most = 2 + 2 * layout.most_tables + 6 * len(shapes) + sum(map(sum, sizes))
  part, data = inflate(data, most)
  count = int(part[:2].view('<u2')[0]) if part.size > 1 else 0
  is_float = isinstance(layout, layouts.Floats)
  shared = isinstance(layout, layouts.Floats) and layout.raised
  end = 2 + 2 * (2 * len(shapes) if shared else 1 if is_float else count)
  position = end + 2 * len(shapes)
  if not 0 < count <= layout.most_tables or part.size < position:
    raise ValueError(f'the contexts of {count} tables are cut short or too many')
  numbers = part[2:end].view('<i2').astype(np.int64)
  if not is_float and (np.any(numbers < 0) or np.max(numbers) != layout.raw_bits):
    raise ValueError(f'the shifts of tables must be up to {layout.raw_bits}')
  classes = 256 if is_float else count
  found = []
  for (mode, base), size in zip(
    part[end:position].reshape(-1, 2).tolist(), sizes, strict=True
  ):
    lines = [np.zeros(1, np.uint8), np.zeros(1, np.uint8)]
    for axis in (0, 1):
      if mode >> axis & 1:
        lines[axis] = part[position : position + size[axis]]
        position += size[axis]
        if lines[axis].size != size[axis] or not size[axis]:
          raise ValueError('the scales of the arrays are cut short')
    found.append(Scales(base, *lines))
    # A block of few units makes the classes of whole rows.
    if (
      mode > 3 or found[-1].greatest >= classes or (mode and size[1] > blocks.CAPACITY)
    ):
      raise ValueError(f'scales of the mode {mode} do not fit {count} tables')
  if part.size != position or (is_float and not shared and count != 4):
    raise ValueError(f'the scales need {position} bytes, got {part.size}')
  if shared:
    firsts, least = numbers.reshape(-1, 2).T
    spans = np.array([x.greatest - x.base for x in found])
    if np.any((firsts < 0) | (firsts + spans >= count)) or np.any(least < 2):
      raise ValueError(f'classes do not fit {count} tables')
  alphabet = layouts.BINS if is_float else layouts.WINDOW
  return Contexts(tuple(found), numbers, tables.from_bytes(data, count, alphabet))


def deflate(data: bytes) -> bytes:
  """Returns a raw Deflate stream; `inflate` reads it."""
  # Some scales are close to noise, where matches are chance and cost more than they
  # save. Others repeat.
  packed = []
  for strategy in (zlib.Z_RLE, zlib.Z_DEFAULT_STRATEGY):
    packer = zlib_ng.compressobj(6, zlib.DEFLATED, -15, 9, strategy)
    packed.append(packer.compress(data) + packer.flush())
  return min(packed, key=len)


def inflate(data: bytes, most: int) -> tuple[np.ndarray, bytes]:
  """Inflates a raw Deflate stream.

  Args:
    data: the stream, and bytes after it.
    most: the greatest number of bytes that the stream may hold.

  Returns:
    The content of the stream, uint8; and the bytes after the stream.
  """
  unpacker = zlib.decompressobj(-15)
  try:
    part = unpacker.decompress(data, most + 1)
  except zlib.error as error:
    raise ValueError(f'not contexts of arrays: {error}') from error
  if not unpacker.eof or len(part) > most:
    raise ValueError('the contexts of the arrays are cut short or too long')
  return np.frombuffer(part, np.uint8), unpacker.unused_data

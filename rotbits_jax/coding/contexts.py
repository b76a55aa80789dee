"""The contexts of a group: the classes of its units and the frequency tables.

All arrays of a group have one layout, see `layouts`. The rows and columns of an array
have *scales*, in steps of a quarter octave; the class of a unit is a base plus the
scales of its row and its column. Trained weights are nearly normally distributed, and
their standard deviation depends on the row, on the column, or on a product of both. So
few tables serve many arrays. An array is taken as a matrix, whose columns are along the
last axis and whose rows are along all others. A pair of one class is in the row of its
first element, and two columns share a scale if C is even.

Shape letters: M arrays of the group, R rows, C columns, K tables, A symbols.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple
import zlib

import numpy as np
from zlib_ng import zlib_ng

from rotbits_jax.coding import layouts

_MOST_COLUMNS = 1 << 19  # with scales, because a block makes the classes of whole rows

_ROW = 128  # elements of a row of an array of one axis
_WIDE = 1 << 10  # columns that are written at once

Shape = tuple[int, ...]


def matrix_shape(shape: Shape, shared: int = 1) -> tuple[int, int]:
  """Returns R, and the scales of columns if so many share one: C, or C / 2.

  One axis is rows of 128 elements.
  """
  rows, columns = math.prod(shape[:-1]), math.prod(shape[-1:])
  if len(shape) == 1:
    rows, columns = -(-columns // _ROW), _ROW
  return rows, columns if columns % shared else columns // shared


class Scales(NamedTuple):
  """The scales of the rows and columns of an array."""

  base: int  # the class to which they are added, modulo 256
  rows: np.ndarray  # uint8 `[R]`, or `[1]` if all rows have the same
  columns: np.ndarray  # the same for columns, see `matrix_shape`

  def write(self, shape: Shape, shared: int, start: int, out: np.ndarray) -> None:
    """Writes classes from that of index `start` on in C order into uint8 `[n]`.

    The array has the shape, and so many numbers share a class.
    """
    if self.rows.size == self.columns.size == 1:
      out[:] = self.base + int(self.rows[0]) + int(self.columns[0]) & 255
      return
    width, columns = matrix_shape(shape, shared)[1], self.columns
    # From a unit to the next one.
    step = shared if matrix_shape(shape)[1] % shared else 1
    if self.rows.size == 1:  # rows of few bytes would take long
      times = -(-_WIDE // width)
      width, columns = times * width, np.tile(columns, times)
    first, last = start * step, (start + out.size - 1) * step + 1
    low, high = first // width, -(-last // width)
    rows = self.rows[low:high] if self.rows.size > 1 else self.rows
    terms = (rows + np.uint8(self.base))[:, None], columns
    if step == 1 and first == low * width and last == high * width:
      np.add(*terms, out=out.reshape(-1, width))
      return
    grid = np.add(*terms, out=np.empty((high - low, width), np.uint8))
    out[:] = grid.reshape(-1)[first - low * width :: step][: out.size]


class Contexts(NamedTuple):
  """The meaning of classes, and the tables."""

  base: np.ndarray  # int `[1]`, the least offset or minimum exponent, see `layouts`
  table_of: np.ndarray  # int64, the row of each table of the layout
  frequencies: np.ndarray  # int64 `[K, A]`


def to_bytes(contexts: Contexts, scales: Sequence[Scales]) -> bytes:
  """Serialises contexts and the scales of M arrays; see docs/format.md."""
  heads, lines = list[int](), list[bytes]()
  for first, rows, columns in scales:
    heads += [(rows.size > 1) + 2 * (columns.size > 1), first]
    # A scale that all lines share is part of the base.
    lines += [x.tobytes() for x in (rows, columns) if x.size > 1]
  base = contexts.base.astype('<i2').tobytes()
  is_new = np.diff(contexts.table_of, prepend=-1).astype(np.uint8).tobytes()
  # The low bytes, and then the high bytes, which are alike.
  halves = contexts.frequencies.astype('<u2').view(np.uint8).reshape(-1, 2).T.tobytes()
  data = b''.join([base, bytes(heads), *lines, is_new, halves])
  return zlib_ng.compress(data, 9, -15)


def from_bytes(
  data: bytes, layout: layouts.Layout, shapes: Sequence[Shape]
) -> tuple[Contexts, list[Scales]]:
  """Makes contexts and scales of arrays of these shapes: the inverse of `to_bytes`."""
  lengths = [matrix_shape(shape, layout.shared) for shape in shapes]
  most = 2 + sum(2 + sum(x) for x in lengths)
  most += layout.most_tables * (1 + 2 * layout.alphabet)
  unpacker, position = zlib.decompressobj(-15), 0
  try:
    content = np.frombuffer(unpacker.decompress(data, most + 1), np.uint8)
  except zlib.error as error:
    raise ValueError(f'not the tables of arrays: {error}') from error
  if not unpacker.eof or unpacker.unused_data or content.size > most:
    raise ValueError('the tables of arrays are cut short or too long')

  def take(size: int) -> np.ndarray:
    nonlocal position
    position += size
    if position > content.size:
      raise ValueError('the tables of arrays are cut short')
    return content[position - size : position]

  base, scales = take(2).view('<i2').astype(np.int32), []
  heads = take(2 * len(lengths)).reshape(-1, 2).tolist()
  for (mode, first), line_lengths in zip(heads, lengths, strict=True):
    if mode > 3 or (mode and line_lengths[1] > _MOST_COLUMNS):
      raise ValueError(f'scales cannot have the mode {mode}')
    pairs = enumerate(line_lengths)
    lines = [take(n) if mode >> i & 1 else np.zeros(1, np.uint8) for i, n in pairs]
    scales.append(Scales(first, *lines))
  is_new = take(layout.most_tables)
  table_of, halves = np.cumsum(is_new, dtype=np.int64) - 1, content[position:]
  shape = 2, int(table_of[-1]) + 1, layout.alphabet
  if is_new[0] != 1 or is_new.max() > 1 or halves.size != math.prod(shape):
    raise ValueError(f'{shape[1]} tables cannot have {halves.size} bytes')
  low, high = halves.reshape(shape).astype(np.int64)
  return Contexts(base, table_of, low | high << 8), scales

"""The contexts of a group: the classes of its units and the frequency tables.

All arrays of a group have one layout, see `layouts`. The rows and columns of an array
have *scales*, in steps of a quarter octave; the class of a unit is a base plus the
scales of its row and its column, see `scales`. Trained weights are nearly normally
distributed, and their standard deviation depends on the row, on the column, or on a
product of both. So few tables serve many arrays.

Shape letters: M arrays of the group, R rows, C columns, K tables, A symbols.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple
import zlib

import numpy as np
from zlib_ng import zlib_ng

from rotbits_jax.coding import layouts
from rotbits_jax.coding import scales as scales_lib

_ROWS, _COLUMNS, _BY_FIRST = 1, 2, 4  # bits of the mode of scales


class Contexts(NamedTuple):
  """The meaning of classes, and the tables."""

  base: np.ndarray  # int `[1]`, the least offset or minimum exponent, see `layouts`
  table_of: np.ndarray  # int64, the row of each table of the layout
  frequencies: np.ndarray  # int64 `[K, A]`


def to_bytes(contexts: Contexts, scales: Sequence[scales_lib.Scales]) -> bytes:
  """Serialises contexts and the scales of M arrays; see docs/format.md."""
  heads = list[int]()
  lines = list[bytes]()
  for first, rows, columns, by_first in scales:
    mode = _ROWS * (rows.size > 1) | _COLUMNS * (columns.size > 1)
    heads += [mode | _BY_FIRST * (by_first and mode > 0), first]
    # A scale that all lines share is part of the base.
    lines += [x.tobytes() for x in (rows, columns) if x.size > 1]
  base = contexts.base.astype('<i2').tobytes()
  is_new = np.diff(contexts.table_of, prepend=-1).astype(np.uint8).tobytes()
  # The low bytes, and then the high bytes, which are alike.
  halves = contexts.frequencies.astype('<u2').view(np.uint8).reshape(-1, 2).T.tobytes()
  data = b''.join([base, bytes(heads), *lines, is_new, halves])
  return zlib_ng.compress(data, 9, -15)


def from_bytes(
  data: bytes, layout: layouts.Layout, shapes: Sequence[scales_lib.Shape]
) -> tuple[Contexts, list[scales_lib.Scales]]:
  """Makes contexts and scales of arrays of these shapes: the inverse of `to_bytes`."""
  lengths = [
    [scales_lib.matrix_shape(shape, layout.shared, x) for x in (False, True)]
    for shape in shapes
  ]
  most = 2 + sum(2 + max(map(sum, x)) for x in lengths)
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
  for (mode, first), of_array in zip(heads, lengths, strict=True):
    by_first = mode & _BY_FIRST > 0
    rows, columns = of_array[by_first]
    if mode > 7 or (mode and columns > scales_lib.MOST_COLUMNS):
      raise ValueError(f'scales cannot have the mode {mode}')
    of_rows = take(rows) if mode & _ROWS else np.zeros(1, np.uint8)
    of_columns = take(columns) if mode & _COLUMNS else np.zeros(1, np.uint8)
    scales.append(scales_lib.Scales(first, of_rows, of_columns, by_first))
  is_new = take(layout.most_tables)
  table_of, halves = np.cumsum(is_new, dtype=np.int64) - 1, content[position:]
  shape = 2, int(table_of[-1]) + 1, layout.alphabet
  if is_new[0] != 1 or is_new.max() > 1 or halves.size != math.prod(shape):
    raise ValueError(f'{shape[1]} tables cannot have {halves.size} bytes')
  low, high = halves.reshape(shape).astype(np.int64)
  return Contexts(base, table_of, low | high << 8), scales

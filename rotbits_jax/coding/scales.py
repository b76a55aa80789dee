"""The choice of the scales of rows and columns, see `contexts`.

The *level* of numbers is a logarithm of their size: that of floats is the mean
logarithm of their magnitudes, of which the bits of a float are a good approximation;
that of integers is the logarithm of the root of their mean square. The level of a
column is that of its elements divided by the scales of their rows. Lines are measured
by a part of their elements. Only the size of a file depends on the choice.

Shape letters: R rows, C columns.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import contexts
from rotbits_jax.coding import layouts
from rotbits_jax.coding import sparse

STEPS = 4
"""The number of classes for a factor of 2."""

_LEAST_LINE = 16  # elements of a line that has a scale
_RUNS, _LENGTH = 4, 128  # of neighbouring columns by which rows are measured
_ROWS = 1 << 9  # by which columns are measured
_CHUNK = 1 << 17  # elements that are looked at at once, so that they fit the cache

# Logarithms are limited to this many octaves around the median. The lower ones tell
# little of the scale, and much of chance.
_BELOW, _ABOVE = 3, 8

# The greatest differences of the classes of rows, and of columns.
_RANGES = 127, 100

_Level = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""Takes elements, logarithms of scales that divide them, and an axis.

Returns the levels along the axis, in octaves."""


class Lines(NamedTuple):
  """The classes of an array: those of its rows, plus those of its columns."""

  rows: np.ndarray  # int64 `[R]`, or `[1]` if rows have no scales of their own
  columns: np.ndarray  # int64, see `contexts.line_sizes`, or `[1]`

  def scales(self, least: int, most: int) -> contexts.Scales:
    """Returns the scales; lines with classes beyond `least` and `most` are moved."""
    top = min(self.range[1], most)
    room = max(top - least, 0)
    below = [x.max() - x for x in self]
    # Columns have the room that rows leave, but half of it at least.
    room_of_rows = min(int(below[0].max()), max(room // 2, room - int(below[1].max())))
    limits = room_of_rows, room - room_of_rows
    below = [np.minimum(x, y) for x, y in zip(below, limits, strict=True)]
    rows, columns = (
      (x.max() - x).astype(np.uint8) if np.ptp(x) else np.zeros(1, np.uint8)
      for x in below
    )
    base = max(top, least) - sum(int(x.max()) for x in below)
    return contexts.Scales(base, rows, columns)

  def above(self, least: int) -> 'Lines':
    """Returns the lines with classes counted from `least`."""
    return self._replace(rows=self.rows - least)

  def choices(self) -> list['Lines']:
    """Returns the lines and, if there are several, one class for the whole array."""
    if self.rows.size == self.columns.size == 1:
      return [self]
    whole = np.rint(self.rows.mean() + self.columns.mean()).astype(np.int64)
    return [self, Lines(whole[None], np.zeros(1, np.int64))]

  @property
  def range(self) -> tuple[int, int]:
    """The least and the greatest class."""
    return (
      int(self.rows.min() + self.columns.min()),
      int(self.rows.max() + self.columns.max()),
    )


def of_floats(array: np.ndarray, layout: layouts.Floats) -> Lines:
  """Measures floats. Classes are quarter octaves of magnitudes, biased as those are."""
  shift = layout.format.bits - 16
  unit = 1 << layout.format.nmant - shift

  def level(bits: np.ndarray, by: np.ndarray, axis: int) -> np.ndarray:
    # Integers, so that a file does not depend on the order of sums.
    logs = ((bits >> shift) & 0x7FFF).astype(np.int16)
    logs -= np.rint(by * unit).astype(np.int16)
    middle = int(np.median(logs.reshape(-1)[:: max(logs.size >> 10, 1)]))
    limits = np.array([middle - _BELOW * unit, middle + _ABOVE * unit])
    np.clip(logs, *limits.clip(-(2**15), 2**15 - 1).astype(np.int16), out=logs)
    return logs.mean(axis=axis) / unit

  return _lines(sparse.bit_patterns(array), array.shape, layout.size, level)


def of_integers(array: np.ndarray) -> Lines:
  """Measures signed integers."""

  def level(numbers: np.ndarray, by: np.ndarray, axis: int) -> np.ndarray:
    squares = np.square(numbers * np.exp2(-np.rint(by)))  # float64
    return np.log2(np.maximum(squares.mean(axis=axis), 2.0**-40)) / 2

  return _lines(array.reshape(-1), array.shape, 1, level)


def _lines(flat: np.ndarray, shape: contexts.Shape, size: int, level: _Level) -> Lines:
  """Measures the rows, and then the columns of what is left."""
  count, width = contexts.matrix_shape(shape)
  matrix = flat.reshape(count, width)
  some_rows = slice(None, None, max(count // _ROWS, 1))
  has_rows = width >= _LEAST_LINE and count > 1
  has_columns = count >= _LEAST_LINE and width > 1
  rows, columns = np.zeros(1), np.zeros(1)
  if has_rows:
    some = matrix
    if width > _RUNS * _LENGTH:
      starts = np.linspace(0, width - _LENGTH, _RUNS).astype(int).tolist()
      some = np.concatenate([matrix[:, x : x + _LENGTH] for x in starts], axis=1)
    rows = _levels(level, some, np.zeros((1, 1)), 1)
  if has_columns:
    by = rows[some_rows, None] if has_rows else np.zeros((1, 1))
    columns = _levels(level, matrix[some_rows], by, 0)
  if not has_rows and not has_columns:
    rows = level(flat[None, :_CHUNK], np.zeros((1, 1)), 1)
  if has_columns:
    columns = columns.reshape(contexts.line_sizes(shape, size)[1], -1).mean(axis=1)
  lines = []
  for levels, most in zip((rows, columns), _RANGES, strict=True):
    classes = np.rint(STEPS * levels).astype(np.int64)
    lines.append(np.maximum(classes, np.max(classes) - most))
  return Lines(*lines)


def _levels(level: _Level, matrix: np.ndarray, by: np.ndarray, axis: int) -> np.ndarray:
  """Returns the levels of rows, axis 1, or of columns, axis 0, a few at a time."""
  step = max(_CHUNK // max(matrix.shape[axis], 1), 1)
  chunks = [slice(x, x + step) for x in range(0, matrix.shape[1 - axis], step)]
  parts = [matrix[x] if axis else matrix[:, x] for x in chunks]
  return np.concatenate([level(part, by, axis) for part in parts])

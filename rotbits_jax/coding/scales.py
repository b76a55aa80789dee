"""The choice of the scales of rows and columns, see `contexts`.

The *level* of numbers is the mean logarithm of their magnitudes, in octaves. The bits
of a float are a good approximation of it, biased as its exponent is. The level of a
column is that of its elements divided by the scales of their rows. Rows and columns are
measured by a part of their elements. Only the size of a file depends on the choice.

The base of scales that these functions return may be any integer.

Shape letters: R rows, C columns.
"""

import numpy as np

from rotbits_jax.coding import contexts
from rotbits_jax.coding import formats
from rotbits_jax.coding import layouts

STEPS = 4
"""The number of classes for a factor of 2."""

_LEAST_LINE = 16  # elements of a row or column that has a scale
_COLUMNS, _RUNS = 1 << 9, 4  # by which rows are measured, in so many runs
_ROWS = 1 << 9  # by which columns are measured
_CHUNK = 1 << 17  # elements that are looked at at once, so that they fit the cache
_RANGE = 224  # of classes of an array

# Logarithms are limited to this many octaves around the median. The lower ones tell
# little of the scale, and much of chance.
_BELOW, _ABOVE = 3, 8


def measure(array: np.ndarray) -> contexts.Scales:
  """Measures the rows of floats or integers, and then the columns of what is left."""
  is_float = array.dtype in layouts.FORMATS
  size = layouts.Floats.size if is_float else layouts.Integers.size
  count, width = contexts.matrix_shape(array.shape)
  matrix = array.reshape(count, width)
  has_rows = width >= _LEAST_LINE and count > 1
  has_columns = count >= _LEAST_LINE and width > 1
  rows, columns = np.zeros(1), np.zeros(1)
  if has_rows:
    runs = formats.runs(width, _COLUMNS, _RUNS)
    some = np.concatenate([matrix[:, run] for run in runs], axis=1)
    rows = _levels(some, np.zeros((1, 1)), 1)
  if has_columns:
    some_rows = slice(None, None, max(count // _ROWS, 1))
    by = (rows[some_rows] if has_rows else rows)[:, None]
    columns = _levels(matrix[some_rows], by, 0)
    number = contexts.line_sizes(array.shape, size)[1]
    columns = columns.reshape(number, -1).mean(axis=1)
  if not has_rows and not has_columns:
    rows = _levels(matrix.reshape(1, -1)[:, :_CHUNK], np.zeros((1, 1)), 1)
  rows, columns = (np.rint(STEPS * x).astype(int) for x in (rows, columns))
  greatest = int(np.max(rows) + np.max(columns))
  return _within(rows, columns, greatest - _RANGE, greatest)


def _levels(array: np.ndarray, by: np.ndarray, axis: int) -> np.ndarray:
  """Returns the levels of rows, axis 1, or of columns, axis 0, less those of `by`."""
  dtype = array.dtype if array.dtype in layouts.FORMATS else np.dtype(np.float32)
  form = layouts.FORMATS[dtype]
  shift = form.bits - 16
  unit = 1 << form.nmant - shift
  # Integers, so that a file does not depend on the order of sums.
  by = np.rint(by * unit).astype(np.int16)
  levels, step = [], max(_CHUNK // max(array.shape[axis], 1), 1)
  for start in range(0, array.shape[1 - axis], step):
    places = slice(start, start + step)
    part = array[places] if axis else array[:, places]
    bits = part.astype(dtype, copy=False).view(f'u{dtype.itemsize}')
    logs = ((bits >> shift) & 0x7FFF).astype(np.int16) - by
    middle = int(np.median(logs.reshape(-1)[:: max(logs.size >> 10, 1)]))
    limits = np.array([middle - _BELOW * unit, middle + _ABOVE * unit])
    np.clip(logs, *limits.clip(-(2**15), 2**15 - 1).astype(np.int16), out=logs)
    levels.append(logs.mean(axis=axis) / unit)
  return np.concatenate(levels)


def shared(scales: contexts.Scales) -> contexts.Scales:
  """Returns the mean scale, which all rows and columns share."""
  mean = scales.base + scales.rows.mean() + scales.columns.mean()
  return contexts.Scales(int(np.rint(mean)), *np.zeros((2, 1), np.uint8))


def within(scales: contexts.Scales, least: int, most: int) -> contexts.Scales:
  """Returns scales whose classes are from `least` to `most`."""
  if least <= scales.base and scales.greatest <= most:
    return scales
  rows, columns = (x.astype(int) for x in scales[1:])
  return _within(scales.base + rows, columns, least, most)


def _within(
  rows: np.ndarray, columns: np.ndarray, least: int, most: int
) -> contexts.Scales:
  """Makes scales whose classes are from `least` to `most`, of those of lines."""
  top = min(max(int(rows.max() + columns.max()), least), most)
  room = top - least
  rows, columns = rows.max() - rows, columns.max() - columns
  # Columns have the room that rows leave, but half of it at least.
  rows = np.minimum(rows, max(room // 2, room - int(columns.max())))
  columns = np.minimum(columns, room - int(rows.max()))
  base = top - int(rows.max() + columns.max())
  lines = [(x.max() - x).astype(np.uint8) for x in (rows, columns)]
  return contexts.Scales(base, *(x if x.any() else x[:1] for x in lines))

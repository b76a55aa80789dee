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
from rotbits_jax.coding import tables

STEPS = 4
"""The number of classes for a factor of 2."""

_LEAST_LINE = 16  # elements of a row or column that has a scale
_COLUMNS, _RUNS = 1 << 8, 4  # by which rows are measured, in so many runs
_ROWS = 1 << 8  # by which columns are measured
_CHUNK = 1 << 17  # elements that are looked at at once, so that they fit the cache
_RANGE = 224  # of classes of an array

# If the scales of normal numbers vary so little that the logarithms of all vary by q
# times as much, a table for each scale saves 1.3 / q bits.
_SAVED = 1.3

# Logarithms are limited to this many octaves around the median. The lower ones tell
# little of the scale, and much of chance.
_BELOW, _ABOVE = 3, 8


def measure(array: np.ndarray, size: int) -> contexts.Scales:
  """Measures the rows of floats or integers, and then the columns of what is left.

  Units have `size` numbers.
  """
  count, width = contexts.matrix_shape(array.shape)
  matrix = array.reshape(count, width)
  row_levels, rows, columns = np.zeros((3, 1))
  if width >= _LEAST_LINE and count > 1:
    runs = formats.runs(width, _COLUMNS, _RUNS)
    some = np.concatenate([matrix[:, run] for run in runs], axis=1)
    row_levels, noise = _levels(some, np.zeros((1, 1)), 1)
    rows = _quantized(row_levels, noise, array.size, some.shape[1])
  if count >= _LEAST_LINE and width > 1:
    some_rows = slice(None, None, max(count // _ROWS, 1))
    levels, noise = _levels(matrix[some_rows], row_levels[some_rows, None], 0)
    levels = levels.reshape(contexts.line_sizes(array.shape, size)[1], -1).mean(axis=1)
    columns = _quantized(levels, noise, array.size, size * min(count, _ROWS))
  elif row_levels.size == 1:
    some = matrix.reshape(1, -1)[:, :: max(matrix.size // _ROWS, 1)]
    columns = np.rint(STEPS * _levels(some, np.zeros((1, 1)), 1)[0])
  rows, columns = rows.astype(int), columns.astype(int)
  greatest = int(np.max(rows) + np.max(columns))
  return _within(rows, columns, greatest - _RANGE, greatest)


def _quantized(
  levels: np.ndarray, noise: float, size: int, measured: int
) -> np.ndarray:
  """Returns the scales of rows or columns, or one for all if they would save nothing.

  `size` numbers, whose logarithms have the variance `noise`, have these levels; each
  was measured by `measured` numbers.
  """
  lines = np.rint(STEPS * levels)
  saved = _SAVED * size * (np.var(levels) / noise - 2 / measured)
  if saved > tables.entropy_bits(np.unique(lines, return_counts=True)[1]):
    return lines
  return np.rint(STEPS * levels.mean(keepdims=True))


def _levels(array: np.ndarray, by: np.ndarray, axis: int) -> tuple[np.ndarray, float]:
  """Returns the levels of rows, axis 1, or of columns, axis 0, less those of `by`.

  Also returns about the variance of the logarithms.
  """
  dtype = array.dtype if array.dtype in layouts.FORMATS else np.dtype(np.float32)
  form = layouts.FORMATS[dtype]
  shift = form.bits - 16
  unit = 1 << form.nmant - shift
  # Integers, so that a file does not depend on the order of sums.
  by = np.rint(by * unit).astype(np.int16)
  levels, variances, step = [], [], max(_CHUNK // max(array.shape[axis], 1), 1)
  ones = np.ones(array.shape[axis], np.float32)
  for start in range(0, array.shape[1 - axis], step):
    places = slice(start, start + step)
    part = array[places] if axis else array[:, places]
    bits = part.astype(dtype, copy=False).view(f'u{dtype.itemsize}')
    logs = (bits >> shift).astype(np.int16) if shift else bits.view(np.int16)
    logs = (logs & 0x7FFF) - by
    some = slice(None, None, max(logs.size >> 10, 1))
    sample = logs.reshape(-1)[some]
    middle = int(np.partition(sample, sample.size // 2)[sample.size // 2])
    limits = np.array([middle - _BELOW * unit, middle + _ABOVE * unit])
    np.clip(logs, *limits.clip(-(2**15), 2**15 - 1).astype(np.int16), out=logs)
    logs -= np.int16(middle)
    variances.append(np.var(logs.reshape(-1)[some]))
    # Exact: sums of at most 2^10 integers up to 2^13, in which 2^24 is the limit.
    numbers = logs.astype(np.float32)
    sums = (numbers @ ones if axis else ones @ numbers).astype(float)
    levels.append((sums / ones.size + middle) / unit)
  return np.concatenate(levels), max(float(np.mean(variances)) / unit**2, 1e-3)


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

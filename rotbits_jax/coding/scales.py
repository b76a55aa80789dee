"""Scales: how large the elements of an array are, by row and by column.

An array is taken as a matrix. Its columns are along the last axis and its rows along
all others; or its rows are along the first axis and its columns along all others, which
suits convolutions, whose last axes are short. An array with one axis is rows of 128
elements. Two columns share a scale if their number is even, because a pair of elements
has one class.

The *level* of elements is the mean of their log2 magnitudes, in octaves. The bits of a
float approximate it well, with the bias of its exponent. The level of a column is that
of its elements divided by the scales of their rows. A sample of each row and column is
measured. Scales are levels in steps of a quarter octave. They only decide how many
bytes an array takes.

Shape letters: R rows, C columns.
"""

import math
from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.structured import ulps

STEPS = 4
"""The number of classes for a factor of 2."""

MOST_COLUMNS = 1 << 19
"""Of an array with scales, because a block makes the classes of whole rows."""

MOST_BELOW = 126
"""Steps from the greatest scale of rows, or of columns, to the least one."""

Lines = tuple[np.ndarray, np.ndarray]
"""The scales of rows and of columns, or one for all: integers of any size."""

Shape = tuple[int, ...]

_ROW = 128  # elements of a row of an array of one axis
_WIDE = 1 << 10  # columns that are written at once

_COLUMNS, _RUNS = 1 << 8, 4  # by which rows are measured, in so many runs
_ROWS = 1 << 7  # by which columns are measured
_MEASURED = 1 << 18  # elements that are measured at least
_CHUNK = 1 << 17  # elements that are looked at at once, so that they fit the cache
_ONE = 127  # the biased exponent of 1, in the scales of integers

# If the scales of normal numbers vary so little that the logarithms of all vary by q
# times as much, a table for each scale saves 1.3 / q bits.
_SAVED = 1.3

# Logarithms are limited to this many octaves around the median. The lower ones tell
# little of the scale, and much of chance.
_BELOW, _ABOVE = 3, 8
# With a greater variance, in octaves, each row or column has its own median.
_WIDE_SPREAD = 4
_EXACT = 1 << 9  # integers of 15 bits whose sum float32 holds


def matrix_shape(
  shape: Shape, shared: int = 1, by_first: bool = False
) -> tuple[int, int]:
  """Returns the rows of an array, and the scales of its columns.

  Args:
    shape: the shape of the array.
    shared: how many columns share a scale, if their number is a multiple of it.
    by_first: whether rows are along the first axis alone.

  Returns:
    R; and C, or C / `shared`.
  """
  if by_first and len(shape) > 1:
    rows, columns = shape[0], math.prod(shape[1:])
  else:
    rows, columns = math.prod(shape[:-1]), math.prod(shape[-1:])
  if len(shape) == 1:
    rows, columns = -(-columns // _ROW), _ROW
  return rows, columns if columns % shared else columns // shared


class Scales(NamedTuple):
  """The scales of the rows and columns of an array."""

  base: int  # the class to which they are added, modulo 256
  rows: np.ndarray  # uint8 `[R]`, or `[1]` if all rows have the same
  columns: np.ndarray  # the same for columns, see `matrix_shape`
  by_first: bool = False  # whether rows are along the first axis alone

  def write(self, shape: Shape, shared: int, start: int, out: np.ndarray) -> None:
    """Writes the classes of elements.

    Args:
      shape: the shape of the array.
      shared: how many elements share a class.
      start: the index of the first class, in C order.
      out: uint8 `[n]`, filled with that class and those that follow it.
    """
    if self.rows.size == self.columns.size == 1:
      out[:] = self.base + int(self.rows[0]) + int(self.columns[0]) & 255
      return
    width = matrix_shape(shape, shared, self.by_first)[1]
    columns = self.columns
    # From a unit to the next one.
    step = shared if matrix_shape(shape, 1, self.by_first)[1] % shared else 1
    if self.rows.size == 1:  # rows of few bytes would take long
      times = -(-_WIDE // width)
      width = times * width
      columns = np.tile(columns, times)
    first = start * step
    last = (start + out.size - 1) * step + 1
    low = first // width
    high = -(-last // width)
    rows = self.rows[low:high] if self.rows.size > 1 else self.rows
    terms = (rows + np.uint8(self.base))[:, None], columns
    if step == 1 and first == low * width and last == high * width:
      np.add(*terms, out=out.reshape(-1, width))
      return
    grid = np.add(*terms, out=np.empty((high - low, width), np.uint8))
    out[:] = grid.reshape(-1)[first - low * width :: step][: out.size]


class Levels(NamedTuple):
  """The measured scales of an array, and whether they tell anything."""

  lines: Lines  # integers `[R]` and `[C]`, or `[C / shared]`
  # Whether those of rows, and those of columns, may save more bits than they take.
  saves: tuple[bool, bool]


def measure(array: np.ndarray, shared: int, by_first: bool = False) -> Levels:
  """Measures the rows of floats or integers, and then the columns of what is left.

  Args:
    array: the array, contiguous.
    shared: how many columns share a scale, if they can.
    by_first: whether rows are along the first axis alone.

  Returns:
    The levels; the sum of both lines is the scale of an element.
  """
  count, width = matrix_shape(array.shape, 1, by_first)
  is_whole = array.size == count * width  # else the last row begins anew
  matrix = array.reshape(count, width) if is_whole else np.resize(array, (count, width))
  places = runs(width, max(_COLUMNS, _MEASURED // max(count, 1)), _RUNS)
  some = np.concatenate([matrix[:, run] for run in places], axis=1)
  row_levels, _ = _levels(some, np.zeros((1, 1)), 1)
  most_rows = max(_ROWS, _MEASURED // width)
  some_rows = slice(None, None, max(count // most_rows, 1))
  levels, noise = _levels(matrix[some_rows], row_levels[some_rows, None], 0)
  scales = matrix_shape(array.shape, shared, by_first)[1]
  levels = levels.reshape(scales, -1).mean(1)
  one = 0 if array.dtype in ulps.FORMATS else STEPS * _ONE
  rows = _limited(np.rint(STEPS * row_levels).astype(int) - one)
  columns = _limited(np.rint(STEPS * levels).astype(int))
  by_columns = shared * min(count, most_rows)
  fits = scales <= MOST_COLUMNS
  saves = (
    fits and _saves(rows, noise, array.size, some.shape[1]),
    fits and _saves(columns, noise, array.size, by_columns),
  )
  return Levels((rows, columns), saves)


def _limited(line: np.ndarray) -> np.ndarray:
  """Returns scales that are so close to the greatest one that 7 bits tell them.

  Rows of zeros would else be far below the others.
  """
  return line.clip(min=line.max() - MOST_BELOW)


def even(line: np.ndarray) -> np.ndarray:
  """Returns one scale for all rows or columns: `[1]`."""
  return np.rint(line.mean(keepdims=True)).astype(int)


def paired(line: np.ndarray) -> np.ndarray:
  """Returns the scales of pairs of columns, if their number is even: `[C / 2]`."""
  if line.size % 2:
    return line
  return np.rint(line.reshape(-1, 2).mean(axis=1)).astype(int)


def kept(array: np.ndarray, shared: int) -> Lines:
  """Returns the scales of an array that save bits, and else one for all; `measure`."""
  (rows, columns), (of_rows, of_columns) = measure(array, shared)
  return rows if of_rows else even(rows), columns if of_columns else even(columns)


def line_bits(line: np.ndarray) -> float:
  """Returns the bits of the scales of rows or columns; 0 for one."""
  return float(tables.entropy_bits(np.bincount(line - line.min())))


def _saves(line: np.ndarray, noise: float, size: int, measured: int) -> bool:
  """Returns whether the scales of rows or columns may save more bits than they take.

  Args:
    line: int `[R]` or `[C]`, the scales.
    noise: the variance of the logarithms of elements of one scale.
    size: the number of elements of the array.
    measured: by how many elements each scale was measured.
  """
  saved = _SAVED * size * (np.var(line) / STEPS**2 / noise - 2 / measured)
  return saved > 0 and saved > line_bits(line)


def runs(size: int, most: int, count: int = 16) -> list[slice]:
  """Returns the places of a sample: all elements, or runs that have about `most`."""
  if size <= most:
    return [slice(0, size)]
  length = most // count
  starts = np.linspace(0, size - length, count).astype(int).tolist()
  return [slice(start, start + length) for start in starts]


def _levels(array: np.ndarray, by: np.ndarray, axis: int) -> tuple[np.ndarray, float]:
  """Measures the levels of rows or columns, less those of `by`.

  Args:
    array: `[R, C]`.
    by: levels that are subtracted from those of elements, `[R, 1]` or `[1, 1]`.
    axis: 1 for levels of rows, 0 for levels of columns.

  Returns:
    The levels; and about the variance of the logarithms around them.
  """
  dtype = array.dtype if array.dtype in ulps.FORMATS else np.dtype(np.float32)
  form = ulps.FORMATS[dtype]
  unit = 1 << form.nmant + 16 - form.bits
  # Integers, so that a file does not depend on the order of sums.
  by = np.rint(by * unit).astype(np.int16)
  levels, variances = [], []
  step = max(_CHUNK // max(array.shape[axis], 1), 1)
  for start in range(0, array.shape[1 - axis], step):
    places = slice(start, start + step)
    part = array[places] if axis else array[:, places]
    logs = _logs(part.astype(dtype, copy=False)) - by
    rough = np.zeros((1, 1), np.int16)
    if np.var(_some(logs)) > _WIDE_SPREAD * unit**2:
      few = logs[:, :: logs.shape[1] // _COLUMNS + 1] if axis else logs
      rough = np.median(few, axis=axis, keepdims=True).astype(np.int16)
      logs -= rough
    sample = _some(logs)
    middle = int(np.partition(sample, sample.size // 2)[sample.size // 2])
    limits = np.array([middle - _BELOW * unit, middle + _ABOVE * unit])
    limits = limits.clip(-(2**15), 2**15 - 1).astype(np.int16)
    np.clip(logs, *limits, out=logs)
    variances.append(np.var(sample.clip(*limits)))
    levels.append((_means(logs, axis) + rough.reshape(-1)) / unit)
  return np.concatenate(levels), max(float(np.mean(variances)) / unit**2, 1e-3)


def _logs(floats: np.ndarray) -> np.ndarray:
  """Returns about the logarithms of floats, int16, in steps that the dtype tells."""
  if floats.dtype.itemsize == 1:
    floats = floats.view(np.uint8).astype(np.int16) << 8
  halves = max(floats.dtype.itemsize // 2, 1)
  return floats.view(np.int16)[:, halves - 1 :: halves] & np.int16(0x7FFF)


def _means(logs: np.ndarray, axis: int) -> np.ndarray:
  """Returns the means of rows, axis 1, or of columns, axis 0: float64."""
  ones = np.ones(logs.shape[axis], np.float32)
  # Exact: sums of integers up to 2^15 that stay below 2^24, in groups of 2^9.
  numbers = logs.astype(np.float32)
  if ones.size <= _EXACT:
    sums = (numbers @ ones if axis else ones @ numbers).astype(float)
  else:
    sums = logs.sum(axis=axis, dtype=np.int64).astype(float)
  return sums / ones.size


def _some(logs: np.ndarray) -> np.ndarray:
  """Returns a sample of logarithms: `[n]`."""
  return logs.reshape(-1)[:: logs.size >> 10 | 1]  # odd, to see all columns

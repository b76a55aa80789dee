r"""Classes of scale for the lines of an array, and the normal distribution in integers.

A line is a row or a column of an array. Trained weights are nearly normally
distributed. Their standard deviation depends on the row, on the column, or on both as a
product. (After a random rotation, weights are nearly normal by the central limit
theorem.) Class k stands for a standard deviation of 2^(k / 8). The class of a number is
the class of its row plus the class of its column. Classes are absolute, so that few
classes, and few frequency tables, serve many arrays. If a class is wrong by half a
step, a number costs 2.7e-3 bits more; the average cost of rounding is 0.9e-3 bits.

The frequency table of a class need not be stored. It follows from k and from the
symbols that occur, by integer arithmetic alone:

    weight(symbol) = 2^width exp(-x^2 / 2 s^2)
                   = 2^(width - x^2 / s^2 * log2(e) / 2),        s = 2^(k / 8)

Here x is the centre of the symbol's cell, the range of the numbers that have this
symbol, and 2^width is the width of the cell.

Shape letters: R rows, C columns, K classes, A symbols in the alphabet.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import numbers

STEPS = 8
"""The number of classes for a factor of 2 in the standard deviation."""

ZERO = -(1 << 14)
"""The class of numbers in lines that are zero throughout; far below other classes."""

TABLE_BYTES = 8
"""Estimated bytes for the list of symbols that occur in a class."""

MAX_LABELS = 254
"""The labels of numbers are below this bound, so that a label fits a byte."""


class Lines(NamedTuple):
  """The rows and columns of an array, sorted into classes.

  A row or a column has the label 0 if it is zero throughout. The label of a number is 0
  if its row or its column has the label 0; else it is the sum of both labels minus 1.
  The class of a number is `ZERO` if its label is 0, else base + (label - 1) * step.

  Attributes:
    base: the least class.
    step: the distance between neighbouring classes.
    rows: labels of the rows, uint8 `[R]`; or a single 1 if rows are not sorted.
    columns: labels of the columns, uint8 `[C]`; or a single 1 if columns are not
      sorted.
  """

  base: int
  step: int
  rows: np.ndarray
  columns: np.ndarray

  def classes(self, labels: np.ndarray) -> np.ndarray:
    """Returns the classes of numbers, given their labels: int64."""
    return np.where(labels, self.base + (labels.astype(np.int64) - 1) * self.step, ZERO)

  def labels(self) -> np.ndarray:
    """Returns the labels of numbers that occur, in ascending order."""
    return np.unique(_label(np.unique(self.rows)[:, None], np.unique(self.columns)))

  @property
  def top(self) -> int:
    """The greatest label that a number may have."""
    return int(self.rows.max()) + int(self.columns.max()) - 1

  @property
  def has_zeros(self) -> bool:
    """Whether a line is zero throughout."""
    return not (self.rows.all() and self.columns.all())

  def write(
    self, out: np.ndarray, start: int, shape: tuple[int, int], first: int, zero: int
  ) -> None:
    """Writes the index of each number's table.

    The table is `zero` for the label 0, and `first + label - 1` for other labels.

    Args:
      out: unsigned integers `[n]` to write into, for n numbers in C order.
      start: the first of the n numbers, counted within the array.
      shape: R and C.
      first: the table of label 1.
      zero: the table of label 0.
    """
    if self.rows.size == self.columns.size == 1:
      out[:] = first
      return
    width = shape[1]
    low, high = start // width, -(-(start + out.size) // width)
    rows = self.rows[low:high] if self.rows.size > 1 else self.rows
    # `first - 2` may be negative, because unsigned integers wrap.
    offset = np.asarray(first - 2).astype(out.dtype)
    terms = (rows.astype(out.dtype) + offset)[:, None], self.columns.astype(out.dtype)
    whole = start == low * width and out.size == (high - low) * width
    grid = out.reshape(high - low, width) if whole else None
    if grid is None:
      grid = np.empty((high - low, width), out.dtype)
    np.add(*terms, out=grid)
    for axis, labels in ((grid, rows), (grid.T, self.columns)):
      if not labels.all():
        axis[labels == 0 if labels.size > 1 else ...] = zero
    if not whole:
      out[:] = grid.reshape(-1)[start - low * width :][: out.size]


def _label(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
  both = (rows > 0) & (columns > 0)
  return np.where(both, rows.astype(np.int32) + columns.astype(np.int32) - 1, 0)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
  """Returns R and C of an array: the product of all axes but the last; the last."""
  return math.prod(shape[:-1]), math.prod(shape[-1:])


def sort(matrix: np.ndarray) -> Lines:
  """Sorts the rows of an array, its columns, both or neither into classes.

  The function takes the choice with the least cost. The cost is an estimate: the bits
  of normally distributed numbers and of the labels. Only the size of the file depends
  on it.

  Args:
    matrix: numbers `[R, C]`, not empty.

  Returns:
    The lines.
  """
  one = np.ones(1)
  if min(matrix.shape) == 1:
    return _sorted(_mean_square(matrix.reshape(-1)), one, matrix.size, 1)[1]
  rows, columns, row_factors, column_factors = _mean_squares(matrix)
  candidates = [_sorted(rows.mean(keepdims=True), one, matrix.size, 1)]
  pairs = (rows, one), (one, columns), (row_factors, column_factors)
  candidates += [
    _sorted(of_rows, of_columns, matrix.size, step)
    for of_rows, of_columns in pairs
    for step in (1, 2, 4, 8)
  ]
  return min(candidates, key=lambda candidate: candidate[0])[1]


def normal_weights(layout: layouts.Layout, classes: np.ndarray) -> np.ndarray:
  """Returns the weights of symbols under the normal distribution.

  Args:
    layout: layout of the numbers; its `has_scale` must be true.
    classes: integers `[K]`.

  Returns:
    int64 `[K, A]`, from 1 to 2^30. `tables.quantize` scales them to frequencies.
  """
  centre, exponent, width = layout.cells()
  # x^2 / s^2 = centre^2 * 2^(quarters / 4)
  quarters = STEPS * exponent - np.asarray(classes, np.int64)[:, None]
  mantissa = centre**2 * np.array(_HALF_LOG2_E, np.int64)[quarters & 3]
  shift = (quarters >> 2) + _FRACTION - _HALF_LOG2_E_BITS
  square = mantissa << np.clip(shift, 0, 12) >> np.clip(-shift, 0, 62)
  bits = (width << _FRACTION) - square
  below = bits.max(axis=-1, keepdims=True) - bits
  whole, part = below >> _FRACTION, below & ((1 << _FRACTION) - 1)
  return np.maximum(_powers()[part] >> np.minimum(whole, 62), 1)


_BLOCK = 1 << 18  # numbers that are read at once, so that they fit the CPU's cache

# The greatest number of steps between the classes of the lines of an axis. With this
# bound for both axes, the labels of numbers are below `MAX_LABELS`.
_RANGE = 125

# log2(e) / 2 * 2^(i / 4) for i = 0, ..., 3.
_HALF_LOG2_E_BITS = 20
_HALF_LOG2_E = 756388, 899502, 1069694, 1272087

_FRACTION = 8


@functools.cache
def _powers() -> np.ndarray:
  """Returns 2^(30 - i / 2^8) for i = 0, ..., 2^8 - 1, rounded down: int64."""
  powers = []
  for i in range(1 << _FRACTION):
    power = 1 << ((30 << _FRACTION) - i)
    for _ in range(_FRACTION):
      power = math.isqrt(power)
    powers.append(power)
  return np.array(powers, np.int64)


def _mean_square(line: np.ndarray) -> np.ndarray:
  """Returns the mean square of numbers `[n]`: float64 `[1]`."""
  total = 0.0
  for start in range(0, line.size, _BLOCK):
    squares = numbers.squares(line[start : start + _BLOCK]).astype(np.float64)
    total += float(np.nan_to_num(squares, posinf=2.0**256).sum())
  return np.array([total / line.size])


def _mean_squares(
  matrix: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Returns mean squares of lines, and factors whose products model the squares.

  The factors are close to the maximum-likelihood factors. The factor of a row is the
  mean of its squares, each divided by the factor of its column; and vice versa.

  Args:
    matrix: numbers `[R, C]`.

  Returns:
    The mean squares of rows, float64 `[R]`, and of columns, `[C]`; the factors of rows,
    `[R]`, and of columns, `[C]`.
  """
  count, width = matrix.shape
  step = max(_BLOCK // width, 1)

  def factors(divisors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns factors of rows, given factors of columns, and new factors of columns.

    Returns:
      The factors of rows, `[R]`; and `[2, C]`, the factors of columns that follow from
      these, and the mean squares of columns.
    """
    rows, sums = np.zeros(count), np.zeros((2, width))
    weights = _inverse(divisors)
    weights /= max(np.count_nonzero(weights), 1)
    for start in range(0, count, step):
      squares = numbers.squares(matrix[start : start + step])
      # einsum runs on this thread. BLAS would sum in an order that depends on its
      # number of threads.
      of_rows = lambda x: np.einsum('rc,c->r', x, weights.astype(x.dtype))
      own = of_rows(squares)
      if not np.isfinite(own).all():
        squares = np.nan_to_num(squares.astype(np.float64), posinf=2.0**256)
        own = of_rows(squares)
      rows[start : start + step] = own
      inverse = _inverse(rows[start : start + step]).astype(squares.dtype)
      sums[0] += np.einsum('r,rc->c', inverse, squares)
      sums[1] += np.einsum('rc->c', squares)
    return rows, sums / np.array([[max(np.count_nonzero(rows), 1)], [count]])

  rows, (first, columns) = factors(np.ones(width))
  row_factors, (column_factors, _) = factors(first)
  return rows, columns, row_factors, column_factors


def _inverse(squares: np.ndarray) -> np.ndarray:
  """Returns 1 / x, and 0 where x is 0."""
  return np.divide(1, squares, where=squares > 0, out=np.zeros_like(squares))


def _sorted(
  rows: np.ndarray, columns: np.ndarray, numbers: int, step: int
) -> tuple[float, Lines]:
  """Sorts lines into classes.

  Args:
    rows: mean squares of the rows, or factors of them: `[R]`, or `[1]` if rows are not
      sorted.
    columns: the same for columns.
    numbers: the number of numbers in the array.
    step: the distance between neighbouring classes.

  Returns:
    The estimated cost in bits, and the lines.
  """
  row_base, row_labels, row_log, row_error = _quantized(rows, step)
  column_base, column_labels, column_log, column_error = _quantized(columns, step)
  lines = Lines(row_base + column_base, step, row_labels, column_labels)
  if lines.top >= MAX_LABELS:
    return math.inf, lines
  bits = numbers * (row_log + column_log + row_error * column_error / math.log(4))
  for labels in (row_labels, column_labels):
    bits += tables.entropy_bits(np.bincount(labels))
  return bits + 8 * TABLE_BYTES * lines.labels().size, lines


def _quantized(squares: np.ndarray, step: int) -> tuple[int, np.ndarray, float, float]:
  """Rounds the scales of the lines along one axis to classes.

  A line of zeros costs no bits, because its label 0 has a table of its own. Without
  labels, each of its numbers would be a rare and costly symbol. The estimate accounts
  for the difference: the scale of such a line counts as ten octaves below all others.

  Args:
    squares: mean squares of the lines, or factors of them.
    step: the distance between neighbouring classes.

  Returns:
    The least class; the labels; the mean log2 of the classes' scales; and the mean of
    the squares divided by the squared scales.
  """
  if squares.size == 1 and not squares[0]:
    return ZERO, np.ones(1, np.uint8), 0.0, 1.0
  present = squares > 0
  least = squares.min(where=present, initial=2.0**256)
  squares = np.where(present, squares, least / 2.0**20)
  classes = np.round(STEPS / 2 * np.log2(squares) / step).astype(np.int64) * step
  top = int(np.max(classes))
  classes = np.clip(classes, top - _RANGE * step, top)
  base = int(np.min(classes, where=present, initial=top))
  labels = np.where(present, 1 + (classes - base) // step, 0).astype(np.uint8)
  if np.all(labels == 1):
    labels = labels[:1]
  error = squares / np.exp2(classes / (STEPS / 2))
  return base, labels, float(classes.mean()) / STEPS, float(error.mean())

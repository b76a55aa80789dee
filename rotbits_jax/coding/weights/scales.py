r"""Numbers of known scale: lines in classes, and the normal distribution in integers.

Trained weights are close to normally distributed with a standard deviation for every
row, or every column, or that is a product of both; after a random rotation they are so
by the central limit theorem. Class k stands for a standard deviation of 2^(k / 8); a
row's and a column's classes add up to that of the number where they meet. Classes are
absolute, so that few of them, and few frequency tables, serve many arrays. A class half
a step off costs 2.7e-3 bits a number, and 0.9e-3 on average.

The table of a class need not be stored: which symbols occur and k determine it, by
integer arithmetic alone,

    weight(symbol) = 2^width exp(-x^2 / 2 s^2)
                   = 2^(width - x^2 / s^2 * log2(e) / 2),        s = 2^(k / 8)

for a symbol whose cell has the centre x and is 2^width wide.

Shape letters: R rows, C columns, K classes, A symbols of the alphabet.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import numbers

STEPS = 8
"""Classes an octave."""

ZERO = -(1 << 14)
"""The class of numbers in lines that are zero throughout, far below all others."""

TABLE_BYTES = 8
"""What it takes, about, to tell which symbols of a class occur."""

MAX_LABELS = 254
"""Bound of the labels of numbers: less than a byte counts."""


class Lines(NamedTuple):
  """The rows and columns of an array, sorted into classes.

  The label of a number is 0 if its row's or its column's is, else their sum less 1. Its
  class is `ZERO` if its label is 0, else base + (label - 1) * step.

  Attributes:
    base: the least class.
    step: the distance of neighbouring classes.
    rows: labels, uint8 `[R]`, or `[1]`, a 1, if rows are not sorted.
    columns: likewise.
  """

  base: int
  step: int
  rows: np.ndarray
  columns: np.ndarray

  def classes(self, labels: np.ndarray) -> np.ndarray:
    """The classes that labels of numbers stand for: int64."""
    return np.where(labels, self.base + (labels.astype(np.int64) - 1) * self.step, ZERO)

  def labels(self) -> np.ndarray:
    """The labels of numbers that occur, from the least up."""
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
    """Writes the table of each number, `first + label - 1` or, of label 0, `zero`.

    Args:
      out: unsigned integers that hold these, for so many numbers in C order.
      start: the first of the numbers.
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
    # Unsigned integers wrap, so that `first - 2` may be less than 0.
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
  """An array's shape as R and C: the last axis, and all others as one."""
  return math.prod(shape[:-1]), math.prod(shape[-1:])


def sort(matrix: np.ndarray) -> Lines:
  """Sorts the rows or columns of an array into classes, or both, by what that costs.

  The cost is that of numbers normally distributed, and of the labels; an estimate, on
  which nothing but the size depends.

  Args:
    matrix: numbers `[R, C]`, not empty.

  Returns:
    The lines, of the sorted axes and with the step that cost least.
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
  """The normal distribution's weights of symbols.

  Args:
    layout: of the numbers, one that has a scale.
    classes: integers `[K]`.

  Returns:
    int64 `[K, A]`, up to 2^30 and at least 1: to scale, see `tables.quantize`.
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


_BLOCK = 1 << 18  # numbers that are looked at together, in the processor's cache

# Steps between the classes of the lines of an axis. If both have so many, the labels of
# numbers are still below `MAX_LABELS`.
_RANGE = 125

# log2(e) / 2 * 2^(i / 4) for i = 0, ..., 3.
_HALF_LOG2_E_BITS = 20
_HALF_LOG2_E = 756388, 899502, 1069694, 1272087

_FRACTION = 8


@functools.cache
def _powers() -> np.ndarray:
  """2^(30 - i / 2^8) for i = 0, ..., 2^8 - 1, rounded down: int64."""
  powers = []
  for i in range(1 << _FRACTION):
    power = 1 << ((30 << _FRACTION) - i)
    for _ in range(_FRACTION):
      power = math.isqrt(power)
    powers.append(power)
  return np.array(powers, np.int64)


def _mean_square(line: np.ndarray) -> np.ndarray:
  """The mean square of `[n]`, float64 `[1]`."""
  total = 0.0
  for start in range(0, line.size, _BLOCK):
    squares = numbers.squares(line[start : start + _BLOCK]).astype(np.float64)
    total += float(np.nan_to_num(squares, posinf=2.0**256).sum())
  return np.array([total / line.size])


def _mean_squares(
  matrix: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Mean squares of rows and of columns, and factors whose products are the squares.

  The factors are close to those of maximum likelihood: each is the mean of squares over
  the others' factors.

  Args:
    matrix: numbers `[R, C]`.

  Returns:
    float64 `[R]`, `[C]`, `[R]`, `[C]`.
  """
  count, width = matrix.shape
  step = max(_BLOCK // width, 1)

  def factors(divisors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows' factors given columns'; and columns' given those, beside mean squares."""
    rows, sums = np.zeros(count), np.zeros((2, width))
    weights = _inverse(divisors)
    weights /= max(np.count_nonzero(weights), 1)
    for start in range(0, count, step):
      squares = numbers.squares(matrix[start : start + step])
      # einsum runs on this thread, so that sums do not depend on BLAS's threads.
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
  """1 / x, or 0 where x is 0."""
  return np.divide(1, squares, where=squares > 0, out=np.zeros_like(squares))


def _sorted(
  rows: np.ndarray, columns: np.ndarray, numbers: int, step: int
) -> tuple[float, Lines]:
  """Lines of these mean squares, or factors of them; and the bits that it costs."""
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
  """Base and labels of lines; means of log2 of their scales, and of squares over them.

  A line of zeros costs nothing where it is apart. Elsewhere each of its numbers is a
  rare one: it counts as ten octaves below the least of the others.
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

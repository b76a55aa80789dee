r"""Scale buckets of rows and columns, and the normal distribution in integers.

Trained weights are nearly normally distributed. Their standard deviation depends on the
row, on the column, or on both as a product. (After a random rotation, weights are
nearly normal by the central limit theorem.) Class k stands for a standard deviation of
2^(k / 8). Rows and columns are sorted into *scale buckets* by their classes; the class
of an element is the class of its row plus the class of its column. Classes are
absolute, so that few classes, and few frequency tables, serve many arrays. If a class
is wrong by half a step, an element costs 2.7e-3 bits more; the average cost of rounding
is 0.9e-3 bits.

The frequency table of a class need not be stored. It follows from k and from the
symbols that occur, by integer arithmetic alone:

    weight(symbol) = 2^width exp(-x^2 / 2 s^2)
                   = 2^(width - x^2 / s^2 * log2(e) / 2),        s = 2^(k / 8)

Here x is the centre of the symbol's cell, the range of the elements that have this
symbol, and 2^width is the width of the cell.

An array is taken as a matrix: its last axis is that of columns, and all others together
are that of rows. Shape letters: R rows, C columns, K classes, A symbols.
"""

from collections.abc import Sequence
import functools
import math
from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import buffers
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import line_sums

STEPS = 8
"""The number of classes for a factor of 2 in the standard deviation."""

ZERO = -(1 << 14)
"""The class of elements in lines that are zero throughout; far below other classes."""

TABLE_BYTES = 8
"""Estimated bytes for the list of symbols that occur in a class."""

MAX_BUCKETS = 254
"""The buckets of elements are below this bound, so that a bucket fits a byte."""


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
  """Returns R and C of an array: the product of all axes but the last; the last."""
  return math.prod(shape[:-1]), math.prod(shape[-1:])


class Buckets(NamedTuple):
  """The rows and columns of an array, sorted into scale buckets.

  A line (a row or a column) is in bucket 0 if it is zero throughout. The bucket of an
  element is 0 if that of its row or its column is 0; else it is the sum of both minus
  1. The class of an element is `ZERO` in bucket 0, else base + (bucket - 1) * step.

  Attributes:
    base: the least class.
    step: the distance between neighbouring classes.
    rows: buckets of the rows, uint8 `[R]`; or a single 1 if rows are not sorted.
    columns: buckets of the columns, uint8 `[C]`; or a single 1 if columns are not
      sorted.
  """

  base: int
  step: int
  rows: np.ndarray
  columns: np.ndarray

  def classes(self, buckets: np.ndarray) -> np.ndarray:
    """Returns the classes of elements, given their buckets: int64."""
    above = self.base + (buckets.astype(np.int64) - 1) * self.step
    return np.where(buckets, above, ZERO)

  def used(self) -> np.ndarray:
    """Returns the buckets of elements that occur, in ascending order."""
    rows, columns = (
      np.bincount(x, minlength=2)[1:] > 0 for x in (self.rows, self.columns)
    )
    both = np.convolve(rows, columns.astype(int))
    return np.flatnonzero(np.append(self.has_zeros, both))

  @property
  def top(self) -> int:
    """The greatest bucket that an element may be in."""
    return int(self.rows.max()) + int(self.columns.max()) - 1

  @property
  def has_zeros(self) -> bool:
    """Whether a line is zero throughout."""
    return not (self.rows.all() and self.columns.all())

  def write(
    self, out: np.ndarray, start: int, columns: int, first: int, zero: int
  ) -> None:
    """Writes the index of each element's table.

    The table is `zero` for bucket 0, and `first + bucket - 1` for other buckets.

    Args:
      out: uint8 `[n]` to write into, for n elements in C order.
      start: the first of the n elements, counted within the array.
      columns: C.
      first: the table of bucket 1.
      zero: the table of bucket 0.
    """
    if self.rows.size == self.columns.size == 1:
      out[:] = first
      return
    low, high = start // columns, -(-(start + out.size) // columns)
    rows = self.rows[low:high] if self.rows.size > 1 else self.rows
    # `first - 2` may be negative, because unsigned integers wrap.
    offset = np.asarray(first - 2).astype(out.dtype)
    terms = (rows.astype(out.dtype) + offset)[:, None], self.columns.astype(out.dtype)
    whole = start == low * columns and out.size == (high - low) * columns
    grid = out.reshape(high - low, columns) if whole else None
    if grid is None:
      grid = np.empty((high - low, columns), out.dtype)
    np.add(*terms, out=grid)
    for axis, buckets in ((grid, rows), (grid.T, self.columns)):
      if not buckets.all():
        axis[buckets == 0 if buckets.size > 1 else ...] = zero
    if not whole:
      out[:] = grid.reshape(-1)[start - low * columns :][: out.size]


# ---- the choice of buckets -----------------------------------------------------------

_MOST_EXPONENT = 32
_MANY = 1 << 9  # elements of a line
_FEW_ELEMENTS = 1 << 16  # of a matrix
_GREATEST = 2.0**60

# The greatest number of steps between the classes of the lines of an axis. With this
# bound for both axes, the buckets of elements are below `MAX_BUCKETS`.
_RANGE = 125


def exponent_of(matrix: np.ndarray) -> int:
  """Returns the exponent by which elements are divided before they are squared.

  It is 0 if their squares are far from the limits of float32.
  """
  sample = np.abs(matrix.reshape(-1)[: 1 << 12].astype(np.float32))
  sample = sample[np.isfinite(sample) & (sample > 0)]
  exponent = int(np.log2(sample).mean()) if sample.size else 0
  return exponent if abs(exponent) > _MOST_EXPONENT else 0


def inverse_weights(mean_squares: np.ndarray) -> np.ndarray:
  """Returns weights for which `Sums.rows` is the mean of squares / mean_squares."""
  weights = np.minimum(_inverse(mean_squares), _GREATEST)
  return (weights / max(np.count_nonzero(weights), 1)).astype(np.float32)


def _inverse(squares: np.ndarray) -> np.ndarray:
  """Returns 1 / x, and 0 where x is 0."""
  return np.divide(1, squares, where=squares > 0, out=np.zeros_like(squares))


def has_lines(shape: tuple[int, ...]) -> bool:
  """Returns whether rows and columns of an array of this shape may be sorted."""
  rows, columns = matrix_shape(shape)
  # The sums of a row are made at once.
  return min(rows, columns) > 1 and columns <= buffers.ROOM


def of_counts(layout: layouts.Layout, counts: np.ndarray) -> np.ndarray:
  """Returns the classes of arrays of which each has one.

  Args:
    layout: layout of the elements; its `has_scale` must be true.
    counts: `[M, A]`, how often each symbol occurs in each array.

  Returns:
    int64 `[M]`.
  """
  centre, exponent, _ = layout.cells(counts.shape[1])
  sizes = np.ldexp(centre.astype(np.float64), exponent)
  squares = np.square(np.minimum(sizes, _GREATEST)) @ counts.T / counts.sum(axis=1)
  logs = STEPS / 2 * np.log2(np.maximum(squares, np.finfo(np.float64).tiny))
  return np.where(squares > 0, np.rint(logs).astype(np.int64), ZERO)


def sort(found: line_sums.Sums, exponent: int) -> Buckets:
  """Sorts the rows of an array, its columns, both or neither into buckets.

  The function takes the choice with the least cost. The cost is an estimate: the bits
  of normally distributed elements and of the buckets. Only the size of the file depends
  on it.

  The factors of rows and columns whose products model the squares are close to the
  maximum-likelihood factors. The factor of a row is the mean of its squares, each
  divided by the factor of its column; and vice versa.

  Args:
    found: sums over all rows, with weights that follow from the columns of some rows.
    exponent: that of the sums.

  Returns:
    The buckets.
  """
  count, width = found.rows.size, found.columns.size
  one, scale = np.ones(1), 4.0**exponent
  present = max(np.count_nonzero(found.rows), 1)
  pairs = [
    (scale * found.means.mean(keepdims=True), one),
    (scale * found.means, one),
    (one, scale * found.columns / count),
    (scale * found.rows, found.weighted / present),
  ]
  size = count * width
  if size <= _FEW_ELEMENTS:
    # More choices save less than the time that they take.
    costs = [_sorted(x, y, size, (1,))[0][0] for x, y in pairs]
    pairs = [pairs[int(np.argmin(costs))]]
  # Fewer classes save less than they cost, if lines have many elements.
  steps = (1,) if min(count, width) >= _MANY else (1, 2, 4, 8)
  made = [own for x, y in pairs for own in _sorted(x, y, size, steps)]
  return min(made, key=lambda candidate: candidate[0])[1]


def _sorted(
  rows: np.ndarray, columns: np.ndarray, size: int, steps: Sequence[int]
) -> list[tuple[float, Buckets]]:
  """Sorts lines into buckets.

  Args:
    rows: mean squares of the rows, or factors of them: `[R]`, or `[1]` if rows are not
      sorted.
    columns: the same for columns.
    size: the number of elements in the array.
    steps: distances between neighbouring classes.

  Returns:
    For each distance, the estimated cost in bits, and the buckets.
  """
  found = []
  for step, of_rows, of_columns in zip(
    steps, _quantized(rows, steps), _quantized(columns, steps), strict=True
  ):
    buckets = Buckets(
      of_rows.base + of_columns.base, step, of_rows.buckets, of_columns.buckets
    )
    bits = math.inf
    if buckets.top < MAX_BUCKETS:
      error = of_rows.error * of_columns.error / math.log(4)
      bits = size * (of_rows.mean_log + of_columns.mean_log + error)
      bits += of_rows.entropy + of_columns.entropy
      bits += 8 * TABLE_BYTES * buckets.used().size
    found.append((bits, buckets))
  return found


class _Quantized(NamedTuple):
  """The scales of the lines along one axis, rounded to classes.

  Attributes:
    base: the least class.
    buckets: uint8, the bucket of each line.
    mean_log: mean log2 of the classes' scales.
    error: mean of the squares divided by the squared scales.
    entropy: bits of the buckets.
  """

  base: int
  buckets: np.ndarray
  mean_log: float
  error: float
  entropy: float


def _quantized(squares: np.ndarray, steps: Sequence[int]) -> list[_Quantized]:
  """Rounds the scales of the lines along one axis to classes.

  A line of zeros costs no bits, because its bucket 0 has a table of its own. Without
  buckets, each of its elements would be a rare and costly symbol. The estimate accounts
  for the difference: the scale of such a line counts as ten octaves below all others.

  Args:
    squares: mean squares of the lines, or factors of them.
    steps: distances between neighbouring classes.

  Returns:
    The rounded scales for each distance.
  """
  if squares.size == 1:
    one, (square,) = np.ones(1, np.uint8), squares.tolist()
    if not square:
      return [_Quantized(ZERO, one, 0.0, 1.0, 0.0)] * len(steps)
    log = STEPS / 2 * math.log2(square)
    nearest = [round(log / step) * step for step in steps]
    return [
      _Quantized(x, one, x / STEPS, 2 ** (2 * (log - x) / STEPS), 0.0) for x in nearest
    ]
  present = squares > 0
  least = squares.min(where=present, initial=2.0**256)
  exact = STEPS / 2 * np.log2(np.where(present, squares, least / 2.0**20))
  found = []
  for step in steps:
    classes = np.rint(exact / step).astype(np.int64) * step
    top = int(np.max(classes))
    classes = np.maximum(classes, top - _RANGE * step)
    base = int(np.min(classes, where=present, initial=top))
    buckets = np.where(present, 1 + (classes - base) // step, 0).astype(np.uint8)
    entropy = tables.entropy_bits(np.bincount(buckets))
    if (buckets == 1).all():
      buckets = buckets[:1]
    error = float(np.exp2((exact - classes) / (STEPS / 2)).mean())
    mean_log = float(classes.mean()) / STEPS
    found.append(_Quantized(base, buckets, mean_log, error, entropy))
  return found


# ---- the normal distribution ---------------------------------------------------------

# log2(e) / 2 * 2^(i / 4) for i = 0, ..., 3.
_HALF_LOG2_E_BITS = 20
_HALF_LOG2_E = 756388, 899502, 1069694, 1272087

_FRACTION = 8


def normal_weights(
  layout: layouts.Layout, alphabet: int, classes: np.ndarray, symbols: np.ndarray
) -> np.ndarray:
  """Returns the weights of symbols under the normal distribution.

  Args:
    layout: layout of the elements; its `has_scale` must be true.
    alphabet: A, the number of symbols in use.
    classes: integers `[K]`.
    symbols: the symbols whose weights are wanted, `[a]`.

  Returns:
    int64 `[K, a]`, from 1 to 2^30. `tables.quantize` scales them to
    frequencies.
  """
  cells = np.array(layout.cells(alphabet))
  # The greatest weight is that of the first of some cells that differ in the centre.
  firsts = np.diff(cells[1:], prepend=1 << 32).any(axis=0)
  below = _log_weights(cells[:, firsts], classes).max(axis=-1, keepdims=True)
  below = below - _log_weights(cells[:, symbols], classes)
  whole, part = below >> _FRACTION, below & ((1 << _FRACTION) - 1)
  return np.maximum(_powers()[part] >> np.minimum(whole, 62), 1)


def _log_weights(cells: np.ndarray, classes: np.ndarray) -> np.ndarray:
  """Returns log2 of weights, up to a constant, times 2^8: int64 `[K, a]`.

  Args:
    cells: see `layouts.Layout.cells`, int64 `[3, a]`.
    classes: as for `normal_weights`.
  """
  centre, exponent, width = cells
  # x^2 / s^2 = centre^2 * 2^(quarters / 4)
  quarters = STEPS * exponent - np.asarray(classes, np.int64)[:, None]
  mantissa = centre**2 * np.array(_HALF_LOG2_E, np.int64)[quarters & 3]
  shift = (quarters >> 2) + _FRACTION - _HALF_LOG2_E_BITS
  square = mantissa << np.clip(shift, 0, 12) >> np.clip(-shift, 0, 62)
  return (width << _FRACTION) - square


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

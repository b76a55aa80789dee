"""The choice of the scales of the rows and columns of arrays, see `contexts`.

Shape letters: R rows, C columns.
"""

from collections.abc import Sequence
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import buffers
from rotbits_jax.coding import contexts
from rotbits_jax.coding import layouts
from rotbits_jax.coding import line_sums
from rotbits_jax.coding import pool
from rotbits_jax.coding import tables

_ROWS = 1 << 7  # of a matrix that tell the weights of its columns
_MANY = 1 << 9  # elements of a line
_FEW_ELEMENTS = 1 << 16  # of a matrix
_GREATEST = 2.0**60  # elements are limited to it, so that their squares are finite
_ZERO = -(1 << 14)  # the class of zeros, far below all others

# The greatest difference of the classes of the lines of an axis. With this bound for
# both axes, an element has one of `contexts.MOST_CLASSES`.
_RANGE = 126

# Where the mean logarithm of elements is beyond it, they are scaled before they are
# squared.
_FAR, _MOST_EXPONENT = 32, 126


def has_lines(shape: contexts.Shape) -> bool:
  """Returns whether the rows and columns of an array may have scales."""
  rows, columns = contexts.matrix_shape(shape)
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
  logs = contexts.STEPS / 2 * np.log2(np.maximum(squares, np.finfo(np.float64).tiny))
  return np.where(squares > 0, np.rint(logs).astype(np.int64), _ZERO)


def of_arrays(arrays: Sequence[np.ndarray]) -> list[contexts.Scales]:
  """Chooses the scales of arrays of floats or integers, by sums of their squares."""
  matrices = [x.reshape(contexts.matrix_shape(x.shape)) for x in arrays]
  sizes, exponents = [x.nbytes for x in matrices], map(_exponent_of, matrices)
  pairs = list(zip(matrices, exponents, strict=True))
  weights = pool.run((functools.partial(_weights, *pair) for pair in pairs), sizes)
  jobs = [
    [
      functools.partial(_sums, matrix[rows], own, exponent)
      for rows in line_sums.row_parts(matrix.shape)
    ]
    for (matrix, exponent), own in zip(pairs, weights, strict=True)
  ]
  parts = map(line_sums.joined, pool.run_lists(jobs, sizes))
  sums = zip(parts, [exponent for _, exponent in pairs], strict=True)
  return pool.run((functools.partial(_chosen, *x) for x in sums), sizes)


# ---- sums of squares -----------------------------------------------------------------


@functools.partial(jax.jit, static_argnames='dtype', donate_argnums=0)
def _squares(
  out: line_sums.Sums,
  elements: tuple[jax.Array],  # unsigned integers
  *others: jax.Array,
  unit: jax.Array,
  dtype: np.dtype,
) -> line_sums.Sums:
  def squares(elements: tuple[jax.Array, jax.Array], start: jax.Array) -> jax.Array:
    bits, unit = elements
    x = jax.lax.dynamic_slice(bits, (start,), (line_sums.WIDTH,))
    x = jnp.abs(line_sums.floats(x, dtype) * unit)
    return jnp.square(jnp.where(x < _GREATEST, x, jnp.float32(_GREATEST)))

  return line_sums.loop(squares, out, (*elements, unit), *others)


def _sums(matrix: np.ndarray, weights: np.ndarray, exponent: int) -> line_sums.Sums:
  """Sums squares of at most 2^20 elements, divided by 4^exponent, on this thread."""
  unit, bits = np.float32(2.0**-exponent), matrix.view(f'u{matrix.dtype.itemsize}')
  program = functools.partial(_squares, unit=unit, dtype=matrix.dtype)
  return line_sums.run(program, (bits,), weights)


def _exponent_of(matrix: np.ndarray) -> int:
  """Returns the exponent by which elements are divided before they are squared."""
  sample = np.abs(matrix.reshape(-1)[: 1 << 12].astype(np.float32))
  sample = sample[np.isfinite(sample) & (sample > 0)]
  exponent = int(np.log2(sample).mean()) if sample.size else 0
  far = abs(exponent) > _FAR
  return max(min(exponent, _MOST_EXPONENT), -_MOST_EXPONENT) if far else 0


def _weights(matrix: np.ndarray, exponent: int) -> np.ndarray:
  """Returns weights of columns, for which the sum of a row is its mean factor."""
  rows, columns = matrix.shape
  some = matrix[:: -(-rows // min(_ROWS, buffers.ROOM // columns))]
  equal = np.full(columns, 1 / columns, np.float32)
  squares = _sums(some, equal, exponent).weighted
  inverse = np.divide(1, squares, where=squares > 0, out=np.zeros_like(squares))
  inverse = np.minimum(inverse, _GREATEST)
  return (inverse / max(np.count_nonzero(inverse), 1)).astype(np.float32)


# ---- the choice ----------------------------------------------------------------------


def _chosen(sums: line_sums.Sums, exponent: int) -> contexts.Scales:
  """Chooses scales for the rows of an array, its columns, both or neither.

  The function takes the choice with the least cost. The cost is an estimate: the bits
  of normally distributed elements and of the scales. Only the size of the file depends
  on it.

  The factors of rows and columns whose products model the squares are close to the
  maximum-likelihood factors. The factor of a row is the mean of its squares, each
  divided by the factor of its column; and vice versa.

  Args:
    sums: sums over all rows, with weights that follow from the columns of some rows.
    exponent: that of the sums.
  """
  count, width = sums.rows.size, sums.columns.size
  one, scale = np.ones(1), 4.0**exponent
  present = max(np.count_nonzero(sums.rows), 1)
  pairs = [
    (scale * sums.means.mean(keepdims=True), one),
    (scale * sums.means, one),
    (one, scale * sums.columns / count),
    (scale * sums.rows, sums.weighted / present),
  ]
  size = count * width
  if size <= _FEW_ELEMENTS:
    # More choices save less than the time that they take.
    costs = [_rounded(x, y, size, (1,))[0][0] for x, y in pairs]
    pairs = [pairs[int(np.argmin(costs))]]
  # Fewer classes save less than they cost, if lines have many elements.
  steps = (1,) if min(count, width) >= _MANY else (1, 2, 4, 8)
  choices = [own for x, y in pairs for own in _rounded(x, y, size, steps)]
  return min(choices, key=lambda choice: choice[0])[1]


def _rounded(
  rows: np.ndarray, columns: np.ndarray, size: int, steps: Sequence[int]
) -> list[tuple[float, contexts.Scales]]:
  """Rounds scales to classes.

  Args:
    rows: mean squares of the rows, or factors of them: `[R]`, or `[1]` if all rows have
      one scale.
    columns: the same for columns.
    size: the number of elements in the array.
    steps: distances between neighbouring classes.

  Returns:
    For each distance, the estimated cost in bits, and the scales.
  """
  found = []
  for of_rows, of_columns in zip(
    _classes(rows, steps), _classes(columns, steps), strict=True
  ):
    scales = contexts.Scales(
      of_rows.base + of_columns.base, of_rows.scales, of_columns.scales
    )
    error = of_rows.error * of_columns.error / math.log(4)
    bits = size * (of_rows.mean_log + of_columns.mean_log + error)
    bits += of_rows.entropy + of_columns.entropy
    used = np.convolve(*(np.bincount(x) > 0 for x in scales[1:]))
    bits += 8 * contexts.TABLE_BYTES * np.count_nonzero(used)
    found.append((bits, scales))
  return found


class _Classes(NamedTuple):
  """The scales of the lines along one axis, rounded to classes.

  Attributes:
    base: the least class.
    scales: uint8, the class of each line above it.
    mean_log: mean log2 of the classes' scales.
    error: mean of the squares divided by the squared scales.
    entropy: bits of the scales.
  """

  base: int
  scales: np.ndarray
  mean_log: float
  error: float
  entropy: float


def _classes(squares: np.ndarray, steps: Sequence[int]) -> list[_Classes]:
  """Rounds the mean squares of lines, or factors of them, for each distance of classes.

  A line of zeros has the least class.
  """
  present = squares > 0
  if not present.any():
    return [_Classes(_ZERO, np.zeros(1, np.uint8), 0.0, 1.0, 0.0)] * len(steps)
  least = squares.min(where=present, initial=np.inf)
  exact = contexts.STEPS / 2 * np.log2(np.maximum(squares, least))
  found = []
  for step in steps:
    classes = np.rint(exact / step).astype(np.int64) * step
    top = int(np.max(classes))
    classes = np.maximum(classes, top - _RANGE)
    base = int(np.min(classes))
    scales = (classes - base).astype(np.uint8)
    entropy = tables.entropy_bits(np.bincount(scales))
    if not scales.any():
      scales = scales[:1]
    error = float(np.exp2((exact - classes) / (contexts.STEPS / 2)).mean())
    mean_log = float(classes.mean()) / contexts.STEPS
    found.append(_Classes(base, scales, mean_log, error, entropy))
  return found

"""The choice of the scales of the rows and columns of arrays, see `contexts`.

The factors of rows and columns whose products model the squares of elements are close
to the maximum-likelihood factors. The factor of a row is the mean of its squares, each
divided by the factor of its column; and vice versa. Some rows give the first factors of
columns. Only the size of a file depends on the choice.

Shape letters: R rows, C columns.
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import buffers
from rotbits_jax.coding import contexts
from rotbits_jax.coding import layouts
from rotbits_jax.coding import line_sums
from rotbits_jax.coding import pool

_ROWS = 1 << 7  # of a matrix that tell the weights of its columns
_STEPS = (512, 1), (128, 2), (0, 4)  # elements of a line, and a distance of classes
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
  exponents = [_exponent_of(matrix) for matrix in matrices]
  weights = pool.each(_weights, matrices, exponents)
  jobs = [
    [
      functools.partial(_sums, matrix[rows], of_columns, exponent)
      for rows in line_sums.row_parts(matrix.shape)
    ]
    for matrix, of_columns, exponent in zip(matrices, weights, exponents, strict=True)
  ]
  sums = map(line_sums.joined, pool.run_lists(jobs))
  return pool.each(_chosen, sums, exponents)


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
  """Rounds the scales of the rows and columns of an array to classes."""
  count, width = sums.rows.size, sums.weighted.size
  # Short lines tell their scales less exactly, and each class costs a table.
  step = next(step for least, step in _STEPS if min(count, width) >= least)
  rows, row_base = _classes(4.0**exponent * sums.rows, step)
  present = max(np.count_nonzero(sums.rows), 1)
  columns, column_base = _classes(sums.weighted / present, step)
  return contexts.Scales(row_base + column_base, rows, columns)


def _classes(squares: np.ndarray, step: int) -> tuple[np.ndarray, int]:
  """Rounds mean squares of lines, or factors of them, to classes."""
  present = squares > 0
  if not present.any():
    return np.zeros(1, np.uint8), _ZERO
  least = squares.min(where=present, initial=np.inf)
  logs = contexts.STEPS / 2 * np.log2(np.maximum(squares, least))
  classes = np.rint(logs / step).astype(np.int64) * step
  classes = np.maximum(classes, np.max(classes) - _RANGE)
  base = int(np.min(classes))
  scales = (classes - base).astype(np.uint8)
  return scales if scales.any() else scales[:1], base

r"""Rotations of the residual stream: the same function in other coordinates.

The residual stream of a sliced model is

    x_0 = embed[tokens],   x_{s+1} = x_s M_s + sublayer_s(RMSN(x_s)),   s = 0 .. S-1

x_s is segment s of the residual stream, and M_s is the shortcut past sublayer s. In a
dense model, M_s is the identity and is not stored.

The map x_s -> x_s R_s with orthogonal R_s changes no output if a kernel that writes
segment s is multiplied by R_s from the right, a kernel that reads it by R_s^T from the
left, and a shortcut becomes R_s^T M_s R_{s+1}. `models.layout` says which axis of a
parameter belongs to which segment.

**Polar gauge.** Let M_s = [P_s 0] O_s, with P_s symmetric and positive semidefinite,
and O_s orthogonal. With R_{s+1} = O_s^T diag(R_s, Z), every shortcut becomes symmetric.
Z rotates the dimensions by which segment s + 1 is wider. R_0 and Z are free. Shortcuts
are I - B B^T with few columns in B, see `docs/mathematics.md`. Singular values above 1
add C C^T.

In this file d is the width of a segment, and e >= d is the width of the next segment.
Rotations include reflections. They are float32, and orthogonal up to its rounding.

Reference: SliceGPT, arXiv 2401.15024, section 3.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured
from rotbits_jax.symmetries import canonical
from rotbits_jax.symmetries import products

_matmul = products.matmul

_LEAST = 2.0**-9  # share of a column outside the span of those before it
_GRAIN = 8  # columns of B and C

TOLERANCE = 0.8
"""How far singular values that count as 1 are from 1, in roundoffs, by default."""


def rotate(
  array: Any,  # [n, m] or [m]
  rows: jax.Array | None = None,  # [n, n]
  columns: jax.Array | None = None,  # [m, m]
) -> Any:
  """Rotates one array: returns `rows^T @ array @ columns` in the array's dtype.

  The product is computed in float32.

  >>> quarter = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
  >>> rotate(jnp.array([1.0, 2.0]), columns=quarter).tolist()
  [-2.0, 1.0]
  """
  product = array.astype(jnp.float32)
  if rows is not None:
    chex.assert_shape(rows, (array.shape[0], array.shape[0]))
    product = _matmul(rows.T, product)
  if columns is not None:
    chex.assert_shape(columns, (array.shape[-1], array.shape[-1]))
    product = _matmul(product, columns)
  return product.astype(array.dtype)


def sides(axes: tuple[Any, ...]) -> tuple[int | None, int | None]:
  """Returns the segments that a parameter reads and writes, from its axes; or None."""
  segment = lambda axis: axis if isinstance(axis, int) else None
  return (segment(axes[-2]) if len(axes) > 1 else None), segment(axes[-1])


def largest_rotated(
  array: np.ndarray, axes: tuple[int, ...], only_finite: bool = False
) -> float:
  """Returns a bound of the magnitudes that rotations of some axes can make.

  Rotations keep the norms of what they mix. The bound is NaN or infinite if an element
  is not finite, unless only finite ones count. It is computed on the host.
  """
  # Without their sign, bits are in order, and NumPy is slow in half precision.
  unsigned = f'u{array.itemsize}'
  bits = array.view(unsigned) << 1
  if only_finite:
    infinite = np.array(np.inf, array.dtype).view(unsigned) << 1
    bits = np.where(bits < infinite, bits, 0)
  greatest = (np.max(bits, initial=0) >> 1).view(array.dtype)
  return float(greatest) * math.sqrt(math.prod(array.shape[axis] for axis in axes))


# ---- the rotations -----------------------------------------------------------------


def next_rotation(
  step: jax.Array,  # O_s, [e, e]
  rotation: jax.Array,  # R_s, [d, d]
  free: jax.Array | None = None,  # Z, [e - d, e - d]; None for the identity
) -> jax.Array:
  """Returns R_{s+1} = O_s^T diag(R_s, Z), `[e, e]`."""
  chex.assert_rank([step, rotation], 2)
  if len(step) > len(rotation):
    if free is None:
      free = jnp.eye(len(step) - len(rotation), dtype=jnp.float32)
    rotation = jax.scipy.linalg.block_diag(rotation, free)
  return canonical.reorthogonalize(_matmul(step.T, rotation))


def running_rotations(
  steps: jax.Array,  # O_0, ..., O_{N-1}, [N, d, d]
  first: jax.Array,  # R_0, [d, d]
) -> jax.Array:
  """Returns R_{s+1} = O_s^T ... O_0^T R_0, `[N, d, d]`, by an associative scan."""
  chex.assert_rank(steps, 3)
  multiply = jax.vmap(lambda earlier, later: _matmul(later, earlier))
  products = jax.lax.associative_scan(multiply, jnp.matrix_transpose(steps))
  finish = lambda product: canonical.reorthogonalize(_matmul(product, first))
  return jax.vmap(finish)(products)


def upper_rotation(matrix: jax.Array) -> jax.Array:
  """Returns the rotation G with `G^T @ matrix` upper trapezoidal, diagonal >= 0."""
  return canonical.reorthogonalize(canonical.qr(matrix)[1])


class UpperForm(NamedTuple):
  """A rotation that makes the pivot columns of a matrix upper triangular."""

  rotation: jax.Array  # G, [d, d]
  pivots: Any  # uint8 [V], 1 for at most d columns; None for the first ones


def upper_form(matrix: jax.Array) -> UpperForm:
  """Chooses pivots of a matrix `[d, V]`, and their `upper_rotation`.

  The pivots are the first columns that are not nearly in the span of those before them,
  so they determine G, and a rotated matrix has the same ones. If the matrix has a lower
  rank than d, they are fewer, and the last rows of `G^T @ matrix` are zero.

  >>> upper_form(jnp.array([[0.0, 0.0, 1.0], [2.0, 4.0, 3.0]])).pivots.tolist()
  [1, 0, 1]
  """
  count, block = len(matrix), matrix[:, : len(matrix)]
  rotation = upper_rotation(block)
  diagonal = jnp.sum(rotation[:, : block.shape[1]] * block, axis=0)
  is_regular = (diagonal > _LEAST * jnp.linalg.norm(block, axis=0)).all()

  def with_pivots() -> UpperForm:
    pivots = _independent(matrix)
    columns = structured.TrapezoidalRows.order(pivots)[:count]
    return UpperForm(upper_rotation(matrix[:, columns]), pivots)

  is_leading = jnp.arange(matrix.shape[1]) < count
  leading = UpperForm(rotation, is_leading.astype(jnp.uint8))
  return jax.lax.cond(is_regular, lambda: leading, with_pivots)


_Search = tuple[jax.Array, jax.Array, jax.Array]  # a column, the basis, the pivots


def _independent(matrix: jax.Array) -> jax.Array:
  """Returns 1 for columns that are not nearly combinations of earlier ones, uint8."""
  rows, columns = matrix.shape

  def add(state: _Search) -> _Search:
    j, basis, pivots = state
    off = matrix[:, j] - _matmul(_matmul(matrix[:, j], basis.T), basis)
    size = jnp.linalg.norm(off)
    is_new = size > _LEAST * jnp.linalg.norm(matrix[:, j])
    vector = jnp.where(is_new, off / size, 0)
    basis = basis.at[pivots.sum(dtype=jnp.int32)].set(vector)
    return j + 1, basis, pivots.at[j].set(is_new.astype(jnp.uint8))

  is_left = lambda state: (state[0] < columns) & (state[2].sum(dtype=jnp.int32) < rows)
  nothing = jnp.zeros((rows, rows), jnp.float32), jnp.zeros(columns, jnp.uint8)
  return jax.lax.while_loop(is_left, add, (jnp.int32(0), *nothing))[2]


# ---- the canonical parameters ------------------------------------------------------


def upper_rows(kernel: jax.Array, form: UpperForm) -> structured.TrapezoidalRows:
  """Returns a kernel whose last rows, which a form rotated, get exact zeros."""
  leaf = structured.TrapezoidalRows.of(kernel, len(form.rotation), form.pivots)
  return dataclasses.replace(leaf, lower=jnp.tril(leaf.lower))


def ranks(values: jax.Array, tolerance: float) -> jax.Array:
  """Returns how many singular values below and above 1 do not count as 1, int32 `[2]`.

  They are those that differ from 1 by more than the tolerance, and others to make a
  multiple of 8, because a rounding error of a value at the tolerance then rarely
  matters. A difference below a quarter of the tolerance never does.
  """
  off = jnp.stack([1 - values, values - 1])
  count, most = (jnp.sum(off > least, axis=1) for least in (tolerance, tolerance / 4))
  return jnp.minimum(-(-count // _GRAIN) * _GRAIN, most)


def shortcut(
  rotation: jax.Array,  # R, [d, d]
  polar: canonical.Polar,
  *,
  tolerance: float,
  columns: tuple[int, int],
) -> structured.IdentityMinusGram:
  """Returns a shortcut between rotated segments: R^T P R = I - B B^T + C C^T.

  `ranks` tells which singular values count as 1. With more values below 1 (above 1)
  than B (C) has columns, those closest to 1 count as 1. B and C are lower trapezoidal;
  columns that are not needed are zero and come last.
  """
  chex.assert_equal_shape([rotation, polar.u])
  # The values descend: those above 1 are the first, those below 1 are the last.
  excess, (below, above) = polar.values - 1, ranks(polar.values, tolerance)

  def factor(vectors: jax.Array, sizes: jax.Array, rank: Any, count: int) -> jax.Array:
    weights = jnp.where(jnp.arange(count) < rank, sizes[:count], 0)
    square_root = _matmul(rotation.T, vectors[:, :count] * jnp.sqrt(weights))
    # Any rotation of the columns keeps B B^T, and this one makes B lower trapezoidal.
    return jnp.tril(canonical.qr(square_root.T)[0].T)

  b = factor(polar.u[:, ::-1], -excess[::-1], below, columns[0])
  c = factor(polar.u, excess, above, columns[1])
  return structured.IdentityMinusGram(b, c, columns=len(polar.rotation))

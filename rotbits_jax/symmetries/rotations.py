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

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured
from rotbits_jax.symmetries import factorizations
from rotbits_jax.symmetries import products

_matmul = products.matmul

_LEAST = 2.0**-9  # share of a column outside the span of those before it
_GRAIN = 8  # columns of B and C

TOLERANCE = 0.8
"""How far singular values that count as 1 are from 1, in roundoffs, by default."""


def rotate(
  array: Any, rows: jax.Array | None = None, columns: jax.Array | None = None
) -> Any:
  """Rotates one array: returns `rows^T @ array @ columns`.

  >>> quarter = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
  >>> rotate(jnp.array([1.0, 2.0]), columns=quarter).tolist()
  [-2.0, 1.0]

  Args:
    array: `[n, m]` or `[m]`, of any floating-point dtype.
    rows: the rotation of what it reads, float32 `[n, n]`; None for the identity.
    columns: the rotation of what it writes, float32 `[m, m]`; None for the identity.

  Returns:
    The product, computed in float32, in the dtype of the array.

  Raises:
    ValueError: if a rotation has another shape.
  """
  product = array.astype(jnp.float32)
  if rows is not None:
    _check_rotation(rows, array.shape[0])
    product = _matmul(rows.T, product)
  if columns is not None:
    _check_rotation(columns, array.shape[-1])
    product = _matmul(product, columns)
  return product.astype(array.dtype)


def _check_rotation(rotation: jax.Array, size: int) -> None:
  """Raises a ValueError if a rotation has not this number of dimensions."""
  if rotation.shape != (size, size):
    raise ValueError(f'a rotation must be {[size, size]}, got {rotation.shape=}')


def sides(axes: tuple[Any, ...]) -> tuple[int | None, int | None]:
  """Returns the segments that a parameter reads and writes, from its axes; or None."""
  read, written = (None, *axes)[-2:]
  return (
    read if isinstance(read, int) else None,
    written if isinstance(written, int) else None,
  )


def largest_rotated(
  array: np.ndarray, axes: tuple[int, ...], only_finite: bool = False
) -> float:
  """Returns a bound of the magnitudes that rotations of some axes can make.

  Rotations keep the norms of what they mix. So the bound is the greatest magnitude
  times the square root of the number of elements that are mixed. It is computed on the
  host.

  Args:
    array: floats of 16 or 32 bits.
    axes: the axes that are rotated.
    only_finite: whether only finite elements count.

  Returns:
    The bound; NaN or infinite if an element that counts is not finite.
  """
  # Without their sign, bits are in order, and NumPy is slow in half precision.
  unsigned = f'u{array.itemsize}'
  bits = array.view(unsigned) << 1
  if only_finite:
    infinite = np.array(np.inf, array.dtype).view(unsigned) << 1
    bits = np.where(bits < infinite, bits, 0)
  greatest = (np.max(bits, initial=0) >> 1).view(array.dtype)
  mixed = math.prod(array.shape[axis] for axis in axes)
  return float(greatest) * math.sqrt(mixed)


# ---- the rotations -----------------------------------------------------------------


def next_rotation(
  step: jax.Array, rotation: jax.Array, free: jax.Array | None = None
) -> jax.Array:
  """Returns the rotation of the next segment, R_{s+1} = O_s^T diag(R_s, Z).

  Args:
    step: O_s, float32 `[e, e]`.
    rotation: R_s, float32 `[d, d]`, d <= e.
    free: Z, float32 `[e - d, e - d]`; None for the identity.

  Returns:
    R_{s+1}, float32 `[e, e]`.

  Raises:
    ValueError: if a rotation has another shape.
  """
  _check_rotation(step, len(step))
  _check_rotation(rotation, len(rotation))
  new = len(step) - len(rotation)
  if new < 0:
    raise ValueError(f'segments may not get narrower, got {step.shape=}')
  if new:
    if free is None:
      free = jnp.eye(new, dtype=jnp.float32)
    _check_rotation(free, new)
    rotation = jax.scipy.linalg.block_diag(rotation, free)
  return factorizations.reorthogonalize(_matmul(step.T, rotation))


def running_rotations(steps: jax.Array, first: jax.Array) -> jax.Array:
  """Returns R_{s+1} = O_s^T ... O_0^T R_0, `[N, d, d]`, by an associative scan.

  `steps` are O_0, ..., O_{N-1}, float32 `[N, d, d]`, and `first` is R_0, `[d, d]`.
  """
  if steps.ndim != 3:
    raise ValueError(f'steps must be [N, d, d], got {steps.shape=}')
  _check_rotation(first, steps.shape[-1])

  def multiply(earlier: jax.Array, later: jax.Array) -> jax.Array:
    return _matmul(later, earlier)

  def finish(product: jax.Array) -> jax.Array:
    return factorizations.reorthogonalize(_matmul(product, first))

  transposed = jnp.matrix_transpose(steps)
  return jax.vmap(finish)(jax.lax.associative_scan(jax.vmap(multiply), transposed))


def upper_rotation(matrix: jax.Array) -> jax.Array:
  """Returns the rotation G with `G^T @ matrix` upper trapezoidal, diagonal >= 0."""
  return factorizations.reorthogonalize(factorizations.qr(matrix)[1])


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

  # Made like the matrix, the pivots vary over the same axes of `jax.shard_map`.
  is_leading = jnp.arange(matrix.shape[1]) < count
  none = jnp.zeros_like(matrix[0], jnp.uint8)
  leading = UpperForm(rotation, none + is_leading.astype(jnp.uint8))
  return jax.lax.cond(is_regular, lambda: leading, with_pivots)


class _Search(NamedTuple):
  """The state of `_independent`."""

  column: jax.Array  # the next one, int32 []
  basis: jax.Array  # orthonormal rows that span the pivots so far, float32 [d, d]
  pivots: jax.Array  # uint8 [V]


def _independent(matrix: jax.Array) -> jax.Array:
  """Returns 1 for columns that are not nearly combinations of earlier ones, uint8."""
  rows, columns = matrix.shape

  def count(search: _Search) -> jax.Array:
    return search.pivots.sum(dtype=jnp.int32)

  def is_left(search: _Search) -> jax.Array:
    return (search.column < columns) & (count(search) < rows)

  def add(search: _Search) -> _Search:
    j, basis, pivots = search
    off = matrix[:, j] - _matmul(_matmul(matrix[:, j], basis.T), basis)
    size = jnp.linalg.norm(off)
    is_new = size > _LEAST * jnp.linalg.norm(matrix[:, j])
    vector = jnp.where(is_new, off / size, 0)
    return _Search(
      j + 1,
      basis.at[count(search)].set(vector),
      pivots.at[j].set(is_new.astype(jnp.uint8)),
    )

  # Made like the matrix, they vary over the same axes of `jax.shard_map`.
  start = _Search(
    jnp.int32(0),
    jnp.zeros_like(matrix, shape=(rows, rows)),
    jnp.zeros_like(matrix, jnp.uint8, shape=columns),
  )
  return jax.lax.while_loop(is_left, add, start).pivots


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
  count = jnp.sum(off > tolerance, axis=1)
  most = jnp.sum(off > tolerance / 4, axis=1)
  return jnp.minimum(-(-count // _GRAIN) * _GRAIN, most)


def shortcut(
  rotation: jax.Array,
  polar: factorizations.Polar,
  *,
  tolerance: float,
  columns: tuple[int, int],
) -> structured.IdentityMinusGram:
  """Returns a shortcut between rotated segments: R^T P R = I - B B^T + C C^T.

  With P = U diag(s) U^T, B is R^T U diag(1 - s)^(1/2) for the s below 1, and C is
  R^T U diag(s - 1)^(1/2) for the s above 1. Both are rotated from the right so that
  they are lower trapezoidal. There are no gradients through a shortcut, see
  `canonicalize`.

  Args:
    rotation: R, float32 `[d, d]`.
    polar: the decomposition of the shortcut.
    tolerance: how far values that count as 1 may be from 1, see `ranks`.
    columns: those of B and C. If more values are below 1 (above 1), those closest to 1
      count as 1. Columns that are not needed are zero and come last.

  Returns:
    The shortcut, `[d, e]`.

  Raises:
    ValueError: if the rotation has another shape than U, or is differentiated.
  """
  _check_rotation(rotation, len(polar.u))
  polar = _without_gradient(polar)
  # The values descend: those above 1 are the first, those below 1 are the last.
  excess = polar.values - 1
  below, above = ranks(polar.values, tolerance)
  b = _lower_root(rotation, polar.u[:, ::-1], -excess[::-1], below, columns[0])
  c = _lower_root(rotation, polar.u, excess, above, columns[1])
  return structured.IdentityMinusGram(b, c, columns=len(polar.rotation))


def _lower_root(
  rotation: jax.Array, vectors: jax.Array, sizes: jax.Array, rank: jax.Array, count: int
) -> jax.Array:
  """Returns a lower trapezoidal B, `[d, count]`, of `rank` columns that are not zero.

  B B^T = R^T V diag(sizes) V^T R
  """
  weights = jnp.where(jnp.arange(count) < rank, sizes[:count], 0)
  root = _matmul(rotation.T, vectors[:, :count] * jnp.sqrt(weights))
  # Any rotation of the columns keeps B B^T, and this one makes B lower trapezoidal.
  return jnp.tril(factorizations.qr(root.T)[0].T)


@jax.custom_jvp
def _without_gradient(polar: factorizations.Polar) -> factorizations.Polar:
  """Returns a decomposition; refuses to differentiate it, which would give NaN."""
  return polar


@_without_gradient.defjvp
def _refuse_gradient(primals: Any, tangents: Any) -> Any:
  raise ValueError(
    'there are no gradients through the shortcuts of a sliced model: singular values '
    'of 1 repeat, so their vectors have no derivatives; differentiate the model before '
    'canonicalize'
  )

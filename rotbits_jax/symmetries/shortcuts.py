"""Shortcuts between rotated segments of the residual stream.

A shortcut is the matrix `[d, e]` of a sliced model that takes the residual stream from
a segment of width d to the next segment, of width e. In the polar gauge (`rotations`) a
shortcut with d <= e is [P 0] with a symmetric P = R^T U diag(values) U^T R. R is the
rotation of the first segment; U and the values are those of `canonical.Polar`.

In SliceGPT's models a shortcut is a block of an orthogonal matrix. Therefore most of
its singular values are 1, and P = I - B B^T, where B has few columns. Values above 1
add C C^T.
"""

import chex
import jax
import jax.numpy as jnp

from rotbits_jax.symmetries import canonical
from rotbits_jax.symmetries import products
from rotbits_jax.symmetries import rotations

_matmul = products.matmul


def factors(
  rotation: jax.Array,
  polar: canonical.Polar,
  *,
  tolerance: float,
  columns: tuple[int, int],
) -> tuple[jax.Array, jax.Array]:
  """Returns B and C with R^T P R = I - B B^T + C C^T.

  Args:
    rotation: R, float32 `[d, d]`.
    polar: the polar decomposition of the shortcut.
    tolerance: a value counts as 1 if it differs from 1 by at most this.
    columns: the number of columns of B and of C. If there are more values below 1 than
      B has columns, the values closest to 1 count as 1; so do those above 1 for C.

  Returns:
    B and C, float32 `[d, k]`, lower trapezoidal. Columns that are not needed are zero
    and come last.
  """
  chex.assert_equal_shape([rotation, polar.u])
  # The values descend: those above 1 are the first, those below 1 are the last.
  excess = polar.values - 1

  def factor(vectors: jax.Array, sizes: jax.Array, count: int) -> jax.Array:
    weights = jnp.where(sizes[:count] > tolerance, sizes[:count], 0)
    rotated = _matmul(rotation.T, vectors[:, :count] * jnp.sqrt(weights))
    return rotations.lower(rotated)

  below = factor(polar.u[:, ::-1], -excess[::-1], columns[0])
  return below, factor(polar.u, excess, columns[1])


def narrowing_rotation(rotation: jax.Array, shortcut: jax.Array) -> jax.Array:
  """Returns the R_{s+1} that makes R_s^T M_s R_{s+1} lower trapezoidal, for d > e.

  Args:
    rotation: R_s, float32 `[d, d]`.
    shortcut: M_s, `[d, e]`.

  Returns:
    R_{s+1}, float32 `[e, e]`.
  """
  chex.assert_shape(shortcut, (len(rotation), None))
  rotated = _matmul(rotation.T, shortcut.astype(jnp.float32))
  return jnp.linalg.qr(rotated.T, mode='complete')[0]

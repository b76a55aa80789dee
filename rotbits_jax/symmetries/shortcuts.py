"""The leaves for shortcuts, once the segments on both sides are rotated.

A shortcut is the matrix `[d, e]` of a sliced model that takes the residual stream from
a segment of width d to the next segment, of width e. `residual` chooses the coordinates
of the segments so that a shortcut with d <= e becomes [P 0] with a symmetric
P = R^T U diag(values) U^T R. R is the rotation of the first segment; U and the values
are from the polar decomposition of the shortcut, see `canonical.Polar`.

A shortcut is stored in one of three forms:

    I - B B^T + C C^T    for d <= e, if few values of P differ from 1
    lower triangle       for any symmetric P
    trapezoid            for d > e: the factor L of an LQ factorisation

The first form is used if it stores fewer numbers than the second and is accurate
enough.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured
from rotbits_jax.symmetries import canonical
from rotbits_jax.symmetries import products
from rotbits_jax.symmetries import rotations as rotations_lib

_matmul = products.matmul

# The low-rank form is accurate enough if its relative error is at most this multiple of
# the roundoff. Rounding a dense matrix makes an error of 0.4, and SliceGPT's own
# shortcuts have 0.6 in this form.
_ERROR_BOUND = 2.0


def lower_factor(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the LQ factors of a matrix `[d, e]`.

  They are L `[d, e]`, lower trapezoidal, and Q `[e, e]`, orthogonal; both float32.
  """
  q, r = jnp.linalg.qr(matrix.T.astype(jnp.float32), mode='complete')
  return r.T, q.T


def gram_factor(rotation: jax.Array, u: jax.Array, weights: jax.Array) -> jax.Array:
  """Returns the lower trapezoidal B with B B^T = R^T U diag(weights) U^T R.

  Args:
    rotation: R, float32 `[d, d]`.
    u: U, float32 `[d, k]`, with orthonormal columns.
    weights: float32 `[k]`, not negative; 0 for a column that is padding.

  Returns:
    B, float32 `[d, k]`.
  """
  return rotations_lib.lower(_matmul(rotation.T, u * jnp.sqrt(weights)))


class Form(NamedTuple):
  """The arrays of a leaf, and the error that their rounding makes.

  Attributes:
    arrays: the arrays, float32 and not rounded.
    error: relative error of the shortcut in the Frobenius norm, if the arrays are
      rounded.
  """

  arrays: tuple[jax.Array, ...]
  error: jax.Array


def gram_form(
  rotation: jax.Array,
  polar: canonical.Polar,
  less: jax.Array,
  more: jax.Array,
  *,
  k: int,
  j: int,
  dtype: Any,
) -> Form:
  """Brings P to the form I - B B^T + C C^T.

  The values descend, so the values above 1 are the first and the values below 1 are the
  last. Columns of B from `less` on, and columns of C from `more` on, are zero: they are
  padding.

  Args:
    rotation: R, float32 `[d, d]`.
    polar: the polar decomposition of the shortcut.
    less: [] how many values are below 1.
    more: [] how many values are above 1.
    k: number of columns of B, at least `less`.
    j: number of columns of C, at least `more`.
    dtype: the dtype to which the arrays will be rounded.

  Returns:
    B `[d, k]` and C `[d, j]`, float32, with their error.
  """
  u, values, _ = polar
  first, last = values[:j] - 1, 1 - values[values.size - k :]
  weights = jnp.where(jnp.arange(k) >= k - less, last, 0)
  b = gram_factor(rotation, u[:, u.shape[1] - k :], weights)
  c = gram_factor(rotation, u[:, :j], jnp.where(jnp.arange(j) < more, first, 0))
  # The values that count as 1 belong to directions that are orthogonal to the columns
  # of B and C. Therefore the squares of the errors add up.
  place = jnp.arange(values.size)
  left_out = (place >= more) & (place < values.size - less)
  square = jnp.sum(jnp.where(left_out, jnp.square(values - 1), 0))
  for x in (b, c):
    square += _square_of_rounding(x, x.astype(dtype).astype(jnp.float32))
  norm = jnp.maximum(jnp.linalg.norm(values), _TINY)
  return Form((b, c), jnp.sqrt(square) / norm)


def _square_of_rounding(b: jax.Array, rounded: jax.Array) -> jax.Array:
  """Returns the square of the Frobenius norm of B B^T - B' B'^T, for B' near B.

  The difference is E B^T + B' E^T with E = B - B'. Its square is a sum of products of
  k x k matrices, without the cancellation that the large terms would have.
  `heads.product_error` does this for pairs of factors. Here the products must not
  depend on the number of threads, because the error decides the form of a shortcut.
  """
  off = b - rounded
  gram = lambda x, y: _matmul(x.T, y)
  inner = jnp.sum(gram(off, off) * (gram(b, b) + gram(rounded, rounded)))
  return jnp.maximum(inner + 2 * jnp.sum(gram(off, rounded) * gram(b, off)), 0)


def triangle_form(rotation: jax.Array, polar: canonical.Polar, *, dtype: Any) -> Form:
  """Returns the lower triangle of P, float32 `[d, d]`, with its error."""
  lower = jnp.tril(_symmetric(rotation, polar))
  lower32 = lower.astype(dtype).astype(jnp.float32)
  leaf = structured.SymmetricTriangle(lower32, columns=lower.shape[0])
  return Form((lower,), _error(leaf, rotation, polar))


def _symmetric(rotation: jax.Array, polar: canonical.Polar) -> jax.Array:
  turned = _matmul(rotation.T, polar.u)
  return _matmul(turned * polar.values, turned.T)


def _error(leaf: Any, rotation: jax.Array, polar: canonical.Polar) -> jax.Array:
  symmetric = _symmetric(rotation, polar)
  norm = jnp.maximum(jnp.linalg.norm(symmetric), _TINY)
  return jnp.linalg.norm(leaf.materialize() - symmetric) / norm


class Shortcut(NamedTuple):
  """A shortcut as it is stored.

  Attributes:
    leaf: the leaf, float32.
    error: relative error of the rounded leaf in the Frobenius norm.
    rank: number of columns of B and C together; the full rank for the other forms.
  """

  leaf: Any
  error: Any
  rank: int


def symmetric(
  rotation: jax.Array,
  polar: canonical.Polar,
  width: int,
  *,
  tolerance: float,
  unit: float,
  dtype: Any,
) -> Shortcut:
  """Makes the leaf of a shortcut with d <= e, in the smallest accurate form.

  Args:
    rotation: R, the rotation of the segment that the shortcut reads, float32 `[d, d]`.
    polar: the polar decomposition of the shortcut.
    width: e.
    tolerance: a value counts as 1 if it differs from 1 by at most this multiple of
      `unit`.
    unit: roundoff of `dtype`.
    dtype: the dtype to which the leaf will be rounded.

  Returns:
    The shortcut.
  """
  values = np.asarray(polar.values)
  less = int(np.sum(values < 1 - tolerance * unit))
  more = int(np.sum(values > 1 + tolerance * unit))
  d, size = values.size, structured.lower_size
  if size((d, less)) + size((d, more)) < size((d, d)):
    grams = _gram_form(
      rotation, polar, less, more, k=_padded(less, d), j=_padded(more, d), dtype=dtype
    )
    if float(grams.error) <= _ERROR_BOUND * unit:
      b, c = grams.arrays
      leaf = structured.IdentityMinusGram(b[:, :less], c[:, :more], columns=width)
      return Shortcut(leaf, grams.error, less + more)
  whole = _triangle_form(rotation, polar, dtype=dtype)
  (lower,) = whole.arrays
  triangle = structured.SymmetricTriangle(lower, columns=width)
  return Shortcut(triangle, whole.error, d)


def trapezoid(lower: jax.Array, *, dtype: Any) -> Shortcut:
  """Makes the leaf of a shortcut with d > e from its factor L, float32 `[d, e]`."""
  leaf, error = _rounded_lower(lower, dtype=dtype)
  return Shortcut(structured.Trapezoidal(leaf), error, min(lower.shape))


def _padded(rank: int, most: int) -> int:
  """Rounds a rank up, so that few different programs are compiled.

  Between a power of two and the next there are eight results; none exceeds `most`.
  """
  grain = 1 << max(rank.bit_length() - 4, 0)
  return min(-(-rank // grain) * grain, most)


@functools.partial(jax.jit, static_argnames='dtype')
def _rounded_lower(lower: jax.Array, *, dtype: Any) -> tuple[jax.Array, jax.Array]:
  rounded = jnp.tril(lower).astype(dtype).astype(jnp.float32)
  norm = jnp.maximum(jnp.linalg.norm(lower), _TINY)
  return jnp.tril(lower), jnp.linalg.norm(rounded - lower) / norm


_TINY = float(jnp.finfo(jnp.float32).tiny)
_gram_form = jax.jit(gram_form, static_argnames=('k', 'j', 'dtype'))
_triangle_form = jax.jit(triangle_form, static_argnames='dtype')

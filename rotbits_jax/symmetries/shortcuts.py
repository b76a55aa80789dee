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


def gram_factor(
  rotation: jax.Array,
  polar: canonical.Polar,
  first: jax.Array,
  stop: jax.Array,
  *,
  k: int,
  dtype: Any,
) -> tuple[jax.Array, jax.Array]:
  """Factors the part of P - I that some neighbouring values make.

  With D = diag(|values - 1|) of the values `first`, ..., `stop - 1`, and 0 for others,

    B B^T = R^T U D U^T R.

  Args:
    rotation: R, float32 `[d, d]`.
    polar: the polar decomposition of the shortcut.
    first: int32 `[]`, the first of the values.
    stop: int32 `[]`, the place after the last of them.
    k: number of columns of B, at least as many as there are values. Columns beyond are
      zero: they are padding.
    dtype: the dtype to which B will be rounded.

  Returns:
    B, float32 `[d, k]`, lower trapezoidal and not rounded; and the square of the
    Frobenius norm of the error that its rounding makes in B B^T, float32.
  """
  start = jnp.minimum(first, polar.values.size - k)
  place = start + jnp.arange(k)
  own = lambda x: jax.lax.dynamic_slice_in_dim(x, start, k, axis=-1)
  size = jnp.abs(own(polar.values) - 1)
  weights = jnp.where((place >= first) & (place < stop), size, 0)
  turned = _matmul(rotation.T, own(polar.u) * jnp.sqrt(weights))
  b = rotations_lib.lower(turned)
  return b, _square_of_rounding(b, b.astype(dtype).astype(jnp.float32))


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


def triangle(
  rotation: jax.Array, polar: canonical.Polar, *, dtype: Any
) -> tuple[jax.Array, jax.Array]:
  """Returns the lower triangle of P, float32 `[d, d]`, not rounded.

  Returns:
    The triangle, and the relative error of P in the Frobenius norm when the triangle is
    rounded to `dtype`.
  """
  turned = _matmul(rotation.T, polar.u)
  whole = _matmul(turned * polar.values, turned.T)
  lower = jnp.tril(whole)
  rounded = structured.SymmetricTriangle(
    lower.astype(dtype).astype(jnp.float32), columns=lower.shape[0]
  )
  norm = jnp.maximum(jnp.linalg.norm(whole), _TINY)
  return lower, jnp.linalg.norm(rounded.materialize() - whole) / norm


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
    # The values descend: those above 1 are the first, those below 1 are the last.
    (b, b_square), (c, c_square) = (
      _gram_factor(
        rotation, polar, first, stop, k=_padded(stop - first, d), dtype=dtype
      )
      for first, stop in ((d - less, d), (0, more))
    )
    # The values that count as 1 belong to directions that are orthogonal to the columns
    # of B and C. Therefore the squares of the errors add up.
    left_out = np.square(values[more : d - less] - np.float64(1)).sum()
    square = float(b_square) + float(c_square) + left_out
    error = np.sqrt(square) / max(np.linalg.norm(values), _TINY)
    if error <= _ERROR_BOUND * unit:
      leaf = structured.IdentityMinusGram(b[:, :less], c[:, :more], columns=width)
      return Shortcut(leaf, error, less + more)
  lower, error = _triangle(rotation, polar, dtype=dtype)
  return Shortcut(structured.SymmetricTriangle(lower, columns=width), error, d)


def trapezoid(lower: jax.Array, *, dtype: Any) -> Shortcut:
  """Makes the leaf of a shortcut with d > e from its factor L, float32 `[d, e]`."""
  leaf, error = _rounded_lower(lower, dtype=dtype)
  return Shortcut(structured.Trapezoidal(leaf), error, min(lower.shape))


def _padded(rank: int, most: int) -> int:
  """Rounds a rank up, so that few different programs are compiled.

  Between a power of two and the next there are four results, all multiples of 16; but
  none exceeds `most`.
  """
  grain = 1 << max(rank.bit_length() - 3, 4)
  return min(-(-rank // grain) * grain, most)


@functools.partial(jax.jit, static_argnames='dtype')
def _rounded_lower(lower: jax.Array, *, dtype: Any) -> tuple[jax.Array, jax.Array]:
  rounded = jnp.tril(lower).astype(dtype).astype(jnp.float32)
  norm = jnp.maximum(jnp.linalg.norm(lower), _TINY)
  return jnp.tril(lower), jnp.linalg.norm(rounded - lower) / norm


_TINY = float(jnp.finfo(jnp.float32).tiny)
_gram_factor = jax.jit(gram_factor, static_argnames=('k', 'dtype'))
_triangle = jax.jit(triangle, static_argnames='dtype')

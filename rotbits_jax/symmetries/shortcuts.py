"""What stands for a shortcut once its segments are rotated.

In the polar gauge a shortcut is [P 0] with P = R^T U diag(values) U^T R. There are
three forms, and the one that stores fewest numbers is taken if it is accurate enough:

    I - B B^T + C C^T    few values of P differ from 1
    lower triangle       P is symmetric
    trapezoid            a shortcut that narrows the stream: L of an LQ factorisation

Shape letters: d, e widths of the shortcut's two segments.
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

# The relative error, in roundoffs, up to which a low-rank form is accurate enough.
# Rounding a dense matrix costs 0.4; SliceGPT's own shortcuts in this form 0.6.
_ERROR_BOUND = 2.0


def lower_factor(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
  """LQ factors of `[d, e]`: L lower trapezoidal, and Q `[e, e]` orthogonal."""
  q, r = jnp.linalg.qr(matrix.T.astype(jnp.float32), mode='complete')
  return r.T, q.T


def gram_factor(rotation: jax.Array, u: jax.Array, weights: jax.Array) -> jax.Array:
  """A lower trapezoidal B with B B^T = R^T U diag(weights) U^T R.

  Args:
    rotation: float32 `[d, d]`, R.
    u: float32 `[d, k]`, orthonormal columns.
    weights: float32 `[k]`, not negative; 0 for a column that only pads.

  Returns:
    float32 `[d, k]`.
  """
  return rotations_lib.lower(_matmul(rotation.T, u * jnp.sqrt(weights)))


class Form(NamedTuple):
  """A leaf's arrays, and the relative error (Frobenius) that rounding them makes."""

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
  form: Any,
) -> Form:
  """R^T P R as I - B B^T + C C^T.

  Values descend, so those above 1 come first and those below come last. Of the k and j
  columns, the ones beyond `less` and `more` only pad and end as zeros.

  Args:
    rotation: float32 `[d, d]`, R.
    polar: of the shortcut.
    less: [] how many values are below 1.
    more: [] how many are above 1.
    k: at least `less`.
    j: at least `more`.
    form: the dtype that the arrays will be rounded to.

  Returns:
    B `[d, k]` and C `[d, j]`, float32.
  """
  u, values, _ = polar
  first, last = values[:j] - 1, 1 - values[values.size - k :]
  weights = jnp.where(jnp.arange(k) >= k - less, last, 0)
  b = gram_factor(rotation, u[:, u.shape[1] - k :], weights)
  c = gram_factor(rotation, u[:, :j], jnp.where(jnp.arange(j) < more, first, 0))
  b32, c32 = (x.astype(form).astype(jnp.float32) for x in (b, c))
  leaf = structured.IdentityMinusGram(b32, c32, columns=values.size)
  return Form((b, c), _error(leaf, rotation, polar))


def triangle_form(rotation: jax.Array, polar: canonical.Polar, *, form: Any) -> Form:
  """R^T P R as its lower triangle, float32 `[d, d]`."""
  lower = jnp.tril(_symmetric(rotation, polar))
  lower32 = lower.astype(form).astype(jnp.float32)
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
  """What stands for a shortcut, its relative error (Frobenius), and its rank."""

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
  form: Any,
) -> Shortcut:
  """The smallest form of a shortcut in the polar gauge that is accurate enough.

  Args:
    rotation: float32 `[d, d]`, R of the segment that it reads.
    polar: of the shortcut.
    width: e.
    tolerance: how far from 1 a value may be and still count as 1, in units of `unit`.
    unit: roundoff of the dtype that the leaf will be rounded to.
    form: that dtype.

  Returns:
    A leaf in float32.
  """
  values = np.asarray(polar.values)
  less = int(np.sum(values < 1 - tolerance * unit))
  more = int(np.sum(values > 1 + tolerance * unit))
  d, size = values.size, structured.lower_size
  if size((d, less)) + size((d, more)) < size((d, d)):
    grams = _gram_form(
      rotation, polar, less, more, k=_padded(less, d), j=_padded(more, d), form=form
    )
    if float(grams.error) <= _ERROR_BOUND * unit:
      b, c = grams.arrays
      leaf = structured.IdentityMinusGram(b[:, :less], c[:, :more], columns=width)
      return Shortcut(leaf, grams.error, less + more)
  whole = _triangle_form(rotation, polar, form=form)
  (lower,) = whole.arrays
  triangle = structured.SymmetricTriangle(lower, columns=width)
  return Shortcut(triangle, whole.error, d)


def trapezoid(lower: jax.Array, *, form: Any) -> Shortcut:
  """A shortcut that narrows the stream, as L of its LQ factors: float32 `[d, e]`."""
  leaf, error = _rounded_lower(lower, form=form)
  return Shortcut(structured.Trapezoidal(leaf), error, min(lower.shape))


def _padded(rank: int, most: int) -> int:
  """One of eight ranks an octave, so that few programs are compiled."""
  grain = 1 << max(rank.bit_length() - 4, 0)
  return min(-(-rank // grain) * grain, most)


@functools.partial(jax.jit, static_argnames='form')
def _rounded_lower(lower: jax.Array, *, form: Any) -> tuple[jax.Array, jax.Array]:
  rounded = jnp.tril(lower).astype(form).astype(jnp.float32)
  norm = jnp.maximum(jnp.linalg.norm(lower), _TINY)
  return jnp.tril(lower), jnp.linalg.norm(rounded - lower) / norm


_TINY = float(jnp.finfo(jnp.float32).tiny)
_gram_form = jax.jit(gram_form, static_argnames=('k', 'j', 'form'))
_triangle_form = jax.jit(triangle_form, static_argnames='form')

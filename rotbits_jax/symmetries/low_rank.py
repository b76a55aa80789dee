r"""The gauge of low-rank pairs: a change of basis between two factors.

Compression by a singular value decomposition stores a linear layer as two factors. The
basis between the factors is a gauge: a choice that does not change the product,

    x U V = x (U A)(A^-1 V)      for every invertible A `[r, r]`.

So r^2 of the r(m + n) numbers are redundant. If r = m / 2 = n / 2, this is a quarter.
To fix the gauge, one factor is replaced by a basis of its column space, see
`structured.ReducedLowRank`. The factor is this basis times a square matrix, and the
other factor is multiplied by this matrix.

PIFA stores equally few numbers: r rows of the product, and the other rows as
combinations of these. The combinations magnify rounding errors. For weights of a
language model with ranks of 96 to 216, the error of PIFA is 1.6 to 3.1 times the error
of rounding U and V, and it grows with the rank. Here the error is 1.03 to 1.14 times as
large. No matrix is inverted that can be singular, so the product may have a lower rank
than r.

Shape letters are those of `structured.low_rank`. Use `vmap` for several pairs.

References:
  Zhao, Zhang and Cannistraci, Pivoting Factorization (PIFA), ICML 2025, arXiv
  2501.19090, section 3: the redundant numbers of a pair.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import transform

_matmul = functools.partial(jnp.matmul, precision='highest')


def fix_pair(u: jax.Array, v: jax.Array) -> structured.ReducedLowRank:
  """Fixes the gauge of one pair.

  Args:
    u: `[m, r]`, r <= min(m, n).
    v: `[r, n]`.

  Returns:
    A leaf for `u @ v`, in float32.
  """
  u, v = u.astype(jnp.float32), v.astype(jnp.float32)
  transposed = u.shape[0] > v.shape[1]
  if transposed:
    u, v = v.T, u.T
  size, rank = u.shape
  # A `ReducedLowRank` has the known block in its last rows, `heads.basis` in its first.
  basis = heads.basis(jnp.roll(u, rank, axis=0))
  return structured.ReducedLowRank(
    basis.below, _matmul(basis.factor, v), size=size, transposed=transposed
  )


def fix_pairs(
  tree: models.Params,
  *,
  tolerance: float = 2.0,
  dtype: Any = None,
  prefix: str = '',
) -> tuple[models.Params, list[transform.Note]]:
  """Fixes the gauge of every pair in a PyTree.

  Args:
    tree: nested dicts of arrays and structured leaves, unstacked. Each
      `structured.LowRank` is reduced if that is smaller and accurate enough. Other
      leaves are not changed.
    tolerance: the factor by which the rounding error of the product may grow. A pair
      whose error grows more is not changed.
    dtype: the dtype to which the numbers will be rounded; None for their own dtype.
    prefix: prefix of the paths in notes.

  Returns:
    The tree in its old dtypes, and a note for each pair.
  """
  flat, notes = structured.flatten(tree), []
  for path, pair in flat.items():
    if not isinstance(pair, structured.LowRank) or pair.rank > min(pair.shape):
      continue
    fixed = _fix_jitted(pair.u, pair.v, tolerance, dtype=np.dtype(dtype or pair.dtype))
    accepted = bool(fixed.accepted)
    if accepted:
      flat[path] = fixed.leaf.astype(pair.dtype).replace(names=pair.names)
    if np.isfinite(float(fixed.plain_error)):
      error = float(fixed.error) if accepted else 0.0
      details = {'plain_error': transform.three_digits(fixed.plain_error)}
      note = transform.note(prefix + path, flat[path], error=error, rank=pair.rank)
      notes.append(note | details)
  return structured.unflatten(flat), notes


def remove_low_rank_gauge(*, tolerance: float = 2.0) -> transform.Transform:
  """Makes the transform that fixes the gauge of every low-rank pair of a model.

  Args:
    tolerance: see `fix_pairs`.

  Returns:
    A transform. Its notes give, for each pair, the form, the rank, the count of numbers
    and the relative rounding error of the product, in this form and as plain factors.
  """
  fix = functools.partial(fix_pairs, tolerance=tolerance)

  def layers(
    context: transform.Context, state: Any, first: int, given: transform.Layers
  ) -> tuple[Any, transform.Layers, list[list[transform.Note]]]:
    results = [
      fix(layer, dtype=context.dtype, prefix=models.names.prefix(i))
      for i, layer in enumerate(given, first)
    ]
    return state, [tree for tree, _ in results], [own for _, own in results]

  def outer(
    context: transform.Context, state: Any, given: models.Params
  ) -> tuple[models.Params, list[transform.Note]]:
    return fix(given, dtype=context.dtype)

  return transform.make('low-rank gauge', layers=layers, outer=outer)


class _Fixed(NamedTuple):
  """A reduced pair, and the error of rounding it.

  Attributes:
    leaf: the pair in float32.
    error: relative error that rounding the pair makes in the product, in the Frobenius
      norm.
    plain_error: the same error for the pair before its gauge was fixed.
    accepted: bool, whether `error` is small enough.
  """

  leaf: structured.ReducedLowRank
  error: jax.Array
  plain_error: jax.Array
  accepted: jax.Array


def _fix(u: jax.Array, v: jax.Array, tolerance: jax.Array, dtype: Any) -> _Fixed:
  u, v = u.astype(jnp.float32), v.astype(jnp.float32)
  product = _matmul(u, v)
  norm = jnp.maximum(jnp.linalg.norm(product), jnp.finfo(jnp.float32).tiny)

  def error(pair: structured.FactorPair) -> jax.Array:
    rounded = structured.astype(structured.astype(pair, dtype), jnp.float32)
    return jnp.linalg.norm(rounded.materialize() - product) / norm

  fixed = fix_pair(u, v)
  # The numbers of a checkpoint have no rounding error, because they are rounded
  # already. A multiple of them has the usual error.
  plain = structured.LowRank(u * _SQRT2, v / _SQRT2)
  fixed_error, plain_error = error(fixed), error(plain)
  bound = jnp.maximum(tolerance * plain_error, _FLOAT32_ERROR)
  accepted = jnp.isfinite(bound) & (fixed_error <= bound)
  return _Fixed(fixed, fixed_error, plain_error, accepted)


_SQRT2 = 2**0.5
_FLOAT32_ERROR = 2.0**-19  # float32 arithmetic cannot measure a smaller error


_fix_jitted = jax.jit(_fix, static_argnames='dtype')

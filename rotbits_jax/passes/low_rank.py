"""The gauge of low-rank pairs, see `symmetries.low_rank`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import heads as heads_lib
from rotbits_jax.passes import transform
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import low_rank

_FLOAT32_ERROR = 2.0**-19  # float32 arithmetic cannot measure a smaller error


def remove_low_rank_gauge(*, tolerance: float = 2.0) -> transform.Transform:
  """Makes the transform that fixes the gauge of every low-rank pair of a model.

  Args:
    tolerance: the factor by which the rounding error of the product may exceed that of
      the pair in random bases, see `symmetries.low_rank.spread`. A pair whose error
      exceeds it more is not changed.

  Returns:
    A transform. Its notes give, for each pair, the form, the rank, the count of weights
    and the relative rounding error of the product, in this form and as plain factors.
    Rows and columns of the product count alike in the error, whatever their size.
  """

  def fix(
    context: transform.Context, state: Any, index: int | None, params: transform.Params
  ) -> transform.Noted:
    prefix, notes = models.names.prefix(index), []
    for path, pair in params.copy().items():
      is_pair = isinstance(pair, structured.LowRank)
      if not is_pair or not 1 <= pair.rank <= min(pair.shape):
        continue
      leaf, *measured = _fix(pair, dtype=context.holder(prefix + path))
      errors, spread = jax.device_get(measured)
      most = max(tolerance * errors['plain_error'] / spread, _FLOAT32_ERROR)
      note = heads_lib.settle(
        params, path, {path: leaf}, errors, prefix=prefix, most=most
      )
      notes.append(note | {'rank': pair.rank})
    return params, notes

  return transform.Transform(
    'low-rank gauge',
    layer=fix,
    outer=lambda context, state, params: fix(context, state, None, params),
    takes='float32',
  )


@functools.partial(jax.jit, static_argnames='dtype')
def _fix(
  pair: structured.LowRank, *, dtype: np.dtype
) -> tuple[structured.ReducedLowRank, dict[str, jax.Array], jax.Array]:
  """Fixes the gauge of a pair; returns the errors of rounding, and the spread."""
  fixed = low_rank.fix_pair(pair.u, pair.v)
  even = fixed.without_lines()
  rounded = structured.astype(structured.astype(even, dtype), jnp.float32)
  factors = fixed.divided(*pair.factors()), even.factors(), rounded.factors()
  plain, exact, near = ((u[None], v.T[None]) for u, v in factors)
  (u, v), *_ = factors
  spread = jnp.maximum(low_rank.spread(u), low_rank.spread(v.T))
  plain_error = heads.rounding_error(plain, dtype)
  error = heads.relative_error(exact, near)
  return fixed, {'plain_error': plain_error, 'error': error}, spread

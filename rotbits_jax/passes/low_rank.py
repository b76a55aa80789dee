"""The gauge of low-rank pairs, see `symmetries.low_rank`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import heads as heads_lib
from rotbits_jax.passes.transform import Context
from rotbits_jax.passes.transform import Noted
from rotbits_jax.passes.transform import Params
from rotbits_jax.passes.transform import Transform
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import low_rank

_FLOAT32_ERROR = 2.0**-19  # float32 arithmetic cannot measure a smaller error


def remove_low_rank_gauge(*, tolerance: float = 2.0) -> Transform:
  """Makes the transform that fixes the gauge of every low-rank pair of a model.

  Its notes give the rank of each pair, and the relative rounding error of the product,
  in this form and as plain factors. Rows and columns of the product count alike in the
  error, whatever their size.

  Args:
    tolerance: the factor by which this error may exceed that of the pair in random
      bases, see `symmetries.low_rank.spread`. Other pairs are not changed.
  """

  def fix(context: Context, state: Any, index: int | None, params: Params) -> Noted:
    prefix, notes = models.names.prefix(index), []
    for path, pair in params.copy().items():
      if isinstance(pair, structured.LowRank) and 1 <= pair.rank <= min(pair.shape):
        leaf, errors, spread = _fix(pair, dtype=context.holder(prefix + path))
        note = heads_lib.settle(
          params,
          path,
          {path: leaf},
          errors,
          tolerance / float(spread),
          prefix=prefix,
          least=_FLOAT32_ERROR,
        )
        notes.append(note | {'rank': pair.rank})
    return params, notes

  return Transform(
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
  spread = jnp.maximum(*(low_rank.spread(side[0]) for side in plain))
  return fixed, heads.rounding_errors(plain, exact, near, dtype), spread

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

_LEAST = 2.0**-19  # float32 arithmetic cannot measure a smaller error

# The factor by which the rounding error of a product may exceed that of the pair in
# random bases, see `symmetries.low_rank.spread`.
_TOLERANCE = 2.0


def remove_low_rank_gauge() -> Transform:
  """Makes the transform that fixes the gauge of every low-rank pair of a model.

  Its notes give the rank of each pair, and the relative rounding error of the product,
  in this form and as plain factors. Rows and columns of the product count alike in the
  error, whatever their size.
  """
  return Transform(
    'low-rank gauge',
    layer=_fix_pairs,
    outer=lambda context, state, params: _fix_pairs(context, state, None, params),
    takes='float32',
  )


def _fix_pairs(
  context: Context, state: Any, index: int | None, params: Params
) -> Noted:
  """Fixes the gauge of the pairs of a layer, or of those outside the layers."""
  prefix, notes = models.names.prefix(index), []
  for path, pair in params.copy().items():
    if isinstance(pair, structured.LowRank) and 1 <= pair.rank <= min(pair.shape):
      leaf, errors, spread = _fix(pair, dtype=context.holder(prefix + path))
      tolerance = _TOLERANCE / float(spread)
      note = heads_lib.settle(
        params, path, {path: leaf}, errors, tolerance, prefix=prefix, least=_LEAST
      )
      notes.append(note | {'rank': pair.rank})
  return params, notes


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

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
    A transform. Its notes give, for each pair, the form, the rank, the count of numbers
    and the relative rounding error of the product, in this form and as plain factors.
    Lines of the product count alike in the error, whatever their size.
  """
  fix = functools.partial(_fix_pairs, tolerance=tolerance)

  def layers(
    context: transform.Context, state: Any, first: int, given: list[transform.Params]
  ) -> transform.Noted:
    return state, given, [fix(context, i, x) for i, x in enumerate(given, first)]

  def outer(
    context: transform.Context, state: Any, given: transform.Params
  ) -> tuple[transform.Params, list[transform.Note]]:
    return given, fix(context, None, given)

  return transform.Transform(
    'low-rank gauge',
    layers=layers,
    outer=outer,
    takes='float32',
    carries_adapters=True,
  )


def _fix_pairs(
  context: transform.Context,
  index: int | None,
  params: transform.Params,
  *,
  tolerance: float,
) -> list[transform.Note]:
  """Fixes the gauge of every pair of a layer, in place; returns notes."""
  pairs = {
    path: pair
    for path, pair in params.items()
    if isinstance(pair, structured.LowRank)
    and 1 <= pair.rank <= min(pair.shape)
    and not path.endswith('/adapter')  # its factors stay two factors
  }
  prefix = models.names.prefix(index)
  fixed = {
    path: _fix(pair, dtype=context.holder(prefix + path))
    for path, pair in pairs.items()
  }
  found = jax.device_get({path: others for path, (_, *others) in fixed.items()})
  notes = []
  for path, (errors, spread) in found.items():
    most = max(tolerance * errors.plain / spread, _FLOAT32_ERROR)
    leaf = {path: fixed[path][0]}
    note = heads_lib.settle(params, index, path, leaf, errors, most)
    notes.append(note | {'rank': pairs[path].rank})
  return notes


@functools.partial(jax.jit, static_argnames='dtype')
def _fix(
  pair: structured.LowRank, *, dtype: np.dtype
) -> tuple[structured.ReducedLowRank, heads.Errors, jax.Array]:
  fixed = low_rank.fix_pair(pair.u, pair.v)
  even = fixed.without_lines()
  rounded = structured.astype(structured.astype(even, dtype), jnp.float32)
  factors = fixed.divided(*pair.factors()), even.factors(), rounded.factors()
  sides = [(u[None], v.T[None]) for u, v in factors]
  (u, v), *_ = factors
  spread = jnp.maximum(low_rank.spread(u), low_rank.spread(v.T))
  return fixed, heads.rounding_errors(*sides, dtype=dtype), spread

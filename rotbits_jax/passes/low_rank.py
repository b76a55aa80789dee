"""The gauge of low-rank pairs, see `symmetries.low_rank`."""

import functools
from typing import Any

import jax
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import transform
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import low_rank

_FLOAT32_ERROR = 2.0**-19  # float32 arithmetic cannot measure a smaller error


def remove_low_rank_gauge(*, tolerance: float = 2.0) -> transform.Transform:
  """Makes the transform that fixes the gauge of every low-rank pair of a model.

  Args:
    tolerance: the factor by which the rounding error of the product may grow. A pair
      whose error grows more is not changed.

  Returns:
    A transform. Its notes give, for each pair, the form, the rank, the count of numbers
    and the relative rounding error of the product, in this form and as plain factors.
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
    'low-rank gauge', layers=layers, outer=outer, takes='float32'
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
    if isinstance(pair, structured.LowRank) and pair.rank <= min(pair.shape)
  }
  fixed = {path: _fix(x.u, x.v, dtype=context.dtype) for path, x in pairs.items()}
  notes = []
  for path, errors in jax.device_get({p: own for p, (_, own) in fixed.items()}).items():
    details: transform.Note = {'rank': pairs[path].rank, 'plain_error': errors.plain}
    if not np.isfinite(errors.plain):
      del details['plain_error']
      details['obstacle'] = 'numbers that are not finite, or not after rounding'
    elif errors.fixed <= max(tolerance * errors.plain, _FLOAT32_ERROR):
      params[path] = fixed[path][0].replace(names=pairs[path].names)
      details['error'] = errors.fixed
    name = models.names.prefix(index) + path
    notes.append(transform.note(name, params[path], **details))
  return notes


@functools.partial(jax.jit, static_argnames='dtype')
def _fix(
  u: jax.Array, v: jax.Array, *, dtype: np.dtype
) -> tuple[structured.ReducedLowRank, heads.Errors]:
  leaf = low_rank.fix_pair(u, v)
  return leaf, low_rank.rounding_errors(u, v, leaf, dtype)

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


def fix_pairs(
  params: transform.Params,
  *,
  tolerance: float = 2.0,
  dtype: Any = None,
  prefix: str = '',
) -> tuple[transform.Params, list[transform.Note]]:
  """Fixes the gauge of every pair among parameters.

  Args:
    params: arrays and structured leaves by path, unstacked. Each `structured.LowRank`
      is replaced by a reduced pair if that is smaller and accurate enough.
    tolerance: the factor by which the rounding error of the product may grow. A pair
      whose error grows more is not changed.
    dtype: the dtype to which the numbers will be rounded; None for their own dtype.
    prefix: prefix of the paths in notes.

  Returns:
    The parameters in their old dtypes, and a note for each pair.
  """
  pairs = {
    path: pair
    for path, pair in params.items()
    if isinstance(pair, structured.LowRank) and pair.rank <= min(pair.shape)
  }
  fixed = {
    path: _fix(pair.u, pair.v, dtype=np.dtype(dtype or pair.dtype))
    for path, pair in pairs.items()
  }
  params, notes = dict(params), []
  for path, errors in jax.device_get({p: own for p, (_, own) in fixed.items()}).items():
    details: transform.Note = {'rank': pairs[path].rank, 'plain_error': errors.plain}
    bound = max(tolerance * errors.plain, _FLOAT32_ERROR)
    if not np.isfinite(errors.plain):
      del details['plain_error']
      details['obstacle'] = 'numbers that are not finite, or not after rounding'
    elif errors.fixed <= bound:
      leaf = fixed[path][0].astype(pairs[path].dtype)
      params[path] = leaf.replace(names=pairs[path].names)
      details['error'] = errors.fixed
    notes.append(transform.note(prefix + path, params[path], **details))
  return params, notes


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
    context: transform.Context, state: Any, first: int, given: list[transform.Params]
  ) -> transform.Noted:
    results = [
      fix(layer, dtype=context.dtype, prefix=models.names.prefix(i))
      for i, layer in enumerate(given, first)
    ]
    return state, [params for params, _ in results], [own for _, own in results]

  def outer(
    context: transform.Context, state: Any, given: transform.Params
  ) -> tuple[transform.Params, list[transform.Note]]:
    return fix(given, dtype=context.dtype)

  return transform.make('low-rank gauge', layers=layers, outer=outer, takes='float32')


@functools.partial(jax.jit, static_argnames='dtype')
def _fix(
  u: jax.Array, v: jax.Array, *, dtype: np.dtype
) -> tuple[structured.ReducedLowRank, heads.Errors]:
  leaf = low_rank.fix_pair(u, v)
  return leaf, low_rank.rounding_errors(u, v, leaf, dtype)

"""The gauges of attention heads and of low-rank pairs, and the biases of heads.

`symmetries.heads` and `symmetries.low_rank` have the mathematics.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes.transform import Context
from rotbits_jax.passes.transform import Note
from rotbits_jax.passes.transform import Noted
from rotbits_jax.passes.transform import Params
from rotbits_jax.passes.transform import Transform
from rotbits_jax.passes.transform import note
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import layer as layer_lib
from rotbits_jax.symmetries import low_rank

_LEAST = 2.0**-19  # float32 arithmetic cannot measure a smaller error

# The factor by which the rounding error of a product may exceed that of the pair in
# random bases, see `symmetries.low_rank.spread`.
_PAIR_TOLERANCE = 2.0


def remove_biases() -> Transform:
  """Makes the transform that sets the biases of key and value to zero.

  The zeros are not stored. The bias of the key is removed if there is no RoPE, and that
  of the value if the output projection has a bias that can include it.
  """
  return Transform('biases', layer=_zero_biases, takes='float32')


def remove_value_gauge(*, tolerance: float | None = None) -> Transform:
  """Makes the transform that fixes the gauge between value and output of every layer.

  Its notes give the rounding error of the product of the two kernels, in this form and
  as plain arrays. A layer whose error grows by more than the tolerance is not changed.
  By default it is 3 in models whose residual stream is rotated, because there the other
  parameters make most of the error; else it is 1.
  """
  fix = functools.partial(_fix_heads, paths=heads.VALUES, tolerance=tolerance)
  return Transform('value gauge', layer=fix, takes='float32')


def remove_query_key_gauge(*, tolerance: float | None = None) -> Transform:
  """Makes the transform that fixes the gauge between query and key of every layer.

  It changes nothing where RoPE rotates all coordinates of a head, or where queries and
  keys are normed. Tolerance and notes are those of `remove_value_gauge`.
  """
  fix = functools.partial(_fix_heads, paths=heads.KEYS, tolerance=tolerance)
  return Transform('query-key gauge', layer=fix, takes='float32')


def remove_low_rank_gauge() -> Transform:
  """Makes the transform that fixes the gauge of every low-rank pair of a model.

  Its notes give the rank of each pair, and the relative rounding error of the product,
  in this form and as plain factors.
  """
  return Transform(
    'low-rank gauge',
    layer=_fix_pairs,
    outer=lambda context, state, params: _fix_pairs(context, state, None, params),
    takes='float32',
  )


# ---- heads -------------------------------------------------------------------------

_without_biases = jax.jit(layer_lib.without_biases, static_argnums=1)


def _zero_biases(context: Context, state: Any, index: int, params: Params) -> Noted:
  """Removes the biases of a layer, unless that makes or hides a number not finite."""
  prefix, notes = models.names.prefix(index), []
  changed = jax.device_get(_without_biases(params, context.config))
  for bias, out in ((heads.KEY_BIAS, None), (heads.VALUE_BIAS, heads.OUT_BIAS)):
    if bias not in changed:
      continue
    moved = np.asarray(params[bias] if out is None else changed[out])
    details = {'obstacle': 'weights that are not finite or would be too large'}
    dtype = context.dtype_of(prefix + (out or bias))
    if np.isfinite(structured.astype(moved, dtype)).all():
      params |= {path: changed[path] for path in (bias, out) if path is not None}
      details = {}
    notes.append(note(prefix + bias, params[bias], **details))
  return params, notes


def _fix_heads(
  context: Context,
  state: Any,
  index: int,
  params: Params,
  *,
  paths: tuple[str, ...],
  tolerance: float | None,
) -> Noted:
  """Fixes the gauge of the heads of a layer, if rounding then makes a small error."""
  config, prefix = context.config, models.names.prefix(index)
  pair = layer_lib.head_pair(params, config, paths=paths)
  if not pair:
    return params, []
  if tolerance is None:
    valid = models.layout.symmetries(config)
    tolerance = 3.0 if valid.segments or valid.stream else 1.0
  dtype = context.narrowest(prefix + path for path in pair)
  fixed, errors = _fix(pair, config, dtype=dtype)
  kernel = heads.OUT if paths == heads.VALUES else heads.KEY
  return params, [_settled(params, kernel, fixed, errors, tolerance, prefix=prefix)]


@functools.partial(jax.jit, static_argnums=1, static_argnames='dtype')
def _fix(
  pair: models.Params, config: models.ModelConfig, *, dtype: np.dtype
) -> tuple[models.Params, dict[str, jax.Array]]:
  """Fixes the gauge of a pair, and measures the errors of rounding."""
  fixed = layer_lib.fix_pair(pair, config).params
  rounded = structured.astype(structured.astype(fixed, dtype), jnp.float32)
  plain, exact, near = (
    heads.sides(x, kv_heads=config.num_kv_heads) for x in (pair, fixed, rounded)
  )
  return fixed, heads.rounding_errors(plain, exact, near, dtype)


# ---- low-rank pairs ----------------------------------------------------------------


def _fix_pairs(
  context: Context, state: Any, index: int | None, params: Params
) -> Noted:
  """Fixes the gauge of the pairs of a layer, or of those outside the layers."""
  prefix, notes = models.names.prefix(index), []
  for path, pair in params.copy().items():
    if not isinstance(pair, structured.LowRank) or pair.shortened:
      continue
    if 1 <= pair.rank <= min(pair.shape):
      leaf, errors, spread = _fix_pair(pair, dtype=context.dtype_of(prefix + path))
      tolerance = _PAIR_TOLERANCE / float(spread)
      settled = _settled(
        params, path, {path: leaf}, errors, tolerance, prefix=prefix, least=_LEAST
      )
      notes.append(settled | {'rank': pair.rank})
  return params, notes


@functools.partial(jax.jit, static_argnames='dtype')
def _fix_pair(
  pair: structured.LowRank, *, dtype: np.dtype
) -> tuple[structured.LowRank, dict[str, jax.Array], jax.Array]:
  """Fixes the gauge of a pair; returns the errors of rounding, and the spread."""
  fixed = low_rank.fix_pair(pair.u, pair.v)
  rounded = structured.astype(structured.astype(fixed, dtype), jnp.float32)
  factors = (x.factors() for x in (pair, fixed, rounded))
  plain, exact, near = ((u[None], v.T[None]) for u, v in factors)
  spread = jnp.maximum(*(low_rank.spread(side[0]) for side in plain))
  return fixed, heads.rounding_errors(plain, exact, near, dtype), spread


def _settled(
  params: Params,  # of a layer, or outside the layers; changed in place
  path: str,  # of the parameter that stores fewer weights
  fixed: Params,  # the parameters with their gauge fixed
  errors: dict[str, jax.Array],  # see `symmetries.heads.rounding_errors`
  tolerance: float,  # of the error, as a multiple of that of plain arrays
  *,
  prefix: str,  # of the paths in the whole model
  least: float = 0.0,  # an error that is always small enough
) -> Note:
  """Takes parameters with a fixed gauge if rounding them makes a small error."""
  measured: Note = jax.device_get(errors)
  plain_error = measured['plain_error']
  if not np.isfinite(plain_error):
    measured = {'obstacle': 'it has weights that are not finite, or not when rounded'}
  elif measured['error'] <= max(tolerance * plain_error, least):  # false for infinity
    params |= fixed
  else:
    measured = {'plain_error': plain_error}
  return note(prefix + path, params[path], **measured)

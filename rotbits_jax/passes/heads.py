"""The gauges and the biases of attention heads, see `symmetries.heads`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import transform
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import layer as layer_lib


def remove_biases() -> transform.Transform:
  """Makes the transform that sets the biases of key and value to zero.

  The zeros are not stored. The bias of the key is removed if there is no RoPE. The bias
  of the value is removed if the output projection has a bias that can include it.

  Returns:
    A transform. Its notes name the biases that became zero, and those that did not
    because weights are not finite or would be too large.
  """
  return transform.Transform('biases', layer=_zero_biases, takes='float32')


def remove_value_gauge(*, tolerance: float | None = None) -> transform.Transform:
  """Makes the transform that fixes the gauge between value and output of every layer.

  Args:
    tolerance: the factor by which the rounding error of the product of the two kernels
      may grow. A layer whose error grows more is not changed. By default it is 3 in
      models whose residual stream is rotated, because there the other parameters make
      most of the error. In other models heads make all of it, and the factor is 1.

  Returns:
    A transform. Its notes give, for each layer, the form of the output kernel, the
    count of weights, and the rounding error of the product of the two kernels, in this
    form and as plain arrays.
  """
  fix = functools.partial(_fix_heads, paths=heads.VALUES, tolerance=tolerance)
  return transform.Transform('value gauge', layer=fix, takes='float32')


def remove_query_key_gauge(*, tolerance: float | None = None) -> transform.Transform:
  """Makes the transform that fixes the gauge between query and key of every layer.

  It changes nothing in layers whose RoPE rotates all coordinates of a head, and in
  models that norm queries and keys.

  Args:
    tolerance: see `remove_value_gauge`.

  Returns:
    A transform. Its notes give the form of the key kernel of each layer, and the same
    figures as those of `remove_value_gauge`.
  """
  fix = functools.partial(_fix_heads, paths=heads.KEYS, tolerance=tolerance)
  return transform.Transform('query-key gauge', layer=fix, takes='float32')


def _zero_biases(
  context: transform.Context, state: Any, index: int, params: transform.Params
) -> transform.Noted:
  """Removes the biases of a layer."""
  del state
  prefix, notes = models.names.prefix(index), []
  changed, greatest = jax.device_get(_without_biases(params, context.config))
  for bias, out in ((heads.KEY_BIAS, None), (heads.VALUE_BIAS, heads.OUT_BIAS)):
    if bias not in changed:
      continue
    details = {}
    if greatest[bias] <= context.limit(prefix + (out or bias)):  # false for NaN
      params |= {path: changed[path] for path in (bias, out) if path is not None}
    else:
      details = {'obstacle': 'weights that are not finite or would be too large'}
    notes.append(transform.note(prefix + bias, params[bias], **details))
  return params, notes


@functools.partial(jax.jit, static_argnums=1)
def _without_biases(
  params: transform.Params, config: models.ModelConfig
) -> tuple[transform.Params, transform.Params]:
  """Returns the biases that change, and the greatest number that each removal makes."""
  changed = layer_lib.without_biases(params, config)
  made: dict[str, Any] = {heads.KEY_BIAS: params.get(heads.KEY_BIAS)}
  made[heads.VALUE_BIAS] = changed.get(heads.OUT_BIAS)
  return changed, {x: jnp.max(jnp.abs(made[x])) for x in made if x in changed}


def _fix_heads(
  context: transform.Context,
  state: Any,
  index: int,
  params: transform.Params,
  *,
  paths: tuple[str, ...],
  tolerance: float | None,
) -> transform.Noted:
  """Fixes the gauge of the heads of a layer, if rounding then makes a small error."""
  del state
  config, is_values = context.config, paths == heads.VALUES
  pair = layer_lib.head_pair(params, config, paths=paths)
  if not pair:
    return params, []
  if tolerance is None:
    valid = models.layout.symmetries(config)
    tolerance = 3.0 if valid.segments or valid.stream else 1.0
  prefix = models.names.prefix(index)
  dtype = context.holder(*(prefix + path for path in pair))
  fixed, errors = _fix(pair, config, dtype=dtype)
  errors = jax.device_get(errors)
  kernel = heads.OUT if is_values else heads.KEY
  most = tolerance * errors['plain_error']
  return params, [settle(params, kernel, fixed, errors, prefix=prefix, most=most)]


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
  plain_error = heads.rounding_error(plain, dtype)
  error = heads.relative_error(exact, near)
  return fixed, {'plain_error': plain_error, 'error': error}


def settle(
  params: transform.Params,
  path: str,
  fixed: transform.Params,
  errors: transform.Note,
  *,
  prefix: str,
  most: float,
) -> transform.Note:
  """Takes parameters with a fixed gauge if rounding them makes a small error.

  Args:
    params: the parameters of a layer, or outside the layers; changed in place.
    path: path of the parameter that stores fewer weights.
    fixed: the parameters with their gauge fixed, by path.
    errors: the errors of rounding, `plain_error` without the gauge; on the host.
    prefix: the beginning of the paths in the whole model.
    most: the greatest error.

  Returns:
    A note on the parameter.
  """
  details = {'plain_error': errors['plain_error']}
  if not np.isfinite(errors['plain_error']):
    details = {'obstacle': 'it has weights that are not finite, or not when rounded'}
  elif errors['error'] <= most:  # false if rounding makes a weight infinite
    params |= fixed
    details = errors
  return transform.note(prefix + path, params[path], **details)

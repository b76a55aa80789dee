"""The gauges of attention heads, see `symmetries.heads`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import transform
from rotbits_jax.symmetries import heads

# The greatest error of an adapter's product, as a multiple of that of plain rounding,
# and that of float32 arithmetic if this is more.
_MOST_ADAPTER_ERROR = 32.0
_MOST_ARITHMETIC_ERROR = 1e-3


def remove_value_gauge(*, tolerance: float | None = None) -> transform.Transform:
  """Makes the transform that fixes the gauge between value and output of every layer.

  Args:
    tolerance: the factor by which the rounding error of the product of the two kernels
      may grow. A layer whose error grows more is not changed. By default it is 3 in
      models whose residual stream is rotated, because there the other parameters make
      most of the error. In other models heads make all of it, and the factor is 1.

  Returns:
    A transform. Its notes give, for each layer, the form of the output kernel, the
    count of numbers, and the rounding error of the product of the two kernels, in this
    form and as plain arrays.
  """
  layers = functools.partial(_layers, is_values=True, tolerance=tolerance)
  return transform.Transform(
    'value gauge', layers=layers, takes='float32', carries_adapters=True
  )


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
  layers = functools.partial(_layers, is_values=False, tolerance=tolerance)
  return transform.Transform(
    'query-key gauge', layers=layers, takes='float32', carries_adapters=True
  )


def _fix(
  params: models.Params, *, kv_heads: int, rotary: int | None, dtype: np.dtype
) -> tuple[models.Params, heads.Errors]:
  """Fixes the gauge of values, or of keys if `rotary` is given."""
  pairs = {path: x for path, x in params.items() if structured.is_structured(x)}
  params = {path: x for path, x in params.items() if path not in pairs}
  if rotary is None:
    fixed, gauge = heads.fix_values(params, kv_heads=kv_heads)
  else:
    fixed, gauge = heads.fix_keys(params, kv_heads=kv_heads, rotary=rotary)
  rounded = structured.astype(structured.astype(fixed, dtype), jnp.float32)
  forms = params, fixed, rounded
  sides = [heads.sides(x, kv_heads=kv_heads) for x in forms]
  errors = heads.rounding_errors(*sides, dtype=dtype)
  carried = heads.in_gauge(pairs, gauge, rotary=rotary or 0)
  path = heads.OUT if rotary is None else heads.KEY
  if (own := models.layout.adapter_of(path)) in pairs:
    # The kernel on the other side meets these factors, too: where the gauge is almost
    # singular, its rounding errors would be multiplied by a large inverse.
    factors = [x[own].u if path == heads.OUT else x[own].v for x in (pairs, carried)]
    factors.append(factors[1].astype(dtype).astype(jnp.float32))
    sides = [
      heads.sides(
        {x: leaf for x, leaf in form.items() if x != heads.KEY_BIAS} | {path: factor},
        kv_heads=kv_heads,
      )
      for form, factor in zip(forms, factors, strict=True)
    ]
    found = heads.rounding_errors(*sides, dtype=dtype)
    most = _MOST_ADAPTER_ERROR * found.plain
    arithmetic = heads.growth(*sides[:2]) * float(jnp.finfo(jnp.float32).eps)
    is_kept = found.fixed <= most
    is_kept &= arithmetic <= jnp.maximum(most, _MOST_ARITHMETIC_ERROR)
    carried = jax.tree.map(lambda x: jnp.where(is_kept, x, jnp.nan), carried)
  return fixed | carried, errors


def _layers(
  context: transform.Context,
  state: Any,
  first: int,
  layers: list[transform.Params],
  *,
  is_values: bool,
  tolerance: float | None,
) -> transform.Noted:
  config, valid = context.config, models.layout.symmetries(context.config)
  notes: list[list[transform.Note]] = [[] for _ in layers]
  if not (valid.values if is_values else valid.queries):
    return state, layers, notes
  if tolerance is None:
    tolerance = 3.0 if valid.segments or valid.stream else 1.0
  paths = heads.VALUES if is_values else heads.KEYS
  kernel = f'attention/{"out" if is_values else "key"}/kernel'
  # The places of layers, by the rotary coordinates and the dtype.
  places: dict[tuple[int | None, np.dtype], list[int]] = {}
  pairs = [_pair(layer, paths) for layer in layers]
  for i, pair in enumerate(pairs):
    rotary = None if is_values else config.rotary_dim
    if (rotary or 0) < config.head_dim and (
      pair and min(pair[kernel].shape) >= config.head_dim
    ):
      prefix = models.names.prefix(first + i)
      dtype = context.holder(*(prefix + path for path in paths if path in pair))
      places.setdefault((rotary, dtype), []).append(i)
  results: dict[int, tuple[models.Params, heads.Errors]] = {}
  for (rotary, dtype), found in places.items():
    made = context.map_layers(
      _fix,
      [(pairs[i],) for i in found],
      kv_heads=config.num_kv_heads,
      rotary=rotary,
      dtype=dtype,
    )
    results |= dict(zip(found, made, strict=True))
  # The only wait for the devices.
  errors = jax.device_get({i: own for i, (_, own) in results.items()})
  for i, error in sorted(errors.items()):
    fixed, _ = results[i]
    note = settle(layers[i], first + i, kernel, fixed, error, tolerance * error.plain)
    notes[i].append(note)
  return state, layers, notes


def settle(
  params: transform.Params,
  index: int | None,
  path: str,
  fixed: transform.Params,
  errors: heads.Errors,
  most: float,
) -> transform.Note:
  """Takes parameters with a fixed gauge if rounding them makes a small error.

  Args:
    params: the parameters of a layer, or outside the layers; changed in place.
    index: the layer; None outside the layers.
    path: path of the parameter that stores fewer numbers.
    fixed: the parameters with their gauge fixed, by path.
    errors: the errors of rounding, on the host.
    most: the greatest error.

  Returns:
    A note on the parameter.
  """
  details: transform.Note = {'plain_error': errors.plain}
  if not np.isfinite(errors.plain):
    details = {'obstacle': 'it has numbers that are not finite, or not when rounded'}
  elif errors.fixed <= most:  # false if rounding makes a number infinite
    params |= fixed
    details['error'] = errors.fixed
  return transform.note(models.names.prefix(index) + path, params[path], **details)


def _pair(layer: transform.Params, paths: tuple[str, ...]) -> transform.Params:
  """Returns parameters of a layer; none if one is not a plain array."""
  pair = {}
  for path in paths:
    leaf = layer.get(path)
    if leaf is None or (isinstance(leaf, structured.Constant) and not leaf.value):
      continue  # a missing bias is zero
    if not structured.is_plain(leaf):
      return {}
    pair[path] = leaf
  beside = {models.layout.adapter_of(path) for path in paths} & layer.keys() - {*paths}
  return pair | {path: layer[path] for path in sorted(beside)}

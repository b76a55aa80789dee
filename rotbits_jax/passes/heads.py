"""The gauges of attention heads, and their biases, see `symmetries.heads`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import transform as transform_lib
from rotbits_jax.passes.transform import Params
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import layer as layer_lib


def remove_head_gauges(*, tolerance: float | None = None) -> transform_lib.Transform:
  """Makes the transform that removes biases of heads and fixes their bases.

  The page on the mathematics tells which a model has. A pair of kernels stays if the
  rounding error of its product would grow by more than the tolerance. By default it is
  3 in models whose residual stream is rotated, because there the other parameters make
  most of the error; else it is 1.
  """
  layer = functools.partial(_fix_heads, tolerance=tolerance)
  return transform_lib.Transform('attention heads', layer=layer)


_without_biases = jax.jit(layer_lib.without_biases, static_argnums=1)


def _fix_heads(
  context: transform_lib.Context,
  state: Any,
  index: int,
  params: Params,
  *,
  tolerance: float | None,
) -> transform_lib.Noted:
  """Removes biases of a layer, and fixes the gauges of its heads."""
  config, notes = context.config, dict[str, transform_lib.Note]()
  changed = jax.device_get(_without_biases(params, config))
  for bias in (x for x in (heads.KEY_BIAS, heads.VALUE_BIAS) if x in changed):
    out = heads.OUT_BIAS if bias == heads.VALUE_BIAS else bias
    # Zeros must not hide an element that is not finite, nor make one.
    moved = np.asarray(params[bias] if out == bias else changed[out])
    if np.isfinite(structured.astype(moved, context.dtype_of(out))).all():
      params |= {path: changed[path] for path in (bias, out)}
    notes[bias] = {}
  valid = models.layout.symmetries(config)
  if tolerance is None:
    tolerance = 3.0 if valid.segments or valid.stream else 1.0
  for paths, kernel in ((heads.VALUES, heads.OUT), (heads.KEYS, heads.KEY)):
    if pair := layer_lib.head_pair(params, config, paths=paths):
      dtypes = map(context.dtype_of, pair)
      dtype = min(dtypes, key=lambda x: float(jnp.finfo(x).max))
      fixed, errors = _fix_pair(pair, config, dtype=dtype)
      errors = jax.device_get(errors)
      # False if a weight is not finite.
      if errors['error'] <= tolerance * errors['plain_error'] < np.inf:
        params |= fixed
      else:
        del errors['error']
      notes[kernel] = errors
  return params, notes


@functools.partial(jax.jit, static_argnums=1, static_argnames='dtype')
def _fix_pair(
  pair: Params, config: models.ModelConfig, *, dtype: np.dtype
) -> tuple[Params, dict[str, jax.Array]]:
  """Fixes the gauge of a pair, and measures the errors of rounding."""
  fixed, _ = layer_lib.fix_pair(pair, config)
  return fixed, heads.rounding_errors(pair, fixed, config.num_kv_heads, dtype)

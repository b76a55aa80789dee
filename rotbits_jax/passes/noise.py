"""The change that rounding alone makes to the function of a model.

It is the yardstick for every transform that rounds weights: a transform should not
change the function much more than a random rotation does, which changes it by rounding
only.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import residual
from rotbits_jax.passes import rewrite
from rotbits_jax.passes import transform
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import layer as layer_lib


def randomly_rotated(model: models.Model, *, key: jax.Array) -> models.Model:
  """Rotates a model at random and rounds it again.

  The rotations are uniform under the Haar measure. In a sliced model, every segment of
  the residual stream gets its own rotation. In a dense model with RMSNorm, all segments
  get the same rotation. The residual stream of other dense models (with LayerNorm, or
  with a head that is the embedding, or with weights that would then be too large)
  cannot be rotated. In these models, the attention heads are rotated: the values, and
  queries and keys in the coordinates that RoPE does not rotate.

  Args:
    model: the model; structured leaves are materialized.
    key: a key from `jax.random.key`.

  Returns:
    The rotated model in its old dtypes, with NumPy arrays.
  """
  return rewrite.run_chain((random_rotation(key=key),), model)[0]


def random_rotation(*, key: jax.Array) -> transform.Transform:
  """Makes the transform that `randomly_rotated` applies."""

  def init(context: transform.Context) -> bool:
    return residual.has_stream(context.config) and not residual.obstacle(context)

  def layer(
    context: transform.Context, has_stream: bool, index: int, params: transform.Params
  ) -> transform.Noted:
    config, steps = context.config, context.config.segments_per_layer
    if not has_stream:
      return _with_rotated_heads(params, index, config, key), []
    segments = range(index * steps, (index + 1) * steps + 1)
    return _rotated(params, segments, config, key, is_outer=False), []

  def outer(
    context: transform.Context, has_stream: bool, params: transform.Params
  ) -> transform.Noted:
    ends = (0, len(context.config.segment_widths) - 1)
    if has_stream:
      params = _rotated(params, ends, context.config, key, is_outer=True)
    return params, []

  return transform.Transform(
    'rotation', init=init, layer=layer, outer=outer, takes='float32'
  )


def _rotated(
  params: transform.Params,
  segments: Any,
  config: models.ModelConfig,
  key: jax.Array,
  *,
  is_outer: bool,
) -> transform.Params:
  """Rotates parameters between segments, shortcuts among them."""
  rotations = []
  for segment in segments:
    segment = segment if config.sliced else 0
    width = config.segment_widths[segment]
    rotations.append(_orthogonal(jax.random.fold_in(key, segment), 1, width)[0])
  params = structured.expand(params, keep_factors=True)
  rotated = residual.rotate(params, rotations, config, is_outer=is_outer)
  return structured.expand(rotated, keep_factors=True)


def _with_rotated_heads(
  params: transform.Params, index: int, config: models.ModelConfig, key: jax.Array
) -> transform.Params:
  """Rotates the heads of a layer."""
  params, layer_key = structured.expand(params), jax.random.fold_in(key, index)
  for paths in (heads.VALUES, heads.KEYS):
    fixed = 0 if paths == heads.VALUES else config.rotary_dim
    if pair := layer_lib.head_pair(params, config, paths=paths):
      width = config.head_dim - fixed
      rotations = _orthogonal(layer_key, config.num_kv_heads, width, fixed)
      params |= _rotate_heads(pair, rotations)
      layer_key = jax.random.fold_in(layer_key, 1)
  return params


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _orthogonal(key: jax.Array, count: int, width: int, fixed: int = 0) -> jax.Array:
  """Returns random rotations of all coordinates but the first `fixed` ones."""
  rotations = jax.random.orthogonal(key, width, (count,), jnp.float32)
  kept = jnp.eye(fixed, dtype=jnp.float32)
  return jax.vmap(lambda x: jax.scipy.linalg.block_diag(kept, x))(rotations)


_rotate_heads = jax.jit(heads.rotate_heads)

"""The change that rounding alone makes to the function of a model.

It is the yardstick for every transform that rounds weights: a transform should not
change the function much more than a random rotation does, which changes it by rounding
only.
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import residual
from rotbits_jax.passes import rewrite
from rotbits_jax.passes.transform import Context
from rotbits_jax.passes.transform import Noted
from rotbits_jax.passes.transform import Params
from rotbits_jax.passes.transform import Transform
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import layer as layer_lib


def randomly_rotated(model: models.Model, *, key: jax.Array) -> models.Model:
  """Rotates a model at random and rounds it again to its dtypes.

  The rotations are uniform under the Haar measure. Every segment of the residual stream
  gets its own in a sliced model, and the same one in a dense model with RMSNorm. Where
  the residual stream cannot be rotated, the attention heads are: values, and queries
  and keys in the coordinates that RoPE does not rotate.
  """
  return rewrite.run_chain((random_rotation(key=key),), model)[0]


def random_rotation(*, key: jax.Array) -> Transform:
  """Makes the transform that `randomly_rotated` applies."""

  def layer(
    context: Context, has_stream: bool, index: int | None, params: Params
  ) -> Noted:
    """Rotates a layer, or the parameters outside the layers, shortcuts among them."""
    config, widths = context.config, context.config.segment_widths
    if not has_stream:
      return _with_rotated_heads(params, index, config, key), []
    segments: Sequence[int] = (0, len(widths) - 1)
    if index is not None:
      first = index * config.segments_per_layer
      segments = range(first, first + config.segments_per_layer + 1)
    rotations = []
    for segment in segments:
      place = segment if config.sliced else 0
      rotations += [*_orthogonal(jax.random.fold_in(key, place), 1, widths[place])]
    params = structured.expand(params, keep_factors=True)
    params = residual.rotate(params, rotations, config, is_outer=index is None)
    return structured.expand(params, keep_factors=True), []

  return Transform(
    'rotation',
    init=lambda context: residual.obstacle(context) is None,
    layer=layer,
    outer=lambda context, state, params: layer(context, state, None, params),
    takes='float32',
  )


def _with_rotated_heads(
  params: Params, index: int | None, config: models.ModelConfig, key: jax.Array
) -> Params:
  """Rotates the heads of a layer; there are none outside the layers."""
  if index is None:
    return params
  params, layer_key = structured.expand(params), jax.random.fold_in(key, index)
  for paths, fixed in ((heads.VALUES, 0), (heads.KEYS, config.rotary_dim)):
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

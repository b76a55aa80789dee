"""The change that rounding alone makes to the function of a model.

It is the yardstick for every transform that rounds numbers: a transform should not
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
from rotbits_jax.symmetries import norms
from rotbits_jax.symmetries import rotations as rotations_lib


def randomly_rotated(model: models.Model, *, key: jax.Array) -> models.Model:
  """Rotates a model at random and rounds it again.

  The rotations are uniform under the Haar measure. In a sliced model, every segment of
  the residual stream gets its own rotation. In a dense model with RMSNorm, all segments
  get the same rotation. The residual stream of other dense models (with LayerNorm, or
  with a head that is the embedding, or with numbers that would then be too large)
  cannot be rotated. In these models, the attention heads are rotated: the values, and
  queries and keys in the coordinates that RoPE does not rotate.

  Args:
    model: the model; structured leaves are materialized.
    key: a key from `jax.random.key`.

  Returns:
    The rotated model in its old dtypes, with NumPy arrays.
  """
  valid = models.layout.symmetries(model.config)
  only_heads = (valid.segments or valid.stream) and not residual.is_in_range(
    rewrite.make_context(model, stored_as=model.stored_as)
  )
  rotation = random_rotation(key=key, only_heads=only_heads)
  return rewrite.run_chain((rotation,), model)[0]


def random_rotation(*, key: jax.Array, only_heads: bool = False) -> transform.Transform:
  """Makes the transform that `randomly_rotated` applies.

  Args:
    key: a key from `jax.random.key`.
    only_heads: whether the residual stream stays as it is.
  """
  return transform.Transform(
    'rotation',
    layers=functools.partial(_layers, key=key, only_heads=only_heads),
    outer=functools.partial(_outer, key=key, only_heads=only_heads),
    takes='float32',
  )


def _layers(
  context: transform.Context,
  state: Any,
  first: int,
  layers: list[transform.Params],
  *,
  key: jax.Array,
  only_heads: bool,
) -> transform.Noted:
  config = context.config
  valid, steps = models.layout.symmetries(config), config.segments_per_layer
  axes = models.layout.layer_axes(config)
  for k, i in enumerate(range(first, first + len(layers))):
    if (valid.segments or valid.stream) and not only_heads:
      segments = range(i * steps, (i + 1) * steps + 1)
      rotations = tuple(_rotation(config, s, key) for s in segments)
      layers[k] = _rotated(layers[k], rotations, valid.stream, config, axes)
      continue
    layers[k] = structured.expand(layers[k])
    own = jax.random.fold_in(key, i)
    for paths, is_valid, fixed in (
      (heads.VALUES, valid.values, 0),
      (heads.KEYS, valid.queries, config.rotary_dim),
    ):
      if is_valid and fixed < config.head_dim:
        pair = {path: layers[k][path] for path in paths if path in layers[k]}
        width = config.head_dim - fixed
        layers[k] |= _rotate_heads(
          pair, _orthogonal(own, config.num_kv_heads, width, fixed)
        )
        own = jax.random.fold_in(own, 1)
  return state, layers, [[] for _ in layers]


def _outer(
  context: transform.Context,
  state: Any,
  params: transform.Params,
  *,
  key: jax.Array,
  only_heads: bool,
) -> tuple[transform.Params, list[transform.Note]]:
  config = context.config
  valid = models.layout.symmetries(config)
  if only_heads or not (valid.segments or valid.stream):
    return params, []
  last = len(config.segment_widths) - 1
  rotations = _rotation(config, 0, key), _rotation(config, last, key)
  axes = models.layout.outer_axes(config)
  return _rotated(params, rotations, valid.stream, config, axes), []


def _rotated(
  params: transform.Params,
  rotations: tuple[jax.Array, ...],
  folds: bool,
  config: models.ModelConfig,
  axes: models.layout.Axes,
) -> transform.Params:
  params = structured.expand(params, keep_factors=True)
  if folds:
    params = norms.fold_norm_scales(params, config, axes)
  return {
    path: _rotate(leaf, *(None if s is None else rotations[s] for s in own))
    for path, leaf in params.items()
    for own in [rotations_lib.sides(axes[path])]
  }


def _rotation(config: models.ModelConfig, segment: int, key: jax.Array) -> jax.Array:
  segment = segment if config.sliced else 0
  width = config.segment_widths[segment]
  return _orthogonal(jax.random.fold_in(key, segment), 1, width)[0]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _orthogonal(key: jax.Array, count: int, width: int, fixed: int = 0) -> jax.Array:
  """Returns random rotations of all coordinates but the first `fixed` ones."""
  rotations = jax.random.orthogonal(key, width, (count,), jnp.float32)
  kept = jnp.eye(fixed, dtype=jnp.float32)
  return jax.vmap(lambda x: jax.scipy.linalg.block_diag(kept, x))(rotations)


_rotate = jax.jit(rotations_lib.rotate)
_rotate_heads = jax.jit(heads.rotate_heads)

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
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import norms
from rotbits_jax.symmetries import rotations as rotations_lib
from rotbits_jax.symmetries import transform


def randomly_rotated(model: models.Model, *, key: jax.Array) -> models.Model:
  """Rotates a model at random and rounds it again.

  The rotations are uniform under the Haar measure. In a sliced model, every segment of
  the residual stream gets its own rotation. In a dense model with RMSNorm, all segments
  get the same rotation. The residual stream of other dense models (with LayerNorm, or
  with a head that is the embedding) cannot be rotated. In these models, the attention
  heads are rotated: the values and, if there is no RoPE, queries and keys.

  Args:
    model: the model; structured leaves are materialized.
    key: a key from `jax.random.key`.

  Returns:
    The rotated model in its old dtypes, with NumPy arrays.
  """
  return transform.run_chain((random_rotation(key=key),), model)[0]


def random_rotation(*, key: jax.Array) -> transform.Transform:
  """Makes the transform that `randomly_rotated` applies."""
  return transform.make(
    'rotation',
    layers=functools.partial(_layers, key=key),
    outer=functools.partial(_outer, key=key),
  )


def _layers(
  context: transform.Context,
  state: Any,
  first: int,
  layers: transform.Layers,
  *,
  key: jax.Array,
) -> tuple[Any, transform.Layers, list[list[transform.Note]]]:
  config = context.config
  valid, steps = models.layout.symmetries(config), config.segments_per_layer
  axes = tuple(models.layout.layer_axes(config).items())
  rotated = []
  for i, layer in enumerate(layers, first):
    if valid.segments or valid.stream:
      flat = structured.flatten(_plain(layer))
      if valid.stream:
        flat = norms.folded(config, flat)
      segments = range(i * steps, (i + 1) * steps + 1)
      rotations = tuple(_rotation(config, s, key) for s in segments)
      flat = rotations_lib.jitted_turn_parameters(flat, rotations, axes=axes)
      rotated.append(structured.unflatten(flat))
      continue
    turned = models.materialize(layer)
    shape = config.num_kv_heads, config.head_dim
    own = jax.random.fold_in(key, i)
    if valid.values:
      heads_rotations = jax.random.orthogonal(own, shape[1], shape[:1])
      turned = _rotate_values(turned, heads_rotations)
    if valid.queries and not config.rotary_dim:
      own = jax.random.fold_in(own, 1)
      heads_rotations = jax.random.orthogonal(own, shape[1], shape[:1])
      turned = _rotate_keys(turned, heads_rotations)
    rotated.append(turned)
  return state, rotated, [[] for _ in layers]


def _outer(
  context: transform.Context, state: Any, outer: models.Params, *, key: jax.Array
) -> tuple[models.Params, list[transform.Note]]:
  config = context.config
  valid = models.layout.symmetries(config)
  if not (valid.segments or valid.stream):
    return outer, []
  flat = structured.flatten(_plain(outer))
  if valid.stream:
    flat = norms.folded_outer(config, flat)
  last = len(config.segment_widths) - 1
  ends = _rotation(config, 0, key), _rotation(config, last, key)
  axes = tuple(models.layout.outer_axes(config).items())
  return structured.unflatten(
    rotations_lib.jitted_turn_parameters(flat, ends, axes=axes)
  ), []


def _plain(tree: models.Params) -> models.Params:
  return models.materialize(tree, but=(structured.FactorPair,))


def _rotation(config: models.ModelConfig, segment: int, key: jax.Array) -> jax.Array:
  if not config.sliced:
    segment = 0
  width = config.segment_widths[segment]
  return _orthogonal(jax.random.fold_in(key, segment), width)


_orthogonal = jax.jit(
  lambda key, width: jnp.asarray(jax.random.orthogonal(key, width)), static_argnums=1
)
_rotate_values = jax.jit(heads.rotate_values)
_rotate_keys = jax.jit(heads.rotate_keys)

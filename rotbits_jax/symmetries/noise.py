"""What rounding alone does to a model's function: the yardstick of every transform."""

import dataclasses
import functools

import jax
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.symmetries import global_rotation
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import rotations as rotations_lib
from rotbits_jax.symmetries import transform


def randomly_rotated(model: models.Model, *, key: jax.Array) -> models.Model:
  """A model of the same function, rotated at random and rounded again.

  Haar rotations turn the segments of a sliced model, each by its own; those of a dense
  model with RMSNorm, all by one; and where a dense model's residual stream cannot be
  rotated (LayerNorm, or a head that is the embedding), the attention heads: the values,
  and without RoPE queries and keys.

  Args:
    model: the model; structured leaves are materialized.
    key: from `jax.random.key`.

  Returns:
    The rotated model, in the formats it had, with NumPy arrays.
  """
  step = transform.Transform('rotation', functools.partial(_rotated, key=key))
  return transform.run_chain((step,), model)[0]


def _rotated(
  model: models.Model, *, key: jax.Array
) -> tuple[models.Model, list[transform.Note]]:
  config = model.config
  model = model.materialize(but=(structured.FactorPair,))
  if config.sliced:
    widths = config.segment_widths
    keys = jax.random.split(key, len(widths))
    rotations = jax.device_get(list(map(jax.random.orthogonal, keys, widths)))
    return rotations_lib.rotate(model, rotations), []
  if config.norm == 'rmsnorm' and not config.tied_head:
    model = global_rotation.without_norm_scales(model)
    rotation = np.asarray(jax.random.orthogonal(key, config.hidden_size))
    return rotations_lib.rotate(model, [rotation] * len(config.segment_widths)), []
  params = dict(model.materialize().params)
  for group, size in enumerate(model.group_sizes):
    name, shape = f'blocks_{group}', (size, config.num_kv_heads)
    for kind, rotate in _HEADS.items():
      if kind == 'value' or not config.rotary_dim:
        key, this = jax.random.split(key)
        rotations = jax.random.orthogonal(this, config.head_dim, shape)
        params[name] = jax.device_get(rotate(params[name], rotations))
  return dataclasses.replace(model, params=params), []


_HEADS = {
  'value': jax.jit(jax.vmap(heads.rotate_values)),
  'key': jax.jit(jax.vmap(heads.rotate_keys)),
}

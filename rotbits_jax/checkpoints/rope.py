"""The attributes of `config.json` that tell the heads, and how RoPE rotates them."""

from typing import Any

from rotbits_jax import models
from rotbits_jax.checkpoints import attributes
from rotbits_jax.checkpoints import errors


def head_dim(config: attributes.Attributes) -> int:
  """Returns the width of a head."""
  if config.take('head_dim', None) is not None:
    return config.size('head_dim')
  hidden, heads = config.size('hidden_size'), config.size('num_attention_heads')
  if hidden % heads:
    raise errors.CheckpointError(
      f'{config.where}: num_attention_heads {heads} does not divide '
      f'hidden_size {hidden}'
    )
  return hidden // heads


def positions(config: attributes.Attributes, factor: float | None) -> dict[str, Any]:
  """Reads the settings of RoPE.

  transformers 5 has all settings in `rope_parameters`. Earlier versions have the
  settings of the scaling in `rope_scaling`, and the other settings beside it. If both
  have one, it must be the same: versions of transformers differ in which of two they
  take.

  Args:
    config: the attributes of `config.json`.
    factor: the part of a head that RoPE rotates, if no attribute sets it; None if
      transformers rotates the whole head whatever an attribute says.

  Returns:
    The fields of `models.ModelConfig` that are RoPE's.
  """
  settings = config
  gathered = config.take('rope_parameters', None) is not None
  if gathered:
    config.require(rope_scaling=None)
  if gathered or config.take('rope_scaling', None) is not None:
    name = 'rope_parameters' if gathered else 'rope_scaling'
    settings = attributes.Attributes(config.take(name), f'{config.where}: {name}')
  scaling = None if settings is config else _scaling(settings, config)
  theta = settings.number('rope_theta', config.take('rope_theta', 10000.0))
  config.require(rope_theta=theta)
  if factor is None:
    for attributes_with_factor in (config, settings):
      attributes_with_factor.require(partial_rotary_factor=1.0)
    factor = 1.0
  else:
    factor = config.take('partial_rotary_factor', factor)
    factor = settings.number('partial_rotary_factor', factor)
    config.require(partial_rotary_factor=factor)
  if settings is not config:
    settings.finish()
  rotary_dim = int(head_dim(config) * min(factor, 1))
  if factor > 1 or rotary_dim % 2 or rotary_dim == 0:
    settings.refuse(
      'partial_rotary_factor', factor, 'a part of the head with an even, positive width'
    )
  return {'rope_theta': theta, 'rotary_dim': rotary_dim, 'rope_scaling': scaling}


def _scaling(
  settings: attributes.Attributes, config: attributes.Attributes
) -> models.RopeScaling | None:
  older = settings.take('type', 'default')
  found = settings.choice('rope_type', ('default', 'linear', 'llama3'), older)
  settings.require(type=found)
  if found == 'default':
    return None
  factor = settings.number('factor')
  if found == 'linear':
    return models.RopeScaling(type_name='linear', factor=factor)
  original = settings.size('original_max_position_embeddings')
  if config.take('original_max_position_embeddings', None) is not None:
    # Versions of transformers differ in which of two they take.
    config.require(original_max_position_embeddings=original)
  return models.RopeScaling(
    type_name='llama3',
    factor=factor,
    low_freq_factor=settings.number('low_freq_factor'),
    high_freq_factor=settings.number('high_freq_factor'),
    original_positions=original,
  )

"""The attributes of `config.json` that several families share.

Each function reads some of them and makes fields of a `models.ModelConfig`.
"""

from typing import Any

from rotbits_jax import models
from rotbits_jax.checkpoints import attributes
from rotbits_jax.checkpoints import rope as rope_lib

MOST_LAYERS = 1 << 12
"""A bound for layers, because a config is read before tensors bound their number."""


def rotary_gated(config: attributes.Attributes, **switches: Any) -> models.ModelConfig:
  """Makes the config of a family that resembles Llama.

  Args:
    config: the attributes of `config.json`.
    switches: see `rotary`.
  """
  return rotary(
    config,
    activation=activation(config, 'hidden_act', 'silu'),
    gated_mlp=True,
    norm='rmsnorm',
    norm_eps=norm_eps(config),
    tied_head=config.boolean('tie_word_embeddings', False),
    **switches,
  )


def rotary(
  config: attributes.Attributes,
  rotary_factor: float | None = None,
  **switches: Any,
) -> models.ModelConfig:
  """Makes the config of a family with rotary positions.

  Args:
    config: the attributes of `config.json`.
    rotary_factor: see `rope.positions`.
    switches: the fields in which the family differs from others.
  """
  heads = config.size('num_attention_heads')
  return decoder(
    config,
    intermediate_size=config.size('intermediate_size'),
    num_kv_heads=config.size('num_key_value_heads', heads),
    max_positions=config.size('max_position_embeddings', 2048),
    **rope_lib.positions(config, rotary_factor),
    **switches,
  )


def decoder(config: attributes.Attributes, **fields: Any) -> models.ModelConfig:
  """Makes a config from the attributes that all families have, and further fields."""
  hidden = config.size('hidden_size')
  layers = config.size('num_hidden_layers', most=MOST_LAYERS)
  segments = layers if fields.get('parallel_block') else 2 * layers
  return models.ModelConfig(
    hidden_size=hidden,
    num_layers=layers,
    num_heads=config.size('num_attention_heads'),
    head_dim=rope_lib.head_dim(config),
    vocab_size=config.size('vocab_size'),
    segment_widths=(hidden,) * (segments + 1),
    **fields,
  )


def require_full_attention(config: attributes.Attributes) -> None:
  """Refuses a Qwen with a window in some layers."""
  config.demand('max_position_embeddings', 'num_key_value_heads')
  config.require(use_sliding_window=False)
  for unused in ('sliding_window', 'max_window_layers'):
    config.take(unused, None)
  types = config.take('layer_types', None)
  full = ['full_attention'] * config.size('num_hidden_layers', most=MOST_LAYERS)
  if types is not None and types != full:
    config.refuse('layer_types', types, "'full_attention' for every layer")


def norm_eps(config: attributes.Attributes) -> float:
  return config.number('rms_norm_eps', 1e-6)


def sliding_window(config: attributes.Attributes) -> int | None:
  if config.take('sliding_window', None) is None:
    return None
  return config.size('sliding_window')


def activation(config: attributes.Attributes, name: str, default: str) -> Any:
  known = ('relu', 'gelu_new', 'gelu_pytorch_tanh', 'silu')
  found = config.choice(name, known, default)
  return 'gelu_new' if found == 'gelu_pytorch_tanh' else found  # two names of one

"""The models in the table of the bits-back paper: their sizes and the paper's figures.

Reference: Getting Free Bits Back from Rotational Symmetries in LLMs, arXiv 2410.01309.
"""

from typing import NamedTuple

from rotbits_jax import checkpoints
from rotbits_jax import models


class Published(NamedTuple):
  """A published model with the figures of the paper.

  Attributes:
    config: config of the dense model.
    bits_back: the paper's reduction in percent, by the sparsity of slicing.
  """

  config: models.ModelConfig
  bits_back: dict[float, float]


def _opt(hidden: int, layers: int, heads: int) -> models.ModelConfig:
  return checkpoints.parse_config(
    {
      'model_type': 'opt',
      'hidden_size': hidden,
      'ffn_dim': 4 * hidden,
      'num_hidden_layers': layers,
      'num_attention_heads': heads,
      'vocab_size': 50272,
      'max_position_embeddings': 2048,
      'activation_function': 'relu',
      'word_embed_proj_dim': hidden,
      'tie_word_embeddings': True,
    }
  )


def _llama_2(hidden: int, mlp: int, layers: int, heads: int) -> models.ModelConfig:
  return checkpoints.parse_config(
    {
      'model_type': 'llama',
      'hidden_size': hidden,
      'intermediate_size': mlp,
      'num_hidden_layers': layers,
      'num_attention_heads': heads,
      'vocab_size': 32000,
      'max_position_embeddings': 4096,
      'rms_norm_eps': 1e-5,
      'tie_word_embeddings': False,
    }
  )


MODELS: dict[str, Published] = {
  'opt-1.3b': Published(_opt(2048, 24, 32), {0.2: 13.77, 0.25: 18.61, 0.3: 23.81}),
  'opt-2.7b': Published(_opt(2560, 32, 32), {0.2: 13.84, 0.25: 19.09, 0.3: 24.43}),
  'opt-6.7b': Published(_opt(4096, 32, 32), {0.2: 14.07, 0.25: 19.29, 0.3: 24.84}),
  'opt-13b': Published(_opt(5120, 40, 40), {0.2: 14.01, 0.25: 19.51, 0.3: 24.97}),
  'llama-2-7b': Published(
    _llama_2(4096, 11008, 32, 32), {0.2: 14.13, 0.25: 19.53, 0.3: 25.09}
  ),
  'llama-2-13b': Published(_llama_2(5120, 13824, 40, 40), {}),
}

"""The experiments of the bits-back paper, arXiv 2410.01309.

  rotbits encode SLICED --config=published:opt-6.7b

`MODELS` has the dense models, and `REDUCTIONS` what the paper saves of each.
"""

from typing import Any

import ml_collections


def _opt(hidden_size: int, num_layers: int, num_heads: int) -> dict[str, Any]:
  return {
    'model_type': 'opt',
    'hidden_size': hidden_size,
    'ffn_dim': 4 * hidden_size,
    'num_hidden_layers': num_layers,
    'num_attention_heads': num_heads,
    'vocab_size': 50272,
    'max_position_embeddings': 2048,
  }


def _llama(hidden_size: int, mlp_size: int, num_layers: int) -> dict[str, Any]:
  return {
    'model_type': 'llama',
    'hidden_size': hidden_size,
    'intermediate_size': mlp_size,
    'num_hidden_layers': num_layers,
    'num_attention_heads': hidden_size // 128,
    'vocab_size': 32000,
    'max_position_embeddings': 4096,
    'rms_norm_eps': 1e-05,
  }


MODELS = {
  'opt-1.3b': _opt(2048, 24, 32),
  'opt-2.7b': _opt(2560, 32, 32),
  'opt-6.7b': _opt(4096, 32, 32),
  'opt-13b': _opt(5120, 40, 40),
  'llama-2-7b': _llama(4096, 11008, 32),
  'llama-2-13b': _llama(5120, 13824, 40),
}
SPARSITIES = 0.2, 0.25, 0.3  # for which there are reductions, in percent
REDUCTIONS = {
  'opt-1.3b': (13.77, 18.61, 23.81),
  'opt-2.7b': (13.84, 19.09, 24.43),
  'opt-6.7b': (14.07, 19.29, 24.84),
  'opt-13b': (14.01, 19.51, 24.97),
  'llama-2-7b': (14.13, 19.53, 25.09),
}


def get_config(model: str = 'opt-6.7b') -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      'preset': 'paper',
      'canonicalizer': 'svd',
      'rotation_codec': 'symmetric_eig',
      'correction': 'threshold',
      'experiment': {'model': MODELS[model], 'reductions': REDUCTIONS.get(model, ())},
    }
  )

"""Llama-2-7B of the bits-back paper: sliced by 20, 25 or 30%, coded as published.

  rotbits accounting --config=llama_2_7b:0.25
  rotbits slice --model=Llama-2-7B --output=sliced --sparsity=0.25 --calibration=FILE
  rotbits encode --config=llama_2_7b:0.25 --checkpoint=sliced --output=FILE

`model` has the fields of the dense model's config.json. `published` has the paper's
reductions in percent, by the part of the hidden size that slicing removes.

Reference: arXiv 2410.01309.
"""

import ml_collections


def get_config(slicing: str = '0.25') -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      'preset': 'paper',
      'canonicalizer': 'svd',
      'rotation_codec': 'symmetric_eig',
      'correction': 'threshold',
      'experiment': {
        'name': 'llama-2-7b',
        'slicing': float(slicing),
        'model': {
          'model_type': 'llama',
          'hidden_size': 4096,
          'intermediate_size': 11008,
          'num_hidden_layers': 32,
          'num_attention_heads': 32,
          'vocab_size': 32000,
          'max_position_embeddings': 4096,
          'rms_norm_eps': 1e-05,
          'tie_word_embeddings': False,
        },
        'published': ((0.2, 14.13), (0.25, 19.53), (0.3, 25.09)),
      },
    }
  )

"""OPT-6.7B of the bits-back paper: sliced by 20, 25 or 30%, coded as published.

  rotbits accounting --config=opt_6_7b:0.25
  rotbits slice --model=OPT-6.7B --output=sliced --sparsity=0.25 --calibration=FILE
  rotbits encode --config=opt_6_7b:0.25 --checkpoint=sliced --output=FILE

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
        'name': 'opt-6.7b',
        'slicing': float(slicing),
        'model': {
          'model_type': 'opt',
          'hidden_size': 4096,
          'ffn_dim': 16384,
          'num_hidden_layers': 32,
          'num_attention_heads': 32,
          'vocab_size': 50272,
          'max_position_embeddings': 2048,
          'activation_function': 'relu',
          'word_embed_proj_dim': 4096,
          'tie_word_embeddings': True,
        },
        'published': ((0.2, 14.07), (0.25, 19.29), (0.3, 24.84)),
      },
    }
  )

"""OPT-1.3B of the bits-back paper: sliced by 20, 25 or 30%, coded as published.

  rotbits accounting --config=opt_1_3b:0.25
  rotbits slice --model=OPT-1.3B --output=sliced --sparsity=0.25 --calibration=FILE
  rotbits encode --config=opt_1_3b:0.25 --checkpoint=sliced --output=FILE

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
        'name': 'opt-1.3b',
        'slicing': float(slicing),
        'model': {
          'model_type': 'opt',
          'hidden_size': 2048,
          'ffn_dim': 8192,
          'num_hidden_layers': 24,
          'num_attention_heads': 32,
          'vocab_size': 50272,
          'max_position_embeddings': 2048,
          'activation_function': 'relu',
          'word_embed_proj_dim': 2048,
          'tie_word_embeddings': True,
        },
        'published': ((0.2, 13.77), (0.25, 18.61), (0.3, 23.81)),
      },
    }
  )

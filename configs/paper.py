"""Rotations by bits-back coding: the published scheme, made exact.

  rotbits encode CHECKPOINT --config=paper

`published` has the options of the paper.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      'preset': 'paper',
      'canonicalizer': 'polar_shortcut',
      'rotation_codec': 'haar',
      'correction': 'exact',
      'threshold': 1e-3,
      'entropy': False,
    }
  )

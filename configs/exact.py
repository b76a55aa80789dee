"""Entropy coding alone: every tensor comes back bit for bit.

  rotbits encode --config=exact --checkpoint=DIR --output=FILE

No number is changed, so the tolerance of the other presets has no use here.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict({'preset': 'exact'})

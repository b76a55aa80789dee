"""Nearly the same function in far fewer bytes: weights are rounded to coarse steps.

  rotbits encode CHECKPOINT --config=near

`step` is log2 of an array's step over its root mean square; `tolerance`: see `free`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict({'preset': 'near', 'step': -5.0, 'tolerance': 0.8})

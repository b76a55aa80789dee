"""Nearly the same function in far fewer bytes: numbers are rounded to coarse steps.

  rotbits encode --config=near --checkpoint=DIR --output=FILE

`step` is log2 of the step over the root mean square of the numbers of an array, and
`tolerance` that of `free`. A field is overridden by `--config.step=-6.0`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict({'preset': 'near', 'step': -5.0, 'tolerance': 0.7})

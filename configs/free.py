"""The residual gauge removed, the rest entropy-coded: the same function, fewer bytes.

  rotbits encode --config=free --checkpoint=DIR --output=FILE

`tolerance`, in units of the storage format's roundoff, says how far from 1 a
shortcut's singular value may be and still count as 1. `floor`, in octaves, makes the
step that small numbers share coarser. A field is overridden by `--config.floor=-1.0`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict({'preset': 'free', 'tolerance': 0.7, 'floor': 0.0})

"""All gauges removed, the rest entropy-coded: the same function in fewer bytes.

  rotbits encode CHECKPOINT --config=free

`tolerance`: how far from 1 a singular value may be that counts as 1, in roundoffs.
`floor`: octaves by which the step of small elements is coarser. To override a field:
`--config.floor=-1.0`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict({'preset': 'free', 'tolerance': 0.8, 'floor': 0.0})

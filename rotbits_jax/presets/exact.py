"""The preset `exact`, which keeps every bit of the input."""

from rotbits_jax import passes
from rotbits_jax.presets.preset import Preset


def exact(*, transforms: tuple[passes.Transform, ...] = ()) -> Preset:
  """Makes the preset that keeps every bit of the input.

  If the embedding can be predicted from the head, it is stored as the difference from
  the prediction, in small integers. Further transforms are applied before, and see the
  elements in their stored dtype; with them, only the function is promised.
  """
  return Preset(
    name='exact',
    options={},
    # It comes last, because the embedding is predicted from the final head.
    transform=passes.chain(*transforms, passes.retie_exactly()),
    rounding=None,
    keeps='function' if transforms else 'bits',
    resumable=not transforms,
  )

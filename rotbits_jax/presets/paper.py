"""The preset `paper`: the published scheme, see `rotbits_jax.paper`."""

import functools
from typing import Literal

from rotbits_jax import paper as scheme
from rotbits_jax import passes
from rotbits_jax.presets.preset import MessageCodec
from rotbits_jax.presets.preset import Preset
from rotbits_jax.presets.preset import check_finite


def paper(
  *,
  canonicaliser: scheme.Canonicaliser = 'polar_shortcut',
  rotation_codec: scheme.RotationCodec = 'haar',
  correction: Literal['exact', 'threshold'] = 'exact',
  threshold: float = 1e-3,
  entropy: bool = False,
) -> Preset:
  """Makes the preset of the published scheme.

  The model is rotated and rounded, so its elements change, but not its function up to
  rounding. Bits of the message choose the rotations, and the decoder gets them back.
  Dense models are refused, because they have no shortcuts.

  Args:
    canonicaliser: how the decoder recovers a rotation; svd as published.
    rotation_codec: how a rotation is sampled; symmetric_eig as published.
    correction: which errors of the elements from which rotations were sampled are
      corrected: all, or as published those above the threshold.
    threshold: the greatest error that is left in with `correction='threshold'`.
    entropy: whether elements are entropy coded.

  Returns:
    The preset.

  Raises:
    ValueError: if an option is unknown, or if two options cannot be combined.
  """
  if correction not in ('exact', 'threshold'):
    raise ValueError(f'correction must be exact or threshold, got {correction!r}')
  threshold = check_finite('threshold', threshold, least=0)
  options = scheme.Options(
    canonicaliser=canonicaliser,
    rotation_codec=rotation_codec,
    threshold=threshold if correction == 'threshold' else None,
    entropy=entropy,
  ).check()
  return Preset(
    name='paper',
    options={
      'canonicaliser': canonicaliser,
      'rotation_codec': rotation_codec,
      'correction': correction,
      'threshold': threshold,
      'entropy': entropy,
    },
    transform=passes.chain(passes.Transform('rotations')),
    rounding=None,  # the scheme rounds the rotated elements itself
    message=MessageCodec(
      refuse=functools.partial(scheme.refuse, options=options),
      encode=functools.partial(scheme.encode, options=options),
    ),
  )

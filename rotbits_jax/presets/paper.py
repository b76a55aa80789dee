"""The preset `paper`: the published scheme, see `rotbits_jax.paper`."""

from rotbits_jax import paper as scheme
from rotbits_jax import passes
from rotbits_jax.presets.preset import Preset
from rotbits_jax.system import schema


def paper(
  *,
  canonicalizer: scheme.Canonicalizer = 'polar_shortcut',
  rotation_codec: scheme.RotationCodec = 'haar',
  correction: scheme.CorrectionMethod = 'exact',
  threshold: float = 1e-3,
  entropy: bool = False,
) -> Preset:
  """Makes the preset of the published scheme.

  The model is rotated and rounded, so its elements change, but not its function up to
  rounding. Dense models are refused, because they have no shortcuts. The arguments are
  those of `rotbits_jax.paper.Options`. As published: svd, symmetric_eig and threshold.
  """
  options = schema.load(
    scheme.Options,
    {
      'canonicalizer': canonicalizer,
      'rotation_codec': rotation_codec,
      'correction': correction,
      'threshold': threshold,
      'entropy': entropy,
    },
  )
  return Preset(
    name='paper',
    options=schema.dump(options),
    transform=passes.chain(),  # the scheme rotates and rounds by itself
    rounding=None,
    coder=scheme.CODER,
  )

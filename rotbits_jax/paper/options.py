"""The options of the published scheme."""

import dataclasses
from typing import Annotated, Literal

Canonicalizer = Literal['polar_shortcut', 'qr', 'svd']
RotationCodec = Literal['haar', 'symmetric_eig']
CorrectionMethod = Literal['exact', 'threshold']


def _not_negative(value: float) -> str | None:
  """Says what is wrong with a threshold."""
  return None if value >= 0 else 'must not be negative'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The options of the scheme, as the file has them; see `presets.paper`.

  Attributes:
    canonicalizer: how a rotation is recovered.
    rotation_codec: how a rotation is sampled.
    correction: whether all errors of the elements from which rotations were sampled are
      corrected, or those above the threshold.
    threshold: the greatest error that is left in.
    entropy: whether elements are entropy coded.
  """

  canonicalizer: Canonicalizer
  rotation_codec: RotationCodec
  correction: CorrectionMethod
  threshold: Annotated[float, _not_negative]
  entropy: bool

  def __post_init__(self) -> None:
    """Raises a ValueError if two options cannot be combined."""
    # Errors are harmless only in weights that were pushed plain.
    if not self.exact and (self.rotation_codec != 'symmetric_eig' or self.entropy):
      raise ValueError('a threshold needs symmetric_eig and no entropy coding')

  @property
  def exact(self) -> bool:
    """Whether the decoder gets all elements bit for bit as they were pushed."""
    return self.correction == 'exact'

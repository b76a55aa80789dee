"""The options of the published scheme, and the frames that follow from them.

A frame is a matrix of k orthonormal columns in n dimensions, which is sampled for each
segment. A segment's rotation follows from its frame; see `paper`.
"""

from typing import Annotated, Literal, NamedTuple

import msgspec

from rotbits_jax.coding.bits_back import codes
from rotbits_jax.system import schema

Canonicalizer = Literal['polar_shortcut', 'qr', 'svd']
RotationCodec = Literal['haar', 'symmetric_eig']
CorrectionMethod = Literal['exact', 'threshold']


class Frame(NamedTuple):
  """The shape of a segment's sampled frame, and the source of its recovery."""

  from_shortcut: bool  # whether it is recovered from the shortcut or from the readers
  fixed: int  # number of leading coordinates that are not rotated
  n: int  # rows of the frame
  k: int  # columns of the frame


def lanes(widths: tuple[int, ...]) -> int:
  """Returns the number of lanes of the messages that rotations are sampled from."""
  # A message costs about 2 bytes a lane.
  return 1 << min(max(max(widths) ** 2 >> 11, 1), 1024).bit_length() - 1


class Options(schema.Object):
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
  threshold: Annotated[float, msgspec.Meta(ge=0)]
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

  def frame(self, widths: tuple[int, ...], segment: int, fixed: int) -> Frame:
    """Returns the frame of a segment, if `fixed` columns are pushed first."""
    width = widths[segment]
    if self.canonicalizer == 'polar_shortcut' and segment:
      before = widths[segment - 1]
      # `symmetric_eig` samples whole rotations only, no narrower frames.
      if before == width or (before < width and self.rotation_codec == 'haar'):
        return Frame(True, 0, width, before)
    fixed = 0 if segment else fixed
    return Frame(False, fixed, width - fixed, width - fixed)

  def code(self, frame: Frame) -> codes.RotationCode:
    """Returns the code of a frame."""
    if self.rotation_codec == 'haar':
      return codes.haar_code(frame.n, frame.k)
    threshold = None if self.exact else self.threshold
    return codes.eigen_code(frame.n, self.entropy, threshold)

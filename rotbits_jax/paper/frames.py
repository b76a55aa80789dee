"""The frame that is sampled for each segment, and the code of frames.

A frame is a matrix of k orthonormal columns in n dimensions. A segment's rotation
follows from its frame; see `paper`.
"""

from typing import NamedTuple

from rotbits_jax.coding.bits_back import codes
from rotbits_jax.paper import options as options_lib


class Frame(NamedTuple):
  """The shape of a segment's sampled frame, and the source of its recovery."""

  from_shortcut: bool  # whether it is recovered from the shortcut or from the readers
  fixed: int  # number of leading coordinates that are not rotated
  n: int  # rows of the frame
  k: int  # columns of the frame


def frame(
  widths: tuple[int, ...], segment: int, fixed: int, options: options_lib.Options
) -> Frame:
  """Returns the frame of a segment.

  Args:
    widths: widths of all segments.
    segment: index of the segment.
    fixed: number of columns of the embeddings that are pushed first.
    options: the options of the scheme.
  """
  width = widths[segment]
  if options.canonicalizer == 'polar_shortcut' and segment:
    before = widths[segment - 1]
    # `symmetric_eig` samples whole rotations only, no narrower frames.
    if before == width or (before < width and options.rotation_codec == 'haar'):
      return Frame(True, 0, width, before)
  fixed = 0 if segment else fixed
  return Frame(False, fixed, width - fixed, width - fixed)


def code(shape: Frame, options: options_lib.Options) -> codes.RotationCode:
  """Returns the code of a frame."""
  if options.rotation_codec == 'haar':
    return codes.haar_code(shape.n, shape.k)
  threshold = None if options.exact else options.threshold
  return codes.eigen_code(shape.n, options.entropy, threshold)


def lanes(widths: tuple[int, ...]) -> int:
  """Returns the number of lanes of the messages that rotations are sampled from."""
  # A message costs about 2 bytes a lane.
  return 1 << min(max(max(widths) ** 2 >> 11, 1), 1024).bit_length() - 1

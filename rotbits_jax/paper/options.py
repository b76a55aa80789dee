"""The options of the published scheme, and the frame that is sampled for each segment.

A frame is a matrix of k orthonormal columns in n dimensions. A segment's rotation
follows from its frame; see `paper`.
"""

import math
import typing
from typing import Literal, NamedTuple

from rotbits_jax.coding.bits_back import rotation_codes

Canonicaliser = Literal['polar_shortcut', 'qr', 'svd']
RotationCodec = Literal['haar', 'symmetric_eig']


class Options(NamedTuple):
  """The options of the scheme.

  Attributes:
    canonicaliser: how a rotation is recovered: 'svd' (as published), 'qr' or
      'polar_shortcut'.
    rotation_codec: how a rotation is sampled: 'symmetric_eig' (as published) or 'haar'.
    threshold: the greatest error that a number on the message may keep when a rotation
      is pushed back, as published; only with 'symmetric_eig'. None corrects all errors.
    entropy: whether numbers are entropy coded.
  """

  canonicaliser: Canonicaliser = 'polar_shortcut'
  rotation_codec: RotationCodec = 'haar'
  threshold: float | None = None
  entropy: bool = False

  def check(self) -> 'Options':
    """Returns the options after checking them.

    Raises:
      ValueError: if a value is unknown, or if two values cannot be combined.
    """
    for name, known in (
      ('canonicaliser', typing.get_args(Canonicaliser)),
      ('rotation_codec', typing.get_args(RotationCodec)),
      ('entropy', (False, True)),
    ):
      if (value := getattr(self, name)) not in known:
        names = ', '.join(map(str, known))
        raise ValueError(f'{name} must be one of {names}, got {value!r}')
    if self.threshold is None:
      return self
    if not isinstance(self.threshold, float) or not 0 <= self.threshold < math.inf:
      raise ValueError(
        f'a threshold must be a finite number, 0 or more, got {self.threshold!r}'
      )
    if self.rotation_codec != 'symmetric_eig' or self.entropy:
      # Errors are harmless only in weights that were pushed plain.
      raise ValueError('a threshold needs symmetric_eig and no entropy coding')
    return self


class Frame(NamedTuple):
  """The shape of a segment's sampled frame, and the source of its recovery."""

  from_shortcut: bool  # whether it is recovered from the shortcut or from the readers
  fixed: int  # number of leading coordinates that are not rotated
  n: int  # rows of the frame
  k: int  # columns of the frame


def frame(widths: tuple[int, ...], segment: int, fixed: int, options: Options) -> Frame:
  """Returns the frame of a segment.

  Args:
    widths: widths of all segments.
    segment: index of the segment.
    fixed: number of columns of the embeddings that are pushed first.
    options: the options of the scheme.
  """
  width = widths[segment]
  if options.canonicaliser == 'polar_shortcut' and segment:
    before = widths[segment - 1]
    # `symmetric_eig` samples whole rotations only, no narrower frames.
    if before == width or (before < width and options.rotation_codec == 'haar'):
      return Frame(True, 0, width, before)
  fixed = 0 if segment else fixed
  return Frame(False, fixed, width - fixed, width - fixed)


def code(shape: Frame, options: Options) -> rotation_codes.RotationCode:
  """Returns the code of a frame."""
  if options.rotation_codec == 'haar':
    return rotation_codes.haar_code(shape.n, shape.k)
  return rotation_codes.symmetric_eig_code(shape.n, options.entropy, options.threshold)


def max_lanes(widths: tuple[int, ...]) -> int:
  """Returns the number of lanes of an encoder's window. A decoder accepts no more."""
  return 1 << min(max(max(widths) ** 2 >> 9, 1), 4096).bit_length() - 1


def capacity(widths: tuple[int, ...], lanes: int, options: Options) -> int:
  """Returns the capacity of a lane of the window, in words.

  It is twice the number of words that a rotation can take, because lanes from which
  less was popped than from others keep more words.
  """
  shapes = {frame(widths, t, 0, options) for t in range(len(widths))}
  return 2 * max(code(x, options).max_rows(lanes) for x in shapes) + 64

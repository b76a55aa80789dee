"""The parts of the scheme, and the frame that is sampled for each segment."""

import math
from typing import NamedTuple

from rotbits_jax.coding.bits_back import rotation_codes

CANONICALISERS = ('svd', 'qr', 'polar_shortcut')
ROTATION_CODECS = ('symmetric_eig', 'haar')


class Options(NamedTuple):
  """The parts of the scheme.

  Attributes:
    canonicaliser: 'svd' (as published), 'qr' or 'polar_shortcut'.
    rotation_codec: 'symmetric_eig' (as published) or 'haar'.
    threshold: with 'symmetric_eig', errors of the message up to this are left in, as
      published; None corrects all of them.
    entropy: whether numbers are entropy coded.
  """

  canonicaliser: str = 'polar_shortcut'
  rotation_codec: str = 'haar'
  threshold: float | None = None
  entropy: bool = False

  def check(self) -> 'Options':
    """Returns the options.

    Raises:
      ValueError: if a value is not known, or values do not go together.
    """
    for value, known in (
      (self.canonicaliser, CANONICALISERS),
      (self.rotation_codec, ROTATION_CODECS),
      (self.entropy, (False, True)),
    ):
      if value not in known:
        raise ValueError(f'an option must be one of {known}, got {value!r}')
    if self.threshold is None:
      return self
    if not isinstance(self.threshold, float) or not 0 <= self.threshold < math.inf:
      raise ValueError(f'a threshold is a number, got {self.threshold!r}')
    if self.rotation_codec != 'symmetric_eig' or self.entropy:
      # Errors are harmless in weights that are on the message as they are.
      raise ValueError('a threshold needs symmetric_eig, without entropy coding')
    return self


class Frame(NamedTuple):
  """Where a segment's rotation is recovered from, and the sampled frame's shape."""

  from_shortcut: bool
  fixed: int  # leading coordinates that are not rotated
  n: int
  k: int


def frame(widths: tuple[int, ...], segment: int, fixed: int, options: Options) -> Frame:
  """The frame of a segment.

  Args:
    widths: of all segments.
    segment: which one.
    fixed: columns of the embeddings that are pushed first.
    options: the parts of the scheme.
  """
  width = widths[segment]
  if options.canonicaliser == 'polar_shortcut' and segment:
    before = widths[segment - 1]
    # The eigenvectors of a matrix are never part of a frame.
    if before == width or (before < width and options.rotation_codec == 'haar'):
      return Frame(True, 0, width, before)
  fixed = 0 if segment else fixed
  return Frame(False, fixed, width - fixed, width - fixed)


def code(shape: Frame, options: Options) -> rotation_codes.RotationCode:
  """The code of a frame."""
  if options.rotation_codec == 'haar':
    return rotation_codes.haar_code(shape.n, shape.k)
  return rotation_codes.symmetric_eig_code(shape.n, options.entropy, options.threshold)


def max_lanes(widths: tuple[int, ...]) -> int:
  """How many lanes the window has when rotations are sampled."""
  return 1 << min(max(max(widths) ** 2 >> 9, 1), 4096).bit_length() - 1


def capacity(widths: tuple[int, ...], lanes: int, options: Options) -> int:
  """Words that a lane of the window has room for.

  Twice what a rotation can take: lanes that lost less than others stay ahead.
  """
  shapes = {frame(widths, t, 0, options) for t in range(len(widths))}
  return 2 * max(code(x, options).max_rows(lanes) for x in shapes) + 64

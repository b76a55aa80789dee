"""The options of the scheme and the values that a decoder needs, validated.

A frame is a matrix of k orthonormal columns in n dimensions, which is sampled for each
segment. A segment's rotation follows from its frame; see `paper`.
"""

import collections
import math
from typing import Annotated, Literal, NamedTuple

import jax.numpy as jnp
import msgspec

from rotbits_jax import models
from rotbits_jax.coding import specs
from rotbits_jax.coding.bits_back import codes
from rotbits_jax.paper import segments
from rotbits_jax.system import schema

Canonicalizer = Literal['polar_shortcut', 'qr', 'svd']
RotationCodec = Literal['haar', 'symmetric_eig']
CorrectionMethod = Literal['exact', 'threshold']
Dtype = Literal['float16', 'bfloat16', 'float32']

STREAMS = 'message', 'corrections'
"""The names of the streams."""

_SPARE = 1 << 16  # integers of a rotation, because coding makes small arrays longer


class Frame(NamedTuple):
  """The shape of a segment's sampled frame, and the source of its recovery."""

  from_shortcut: bool  # whether it is recovered from the shortcut or from the readers
  n: int  # rows of the frame; leading coordinates beyond them are not rotated
  k: int  # columns of the frame


def lanes(widths: tuple[int, ...]) -> int:
  """Returns the lanes of messages to sample from; one has at most 2^11 integers."""
  return 1 << max(max(widths) ** 2 >> 11, 1).bit_length() - 1


class Options(schema.Object):
  """The options of the scheme, as the file has them; see `presets.paper`."""

  canonicalizer: Canonicalizer  # how a rotation is recovered
  rotation_codec: RotationCodec  # how a rotation is sampled
  correction: CorrectionMethod  # of the elements from which rotations were sampled
  threshold: Annotated[float, msgspec.Meta(ge=0, le=1)]  # of errors that may be left in
  entropy: bool  # whether elements are entropy coded

  def __post_init__(self) -> None:
    """Raises a ValueError if two options cannot be combined."""
    if self.rotation_codec == 'symmetric_eig' and self.entropy:
      raise ValueError('symmetric_eig takes plain elements, without entropy coding')
    if self.rotation_codec == 'haar' and not self.exact:
      raise ValueError('a threshold needs symmetric_eig')

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
        return Frame(True, width, before)
    rotated = width if segment else width - fixed
    return Frame(False, rotated, rotated)

  def code(self, frame: Frame) -> codes.RotationCode:
    """Returns the code of a frame."""
    if self.rotation_codec == 'haar':
      return codes.haar_code(frame.n, frame.k)
    threshold = None if self.exact else self.threshold
    return codes.eigen_code(frame.n, threshold)


class Stored(schema.Row):
  """The dtype and the CRC-32 of an array, known before it is decoded."""

  dtype: Dtype
  digest: schema.Crc32

  def num_words(self, shape: tuple[int, ...]) -> int:
    """Returns how many 16-bit words the elements of an array of this shape have."""
    return math.prod(shape) * jnp.dtype(self.dtype).itemsize // 2


class MessageLayout(schema.Object):
  """The values that a decoder needs besides config and options."""

  fixed: schema.Size  # number of columns of the embeddings that are pushed first
  sampled: tuple[bool, ...]  # for each segment, whether its rotation was sampled
  arrays: dict[str, Stored]  # dtype and digest of each parameter, by path
  # In the order of encoding: of the first columns and the arrays of each segment, if
  # they are entropy coded, and of the correction of each sampled segment.
  coders: tuple[specs.StreamSpec, ...] = ()

  def record_bytes(self, config: models.ModelConfig) -> dict[str, int]:
    """Returns the bytes of each record; a ValueError for another config."""
    # A small file may name millions of layers, so these are not listed first.
    is_long_enough = len(self.arrays) >= config.num_layers
    shapes = segments.all_shapes(config) if is_long_enough else {}
    if not is_long_enough or self.arrays.keys() != shapes.keys():
      raise ValueError('the layout has other parameters than the config')
    sizes: collections.Counter[str] = collections.Counter()
    for path, shape in shapes.items():
      sizes[path.partition('/')[0]] += 2 * self.arrays[path].num_words(shape)
    return sizes


def check(layout: MessageLayout, options: Options, config: models.ModelConfig) -> None:
  """Raises a ValueError if an untrusted layout does not fit the options and config."""
  if not config.sliced:
    raise ValueError('a dense model has no segments that can be rotated')
  words = sum(layout.record_bytes(config).values()) // 2
  widths = config.segment_widths
  if layout.fixed > widths[0] or len(layout.sampled) != len(widths):
    raise ValueError('the layout has other segments than the config')
  count = options.entropy * (len(widths) + 1) + sum(layout.sampled)
  if len(layout.coders) != count:
    raise ValueError(f'the layout has {len(layout.coders)} coders')
  for t in [t for t, sampled in enumerate(layout.sampled) if sampled]:
    frame = options.frame(widths, t, layout.fixed)
    if not frame.n:
      raise ValueError(f'segment {t} has no rotation to sample')
    # An integer takes 9 bits of the message or more.
    if options.code(frame).num_integers > 2 * words + _SPARE:
      raise ValueError(f'segment {t}: its arrays are too small for a rotation')

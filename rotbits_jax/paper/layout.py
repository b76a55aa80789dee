"""The values that a decoder needs besides config and options, and their validation."""

import collections
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax.coding import specs
from rotbits_jax.paper import options as options_lib
from rotbits_jax.paper import segments
from rotbits_jax.system import schema

Dtype = Literal['float16', 'bfloat16', 'float32']

# Integers of a rotation beyond those that arrays give, because the coder may make small
# arrays longer.
_SPARE = 1 << 16


class Stored(schema.Row):
  """The dtype and the CRC-32 of an array, known before it is decoded."""

  dtype: Dtype
  digest: schema.Crc32

  def num_words(self, shape: tuple[int, ...]) -> int:
    """Returns how many 16-bit words the elements of an array of this shape have."""
    return math.prod(shape) * jnp.dtype(self.dtype).itemsize // 2


class MessageLayout(schema.Object):
  """The values that a decoder needs besides config and options.

  Attributes:
    fixed: number of columns of the embeddings that are pushed first.
    sampled: for each segment, whether its rotation was sampled.
    arrays: dtype and digest of each parameter, by path.
    coders: the specs of entropy-coded arrays: those of the first columns of the
      embeddings, then those of each segment; empty if arrays are pushed plain.
  """

  fixed: schema.Size
  sampled: tuple[bool, ...]
  arrays: dict[str, Stored]
  coders: tuple[specs.StreamSpec, ...] = ()

  def dtypes(self) -> dict[str, np.dtype]:
    """Returns the dtype of each parameter, by path."""
    return {path: jnp.dtype(x.dtype) for path, x in self.arrays.items()}

  def record_bytes(self, config: models.ModelConfig) -> dict[str, int]:
    """Returns the bytes of each record, by its name.

    Raises:
      ValueError: if the layout has other parameters than the config.
    """
    # A small file may name millions of layers.
    if len(self.arrays) < config.num_layers:
      raise ValueError('the layout has other parameters than the config')
    shapes = {
      k: x for segment in segments.shapes(config) for k, x in segment.all.items()
    }
    if self.arrays.keys() != shapes.keys():
      raise ValueError('the layout has other parameters than the config')
    sizes: collections.Counter[str] = collections.Counter()
    for path, shape in shapes.items():
      sizes[path.partition('/')[0]] += 2 * self.arrays[path].num_words(shape)
    return sizes


def check(
  layout: MessageLayout, options: options_lib.Options, config: models.ModelConfig
) -> None:
  """Raises a ValueError if an untrusted layout does not fit the options and config."""
  if not config.sliced:
    raise ValueError('a dense model has no segments that can be rotated')
  words = sum(layout.record_bytes(config).values()) // 2
  widths = config.segment_widths
  if layout.fixed > widths[0] or len(layout.sampled) != len(widths):
    raise ValueError('the layout has other segments than the config')
  if len(layout.coders) != options.entropy * (len(widths) + 1):
    raise ValueError(f'the layout has {len(layout.coders)} coders')
  for t in [t for t, sampled in enumerate(layout.sampled) if sampled]:
    frame = options.frame(widths, t, layout.fixed)
    if not frame.n:
      raise ValueError(f'segment {t} has no rotation to sample')
    # An integer takes 9 bits of the message or more.
    if options.code(frame).num_integers > 2 * words + _SPARE:
      raise ValueError(f'segment {t}: its arrays are too small for a rotation')

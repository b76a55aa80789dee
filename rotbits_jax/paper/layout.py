"""The values that a decoder needs beside the config, as JSON, and their validation."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from rotbits_jax import models
from rotbits_jax.coding import weights
from rotbits_jax.paper import options as options_lib
from rotbits_jax.paper import segments
from rotbits_jax.system import schema

DTYPES = 'float16', 'bfloat16', 'float32'


class Stored(NamedTuple):
  """The dtype and the digest of an array, known before it is decoded."""

  dtype: str
  digest: int  # CRC-32 of its bytes in C order


class Layout(NamedTuple):
  """The values that a decoder needs beside the config.

  Attributes:
    options: the options of the scheme.
    lanes: number of lanes of the messages that rotations are sampled from, a power
      of 2.
    fixed: number of columns of the embeddings that are pushed first.
    sampled: for each segment, whether its rotation was sampled.
    arrays: all parameters by path, in the order of `segments.parts`.
    coders: the specs of entropy-coded arrays: those of the first columns of the
      embeddings, then those of each segment; empty if arrays are pushed plain.
  """

  options: options_lib.Options
  lanes: int
  fixed: int
  sampled: tuple[bool, ...]
  arrays: dict[str, Stored]
  coders: tuple[weights.StreamSpec, ...]

  def to_json(self) -> dict[str, Any]:
    """Returns the layout as JSON values."""
    return self._asdict() | {
      'options': self.options._asdict(),
      'sampled': list(self.sampled),
      'arrays': {path: list(stored) for path, stored in self.arrays.items()},
      'coders': schema.dump(self.coders),
    }

  def frame(self, config: models.ModelConfig, segment: int) -> options_lib.Frame:
    """Returns the frame of a segment."""
    return options_lib.frame(config.segment_widths, segment, self.fixed, self.options)

  def num_tables(self, config: models.ModelConfig) -> int:
    """Returns the number of frequency tables in the stream `tables`."""
    return sum(
      options_lib.code(self.frame(config, t), self.options).num_tables
      for t, sampled in enumerate(self.sampled)
      if sampled
    )


def from_json(value: Any, config: models.ModelConfig, words: int) -> Layout:
  """Makes a layout from JSON values: the inverse of `Layout.to_json`.

  Args:
    value: the JSON values, which may come from an untrusted file.
    config: config of the model.
    words: number of words of the message.

  Returns:
    The layout.

  Raises:
    ValueError: if the values are not a layout that fits the config and the message.
  """
  if not config.sliced:
    raise ValueError('a dense model has no segments that can be rotated')
  fields = _fields(value, Layout._fields)
  names = options_lib.Options._fields
  options = options_lib.Options(**_fields(fields['options'], names)).check()
  widths = config.segment_widths
  lanes = _integer(fields['lanes'], 'lanes', 1, options_lib.max_lanes(widths))
  if lanes & (lanes - 1):
    raise ValueError(f'lanes must be a power of 2, got {lanes}')
  fixed = _integer(fields['fixed'], 'fixed', 0, widths[0])
  sampled = _list(fields['sampled'], 'sampled', len(widths))
  if not all(isinstance(x, bool) for x in sampled):
    raise ValueError('sampled must be a list of true and false')
  coders = _list(fields['coders'], 'coders', options.entropy * (len(widths) + 1))
  layout = Layout(
    options=options,
    lanes=lanes,
    fixed=fixed,
    sampled=tuple(sampled),
    arrays=_arrays(fields['arrays'], config),
    coders=tuple(schema.load(weights.StreamSpec, x, 'coders') for x in coders),
  )
  # The message holds the words of all arrays without those that rotations are made of.
  held = sum(-(-coder.nbytes // 2) for coder in layout.coders)
  if not options.entropy:
    held = sum(num_words(x.dtype, shape) for x, shape in _each(layout.arrays, config))
  for t in [t for t, x in enumerate(sampled) if x]:
    shape = layout.frame(config, t)
    if not shape.n:
      raise ValueError(f'segment {t} has no rotation to sample')
    held -= lanes * options_lib.code(shape, options).max_rows(lanes)
  if words < held:
    raise ValueError(f'the message must have {held} words or more, got {words}')
  return layout


def _fields(value: Any, names: tuple[str, ...]) -> dict[str, Any]:
  if not isinstance(value, dict) or set(value) != set(names):
    raise ValueError(f'a layout must have exactly the fields {", ".join(names)}')
  return value


def _list(value: Any, name: str, size: int) -> list[Any]:
  if not isinstance(value, list) or len(value) != size:
    raise ValueError(f'{name} must be a list of {size} entries')
  return value


def _integer(value: Any, name: str, least: int, most: int) -> int:
  if not isinstance(value, int) or isinstance(value, bool):
    raise ValueError(f'{name} must be an integer, got {value!r:.40}')
  if not least <= value <= most:
    raise ValueError(f'{name} must be from {least} to {most}, got {value}')
  return value


def _arrays(value: Any, config: models.ModelConfig) -> dict[str, Stored]:
  paths = [path for part in segments.parts(config) for path in part.all]
  stored = {}
  for path, entry in _fields(value, tuple(paths)).items():
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in DTYPES:
      raise ValueError(
        f'{path}: the entry must be a dtype and a digest, got {entry!r:.80}'
      )
    digest = _integer(entry[1], f'{path}: the digest', 0, 0xFFFFFFFF)
    stored[path] = Stored(entry[0], digest)
  return {path: stored[path] for path in paths}


def _each(
  arrays: dict[str, Stored], config: models.ModelConfig
) -> list[tuple[Stored, tuple[int, ...]]]:
  return [
    (arrays[path], shape)
    for part in segments.parts(config)
    for path, shape in part.all.items()
  ]


def num_words(dtype: str, shape: tuple[int, ...]) -> int:
  """Returns how many 16-bit words the elements of an array have."""
  return math.prod(shape) * jnp.dtype(dtype).itemsize // 2

"""The values that a decoder needs beside the config, as JSON, and their validation."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax.coding.weights import floats
from rotbits_jax.paper import options as options_lib
from rotbits_jax.paper import segments

DTYPES = tuple(dtype.name for dtype in floats.LAYOUTS)
ALPHABET = max(layout.alphabet for layout in floats.LAYOUTS.values())


class Stored(NamedTuple):
  """The dtype and the digest of an array, known before it is decoded."""

  dtype: str
  digest: int  # CRC-32 of its bytes in C order


class Layout(NamedTuple):
  """The values that a decoder needs beside the config.

  Attributes:
    options: the options of the scheme.
    lanes: number of lanes of the window, a power of 2.
    fixed: number of columns of the embeddings that are pushed first.
    window: number of words at the end of the message that hold the window.
    rows: for each segment, the number of rows that were moved to the window; None if
      its rotation was not sampled.
    arrays: all parameters by path, in the order of `segments.parts`.
  """

  options: options_lib.Options
  lanes: int
  fixed: int
  window: int
  rows: tuple[int | None, ...]
  arrays: dict[str, Stored]

  def to_json(self) -> dict[str, Any]:
    """Returns the layout as JSON values."""
    return self._asdict() | {
      'options': self.options._asdict(),
      'rows': list(self.rows),
      'arrays': {path: list(stored) for path, stored in self.arrays.items()},
    }

  def frame(self, config: models.ModelConfig, segment: int) -> options_lib.Frame:
    """Returns the frame of a segment."""
    return options_lib.frame(config.segment_widths, segment, self.fixed, self.options)

  def num_tables(self, config: models.ModelConfig) -> int:
    """Returns the number of frequency tables in the stream `tables`."""
    count = len(self.arrays) + _num_embeddings(config) if self.options.entropy else 0
    for t, rows in enumerate(self.rows):
      if rows is not None:
        count += options_lib.code(self.frame(config, t), self.options).num_tables
    return count


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
  rows = fields['rows']
  if not isinstance(rows, list) or len(rows) != len(widths):
    raise ValueError(f'rows must be a list of {len(widths)} entries')
  layout = Layout(
    options=options,
    lanes=lanes,
    fixed=fixed,
    window=_integer(fields['window'], 'window', 0, words),
    rows=tuple(x if x is None else _integer(x, 'rows', 0, words) for x in rows),
    arrays=_arrays(fields['arrays'], config),
  )
  if layout.window and all(x is None for x in rows):
    raise ValueError('there is a window, but no rotation was sampled')
  for t, moved in enumerate(rows):
    if moved is not None and not layout.frame(config, t).n:
      raise ValueError(f'segment {t} has no rotation to sample')
  # The stack holds the words of all arrays minus the rows that were moved to the
  # window. Entropy-coded arrays take at least the words of their rests.
  size = _least_words if options.entropy else _words
  held = sum(size(x, shape) for x, shape in _each(layout.arrays, config))
  moved = [x for x in rows if x is not None]
  held -= lanes * (sum(moved) + bool(moved))
  found = words - layout.window
  if found < held or (found > held and not options.entropy):
    raise ValueError(f'the message must have {held} words, got {found}')
  return layout


def _fields(value: Any, names: tuple[str, ...]) -> dict[str, Any]:
  if not isinstance(value, dict) or set(value) != set(names):
    raise ValueError(f'a layout must have exactly the fields {", ".join(names)}')
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


def _words(stored: Stored, shape: tuple[int, ...]) -> int:
  return math.prod(shape) * jnp.dtype(stored.dtype).itemsize // 2


def _least_words(stored: Stored, shape: tuple[int, ...]) -> int:
  rest_bits = floats.LAYOUTS[jnp.dtype(stored.dtype)].rest_bits
  return math.prod(shape) * rest_bits // 16


def _num_embeddings(config: models.ModelConfig) -> int:
  """Returns the number of embeddings, which are pushed in two pieces each."""
  return sum(path.startswith('embed/') for path in segments.parts(config)[0].writers)


def padded(tables: list[np.ndarray]) -> np.ndarray:
  """Returns K frequency tables as rows of one array: int64 `[K, ALPHABET]`."""
  rows = [np.pad(row, (0, ALPHABET - row.size)) for row in tables]
  return np.stack(rows) if rows else np.zeros((0, ALPHABET), np.int64)

"""A sliced model as its residual segments, a few layers of it at a time."""

import functools
from typing import Any, NamedTuple, Protocol

import numpy as np

from rotbits_jax import models
from rotbits_jax import structured

Shapes = dict[str, tuple[int, ...]]  # by path, as in 'layers.3/attention/query/kernel'
Arrays = dict[str, np.ndarray]


class Source(Protocol):
  """A checkpoint or a model, of which one layer at a time is asked for."""

  @property
  def config(self) -> models.ModelConfig: ...

  def outer(self) -> models.Params: ...

  def layer(self, index: int, /) -> models.Params: ...


class Parts(NamedTuple):
  """The parameters around one residual segment: their shapes, by path.

  Every parameter is in one of the first four fields of one segment.
  """

  readers: Shapes  # [d, out]: what is multiplied by the segment, but the shortcut
  writers: Shapes  # [in, d] or [d]: what adds to it, but the shortcut
  shortcut: Shapes  # [d', d]: the one that leads into it, or none
  biases: Shapes  # the readers', which no rotation changes
  leaving: Shapes  # [d, d'']: the shortcut that leads out of it, or none

  @property
  def all(self) -> Shapes:
    """The parameters in the order in which they are pushed.

    The kernels come last, so that rotations are sampled from them, as published: the
    numbers of a shortcut are far greater than others, and so are the errors that a
    threshold leaves in numbers around them.
    """
    return self.shortcut | self.biases | self.readers | self.writers


def parts(config: models.ModelConfig) -> list[Parts]:
  """The segments of a sliced model in order."""
  found = [Parts({}, {}, {}, {}, {}) for _ in config.segment_widths]
  step, last = config.segments_per_layer, len(found) - 1
  outer = models.layout.outer_axes(config), models.outer_shapes(config)
  _add(found, '', *outer, first=0, last=last)
  for i in range(config.num_layers):
    layer = models.layout.layer_axes(config), models.layer_shapes(config, i)
    _add(found, f'layers.{i}/', *layer, first=i * step, last=(i + 1) * step)
  return found


def _add(
  found: list[Parts],
  prefix: str,
  axes: models.layout.Axes,
  shapes: dict[str, Any],
  *,
  first: int,
  last: int,
) -> None:
  """Adds one layer's parameters, or those outside, to the segments they belong to."""

  def segment(axis: models.layout.Axis) -> int | None:
    if not isinstance(axis, int):
      return None
    return last if axis == -1 else first + axis

  flat = structured.flatten(shapes)
  for path, own in axes.items():
    shape = {prefix + path: flat[path]}
    read, written = segment(own[0]), segment(own[-1])
    if len(own) == 1:
      # A bias: of what writes a segment, or of what reads it.
      kernel = axes[path.rsplit('/', 1)[0] + '/kernel']
      read = segment(kernel[0]) if written is None else None
    if read is not None and written is not None:
      found[read].leaving.update(shape)
      found[written].shortcut.update(shape)
    elif written is not None:
      found[written].writers.update(shape)
    elif read is not None:
      (found[read].biases if len(own) == 1 else found[read].readers).update(shape)


class Reader:
  """Takes parameters out of a source by their paths.

  Holds two layers at most, or one and the parameters outside.
  """

  def __init__(self, source: Source):
    def unit(index: int | None) -> dict[str, Any]:
      tree = source.outer() if index is None else source.layer(index)
      return structured.flatten(tree)

    self._unit = functools.lru_cache(2)(unit)

  def leaf(self, path: str) -> Any:
    """What the source has for a parameter; None if nothing."""
    unit, name = path.split('/', 1)
    if unit.startswith('layers.'):
      return self._unit(int(unit.removeprefix('layers.'))).get(name)
    return self._unit(None).get(path)

  def arrays(self, shapes: Shapes) -> Arrays:
    """The parameters with these paths."""
    return {path: np.asarray(self.leaf(path)) for path in shapes}

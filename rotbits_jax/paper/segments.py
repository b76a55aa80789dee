"""The parameters around each residual segment of a sliced model.

`models.config` defines segments. A reader of a segment is a kernel that is multiplied
by it; a writer is a parameter whose output is added to it. A shortcut leads from one
segment to the next. The parameters are read from a source one layer at a time.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured

Shapes = dict[str, tuple[int, ...]]  # by paths like 'layers.3/attention/query/kernel'
Arrays = dict[str, np.ndarray]


class Parts(NamedTuple):
  """The shapes of the parameters around one residual segment, by path.

  Every parameter of the model is in one of the first four fields of exactly one
  segment.
  """

  readers: Shapes  # [d, out]: kernels that are multiplied by the segment
  writers: Shapes  # [in, d] or [d]: kernels and biases whose outputs are added to it
  shortcut: Shapes  # [d', d]: the shortcut that leads into it, or nothing
  biases: Shapes  # biases of the readers, which no rotation changes
  leaving: Shapes  # [d, d'']: the shortcut that leads out of it, or nothing

  @property
  def all(self) -> Shapes:
    """The parameters of this segment in the order in which they are pushed.

    The kernels come last, so that rotations are sampled from their numbers, as
    published. The numbers of a shortcut are far greater, so a threshold would leave
    greater errors in the numbers around them.
    """
    return self.shortcut | self.biases | self.readers | self.writers


def parts(config: models.ModelConfig) -> list[Parts]:
  """Returns the parameters around each segment of a sliced model, in order."""
  found = [Parts({}, {}, {}, {}, {}) for _ in config.segment_widths]
  step, last = config.segments_per_layer, len(found) - 1
  outer = models.layout.outer_axes(config), models.outer_shapes(config)
  _add(found, '', *outer, first=0, last=last)
  for i in range(config.num_layers):
    layer = models.layout.layer_axes(config), models.layer_shapes(config, i)
    _add(found, models.names.prefix(i), *layer, first=i * step, last=(i + 1) * step)
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
  """Adds the parameters of a layer, or those outside the layers, to their segments.

  Args:
    found: the segments; changed in place.
    prefix: prefix of the parameters' paths.
    axes: the axes of each parameter.
    shapes: the shapes of the parameters.
    first: the segment that axis 0 stands for.
    last: the segment that axis -1 stands for.
  """

  def segment(axis: models.layout.Axis) -> int | None:
    if not isinstance(axis, int):
      return None
    return last if axis == -1 else first + axis

  flat = structured.flatten(shapes)
  for path, own in axes.items():
    shape = {prefix + path: flat[path]}
    read, written = segment(own[0]), segment(own[-1])
    if len(own) == 1:
      # A bias belongs to a kernel that writes a segment, or to one that reads it.
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

  It holds at most two layers, or one layer and the parameters outside the layers.
  """

  def __init__(self, source: passes.Source):
    def unit(index: int | None) -> dict[str, Any]:
      tree = source.outer() if index is None else source.layer(index)
      return structured.flatten(tree)

    self._unit = functools.lru_cache(2)(unit)

  def leaf(self, path: str) -> Any:
    """Returns a parameter's leaf; None if the source does not have the parameter."""
    index = models.names.layer_index(path)
    return self._unit(index).get(path.removeprefix(models.names.prefix(index)))

  def arrays(self, shapes: Shapes) -> Arrays:
    """Returns the parameters with these paths as arrays."""
    return {path: np.asarray(self.leaf(path)) for path in shapes}

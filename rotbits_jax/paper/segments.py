"""The parameters around each residual segment of a sliced model.

`models.config` defines segments, and `SegmentParameters` what is around them.
"""

from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.symmetries import rotations

Shapes = dict[str, tuple[int, ...]]  # by paths like 'layers.3/attention/query/kernel'
Arrays = dict[str, np.ndarray]


class SegmentParameters(NamedTuple):
  """The shapes or the arrays of the parameters around one residual segment, by path.

  Every parameter of the model belongs to exactly one segment.
  """

  readers: dict[str, Any]  # [d, out]: kernels that are multiplied by the segment
  writers: dict[str, Any]  # [in, d] or [d]: kernels and biases that are added to it
  shortcut: dict[str, Any]  # [d', d]: the shortcut that leads into it, or nothing
  biases: dict[str, Any]  # biases and head norms of the readers: no rotation moves them

  @property
  def all(self) -> dict[str, Any]:
    """The parameters of this segment in the order in which they are pushed.

    The kernels come last, so rotations are sampled from their elements, as
    published. The elements of a shortcut are far greater, so a threshold would leave
    greater errors in the elements around them.
    """
    return self.shortcut | self.biases | self.readers | self.writers


def shapes(config: models.ModelConfig) -> list[SegmentParameters]:
  """Returns the shapes around each segment of a sliced model, in order."""
  segments = [SegmentParameters({}, {}, {}, {}) for _ in config.segment_widths]
  outer = models.layout.outer_axes(config), models.outer_shapes(config)
  groups: list[Any] = [('', *outer, segments)]
  axes, step = models.layout.layer_axes(config), config.segments_per_layer
  for i in range(config.num_layers):
    layer, prefix = models.layer_shapes(config, i), models.names.prefix(i)
    groups.append((prefix, axes, layer, segments[i * step : (i + 1) * step + 1]))
  for prefix, axes_by_path, tree, around in groups:
    flat = structured.flatten(tree)
    for path, parameter_axes in axes_by_path.items():
      read, written = rotations.sides(parameter_axes)
      if written is not None:
        target = around[written]
        group = target.writers if read is None else target.shortcut
      elif read is not None:
        group = around[read].readers
      else:
        # A bias belongs to its kernel, and the scale of a norm of heads to the first.
        kernel_axes = axes_by_path.get(path.rsplit('/', 1)[0] + '/kernel', (0,))
        group = around[kernel_axes[0]].biases
      group[prefix + path] = flat[path]
  return segments


def all_shapes(config: models.ModelConfig) -> Shapes:
  """Returns the shapes of all parameters of a sliced model."""
  return {path: x for segment in shapes(config) for path, x in segment.all.items()}


def read(source: passes.Source) -> list[SegmentParameters]:
  """Returns the arrays around each segment of a model, in order."""
  arrays: Arrays = {}
  for record in source.records:
    flat = structured.flatten(source.read(record))
    arrays |= {path: np.asarray(array) for path, array in flat.items()}
  return [
    SegmentParameters(*({path: arrays[path] for path in group} for group in segment))
    for segment in shapes(source.config)
  ]

"""Stacks of layers: each layer is decoded straight into its place in the stack."""

from concurrent import futures
import functools
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.coding import weights
from rotbits_jax.file import placement
from rotbits_jax.file import records as records_lib
from rotbits_jax.system import host
from rotbits_jax.system import progress

Tree = dict[str, Any]


class Stack(NamedTuple):
  """The layers of a stack while they are decoded.

  Attributes:
    name: the name of the stack, see `models.names`.
    wanted: places of the layers that this process needs.
    total: number of layers of the whole stack.
    layers: the layers that this process needs.
    plain: the stacked plain arrays and `UniformlyQuantized`, by path.
  """

  name: str
  wanted: range
  total: int
  layers: 'list[futures.Future[Tree]]'
  plain: dict[str, Any]

  def result(self, bar: progress.Progress) -> Tree:
    """Waits for the layers, and returns them stacked."""
    others: dict[str, list[Any]] = {}
    for layer in self.layers:
      for path, leaf in structured.flatten(layer.result()).items():
        if path not in self.plain:
          others.setdefault(path, []).append(leaf)
      bar.update()
    bar.update(self.total - len(self.layers))
    stacked = self.plain | {
      path: type(leaves[0]).stack(leaves) for path, leaves in others.items()
    }
    return structured.unflatten(stacked)


def start_stack(
  units: records_lib.Records,
  indices: range,
  place: placement.Place | None,
  start: weights.Start,
  integers: bool,
) -> Stack:
  """Starts to decode layers into their places in a stack.

  Args:
    units: the units of the file.
    indices: the layers of the stack, which have equal keys, see
      `manifest.Record.stack_key`.
    place: the sharding of arrays; None if this process needs all layers.
    start: starts a job.
    integers: whether matrices on grids become `UniformlyQuantized`.
  """
  entries = [units.entry(models.names.layer(i)) for i in indices]
  name, entry, count = models.names.stack(indices), entries[0], len(entries)
  wanted = range(count)
  if place is not None:
    wanted = placement.local_layers(place, name, entry, count)
  specs = [{leaf.path: own for leaf, own in x.leaf_specs()} for x in entries]
  grids = [x.grids() for x in entries] if integers else []
  stacks: dict[str, Any] = {}
  for leaf, own in entry.leaf_specs():
    found = [x[leaf.path] for x in grids if leaf.path in x]
    if len(found) == count:
      dtype = max((x.integer_dtype for x in found), key=lambda x: x.itemsize)
      stacks[leaf.path] = structured.UniformlyQuantized(
        host.empty((len(wanted), *leaf.shape), dtype),
        np.array([found[k].unit for k in wanted], np.float32),
        leaf.dtype,
      )
      continue
    if leaf.is_array:
      stacks[leaf.path] = [host.empty((len(wanted), *leaf.shape), np.dtype(leaf.dtype))]
      continue
    shapes = [x.shape for x in own]
    # Equal leaves may be stored as arrays of different shapes. Such arrays are not
    # decoded into a stack.
    if all([x.shape for x in other[leaf.path]] == shapes for other in specs):
      stacks[leaf.path] = [host.empty((len(wanted), *x.shape), x.dtype) for x in own]
  layers = [
    start(
      functools.partial(
        units.decode,
        models.names.layer(indices[k]),
        {path: _row(stack, row) for path, stack in stacks.items()},
      )
    )
    for row, k in enumerate(wanted)
  ]
  plain = {
    path: stack if isinstance(stack, structured.UniformlyQuantized) else stack[0]
    for path, stack in ((x.path, stacks[x.path]) for x in entry.leaves if x.is_array)
  }
  return Stack(name, wanted, count, layers, plain)


def _row(stack: Any, row: int) -> Any:
  """Returns the arrays of one layer in the stacks of a leaf."""
  if isinstance(stack, structured.UniformlyQuantized):
    return stack.layer(row)
  return [array[row, ...] for array in stack]  # an array, also without axes

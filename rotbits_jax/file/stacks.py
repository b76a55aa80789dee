"""Parts of a model while they are decoded: a record, or several layers in a stack."""

from collections.abc import Sequence
from concurrent import futures
import functools
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.coding import weights
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import memory as memory_lib
from rotbits_jax.file import placement
from rotbits_jax.file import records as records_lib
from rotbits_jax.file.container import ContainerError
from rotbits_jax.system import progress

Memory = dict[str, list[np.ndarray]]


class Stack(NamedTuple):
  """Layers that are decoded straight into their places in a stack.

  Attributes:
    name: the name of the stack, see `models.names`.
    wanted: places of the layers that this process needs.
    total: number of layers of the whole stack.
    entries: the manifest's entries of the records that this process needs.
    whole: those of all records of the stack.
    memory: see `memory.allocate`.
    layers: the leaves of each of the entries, by path.
  """

  name: str
  wanted: range
  total: int
  entries: list[manifest_lib.RecordEntry]
  whole: list[manifest_lib.RecordEntry]
  memory: Memory
  layers: 'list[futures.Future[records_lib.Flat]]'

  def result(self, bar: progress.Progress) -> records_lib.Flat:
    """Waits for the layers, and returns the stacked leaves by path."""
    rows: dict[str, list[Any]] = {}
    for entry, layer in zip(self.entries, self.layers, strict=True):
      for path, leaf in layer.result().items():
        rows.setdefault(f'{self.name}/{entry.inner(path)}', []).append(leaf)
      bar.update(entry.input.bytes)
    bar.update(_input_bytes(self.whole) - _input_bytes(self.entries))
    return {
      path: self._stacked(path.partition('/')[2], leaves)
      for path, leaves in rows.items()
    }

  def _stacked(self, path: str, leaves: list[Any]) -> Any:
    """Stacks the leaves of one path within the records."""
    if not structured.is_structured(leaves[0]):
      return self.memory[path][0]
    cls = type(leaves[0])
    ranks = [_rank(entry, path) for entry in self.whole]
    # The arrays of all processes have one shape.
    return cls.stack(leaves) if None in ranks else cls.stack(leaves, ranks)


def _rank(entry: manifest_lib.RecordEntry, path: str) -> Any:
  """Returns the rank of a leaf of a record, see `Structured.stored_rank`.

  Raises:
    ContainerError: if the leaf lacks the arrays that tell it.
  """
  for leaf, specs in entry.leaf_specs():
    cls = leaf.leaf_class
    if cls is not None and entry.inner(leaf.path) == path:
      shapes = dict(zip(leaf.arrays, (x.shape for x in specs), strict=True))
      try:
        return cls.stored_rank(leaf.settings, shapes)
      except LookupError:
        raise ContainerError(f'{leaf.path}: the leaf has not two factors') from None
  return None


def _input_bytes(entries: Sequence[manifest_lib.RecordEntry]) -> int:
  return sum(entry.input.bytes for entry in entries)


def start_stacks(
  records: records_lib.Records,
  layers: range,
  place: placement.Place | None,
  start: weights.Start,
  resolve: records_lib.Resolve,
  integers: bool,
) -> list[Stack]:
  """Starts to decode layers into their places in stacks.

  Args:
    records: the records of the file.
    layers: the layers.
    place: the sharding of arrays; None if this process needs all layers.
    start: starts a job.
    resolve: returns the parameters that leaves of the layers need.
    integers: whether multiples of one step stay integers.
  """

  def key(index: int) -> tuple[Any, ...]:
    return records.entry(models.names.layer(index)).stack_key()

  def stack(run: range) -> Stack:
    """Starts a stack of layers of equal keys, see `manifest.RecordEntry.stack_key`."""
    entries = [records.entry(models.names.layer(index)) for index in run]
    name, wanted = models.names.stack(run), range(len(run))
    if place is not None:
      wanted = placement.local_layers(place, name, entries[0], len(run))
    local = entries[wanted.start : wanted.stop]
    # Where ranks differ, a stack has room for the greatest one in each layer.
    largest = max(x.memory_bytes(integers) for x in entries)
    memory_lib.check(name, largest * len(local))
    memory = memory_lib.allocate(entries, stacked=len(local), integers=integers)
    rows = [
      {path: [array[row, ...] for array in arrays] for path, arrays in memory.items()}
      for row in range(len(local))
    ]
    jobs = [
      start(functools.partial(records.decode, entry.name, row, resolve))
      for entry, row in zip(local, rows, strict=True)
    ]
    return Stack(name, wanted, len(run), local, entries, memory, jobs)

  return [stack(run) for run in models.stack_ranges(layers, key)]

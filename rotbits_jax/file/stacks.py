"""Layers that are decoded straight into their places in stacks.

A damaged or incomplete file raises `ContainerError`.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
import functools
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.coding import pool
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import memory as memory_lib
from rotbits_jax.file import placement
from rotbits_jax.file.decode import Decoder
from rotbits_jax.file.decode import Flat
from rotbits_jax.file.decode import Resolve
from rotbits_jax.file.decode import Rows
from rotbits_jax.system import host
from rotbits_jax.system import progress


class Stack(NamedTuple):
  """Layers that are decoded straight into their places in a stack.

  Attributes:
    name: the name of the stack, see `models.names`.
    count: the number of its layers.
    wanted: places of the layers that this process needs.
    jobs: the work of decoding each of these layers.
    sizes: the bytes of each layer before coding.
    stacked: takes the results of the jobs; returns the stacked leaves by path.
  """

  name: str
  count: int
  wanted: range
  jobs: 'list[futures.Future[Flat]]'
  sizes: list[int]
  stacked: Callable[[list[Flat]], Flat]


def placed(
  outer: Iterable[tuple[int, 'futures.Future[Flat]']],
  stacks: Sequence[Stack],
  place: placement.Place | None,
  bar: progress.Progress,
) -> Flat:
  """Returns the leaves of a model by path, on their devices.

  Args:
    outer: the bytes of each record outside the layers, and the work of decoding it.
    stacks: the stacks.
    place: the sharding of arrays; None for NumPy arrays.
    bar: the progress, in bytes of the layers.
  """
  flat: Flat = {}
  for nbytes, job in outer:
    for path, leaf in job.result().items():
      is_array = isinstance(leaf, np.ndarray)
      contiguous = host.contiguous(leaf) if is_array else leaf
      flat |= placement.placed({path: contiguous}, place)
    bar.update(nbytes)
  for stack in stacks:
    layers = []
    for i, job in zip(stack.wanted, stack.jobs, strict=True):
      layers.append(job.result())
      bar.update(stack.sizes[i])
    leaves = {f'{stack.name}/{x}': y for x, y in stack.stacked(layers).items()}
    flat |= placement.placed_stack(leaves, place, stack.wanted, stack.count)
  return flat


def start_stacks(
  decoder: Decoder,
  layers: range,
  place: placement.Place | None,
  start: pool.Start,
  resolve: Resolve,
  integers: bool,
) -> list[Stack]:
  """Starts to decode layers into their places in stacks.

  Args:
    decoder: decodes the records.
    layers: the layers.
    place: the sharding of arrays; None if this process needs all layers.
    start: starts a job.
    resolve: returns the parameters that leaves of the layers need.
    integers: whether multiples of one step stay integers.
  """
  entry = lambda index: decoder.entry(models.names.layer(index))

  def stack(run: range) -> Stack:
    """Starts a stack of layers with equal keys."""
    records, wanted = list(map(entry, run)), range(len(run))
    name, first = models.names.stack(run), records[0]
    if place is not None:
      shapes = [
        (first.inner(leaf.path), shape)
        for leaf, specs in first.leaf_specs()
        for shape in ([leaf.shape] if leaf.is_array() else [x.shape for x in specs])
      ]
      wanted = placement.local_layers(place, name, shapes, len(run))
    # Where ranks differ, a stack has room for the greatest one in each layer.
    largest = max(record.memory_bytes(integers) for record in records)
    memory_lib.check(name, largest * len(wanted))
    memory, jobs = allocate(records, len(wanted), integers), []
    for row, i in enumerate(wanted):
      rows = {path: [x[row, ...] for x in arrays] for path, arrays in memory.items()}
      decode = functools.partial(decoder.decode, rows=rows, integers=integers)
      jobs.append(start(functools.partial(decode, records[i].name, resolve)))
    sizes = [record.input.bytes for record in records]
    stacked = functools.partial(_stacked, records, wanted, memory)
    return Stack(name, len(run), wanted, jobs, sizes, stacked)

  key = lambda index: entry(index).stack_key(integers)
  return [stack(run) for run in models.stack_ranges(layers, key)]


def _stacked(
  records: list[manifest_lib.RecordEntry],
  wanted: range,
  memory: Rows,
  layers: list[Flat],
) -> Flat:
  """Stacks the leaves of layers; returns them by path within a layer."""
  leaves: dict[str, list[Any]] = {}
  for i, layer in zip(wanted, layers, strict=True):
    for path, leaf in layer.items():
      leaves.setdefault(records[i].inner(path), []).append(leaf)
  stacked: Flat = {}
  for path, of_layers in leaves.items():
    if not structured.is_structured(of_layers[0]):
      stacked[path] = memory[path][0]
      continue
    ranks = [record.rank(path) for record in records]
    stack = type(of_layers[0]).stack
    # The arrays of all processes have one shape.
    stacked[path] = stack(of_layers) if None in ranks else stack(of_layers, ranks)
  return stacked


def allocate(
  records: Sequence[manifest_lib.RecordEntry], count: int, integers: bool
) -> Rows:
  """Makes the memory for the leaves of layers in a stack.

  Args:
    records: the manifest's entries of the records, which have equal stack keys.
    count: the length of the leading axis of the arrays.
    integers: whether multiples of one step stay integers.

  Returns:
    The arrays for each leaf, by its path within a record. A leaf that is stored as
    arrays of different shapes in different records has none.
  """
  specs_of_records = [
    {
      record.inner(leaf.path): [(x.shape, x.dtype) for x in specs]
      for leaf, specs in record.leaf_specs()
    }
    for record in records
  ]
  memory: dict[str, list[np.ndarray]] = {}
  for leaf in records[0].leaves:
    path = records[0].inner(leaf.path)
    specs = specs_of_records[0][path]
    if not leaf.type_name or leaf.is_expanded(integers):
      specs = [(leaf.shape, leaf.dtype)]
    elif any(x[path] != specs for x in specs_of_records):
      continue
    try:
      memory[path] = [host.empty((count, *shape), dtype) for shape, dtype in specs]
    except MemoryError:
      raise memory_lib.too_large(
        leaf.path, sum(x.decoded_bytes for x in records)
      ) from None
  return memory

"""Reads the records of a model; layers are decoded straight into their stacks.

Plain tensors whose names are those of a known family are a model, too. Those of a layer
are decoded together, and copied into the rows of the stacks: files have the kernels of
most families transposed.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import functools
import threading
import types
from typing import Any

import jax
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.coding import pool
from rotbits_jax.file import decode as decode_lib
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import memory as memory_lib
from rotbits_jax.file import placement
from rotbits_jax.relative import entries
from rotbits_jax.system import host
from rotbits_jax.system import progress


def read(
  decoder: 'decode_lib.Decoder | ModelDecoder',
  outer: Sequence[str],
  layers: range,
  place: placement.Place | None = None,
  *,
  integers: bool = False,
  show_progress: bool = False,
) -> decode_lib.Flat:
  """Returns the leaves of a model by path, on their devices; see `api.load`.

  Records outside the layers that need others come last in `outer`.
  """
  outer_records = list(map(decoder.entry, outer))
  records = {i: decoder.entry(models.names.layer(i)) for i in layers}
  everything = [*outer_records, *records.values()]
  # A process of several checks those layers that it needs.
  is_whole = place is None or jax.process_count() == 1
  held = everything if is_whole else outer_records
  memory_lib.check('the whole content', sum(x.memory_bytes for x in held))
  total = sum(record.input.bytes for record in everything)
  flat: decode_lib.Flat = {}
  with (
    progress.Progress('decode', total, 'B', show=show_progress) as bar,
    pool.record_jobs() as start,
  ):
    started: dict[str, futures.Future[decode_lib.Flat]] = {}
    decode = functools.partial(decoder.decode, started=started, integers=integers)
    for name in outer:
      started[name] = start(functools.partial(decode, name))
    runs = models.stack_ranges(layers, lambda i: records[i].stack_key(integers))
    stacks = [_Stack([records[i] for i in run], run, place, integers) for run in runs]
    for stack in stacks:
      stack.start(decode, start)
    for record in outer_records:
      for path, leaf in started[record.name].result().items():
        is_array = isinstance(leaf, np.ndarray)
        contiguous = host.contiguous(leaf) if is_array else leaf
        flat |= placement.placed({path: contiguous}, place)
      bar.update(record.input.bytes)
    for stack in stacks:
      leaves, count = stack.leaves(bar), len(stack.records)
      flat |= placement.placed(leaves, place, stack.wanted, count)
  return flat


class _Stack:
  """Layers of equal stack keys; this process decodes those in `wanted`."""

  def __init__(
    self,
    records: list[manifest_lib.RecordEntry],
    layers: range,
    place: placement.Place | None,
    integers: bool,
  ):
    """Makes the memory of the stack."""
    self.records, self.wanted = records, range(len(records))
    self._name = models.names.stack(layers)
    if place is not None:
      shapes = []
      for leaf, specs in records[0].leaf_specs:
        is_array = not leaf.type_name or leaf.is_expanded()
        path = records[0].inner(leaf.path)
        of_leaf = [leaf.shape] if is_array else [x.shape for x in specs]
        shapes += [(path, shape) for shape in of_leaf]
      self.wanted = placement.local_layers(place, self._name, shapes, len(records))
    # Where ranks differ, a stack has room for the greatest one in each layer.
    nbytes = max(record.memory_bytes for record in records) * len(self.wanted)
    memory_lib.check(self._name, nbytes)
    try:
      self._memory = _allocate(records, len(self.wanted), integers)
    except MemoryError:
      raise memory_lib.too_large(self._name, nbytes) from None
    self._jobs: list[futures.Future[decode_lib.Flat]] = []

  def start(self, decode: Any, start: pool.Start) -> None:
    """Starts to decode the layers into their rows."""
    for row, i in enumerate(self.wanted):
      rows = {path: [x[row, ...] for x in y] for path, y in self._memory.items()}
      job = functools.partial(decode, self.records[i].name, rows=rows)
      self._jobs.append(start(job))

  def leaves(self, bar: progress.Progress) -> decode_lib.Flat:
    """Returns the stacked leaves by path when all layers are decoded."""
    leaves: dict[str, list[Any]] = {}
    for i, job in zip(self.wanted, self._jobs, strict=True):
      for path, leaf in job.result().items():
        leaves.setdefault(self.records[i].inner(path), []).append(leaf)
      bar.update(self.records[i].input.bytes)
    stacked: decode_lib.Flat = {}
    for path, of_layers in leaves.items():
      if not structured.is_structured(of_layers[0]):
        stacked[f'{self._name}/{path}'] = self._memory[path][0]
        continue
      ranks = [record.rank(path) for record in self.records]
      stack = type(of_layers[0]).stack
      # The arrays of all processes have one shape.
      leaf = stack(of_layers) if None in ranks else stack(of_layers, ranks)
      stacked[f'{self._name}/{path}'] = leaf
    return stacked


def _allocate(
  records: Sequence[manifest_lib.RecordEntry], count: int, integers: bool
) -> decode_lib.Rows:
  """Makes the memory for the leaves of layers in a stack, by path within a layer.

  A leaf that is stored as arrays of different shapes in different layers has none.
  """
  specs_of_records = [
    {
      record.inner(leaf.path): [(x.shape, x.dtype) for x in specs]
      for leaf, specs in record.leaf_specs
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
    memory[path] = [host.empty((count, *shape), dtype) for shape, dtype in specs]
  return memory


def open_model(
  decoder: decode_lib.Decoder, files: Mapping[str, bytes]
) -> checkpoints.CheckpointReader | None:
  """Matches plain tensors with the parameters of a model; None if they are of none."""
  thread = threading.local()  # the record that each thread has decoded last

  def read(path: str) -> np.ndarray:
    name = decoder.holders[path]
    if getattr(thread, 'name', None) != name:
      thread.name, thread.flat = name, decoder.decode(name)
    return np.asarray(structured.materialize(thread.flat[path]))

  tensors = {
    path: checkpoints.LazyTensor(
      leaf.shape, np.dtype(leaf.dtype), functools.partial(read, path)
    )
    for path, leaf in decoder.leaves.items()
  }
  try:
    content = checkpoints.parse_object(files['config.json'], 'config.json')
    config = checkpoints.parse_config(content)
    folder = checkpoints.Folder(None, tensors, dict(files))
    return checkpoints.CheckpointReader(folder, config)
  except (KeyError, checkpoints.CheckpointError):
    return None


class ModelDecoder:
  """Decodes the records of a model whose parameters are arrays, and need no others.

  Its two functions return the shapes and dtypes of a record, and its arrays.
  """

  def __init__(self, specs: Callable[[str], Any], read: Callable[[str], Any]):
    self._specs, self._read = specs, read

  def entry(self, name: str) -> manifest_lib.RecordEntry:
    """Returns an entry for a record, as if its parameters were stored as they are."""
    leaves, arrays = [], []
    for path, spec in structured.flatten(self._specs(name)).items():
      dtype = spec.dtype.name
      leaves.append(manifest_lib.Leaf(path=path, shape=spec.shape, dtype=dtype))
      stored_dtype = entries.stored_dtype(dtype)
      arrays.append([stored_dtype, list(spec.shape), 0, [None], None])
    nbytes = sum(leaf.nbytes for leaf in leaves)
    return manifest_lib.RecordEntry(
      name=name,
      nbytes=nbytes,
      crc32=0,
      leaves=tuple(leaves),
      spec={'arrays': arrays, 'groups': []},
      input=manifest_lib.Counts(elements=sum(x.size for x in leaves), bytes=nbytes),
    )

  def decode(
    self,
    name: str,
    started: decode_lib.Started = types.MappingProxyType({}),
    *,
    rows: decode_lib.Rows | None = None,
    integers: bool = False,
  ) -> decode_lib.Flat:
    """Decodes a record, into rows if they are given."""
    flat = structured.flatten(self._read(name))
    if rows:
      for path, leaf in flat.items():
        (flat[path],) = rows[path.removeprefix(f'{name}/')]
        flat[path][...] = host.contiguous(leaf)
    return flat

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

import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.coding import pool
from rotbits_jax.file import decode as decode_lib
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import memory
from rotbits_jax.relative import entries as entries_lib
from rotbits_jax.system import host
from rotbits_jax.system import progress


def read(
  decoder: 'decode_lib.Decoder | ModelDecoder',
  outer: Sequence[str],
  layers: range,
  *,
  integers: bool = False,
  show_progress: bool = False,
) -> decode_lib.Flat:
  """Returns the leaves of a model by path, with stacked layers; see `api.load`.

  Records outside the layers that need others come last in `outer`.
  """
  entries = {name: decoder.entry(name) for name in outer}
  of_layers = {i: decoder.entry(models.names.layer(i)) for i in layers}
  runs = models.stack_ranges(layers, lambda i: of_layers[i].stack_key(integers))
  nbytes = sum(entry.memory_bytes for entry in entries.values())
  # Where ranks differ, a stack has room for the greatest one in each layer.
  nbytes += sum(len(run) * max(of_layers[i].memory_bytes for i in run) for run in runs)
  total = sum(x.input.bytes for x in (*entries.values(), *of_layers.values()))
  flat: decode_lib.Flat = {}
  with (
    memory.bounded('the whole content', nbytes),
    progress.Progress('decode', total, 'B', show=show_progress) as bar,
    pool.record_jobs() as start,
  ):
    jobs: dict[str, futures.Future[decode_lib.Flat]] = {}
    decode = functools.partial(decoder.decode, started=jobs, integers=integers)
    for name in outer:
      jobs[name] = start(functools.partial(decode, name))
    stacks = [_Stack([of_layers[i] for i in run], integers) for run in runs]
    for stack in stacks:
      stack.start(decode, start)
    for name, entry in entries.items():
      for path, leaf in jobs[name].result().items():
        is_array = isinstance(leaf, np.ndarray)
        flat[path] = host.contiguous(leaf) if is_array else leaf
      bar.update(entry.input.bytes)
    for run, stack in zip(runs, stacks, strict=True):
      for path, leaf in stack.leaves(bar).items():
        flat[f'{models.names.stack(run)}/{path}'] = leaf
  return flat


class _Stack:
  """Layers of equal stack keys, which are decoded into the rows of one array each."""

  def __init__(self, entries: list[manifest_lib.RecordEntry], integers: bool):
    """Makes the memory of the stack, by path within a layer.

    A leaf that is stored as arrays of different shapes in different layers has none.
    """
    self._entries = entries
    self._arrays: dict[str, list[np.ndarray]] = {}
    specs_of_layers = [
      {
        entry.inner(leaf.path): [(x.shape, x.dtype) for x in specs]
        for leaf, specs in entry.leaf_specs
      }
      for entry in entries
    ]
    for leaf in entries[0].leaves:
      path = entries[0].inner(leaf.path)
      specs = specs_of_layers[0][path]
      if not leaf.type_name or leaf.is_expanded(integers):
        specs = [(leaf.shape, leaf.dtype)]
      elif any(x[path] != specs for x in specs_of_layers):
        continue
      self._arrays[path] = [host.empty((len(entries), *x), y) for x, y in specs]

  def start(self, decode: Any, start: pool.Start) -> None:
    """Starts to decode the layers into their rows."""
    self._jobs: list[futures.Future[decode_lib.Flat]] = []
    for i, entry in enumerate(self._entries):
      rows = {path: [x[i, ...] for x in y] for path, y in self._arrays.items()}
      self._jobs.append(start(functools.partial(decode, entry.name, rows=rows)))

  def leaves(self, bar: progress.Progress) -> decode_lib.Flat:
    """Returns the stacked leaves by path when all layers are decoded."""
    leaves: dict[str, list[Any]] = {}
    for entry, job in zip(self._entries, self._jobs, strict=True):
      for path, leaf in job.result().items():
        leaves.setdefault(entry.inner(path), []).append(leaf)
      bar.update(entry.input.bytes)
    return {
      path: type(of_layers[0]).stack(of_layers)
      if structured.is_structured(of_layers[0])
      else self._arrays[path][0]
      for path, of_layers in leaves.items()
    }


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
      stored_dtype = entries_lib.stored_dtype(dtype)
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

"""Reads the records of a model; layers are decoded straight into their stacks.

Plain tensors whose names are those of a known family are a model, too. Those of a layer
are decoded together, and copied into the rows of the stacks: files have the kernels of
most families transposed.
"""

import collections
from collections.abc import Mapping, Sequence
from concurrent import futures
import functools
from typing import Any

import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.coding import pool
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import memory
from rotbits_jax.system import host
from rotbits_jax.system import progress

Rows = Mapping[str, list[np.ndarray]]
"""Arrays to decode the leaves of a record into, by their paths within it."""


def read(
  reader: Any,
  outer: Sequence[str],
  layers: range,
  *,
  integers: bool = False,
  show_progress: bool = False,
) -> dict[str, Any]:
  """Returns the leaves of a model by path, with stacked layers; see `api.load`.

  Records outside the layers that need others start last: nothing waits for them.
  """
  entries = {name: reader.entry(name) for name in outer}
  entries = dict(sorted(entries.items(), key=lambda item: item[1].needs_others))
  of_layers = {i: reader.entry(models.names.layer(i)) for i in layers}
  runs = models.stack_ranges(layers, lambda i: of_layers[i].stack_key(integers))
  nbytes = sum(entry.memory_bytes for entry in entries.values())
  # Where ranks differ, a stack has room for the greatest one in each layer.
  nbytes += sum(len(run) * max(of_layers[i].memory_bytes for i in run) for run in runs)
  total = sum(x.input.bytes for x in (*entries.values(), *of_layers.values()))
  flat: dict[str, Any] = {}
  with (
    memory.bounded('the whole content', nbytes),
    progress.Progress('decode', total, 'B', show=show_progress) as bar,
    pool.record_jobs() as start,
  ):
    jobs: dict[str, futures.Future[dict[str, Any]]] = {}
    decode = functools.partial(reader.decode, started=jobs, integers=integers)
    for name in entries:
      jobs[name] = start(functools.partial(decode, name))
    stacks = []
    for run in runs:
      arrays, started = _stack([of_layers[i] for i in run], integers), []
      for i, layer in enumerate(map(models.names.layer, run)):
        rows = {path: [x[i, ...] for x in stack] for path, stack in arrays.items()}
        started.append(start(functools.partial(decode, layer, rows=rows)))
      stacks.append((run, arrays, started))
    for name, entry in entries.items():
      for path, leaf in jobs[name].result().items():
        is_array = isinstance(leaf, np.ndarray)
        flat[path] = host.contiguous(leaf) if is_array else leaf
      bar.update(entry.input.bytes)
    for run, arrays, started in stacks:
      leaves = collections.defaultdict(list)
      for i, job in zip(run, started, strict=True):
        for path, leaf in job.result().items():
          leaves[of_layers[i].inner(path)].append(leaf)
        bar.update(of_layers[i].input.bytes)
      for path, (leaf, *others) in leaves.items():
        is_array = not structured.is_structured(leaf)
        stack = arrays[path][0] if is_array else type(leaf).stack([leaf, *others])
        flat[f'{models.names.stack(run)}/{path}'] = stack
  return flat


def _stack(
  entries: Sequence[manifest_lib.RecordEntry], integers: bool
) -> dict[str, list[np.ndarray]]:
  """Makes the arrays of a stack, by path, of leaves whose layers have equal shapes."""
  arrays: dict[str, list[np.ndarray]] = {}
  stored = collections.defaultdict(list)
  for entry in entries:
    for leaf, specs in entry.leaf_specs:
      is_array = not leaf.type_name or leaf.is_expanded(integers)
      shapes = [(x.shape, x.dtype) for x in ([leaf] if is_array else specs)]
      stored[entry.inner(leaf.path)].append(shapes)
  for path, (first, *others) in stored.items():
    if all(shapes == first for shapes in others):
      arrays[path] = [host.empty((len(entries), *x), y) for x, y in first]
  return arrays


def read_arrays(
  source: Any, outer: Sequence[str], layers: range, *, show_progress: bool = False
) -> dict[str, Any]:
  """Returns the leaves of a model, a `passes.Source` of arrays, as `read` does."""
  specs = lambda name: structured.flatten(source.specs(name))
  names = [*outer, *map(models.names.layer, layers)]
  total = sum(structured.count_bytes(x) for name in names for x in specs(name).values())
  key = lambda i: models.stack_key(*source.specs(models.names.layer(i)).values())
  runs = models.stack_ranges(layers, key)
  flat: dict[str, Any] = {}
  rows: dict[str, np.ndarray] = {}

  def copy(name: str) -> None:
    for path, array in structured.flatten(source.read(name)).items():
      contiguous = host.contiguous(array)
      if path in rows:
        rows[path][...] = contiguous
      else:
        flat[path] = contiguous
      bar.update(contiguous.nbytes)

  with (
    memory.bounded('the whole content', total),
    progress.Progress('decode', total, 'B', show=show_progress) as bar,
  ):
    for run in runs:
      first = models.names.layer(run.start)
      for path, spec in specs(first).items():
        inner, stack = path.removeprefix(first), models.names.stack(run)
        array = host.empty((len(run), *spec.shape), spec.dtype)
        flat[stack + inner] = array
        rows |= {models.names.layer(i) + inner: array[i - run.start, ...] for i in run}
    pool.each(copy, names)
  return flat

"""Reads the records of a model; layers are decoded straight into their stacks."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import memory
from rotbits_jax.system import host

Rows = Mapping[str, list[np.ndarray]]
"""Arrays to decode leaves into, by their paths."""


def read(
  reader: Any,
  outer: Sequence[str],
  layers: range,
  *,
  integers: bool = False,
  show_progress: bool = False,
) -> dict[str, Any]:
  """Returns the leaves of a model by path, with stacked layers; see `api.load`."""
  # Records that need others start last: nothing waits for them.
  names = sorted(outer, key=lambda name: reader.entry(name).needs_others)
  nbytes = sum(reader.entry(name).memory_bytes for name in names)
  of_layers = {i: reader.entry(models.names.layer(i)) for i in layers}
  runs = models.stack_ranges(layers, lambda i: of_layers[i].stack_key(integers))
  # Where ranks differ, a stack has room for the greatest one in each layer.
  nbytes += sum(len(run) * max(of_layers[i].memory_bytes for i in run) for run in runs)
  flat: dict[str, Any] = {}
  leaves: dict[str, Any] = {}
  rows: dict[str, list[np.ndarray]] = {}
  with memory.bounded('the whole content', nbytes):
    for run in runs:
      for path, stack in _stack([of_layers[i] for i in run], integers).items():
        flat[f'{models.names.stack(run)}/{path}'] = stack[0]
        for place, name in enumerate(map(models.names.layer, run)):
          rows[f'{name}/{path}'] = [x[place, ...] for x in stack]
    names += map(models.names.layer, layers)
    options = {'rows': rows, 'integers': integers, 'show_progress': show_progress}
    for _, decoded in reader.each(names, **options):
      leaves |= decoded
    for run in runs:
      first = models.names.layer(run.start)
      for path in (x.path.removeprefix(first) for x in of_layers[run.start].leaves):
        of_run = [leaves.pop(f'{models.names.layer(i)}{path}') for i in run]
        if structured.is_structured(of_run[0]):
          flat[models.names.stack(run) + path] = type(of_run[0]).stack(of_run)
  for path, leaf in leaves.items():
    flat[path] = host.contiguous(leaf) if isinstance(leaf, np.ndarray) else leaf
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

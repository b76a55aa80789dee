"""Decodes the records of a file: leaves by path.

A damaged or incomplete file raises `ContainerError`.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import functools
import math
import types
from typing import Any

import jax
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.coding import pool
from rotbits_jax.coding import specs as specs_lib
from rotbits_jax.file import coders
from rotbits_jax.file import container
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import memory
from rotbits_jax.file.container import ContainerError
from rotbits_jax.relative import base as base_lib
from rotbits_jax.structured import difference
from rotbits_jax.system import checksums
from rotbits_jax.system import host

_MOST_BASES = 8  # of subspaces that are held, because several parameters need one
_MOST_USES = 16  # of an array by leaves that are small beside it

Flat = dict[str, Any]
"""Leaves by path."""

Resolve = Callable[[str], Any]
"""Takes the path of a parameter; returns its array."""

Rows = Mapping[str, list[np.ndarray]]
"""Arrays to decode a leaf into, by its path within the record."""

Started = Mapping[str, 'futures.Future[Flat]']
"""Records that are being decoded, by their names."""


class Decoder:
  """Decodes the records of a file, or of all shards of one.

  `entries` and `files` have the manifest's entry and the file of each record by its
  name, `leaves` and `holders` the entry and the record of each leaf by its path.
  """

  def __init__(
    self,
    files: Sequence[container.StreamReader],
    manifests: Sequence[manifest_lib.Manifest],
    base: base_lib.Base | None = None,
  ):
    """Checks the manifests of all shards together, and the arrays of the base."""
    self._base = base
    self._basis = functools.lru_cache(_MOST_BASES)(self._read_basis)
    self.files: dict[str, container.StreamReader] = {}
    self.entries: dict[str, manifest_lib.RecordEntry] = {}
    self.leaves: dict[str, manifest_lib.Leaf] = {}
    self.holders: dict[str, str] = {}
    for file, manifest in zip(files, manifests, strict=True):
      for record in manifest.records:
        if record.name in self.entries:
          raise ContainerError(f'{record.name}: two shards have this record')
        self.files[record.name], self.entries[record.name] = file, record
        for leaf in record.leaves:
          if leaf.path in self.leaves:
            raise ContainerError(f'{leaf.path}: another record has this leaf, too')
          self.leaves[leaf.path], self.holders[leaf.path] = leaf, record.name
    for path, leaf in self.leaves.items():
      with container.naming(path):
        self._check_needs(leaf, manifests[0].config)
    self._check_uses()

  def _check_needs(
    self, leaf: manifest_lib.Leaf, config: models.ModelConfig | None
  ) -> None:
    """Checks that the parameters a leaf needs are here or may be in another shard."""
    for path in leaf.needs:
      holder, record = self.holders.get(path), path.split('/')[0]
      if holder is not None and any(x.needs for x in self.entries[holder].leaves):
        raise ValueError(f'it needs {path}, whose record needs others')
      may_follow = config is None or record in models.outer_shapes(config)
      if holder is None and (record in self.entries or not may_follow):
        raise ValueError(f'it needs {path}, which is missing')
    if self._base is not None:
      for array in leaf.base_arrays:
        self._base.check(array)
    if leaf.product is not None and config is not None:
      missing = [
        x for x in leaf.product.segments if models.names.basis(x) not in self.leaves
      ]
      widths = {config.segment_widths[x] for x in missing}
      if widths - {config.hidden_size}:  # a missing basis is the identity
        raise ValueError(f'the basis {missing[0]} is missing')
      if len(missing) == 2 and leaf.shape != (config.hidden_size,) * 2:
        raise ValueError('it has not the shape of the identity')

  def _check_uses(self) -> None:
    """Checks that small leaves do not need one large array over and over.

    A leaf takes the time to go through all that it needs, however small it is.
    """
    uses: dict[str | None, list[tuple[int, int]]] = {}
    for leaf in self.leaves.values():
      for path in leaf.needs:
        if path in self.leaves:
          uses.setdefault(path, []).append((self.leaves[path].size, leaf.size))
      for array in leaf.base_arrays:
        name = array.path if self._base is None else self._base.find(array.path)
        uses.setdefault(name, []).append((math.prod(array.shape), leaf.size))
    for name, pairs in uses.items():
      sizes, sizes_of_leaves = zip(*pairs, strict=True)
      if sum(sizes) > _MOST_USES * (max(sizes) + sum(sizes_of_leaves)):
        raise ContainerError(
          f'{name}: {len(pairs)} leaves need it, which are small beside it'
        )

  def entry(self, name: str) -> manifest_lib.RecordEntry:
    """Returns the entry of a record that can be decoded."""
    if name not in self.entries:
      raise ContainerError(f'{name}: no such record')
    entry = self.entries[name]
    unknown = [] if entry.is_known else [f'coder {entry.coder!r:.100}']
    for leaf in entry.leaves:
      if leaf.type_name and leaf.leaf_class is None:
        unknown.append(f'leaf type {leaf.type_name!r:.100}')
      if leaf.base_arrays and self._base is None:
        raise ContainerError(
          f'{leaf.path}: it is stored beside {leaf.base_arrays[0].path} of another '
          'model: give that model as the base'
        )
    if unknown:
      raise ContainerError(
        f'the {unknown[0]} is not known: import the module that registers it'
      )
    return entry

  def resolver(self, started: Started) -> Resolve:
    """Returns a function from a path to its array, in a `started` record or another."""
    decoded = functools.cache(self.decode)

    def resolve(path: str) -> Any:
      name = self.holders.get(path)
      if name is None:
        raise ContainerError(f'{path}: other parameters need it, but it is missing')
      flat = started[name].result() if name in started else decoded(name)
      return jax.device_get(structured.materialize(flat[path]))

    return resolve

  def decode(
    self,
    name: str,
    started: Started = types.MappingProxyType({}),
    *,
    rows: Rows | None = None,
    integers: bool = False,
    shared: bool = False,
  ) -> Flat:
    """Decodes a record to NumPy arrays and structured leaves.

    Args:
      name: name of the record.
      started: records that are decoded already, for leaves that need others.
      rows: where to decode leaves to; others get new memory.
      integers: whether multiples of one step stay integers.
      shared: whether arrays may share the memory of the base, and have any strides.
    """
    entry = self.entry(name)
    resolve = self.resolver(started)
    with (
      container.naming(self.files[name].name),
      container.naming(name),
      memory.bounded(name, entry.memory_bytes),
    ):
      return self._decoded(entry, resolve, rows or {}, integers, shared)

  def _decoded(
    self,
    entry: manifest_lib.RecordEntry,
    resolve: Resolve,
    rows: Rows,
    integers: bool,
    shared: bool,
  ) -> Flat:
    """Decodes a record, see `decode`."""
    leaves, known = [], {}
    arrays: list[np.ndarray] = []
    for leaf, specs in entry.leaf_specs:
      place = rows.get(entry.inner(leaf.path))
      if place is None and leaf.base is not None and not shared:
        place = [host.empty(leaf.shape, leaf.dtype)]
      needed = functools.partial(self._needed, leaf, resolve)
      leaves.append(_StoredLeaf(leaf, specs, place, integers, needed))
      is_difference = leaf.leaf_class is difference.Difference
      if is_difference and {'differences', 'column_scales'} <= set(leaf.arrays):
        index = leaf.arrays.index('differences')
        known[len(arrays) + index] = leaves[-1].known
      arrays += leaves[-1].arrays
    decode = coders.find(entry.coder).decode
    with self.files[entry.name].checked(entry.name, entry.crc32) as data:
      decode(entry.stream_spec, data, out=arrays, known=known)
    flat = {leaf.entry.path: leaf.value() for leaf in leaves}
    for leaf in entry.leaves:
      shapes = [self.leaves[x].shape for x in leaf.needs if x in self.leaves]
      if shapes and structured.is_structured(flat[leaf.path]):
        flat[leaf.path].check_needed(*shapes)
    return flat

  def _needed(self, leaf: manifest_lib.Leaf, resolve: Resolve) -> list[Any]:
    """Returns the arrays that a leaf is computed from."""
    needed = [resolve(path) for path in leaf.needs]
    if leaf.base is not None:
      assert self._base is not None
      columns_first = bool(leaf.settings.get('columns_first'))
      needed.append(self._base.get(leaf.base, columns_first))
    if (product := leaf.product) is not None:
      arrays = [self._base.get(array) for array in product.arrays if self._base]
      bases = [self._basis(segment) for segment in product.segments]
      dtype = np.dtype(leaf.dtype)
      needed.append(product.tensor(arrays, bases, leaf.shape, dtype))
    return needed

  def _read_basis(self, segment: int) -> np.ndarray | None:
    """Returns the basis of a segment; None for the identity."""
    path = models.names.basis(segment)
    if path not in self.leaves:
      return None
    basis: np.ndarray = self.decode(self.holders[path])[path]
    return basis


class _StoredLeaf:
  """A leaf while the coder fills the `arrays` as which it is stored."""

  def __init__(
    self,
    entry: manifest_lib.Leaf,
    specs: Sequence[specs_lib.ArraySpec],
    place: list[np.ndarray] | None,
    integers: bool,
    needed: Callable[[], list[Any]],
  ):
    """Makes room for the arrays: in `place`, if the coder can write them there."""
    self.entry, self._place, self._needed = entry, place, needed
    self._is_expanded = entry.is_expanded(integers)
    self._prediction: difference.Prediction | None = None
    if place is None or self._is_expanded:
      self.arrays = [host.empty(x.shape, x.dtype) for x in specs]
    else:
      self.arrays = [x.view(y.dtype) for x, y in zip(place, specs, strict=True)]

  @functools.cached_property
  def _leaf(self) -> Any:
    """The leaf; of differences with classes, these may not be decoded yet."""
    return self.entry.make(self.arrays)

  def known(self) -> np.ndarray:
    """Returns the classes of the differences, which the coder must know."""
    with container.naming(self.entry.path):
      self._prediction = self._leaf.predict(*self._needed(), run=pool.run)
    return self._prediction.classes

  def value(self) -> Any:
    """Returns the array or the leaf, when the stored arrays are decoded."""
    entry = self.entry
    if not entry.type_name:
      return self.arrays[0].view(np.dtype(entry.dtype))
    with container.naming(self.entry.path):
      if not self._is_expanded:
        return self._leaf
      if entry.crc32 is None:  # multiples of a step
        array = self._place[0] if self._place else host.empty(entry.shape, entry.dtype)
        self._leaf.write(array)
        return array
      if self._prediction is None:
        array = np.asarray(self._leaf.materialize(*self._needed()))
      else:
        array = self._leaf.joined(self._prediction, run=pool.run)
      stored = array.T if self._leaf.columns_first else array
      if checksums.of_array(stored) != entry.crc32:
        raise ValueError('decoded elements differ from the encoded ones')
    if self._place is None:
      return array
    self._place[0][...] = host.contiguous(array)
    return self._place[0]

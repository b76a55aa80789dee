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
_MOST_USES = 16  # of arrays by leaves that are small beside them

Flat = dict[str, Any]
"""Leaves by path."""

Rows = Mapping[str, list[np.ndarray]]
"""Arrays to decode a leaf into, by its path within the record."""

Started = Mapping[str, 'futures.Future[Flat]']
"""Records that are being decoded, by their names."""


class Decoder:
  """Decodes the records of a file, or of all shards of one.

  Attributes:
    files: the file of each stream, by the name of the stream.
    entries: the manifest's entry of each record, by its name.
    leaves, holders: the entry and the record of each leaf, by its path.
    entry: a function from a name to the entry of a record that can be decoded.
  """

  def __init__(
    self,
    manifest: manifest_lib.Manifest,
    files: Mapping[str, container.StreamReader],
    base: base_lib.Base | None = None,
  ):
    """Checks how often leaves need others; `entry` checks a record when it is used."""
    self._config, self._base, self.files = manifest.config, base, files
    self.entries = {record.name: record for record in manifest.records}
    self.leaves: dict[str, manifest_lib.Leaf] = {}
    self.holders: dict[str, str] = {}
    for record in manifest.records:
      for leaf in record.leaves:
        self.leaves[leaf.path], self.holders[leaf.path] = leaf, record.name
    self.entry = functools.cache(self._checked_entry)
    self._basis = functools.lru_cache(_MOST_BASES)(self._read_basis)
    self._check_uses()

  def _check_uses(self) -> None:
    """Checks that small leaves do not need large arrays over and over.

    A leaf takes the time to go through all that it needs, however small it is.
    """
    needed: dict[str | None, int] = {}
    total = elements = 0
    for leaf in self.leaves.values():
      names = [x for x in leaf.needs if x in self.leaves]
      uses: list[tuple[str | None, int]]
      uses = [(name, self.leaves[name].size) for name in names]
      for array in leaf.base_arrays:
        name = array.path if self._base is None else self._base.find(array.path)
        uses.append((name, math.prod(array.shape)))
      needed |= uses
      total += sum(size for _, size in uses)
      elements += leaf.size if uses else 0
    if total > _MOST_USES * (elements + sum(needed.values())):
      raise ContainerError('leaves that are small need large arrays too often')

  def _checked_entry(self, name: str) -> manifest_lib.RecordEntry:
    """Returns the entry of a record after all checks that need none of its bytes."""
    if name not in self.entries:
      raise ContainerError(f'{name}: no such record')
    entry = self.entries[name]
    with container.naming(self.files[name].name):
      entry.check()
      for leaf in entry.leaves:
        with container.naming(leaf.path):
          self._check_needed(leaf)
    return entry

  def _check_needed(self, leaf: manifest_lib.Leaf) -> None:
    """Checks that there are the arrays from which a leaf is computed."""
    for path in leaf.needs:
      holder = self.holders.get(path)
      if holder is None and self._config is not None:
        raise ValueError(f'it needs {path}, which is missing')
      if holder is not None and any(x.needs for x in self.entries[holder].leaves):
        raise ValueError(f'it needs {path}, whose record needs others')
    for array in leaf.base_arrays:
      if self._base is None:
        raise ValueError(
          f'it is stored beside {array.path} of another model: give that model as the '
          'base'
        )
      self._base.check(array)

  def decode(
    self,
    name: str,
    started: Started = types.MappingProxyType({}),
    *,
    rows: Rows | None = None,
    integers: bool = False,
    as_arrays: bool = False,
    shared: bool = False,
  ) -> Flat:
    """Decodes a record to NumPy arrays and structured leaves.

    Args:
      name: name of the record.
      started: records that are decoded already, for leaves that need others.
      rows: where to decode leaves to; others get new memory.
      integers: whether multiples of one step stay integers.
      as_arrays: whether the leaves are materialized.
      shared: whether arrays may share the memory of the base, and have any strides.
    """
    entry, file = self.entry(name), self.files[name]
    decoded = functools.cache(self.decode)  # for several leaves that need one record
    leaves, known = [], {}
    arrays: list[np.ndarray] = []
    with (
      container.naming(file.name),
      container.naming(name),
      memory.bounded(name, entry.memory_bytes),
    ):
      for leaf, specs in entry.leaf_specs:
        out = (rows or {}).get(entry.inner(leaf.path))
        if out is None and leaf.base is not None and not shared:
          out = [host.empty(leaf.shape, leaf.dtype)]
        needed = functools.partial(self._needed, leaf, started, decoded)
        shapes = [self.leaves[x].shape for x in leaf.needs if x in self.leaves]
        if not leaf.needs:
          shapes = [leaf.shape if leaf.base is None else leaf.base.shape]
        leaves.append(_StoredLeaf(leaf, specs, out, integers, needed, shapes))
        is_difference = leaf.leaf_class is difference.Difference
        if is_difference and {'differences', 'column_scales'} <= {*leaf.arrays}:
          index = leaf.arrays.index('differences')
          known[len(arrays) + index] = leaves[-1].known
        arrays += leaves[-1].arrays
      decode = coders.CODERS[entry.coder].decode
      with file.checked(name, entry.crc32) as data:
        decode(entry.stream_spec, data, out=arrays, known=known)
      return {leaf.entry.path: leaf.value(as_arrays=as_arrays) for leaf in leaves}

  def _needed(
    self, leaf: manifest_lib.Leaf, started: Started, decoded: Callable[[str], Flat]
  ) -> list[Any]:
    """Returns the arrays that a leaf is computed from."""
    needed = []
    for path in leaf.needs:
      if path not in self.holders:  # a PyTree may have the leaf alone
        raise ValueError(f'it needs {path}, which is missing')
      name = self.holders[path]
      flat = started[name].result() if name in started else decoded(name)
      needed.append(jax.device_get(structured.materialize(flat[path])))
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

  def _read_basis(self, segment: int) -> np.ndarray:
    """Returns the basis of a segment."""
    path = models.names.basis(segment)
    if path not in self.leaves:
      raise ValueError(f'it needs {path}, which is missing')
    basis: np.ndarray = self.decode(self.holders[path])[path]
    return basis


class _StoredLeaf:
  """A leaf while the coder fills the `arrays` as which it is stored."""

  def __init__(
    self,
    entry: manifest_lib.Leaf,
    specs: Sequence[specs_lib.ArraySpec],
    out: list[np.ndarray] | None,
    integers: bool,
    needed: Callable[[], list[Any]],
    shapes: Sequence[manifest_lib.Shape],
  ):
    """Makes room for the arrays: in `out`, if the coder can write them there."""
    self.entry, self._out, self._needed, self._shapes = entry, out, needed, shapes
    self._is_expanded = entry.is_expanded(integers)
    self._prediction: difference.Prediction | None = None
    if out is None or self._is_expanded:
      self.arrays = [host.empty(x.shape, x.dtype) for x in specs]
    else:
      self.arrays = [x.view(y.dtype) for x, y in zip(out, specs, strict=True)]

  @functools.cached_property
  def _leaf(self) -> Any:
    """The leaf; of differences with classes, these may not be decoded yet."""
    return self.entry.make(self.arrays, self._shapes)

  def known(self) -> np.ndarray:
    """Returns the classes of the differences, which the coder must know."""
    with container.naming(self.entry.path):
      self._prediction = self._leaf.predict(*self._needed(), run=pool.run)
    return self._prediction.classes

  def value(self, *, as_arrays: bool) -> Any:
    """Returns the array or the leaf, when the stored arrays are decoded."""
    entry = self.entry
    if not entry.type_name:
      return self.arrays[0].view(np.dtype(entry.dtype))
    with container.naming(entry.path):
      if not self._is_expanded and not as_arrays:
        return self._leaf
      if not self._is_expanded:
        needed = self._needed()
        leaf = self._leaf.materialize(*needed) if needed else self._leaf
        return jax.device_get(structured.materialize(leaf))
      if entry.crc32 is None:  # multiples of a step
        array = self._out[0] if self._out else host.empty(entry.shape, entry.dtype)
        self._leaf.write(array)
        return array
      if self._prediction is None:
        array = np.asarray(self._leaf.materialize(*self._needed()))
      else:
        array = self._leaf.joined(self._prediction, run=pool.run)
      stored = array.T if self._leaf.columns_first else array
      if checksums.of_array(stored) != entry.crc32:
        raise ValueError('decoded elements differ from the encoded ones')
    if self._out is None:
      return array
    self._out[0][...] = host.contiguous(array)
    return self._out[0]

"""The records of a file: decodes them, into given memory or into new memory."""

from collections.abc import Callable, Collection, Mapping, Sequence
import functools
import math
from typing import Any

import jax
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.file import container
from rotbits_jax.file import leaves as leaves_lib
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import memory as memory_lib
from rotbits_jax.file.container import ContainerError
from rotbits_jax.relative import base as base_lib
from rotbits_jax.relative import entries
from rotbits_jax.structured import subspaces
from rotbits_jax.system import checksums
from rotbits_jax.system import host

_MOST_BASES = 8  # that are held, because several parameters need one
_MOST_USES = 16  # of an array by leaves that are small beside it

Flat = dict[str, Any]
"""Leaves by path."""

Resolve = Callable[[str], Any]
"""Takes the path of a parameter; returns its array."""


class Records:
  """The records of a file, or of all shards of one.

  Attributes:
    files: the file of each record, by the name of the record.
    entries: the manifest's entry of each record, by its name.
    leaves: the manifest's entry of each leaf, by its path.
    holders: the name of the record of each leaf, by its path.
  """

  def __init__(
    self,
    files: Sequence[container.StreamReader],
    manifests: Sequence[manifest_lib.Manifest],
    base: base_lib.Base | None = None,
  ):
    """Finds the records.

    Args:
      files: the files.
      manifests: the manifest of each file.
      base: has the arrays that leaves need and the files do not hold.

    Raises:
      ContainerError: if two records have one name, two leaves have one path, or a leaf
        needs another one that needs others itself; if many small leaves need one large
        array; or if the base is not the one that the files need.
    """
    self._base = base
    self._basis = functools.lru_cache(_MOST_BASES)(self._read_basis)
    self.files: dict[str, container.StreamReader] = {}
    self.entries: dict[str, manifest_lib.RecordEntry] = {}
    self.leaves: dict[str, leaves_lib.Leaf] = {}
    self.holders: dict[str, str] = {}
    for file, own in zip(files, manifests, strict=True):
      with file.errors():
        for record in own.records:
          if record.name in self.entries:
            raise ContainerError(f'{record.name}: two shards have this record')
          self.files[record.name], self.entries[record.name] = file, record
          for leaf in record.leaves:
            if leaf.path in self.leaves:
              raise ContainerError(f'{leaf.path}: another record has this leaf, too')
            self.leaves[leaf.path], self.holders[leaf.path] = leaf, record.name
    config = manifests[0].config
    square = () if config is None else (config.hidden_size, config.hidden_size)
    widths = () if config is None else config.segment_widths
    identities = {i for i, width in enumerate(widths) if (width, width) == square}
    waiting = {self.holders[path] for path, leaf in self.leaves.items() if leaf.waits}
    # Other shards may have these.
    outer = {} if config is None else models.outer_shapes(config)
    for path, leaf in self.leaves.items():
      for other in leaf.needs:
        if other in self.leaves and self.leaves[other].needs:
          raise ContainerError(f'{path}: it needs {other}, which needs others')
        if leaf.waits and self.holders.get(other) in waiting:
          raise ContainerError(
            f'{path}: it needs {other}, whose record waits for others'
          )
        name = other.split('/')[0]
        is_layer = models.names.layer_index(name) is not None
        is_known = config is None or is_layer or name in outer
        if other not in self.leaves and (name in self.entries or not is_known):
          raise ContainerError(f'{path}: it needs {other}, which is missing')
      if base is not None:
        for array in leaf.base_arrays:
          try:
            base.check(array)
          except ValueError as error:
            raise ContainerError(f'{path}: {error}') from error
      if leaf.product is not None:
        self._check_segments(leaf, leaf.product, identities, square)
    self._check_uses()

  def _check_uses(self) -> None:
    """Checks that small leaves do not need one large array over and over.

    A leaf takes the time to go through all that it needs, however small it is.

    Raises:
      ContainerError: if they do. It names the array.
    """
    uses: dict[str | None, list[tuple[int, int]]] = {}
    for leaf in self.leaves.values():
      for path in leaf.needs:
        if path in self.leaves:
          uses.setdefault(path, []).append((self.leaves[path].size, leaf.size))
      for array in leaf.base_arrays:
        if self._base is not None:
          found = self._base.find(array.path)
          uses.setdefault(found, []).append((math.prod(array.shape), leaf.size))
    for name, pairs in uses.items():
      sizes, own = zip(*pairs, strict=True)
      if sum(sizes) > _MOST_USES * (max(sizes) + sum(own)):
        raise ContainerError(
          f'{name}: {len(pairs)} leaves need it, which are small beside it'
        )

  def _check_segments(
    self,
    leaf: leaves_lib.Leaf,
    product: entries.Product,
    identities: Collection[int],
    square: tuple[int, ...],
  ) -> None:
    """Checks that the bases of a product are there; a missing one is the identity.

    Raises:
      ContainerError: if one is not.
    """
    missing = [x for x in product.segments if models.names.basis(x) not in self.leaves]
    for segment in missing:
      if segment not in identities:
        raise ContainerError(f'{leaf.path}: the basis {segment} is missing')
    if len(missing) == 2 and leaf.shape != square:
      raise ContainerError(f'{leaf.path}: it has not the shape of the identity')

  def _read_basis(self, segment: int) -> np.ndarray | None:
    """Returns the basis of a segment; None for the identity."""
    path = models.names.basis(segment)
    if path not in self.leaves:
      return None
    found: np.ndarray = self.decode(self.holders[path])[path]
    return found

  def entry(self, name: str) -> manifest_lib.RecordEntry:
    """Returns the entry of a record.

    Raises:
      ContainerError: if there is no such record, if it needs a part of a package that
        is not installed, or if it needs a base and none is given.
    """
    if name not in self.entries:
      raise ContainerError(f'{name}: no such record')
    entry = self.entries[name]
    if not entry.is_known:
      raise _unknown('coder', entry.coder)
    for leaf in entry.leaves:
      if leaf.type_name and leaf.leaf_class is None:
        raise _unknown('leaf type', leaf.type_name)
      if leaf.base_arrays and self._base is None:
        raise ContainerError(
          f'{leaf.path}: it is stored beside {leaf.base_arrays[0].path} of another '
          'model: give that model as the base'
        )
    return entry

  def resolver(self, decoded: Callable[[str], Flat]) -> Resolve:
    """Returns a function that takes the path of a parameter and returns its array.

    Args:
      decoded: takes the name of a record; returns its leaves.
    """

    def resolve(path: str) -> Any:
      if path not in self.holders:
        raise ContainerError(f'{path}: other parameters need it, but it is missing')
      leaf = decoded(self.holders[path])[path]
      return jax.device_get(structured.materialize(leaf))

    return resolve

  def decode(
    self,
    name: str,
    memory: Mapping[str, list[np.ndarray]] | None = None,
    resolve: Resolve | None = None,
  ) -> Flat:
    """Decodes a record.

    Args:
      name: name of the record.
      memory: where to decode leaves to, see `memory.allocate`; new memory by default.
        Leaves that it lacks may share the memory of the base, and have any strides.
      resolve: returns the parameters that leaves of the record need. By default they
        are decoded, too.

    Returns:
      The leaves by path: NumPy arrays, those in `memory` where it has some, and
      structured leaves.

    Raises:
      ContainerError: if there is no such record, or if it is damaged.
    """
    entry = self.entry(name)
    if resolve is None:
      resolve = self.resolver(functools.cache(self.decode))
    with self.files[name].errors():
      try:
        if not memory:
          memory_lib.check(name, entry.decoded_bytes)
        if memory is None:
          memory = memory_lib.allocate([entry])
        targets = [
          _target(leaf, specs, memory.get(entry.inner(leaf.path)))
          for leaf, specs in entry.leaf_specs()
        ]
        with self.files[name].checked(name, entry.crc32) as data:
          arrays = [array for own in targets for array in own]
          entry.record_coder.decode(entry.stream_spec, data, out=arrays)
        flat = {
          leaf.path: self._leaf(leaf, parts, resolve)
          for leaf, parts in zip(entry.leaves, targets, strict=True)
        }
        for path, leaf in flat.items():
          own = memory.get(entry.inner(path))
          if own is None:
            continue
          if self.leaves[path].crc32 is not None:
            own[0][...] = host.contiguous(leaf)
            flat[path] = own[0]
          elif self.leaves[path].is_multiples and len(own) == 1:
            leaf.write(own[0])
            flat[path] = own[0]
      except MemoryError:
        raise memory_lib.too_large(name, entry.decoded_bytes) from None
      except ContainerError:
        raise
      except ValueError as error:
        raise ContainerError(f'{name}: {error}') from error
    return flat

  def _leaf(
    self,
    entry: leaves_lib.Leaf,
    parts: list[np.ndarray],
    resolve: Resolve,
  ) -> Any:
    """Returns the array or the leaf of an entry.

    Raises:
      ContainerError: if the parts do not make it up.
    """
    if not entry.type_name:
      (part,) = parts
      return part.view(np.dtype(entry.dtype))
    try:
      leaf = entry.make(parts)
      known = [self.leaves[x].shape for x in entry.needs if x in self.leaves]
      if entry.needs and len(known) == len(entry.needs):
        leaf.check_needed(*known)
      if entry.crc32 is None:
        return leaf
      needed = list(map(resolve, entry.needs))
      if entry.base is not None:
        assert self._base is not None
        needed.append(self._base.get(entry.base, leaf.columns_first))
      if entry.product is not None:
        needed.append(self._product(entry, entry.product))
      array = np.asarray(leaf.materialize(*needed))
    except ContainerError:
      raise
    except ValueError as error:
      raise ContainerError(f'{entry.path}: {error}') from error
    if checksums.of_array(array.T if leaf.columns_first else array) != entry.crc32:
      raise ContainerError(
        f'{entry.path}: decoded elements differ from the encoded ones'
      )
    return array

  def _product(self, entry: leaves_lib.Leaf, product: entries.Product) -> np.ndarray:
    """Returns the product that an array is stored beside."""
    arrays = []
    for array in product.arrays:
      assert self._base is not None
      arrays.append(self._base.get(array))
    bases = [self._basis(segment) for segment in product.segments]
    dtype = np.dtype(entry.dtype)
    return subspaces.tensor(product.way, arrays, bases, entry.shape, dtype)


def _unknown(noun: str, name: str) -> ContainerError:
  """Returns the error for a part that another package must register."""
  return ContainerError(
    f'the {noun} {name!r:.100} is not known: import the module that registers it'
  )


def _target(
  leaf: leaves_lib.Leaf, specs: Sequence[Any], own: list[np.ndarray] | None
) -> list[np.ndarray]:
  """Returns the arrays to decode a leaf into.

  Args:
    leaf: the entry of the leaf.
    specs: the specs of its arrays.
    own: its memory; None for new memory.
  """
  if own is None or leaf.crc32 is not None or len(own) != len(specs):
    return [host.empty(x.shape, x.dtype) for x in specs]
  return [array.view(x.dtype) for array, x in zip(own, specs, strict=True)]

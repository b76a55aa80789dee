"""The units of a file: decodes one of them, into given arrays or into new ones."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import functools
from typing import Any

import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.coding import weights
from rotbits_jax.file import container
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import memory
from rotbits_jax.file.container import ContainerError
from rotbits_jax.system import checksums as checksums_lib
from rotbits_jax.system import host

Tree = dict[str, Any]


class Records:
  """The units of a file, or of all shards of one.

  Attributes:
    files: the file of each unit, by the name of the unit.
    entries: the manifest's entry of each unit, by its name.
  """

  def __init__(
    self,
    files: Sequence[container.StreamReader],
    manifests: Sequence[manifest_lib.Manifest],
  ):
    """Finds the units.

    Args:
      files: the files.
      manifests: the manifest of each file.

    Raises:
      ContainerError: if two files have a unit of one name.
    """
    self._is_model = manifests[0].config is not None
    self.files: dict[str, container.StreamReader] = {}
    self.entries: dict[str, manifest_lib.Record] = {}
    for file, own in zip(files, manifests, strict=True):
      with file.errors():
        for unit in own.units:
          if unit.name in self.entries:
            raise ContainerError(f'{unit.name}: two shards have this unit')
          self.files[unit.name], self.entries[unit.name] = file, unit

  def entry(self, name: str) -> manifest_lib.Record:
    """Returns the entry of a unit.

    Raises:
      ContainerError: if there is no such unit.
    """
    if name not in self.entries:
      raise ContainerError(f'{name}: no such unit')
    return self.entries[name]

  def leaves(self) -> Iterator[tuple[str, manifest_lib.Leaf, list[Any]]]:
    """Yields the path, the entry and the specs of the arrays of every leaf."""
    for name, unit in self.entries.items():
      prefix = f'{name}/' if is_layer(name) else ''
      for leaf, specs in unit.leaf_specs():
        yield prefix + leaf.path, leaf, specs

  def decode(
    self,
    name: str,
    out: Mapping[str, list[np.ndarray] | structured.UniformlyQuantized] | None = None,
    integers: bool = False,
  ) -> Tree:
    """Decodes a unit.

    Args:
      name: name of the unit.
      out: arrays to decode leaves into, by path; the integers of `UniformlyQuantized`.
      integers: whether the other matrices on grids become `UniformlyQuantized`.

    Returns:
      The parameters as NumPy arrays and structured leaves. Dependent leaves are not
      expanded, see `expanded`.

    Raises:
      ContainerError: if there is no such unit, or if it is damaged.
    """
    unit = self.entry(name)
    file = self.files[name]
    with file.errors():
      memory.check(name, unit.memory_bytes(integers))
      flat: Tree = {}
      try:
        given: dict[str, Any] = {}
        if integers:
          shapes = {leaf.path: leaf.shape for leaf in unit.leaves}
          for path, grid in unit.grids().items():
            given[path] = structured.UniformlyQuantized(
              host.empty(shapes[path], grid.integer_dtype),
              np.asarray(grid.unit),
              grid.dtype.name,
            )
        given |= {} if out is None else out
        targets = []
        for leaf, specs in unit.leaf_specs():
          target = None if leaf.is_packed else given.get(leaf.path)
          if isinstance(target, structured.UniformlyQuantized):
            targets.append(target.integers)
          elif target is not None:
            pairs = zip(target, specs, strict=True)
            targets += [array.view(spec.dtype) for array, spec in pairs]
          else:
            targets += [host.empty(x.shape, x.dtype) for x in specs]
        with file.checked(name, unit.crc32) as data:
          arrays = iter(weights.decode(unit.coder, data, out=targets))
        for leaf in unit.leaves:
          parts = {key: next(arrays) for key in leaf.arrays}
          own = given.get(leaf.path)
          if isinstance(own, structured.UniformlyQuantized):
            flat[leaf.path] = own
            continue
          found = _leaf(name, leaf, parts)
          if isinstance(found, structured.Dependent):
            self._check_needed(name, leaf, found)
          if leaf.is_packed and own is not None:
            (target,) = own
            target[...] = found
            found = target
          flat[leaf.path] = found
      except MemoryError:
        raise memory.too_large(name, unit.decoded_bytes) from None
      except ContainerError:
        raise
      except ValueError as error:
        raise ContainerError(f'{name}: {error}') from error
    return unit.tree(flat)

  def _check_needed(
    self, name: str, entry: manifest_lib.Leaf, leaf: structured.Dependent
  ) -> None:
    """Refuses a leaf that could not be expanded, before anything needs it to be."""
    path = _path(name, entry)
    if self._is_model and is_layer(name):
      raise ContainerError(f'{path}: parameters of a layer cannot depend on others')
    if leaf.eager and entry.expanded is None:
      raise ContainerError(f'{path}: the checksum of the expanded array is missing')
    shapes = []
    for needed in leaf.needs:
      unit = self.entries.get(needed.split('/')[0])
      if unit is None:  # in another shard
        return
      found = {x.path: x for x in unit.leaves}
      if needed not in found:
        raise ContainerError(f'{path}: it needs {needed}, which is missing')
      kind = structured.KINDS.get(found[needed].kind)
      if kind is not None and issubclass(kind, structured.Dependent):
        raise ContainerError(f'{path}: it needs {needed}, which depends on others')
      shapes.append(found[needed].shape)
    try:
      leaf.check_needed(*shapes)
    except ValueError as error:
      raise ContainerError(f'{path}: {error}') from error

  def start(
    self, names: Sequence[str], start: weights.Start, integers: bool = False
  ) -> 'list[futures.Future[Tree]]':
    """Starts to decode and expand several units.

    Args:
      names: names of the units. Records come after those that they need.
      start: starts a job.
      integers: see `decode`.

    Returns:
      The parameters of each unit, without eager dependent leaves.
    """
    decode = functools.partial(self.decode, integers=integers)
    decoded = {name: start(functools.partial(decode, name)) for name in names}
    other = lambda name: decoded[name].result() if name in decoded else {}
    # A job that only waits for a decoded unit would keep a thread from other units.
    return [
      start(functools.partial(self.expanded, name, other))
      if self.needs_others(name)
      else decoded[name]
      for name in names
    ]

  def needs_others(self, name: str) -> bool:
    """Tells whether leaves of a unit are expanded with parameters of other units."""
    return any(
      leaf.expanded is not None and not leaf.is_packed
      for leaf in self.entry(name).leaves
    )

  def expanded(self, name: str, decoded: Callable[[str], Tree]) -> Tree:
    """Replaces the eager dependent leaves of a unit by the arrays they stand for.

    Args:
      name: name of the unit.
      decoded: takes the name of a unit; returns its decoded leaves.

    Raises:
      ContainerError: if a leaf cannot be expanded, or differs from what was encoded.
    """
    flat = structured.flatten(decoded(name))
    for entry in self.entry(name).leaves:
      if entry.expanded is None or entry.is_packed:
        continue
      path = _path(name, entry)
      leaf = flat[entry.path]
      if not isinstance(leaf, structured.Dependent):
        raise ContainerError(f'{path}: the leaf does not depend on other parameters')
      needed = []
      for other in leaf.needs:
        found = structured.flatten(decoded(other.split('/')[0]))
        if other not in found:
          raise ContainerError(f'{path}: it needs {other}, which is missing')
        needed.append(structured.materialize(found[other]))
      try:
        array = leaf.expand(*needed)
      except ValueError as error:
        raise ContainerError(f'{path}: {error}') from error
      if checksums_lib.of_array(array) != entry.expanded:
        raise ContainerError(f'{path}: {_DIFFERENT}')
      flat[entry.path] = array
    return self.entry(name).tree(flat)


def _leaf(name: str, leaf: manifest_lib.Leaf, parts: dict[str, np.ndarray]) -> Any:
  if not leaf.kind:
    return parts[''].view(np.dtype(leaf.dtype))
  if leaf.kind not in structured.KINDS:
    raise ContainerError(
      f'{name}/{leaf.path}: leaves of kind {leaf.kind!r} are unknown; '
      'import their module'
    )
  try:
    found: Any = structured.KINDS[leaf.kind].from_stored(leaf.settings, parts)
    key = leaf.kind, leaf.shape, leaf.dtype, leaf.names
    same = structured.stack_key(found) == key
    if same and isinstance(found, structured.Packed):
      found = found.array()
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
    raise ContainerError(f'{name}/{leaf.path}: {error}') from error
  if not same:
    raise ContainerError(f'{name}/{leaf.path}: the leaf differs from the manifest')
  if leaf.is_packed and checksums_lib.of_array(found) != leaf.expanded:
    raise ContainerError(f'{name}/{leaf.path}: {_DIFFERENT}')
  return found


_DIFFERENT = 'decoded numbers differ from the encoded numbers'


def _path(name: str, leaf: manifest_lib.Leaf) -> str:
  """Returns the path of a leaf of a unit."""
  return f'{name}/{leaf.path}' if is_layer(name) else leaf.path


def is_layer(name: str) -> bool:
  """Tells whether a unit is a layer."""
  return models.names.layer_index(name) is not None

"""Decodes the records of a file: leaves by path, and layers straight into stacks.

A damaged or incomplete file raises `ContainerError`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
import contextlib
import functools
import itertools
import math
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.coding import known as known_lib
from rotbits_jax.coding import pool
from rotbits_jax.coding import specs
from rotbits_jax.file import container
from rotbits_jax.file import leaves as leaves_lib
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import placement
from rotbits_jax.file.container import ContainerError
from rotbits_jax.relative import base as base_lib
from rotbits_jax.relative import entries as entries_lib
from rotbits_jax.structured import difference
from rotbits_jax.structured import subspaces
from rotbits_jax.system import checksums
from rotbits_jax.system import host
from rotbits_jax.system import progress

LARGE = 1 << 30
"""Bytes of records beside which no others are held, as those of the widest layers."""

_MOST_BASES = 8  # of subspaces that are held, because several parameters need one
_MOST_USES = 16  # of an array by leaves that are small beside it

Flat = dict[str, Any]
"""Leaves by path."""

Resolve = Callable[[str], Any]
"""Takes the path of a parameter; returns its array."""

Rows = Mapping[str, list[np.ndarray]]
"""Arrays to decode a leaf into, by its path within the record."""


class Decoder:
  """Decodes the records of a file, or of all shards of one.

  Attributes:
    entries: the manifest's entry of each record, by its name.
    leaves: the manifest's entry of each leaf, by its path.
    holders: the name of the record of each leaf, by its path.
    files: the file of each record, by the name of the record.
  """

  def __init__(
    self,
    files: Sequence[container.StreamReader],
    manifests: Sequence[manifest_lib.Manifest],
    base: base_lib.Base | None = None,
  ):
    """Checks what the manifests of all shards say together.

    Args:
      files: the files.
      manifests: the manifest of each file.
      base: has the arrays that leaves need and the files do not hold.
    """
    self._base = base
    self._basis = functools.lru_cache(_MOST_BASES)(self._read_basis)
    self.files: dict[str, container.StreamReader] = {}
    self.entries: dict[str, manifest_lib.RecordEntry] = {}
    self.leaves: dict[str, leaves_lib.Leaf] = {}
    self.holders: dict[str, str] = {}
    for file, manifest in zip(files, manifests, strict=True):
      with file.errors():
        for record in manifest.records:
          if record.name in self.entries:
            raise ContainerError(f'{record.name}: two shards have this record')
          self.files[record.name], self.entries[record.name] = file, record
          for leaf in record.leaves:
            if leaf.path in self.leaves:
              raise ContainerError(f'{leaf.path}: another record has this leaf, too')
            self.leaves[leaf.path], self.holders[leaf.path] = leaf, record.name
    config = manifests[0].config
    for path, leaf in self.leaves.items():
      try:
        self._check_needs(leaf, config)
      except ValueError as error:
        raise ContainerError(f'{path}: {error}') from error
    self._check_uses()

  def _check_needs(
    self, leaf: leaves_lib.Leaf, config: models.ModelConfig | None
  ) -> None:
    """Checks that what a leaf needs is there, or may be in another shard.

    Raises:
      ValueError: if it is not.
    """
    for path in leaf.needs:
      holder = self.holders.get(path)
      if holder is not None:
        if any(x.needs for x in self.entries[holder].leaves):
          raise ValueError(f'it needs {path}, whose record needs others')
      else:  # it may be in another shard
        record = path.split('/')[0]
        is_known = config is None or record in models.outer_shapes(config)
        if record in self.entries or not is_known:
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
      for array in leaf.base_arrays if self._base is not None else ():
        path_in_base = self._base.find(array.path)
        uses.setdefault(path_in_base, []).append((math.prod(array.shape), leaf.size))
    for name, pairs in uses.items():
      sizes, sizes_of_leaves = zip(*pairs, strict=True)
      if sum(sizes) > _MOST_USES * (max(sizes) + sum(sizes_of_leaves)):
        raise ContainerError(
          f'{name}: {len(pairs)} leaves need it, which are small beside it'
        )

  def entry(self, name: str) -> manifest_lib.RecordEntry:
    """Returns the entry of a record."""
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
    resolve: Resolve | None = None,
    *,
    rows: Rows | None = None,
    integers: bool = False,
    shared: bool = False,
  ) -> Flat:
    """Decodes a record.

    Args:
      name: name of the record.
      resolve: returns the parameters that leaves of the record need. By default they
        are decoded, too.
      rows: where to decode leaves to, see `allocate`; new memory for those it lacks.
      integers: whether multiples of one step stay integers.
      shared: whether arrays may share the memory of the base, and have any strides.

    Returns:
      The leaves by path: NumPy arrays and structured leaves.
    """
    entry = self.entry(name)
    if resolve is None:
      resolve = self.resolver(functools.cache(self.decode))
    with self.files[name].errors():
      try:
        if not rows:
          check_memory(name, entry.decoded_bytes)
        places = [(rows or {}).get(entry.inner(leaf.path)) for leaf in entry.leaves]
        places = [
          [host.empty(leaf.shape, leaf.dtype)]
          if place is None and leaf.base is not None and not shared
          else place
          for leaf, place in zip(entry.leaves, places, strict=True)
        ]
        targets = [
          _targets(leaf, specs, place, integers)
          for (leaf, specs), place in zip(entry.leaf_specs(), places, strict=True)
        ]
        stored = [
          _Stored(leaf, arrays, functools.partial(self._needed, leaf, resolve))
          for leaf, arrays in zip(entry.leaves, targets, strict=True)
        ]
        firsts = itertools.accumulate(map(len, targets), initial=0)
        known = {
          first + leaf.differences: leaf.known
          for first, leaf in zip(firsts, stored, strict=False)
          if leaf.differences is not None
        }
        with self.files[name].checked(name, entry.crc32) as data:
          arrays = list(itertools.chain(*targets))
          entry.record_coder.decode(entry.stream_spec, data, out=arrays, known=known)
        return {
          leaf.entry.path: self._leaf(leaf, place, integers)
          for leaf, place in zip(stored, places, strict=True)
        }
      except MemoryError:
        raise _too_large(name, entry.decoded_bytes) from None
      except ContainerError:
        raise
      except ValueError as error:
        raise ContainerError(f'{name}: {error}') from error

  def _leaf(
    self,
    stored: '_Stored',
    place: list[np.ndarray] | None,
    integers: bool,
  ) -> Any:
    """Returns the array or the leaf of an entry, made of its stored arrays."""
    entry = stored.entry
    if not entry.type_name:
      return stored.arrays[0].view(np.dtype(entry.dtype))
    try:
      leaf = stored.leaf
      shapes = [self.leaves[x].shape for x in entry.needs if x in self.leaves]
      if entry.needs and len(shapes) == len(entry.needs):
        leaf.check_needed(*shapes)
      if not entry.is_expanded(integers):
        return leaf
      if entry.crc32 is None:  # multiples of a step
        array = host.empty(entry.shape, entry.dtype) if place is None else place[0]
        leaf.write(array)
        return array
      array = stored.array()
    except ContainerError:
      raise
    except ValueError as error:
      raise ContainerError(f'{entry.path}: {error}') from error
    if place is None:
      return array
    place[0][...] = host.contiguous(array)
    return place[0]

  def _needed(self, entry: leaves_lib.Leaf, resolve: Resolve) -> list[Any]:
    """Returns the arrays that a leaf is computed from."""
    needed = [resolve(path) for path in entry.needs]
    if entry.base is not None:
      assert self._base is not None
      columns_first = bool(entry.settings.get('columns_first'))
      needed.append(self._base.get(entry.base, columns_first))
    if entry.product is not None:
      needed.append(self._product(entry, entry.product))
    return needed

  def _product(
    self, entry: leaves_lib.Leaf, product: entries_lib.Product
  ) -> np.ndarray:
    """Returns the product that an array is stored beside."""
    assert self._base is not None or not product.arrays
    arrays = [self._base.get(array) for array in product.arrays if self._base]
    bases = [self._basis(segment) for segment in product.segments]
    dtype = np.dtype(entry.dtype)
    return subspaces.tensor(product.way, arrays, bases, entry.shape, dtype)

  def _read_basis(self, segment: int) -> np.ndarray | None:
    """Returns the basis of a segment; None for the identity."""
    path = models.names.basis(segment)
    if path not in self.leaves:
      return None
    basis: np.ndarray = self.decode(self.holders[path])[path]
    return basis


class _Stored:
  """A leaf and its stored arrays, while these are decoded.

  Attributes:
    entry: the manifest's entry of the leaf.
    arrays: its stored arrays; they are filled when the record is decoded.
  """

  def __init__(
    self,
    entry: leaves_lib.Leaf,
    arrays: list[np.ndarray],
    needed: Callable[[], list[Any]],
  ):
    """Takes a function that returns what the leaf is computed from."""
    self.entry, self.arrays, self._needed = entry, arrays, needed
    self._predicted: tuple[np.ndarray, difference.Prediction] | None = None

  @functools.cached_property
  def leaf(self) -> Any:
    """The leaf, when its arrays are decoded; differences with classes may be missing.

    Raises:
      ValueError: if the arrays do not make it up.
    """
    return self.entry.make(self.arrays)

  @property
  def differences(self) -> int | None:
    """The index of the differences, if they have classes, among the arrays."""
    names = self.entry.arrays
    if self.entry.leaf_class is not structured.Difference or (
      not {'differences', 'column_scales'} <= set(names)
    ):
      return None
    return names.index('differences')

  def known(self) -> known_lib.Known:
    """Returns what the decoder knows of the differences when the rest is decoded."""
    try:
      self._predicted = self.leaf.predict(*self._needed(), run=pool.run)
    except ContainerError:
      raise
    except ValueError as error:
      raise ContainerError(f'{self.entry.path}: {error}') from error
    classes = self._predicted[1].classes
    return known_lib.Known(classes, difference.class_shifts(self.leaf.dtype))

  def array(self) -> np.ndarray:
    """Returns the array of a leaf that only files hold.

    Raises:
      ValueError: if its checksum differs, or an array that it needs is missing.
    """
    if self._predicted is None:
      array = np.asarray(self.leaf.materialize(*self._needed()))
    else:
      array = self.leaf.joined(*self._predicted, run=pool.run)
    columns_first = self.leaf.columns_first
    if checksums.of_array(array.T if columns_first else array) != self.entry.crc32:
      raise ValueError('decoded elements differ from the encoded ones')
    return array


def _targets(
  leaf: leaves_lib.Leaf,
  specs: Sequence[specs.ArraySpec],
  place: list[np.ndarray] | None,
  integers: bool,
) -> list[np.ndarray]:
  """Returns the arrays to decode the stored arrays of a leaf into."""
  if place is None or leaf.is_expanded(integers):
    return [host.empty(x.shape, x.dtype) for x in specs]
  return [array.view(x.dtype) for array, x in zip(place, specs, strict=True)]


# ---- stacks of layers ----------------------------------------------------------------


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
    check_memory(name, largest * len(wanted))
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


# ---- memory --------------------------------------------------------------------------


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
      raise _too_large(leaf.path, sum(x.decoded_bytes for x in records)) from None
  return memory


def check_memory(name: str, nbytes: int) -> None:
  """Refuses to decode more than this machine can hold, before it allocates anything.

  The size of a file is no bound, because zeros take hardly any bytes in it.

  Args:
    name: name of the content, for the error.
    nbytes: the bytes that it takes in memory.
  """
  if nbytes > (_available() or nbytes):
    raise _too_large(name, nbytes)


def _too_large(name: str, nbytes: int) -> ContainerError:
  """Returns the error for content that memory cannot hold."""
  return ContainerError(
    f'{name}: it decodes to {nbytes:,} bytes, more than memory holds'
  )


# Where a container of Linux finds the bytes of memory that it may use, with the second
# and the first version of control groups.
_LIMITS = (
  '/sys/fs/cgroup/memory.max',
  '/sys/fs/cgroup/memory/memory.limit_in_bytes',
)


@functools.cache
def _available() -> int | None:
  """Returns the bytes of memory for this process; None if the system does not tell."""
  limits = []
  with contextlib.suppress(AttributeError, ValueError, OSError):  # not a Unix
    limits.append(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))
  for path in _LIMITS:
    with contextlib.suppress(OSError, ValueError):  # 'max' stands for no limit
      limits.append(int(pathlib.Path(path).read_text()))
  return min(limits, default=None)

"""The reader of files: reads a unit without the others, or the whole model.

    with Reader(path) as file:
      layer = file.unit('layers.3')      # nested dicts of NumPy arrays and leaves
      model = file.model()               # layers stacked

A unit is a part of a model that decodes on its own; `manifest` describes units and
leaves. The reader checks the whole manifest before it allocates memory. Several units
decode side by side: the checksum of one stream is computed while the blocks of another
are decoded.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pathlib
from typing import Any, NamedTuple, Self
import zlib

import jax
import numpy as np
from zlib_ng import zlib_ng

from rotbits_jax import checkpoints
from rotbits_jax import checksums as checksums_lib
from rotbits_jax import host
from rotbits_jax import models
from rotbits_jax import progress
from rotbits_jax import structured
from rotbits_jax.coding import weights
from rotbits_jax.file import container
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import placement
from rotbits_jax.file import shards
from rotbits_jax.file.container import ContainerError

Tree = dict[str, Any]


class Reader:
  """An encoded file, or all shards of one. The class is a context manager.

  Attributes:
    preset: name of the preset with which the file was encoded.
    options: options of the preset.
    config: config of the model; None for a PyTree of arrays.
    stem: name of the weights and of the slicing JSON in a checkpoint of SliceGPT.
    manifests: the manifest of the file, or of each shard.
    size: size of all files in bytes.
  """

  def __init__(self, source: container.Readable):
    """Reads and checks the headers and the manifests.

    Args:
      source: a path, bytes, or an open binary file. For shards, the path of their index
        or the path of the output without the numbers.

    Raises:
      ContainerError: if this is not a rotbits file, or if its manifest is damaged.
      OSError: if a path cannot be read.
    """
    files, index = shards.find(source)
    self._files = [container.StreamReader(file) for file in files]
    if index is not None:
      for file in self._files:
        if index.checksums[os.path.basename(file.name)] != file.manifest_crc32:
          raise ContainerError(
            f'{file.name}: the index names another shard of this name'
          )
    self.size = sum(file.size for file in self._files)
    self.manifests = [_manifest(file) for file in self._files]
    first = self.manifests[0]
    self.preset, self.options = first.preset, first.options
    self.config, self.stem = first.config, first.stem
    self._units: dict[str, tuple[container.StreamReader, manifest_lib.Unit]] = {}
    for file, own in zip(self._files, self.manifests, strict=True):
      with file.errors():
        if (own.preset, own.config) != (first.preset, first.config):
          raise ContainerError('the shards belong to different models')
        for unit in own.units:
          if unit.name in self._units:
            raise ContainerError(f'{unit.name}: two shards have this unit')
          self._units[unit.name] = file, unit
    if index is not None:
      self._check_index(index)
    if self.config is None:
      self._check_paths()
    if self.weights_files:
      self._check_places()

  def _check_index(self, index: shards.Index) -> None:
    """Checks that the index of the shards names each unit and its shard.

    Raises:
      ContainerError: if it does not.
    """
    found = {name: os.path.basename(own.name) for name, (own, _) in self._units.items()}
    if wrong := sorted(found.items() ^ index.units.items()):
      raise ContainerError(
        f'{wrong[0][0]}: the index and the shards differ in this unit'
      )
    if self.size != index.total_size:
      raise ContainerError(
        f'the shards must have {index.total_size} bytes by their index, got {self.size}'
      )

  def _check_paths(self) -> None:
    """Checks that no two units have leaves for one place in the tree.

    Raises:
      ContainerError: if two have.
    """
    seen: set[str] = set()
    for file, unit in self._units.values():
      # Tensors of a checkpoint are not in a tree. The names of two may begin alike.
      tensors = {leaf.path for leaf in unit.leaves} if self.weights_files else None
      own = unit.first_keys() if tensors is None else tensors
      with file.errors():
        if seen & own:
          raise ContainerError(f'{unit.name}: it has a leaf of another unit')
      seen |= own

  def _check_places(self) -> None:
    """Checks that the weights files hold each tensor once, and nothing else.

    Raises:
      ContainerError: naming a tensor or a file.
    """
    entries = [entry for own in self.manifests for entry in own.weights]
    names = [entry.layout.name for entry in entries]
    names += [
      file.name.removeprefix(manifest_lib.FILES)
      for own in self.manifests
      for file in own.files
    ]
    places = [path for entry in entries for path, _ in entry.layout.places]
    for text in (names, places):
      if twice := [x for x, count in collections.Counter(text).items() if count > 1]:
        raise ContainerError(f'{twice[0]}: the weights files have it twice')
    arrays = self.tensor_sizes()
    for path in places:
      if path not in arrays:
        raise ContainerError(f'{path}: a tensor of the weights files is missing')
    placed = set(places)
    for unit in self.units.values():
      for leaf in unit.leaves:
        if leaf.path not in placed:
          raise ContainerError(
            f'{leaf.path}: no weights file has a place for the tensor'
          )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: object) -> None:
    """Does nothing, because no file stays open: streams are mapped when read."""

  @property
  def weights_files(self) -> dict[str, checkpoints.WeightsFile]:
    """The weights files whose tensors are the units, by name; empty for a model."""
    return {x.layout.name: x.layout for own in self.manifests for x in own.weights}

  def rests(self) -> dict[str, bytes]:
    """Returns what is between the tensors of each weights file, joined.

    Raises:
      ContainerError: if a part is damaged, or the tensors do not fit their file.
    """
    sizes = self.tensor_sizes()
    found: dict[str, bytes] = {}
    left = manifest_lib.MOST_FILES
    for file, own in zip(self._files, self.manifests, strict=True):
      for entry in own.weights:
        with file.errors():
          name = entry.rest.name
          try:
            parts = entry.layout.rest(sizes)
          except ValueError as error:
            raise ContainerError(str(error)) from error
          data = file.checked(name, entry.rest.nbytes, entry.rest.crc32)
          size = sum(end - begin for begin, end in parts)
          left -= size
          if left < 0:
            raise ContainerError(
              f'{name}: too many bytes of the weights files are not in tensors'
            )
          found[entry.layout.name] = _inflate(name, data.tobytes(), size)
    return found

  def tensor_sizes(self) -> dict[str, int]:
    """Returns the bytes of every array in units, by its path."""
    return {
      leaf.path: leaf.nbytes
      for unit in self.units.values()
      for leaf in unit.leaves
      if leaf.is_array
    }

  def tensors(self, *, show_progress: bool = False) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a checkpoint that is stored as plain tensors, by name."""
    total = len(self._units)
    with progress.Progress('decode', total, 'unit', show=show_progress) as bar:
      for name in self._units:
        yield from structured.flatten(self._decode(name)).items()
        bar.update()

  @property
  def units(self) -> dict[str, manifest_lib.Unit]:
    """The manifest's entries of all units, by name."""
    return {name: unit for name, (_, unit) in self._units.items()}

  def unit(self, name: str) -> Tree:
    """Reads one unit, and other units only if its leaves depend on them.

    Args:
      name: 'layers.0', 'layers.1', ..., 'embed', 'final_norm', 'head' or 'buffers'. The
        units of a PyTree are its top-level keys.

    Returns:
      The parameters as NumPy arrays and structured leaves. A layer is not stacked.

    Raises:
      ContainerError: if there is no such unit, or if it is damaged.
    """
    return self._expanded(name, functools.cache(self._decode))

  def tensor(self, path: str) -> Any:
    """Reads one parameter, such as 'layers.3/attention/query/kernel'; see `unit`."""
    name, is_layer = path.split('/')[0], False
    if self.config is None:
      holders = {x.path: name for name, unit in self.units.items() for x in unit.leaves}
      name = holders.get(path, name)
    else:
      is_layer = _is_layer(name)
    tree = self.unit(name)
    flat = structured.flatten({name: tree} if is_layer else tree)
    if path not in flat:
      raise ContainerError(f'{path}: no such parameter')
    return flat[path]

  def model(
    self,
    *,
    layers: range | None = None,
    place: placement.Place | None = None,
    integers: bool = False,
    show_progress: bool = False,
  ) -> models.Model | Tree:
    """Reads the model, with stacked layers, or the PyTree of arrays.

    Args:
      layers: the layers to read; all by default. The config stays that of the whole
        model.
      place: the sharding of arrays; by default they are NumPy arrays.
        Layers that no device of this process gets are not decoded.
      integers: whether matrices that the file stores as multiples of one step become
        `structured.Multiples`, so that the model never has their numbers as floats.
      show_progress: whether to show the progress on stderr.

    Returns:
      The model or the PyTree. Structured leaves stay structured, except those with
      which the forward pass cannot compute. Meanwhile memory holds at most a few layers
      more than the model.

    Raises:
      ContainerError: if the file is damaged or incomplete.
    """
    if self.config is None:
      return self._tree(integers, show_progress)
    count = self.config.num_layers
    layers = range(count) if layers is None else layers
    if not 0 <= layers.start <= layers.stop <= count or layers.step != 1:
      raise ValueError(f'the file has {count} layers, got {layers}')
    if self.manifests[0].message is not None:
      return self._message_model(layers, place, show_progress)
    outer = self._outer_names()
    names = [*outer, *(models.names.layer(i) for i in layers)]
    entries = [self._entry(name) for name in names]
    _check_memory('the model', sum(entry.memory_bytes(integers) for entry in entries))
    params: Tree = {}
    with (
      progress.Progress('decode', len(names), 'unit', show=show_progress) as bar,
      weights.unit_jobs() as start,
    ):
      expanding = self._start_outer(outer, start, integers)
      runs = itertools.groupby(
        layers, lambda i: self._entry(models.names.layer(i)).stack_key()
      )
      stacks = [self._start_stack(list(run), place, start, integers) for _, run in runs]
      for future in expanding:
        params |= placement.placed(future.result(), place)
        bar.update()
      for group, stack in enumerate(stacks):
        tree = stack.result(bar)
        params[f'blocks_{group}'] = placement.placed_stack(
          tree, place, stack.wanted, stack.total
        )
    return models.Model(params=params, buffers=self.buffers(), config=self.config)

  def parts(self, *, show_progress: bool = False) -> Iterator[tuple[int | None, Tree]]:
    """Reads a model in parts, one at a time, so that a checkpoint can be written.

    Yields:
      Pairs: the index of a layer and its parameters; and None with the parameters
      outside the layers. The preset `paper` decodes the last layer first, and yields
      parts of layers, because it decodes the parameters around one residual segment at
      a time.

    Raises:
      ContainerError: if the file is damaged, or if it does not hold a model.
    """
    if self.config is None:
      raise ContainerError('the file holds a PyTree, not a model')
    if self.manifests[0].message is not None:
      for path, array in self.message_arrays(show_progress=show_progress):
        name, _, rest = path.partition('/')
        index = models.names.layer_index(name)
        own = path if index is None else rest
        yield index, structured.unflatten({own: array})
      return
    outer = self._outer_names()
    names = [models.names.layer(i) for i in range(self.config.num_layers)]
    for name in names:
      self._entry(name)
    _check_memory(
      'what is outside the layers', sum(self._entry(x).decoded_bytes for x in outer)
    )
    total = len(names) + len(outer)
    with (
      progress.Progress('decode', total, 'unit', show=show_progress) as bar,
      weights.unit_jobs() as start,
    ):
      # One layer is decoded while the caller works on the layer before it.
      jobs = (functools.partial(self._decode, name) for name in names)
      ahead = collections.deque(start(job) for job in itertools.islice(jobs, 2))
      for index in range(len(names)):
        yield index, ahead.popleft().result()
        ahead.extend(start(job) for job in itertools.islice(jobs, 1))
        bar.update()
      params: Tree = {}
      for future in self._start_outer(outer, start):
        params |= future.result()
        bar.update()
      yield None, params

  def dtypes(self) -> dict[str, np.dtype]:
    """Returns the dtype of every parameter of a model, by path."""
    found: dict[str, np.dtype] = {}
    for path, leaf, _ in self._leaves():
      found[path] = _dtype(leaf.dtype)
    for file, own in zip(self._files, self.manifests, strict=True):
      if own.message is not None and own.config is not None:
        from rotbits_jax.paper import layout as layout_lib  # slow to import

        with file.errors():
          try:
            words = file.nbytes('message') // 2
            layout = layout_lib.from_json(own.message.layout, own.config, words)
          except ValueError as error:
            raise ContainerError(f'message: {error}') from error
        found |= {path: _dtype(x.dtype) for path, x in layout.arrays.items()}
    return found

  def factors(self) -> dict[str, tuple[int, str]]:
    """Returns rank and naming of the parameters stored as two factors, by path."""
    found: dict[str, tuple[int, str]] = {}
    for path, leaf, specs in self._leaves():
      kind = structured.KINDS.get(leaf.kind)
      if kind is not None and issubclass(kind, structured.FactorPair):
        shapes = {n: s.shape for n, s in zip(leaf.arrays, specs, strict=True)}
        try:
          found[path] = kind.stored_rank(shapes), leaf.names[0]
        except LookupError:
          raise ContainerError(f'{path}: the leaf has not two factors') from None
    return found

  def _leaves(self) -> Iterator[tuple[str, manifest_lib.Leaf, list[Any]]]:
    """Yields the path, the entry and the specs of the arrays of every leaf in units."""
    for name, unit in self.units.items():
      prefix = f'{name}/' if _is_layer(name) else ''
      for leaf, specs in unit.leaf_specs():
        yield prefix + leaf.path, leaf, specs

  def buffers(self) -> dict[str, Any]:
    """Reads the tensors that the forward pass does not use; returns them by name."""
    name = manifest_lib.BUFFERS
    return self._decode(name)[name] if name in self._units else {}

  def files(self) -> dict[str, bytes]:
    """Reads the sidecar files of the checkpoint; returns their bytes by name.

    Raises:
      ContainerError: if a file is damaged.
    """
    found = {}
    for file, own in zip(self._files, self.manifests, strict=True):
      for entry, size in zip(own.files, own.sizes, strict=True):
        name = entry.name.removeprefix(manifest_lib.FILES)
        with file.errors():
          data = file.checked(entry.name, entry.nbytes, entry.crc32)
          found[name] = _inflate(entry.name, data.tobytes(), size)
    return found

  def streams(self) -> list[tuple[str, int]]:
    """Returns the names and the bytes of all streams but the manifests, in order."""
    return [
      (name, file.nbytes(name))
      for file in self._files
      for name in file.names()
      if name != container.MANIFEST
    ]

  def stream_bytes(self) -> int:
    """Returns the bytes of all these streams. The rest of the files is overhead."""
    return sum(nbytes for _, nbytes in self.streams())

  # ---- units ------------------------------------------------------------------------

  def _entry(self, name: str) -> manifest_lib.Unit:
    if name not in self._units:
      raise ContainerError(f'{name}: no such unit')
    return self._units[name][1]

  def _outer_names(self) -> list[str]:
    """Returns the units outside the layers. Units that need others come last."""
    assert self.config is not None
    names = models.outer_shapes(self.config)
    eager = lambda name: any(x.expanded is not None for x in self._entry(name).leaves)
    return sorted(names, key=eager)

  def _decode(
    self,
    name: str,
    out: Mapping[str, list[np.ndarray] | structured.Multiples] | None = None,
    integers: bool = False,
  ) -> Tree:
    """Decodes a unit.

    Args:
      name: name of the unit.
      out: arrays to decode leaves into, by path; the integers of `Multiples`.
      integers: whether the other matrices on grids become `Multiples`.
    """
    self._entry(name)
    file, unit = self._units[name]
    with file.errors():
      _check_memory(name, unit.memory_bytes(integers))
      data = file.checked(name, unit.nbytes, unit.crc32)
      flat: Tree = {}
      try:
        given: dict[str, Any] = {}
        if integers:
          shapes = {leaf.path: leaf.shape for leaf in unit.leaves}
          for path, grid in unit.grids().items():
            given[path] = structured.Multiples(
              host.empty(shapes[path], grid.integer_dtype),
              np.asarray(grid.unit),
              grid.dtype.name,
            )
        given |= {} if out is None else out
        targets = []
        for leaf, specs in unit.leaf_specs():
          target = None if leaf.is_packed else given.get(leaf.path)
          if isinstance(target, structured.Multiples):
            targets.append(target.integers)
          elif target is not None:
            pairs = zip(target, specs, strict=True)
            targets += [array.view(spec.dtype) for array, spec in pairs]
          else:
            targets += [host.empty(x.shape, x.dtype) for x in specs]
        arrays = iter(weights.decode(unit.coder, data, out=targets))
        for leaf in unit.leaves:
          parts = {key: next(arrays) for key in leaf.arrays}
          own = given.get(leaf.path)
          if isinstance(own, structured.Multiples):
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
        raise _too_large(name, unit.decoded_bytes) from None
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
    if self.config is not None and _is_layer(name):
      raise ContainerError(f'{path}: parameters of a layer cannot depend on others')
    if leaf.eager and entry.expanded is None:
      raise ContainerError(f'{path}: the checksum of the expanded array is missing')
    shapes = []
    for needed in leaf.needs:
      unit = self._units.get(needed.split('/')[0])
      if unit is None:  # in another shard
        return
      found = {x.path: x for x in unit[1].leaves}
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

  def _start_outer(
    self, names: Sequence[str], start: weights.Start, integers: bool = False
  ) -> 'list[futures.Future[Tree]]':
    """Starts to decode the units outside the layers; `names` is in a valid order."""
    decode = functools.partial(self._decode, integers=integers)
    decoded = {name: start(functools.partial(decode, name)) for name in names}
    other = lambda name: decoded[name].result() if name in decoded else {}
    return [start(functools.partial(self._expanded, name, other)) for name in names]

  def _expanded(self, name: str, decoded: Callable[[str], Tree]) -> Tree:
    """Replaces the eager dependent leaves of a unit by the arrays they stand for.

    Args:
      name: name of the unit.
      decoded: takes the name of a unit; returns its decoded leaves.
    """
    flat = structured.flatten(decoded(name))
    for entry in self._entry(name).leaves:
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
    return self._entry(name).tree(flat)

  def _tree(self, integers: bool, show_progress: bool) -> Tree:
    nbytes = sum(unit.memory_bytes(integers) for unit in self.units.values())
    _check_memory('the whole content', nbytes)
    decode = functools.partial(self._decode, integers=integers)
    if self.weights_files:
      return dict(self.tensors(show_progress=show_progress))
    with (
      progress.Progress('decode', len(self._units), 'unit', show=show_progress) as bar,
      weights.unit_jobs() as start,
    ):
      tree: Tree = {}
      for future in [start(functools.partial(decode, x)) for x in self._units]:
        tree |= future.result()
        bar.update()
    return tree

  def _start_stack(
    self,
    indices: Sequence[int],
    place: placement.Place | None,
    start: weights.Start,
    integers: bool,
  ) -> '_Stack':
    """Starts to decode the layers of a group, into their places in the stack."""
    entries = [self._entry(models.names.layer(i)) for i in indices]
    entry, count = entries[0], len(entries)
    wanted = range(count)
    if place is not None:
      wanted = placement.local_layers(place, entry, count)
    specs = [{leaf.path: own for leaf, own in x.leaf_specs()} for x in entries]
    grids = [x.grids() for x in entries] if integers else []
    stacks: dict[str, Any] = {}
    for leaf, own in entry.leaf_specs():
      found = [x[leaf.path] for x in grids if leaf.path in x]
      if len(found) == count:
        dtype = max((x.integer_dtype for x in found), key=lambda x: x.itemsize)
        stacks[leaf.path] = structured.Multiples(
          host.empty((len(wanted), *leaf.shape), dtype),
          np.array([found[k].unit for k in wanted], np.float32),
          leaf.dtype,
        )
        continue
      if leaf.is_array:
        stacks[leaf.path] = [host.empty((len(wanted), *leaf.shape), _dtype(leaf.dtype))]
        continue
      shapes = [x.shape for x in own]
      # Equal leaves may be stored as arrays of different shapes. Such arrays are not
      # decoded into a stack.
      if all([x.shape for x in other[leaf.path]] == shapes for other in specs):
        stacks[leaf.path] = [host.empty((len(wanted), *x.shape), x.dtype) for x in own]
    layers = [
      start(
        functools.partial(
          self._decode,
          models.names.layer(indices[k]),
          {path: _row(stack, row) for path, stack in stacks.items()},
        )
      )
      for row, k in enumerate(wanted)
    ]
    plain = {
      path: stack if isinstance(stack, structured.Multiples) else stack[0]
      for path, stack in ((x.path, stacks[x.path]) for x in entry.leaves if x.is_array)
    }
    return _Stack(wanted, count, layers, plain)

  # ---- the preset paper -------------------------------------------------------------

  def message_arrays(self, *, show_progress: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the parameters of a model on one message, the last segment's first."""
    from rotbits_jax import paper  # its linear algebra is slow to import

    file, own = self._files[0], self.manifests[0]
    message, config = own.message, own.config
    if message is None or config is None:
      raise ContainerError('the file does not hold a message of bits-back coding')
    with file.errors():
      parts = [map(math.prod, x.values()) for x in _shapes_of_parts(config)]
      _check_memory('message', 4 * max(map(sum, parts)))
      streams = {}
      for stream in message.streams:
        data: Any = file.checked(stream.name, stream.nbytes, stream.crc32)
        if stream.name != 'tables':
          if data.size % 2:
            raise ContainerError(f'{stream.name}: the number of bytes must be even')
          data = data.view('<u2')
        streams[stream.name] = data
      try:
        yield from paper.decode(
          message.layout,
          streams['message'],
          streams['corrections'],
          streams['tables'],
          config,
          progress=show_progress,
        )
      except ValueError as error:
        raise ContainerError(f'message: {error}') from error

  def _message_model(
    self, layers: range, place: placement.Place | None, show_progress: bool
  ) -> models.Model:
    assert self.config is not None
    flat: Tree = {}
    dtypes = self.dtypes()
    shapes = collections.ChainMap(*_shapes_of_parts(self.config))
    _check_memory(
      'the model',
      sum(math.prod(x) * dtypes[path].itemsize for path, x in shapes.items()),
    )
    for path, array in self.message_arrays(show_progress=show_progress):
      index = models.names.layer_index(path.split('/')[0])
      if index is None or index in layers:
        flat[path] = array
    tree = structured.unflatten(flat)
    stack = [tree.pop(models.names.layer(i)) for i in layers]
    model = models.from_layers(self.config, tree, stack, self.buffers())
    return (
      model
      if place is None
      else dataclasses.replace(model, params=placement.placed(model.params, place))
    )


def _manifest(file: container.StreamReader) -> manifest_lib.Manifest:
  """Reads the manifest of one file, and checks it against the header."""
  with file.errors():
    data = file.stream(container.MANIFEST)
    if zlib_ng.crc32(data) != file.manifest_crc32:
      raise ContainerError('the manifest is damaged: its checksum differs')
    try:
      own = manifest_lib.Manifest.from_bytes(data.tobytes())
    except ContainerError:
      raise
    except ValueError as error:
      raise ContainerError(f'the manifest is damaged: {error}') from error
    found = {n: file.nbytes(n) for n in file.names() if n != container.MANIFEST}
    named = {name: nbytes for name, (nbytes, _) in own.streams().items()}
    for name in {**found, **named}:
      if found.get(name) != named.get(name):
        raise ContainerError(
          f'{name}: the header and the manifest differ in this stream'
        )
    return own


class _Stack(NamedTuple):
  """The layers of a group while they are decoded into a stack.

  Attributes:
    wanted: places of the layers that this process needs.
    total: number of layers of the whole stack.
    layers: the layers that this process needs.
    plain: the stacked plain arrays and `Multiples`, by path.
  """

  wanted: range
  total: int
  layers: 'list[futures.Future[Tree]]'
  plain: dict[str, Any]

  def result(self, bar: progress.Progress) -> Tree:
    """Waits for the layers, and returns them stacked."""
    others: dict[str, list[Any]] = {}
    for layer in self.layers:
      for path, leaf in structured.flatten(layer.result()).items():
        if path not in self.plain:
          others.setdefault(path, []).append(leaf)
      bar.update()
    bar.update(self.total - len(self.layers))
    stacked = self.plain | {
      path: type(leaves[0]).stack(leaves) for path, leaves in others.items()
    }
    return structured.unflatten(stacked)


def _row(stack: Any, row: int) -> Any:
  """Returns the arrays of one layer in the stacks of a leaf."""
  if isinstance(stack, structured.Multiples):
    return stack.layer(row)
  return [array[row] for array in stack]


def _shapes_of_parts(config: models.ModelConfig) -> list[dict[str, tuple[int, ...]]]:
  """Returns the shapes of all parameters outside the layers, and of each layer."""
  trees: list[Tree] = [models.outer_shapes(config)]
  for i in range(config.num_layers):
    trees.append({models.names.layer(i): models.layer_shapes(config, i)})
  return [structured.flatten(tree) for tree in trees]


def _check_memory(name: str, nbytes: int) -> None:
  """Refuses to decode more than this machine can hold, before it allocates anything.

  The size of a file is no bound, because zeros take hardly any bytes in it.
  """
  if nbytes > (_memory() or nbytes):
    raise _too_large(name, nbytes)


def _too_large(name: str, nbytes: int) -> ContainerError:
  return ContainerError(
    f'{name}: it decodes to {nbytes:,} bytes, more than memory holds'
  )


# Where a container of Linux finds the bytes of memory that it may use, with the second
# and the first version of control groups.
_LIMITS = (
  '/sys/fs/cgroup/memory.max',
  '/sys/fs/cgroup/memory/memory.limit_in_bytes',
)


def _memory() -> int | None:
  """Returns the bytes of memory for this process; None if the system does not tell."""
  found = []
  with contextlib.suppress(AttributeError, ValueError, OSError):  # not a Unix
    found.append(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))
  for path in _LIMITS:
    with contextlib.suppress(OSError, ValueError):  # 'max' stands for no limit
      found.append(int(pathlib.Path(path).read_text()))
  return min(found, default=None)


def _leaf(name: str, leaf: manifest_lib.Leaf, parts: dict[str, np.ndarray]) -> Any:
  if not leaf.kind:
    return parts[''].view(_dtype(leaf.dtype))
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


def _inflate(name: str, data: bytes, size: int) -> bytes:
  """Inflates a zlib stream, and checks that its content has `size` bytes."""
  unpacker = zlib.decompressobj()
  try:
    content = unpacker.decompress(data, size + 1)
  except zlib.error as error:
    raise ContainerError(f'{name}: {error}') from error
  if len(content) != size or not unpacker.eof or unpacker.unused_data:
    raise ContainerError(f'{name}: the file must have {size} bytes by the manifest')
  return content


def _path(name: str, leaf: manifest_lib.Leaf) -> str:
  """Returns the path of a leaf of a unit."""
  return f'{name}/{leaf.path}' if _is_layer(name) else leaf.path


def _is_layer(name: str) -> bool:
  return models.names.layer_index(name) is not None


def _dtype(name: str) -> np.dtype:
  return np.dtype(jax.numpy.dtype(name))

"""Reads what `writer` wrote: any unit without the others, or the whole model.

    with Reader(path) as file:
      layer = file.unit('layers.3')      # nested dicts of NumPy arrays and leaves
      model = file.model()               # layers stacked

All that the manifest says is checked before anything is allocated. Several units decode
side by side, so that the checksum of one stream is read while the blocks of another are
decoded.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
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

from rotbits_jax import models
from rotbits_jax import progress
from rotbits_jax import structured
from rotbits_jax.coding import weights
from rotbits_jax.file import container
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import writer
from rotbits_jax.file.container import ContainerError

Tree = dict[str, Any]
Place = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""Where arrays go: one sharding for all, or a function of path and shape."""


class Reader:
  """An encoded file, or several shards of one. A context manager.

  Attributes:
    preset: that it was encoded with.
    options: of the preset.
    config: of the model; None for a PyTree of arrays.
    stem: the checkpoint's name.
    manifests: of the file, or of each shard.
    size: bytes of all files.
  """

  def __init__(self, source: container.Readable):
    """Reads and checks headers and manifests.

    Args:
      source: a path, bytes, or a binary file that is open. A path may be that of an
        index of shards, or the path that they were written to.

    Raises:
      ContainerError: if this is no rotbits file, or its manifest is damaged.
      OSError: if a path cannot be read.
    """
    files, checksums = _shards(source)
    self._files = [container.StreamReader(file) for file in files]
    for file in self._files:
      if checksums.get(os.path.basename(file.name), file.manifest_crc32) != (
        file.manifest_crc32
      ):
        raise ContainerError(f'{file.name}: the index names another shard of this name')
    self.size = sum(file.size for file in self._files)
    self.manifests = [_manifest(file) for file in self._files]
    first = self.manifests[0]
    self.preset, self.options = first.preset, first.options
    self.config, self.stem = first.config, first.stem
    self._units: dict[str, tuple[container.StreamReader, manifest_lib.Unit]] = {}
    for file, own in zip(self._files, self.manifests, strict=True):
      with file.errors():
        if (own.preset, own.config) != (first.preset, first.config):
          raise ContainerError('the shards are of different models')
        for unit in own.units:
          if unit.name in self._units:
            raise ContainerError(f'{unit.name}: two shards have it')
          self._units[unit.name] = file, unit

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: object) -> None:
    """Nothing stays open: streams are mapped when they are read."""

  @property
  def units(self) -> dict[str, manifest_lib.Unit]:
    """The entries of all units, by name."""
    return {name: unit for name, (_, unit) in self._units.items()}

  def unit(self, name: str) -> Tree:
    """One unit, without reading the rest but what its leaves need.

    Args:
      name: 'layers.0', 'layers.1', ..., 'embed', 'final_norm', 'head', 'buffers'; of a
        PyTree its top-level keys.

    Returns:
      The parameters, with NumPy arrays; a layer is unstacked.

    Raises:
      ContainerError: if there is no such unit, or it is damaged.
    """
    return self._expanded(name, functools.cache(self._decode))

  def tensor(self, path: str) -> Any:
    """One parameter, like 'layers.3/attention/query/kernel'; see `unit`."""
    name = path.split('/')[0]
    tree = self.unit(name)
    flat = structured.flatten({name: tree} if _is_layer(name) else tree)
    if path not in flat:
      raise ContainerError(f'{path}: no such parameter')
    return flat[path]

  def model(
    self,
    *,
    layers: range | None = None,
    place: Place | None = None,
    show_progress: bool = False,
  ) -> models.Model | Tree:
    """The model, with layers stacked, or the PyTree of arrays.

    Args:
      layers: which ones; all by default. The config stays that of the whole model.
      place: where arrays go, see `Place`; NumPy arrays by default. Of a stack of
        layers, those that no device of this process gets are not decoded.
      show_progress: whether to tell on stderr how far it is.

    Returns:
      The model; structured leaves stay structured, but those that cannot be computed
      with. At most a few layers more than the model are held meanwhile.

    Raises:
      ContainerError: if the file is damaged, or has not all of it.
    """
    if self.config is None:
      return self._tree(show_progress)
    count = self.config.num_layers
    layers = range(count) if layers is None else layers
    if not 0 <= layers.start <= layers.stop <= count or layers.step != 1:
      raise ValueError(f'the file has {count} layers, got {layers}')
    if self.manifests[0].message is not None:
      return self._message_model(layers, place, show_progress)
    outer = self._outer_names()
    names = [*outer, *(f'layers.{i}' for i in layers)]
    _check_memory('the model', sum(self._entry(name).decoded_bytes for name in names))
    params: Tree = {}
    with (
      progress.Progress('decode', len(names), 'unit', show=show_progress) as bar,
      weights.unit_jobs() as start,
    ):
      expanding = self._start_outer(outer, start)
      runs = itertools.groupby(layers, lambda i: self._entry(f'layers.{i}').stack_key())
      stacks = [self._start_stack(list(run), place, start) for _, run in runs]
      for future in expanding:
        params |= _placed(future.result(), place)
        bar.update()
      for group, stack in enumerate(stacks):
        tree = stack.result(bar)
        params[f'blocks_{group}'] = _placed_stack(tree, place, stack)
    return models.Model(params=params, buffers=self.buffers(), config=self.config)

  def parts(self, *, show_progress: bool = False) -> Iterator[tuple[int | None, Tree]]:
    """A model in parts, one at a time: what a checkpoint is written from.

    Yields:
      The index of a layer and its parameters; None, and all that is outside the layers.
      The preset `paper` decodes the last layer first, and what touches one segment of
      the residual stream at a time, so that a part need not be a whole layer.

    Raises:
      ContainerError: if the file is damaged, or holds no model.
    """
    if self.config is None:
      raise ContainerError('the file holds a PyTree, not a model')
    if self.manifests[0].message is not None:
      for path, array in self.message_arrays(show_progress=show_progress):
        name, _, rest = path.partition('/')
        index = manifest_lib.layer_index(name)
        own = path if index is None else rest
        yield index, structured.unflatten({own: array})
      return
    outer = self._outer_names()
    names = [f'layers.{i}' for i in range(self.config.num_layers)]
    for name in (*outer, *names):
      self._entry(name)
    total = len(names) + len(outer)
    with (
      progress.Progress('decode', total, 'unit', show=show_progress) as bar,
      weights.unit_jobs() as start,
    ):
      # One layer decodes while the caller has the layer before it.
      ahead: collections.deque[futures.Future[Tree]] = collections.deque()
      for index, name in enumerate([*names, None]):
        if name is not None:
          ahead.append(start(functools.partial(self._decode, name)))
        if len(ahead) > (name is not None):
          yield index - 1, ahead.popleft().result()
          bar.update()
      params: Tree = {}
      for future in self._start_outer(outer, start):
        params |= future.result()
        bar.update()
      yield None, params

  def dtypes(self) -> dict[str, np.dtype]:
    """The dtype of every parameter of a model, by path."""
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
    """Rank and naming of the parameters that are stored as two factors, by path."""
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
    """The path in the model, the entry and the arrays' specs of every leaf in units."""
    for name, unit in self.units.items():
      prefix = f'{name}/' if _is_layer(name) else ''
      for leaf, specs in unit.leaf_specs():
        yield prefix + leaf.path, leaf, specs

  def buffers(self) -> dict[str, Any]:
    """The tensors that take no part in the mathematics, by name."""
    name = manifest_lib.BUFFERS
    return self._decode(name)[name] if name in self._units else {}

  def files(self) -> dict[str, bytes]:
    """The checkpoint's other files, byte for byte, by name.

    Raises:
      ContainerError: if one is damaged.
    """
    found = {}
    for file, own in zip(self._files, self.manifests, strict=True):
      for entry, size in zip(own.files, own.sizes, strict=True):
        name = entry.name.removeprefix(manifest_lib.FILES)
        with file.errors():
          data = file.checked(entry.name, entry.nbytes, entry.crc32)
          found[name] = _inflate(entry.name, data.tobytes(), size)
    return found

  def stream_bytes(self) -> int:
    """Bytes of all streams but the manifests; the rest of the files is overhead."""
    return sum(
      file.nbytes(name)
      for file in self._files
      for name in file.names()
      if name != container.MANIFEST
    )

  # ---- units ------------------------------------------------------------------------

  def _entry(self, name: str) -> manifest_lib.Unit:
    if name not in self._units:
      raise ContainerError(f'{name}: no such unit')
    return self._units[name][1]

  def _outer_names(self) -> list[str]:
    """The units outside the layers; those that need others come last."""
    assert self.config is not None
    names = models.outer_shapes(self.config)
    eager = lambda name: any(x.expanded is not None for x in self._entry(name).leaves)
    return sorted(names, key=eager)

  def _decode(
    self, name: str, out: Mapping[str, list[np.ndarray]] | None = None
  ) -> Tree:
    """A unit as it is stored; the arrays of leaves are written into `out`, by path."""
    self._entry(name)
    file, unit = self._units[name]
    with file.errors():
      _check_memory(name, unit.decoded_bytes)
      data = file.checked(name, unit.nbytes, unit.crc32)
      targets: list[np.ndarray] | None = None
      flat = {}
      try:
        if out is not None:
          targets = []
          for leaf, specs in unit.leaf_specs():
            given = out.get(leaf.path)
            new = () if given else (weights.empty(x.shape, x.dtype) for x in specs)
            targets += given or new
        arrays = iter(weights.decode(unit.coder, data, out=targets))
        for leaf in unit.leaves:
          parts = {key: next(arrays) for key in leaf.arrays}
          flat[leaf.path] = _leaf(name, leaf, parts)
      except MemoryError:
        raise _too_large(name, unit.decoded_bytes) from None
      except ContainerError:
        raise
      except ValueError as error:
        raise ContainerError(f'{name}: {error}') from error
    return structured.unflatten(flat)

  def _start_outer(
    self, names: Sequence[str], start: weights.Start
  ) -> 'list[futures.Future[Tree]]':
    """Starts to decode units outside the layers, with what they need first."""
    decoded = {name: start(functools.partial(self._decode, name)) for name in names}
    other = lambda name: decoded[name].result() if name in decoded else {}
    return [start(functools.partial(self._expanded, name, other)) for name in names]

  def _expanded(self, name: str, decoded: Callable[[str], Tree]) -> Tree:
    """A unit with arrays for leaves that nothing can be computed with."""
    flat = structured.flatten(decoded(name))
    for entry in self._entry(name).leaves:
      if entry.expanded is None:
        continue
      path = f'{name}/{entry.path}' if _is_layer(name) else entry.path
      leaf = flat[entry.path]
      if not isinstance(leaf, structured.Dependent):
        raise ContainerError(f'{path}: the leaf stands for itself')
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
      if zlib_ng.crc32(np.ascontiguousarray(array).view(np.uint8)) != entry.expanded:
        raise ContainerError(f'{path}: decoded numbers differ from the encoded')
      flat[entry.path] = array
    return structured.unflatten(flat)

  def _tree(self, show_progress: bool) -> Tree:
    with (
      progress.Progress('decode', len(self._units), 'unit', show=show_progress) as bar,
      weights.unit_jobs() as start,
    ):
      tree: Tree = {}
      for future in [start(functools.partial(self._decode, x)) for x in self._units]:
        tree |= future.result()
        bar.update()
    return tree

  def _start_stack(
    self, indices: Sequence[int], place: Place | None, start: weights.Start
  ) -> '_Stack':
    """Starts to decode layers that share a stack, into their places in it."""
    entry = self._entry(f'layers.{indices[0]}')
    count = len(indices)
    wanted = range(count)
    if place is not None:
      wanted = _local_layers(place, entry, count)
    specs = [
      {leaf.path: own for leaf, own in self._entry(f'layers.{i}').leaf_specs()}
      for i in indices
    ]
    stacks = {}
    for leaf, own in entry.leaf_specs():
      shapes = [x.shape for x in own]
      # Leaves of one kind may be stored in arrays of several shapes.
      if all([x.shape for x in other[leaf.path]] == shapes for other in specs):
        stacks[leaf.path] = [
          weights.empty((len(wanted), *x.shape), x.dtype) for x in own
        ]
    layers = [
      start(
        functools.partial(
          self._decode,
          f'layers.{indices[k]}',
          {path: [stack[row] for stack in own] for path, own in stacks.items()},
        )
      )
      for row, k in enumerate(wanted)
    ]
    plain = {x.path: stacks[x.path][0] for x in entry.leaves if not x.kind}
    return _Stack(wanted, count, layers, plain)

  # ---- the preset paper -------------------------------------------------------------

  def message_arrays(self, *, show_progress: bool) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters of a model on one message, the last segment's first."""
    from rotbits_jax import paper  # its linear algebra is slow to import

    file, own = self._files[0], self.manifests[0]
    message, config = own.message, own.config
    if message is None or config is None:
      raise ContainerError('the file has no message of bits-back coding')
    with file.errors():
      _check_memory('message', 4 * _most_numbers(config))
      streams = {}
      for stream in message.streams:
        data: Any = file.checked(stream.name, stream.nbytes, stream.crc32)
        if stream.name != 'tables':
          if data.size % 2:
            raise ContainerError(f'{stream.name}: half a word is left')
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
    self, layers: range, place: Place | None, show_progress: bool
  ) -> models.Model:
    assert self.config is not None
    flat: Tree = {}
    # Numbers have 2 bytes at least.
    _check_memory('the model', 2 * models.count_numbers(self.config))
    for path, array in self.message_arrays(show_progress=show_progress):
      index = manifest_lib.layer_index(path.split('/')[0])
      if index is None or index in layers:
        flat[path] = array
    tree = structured.unflatten(flat)
    stack = [tree.pop(f'layers.{i}') for i in layers]
    model = models.from_layers(self.config, tree, stack, self.buffers())
    return (
      model
      if place is None
      else dataclasses.replace(model, params=_placed(model.params, place))
    )


def _shards(
  source: container.Readable,
) -> tuple[list[container.Readable], dict[str, Any]]:
  """The files of a source, and checksums of their manifests that an index has."""
  if not isinstance(source, (str, os.PathLike)):
    return [source], {}
  path = pathlib.Path(source)
  index = path.with_name(writer.index_name(path))
  if path.name.endswith('.index.json'):
    index = path
  elif path.exists() or not index.exists():
    return [path], {}
  parsed = container.parse_json(index.read_bytes(), 'index')
  found = parsed.get('weight_map') if isinstance(parsed, dict) else None
  if not isinstance(found, dict) or not found:
    raise ContainerError(f'{index}: weight_map must map units to files')
  names = list(dict.fromkeys(found.values()))
  for name in names:
    if not isinstance(name, str) or pathlib.PurePath(name).name != name:
      raise ContainerError(f'{index}: {name!r:.100} is not the name of a shard')
    if not (index.parent / name).is_file():
      raise ContainerError(f'{index}: the shard {name} is missing')
  metadata = parsed.get('metadata')
  checksums = metadata.get('manifest_crc32') if isinstance(metadata, dict) else None
  if not isinstance(checksums, dict):
    checksums = {}
  return [index.parent / name for name in names], checksums


def _manifest(file: container.StreamReader) -> manifest_lib.Manifest:
  """The manifest of one file, checked against its header."""
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
          f'{name[:200]}: the header and the manifest differ in this stream'
        )
    return own


class _Stack(NamedTuple):
  """Layers that are decoded into a stack.

  Attributes:
    wanted: those that this process needs.
    count: how many layers the whole stack has.
    layers: the layers that are wanted.
    plain: the stacked arrays that stand for themselves, by path.
  """

  wanted: range
  count: int
  layers: 'list[futures.Future[Tree]]'
  plain: dict[str, np.ndarray]

  def result(self, bar: progress.Progress) -> Tree:
    """The layers that are wanted, stacked."""
    others: dict[str, list[Any]] = {}
    for layer in self.layers:
      for path, leaf in structured.flatten(layer.result()).items():
        if path not in self.plain:
          others.setdefault(path, []).append(leaf)
      bar.update()
    bar.update(self.count - len(self.layers))
    stacked = self.plain | {
      path: type(leaves[0]).stack(leaves) for path, leaves in others.items()
    }
    return structured.unflatten(stacked)


def _most_numbers(config: models.ModelConfig) -> int:
  """How many numbers a layer has, or what is outside the layers, at most."""
  trees = [models.outer_shapes(config)]
  trees += [models.layer_shapes(config, i) for i in range(config.num_layers)]
  counts = (map(math.prod, structured.flatten(tree).values()) for tree in trees)
  return max(map(sum, counts))


def _check_memory(name: str, nbytes: int) -> None:
  """Refuses to decode more than this machine can hold, before anything is allocated.

  Zeros take hardly any bytes in a file, so that its size is no bound.
  """
  if nbytes > (_memory() or nbytes):
    raise _too_large(name, nbytes)


def _too_large(name: str, nbytes: int) -> ContainerError:
  return ContainerError(
    f'{name}: it decodes to {nbytes:,} bytes, more than memory holds'
  )


def _memory() -> int | None:
  """Bytes of this machine's memory; None where it does not tell."""
  try:
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  except (AttributeError, ValueError, OSError):  # not a Unix
    return None


def _leaf(name: str, leaf: manifest_lib.Leaf, parts: dict[str, np.ndarray]) -> Any:
  if not leaf.kind:
    return parts['']
  if leaf.kind not in structured.KINDS:
    raise ContainerError(
      f'{name}/{leaf.path}: leaves of kind {leaf.kind[:40]!r} are unknown; '
      'import their module'
    )
  try:
    found = structured.KINDS[leaf.kind].from_stored(leaf.settings, parts)
    same = structured.stack_key(found) == leaf.stack_key()[1:]
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
    raise ContainerError(f'{name}/{leaf.path}: {error}') from error
  if not same:
    raise ContainerError(f'{name}/{leaf.path}: the leaf is not what the manifest says')
  return found


def _inflate(name: str, data: bytes, size: int) -> bytes:
  """What zlib packed, if it is as long as the manifest says."""
  unpacker = zlib.decompressobj()
  try:
    content = unpacker.decompress(data, size + 1)
  except zlib.error as error:
    raise ContainerError(f'{name}: {error}') from error
  if len(content) != size or not unpacker.eof or unpacker.unused_data:
    raise ContainerError(f'{name}: the file has another length than the manifest says')
  return content


def _is_layer(name: str) -> bool:
  return manifest_lib.layer_index(name) is not None


def _dtype(name: str) -> np.dtype:
  return np.dtype(jax.numpy.dtype(name))


# ---- devices -----------------------------------------------------------------------


def _sharding(place: Place, path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
  return place(path, shape) if callable(place) else place


def _placed(tree: Tree, place: Place | None) -> Tree:
  """Arrays on devices; a leaf's arrays are asked for by the leaf's path."""
  if place is None:
    return tree
  flat = {}
  for path, leaf in structured.flatten(tree).items():
    put = lambda x, path=path: jax.device_put(x, _sharding(place, path, x.shape))
    flat[path] = jax.tree.map(put, leaf)
  return structured.unflatten(flat)


def _local_layers(place: Place, entry: manifest_lib.Unit, count: int) -> range:
  """The layers of a stack that devices of this process get."""
  first, last = count, 0
  for leaf, specs in entry.leaf_specs():
    for spec in specs:
      shape = (count, *(leaf.shape if not leaf.kind else spec.shape))
      sharding = _sharding(place, leaf.path, shape)
      for index in sharding.addressable_devices_indices_map(shape).values():
        start, stop, _ = index[0].indices(count) if index else (0, count, 1)
        first, last = min(first, start), max(last, stop)
  return range(min(first, last), last)


def _placed_stack(tree: Tree, place: Place | None, layers: _Stack) -> models.Params:
  """Stacks of which this process holds some layers, on devices."""
  if place is None:
    return tree

  def put(path: str, stack: Any) -> jax.Array:
    shape = (layers.count, *stack.shape[1:])

    def part(index: Any) -> Any:
      start, stop, _ = index[0].indices(layers.count)
      rows = slice(start - layers.wanted.start, stop - layers.wanted.start)
      return np.asarray(stack)[(rows, *index[1:])]

    return jax.make_array_from_callback(shape, _sharding(place, path, shape), part)

  flat = {
    path: jax.tree.map(lambda x, path=path: put(path, x), leaf)
    for path, leaf in structured.flatten(tree).items()
  }
  return structured.unflatten(flat)

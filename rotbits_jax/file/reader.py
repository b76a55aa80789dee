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
from collections.abc import Iterator
import dataclasses
import functools
import itertools
import os
from typing import Any, Self

import numpy as np
from zlib_ng import zlib_ng

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.coding import weights
from rotbits_jax.file import checkpoint_files
from rotbits_jax.file import container
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import memory
from rotbits_jax.file import messages
from rotbits_jax.file import placement
from rotbits_jax.file import records as records_lib
from rotbits_jax.file import shards
from rotbits_jax.file import stacks as stacks_lib
from rotbits_jax.file.container import ContainerError
from rotbits_jax.system import progress

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
    for file, own in zip(self._files, self.manifests, strict=True):
      with file.errors():
        if (own.preset, own.config) != (first.preset, first.config):
          raise ContainerError('the shards belong to different models')
    self._units = records_lib.Records(self._files, self.manifests)
    if index is not None:
      self._check_index(index)
    if self.config is None:
      self._check_paths()
    if self.weights_files:
      checkpoint_files.check_places(self.manifests, self.tensor_sizes())

  def _check_index(self, index: shards.Index) -> None:
    """Checks that the index of the shards names each unit and its shard.

    Raises:
      ContainerError: if it does not.
    """
    found = {
      name: os.path.basename(own.name) for name, own in self._units.files.items()
    }
    if wrong := sorted(found.items() ^ index.units.items()):
      raise ContainerError(
        f'{wrong[0][0]}: the index and the shards differ in this unit'
      )
    if self.size != index.total_size:
      raise ContainerError(
        f'the shards must have {index.total_size} bytes by their index, got {self.size}'
      )

  def _check_paths(self) -> None:
    """Checks the paths of leaves, if there is no model to check them by.

    A unit of a PyTree has all leaves under one key of the outermost level, which is its
    name. Tensors of a checkpoint are not in a tree, and the names of two may begin
    alike.

    Raises:
      ContainerError: if a leaf has another place, or two leaves have one.
    """
    seen: set[str] = set()
    is_tree = not self.weights_files
    for name, unit in self.units.items():
      own = unit.first_keys() if is_tree else {leaf.path for leaf in unit.leaves}
      with self._units.files[name].errors():
        if is_tree and own != {name}:
          raise ContainerError(f'{name}: a leaf of the unit is not under its name')
        if seen & own:
          raise ContainerError(f'{name}: it has a leaf of another unit')
      seen |= own

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
    return checkpoint_files.rests(self._files, self.manifests, self.tensor_sizes())

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
    total = len(self.units)
    with progress.Progress('decode', total, 'unit', show=show_progress) as bar:
      for name in self.units:
        yield from structured.flatten(self._units.decode(name)).items()
        bar.update()

  @property
  def units(self) -> dict[str, manifest_lib.Record]:
    """The manifest's entries of all units, by name."""
    return dict(self._units.entries)

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
    return self._units.expanded(name, functools.cache(self._units.decode))

  def tensor(self, path: str) -> Any:
    """Reads one parameter, such as 'layers.3/attention/query/kernel'; see `unit`."""
    name, is_layer = path.split('/')[0], False
    if self.config is None:
      holders = {x.path: name for name, unit in self.units.items() for x in unit.leaves}
      name = holders.get(path, name)
    else:
      is_layer = records_lib.is_layer(name)
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
        `structured.UniformlyQuantized`, so that their numbers are never floats.
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
    entries = [self._units.entry(name) for name in names]
    memory.check('the model', sum(entry.memory_bytes(integers) for entry in entries))
    params: Tree = {}
    with (
      progress.Progress('decode', len(names), 'unit', show=show_progress) as bar,
      weights.record_jobs() as start,
    ):
      expanding = self._units.start(outer, start, integers)
      key = lambda i: self._units.entry(models.names.layer(i)).stack_key()
      stacks = [
        stacks_lib.start_stack(self._units, run, place, start, integers)
        for run in models.stack_ranges(layers, key)
      ]
      for future in expanding:
        params |= placement.placed(future.result(), place)
        bar.update()
      for stack in stacks:
        tree = {stack.name: stack.result(bar)}
        params |= placement.placed_stack(tree, place, stack.wanted, stack.total)
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
      self._units.entry(name)
    memory.check(
      'what is outside the layers',
      sum(self._units.entry(x).decoded_bytes for x in outer),
    )
    total = len(names) + len(outer)
    with (
      progress.Progress('decode', total, 'unit', show=show_progress) as bar,
      weights.record_jobs() as start,
    ):
      # One layer is decoded while the caller works on the layer before it.
      jobs = (functools.partial(self._units.decode, name) for name in names)
      ahead = collections.deque(start(job) for job in itertools.islice(jobs, 2))
      for index in range(len(names)):
        yield index, ahead.popleft().result()
        ahead.extend(start(job) for job in itertools.islice(jobs, 1))
        bar.update()
      params: Tree = {}
      for future in self._units.start(outer, start):
        params |= future.result()
        bar.update()
      yield None, params

  def dtypes(self) -> dict[str, np.dtype]:
    """Returns the dtype of every parameter of a model, by path."""
    found: dict[str, np.dtype] = {}
    for path, leaf, _ in self._units.leaves():
      found[path] = np.dtype(leaf.dtype)
    for file, own in zip(self._files, self.manifests, strict=True):
      found |= messages.dtypes(file, own)
    return found

  def factors(self) -> dict[str, tuple[int, str]]:
    """Returns rank and naming of the parameters stored as two factors, by path."""
    found: dict[str, tuple[int, str]] = {}
    for path, leaf, specs in self._units.leaves():
      kind = structured.KINDS.get(leaf.kind)
      if kind is not None and issubclass(kind, structured.FactorPair):
        shapes = {n: s.shape for n, s in zip(leaf.arrays, specs, strict=True)}
        try:
          found[path] = kind.stored_rank(shapes), leaf.names[0]
        except LookupError:
          raise ContainerError(f'{path}: the leaf has not two factors') from None
    return found

  def buffers(self) -> dict[str, Any]:
    """Reads the tensors that the forward pass does not use; returns them by name."""
    name = manifest_lib.BUFFERS
    return self._units.decode(name)[name] if name in self.units else {}

  def files(self) -> dict[str, bytes]:
    """Reads the sidecar files of the checkpoint; returns their bytes by name.

    Raises:
      ContainerError: if a file is damaged.
    """
    return checkpoint_files.others(self._files, self.manifests)

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

  # ---- the parts of a model ---------------------------------------------------------

  def _outer_names(self) -> list[str]:
    """Returns the units outside the layers. Records that need others come last."""
    assert self.config is not None
    return sorted(models.outer_shapes(self.config), key=self._units.needs_others)

  def _tree(self, integers: bool, show_progress: bool) -> Tree:
    nbytes = sum(unit.memory_bytes(integers) for unit in self.units.values())
    memory.check('the whole content', nbytes)
    decode = functools.partial(self._units.decode, integers=integers)
    if self.weights_files:
      return dict(self.tensors(show_progress=show_progress))
    with (
      progress.Progress('decode', len(self.units), 'unit', show=show_progress) as bar,
      weights.record_jobs() as start,
    ):
      tree: Tree = {}
      for future in [start(functools.partial(decode, x)) for x in self.units]:
        tree |= future.result()
        bar.update()
    return tree

  # ---- the preset paper -------------------------------------------------------------

  def message_arrays(self, *, show_progress: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the parameters of a model on one message, the last segment's first."""
    return messages.arrays(
      self._files[0], self.manifests[0], show_progress=show_progress
    )

  def _message_model(
    self, layers: range, place: placement.Place | None, show_progress: bool
  ) -> models.Model:
    assert self.config is not None
    outer, stack = messages.layers(
      self._files[0], self.manifests[0], layers, show_progress=show_progress
    )
    model = models.from_layers(self.config, outer, stack, self.buffers())
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

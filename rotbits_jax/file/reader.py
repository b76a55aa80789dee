"""The reader of files: reads a record without the others, or the whole content.

    with Reader(path) as file:
      layer = file.record('layers.3')    # nested dicts of NumPy arrays and leaves
      model = file.read()                # layers stacked

`manifest` describes records and leaves. The reader checks the whole manifest before it
allocates memory. Several records decode side by side: one stream is read while the
blocks of another are decoded. A damaged or incomplete file raises `ContainerError`.
"""

import collections
from collections.abc import Collection, Iterator, Mapping
import functools
import hashlib
import os
import types
from typing import Any, Self

import jax
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import paper
from rotbits_jax import structured
from rotbits_jax.coding import pool
from rotbits_jax.file import container
from rotbits_jax.file import decode as decode_lib
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import memory
from rotbits_jax.file import shards
from rotbits_jax.file import sources
from rotbits_jax.file import stacks
from rotbits_jax.file.container import ContainerError
from rotbits_jax.relative import base as base_lib
from rotbits_jax.relative import entries
from rotbits_jax.structured import difference
from rotbits_jax.structured import shortcuts
from rotbits_jax.system import progress
from rotbits_jax.system import schema

Tree = dict[str, Any]


class Reader:
  """An encoded file, or all shards of one. The class is a context manager.

  Attributes:
    preset, options, keeps, config, stem, message: see `manifest.Manifest`.
    manifests, records: the entries of all files, and of all records by name.
    is_plain: whether the records are the tensors of weights files of any family.
    size: size of all files in bytes.
    inputs: the source and the base, as they were given.
  """

  def __init__(self, source: container.Readable, base: Any = None):
    """Reads and checks the manifests; see `shards.find` and `open_base`."""
    self.inputs = source, base
    files, index = shards.find(source)
    self._files = [container.StreamReader(file) for file in files]
    self.size = sum(file.size for file in self._files)
    self.manifests = [_manifest(file) for file in self._files]
    first = self.manifests[0]
    self.preset, self.options, self.keeps = first.preset, first.options, first.keeps
    self.config, self.stem, self.message = first.config, first.stem, first.message
    pairs = list(zip(self._files, self.manifests, strict=True))
    with_others = [pair for pair in pairs if pair[1].files or pair[1].headers]
    if len(with_others) > 1:
      raise ContainerError('two shards have other files')
    self._file_of_others, self._others = (with_others or pairs)[0]
    self.is_plain = bool(self._others.headers)
    for manifest in self.manifests:
      if (manifest.preset, manifest.config) != (self.preset, self.config):
        raise ContainerError('the shards belong to different models')
      if manifest.message is not None and len(self._files) > 1:
        raise ContainerError('a message is one file, and no shard')
    self._base = None if base is None else open_base(base, plain=self.config is None)
    self._decoder = decode_lib.Decoder(self._files, self.manifests, self._base)
    self.records = self._decoder.entries
    if index is not None:
      self._check_index(index)
    if self.config is None and not self.is_plain:
      for name, record in self.records.items():
        paths = *record.empty, *(leaf.path for leaf in record.leaves)
        if {path.split('/')[0] for path in paths} != {name}:
          raise ContainerError(f'{name}: a leaf of the record is not under its name')

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: object) -> None:
    """Does nothing, because no file stays open between two streams."""

  def _check_index(self, index: shards.ShardIndex) -> None:
    """Checks that the index of the shards names each record and its shard."""
    base_name = lambda file: os.path.basename(file.name)
    for file in self._files:
      if index.metadata.manifest_crc32[base_name(file)] != file.manifest_crc32:
        raise ContainerError(f'{file.name}: the index names another shard of this name')
    homes = {name: base_name(file) for name, file in self._decoder.files.items()}
    if wrong := sorted(homes.items() ^ index.weight_map.items()):
      record = wrong[0][0]
      raise ContainerError(f'{record}: the index and the shards differ in this record')

  # ---- facts of the manifests --------------------------------------------------------

  def specs(self, name: str) -> Tree:
    """Returns the shapes and dtypes of a record, without reading it."""
    spec = lambda leaf: checkpoints.TensorSpec(leaf.shape, np.dtype(leaf.dtype))
    leaves = self.records[name].leaves
    return structured.unflatten({leaf.path: spec(leaf) for leaf in leaves})

  def needed_arrays(self) -> dict[str, entries.BaseArray]:
    """Returns the arrays of a base that the file needs, by their paths in the base."""
    leaves = self._decoder.leaves.values()
    return {array.path: array for leaf in leaves for array in leaf.base_arrays}

  def uses_of_base(self) -> dict[str, str]:
    """Returns the last record that needs each array of a base, by the array's path."""
    last: dict[str, str] = {}
    for name in self._names():
      for leaf in self.records[name].leaves:
        last |= dict.fromkeys((array.path for array in leaf.base_arrays), name)
    return last

  def unchanged(self) -> set[str]:
    """Returns the paths of the arrays that are those of the base."""
    return {
      path
      for path, leaf in self._decoder.leaves.items()
      if leaf.leaf_class is difference.Difference
      and not leaf.arrays
      and leaf.base is not None
      and (leaf.base.path, leaf.base.crc32) == (path, leaf.crc32)
      and (leaf.base.shape, leaf.base.dtype) == (leaf.shape, leaf.dtype)
    }

  def check_records(self) -> None:
    """Checks that every record is there, and a base if one is needed."""
    for name in (*self.records, *self._names()):
      self._decoder.entry(name)

  def fingerprint(self) -> str:
    """Returns a digest of the content."""
    digest = hashlib.sha256()
    for manifest in self.manifests:  # they have the checksums of all that they describe
      digest.update(manifest.to_bytes())
    if self._base is not None:
      digest.update(sources.fingerprint(self._base.source).encode())
    return digest.hexdigest()

  def dtypes_on_disk(self) -> dict[str, np.dtype]:
    """Returns the dtype of every parameter in the checkpoint that was encoded."""
    dtypes = {path: np.dtype(x.dtype) for path, x in self._decoder.leaves.items()}
    dtypes |= self.message.layout.dtypes() if self.message else {}
    others = {path: x for y in self.manifests for path, x in y.dtypes.items()}
    for path, dtype in dtypes.items():
      if dtype == np.float32:
        dtypes[path] = np.dtype(others.get(path, others.get('', dtype)))
    return dtypes

  def thin_shortcuts(self) -> dict[str, tuple[int, int]]:
    """Returns the columns of B and C of shortcuts that are thin, by path."""
    thin = {}
    for name in self.records:
      for leaf, specs in self._decoder.entry(name).leaf_specs:
        if leaf.leaf_class is structured.IdentityMinusGram:
          ranks = leaf.rank([x.shape for x in specs])
          if shortcuts.is_thin(ranks, leaf.shape[-1]):
            thin[leaf.path] = ranks
    return thin

  def stream_bytes(self) -> int:
    """Returns the bytes of all streams but the manifests. The rest is overhead."""
    return sum(x for manifest in self.manifests for x in manifest.sizes().values())

  # ---- records -----------------------------------------------------------------------

  def record(self, name: str) -> Tree:
    """Reads one record, and other records only if its leaves need them.

    Args:
      name: 'layers.0', 'layers.1', ..., 'embed', 'final_norm', 'head' or 'buffers'.
        The records of a PyTree are its top-level keys.

    Returns:
      The parameters in nested dicts of which the first key is the name, not stacked.
    """
    return self._decoder.entry(name).tree(self._decoder.decode(name))

  def tensor(self, path: str) -> Any:
    """Reads one parameter, such as 'layers.3/attention/query/kernel'; see `record`."""
    if path not in self._decoder.holders:
      raise ContainerError(f'{path}: no such parameter')
    return self._decoder.decode(self._decoder.holders[path])[path]

  def buffers(self) -> Tree:
    """Reads the tensors that the forward pass does not use; returns them by name."""
    name = models.names.BUFFERS
    if self.config is None or name not in self.records:
      return {}
    return self.record(name)[name]

  def each(
    self, *, keep: Collection[str] | None = None, show_progress: bool = False
  ) -> Iterator[tuple[str, Tree]]:
    """Yields the name of each record and its leaves by path, layers first.

    Structured leaves are replaced by their arrays, except those whose paths are in
    `keep`; by default all stay. Leaves may share the memory of the base.
    """
    if self.message is not None:
      yield from self._decode_message(show_progress)
    names = self._names()
    sizes = {name: self._decoder.entry(name).input.bytes for name in names}
    needed = {path for leaf in self._decoder.leaves.values() for path in leaf.needs}
    held = {self._decoder.holders.get(path) for path in needed}
    kept: dict[str, Any] = {}
    resolve = self._decoder.resolver(kept)
    total = sum(sizes.values())
    with (
      progress.Progress('decode', total, 'B', show=show_progress) as bar,
      pool.record_jobs() as start,
    ):
      ahead: collections.deque[Any] = collections.deque()
      for i, name in enumerate(names):
        # One record is decoded while the caller works on the one before it.
        wanted = 1 if sizes[name] >= memory.LARGE else 2
        for other in names[i + len(ahead) : i + wanted]:
          decode = functools.partial(
            self._decoder.decode, started=kept, integers=keep is None, shared=True
          )
          ahead.append(start(functools.partial(decode, other)))
          if other in held:
            kept[other] = ahead[-1]
        flat = ahead.popleft().result()
        if keep is not None:
          for path, leaf in flat.items():
            if structured.is_structured(leaf) and path not in keep:
              known = map(resolve, leaf.needs)
              array = (
                leaf.materialize(*known) if leaf.needs else structured.materialize(leaf)
              )
              flat[path] = jax.device_get(array)
        yield name, flat
        del flat
        bar.update(sizes[name])

  def _names(self) -> list[str]:
    """Returns all records in an order in which they can be read one at a time."""
    if self.message is not None or self.config is None:
      return self._outer()
    layers = map(models.names.layer, range(self.config.num_layers))
    others = [x for x in self.records if x == models.names.BUFFERS]
    return [*layers, *self._outer(), *others]

  def _outer(self) -> list[str]:
    """Returns the records outside the layers. Those that need others come last."""
    names = list(self.records)
    if self.config is not None and self.message is None:
      names = list(models.outer_shapes(self.config))
    # Nothing waits for a record that needs others, or all threads could wait for it.
    needs = lambda name: any(x.needs for x in self._decoder.entry(name).leaves)
    return sorted(names, key=needs)

  # ---- the whole content -------------------------------------------------------------

  def read(
    self,
    *,
    layers: range | None = None,
    integers: bool = False,
    as_model: bool = False,
    show_progress: bool = False,
  ) -> models.Model | Tree:
    """Reads the model, with stacked layers, or the PyTree; see `api.load`.

    Arrays are NumPy arrays. Plain tensors of a known family become a model only if
    `as_model`.
    """
    source = self.plain_model() if as_model else None
    config = self.config if source is None else source.config
    count = 0 if config is None else config.num_layers
    layers = range(count) if layers is None else layers
    if not 0 <= layers.start <= layers.stop <= count or layers.step != 1:
      raise ValueError(f'the file has {count} layers, got {layers}')
    decoder: decode_lib.Decoder | stacks.ModelDecoder = self._decoder
    outer = [] if config is None else list(models.outer_shapes(config))
    if source is not None:
      decoder = stacks.ModelDecoder(source.specs, source.read)
    elif self.message is not None:
      records = dict(self._decode_message(show_progress))
      tree = lambda name: structured.unflatten(records[name])
      decoder, show_progress = stacks.ModelDecoder(tree, tree), False
    else:
      outer = self._outer()
    flat = stacks.read(
      decoder, outer, layers, integers=integers, show_progress=show_progress
    )
    if config is not None:
      buffers = self.buffers() if source is None else source.buffers
      return models.Model(structured.unflatten(flat), buffers, config)
    if self.is_plain:  # the tensors by name
      return flat
    empty = [x for entry in self.records.values() for x in entry.empty]
    return structured.unflatten([*flat.items(), *((x, {}) for x in empty)])

  def _decode_message(self, show_progress: bool) -> Iterator[tuple[str, Tree]]:
    """Yields the records of a message; see `paper.decode`."""
    assert self.message is not None
    assert self.config is not None
    layout, config, (file,) = self.message.layout, self.config, self._files
    with container.naming(file.name), container.naming('message'):
      options = schema.load(paper.Options, self.options, 'options')
      sizes = layout.record_bytes(config)
      rotation = 16 * max(config.segment_widths) ** 2  # with its integers
      with memory.bounded('the message', 2 * sum(sizes.values()) + rotation):
        streams = {}
        for name, stream in self.message.streams.items():
          with file.checked(name, stream.crc32) as data:
            if data.size % 2:
              raise ValueError(f'{name}: an odd number of bytes')
            streams[name] = data.view('<u2').copy()
        flat = paper.decode(options, layout, streams, config, progress=show_progress)
    for name in sizes:
      yield name, {k: x for k, x in flat.items() if k.partition('/')[0] == name}

  # ---- the other files of a checkpoint -----------------------------------------------

  def plain_model(self) -> checkpoints.CheckpointReader | None:
    """Returns the model that plain tensors are; None for others, see `stacks`."""
    return stacks.open_model(self._decoder, self.files()) if self.is_plain else None

  def headers(self) -> dict[str, bytes]:
    """Reads the bytes before the tensors of each weights file, by its name."""
    return self._inflated(manifest_lib.HEADERS, self._others.headers)

  def files(self) -> dict[str, bytes]:
    """Reads the other files of the checkpoint; returns their bytes by name."""
    return self._inflated(manifest_lib.FILES, self._others.files)

  def _inflated(
    self, prefix: str, streams: Mapping[str, manifest_lib.Deflated]
  ) -> dict[str, bytes]:
    """Inflates streams whose names begin with a prefix; returns them by their names."""
    contents = {}
    with container.naming(self._file_of_others.name):
      for name, stream in streams.items():
        content = self._file_of_others.inflated(
          f'{prefix}{name}', stream.crc32, stream.size
        )
        if len(content) != stream.size:
          raise ContainerError(f'{prefix}{name}: it must inflate to {stream.size}')
        contents[name] = content
    return contents


def open_base(base: Any, *, plain: bool) -> base_lib.Base:
  """Opens the base beside which a file is encoded or decoded, see `api.Base`.

  A checkpoint at a path is opened as plain tensors if `plain`, as for a PyTree.
  """
  if isinstance(base, base_lib.Base):
    return base
  of_file = str, os.PathLike, bytes, bytearray, memoryview, Reader
  is_chain = isinstance(base, list | tuple) and base and isinstance(base[0], of_file)
  source, *below = base if is_chain else [base]
  if isinstance(source, str | os.PathLike) and not shards.is_encoded(source):
    source = checkpoints.open_plain(source) if plain else checkpoints.open_any(source)
  elif isinstance(source, of_file) and not isinstance(source, Reader):
    source = Reader(source, base=(below[0] if len(below) == 1 else below) or None)
    below = []
  if below:
    raise ValueError('a base that is no encoded file needs no base itself')
  if isinstance(source, Reader):
    if source.message is not None:
      raise ValueError(f'a file of the preset {source.preset!r} cannot be a base')
    source = types.SimpleNamespace(
      config=source.config,
      stored_as=None,
      records=tuple(source.records),
      specs=source.specs,
      read=source.record,
      fingerprint=source.fingerprint,
    )
  elif not isinstance(source, checkpoints.CheckpointReader | checkpoints.PlainFiles):
    source = sources.of(source)
    if isinstance(source, models.Model):
      source = source.rounded()
  return base_lib.Base(source, plain=plain)


def _manifest(file: container.StreamReader) -> manifest_lib.Manifest:
  """Reads the manifest of one file, and checks it against the header."""
  with container.naming(file.name):
    manifest = manifest_lib.Manifest.from_bytes(file.manifest())
    in_header = {x: file.nbytes(x) for x in file.names() if x != container.MANIFEST}
    if wrong := dict(in_header.items() ^ manifest.sizes().items()):
      raise ContainerError(
        f'{min(wrong)}: the header and the manifest differ in this stream'
      )
    return manifest

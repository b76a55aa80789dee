"""The reader of files: reads a record without the others, or the whole content.

    with Reader(path) as file:
      layer = file.read('layers.3')    # nested dicts of NumPy arrays and leaves
      model = file.content()           # layers stacked

The manifest is checked when the file is opened, and what it says of a record before
that is decoded. Several records decode side by side: one stream is read while the
blocks of another are decoded. A damaged or incomplete file raises `ContainerError`.
"""

from collections.abc import Iterator, Mapping
import functools
import hashlib
import os
from typing import Any, Self

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
from rotbits_jax.system import progress
from rotbits_jax.system import schema

Tree = dict[str, Any]


class Reader:
  """An encoded file, or all shards of one: a `passes.Source` and a context manager.

  Attributes:
    manifest: what all files hold, see `manifest.Manifest`.
    config: config of the model; None for a PyTree and for plain tensors.
    is_plain: whether the records are the tensors of weights files of any family.
    records: the entries of all records by name.
    size: size of all files in bytes.
    inputs: the source and the base, as they were given.
  """

  stored_as = None  # the arrays are rounded already

  def __init__(self, source: container.Readable, base: Any = None):
    """Reads and checks the manifests; see `shards.find` and `open_base`."""
    self.inputs = source, base
    paths, index = shards.find(source)
    self._files = [container.StreamReader(path) for path in paths]
    self.size = sum(file.size for file in self._files)
    self.manifest = manifest_lib.Manifest.of_files(self._files)
    self.config, self.is_plain = self.manifest.config, bool(self.manifest.headers)
    self._base = None if base is None else open_base(base, plain=self.config is None)
    homes = {name: file for file in self._files for name in file.sizes}
    self._decoder = decode_lib.Decoder(self.manifest, homes, self._base)
    self.records = self._decoder.entries
    if index is not None:
      self._check_index(index)

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
    homes = {name: base_name(self._decoder.files[name]) for name in self.records}
    if wrong := homes.items() ^ index.weight_map.items():
      name, _ = min(wrong)
      raise ContainerError(f'{name}: the index and the shards differ in this record')

  def names(self) -> list[str]:
    """Returns all records in the order of `each`, after a check of their entries.

    Layers come first, and records that need others last: nothing waits for them, or all
    threads could wait for one.
    """
    layers, outer, buffers = [], list(self.records), []
    if self.config is not None and self.manifest.message is None:
      layers = list(map(models.names.layer, range(self.config.num_layers)))
      buffers = [name for name in outer if name == models.names.BUFFERS]
      outer = list(models.outer_shapes(self.config))
    entries = {name: self._decoder.entry(name) for name in (*layers, *outer, *buffers)}
    outer.sort(key=lambda name: any(leaf.needs for leaf in entries[name].leaves))
    return [*layers, *outer, *buffers]

  def specs(self, record: str) -> Tree:
    """Returns the shapes and dtypes of a record, without reading it."""
    spec = lambda leaf: checkpoints.TensorSpec(leaf.shape, np.dtype(leaf.dtype))
    leaves = self.records[record].leaves
    return structured.unflatten({leaf.path: spec(leaf) for leaf in leaves})

  def fingerprint(self) -> str:
    """Returns a digest of the content: of all checksums in the manifests."""
    digest = hashlib.sha256()
    for file in self._files:
      digest.update(file.manifest())
    if self._base is not None:
      digest.update(sources.fingerprint(self._base.source).encode())
    return digest.hexdigest()

  # ---- records -----------------------------------------------------------------------

  def read(self, record: str) -> Tree:
    """Reads one record, and other records only if its leaves need them.

    Args:
      record: 'layers.0', 'layers.1', ..., 'embed', 'final_norm', 'head' or 'buffers'.
        The records of a PyTree are its top-level keys.

    Returns:
      The parameters in nested dicts of which the first key is the name, not stacked.
    """
    flat = self._decoder.decode(record)
    empty: Tree = {path: {} for path in self.records[record].empty}
    return structured.unflatten([*flat.items(), *empty.items()])

  def tensor(self, path: str) -> Any:
    """Reads one parameter, such as 'layers.3/attention/query/kernel'; see `read`."""
    if path not in self._decoder.holders:
      raise ContainerError(f'{path}: no such parameter')
    return self._decoder.decode(self._decoder.holders[path])[path]

  def each(
    self, *, as_arrays: bool = False, show_progress: bool = False
  ) -> Iterator[tuple[str, Tree]]:
    """Yields the name of each record and its leaves by path, see `names`.

    Structured leaves stay, or come `as_arrays`. Leaves may share the base's memory.
    """
    if self.manifest.message is not None:
      yield from self._decode_message(show_progress)
    names, decoder = self.names(), self._decoder
    sizes = {name: decoder.entry(name).input.bytes for name in names}
    needed = {path for leaf in decoder.leaves.values() for path in leaf.needs}
    held = {decoder.holders.get(path) for path in needed}
    jobs: dict[str, Any] = {}
    decode = functools.partial(
      decoder.decode, integers=not as_arrays, as_arrays=as_arrays, shared=True
    )
    total = sum(sizes.values())
    with (
      progress.Progress('decode', total, 'B', show=show_progress) as bar,
      pool.record_jobs() as start,
    ):
      for i, name in enumerate(names):
        # One record is decoded while the caller works on the one before it.
        for other in names[i : i + (1 if sizes[name] >= memory.LARGE else 2)]:
          if other not in jobs:
            jobs[other] = start(functools.partial(decode, other, jobs))
        yield name, jobs[name].result()
        if name not in held:
          del jobs[name]
        bar.update(sizes[name])

  # ---- the whole content -------------------------------------------------------------

  def content(
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
    outer = list(self.records) if config is None else list(models.outer_shapes(config))
    if source is not None:
      flat = stacks.read_arrays(source, outer, layers, show_progress=show_progress)
    elif self.manifest.message is not None:
      records = dict(self._decode_message(show_progress)).values()
      arrays = {path: array for record in records for path, array in record.items()}
      decoded = sources.TreeRecords(structured.unflatten(arrays))
      flat = stacks.read_arrays(decoded, outer, layers)
    else:
      flat = stacks.read(
        self._decoder, outer, layers, integers=integers, show_progress=show_progress
      )
    if config is not None:
      buffers = {} if source is None else source.buffers
      if source is None and models.names.BUFFERS in self.records:
        buffers = self.read(models.names.BUFFERS)[models.names.BUFFERS]
      return models.Model(structured.unflatten(flat), buffers, config)
    if self.is_plain:  # the tensors by name
      return flat
    empty = [x for entry in self.records.values() for x in entry.empty]
    return structured.unflatten([*flat.items(), *((x, {}) for x in empty)])

  def _decode_message(self, show_progress: bool) -> Iterator[tuple[str, Tree]]:
    """Yields the records of a message; see `paper.decode`."""
    message, config = self.manifest.message, self.config
    assert message is not None
    assert config is not None
    with container.naming(self._files[0].name), container.naming('message'):
      options = schema.load(paper.Options, self.manifest.options, 'options')
      sizes = message.layout.record_bytes(config)
      rotation = 16 * max(config.segment_widths) ** 2  # with its integers
      with memory.bounded('the message', 2 * sum(sizes.values()) + rotation):
        words = {}
        for name, stream in message.streams.items():
          with self._decoder.files[name].checked(name, stream.crc32) as data:
            if data.size % 2:
              raise ValueError(f'{name}: an odd number of bytes')
            words[name] = data.view('<u2').copy()
        flat = paper.decode(
          options, message.layout, words, config, progress=show_progress
        )
    for name in sizes:
      yield name, {k: x for k, x in flat.items() if k.partition('/')[0] == name}

  # ---- the other files of a checkpoint -----------------------------------------------

  def plain_model(self) -> checkpoints.CheckpointReader | None:
    """Returns the model that plain tensors are; None for others, see `stacks`."""
    return stacks.open_model(self._decoder, self.files()) if self.is_plain else None

  def headers(self) -> dict[str, bytes]:
    """Reads the bytes before the tensors of each weights file, by its name."""
    return self._inflated(manifest_lib.HEADERS, self.manifest.headers)

  def files(self) -> dict[str, bytes]:
    """Reads the other files of the checkpoint; returns their bytes by name."""
    return self._inflated(manifest_lib.FILES, self.manifest.files)

  def _inflated(
    self, prefix: str, streams: Mapping[str, manifest_lib.Deflated]
  ) -> dict[str, bytes]:
    """Inflates streams whose names begin with a prefix; returns them by their names."""
    contents = {}
    for name, stream in streams.items():
      file = self._decoder.files[f'{prefix}{name}']
      with container.naming(file.name):
        content = file.inflated(f'{prefix}{name}', stream.crc32, stream.size)
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
    if source.manifest.message is not None:
      raise ValueError('a file of the preset paper cannot be a base')
  elif not isinstance(source, checkpoints.CheckpointReader | checkpoints.PlainFiles):
    source = sources.of(source)
    if isinstance(source, models.Model):
      source = source.rounded()
  return base_lib.Base(source, plain=plain)

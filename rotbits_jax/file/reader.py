"""The reader of files: reads a record without the others, or the whole content.

    reader = Reader(path)
    layer = reader.read('layers.3')    # nested dicts of NumPy arrays and leaves
    model = reader.content()           # layers stacked

Several records decode side by side, each a block at a time: a thread reads it, decodes
it and adds it to the checksums. A damaged or incomplete file raises `ContainerError`.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import functools
import hashlib
import math
import os
import types
from typing import Any, BinaryIO, Self, TypeAlias

import jax
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import paper
from rotbits_jax import pool
from rotbits_jax import structured
from rotbits_jax.file import coders
from rotbits_jax.file import container
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import memory
from rotbits_jax.file import shards
from rotbits_jax.file import sources
from rotbits_jax.file.container import ContainerError
from rotbits_jax.relative import base as base_lib
from rotbits_jax.structured import difference
from rotbits_jax.system import checksums
from rotbits_jax.system import host
from rotbits_jax.system import progress
from rotbits_jax.system import schema

_MOST_BASES = 8  # of subspaces that are held, because several parameters need one
_MOST_USES = 16  # of arrays by leaves that are small beside them

Tree = dict[str, Any]
Rows = Mapping[str, list[np.ndarray]]  # arrays to decode leaves into, by path


class Reader:
  """An encoded file, or all shards of one, as a `passes.Source`.

  `config` is None for a PyTree and for plain tensors; `is_plain` tells the latter. No
  file stays open between two streams, so the end of a `with` has nothing to close.
  """

  stored_as = None  # the arrays are rounded already

  def __init__(self, source: container.Readable, base: Any = None):
    """Reads and checks the manifests; see `shards.find` and `open_base`."""
    self.inputs = source, base  # as they were given
    paths, index = shards.find(source)
    self._files = [container.StreamReader(path) for path in paths]
    self._homes = {name: file for file in self._files for name in file.sizes}
    self.size = sum(file.size for file in self._files)
    self.manifest = manifest_lib.Manifest.of_files(self._files)
    self.config, self.is_plain = self.manifest.config, bool(self.manifest.headers)
    self._base = None if base is None else open_base(base, plain=self.config is None)
    self.opened = [x.opened for x in self._files if x.opened is not None]
    self.opened += getattr(self._base and self._base.source, 'opened', ())
    self.records = {record.name: record for record in self.manifest.records}
    self.entry = functools.cache(self._checked_entry)
    self._tensor = functools.lru_cache(_MOST_BASES)(self.tensor)
    self._check_uses()
    homes = {name: self._homes[name] for name in self.records}
    if index is not None and index != shards.index_of(self._files, homes):
      raise ContainerError(f'{shards.INDEX} is not that of these shards')

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    """Ends a `with`, as that of `safetensors.safe_open`."""

  @property
  def metadata(self) -> dict[str, str]:
    """The texts that the encoder got as `metadata`, by their names."""
    return dict(self.manifest.metadata)

  def keys(self) -> list[str]:
    """Returns the names of all tensors, in the order of the file; see `tensor`."""
    message = self.manifest.message
    of_message = [] if message is None else list(message.layout.arrays)
    return [*of_message, *self._holders]

  def record(self, name: str) -> Tree:
    """Reads one record, such as 'layers.3', without the others; see `read`."""
    return self.read(name)

  @functools.cached_property
  def _leaves(self) -> dict[str, manifest_lib.Leaf]:
    """The leaves of all records by path."""
    return {leaf.path: leaf for x in self.records.values() for leaf in x.leaves}

  @functools.cached_property
  def _holders(self) -> dict[str, str]:
    """The records of the leaves."""
    return {leaf.path: x.name for x in self.records.values() for leaf in x.leaves}

  def _check_uses(self) -> None:
    """Checks that small leaves do not need large arrays over and over."""
    needed: dict[str | None, int] = {}
    total = elements = 0
    leaves = (leaf for record in self.records.values() for leaf in record.leaves)
    for leaf in (x for x in leaves if x.needs or x.base or x.product):
      uses: list[tuple[str | None, int]]
      uses = [(x, self._leaves[x].size) for x in leaf.needs if x in self._leaves]
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
    if name not in self.records:
      raise ContainerError(f'{name}: no such record')
    entry = self.records[name]
    with container.naming(self._homes[name].name):
      entry.check()
      for leaf in entry.leaves:
        with container.naming(leaf.path):
          self._check_needed(leaf)
    return entry

  def _check_needed(self, leaf: manifest_lib.Leaf) -> None:
    """Checks that there are the arrays from which a leaf is computed."""
    for path in leaf.needs:
      holder = self._holders.get(path)
      if holder is None and self.config is not None:
        raise ValueError(f'it needs {path}, which is missing')
      if holder is not None and self.records[holder].needs_others:
        raise ValueError(f'it needs {path}, whose record needs others')
    for array in leaf.base_arrays:
      if self._base is None:
        raise ValueError('it needs base=..., the model with which it was encoded')
      self._base.check(array)

  def names(self) -> list[str]:
    """Returns all records in the order of `each`, after a check of their entries.

    Records that need others are last: nothing waits for them, or all threads could wait
    for one.
    """
    names = list(self.records)
    if self.config is not None and self.manifest.message is None:
      layers = map(models.names.layer, range(self.config.num_layers))
      buffers = [name for name in names if name == models.names.BUFFERS]
      names = [*layers, *models.outer_shapes(self.config), *buffers]
    return sorted(names, key=lambda name: self.entry(name).needs_others)

  def specs(self, record: str) -> Tree:
    """Returns the shapes and dtypes of a record, without reading it."""
    spec = lambda leaf: checkpoints.TensorSpec(leaf.shape, np.dtype(leaf.dtype))
    return structured.unflatten((x.path, spec(x)) for x in self.records[record].leaves)

  def fingerprint(self) -> str:
    """Returns a digest of the content: of all checksums in the manifests."""
    digest = hashlib.sha256(b''.join(file.manifest() for file in self._files))
    if self._base is not None:
      digest.update(sources.fingerprint(self._base.source).encode())
    return digest.hexdigest()

  def read(self, record: str) -> Tree:
    """Reads one record, and other records only if its leaves need them.

    Args:
      record: 'layers.0', 'layers.1', ..., 'embed', 'final_norm', 'head' or 'buffers'.
        The records of a PyTree are its top-level keys.

    Returns:
      The parameters in nested dicts of which the first key is the name, not stacked.
    """
    flat = self.decode(record)
    empty: Tree = {path: {} for path in self.records[record].empty}
    return structured.unflatten([*flat.items(), *empty.items()])

  def tensor(self, path: str) -> Any:
    """Reads one parameter, such as 'layers.3/attention/query/kernel'; see `read`."""
    if path not in self._holders:
      if path in self.keys():
        raise ContainerError(f'{path}: a file of the preset paper decodes whole')
      raise ContainerError(f'{path}: no such parameter')
    return self.decode(self._holders[path])[path]

  def each(
    self,
    names: Sequence[str] | None = None,
    *,
    show_progress: bool = False,
    **options: Any,
  ) -> Iterator[tuple[str, Tree]]:
    """Yields the name of each record and its leaves by path, with options of `decode`.

    One record is decoded while the caller works on the one before it. If names are
    given, all of these are started at once.
    """
    message = self._message(show_progress) if names is None else {}
    for name, params in message.items():
      yield name, structured.flatten({name: params})
    order = self.names() if names is None else names
    sizes = {name: self.entry(name).input.bytes for name in order}
    needed = {path for leaf in self._leaves.values() for path in leaf.needs}
    held = {self._holders.get(path) for path in needed}
    jobs: dict[str, Any] = {}
    decode, total = functools.partial(self.decode, **options), sum(sizes.values())
    with (
      progress.Progress('decode', total, 'B', show=show_progress) as bar,
      pool.started() as start,
    ):
      for i, name in enumerate(order):
        ahead = i + (1 if sizes[name] >= memory.LARGE else 2)
        for other in order[len(jobs) : ahead if names is None else None]:
          jobs[other] = start(functools.partial(decode, other, jobs))
        yield name, jobs[name].result()
        if name not in held:
          jobs[name] = None
        bar.update(sizes[name])

  def decode(
    self,
    name: str,
    started: Mapping[str, 'futures.Future[Tree]'] = types.MappingProxyType({}),
    *,
    rows: Rows = types.MappingProxyType({}),
    integers: bool = False,
    as_arrays: bool = False,
  ) -> Tree:
    """Decodes a record to NumPy arrays and structured leaves.

    Leaves may need records that are `started`. They are decoded to the `rows` of their
    paths, or get new memory. With `integers`, multiples of one step stay integers.
    """
    entry, file = self.entry(name), self._homes[name]
    # For several leaves that need one record.
    others = functools.cache(
      lambda name: started[name].result() if name in started else self.decode(name)
    )
    leaves, known, uses = [], {}, {}
    arrays: list[np.ndarray] = []
    with (
      container.naming(file.name),
      container.naming(name),
      memory.bounded(name, entry.memory_bytes),
    ):
      for leaf, specs in entry.leaf_specs:
        out = rows.get(leaf.path)
        is_expanded = leaf.is_expanded(integers)
        is_written = is_expanded and hasattr(leaf.leaf_class, 'write')
        if out is None or is_expanded:
          stored = [host.empty(x.shape, x.dtype) for x in specs]
          if is_written:
            out = out or [host.empty(leaf.shape, leaf.dtype)]
        else:  # the coder writes them there
          stored = [x.view(y.dtype) for x, y in zip(out, specs, strict=True)]
        needed = functools.partial(self._needed, leaf, others)
        shapes = [self._leaves[x].shape for x in leaf.needs if x in self._leaves]
        crc32 = specs[0].crc32 if specs else None
        facts = leaf, stored, out, is_expanded, needed, shapes, crc32
        leaves.append(_StoredLeaf(*facts))
        if 'elements' in leaf.arrays:
          known[len(arrays) + leaf.arrays.index('elements')] = leaves[-1].near
        shapes_of = [x.shape for x in specs]
        if is_written and leaf.shape in shapes_of:  # a file may have them in any order
          uses[len(arrays) + shapes_of.index(leaf.shape)] = leaves[-1].write
        arrays += stored
      decode, stream = coders.CODERS[entry.coder].decode, container.Stream(file, name)
      decode(entry.stream_spec, stream, out=arrays, known=known, uses=uses)
      stream.check(entry.crc32)
      return {leaf.entry.path: leaf.value(as_arrays=as_arrays) for leaf in leaves}

  def _needed(
    self, leaf: manifest_lib.Leaf, others: Callable[[str], Tree]
  ) -> list[Any]:
    """Returns the arrays that a leaf is computed from, given a reader of records."""
    needed = []
    for path in leaf.needs:
      if path not in self._holders:  # a PyTree may have the leaf alone
        raise ValueError(f'it needs {path}, which is missing')
      array = structured.materialize(others(self._holders[path])[path])
      needed.append(jax.device_get(array))
    if leaf.base is not None and self._base is not None:
      needed.append(self._base.get(leaf.base))
    if (product := leaf.product) is not None:
      arrays = [self._base.get(array) for array in product.arrays if self._base]
      bases = [self._tensor(models.names.basis(x)) for x in product.segments]
      needed.append(product.tensor(arrays, bases, leaf.shape, np.dtype(leaf.dtype)))
    return needed

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
    if source is not None:
      nbytes = sum(leaf.nbytes for leaf in self._leaves.values())
      with memory.bounded('the whole content', nbytes):
        return source.load(layers, show_progress=show_progress).model
    buffers = {}
    if config is not None and models.names.BUFFERS in self.records:
      buffers = self.read(models.names.BUFFERS)[models.names.BUFFERS]
    if config is not None and self.manifest.message is not None:
      params = self._message(show_progress)
      rows = [params.pop(models.names.layer(i)) for i in range(count)]
      if layers != range(count):
        raise ValueError('a file of the preset paper decodes whole, with all layers')
      return models.from_layers(config, params, rows, buffers)
    outer = list(self.records) if config is None else list(models.outer_shapes(config))
    flat = self._read(outer, layers, integers, show_progress)
    if config is not None:
      return models.Model(structured.unflatten(flat), buffers, config)
    if self.is_plain:  # the tensors by name
      return flat
    empty = [x for entry in self.records.values() for x in entry.empty]
    nested = structured.unflatten([*flat.items(), *((x, {}) for x in empty)])
    return sources.unescaped(nested)

  def _read(
    self, outer: Sequence[str], layers: range, integers: bool, show_progress: bool
  ) -> dict[str, Any]:
    """Returns leaves by path; layers are decoded straight into their stacks."""
    nbytes = sum(self.entry(name).memory_bytes for name in outer)
    of_layers = {i: self.entry(models.names.layer(i)) for i in layers}
    runs = models.stack_ranges(layers, lambda i: of_layers[i].stack_key(integers))
    # Where ranks differ, a stack has room for the greatest one in each layer.
    most = lambda run: max(of_layers[i].memory_bytes for i in run)
    nbytes += sum(len(run) * most(run) for run in runs)
    flat: dict[str, Any] = {}
    rows: dict[str, list[np.ndarray]] = {}
    with memory.bounded('the whole content', nbytes):
      for run in runs:
        for path, stack in _stack([of_layers[i] for i in run], integers).items():
          flat[f'{models.names.stack(run)}/{path}'] = stack[0]
          for place, name in enumerate(map(models.names.layer, run)):
            rows[f'{name}/{path}'] = [x[place, ...] for x in stack]
      # The small ones first: threads compile programs that only these have meanwhile,
      # and share the blocks of the large ones. See also `names`.
      order = lambda name: (self.entry(name).needs_others, self.entry(name).nbytes)
      names = [*outer, *map(models.names.layer, layers)]
      each = functools.partial(self.each, show_progress=show_progress)
      ordered = sorted(names, key=order)
      decoded = dict(each(ordered, rows=rows, integers=integers))
      leaves = {k: x for name in names for k, x in decoded.pop(name).items()}
      for run in runs:
        first = models.names.layer(run.start)
        for path in (x.path.removeprefix(first) for x in of_layers[run.start].leaves):
          of_run = [leaves.pop(f'{models.names.layer(i)}{path}') for i in run]
          if structured.is_structured(of_run[0]):
            flat[models.names.stack(run) + path] = type(of_run[0]).stack(of_run)
    for path, leaf in leaves.items():
      flat[path] = host.contiguous(leaf) if isinstance(leaf, np.ndarray) else leaf
    return flat

  def _message(self, show_progress: bool) -> Tree:
    """Returns the parameters of a message, see `paper.decode`; else nothing."""
    message, config = self.manifest.message, self.config
    if message is None or config is None:
      return {}
    with container.naming(self._files[0].name), container.naming('message'):
      options = schema.load(paper.Options, self.manifest.options, 'options')
      size = sum(message.layout.record_bytes(config).values())
      rotation = 16 * max(config.segment_widths) ** 2  # with its integers
      with memory.bounded('the message', 2 * size + rotation):
        words = {
          name: self._homes[name].checked(name, stream.crc32).view('<u2').copy()
          for name, stream in message.streams.items()
        }
        return structured.unflatten(
          paper.decode(options, message.layout, words, config, progress=show_progress)
        )

  def plain_model(self) -> checkpoints.CheckpointReader | None:
    """Returns the model that plain tensors are; None if they are of no known family.

    Its weights are those at the root of the folder that `checkpoints.open_checkpoint`
    takes, without adapters and other models in sub-folders.
    """
    if not self.is_plain:
      return None
    # Each thread reads one record at a time.
    decode = functools.partial(self.decode, as_arrays=True)
    decoded = functools.lru_cache(pool.threads() + 1)(decode)
    read = lambda path: decoded(self._holders[path])[path]
    files = self.files()
    try:
      tensors = {}
      for name, path in checkpoints.model_tensors(self.headers(), files).items():
        leaf = self._leaves[path]
        dtype = np.dtype(leaf.dtype)
        reading = functools.partial(read, path)
        tensors[name] = checkpoints.LazyTensor(leaf.shape, dtype, reading)
      content = checkpoints.parse_object(files['config.json'], 'config.json')
      config = checkpoints.parse_config(content)
      folder = checkpoints.Folder(None, tensors, files)
      return checkpoints.CheckpointReader(folder, config)
    except (KeyError, checkpoints.CheckpointError):
      return None

  def headers(self) -> dict[str, bytes]:
    """Reads the bytes before the tensors of each weights file, by its name."""
    return self._inflated(manifest_lib.HEADERS, self.manifest.headers)

  def files(self) -> dict[str, bytes]:
    """Reads the other files of the checkpoint; returns their bytes by name."""
    return self._inflated(manifest_lib.FILES, self.manifest.files)

  def copies(self) -> dict[str, Callable[[BinaryIO], None]]:
    """Returns functions that write files that memory does not hold, by their names."""
    return {
      name: functools.partial(self._write_copy, name) for name in self.manifest.copies
    }

  def _write_copy(self, name: str, out: BinaryIO) -> None:
    """Writes one of the `copies` to a file."""
    stream = self.manifest.copies[name]
    home = self._homes[f'{manifest_lib.COPIES}{name}']
    with container.naming(home.name):
      home.inflate_to(
        out, f'{manifest_lib.COPIES}{name}', stream.crc32, size=stream.size
      )

  def _inflated(
    self, prefix: str, streams: Mapping[str, manifest_lib.Deflated]
  ) -> dict[str, bytes]:
    """Inflates streams whose names begin with a prefix; returns them by their names."""
    contents = {}
    for name, stream in streams.items():
      stream_name = f'{prefix}{name}'
      file = self._homes[stream_name]
      with container.naming(file.name):
        contents[name] = file.inflated(stream_name, stream.crc32, stream.size)
        if len(contents[name]) != stream.size:
          raise ContainerError(f'{stream_name}: it must inflate to {stream.size}')
    return contents


Encoded: TypeAlias = container.Readable | Reader
"""An encoded file: its path, its bytes, an open binary file, or its reader, which has
the base of the file."""


def opened(source: Encoded, base: Any = None) -> Reader:
  """Opens a file with its base, or returns a reader that has it."""
  if not isinstance(source, Reader):
    return Reader(source, base=base)
  if base is not None:
    raise ValueError('an opened file has its base: give base= to `rotbits_jax.open`')
  return source


@dataclasses.dataclass
class _StoredLeaf:
  """A leaf while the coder fills the `arrays` as which it is stored."""

  entry: manifest_lib.Leaf
  arrays: list[np.ndarray]
  out: list[np.ndarray] | None  # where to decode the leaf to
  is_expanded: bool  # whether an array takes its place
  needed: Callable[[], list[Any]]  # returns the arrays that it is computed from
  shapes: Sequence[manifest_lib.Shape]  # of these
  crc32: int | None  # of the first array, which the coder compares
  # Where ranges that are written begin, and their CRC-32 and bytes.
  pieces: list[tuple[int, tuple[int, int]]] = dataclasses.field(default_factory=list)
  bits: np.ndarray | None = None  # the known array, once it is made

  @functools.cached_property
  def _leaf(self) -> Any:
    """The leaf; elements that are near known ones or written may not be decoded yet."""
    return self.entry.make(self.arrays, self.shapes)

  def known(self) -> np.ndarray:
    """Returns the known array of a leaf of differences."""
    # Leaves share the lock of a cached property with Python 3.11, and this may wait for
    # a record of others.
    if self.bits is None:
      self.bits = self._leaf.known(*self.needed())
    return self.bits

  def near(self) -> np.ndarray:
    """Returns the known numbers of the stored elements of such a leaf."""
    with container.naming(self.entry.path):
      bits = self._leaf.changed_part(self.known())
    return bits.view(f'u{bits.itemsize}')

  def write(self, some: slice) -> None:
    """Writes elements whose numbers are decoded, by a leaf that has such a method."""
    with container.naming(self.entry.path):
      out: Any = self.out
      crc32, size = self._leaf.write(out[0], some), some.stop - some.start
    self.pieces.append((some.start, (crc32, size * out[0].itemsize)))

  def value(self, *, as_arrays: bool) -> Any:
    """Returns the array or the leaf, when the stored arrays are decoded."""
    entry, crc32 = self.entry, None
    with container.naming(entry.path):
      if not entry.type_name:
        array = self.arrays[0].view(np.dtype(entry.dtype))
      elif not self.is_expanded and not as_arrays:
        return self._leaf
      elif not self.is_expanded:
        needed = self.needed()
        leaf = self._leaf.materialize(*needed) if needed else self._leaf
        return jax.device_get(structured.materialize(leaf))
      elif self.out and hasattr(self._leaf, 'write'):
        array = self.out[0]
        if not self.pieces:
          self.write(slice(0, array.size))
        crc32 = checksums.joined(piece for _, piece in sorted(self.pieces))
      elif isinstance(self._leaf, difference.Difference):
        array = self._leaf.joined(self.known())
        is_coded = any(np.may_share_memory(array, x) for x in self.arrays[:1])
        crc32 = self.crc32 if is_coded else None
      else:
        array = np.asarray(self._leaf.materialize(*self.needed()))
      if entry.crc32 is not None and crc32 is None:
        crc32 = checksums.of_array(array)
      if entry.crc32 not in (None, crc32):
        raise ValueError('decoded elements differ from the encoded ones')
    if self.out is None or np.may_share_memory(array, self.out[0]):
      return array
    self.out[0][...] = host.contiguous(array)
    return self.out[0]


def _stack(
  entries: Sequence[manifest_lib.RecordEntry], integers: bool
) -> dict[str, list[np.ndarray]]:
  """Makes the arrays of a stack, by path, of leaves whose layers have equal shapes."""
  arrays: dict[str, list[np.ndarray]] = {}
  stored = collections.defaultdict(list)
  for entry in entries:
    for leaf, specs in entry.leaf_specs:
      is_array = not leaf.type_name or leaf.is_expanded(integers)
      shapes = [(x.shape, x.dtype) for x in ([leaf] if is_array else specs)]
      stored[leaf.path.removeprefix(f'{entry.name}/')].append(shapes)
  for path, (first, *others) in stored.items():
    if all(shapes == first for shapes in others):
      arrays[path] = [host.empty((len(entries), *x), y) for x, y in first]
  return arrays


def open_base(base: Any, *, plain: bool) -> base_lib.Base:
  """Opens the base of a file that is encoded or decoded, see `api.Base`.

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
    raise ValueError(f'{base[0]}: a checkpoint needs no base; leave out {below[0]}')
  if isinstance(source, Reader):
    if source.manifest.message is not None:
      raise ValueError('a file of the preset paper cannot be a base')
  else:
    source = sources.of(source)
    if isinstance(source, models.Model):
      source = source.rounded()
  return base_lib.Base(source, plain=plain)

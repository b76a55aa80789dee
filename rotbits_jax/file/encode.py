"""Encodes a source: rewrites its records with a preset, codes them, and writes them.

Records are rewritten while those before them are coded.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import functools
import hashlib
import io
import json
import math
import platform
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from zlib_ng import zlib_ng

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import paper
from rotbits_jax import passes
from rotbits_jax import pool
from rotbits_jax import presets
from rotbits_jax import quantisers
from rotbits_jax import structured
from rotbits_jax.coding import coder
from rotbits_jax.coding import plans
from rotbits_jax.file import coders
from rotbits_jax.file import container
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import memory
from rotbits_jax.file import prices
from rotbits_jax.file import sources
from rotbits_jax.file import verification
from rotbits_jax.relative import base as base_lib
from rotbits_jax.relative import entries as entries_lib
from rotbits_jax.relative import measure
from rotbits_jax.relative import products
from rotbits_jax.relative import recipe as recipe_lib
from rotbits_jax.structured import difference
from rotbits_jax.system import checksums
from rotbits_jax.system import files as files_lib
from rotbits_jax.system import progress as progress_lib
from rotbits_jax.system import schema

_COPY_LEVEL = 3  # of zlib, for files that may be as large as the weights
_COPY_PIECE = 1 << 22  # bytes

RELATIVE = 'relative to a base'
"""The name of the saving of a base."""

KEPT = 'as exact'
"""The name of a saving of 0 bytes: the record is stored as `exact` stores it.

Its notes have the tensors that are stored so, if not all are.
"""

_REWRITTEN = prices.Choice(is_exact=False, nbytes=math.inf)


class Encoder:
  """Encodes a source with a preset, relative to a base or alone.

  `counts` has the elements and bytes of each record before it is rewritten, by its
  name, in the order of the file. Records may be divided among several files unless they
  are one message.
  """

  def __init__(
    self,
    source: passes.Source,
    preset: presets.Preset,
    *,
    base: base_lib.Base | None = None,
    files: Mapping[str, Any] | None = None,  # bytes, or functions that return them
    stem: str | None = None,
    metadata: Mapping[str, str] | None = None,
  ):
    """Checks, before the work, that the preset suits the source; see `api.encode`."""
    # The folder of the source, or an empty one for what is in memory.
    empty = checkpoints.Folder(None, {}, {})
    self._folder = source if isinstance(source, checkpoints.Folder) else empty
    self.missed = self._folder.missed
    self.can_be_divided = preset.coder != paper.CODER
    if self.can_be_divided and preset.coder not in coders.CODERS:
      raise ValueError(f'there is no coder of the name {preset.coder!r}')
    if isinstance(source, models.Model) and (preset.rounding is None or base):
      source = source.rounded()  # others are rounded when they are rewritten
    self.source, self.preset, self.base = source, preset, base
    self.inputs = [source, *([] if base is None else [base.source])]
    self._files, self._stem = dict(files or {}), stem
    self._metadata = manifest_lib.check_metadata(dict(metadata or {}))
    self._headers = source.headers if isinstance(source, checkpoints.PlainFiles) else {}
    self._recipe = None if base is None else self._find_recipe(base)
    self._records: Any = self._recipe or source
    self._context = None
    if source.config is not None:
      layers = map(models.names.layer, range(source.config.num_layers))
      for name in (*models.outer_shapes(source.config), *layers):
        if name not in source.records:
          raise ValueError(f'{name}: the model lacks it')
      if not self.can_be_divided:
        paper.refuse(source)
      self._context = passes.make_context(self._records)
    elif preset.keeps == 'function':
      reason = getattr(source, 'reason', None) or 'exact and near take any arrays'
      text = f'the preset {preset.name!r} needs a model of a known family; {reason}'
      raise checkpoints.CheckpointError(text)
    self.counts = {name: self._count(name) for name in self._records.records}
    preset = self.preset
    # The records of a recipe, of one message and relative to a base are as they are.
    self._may_keep_bits = preset.may_keep_bits and base is None and self.can_be_divided
    self._choice: prices.Choice | None = None
    self._is_exact = False  # whether the whole model is stored as `exact` stores it
    if preset.keeps == 'function' and preset.transform and not preset.resumable:
      self._check_function()

  def nbytes(self, records: Sequence[str]) -> int:
    """Returns the bytes of records before they are coded."""
    return sum(self.counts[name].bytes for name in records)

  def fingerprint(self) -> str:
    """Returns a digest of the source and of everything else that decides the bytes."""
    preset = self.preset
    value = [
      *(preset.name, preset.options, preset.keeps, preset.coder, self._stem),
      *map(sources.fingerprint, self.inputs),
      {x: hashlib.sha256(y).hexdigest() for x, y in self._files.items()},
      self._metadata,
      *(rotbits_jax.__version__, jax.__version__),
      # Another processor rounds bases in another way.
      None if self._recipe is None else platform.node(),
    ]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()

  def in_memory(self, *, progress: bool) -> bytes:
    """Encodes the whole source; returns the bytes of the file."""
    buffer, records = io.BytesIO(), tuple(self.counts)
    size = self.nbytes(records)
    with progress_lib.Progress('encode', size, 'B', show=progress) as bar:
      self.write(buffer, records, bar)
    return buffer.getvalue()

  def write(
    self,
    file: BinaryIO,
    records: Sequence[str],
    bar: progress_lib.Progress,
    state: Any = None,
  ) -> Any:
    """Writes records, which follow each other, to an empty file.

    If the state of the transform before them is not given, the layers before them are
    gone through. The result is the state after them.
    """
    all_records = records
    is_last = records[-1:] == tuple(self.counts)[-1:]
    files, headers, copies = {}, {}, {}
    if is_last:
      files, headers, copies = self._files, self._headers, self._folder.copies
    names = list(records)
    if not self.can_be_divided:
      records = [name for name in records if name == models.names.BUFFERS]
      names = [*paper.STREAMS, *records]
    names += [f'{manifest_lib.FILES}{name}' for name in files]
    names += [f'{manifest_lib.HEADERS}{name}' for name in headers]
    names += [f'{manifest_lib.COPIES}{name}' for name in copies]
    streams = container.StreamWriter(file, names)
    # A recipe drops rounding errors later, and a shard does not know the others.
    is_whole = self._recipe is None and len(records) == len(self.counts)
    bar.stage('reading, compiling')
    choice = self._chosen()
    self._is_same = self.preset.keeps != 'bits' and (is_whole or choice.is_exact)
    message = None if self.can_be_divided else self._write_message(streams, bar)
    entries, state = self._write_records(streams, records, bar, state)
    size = sum(entry.nbytes for entry in entries)
    if is_whole and not choice.is_exact and size > prices.NEARLY * choice.nbytes:
      self._choice = choice._replace(is_exact=True)
      file.seek(0)
      file.truncate()
      return self.write(file, all_records, bar)
    try:
      data = manifest_lib.Manifest(
        preset=self.preset.name,
        options=self.preset.options,
        keeps='bits' if self._is_same else self.preset.keeps,
        config=self.source.config,
        stem=self._stem,
        records=tuple(sorted(entries, key=lambda entry: entry.needs_others)),
        message=message,
        files=_write_files(streams, manifest_lib.FILES, files),
        headers=_write_files(streams, manifest_lib.HEADERS, headers),
        copies=_write_copies(streams, copies),
        exclude=self._folder.selection.exclude if is_last else (),
        excluded=self._folder.excluded if is_last else (),
        missed=self.missed if is_last else (),
        dtypes=self._dtypes(),
        metadata=self._metadata if is_last else {},
      ).to_bytes()
    except ValueError as error:  # a reader would refuse it
      raise ValueError(f'the model cannot be stored: {error}') from error
    for opened in self.inputs:
      for input_file in getattr(opened, 'opened', ()):
        input_file.check()
    for input_file in copies.values():
      input_file.check()
    streams.finish(data)
    return state

  def _chosen(self) -> prices.Choice:
    """Returns whether the whole model is stored as `exact` stores it.

    The layers of a model whose stream is rotated can only be stored so together. Other
    records are compared one by one, when they are coded.
    """
    if self._choice is None:
      config = self.source.config
      valid = None if config is None else models.layout.symmetries(config)
      self._choice = _REWRITTEN
      if self._may_keep_bits and valid and (valid.segments or valid.stream):
        with contextlib.suppress(ValueError):  # a weight is too large for its dtype
          as_stored = self._as_stored()
          self._choice = prices.choose(as_stored, self.preset)
    if self._choice.is_exact and not self._is_exact:
      self._is_exact, self._may_keep_bits = True, False
      self.source = self._records = self._as_stored()
      self._context = passes.make_context(self.source)
      transform = presets.exact().transform
      self.preset = self.preset._replace(transform=transform, rounding=None)
    return self._choice

  def _as_stored(self) -> Any:
    """Returns the source with weights of the dtypes in which they are stored."""
    source = self.source
    return source.rounded() if isinstance(source, models.Model) else source

  def _check_function(self) -> None:
    """Applies transforms that others wrote, and compares the predictions for tokens."""
    model: Any = self.source
    model = model if isinstance(model, models.Model) else model.load().model
    rounding = self.preset.rounding
    rewritten, _ = passes.run_chain(self.preset.transform, model, rounding=rounding)
    model = model.rounded()
    draws = verification.rotated(model)
    divergences = verification.divergences(rewritten, model, draws)
    if text := verification.different(*divergences):
      raise ValueError(f"the transforms make {text}; see keeps='approximation'")

  def _find_recipe(self, base: base_lib.Base) -> recipe_lib.Recipe | None:
    """Returns the model as products with the base; None if it is no slice of it."""
    # The transforms would choose other coordinates, and are left out with a recipe.
    preset, is_exact = self.preset, self.preset.keeps == 'bits'
    takes = preset.resumable and (is_exact or preset.name == 'free')
    if takes and (config := self.source.config) and config.is_sliced_from(base.config):
      recipe = recipe_lib.Recipe(self.source, base, keeps_bits=is_exact)
      if recipe.is_related:
        rounding = None if is_exact else passes.NEAREST
        self.preset = preset._replace(transform=passes.chain(), rounding=rounding)
        return recipe
    if not (is_exact and self.can_be_divided):
      text = "exact takes any, and free a sliced model's dense one"
      raise ValueError(f'the preset {preset.name!r} takes no such base: {text}')
    specs = map(self.source.specs, self.source.records)
    paths = [path for record in specs for path in structured.flatten(record)]
    if paths and not any(map(base.find, paths)):
      raise ValueError(f'{base.name}: has no {paths[0]}, nor any other array of it')
    return None

  def _count(self, name: str) -> manifest_lib.Counts:
    """Returns the elements and bytes of a record, rounded; checks its parameters."""
    dtypes = self._context.dtypes if self._context else {}
    specs = structured.flatten(self._records.specs(name))
    counts = {path: structured.count_elements(leaf) for path, leaf in specs.items()}
    nbytes = sum(counts[x] * dtypes[x].itemsize for x in specs if x in dtypes)
    nbytes += structured.count_bytes([specs[x] for x in specs if x not in dtypes])
    if self._context is not None and models.names.subspace_index(name) is None:
      shapes = {path: tuple(leaf.shape) for path, leaf in specs.items()}
      models.check_shapes(self._context.config, name, shapes)
    return manifest_lib.Counts(sum(counts.values()), nbytes)

  def _dtypes(self) -> dict[str, str]:
    """Returns the dtypes of parameters that are float32 only in the file."""
    context, rounding = self._context, self.preset.rounding
    if context is None or rounding is None or not rounding.uniform:
      return {}
    others = {x: dtype for x, dtype in context.dtypes.items() if dtype != context.dtype}
    return {path: dtype.name for path, dtype in [*others.items(), ('', context.dtype)]}

  def _batches(
    self, names: Sequence[str], state: Any
  ) -> Iterator[tuple[list[passes.Record], Any]]:
    """Yields records, also others than those in `names`, and the state after them."""
    context: Any = self._context
    is_rewritten = context is not None and self._recipe is None
    rewritten = [x for x in names if is_rewritten and x != models.names.BUFFERS]
    if rewritten:
      layers = [i for x in rewritten if (i := models.names.layer_index(x)) is not None]
      end = context.config.num_layers
      for batch, reached in passes.rewrite(
        context,
        self.preset.transform,
        rounding=self.preset.rounding,
        layers=range(layers[0], layers[-1] + 1) if layers else range(end, end),
        state=state,
        outer=len(layers) < len(rewritten),
      ):
        state = reached
        yield batch, state
    for name in names[len(rewritten) :]:  # buffers are the last record
      unchanged = frozenset[str]()
      params, rounding = self._records.read(name), self.preset.rounding
      if self._recipe is not None:
        params = jax.device_get(params)  # which sorts keys, as those of other records
      elif self._context is None and rounding is not None:
        flat: dict[str, Any] = {path: {} for path in structured.empty_dicts(params)}
        for path, leaf in structured.flatten(params).items():
          flat[path] = prices.rounded(rounding, path, leaf)
        unchanged = frozenset(structured.flatten(params))
        params = structured.unflatten(flat)
      yield [passes.Record(name, params, [], unchanged)], state

  def _write_records(
    self,
    streams: container.StreamWriter,
    names: Sequence[str],
    bar: progress_lib.Progress,
    state: Any,
  ) -> tuple[list[manifest_lib.RecordEntry], Any]:
    """Writes records while the next ones are rewritten; see `write` for the state."""
    entries: list[manifest_lib.RecordEntry] = []
    ahead = collections.deque[list[futures.Future[Any]]]()
    synced = list[futures.Future[None]]()

    def append() -> None:
      bar.stage('encoding')
      for job in ahead.popleft():
        entry, pieces, is_same = job.result()
        self._is_same = self._is_same and is_same
        _, crc32 = streams.append(entry.name, *pieces)
        entries.append(msgspec.structs.replace(entry, crc32=crc32))
        bar.update(entry.input.bytes)
      if all(x.done() for x in synced):  # the disk has time for more
        synced.append(start(streams.sync))

    with pool.started() as start:
      for batch, reached in self._batches(names, state):
        state, resolve, jobs = reached, self._resolver(batch), []
        size = self.nbytes([x.name for x in batch if x.name in names])
        is_alone = not (passes.is_rotated(state) or any(map(_needs_others, batch)))
        while batch:
          record = batch.pop(0)  # its memory is freed when it is coded
          if record.name in names:
            encode = functools.partial(self.encode_record, record, resolve)
            jobs.append(start(functools.partial(encode, is_alone=is_alone)))
          del record
        ahead.append(jobs)
        while len(ahead) > (0 if size >= memory.LARGE else 1):
          append()
      while ahead:
        append()
      for future in synced:
        future.result()
    return entries, state

  def encode_record(
    self, record: passes.Record, resolve: Callable[[str], Any], *, is_alone: bool
  ) -> '_Encoded':
    """Encodes a record.

    Args:
      record: The rewritten record.
      resolve: Returns the array of a parameter that a leaf needs, by its path.
      is_alone: Whether no other record needs this one or shares its coordinates.
    """
    if is_alone:
      return self._encode_smaller(record, resolve)
    return self._encode_rewritten(record, resolve)

  def _encode_smaller(
    self, record: passes.Record, resolve: Callable[[str], Any]
  ) -> '_Encoded':
    """Encodes a record that no other one needs, as `exact` does if that is smaller.

    Bits are kept, too, if the estimates of the sizes are too close to tell.
    """
    if not self._may_keep_bits:
      return self._encode_rewritten(record, resolve)
    record = self._with_kept(record)
    leaves, originals = structured.flatten(record.params), self._original(record.name)
    if structured.same_bits(originals, {x: _decoded(y) for x, y in leaves.items()}):
      return self._encode(record, resolve, is_same=self.source.stored_as is None)
    with pool.PLANS:
      _find_codes(originals, {})
      exact, rewritten = (
        coder.estimate([y for x in several.values() for y in _arrays_of(x)])
        for several in (originals, leaves)
      )
    if rewritten < prices.NEARLY * exact:
      return self._encode(record, resolve, is_same=False)
    params = _nested(originals, record)
    original = passes.Record(record.name, params, [passes.Saving(KEPT, 0, 0)])
    return self._encode(original, resolve, is_same=self.source.stored_as is None)

  def _encode_rewritten(
    self, record: passes.Record, resolve: Callable[[str], Any]
  ) -> '_Encoded':
    """Encodes a record that others need, or whose coordinates others share."""
    record = self._with_kept(record)
    return self._encode(record, resolve, is_same=self._has_bits_of_source(record))

  def _with_kept(self, record: passes.Record) -> passes.Record:
    """Returns a record in which arrays that were only rounded may keep their bits."""
    if self._is_exact:
      return record._replace(savings=[*record.savings, passes.Saving(KEPT, 0, 0)])
    leaves = structured.flatten(record.params)
    kept = self._kept(record.unchanged, leaves) if self._may_keep_bits else {}
    if not kept:
      return record
    notes: list[dict[str, Any]] = [{'tensor': path} for path in kept]
    return record._replace(
      params=_nested(leaves | kept, record),
      savings=[*record.savings, passes.Saving(KEPT, 0, 0, tuple(notes))],
    )

  def _kept(self, paths: Iterable[str], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays, or their codes, that are smaller than they are rounded."""
    rounding, originals = self.preset.rounding, dict[str, Any]()
    kept: dict[str, Any] = {}
    matrices = [
      path
      for path in sorted(paths)
      if len(leaves[path].shape) > 1
      and jnp.issubdtype(leaves[path].dtype, jnp.floating)
    ]
    if rounding is None:
      return kept
    for path in matrices:
      originals = originals or self._original(path.partition('/')[0])
      array = originals[path]
      if not (prices.is_patterned(array) or rounding.is_finer_than(array.dtype)):
        continue
      with pool.PLANS:
        codes = quantisers.find(array)
        nbytes = prices.array_bytes(path, array, None)
        if nbytes < coder.estimate(_arrays_of(leaves[path])):
          kept[path] = array if codes is None else codes
    return kept

  def _original(self, name: str) -> dict[str, Any]:
    """Returns the leaves of a record, with the dtypes in which they are stored."""
    leaves = structured.flatten(jax.device_get(self.source.read(name)))
    if self._context is None or self.source.stored_as is None:
      return leaves
    dtypes = self._context.dtypes
    return {x: structured.astype(y, dtypes.get(x, y.dtype)) for x, y in leaves.items()}

  def _has_bits_of_source(self, record: passes.Record) -> bool:
    """Returns whether all bits are the source's, unless another record's are not."""
    if not self._is_same:
      return False
    leaves = structured.flatten(record.params)
    return all(
      structured.same_bits(leaf, _decoded(leaves.get(path)))
      for path, leaf in structured.flatten(self.source.read(record.name)).items()
    )

  def _encode(
    self, record: passes.Record, resolve: Callable[[str], Any], *, is_same: bool
  ) -> '_Encoded':
    """Encodes a record as it is; the entry lacks the checksum of the stream."""
    leaves: list[manifest_lib.Leaf] = []
    arrays: list[np.ndarray] = []
    known: dict[int, plans.Known] = {}
    params, base = structured.flatten(record.params), self._recipe or self.base
    with pool.PLANS:
      beside = {} if base is None else base.beside(params, resolve)
      if self.preset.rounding is None:
        _find_codes(params, beside)
    savings = record.savings + ([] if base is None else [_saving(params, beside)])
    for path, leaf in params.items():
      try:
        entry, stored, near = _stored(path, leaf, beside.get(path), resolve)
        schema.load(manifest_lib.Leaf, schema.dump(entry))
        schema.load(schema.Path, path).encode()  # text of files is UTF-8
      # A leaf that is stacked, or should be, raises any of these.
      except (*manifest_lib.UNTRUSTED, ValueError) as error:
        raise ValueError(f'{path}: it cannot be stored: {error}') from error
      if near is not None:
        known[len(arrays) + entry.arrays.index('elements')] = near
      leaves.append(entry)
      arrays += map(np.asarray, stored)
    encoded = coders.CODERS[self.preset.coder].encode(arrays, known)
    for i, leaf in enumerate(leaves):
      if measured := beside.get(leaf.path):  # others have summed most arrays by now
        crc32, of_known = measured.crc32(), measured.of_known
        base_array = leaf.base and msgspec.structs.replace(leaf.base, crc32=of_known())
        leaves[i] = msgspec.structs.replace(leaf, crc32=crc32, base=base_array)
    entry_of_record = manifest_lib.RecordEntry(
      name=record.name,
      nbytes=encoded.spec.nbytes,
      crc32=0,
      leaves=tuple(leaves),
      coder=self.preset.coder,
      spec=schema.dump(encoded.spec),
      input=self.counts[record.name],
      savings=tuple(savings),
      empty=tuple(structured.empty_dicts(record.params)),
    )
    return _Encoded(entry_of_record, encoded.pieces, is_same)

  def _resolver(self, batch: Sequence[passes.Record]) -> Callable[[str], Any]:
    """Returns the function that finds the parameters that leaves of a batch need."""
    flat: dict[str, Any] = {}
    for record in batch:
      flat |= structured.flatten(record.params)
    needs = {x for leaf in flat.values() for x in getattr(leaf, 'needs', ())}
    needed = {path: leaf for path, leaf in flat.items() if path in needs}

    def resolve(path: str) -> Any:
      leaves, name = needed, path.partition('/')[0]
      if path not in needed and name in self.source.records:
        leaves = structured.flatten(self.source.read(name))
      if path not in leaves:
        raise ValueError(f'the leaf needs {path}, which is missing')
      return structured.materialize(leaves[path])

    return resolve

  def _write_message(
    self, streams: container.StreamWriter, bar: progress_lib.Progress
  ) -> manifest_lib.MessageEntry:
    """Writes the whole model as one message."""
    options = schema.load(paper.Options, self.preset.options, 'options')
    encoded = paper.encode(self._records, options, progress=not bar.disable)
    names = [name for name in self.counts if name != models.names.BUFFERS]
    elements, nbytes = sum(self.counts[x].elements for x in names), self.nbytes(names)
    bar.update(nbytes)
    return manifest_lib.MessageEntry(
      streams={
        name: manifest_lib.Stream(*streams.append(name, words))
        for name, words in encoded.streams.items()
      },
      layout=encoded.layout,
      input=manifest_lib.Counts(elements, nbytes),
      savings=(encoded.saving,),
    )


class _Encoded(NamedTuple):
  """An encoded record."""

  entry: manifest_lib.RecordEntry
  pieces: list[np.ndarray]  # the stream
  is_same: bool  # whether it is known that all bits are those of the source


def _needs_others(record: passes.Record) -> bool:
  """Returns whether leaves of a record are computed from other records."""
  leaves = structured.flatten(record.params).values()
  return any(getattr(leaf, 'needs', ()) for leaf in leaves)


def _decoded(leaf: Any) -> Any:
  """Returns the array of codes; other leaves as they are."""
  return leaf.materialize() if isinstance(leaf, quantisers.BlockQuantized) else leaf


def _arrays_of(leaf: Any) -> list[np.ndarray]:
  """Returns the arrays that stand for an array or a leaf in a file."""
  return [np.asarray(x) for x in prices.stored(leaf)[1].values()]


def _nested(leaves: dict[str, Any], record: passes.Record) -> Any:
  """Returns leaves by path as nested dicts, with the empty dicts of a record."""
  empty: Any = {path: {} for path in structured.empty_dicts(record.params)}
  return structured.unflatten(leaves | empty)


def _write_files(
  streams: container.StreamWriter, prefix: str, contents: Mapping[str, Any]
) -> dict[str, manifest_lib.Deflated]:
  """Writes files as zlib streams whose names have a prefix."""
  deflated = {}
  for name, value in contents.items():
    data = value() if callable(value) else value
    packed = np.frombuffer(zlib_ng.compress(data, 7), np.uint8)
    written = streams.append(f'{prefix}{name}', packed)
    deflated[name] = manifest_lib.Deflated(*written, size=len(data))
  return deflated


def _write_copies(
  streams: container.StreamWriter, copies: Mapping[str, files_lib.File]
) -> dict[str, manifest_lib.Copied]:
  """Writes files as zlib streams, a piece at a time."""
  copied = {}
  for name, file in copies.items():
    stream = f'{manifest_lib.COPIES}{name}'
    nbytes, crc32 = streams.append_all(stream, _deflated(file))
    copied[name] = manifest_lib.Copied(nbytes, crc32, size=file.size)
  return copied


def _deflated(file: files_lib.File) -> Iterator[bytes]:
  """Yields pieces of the compressed content of a file."""
  packer = zlib_ng.compressobj(_COPY_LEVEL)
  for start in range(0, file.size, _COPY_PIECE):
    piece = np.empty(min(_COPY_PIECE, file.size - start), np.uint8)
    file.read(start, piece)
    yield packer.compress(piece)
  yield packer.flush()


def _find_codes(params: dict[str, Any], beside: dict[str, measure.Measured]) -> None:
  """Replaces arrays that were quantised before by their codes, if these are smaller."""
  for path, leaf in params.items():
    measured = beside.get(path)
    if measured is not None and measured.near is None:
      continue  # few elements differ from the base
    codes = quantisers.find(leaf)
    if codes is not None and (
      measured is None or measured.estimate() >= quantisers.nbytes(codes)
    ):
      params[path] = codes
      beside.pop(path, None)


def _stored(
  path: str, leaf: Any, beside: measure.Measured | None, resolve: Callable[[str], Any]
) -> tuple[manifest_lib.Leaf, list[np.ndarray], plans.Known | None]:
  """Returns the entry of a parameter, its arrays, and the known numbers of elements."""
  known = crc32 = near = None
  if beside is not None:
    (leaf, near, known, *_), crc32 = beside, 0  # which follows
  elif structured.is_structured(leaf):
    if not structured.same_bits(type(leaf).from_stored(*leaf.stored()), leaf):
      raise ValueError(f'leaf type {leaf.type_name!r} cannot store all of this value')
    if isinstance(leaf, difference.Difference):
      leaf, near, known, sum, _ = measure.of_leaf(leaf, *map(resolve, leaf.needs))
      crc32 = sum()
    elif leaf.is_in_files:
      array = leaf.materialize(*map(resolve, leaf.needs))
      crc32 = checksums.of_array(jax.device_get(array))
  type_name, shape, dtype, stack_key = structured.stack_key(leaf)
  settings, arrays = prices.stored(leaf)
  if not type_name:
    entry = manifest_lib.Leaf(path=path, shape=shape, dtype=dtype)
    return entry, [*arrays.values()], None
  entry = manifest_lib.Leaf(
    path=path,
    shape=shape,
    dtype=dtype,
    type_name=type_name,
    stack_key=stack_key,
    settings=settings,
    arrays=tuple(arrays),
    needs=leaf.needs,
    base=known if isinstance(known, entries_lib.BaseArray) else None,
    product=known if isinstance(known, products.Product) else None,
    crc32=crc32,
  )
  return entry, [*arrays.values()], near


def _saving(
  params: Mapping[str, Any], beside: Mapping[str, measure.Measured]
) -> passes.Saving:
  """Returns the saving of the base before anything is coded."""
  arrays = [params[path] for path in beside]
  leaves: list[Any] = [x.leaf for x in beside.values()]
  is_basis = lambda path: models.names.subspace_index(path) is not None
  leaves += [x for path, x in params.items() if is_basis(path)]
  count, size = structured.count_elements, structured.count_bytes
  elements, nbytes = count(arrays) - count(leaves), size(arrays) - size(leaves)
  return passes.Saving(RELATIVE, elements, nbytes, ())

"""The writer of one file: codes records, and appends them to a container."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import json
from typing import Any, BinaryIO

import jax
import msgspec
import numpy as np
from zlib_ng import zlib_ng

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.coding import known as known_lib
from rotbits_jax.file import coders
from rotbits_jax.file import container
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.relative import base as base_lib
from rotbits_jax.relative import entries
from rotbits_jax.relative import measure
from rotbits_jax.relative import products
from rotbits_jax.relative import recipe as recipe_lib
from rotbits_jax.system import checksums
from rotbits_jax.system import host
from rotbits_jax.system import schema

Resolve = Callable[[str], Any]
"""Takes the path of a parameter; returns its array."""

EncodedRecord = tuple[manifest_lib.RecordEntry, np.ndarray]
"""A record's entry in the manifest, without the checksum of its stream; the stream."""

BESIDE = 'beside a base'
"""The name of the saving of a base."""


def check_names(
  streams: Iterable[str],
  files: Mapping[str, bytes],
  headers: Mapping[str, bytes],
  stem: str | None,
) -> None:
  """Checks the content of a container besides records, before the work.

  Args:
    streams: names of the streams of records, or of a message.
    files: bytes of the other files, by name.
    headers: bytes before the tensors of weights files, by name.
    stem: see `manifest.Manifest`.

  Raises:
    ValueError: if a name is not that of a file in a folder, if two streams would have
      one name, or if the files are too large.
  """
  if stem is not None and not schema.is_file_name(stem):
    raise ValueError(f'{stem!r} is not the name of a file')
  for name in (*files, *headers):
    if not schema.is_relative_path(name):
      raise ValueError(f'{name!r} is not the name of a file in a folder')
  container.check_names([*streams, *_other_streams(files, headers)])
  for contents in (files, headers):
    if sum(map(len, contents.values())) > manifest_lib.MOST_FILES:
      raise ValueError(
        f'the files beside the weights have more than {manifest_lib.MOST_FILES} bytes'
      )


def _other_streams(files: Iterable[str], headers: Iterable[str]) -> list[str]:
  """Returns the names of the streams that are not those of records."""
  return [
    *(f'{manifest_lib.FILES}{name}' for name in files),
    *(f'{manifest_lib.HEADERS}{name}' for name in headers),
  ]


class FileWriter:
  """Writes one container: a whole model, or a shard of one."""

  def __init__(
    self,
    file: BinaryIO,
    streams: Sequence[str],
    *,
    files: Mapping[str, bytes],
    headers: Mapping[str, bytes],
    **facts: Any,
  ):
    """Reserves room for the header.

    Args:
      file: empty, open for writing.
      streams: names of the records that will come, in order, or of the streams of a
        message.
      files: bytes of the other files, by name, which the container keeps.
      headers: bytes before the tensors of weights files, by name.
      facts: the fields of `manifest.Manifest` that all shards share.
    """
    names = [*streams, *_other_streams(files, headers)]
    self._streams = container.StreamWriter(file, names)
    self._file, self._facts = file, facts
    self._files, self._headers = files, headers
    self._records: list[manifest_lib.RecordEntry] = []
    self._message: manifest_lib.MessageEntry | None = None

  def add(self, entry: manifest_lib.RecordEntry, data: np.ndarray) -> None:
    """Appends a record that `encode_record` coded."""
    stream = self._append(entry.name, data)
    self._records.append(msgspec.structs.replace(entry, crc32=stream.crc32))

  def add_message(self, streams: Mapping[str, np.ndarray], **facts: Any) -> None:
    """Writes a whole model as one message.

    Args:
      streams: the streams by name.
      facts: the other fields of `manifest.MessageEntry`.
    """
    entries = {name: self._append(name, words) for name, words in streams.items()}
    self._message = manifest_lib.MessageEntry(streams=entries, **facts)

  def finish(self) -> None:
    """Appends the other files, the headers and the manifest, and writes the header.

    Raises:
      ValueError: if a reader would refuse the manifest.
    """
    try:
      manifest = manifest_lib.Manifest(
        **self._facts,
        records=tuple(self._records),
        message=self._message,
        files=self._deflated(manifest_lib.FILES, self._files),
        headers=self._deflated(manifest_lib.HEADERS, self._headers),
      )
      data = manifest.to_bytes()
      manifest_lib.Manifest.from_bytes(data)
    except ValueError as error:
      raise ValueError(f'the model cannot be stored: {error}') from error
    self._streams.finish(data)
    self._file.flush()

  def _append(self, name: str, data: Any) -> manifest_lib.Stream:
    """Writes a stream."""
    nbytes, crc32 = self._streams.append(name, data)
    return manifest_lib.Stream(nbytes=nbytes, crc32=crc32)

  def _deflated(
    self, prefix: str, contents: Mapping[str, bytes]
  ) -> dict[str, manifest_lib.Deflated]:
    """Writes files as zlib streams, whose names begin with a prefix."""
    entries = {}
    for name, data in contents.items():
      packed = np.frombuffer(zlib_ng.compress(data, 7), np.uint8)
      nbytes, crc32 = self._streams.append(f'{prefix}{name}', packed)
      entries[name] = manifest_lib.Deflated(nbytes=nbytes, crc32=crc32, size=len(data))
    return entries


def encode_record(
  record: passes.Record,
  counts: manifest_lib.Counts,
  resolve: Resolve,
  coder_name: str,
  base: base_lib.Base | recipe_lib.Recipe | None = None,
) -> EncodedRecord:
  """Codes a record.

  Args:
    record: the record.
    counts: elements and bytes of the record before it was rewritten.
    resolve: returns the parameters that leaves of the record need.
    coder_name: name of the coder.
    base: the base beside which arrays may be stored; None for none.

  Raises:
    ValueError: if a reader would refuse a parameter. It names the parameter.
  """
  leaves: list[manifest_lib.Leaf] = []
  arrays: list[np.ndarray] = []
  known: dict[int, known_lib.Known] = {}
  params = structured.flatten(record.params)
  beside = {} if base is None else base.beside(params, resolve)
  savings = [manifest_lib.SavingEntry(**x._asdict()) for x in record.savings]
  if base is not None:
    savings.append(_saving(params, beside))
  for path, leaf in params.items():
    if path in beside:
      measured, known_array, crc32 = beside[path]
      content = measured.leaf.stored()
      entry, parts = _entry_of_leaf(path, measured.leaf, content, crc32, known_array)
      classes = measured.known
    else:
      entry, parts, classes = entry_of(path, leaf, resolve)
    if classes is not None:
      known[len(arrays) + entry.arrays.index('differences')] = classes
    leaves.append(entry)
    arrays += map(host.contiguous, parts)
  coder = coders.find(coder_name)
  if coder is None:
    raise ValueError(f'there is no coder of records of the name {coder_name!r}')
  try:
    encoded = coder.encode(arrays, known)
    entry_of_record = manifest_lib.RecordEntry(
      name=record.name,
      nbytes=encoded.spec.nbytes,
      crc32=0,
      leaves=tuple(leaves),
      coder=coder_name,
      spec=schema.dump(encoded.spec),
      input=counts,
      savings=tuple(savings),
      empty=tuple(structured.empty_dicts(record.params)),
    )
    text = json.dumps(schema.dump(entry_of_record), allow_nan=False)
    schema.load(manifest_lib.RecordEntry, schema.parse(text), record.name)
  except ValueError as error:
    raise ValueError(f'{record.name}: it cannot be stored: {error}') from error
  return entry_of_record, encoded.data


def entry_of(
  path: str, leaf: Any, resolve: Resolve
) -> tuple[manifest_lib.Leaf, list[np.ndarray], known_lib.Known | None]:
  """Makes the entry of a parameter in the manifest.

  Args:
    path: path of the parameter.
    leaf: the parameter.
    resolve: returns the parameters that it needs.

  Returns:
    The entry, the arrays as which the parameter is stored, and what a decoder knows of
    the differences among them.

  Raises:
    ValueError: if it would not come back as it is. It names the parameter.
  """
  try:
    type_name, shape, dtype, _ = structured.stack_key(leaf)
    if not type_name:
      stored = np.asarray(leaf).view(entries.stored_dtype(dtype))
      return manifest_lib.Leaf(path=path, shape=shape, dtype=dtype), [stored], None
    settings, arrays = leaf.stored()
    if not structured.same_bits(type(leaf).from_stored(settings, arrays), leaf):
      raise ValueError(f'a leaf of type {type_name!r} cannot store all of this value')
    crc32 = classes = None
    if leaf.origin.is_in_files:
      needed = list(map(resolve, leaf.needs))
      array = leaf.materialize(*needed)
      crc32 = checksums.of_array(jax.device_get(array))
      if leaf.origin is structured.Origin.KNOWN:
        classes = measure.measured(leaf, *needed).known
    return *_entry_of_leaf(path, leaf, (settings, arrays), crc32), classes
  # A leaf that is stacked, or should be, raises any of these.
  except (*manifest_lib.UNTRUSTED, ValueError) as error:
    raise ValueError(f'{path}: it cannot be stored: {error}') from error


def _entry_of_leaf(
  path: str,
  leaf: structured.Structured,
  stored: tuple[dict[str, Any], dict[str, np.ndarray]],
  crc32: int | None,
  base: entries.BaseArray | products.Product | None = None,
) -> tuple[manifest_lib.Leaf, list[np.ndarray]]:
  """Makes the entry of a structured leaf.

  Args:
    path: path of the parameter.
    leaf: the leaf.
    stored: its settings and arrays, see `Structured.stored`.
    crc32: see `manifest.Leaf`.
    base: see `base` and `product` of `leaves.Leaf`.
  """
  type_name, shape, dtype, stack_key = structured.stack_key(leaf)
  settings, arrays = stored
  entry = manifest_lib.Leaf(
    path=path,
    shape=shape,
    dtype=dtype,
    type_name=type_name,
    stack_key=stack_key,
    settings=settings,
    arrays=tuple(arrays),
    needs=leaf.needs,
    base=base if isinstance(base, entries.BaseArray) else None,
    product=base if isinstance(base, products.Product) else None,
    crc32=crc32,
  )
  return entry, [np.asarray(array) for array in arrays.values()]


def _saving(
  params: Mapping[str, Any], beside: Mapping[str, base_lib.Beside]
) -> manifest_lib.SavingEntry:
  """Returns the saving of the base before anything is coded."""
  arrays = [params[path] for path in beside]
  leaves: list[Any] = [x.measured.leaf for x in beside.values()]
  is_basis = lambda path: models.names.subspace_index(path) is not None
  leaves += [x for path, x in params.items() if is_basis(path)]
  count, size = structured.count_elements, structured.count_bytes
  return manifest_lib.SavingEntry(
    name=BESIDE,
    elements=count(arrays) - count(leaves),
    bytes=size(arrays) - size(leaves),
    notes=(),
  )

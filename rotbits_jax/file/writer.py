"""The writer of one file: codes records, and appends them to a container."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import jax
import msgspec
import numpy as np
from zlib_ng import zlib_ng

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.file import coders
from rotbits_jax.file import container
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.relative import base as base_lib
from rotbits_jax.relative import entries
from rotbits_jax.relative import measure
from rotbits_jax.relative import products
from rotbits_jax.relative import recipe as recipe_lib
from rotbits_jax.structured import difference
from rotbits_jax.system import checksums
from rotbits_jax.system import host
from rotbits_jax.system import schema

Resolve = Callable[[str], Any]
"""Takes the path of a parameter; returns its array."""

EncodedRecord = tuple[manifest_lib.RecordEntry, np.ndarray]
"""A record's entry in the manifest, without the checksum of its stream; the stream."""

BESIDE = 'beside a base'
"""The name of the saving of a base."""


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
    """Reserves room for the header of an empty file.

    The streams are those of records that will come, or of a message. `facts` are the
    fields of the manifest that all shards share.
    """
    others = [f'{manifest_lib.FILES}{name}' for name in files]
    others += [f'{manifest_lib.HEADERS}{name}' for name in headers]
    self._streams = container.StreamWriter(file, [*streams, *others])
    self._file, self._facts = file, facts
    self._files, self._headers = files, headers
    self._records: list[manifest_lib.RecordEntry] = []
    self._message: manifest_lib.MessageEntry | None = None

  def add(self, entry: manifest_lib.RecordEntry, data: np.ndarray) -> None:
    """Appends a record that `encode_record` coded."""
    _, crc32 = self._streams.append(entry.name, data)
    self._records.append(msgspec.structs.replace(entry, crc32=crc32))

  def add_message(self, streams: Mapping[str, np.ndarray], **facts: Any) -> None:
    """Writes a whole model as one message; `facts` are fields of its entry."""
    written = {
      name: manifest_lib.Stream(*self._streams.append(name, words))
      for name, words in streams.items()
    }
    self._message = manifest_lib.MessageEntry(streams=written, **facts)

  def finish(self) -> None:
    """Appends the other files, the headers and the manifest, and writes the header.

    A ValueError says that a reader would refuse the manifest.
    """
    try:
      data = manifest_lib.Manifest(
        **self._facts,
        records=tuple(self._records),
        message=self._message,
        files=self._deflated(manifest_lib.FILES, self._files),
        headers=self._deflated(manifest_lib.HEADERS, self._headers),
      ).to_bytes()
    except ValueError as error:
      raise ValueError(f'the model cannot be stored: {error}') from error
    self._streams.finish(data)
    self._file.flush()

  def _deflated(
    self, prefix: str, contents: Mapping[str, bytes]
  ) -> dict[str, manifest_lib.Deflated]:
    """Writes files as zlib streams, whose names begin with a prefix."""
    written = {}
    for name, data in contents.items():
      packed = np.frombuffer(zlib_ng.compress(data, 7), np.uint8)
      stream = self._streams.append(f'{prefix}{name}', packed)
      written[name] = manifest_lib.Deflated(*stream, size=len(data))
    return written


def encode_record(
  record: passes.Record,
  counts: manifest_lib.Counts,
  resolve: Resolve,
  coder_name: str,
  base: base_lib.Base | recipe_lib.Recipe | None = None,
) -> EncodedRecord:
  """Codes a record, which had these counts before it was rewritten.

  A ValueError names a parameter that cannot be stored.
  """
  leaves: list[manifest_lib.Leaf] = []
  arrays: list[np.ndarray] = []
  known: dict[int, np.ndarray] = {}
  params = structured.flatten(record.params)
  beside = {} if base is None else base.beside(params, resolve)
  savings = [manifest_lib.SavingEntry(*x) for x in record.savings]
  if base is not None:
    savings.append(_saving(params, beside))
  for path, leaf in params.items():
    known_array = crc32 = classes = None
    try:
      if path in beside:
        measured, known_array, crc32 = beside[path]
        leaf, classes = measured.leaf, measured.classes
      elif structured.is_structured(leaf):
        crc32, classes = _checked(leaf, resolve)
      entry, stored = _entry_of(path, leaf, known_array, crc32)
    # A leaf that is stacked, or should be, raises any of these.
    except (*manifest_lib.UNTRUSTED, ValueError) as error:
      raise ValueError(f'{path}: it cannot be stored: {error}') from error
    if classes is not None:
      known[len(arrays) + entry.arrays.index('differences')] = classes
    leaves.append(entry)
    arrays += [host.contiguous(np.asarray(array)) for array in stored]
  try:
    encoded = coders.find(coder_name).encode(arrays, known)
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
  except ValueError as error:
    raise ValueError(f'{record.name}: it cannot be stored: {error}') from error
  return entry_of_record, encoded.data


def _checked(
  leaf: structured.Structured, resolve: Resolve
) -> tuple[int | None, np.ndarray | None]:
  """Checks that a leaf comes back; returns the checksum of its array, and its classes.

  These are None for leaves that stay in the model, and for arrays of no differences.
  """
  if not structured.same_bits(type(leaf).from_stored(*leaf.stored()), leaf):
    raise ValueError(
      f'a leaf of type {leaf.type_name!r} cannot store all of this value'
    )
  if not leaf.origin.is_in_files:
    return None, None
  needed = list(map(resolve, leaf.needs))
  crc32 = checksums.of_array(jax.device_get(leaf.materialize(*needed)))
  if not isinstance(leaf, difference.Difference):
    return crc32, None
  return crc32, measure.measured(leaf, *needed).classes


def _entry_of(
  path: str,
  leaf: Any,
  known: entries.BaseArray | products.Product | None,
  crc32: int | None,
) -> tuple[manifest_lib.Leaf, list[np.ndarray]]:
  """Returns the entry of a parameter in the manifest, and the arrays that store it."""
  type_name, shape, dtype, stack_key = structured.stack_key(leaf)
  if not type_name:
    stored = np.asarray(leaf).view(entries.stored_dtype(dtype))
    return manifest_lib.Leaf(path=path, shape=shape, dtype=dtype), [stored]
  settings, arrays = leaf.stored()
  entry = manifest_lib.Leaf(
    path=path,
    shape=shape,
    dtype=dtype,
    type_name=type_name,
    stack_key=stack_key,
    settings=settings,
    arrays=tuple(arrays),
    needs=leaf.needs,
    base=known if isinstance(known, entries.BaseArray) else None,
    product=known if isinstance(known, products.Product) else None,
    crc32=crc32,
  )
  return entry, [*arrays.values()]


def _saving(
  params: Mapping[str, Any], beside: Mapping[str, base_lib.Beside]
) -> manifest_lib.SavingEntry:
  """Returns the saving of the base before anything is coded."""
  arrays = [params[path] for path in beside]
  leaves: list[Any] = [x.measured.leaf for x in beside.values()]
  is_basis = lambda path: models.names.subspace_index(path) is not None
  leaves += [x for path, x in params.items() if is_basis(path)]
  count, size = structured.count_elements, structured.count_bytes
  elements, nbytes = count(arrays) - count(leaves), size(arrays) - size(leaves)
  return manifest_lib.SavingEntry(BESIDE, elements, nbytes, ())

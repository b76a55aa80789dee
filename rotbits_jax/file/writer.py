"""Codes records: their leaves become arrays, and these one stream and its entry."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.file import coders
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


def encode_record(
  record: passes.Record,
  counts: manifest_lib.Counts,
  resolve: Resolve,
  coder: str,
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
    try:
      entry, stored, classes = _stored(path, leaf, beside.get(path), resolve)
    # A leaf that is stacked, or should be, raises any of these.
    except (*manifest_lib.UNTRUSTED, ValueError) as error:
      raise ValueError(f'{path}: it cannot be stored: {error}') from error
    if classes is not None:
      known[len(arrays) + entry.arrays.index('differences')] = classes
    leaves.append(entry)
    arrays += [host.contiguous(np.asarray(array)) for array in stored]
  try:
    encoded = coders.CODERS[coder].encode(arrays, known)
    entry_of_record = manifest_lib.RecordEntry(
      name=record.name,
      nbytes=encoded.spec.nbytes,
      crc32=0,
      leaves=tuple(leaves),
      coder=coder,
      spec=schema.dump(encoded.spec),
      input=counts,
      savings=tuple(savings),
      empty=tuple(structured.empty_dicts(record.params)),
    )
  except ValueError as error:
    raise ValueError(f'{record.name}: it cannot be stored: {error}') from error
  return entry_of_record, encoded.data


def _stored(
  path: str, leaf: Any, beside: base_lib.Beside | None, resolve: Resolve
) -> tuple[manifest_lib.Leaf, list[np.ndarray], np.ndarray | None]:
  """Returns the entry of a parameter, the arrays that store it, and their classes."""
  known = crc32 = classes = None
  if beside is not None:
    measured, known, crc32 = beside
    leaf, classes = measured.leaf, measured.classes
  elif structured.is_structured(leaf):
    if not structured.same_bits(type(leaf).from_stored(*leaf.stored()), leaf):
      raise ValueError(
        f'a leaf of type {leaf.type_name!r} cannot store all of this value'
      )
    if leaf.origin.is_in_files:
      needed = list(map(resolve, leaf.needs))
      crc32 = checksums.of_array(jax.device_get(leaf.materialize(*needed)))
      if isinstance(leaf, difference.Difference):
        classes = measure.measured(leaf, *needed).classes
  type_name, shape, dtype, stack_key = structured.stack_key(leaf)
  if not type_name:
    array = np.asarray(leaf).view(entries.stored_dtype(dtype))
    return manifest_lib.Leaf(path=path, shape=shape, dtype=dtype), [array], None
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
  return entry, [*arrays.values()], classes


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

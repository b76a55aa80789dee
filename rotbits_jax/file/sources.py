"""Sources of encoding: models, opened checkpoints and PyTrees.

A source has records, which are read one at a time. Those of a model are those of
`models.names`; every key of the outermost level of a PyTree is a record.
"""

import dataclasses
import hashlib
import json
import os
from typing import Any, Protocol

import jax
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.file import trees
from rotbits_jax.system import checksums

# The bits of a byte that numbers of these dtypes use.
_USED_BITS = {'int2': 3, 'uint2': 3, 'int4': 15, 'uint4': 15}


class Source(Protocol):
  """Arrays in records: a `Model`, an opened checkpoint, or `trees.TreeRecords`."""

  @property
  def config(self) -> models.ModelConfig | None:
    """Config of the model; None for plain arrays."""

  @property
  def stored_as(self) -> str | None:
    """See `models.Model`; None if the arrays are rounded already."""

  @property
  def records(self) -> tuple[str, ...]:
    """Names of the records, in the order of the file."""

  def specs(self, record: str) -> models.Params:
    """Returns the shapes and dtypes of a record; nothing is read from disk."""

  def read(self, record: str) -> models.Params:
    """Returns the leaves of a record: nested dicts with whole paths."""


def of(value: Any) -> Source:
  """Returns the source of a model, a checkpoint (loaded or opened), or a PyTree."""
  source: Any = value.model if isinstance(value, checkpoints.Checkpoint) else value
  if isinstance(source, models.Model):
    return dataclasses.replace(
      source, params=native(source.params), buffers=native(source.buffers)
    )
  if isinstance(source, checkpoints.CheckpointReader | checkpoints.PlainFiles):
    return source
  return trees.TreeRecords(native(trees.to_dicts(source)))


def plain(source: Source, path: Any) -> Source:
  """Returns a dense checkpoint of safetensors files as tensors under their names.

  Its files come back byte for byte then. Other sources are returned as they are. `path`
  is the one at which it was opened, or anything else.
  """
  if not isinstance(source, checkpoints.CheckpointReader) or source.config.sliced:
    return source
  if source.path is None or '.safetensors' not in source.path.suffixes:
    return source
  is_path = isinstance(path, str | os.PathLike)
  return checkpoints.open_plain(path if is_path else source.path)


def native(tree: Any) -> Any:
  """Returns a PyTree whose arrays have the bits that those of JAX would have.

  Their bytes are in the order of this machine, and those of short integers have zeros
  for the bits that say nothing. NumPy keeps what others have put there.
  """
  return structured.map_leaves(lambda leaf: jax.tree.map(_native_array, leaf), tree)


def _native_array(array: Any) -> Any:
  """Returns an array, see `native`."""
  if not isinstance(array, np.ndarray):
    return array
  if not array.dtype.isnative:
    return array.astype(array.dtype.newbyteorder('='))
  used = _USED_BITS.get(array.dtype.name)
  if used is None or (array.view(np.uint8) <= used).all():
    return array
  return (array.view(np.uint8) & used).view(array.dtype)


def array_of(source: Source, path: str) -> Any:
  """Returns the array of a parameter, which other parameters may need."""
  record = path.partition('/')[0]
  flat = structured.flatten(source.read(record)) if record in source.records else {}
  if path not in flat:
    raise ValueError(f'{path} is needed, but missing')
  return structured.materialize(flat[path])


def fingerprint(source: Any) -> str:
  """Returns a digest: of the state of files on disk, or of all arrays in memory."""
  if hasattr(source, 'fingerprint'):
    digest: str = source.fingerprint()
    return digest
  arrays = [
    (path, array.dtype.name, array.shape, checksums.of_array(array))
    for record in source.records
    for path, leaf in structured.flatten(source.read(record)).items()
    for array in map(np.ascontiguousarray, jax.tree.leaves(leaf))
  ]
  return hashlib.sha256(json.dumps([repr(source.config), arrays]).encode()).hexdigest()

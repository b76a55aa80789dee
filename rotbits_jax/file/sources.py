"""Sources of encoding, which are read a record at a time.

A source is a model, a checkpoint that is opened, or a PyTree. `Source` gives all of
them one face, and remembers the checksums of records.
"""

from collections.abc import Iterator, Mapping
import contextlib
import os
from typing import Any
import zlib

import jax
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.file import trees
from rotbits_jax.system import checksums

_SHORT = {'int2': 3, 'uint2': 3, 'int4': 15, 'uint4': 15}  # the bits that are used


class Source:
  """The input of encoding: records, and the files that are kept besides them.

  The records of a model are those of `models.names`. Every key of the outermost level
  of a PyTree is a record. Paths are those of the whole model.

  Attributes:
    config: config of the model; None for plain arrays.
    stored_as: see `models.Model`.
    records: names of the records, in the order of the file.
    files: bytes of the other files of a checkpoint, by name.
    stem: name of the weights and of the slicing JSON in a checkpoint of SliceGPT.
    weights: how each weights file divides, if its tensors are the records.
    reason: why a checkpoint is stored as plain tensors; None if there is no reason.
    is_on_disk: whether the source is on disk, where it may change.
    checksums: CRC-32 of each record that was read from disk, by its name.
  """

  def __init__(
    self,
    given: Any,
    files: Mapping[str, bytes] | None = None,
    stem: str | None = None,
  ):
    """Takes a source of `api.encode`.

    Args:
      given: the model, checkpoint or PyTree.
      files: see the class; None for those of the checkpoint.
      stem: see the class; None for that of the checkpoint.

    Raises:
      ValueError: if it is a path, if a leaf of a PyTree is no array or has no name, or
        if the `config.json` of a model is that of another one.
    """
    if isinstance(given, checkpoints.Checkpoint):
      files = given.files if files is None else files
      stem = given.stem if stem is None else stem
      given = given.model
    if isinstance(given, str | os.PathLike):
      raise ValueError(
        f'{os.fspath(given)}: a path is no model; encode_to_file takes one, and '
        'open_checkpoint opens one for encode'
      )
    known = models.Model, checkpoints.CheckpointReader, checkpoints.TensorFiles
    self._given: Any = given if isinstance(given, known) else trees.TreeRecords(given)
    own: Any = lambda name, default=None: getattr(self._given, name, default)
    self.config: models.ModelConfig | None = own('config')
    self.records = tuple(self._given.records)
    self.stored_as: str | None = own('stored_as')
    self.reason: str | None = own('reason')
    self.files: dict[str, bytes] = dict(own('files', {}) if files is None else files)
    self.stem: str | None = own('stem') if stem is None else stem
    if isinstance(self._given, models.Model):
      with contextlib.suppress(checkpoints.CheckpointError):  # of a family not known
        self.files = checkpoints.fitting_files(self._given, self.files, self.stem)
    self.weights: tuple[checkpoints.WeightsFile, ...] = own('weights', ())
    self.is_on_disk = hasattr(self._given, 'fingerprint')
    self.checksums: dict[str, int] = {}

  def rounded(self) -> 'Source':
    """Returns the source after its parameters are rounded to `stored_as`."""
    if self.stored_as is None:
      return self
    return Source(self._given.rounded(), self.files, self.stem)

  def specs(self, record: str) -> models.Params:
    """Returns the shapes and dtypes of a record; nothing is read from disk."""
    found: models.Params = _native(self._given.specs(record))
    return found

  def read(self, record: str) -> models.Params:
    """Returns a record: nested dicts with whole paths.

    Raises:
      CheckpointError: if it cannot be read, or differs from an earlier reading.
    """
    params: models.Params = _native(self._given.read(record))
    if self.is_on_disk:
      found = _checksum(params)
      if self.checksums.setdefault(record, found) != found:
        raise checkpoints.CheckpointError(f'{record}: it changed after it was read')
    return params

  def outer(self) -> models.Params:
    """Returns the parameters outside the layers."""
    found: models.Params = {}
    for name in self.records:
      if name != models.names.BUFFERS and models.names.layer_index(name) is None:
        found |= self.read(name)
    return found

  def resolve(self, path: str) -> Any:
    """Returns the array of a parameter, which other parameters may need.

    Raises:
      ValueError: if there is no such parameter, or if it needs others itself.
    """
    record = path.partition('/')[0]
    found = structured.flatten(self.read(record)) if record in self.records else {}
    if path not in found:
      raise ValueError(f'{path} is needed, but missing')
    return structured.materialize(found[path])

  def gaps(self, file: checkpoints.WeightsFile) -> Iterator[memoryview]:
    """Yields the bytes between the tensors of a weights file, in order."""
    yield from self._given.gaps(file)

  def fingerprint(self) -> str | None:
    """Returns a digest of everything but the elements; None for a source in memory."""
    return self._given.fingerprint() if self.is_on_disk else None

  def holds(self, checksums: Mapping[str, int]) -> bool:
    """Returns whether records have these checksums."""
    for name, checksum in checksums.items():
      if name not in self.records:
        return False
      self.read(name)
      if self.checksums[name] != checksum:
        return False
    return True


def _native(tree: Any) -> Any:
  """Returns nested dicts whose arrays have the bits that those of JAX would have.

  Their bytes are in the order of this machine, and those of short integers have zeros
  for the bits that say nothing. NumPy keeps what others have put there.
  """
  return structured.map_leaves(lambda leaf: jax.tree.map(_native_array, leaf), tree)


def _native_array(array: Any) -> Any:
  if not isinstance(array, np.ndarray):
    return array
  if not array.dtype.isnative:
    return array.astype(array.dtype.newbyteorder('='))
  largest = _SHORT.get(array.dtype.name)
  if largest is None or (array.view(np.uint8) <= largest).all():
    return array
  return (array.view(np.uint8) & largest).view(array.dtype)


def _checksum(params: models.Params) -> int:
  """Returns the CRC-32 of the paths, dtypes, shapes and elements of parameters."""
  crc = 0
  for path, leaf in structured.flatten(params).items():
    for array in map(np.asarray, jax.tree.leaves(leaf)):
      crc = zlib.crc32(f'{path} {array.dtype} {array.shape}'.encode(), crc)
      # The transpose of a transposed array needs no copy.
      bits = array.T if array.flags.f_contiguous else array
      crc = checksums.of_array(bits, crc)
  return crc

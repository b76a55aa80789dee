"""Checkpoints of any family: weights files as tensors and the gaps between them.

Tensors and gaps together give a weights file back, byte for byte, whatever model the
tensors belong to.
"""

from collections.abc import Container, Iterator, Mapping
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from rotbits_jax import structured
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import lazy
from rotbits_jax.checkpoints import staging
from rotbits_jax.checkpoints.staging import WeightsFile
from rotbits_jax.system import schema

Places = Mapping[str, tuple[int, lazy.LazyTensor]]


class TensorFiles:
  """The weights files of a checkpoint of any family, read a record at a time.

  A record is a layer: its tensors have the same number in their names, like 3 in
  'transformer.h.3.attn.weight'. So is each expert of a layer, like expert 5 in
  'model.layers.3.mlp.experts.5.up_proj.weight', because a layer may have hundreds.
  Elsewhere weight and bias of one name are a record.

  Attributes:
    path: the weights file, or the index of several; the first of those in sub-folders
      if there are no others.
    root: the folder of the checkpoint, which also has the sub-folders.
    files: the files beside the weights, byte for byte. An index is one of them.
    left_out: names of files and folders beside the weights that are not kept.
    reason: why the checkpoint is not opened as a model; None if nobody tried.
    weights: how each weights file divides.
    tensors: the tensors by name. Names in a sub-folder begin with its path.
    records: names of the records.
  """

  config = stem = stored_as = None

  def __init__(
    self,
    path: pathlib.Path,
    weights: Mapping[str, tuple[pathlib.Path, Places]],
    *,
    root: pathlib.Path,
    files: Mapping[str, bytes],
    left_out: tuple[str, ...] = (),
    reason: str | None = None,
  ):
    """Checks that names are unique and that tensors do not overlap.

    `weights` has each file by its path in the folder; and its tensors by name, with
    their offsets.

    Raises:
      CheckpointError: if a name occurs twice or cannot be a path, or if tensors
        overlap.
    """
    self.path, self.root, self.files = path, root, dict(files)
    self.left_out, self.reason = left_out, reason
    self._opened = {file: lazy.opened(at) for file, (at, _) in weights.items()}
    self.tensors: dict[str, lazy.LazyTensor] = {}
    divided = []
    for file, (_, given) in weights.items():
      places = _with_folder(file, given, self.tensors)
      if twice := self.tensors.keys() & places.keys():
        raise errors.CheckpointError(f'{file}: {min(twice)} is in another file, too')
      self.tensors |= {name: tensor for name, (_, tensor) in places.items()}
      # Tensors without elements come first where several have one offset.
      offsets = sorted((at, x.nbytes, name) for name, (at, x) in places.items())
      ordered = tuple((name, at) for at, _, name in offsets)
      divided.append(
        WeightsFile(name=file, nbytes=self._opened[file].size, places=ordered)
      )
    self.weights = tuple(divided)
    self._sizes = {name: tensor.nbytes for name, tensor in self.tensors.items()}
    try:
      for layout in self.weights:
        layout.gaps(self._sizes)
    except ValueError as e:
      raise errors.CheckpointError(f'{path}: {e}') from e
    self._records: dict[str, list[str]] = {}
    for name in self.tensors:
      if not all(name.split('/')):
        raise errors.CheckpointError(f'{path}: {name!r} cannot be the name of a tensor')
      self._records.setdefault(_record_of(name), []).append(name)
    self.records = tuple(self._records)

  @property
  def input_bytes(self) -> int:
    """Size of the weights files."""
    return sum(file.size for file in self._opened.values())

  def read(self, record: str) -> dict[str, Any]:
    """Returns the tensors of a record by name; a slash makes nested dicts.

    Raises:
      CheckpointError: if a file has changed or is damaged.
    """
    found = {name: self.tensors[name].read() for name in self._records[record]}
    return structured.unflatten(found)

  def specs(self, record: str) -> dict[str, Any]:
    """Returns the shapes and dtypes of a record, like `read`; nothing is read."""
    found = {name: self.tensors[name].spec for name in self._records[record]}
    return structured.unflatten(found)

  def gaps(self, file: WeightsFile) -> Iterator[memoryview]:
    """Yields the parts of a file that are between its tensors, in order.

    Raises:
      CheckpointError: if the file has changed.
    """
    for begin, end in file.gaps(self._sizes):
      yield memoryview(lazy.read(self._opened[file.name], begin, end - begin))

  def fingerprint(self) -> str:
    """Returns a digest of the files as they were when they were opened."""
    summary = [
      [(file.path.name, file.size, file.modified) for file in self._opened.values()],
      schema.dump(self.weights),
      {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()},
    ]
    return hashlib.sha256(json.dumps(summary).encode()).hexdigest()


def _with_folder(file: str, places: Places, others: Container[str]) -> Places:
  """Returns the tensors of a file in a sub-folder by names that begin with its path.

  That is the path of the folder, or of the file if another one there has such names.
  """
  folder = file.rpartition('/')[0]
  if not folder:
    return places
  if any(f'{folder}/{name}' in others for name in places):
    folder = file
  return {f'{folder}/{name}': place for name, place in places.items()}


def _record_of(name: str) -> str:
  parts = name.split('.')
  numbers = [i for i, x in enumerate(parts) if x.isdecimal()]
  experts = [i for i in numbers if i and parts[i - 1] == 'experts']
  last = (*experts, *numbers, max(len(parts) - 2, 0))[0] + 1
  return '.'.join(parts[:last])


class TensorFilesWriter(staging.StagedWriter):
  """Writes weights files whose tensors come one at a time, in any order."""

  def __init__(
    self,
    directory: str | os.PathLike[str],
    weights: tuple[staging.WeightsFile, ...],
    *,
    sizes: Mapping[str, int],
    gaps: Mapping[str, bytes],
    files: Mapping[str, bytes],
    overwrite: bool = True,
  ):
    """Checks the names and the sizes. Nothing is written yet.

    Args:
      directory: the target directory, which is made if it does not exist.
      weights: the files to write.
      sizes: bytes of each tensor.
      gaps: the bytes between the tensors of each file, joined.
      files: the files to put beside the weights, by name.
      overwrite: whether files that exist may be replaced.

    Raises:
      CheckpointError: if a name is not that of a file.
      ValueError: if the parts of a file do not make it up.
    """
    super().__init__(
      directory,
      weights=[layout.name for layout in weights],
      tensors=[name for layout in weights for name, _ in layout.places],
      files=files,
      overwrite=overwrite,
    )
    self._gaps = gaps
    self._layouts = {layout: layout.gaps(sizes) for layout in weights}
    for layout, parts in self._layouts.items():
      if sum(end - begin for begin, end in parts) != len(gaps[layout.name]):
        raise ValueError(
          f'{layout.name}: the bytes between the tensors have another length'
        )

  def _open(self, folder: pathlib.Path) -> staging.TensorWriter:
    writer = staging.PlacedWriter(folder)
    for layout, parts in self._layouts.items():
      writer.make(layout, parts, self._gaps[layout.name])
    return writer

  def add(self, name: str, tensor: np.ndarray) -> None:
    """Writes a tensor."""
    self._add(name, [tensor])

"""Safetensors files of any model: tensors under their names, and the files' headers.

Tensors follow each other without holes in a safetensors file, so its header and its
tensors give it back byte for byte, whatever model they belong to.

Raises:
  CheckpointError: if a file is damaged or has changed.
"""

from collections.abc import Mapping
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from rotbits_jax import structured
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import lazy
from rotbits_jax.checkpoints import safetensors_files
from rotbits_jax.checkpoints import staging


class PlainFiles:
  """The safetensors files of a checkpoint of any family, read a record at a time.

  A record is a layer: its tensors have the same number in their names, like 3 in
  'transformer.h.3.attn.weight'. So is each expert of a layer, like expert 5 in
  'model.layers.3.mlp.experts.5.up_proj.weight', because a layer may have hundreds.
  Elsewhere weight and bias of one name are a record.

  Attributes:
    path: the weights file, or the index of several; the first of those in sub-folders
      if there are no others.
    root: the folder of the checkpoint, which also has the sub-folders.
    headers: the bytes before the tensors of each file, by its path in the folder.
    files: the files beside the weights, byte for byte. An index is one of them.
    left_out: names of files and folders beside the weights that are not kept.
    reason: why the checkpoint is not opened as a model; None if nobody tried.
    tensors: the tensors by name. Names in a sub-folder begin with its path.
    records: names of the records.
  """

  config = stem = stored_as = None

  def __init__(
    self,
    path: pathlib.Path,
    weights: Mapping[str, pathlib.Path],
    *,
    root: pathlib.Path,
    files: Mapping[str, bytes],
    left_out: tuple[str, ...] = (),
    reason: str | None = None,
  ):
    """Reads the headers; `weights` has each file by its path in the folder."""
    self.path, self.root, self.files = path, root, dict(files)
    self.left_out, self.reason = left_out, reason
    self._opened = {name: lazy.opened(file) for name, file in weights.items()}
    self.headers = {
      name: safetensors_files.read_header(file) for name, file in self._opened.items()
    }
    sizes = {name: file.size for name, file in self._opened.items()}
    self.tensors: dict[str, lazy.LazyTensor] = {}
    for file, places in tensor_places(self.headers, sizes).items():
      for name, place in places.items():
        tensor = lazy.in_file(self._opened[file], place.offset, place.spec)
        self.tensors[name] = tensor
    self._records: dict[str, list[str]] = {}
    for name in self.tensors:
      self._records.setdefault(_record_of(name), []).append(name)
    self.records = tuple(self._records)

  @property
  def input_bytes(self) -> int:
    """Size of the weights files."""
    return sum(file.size for file in self._opened.values())

  def read(self, record: str) -> dict[str, Any]:
    """Returns the tensors of a record by name; a slash makes nested dicts."""
    flat = {name: self.tensors[name].read() for name in self._records[record]}
    return structured.unflatten(flat)

  def specs(self, record: str) -> dict[str, Any]:
    """Returns the shapes and dtypes of a record, like `read`; nothing is read."""
    flat = {name: self.tensors[name].spec for name in self._records[record]}
    return structured.unflatten(flat)

  def fingerprint(self) -> str:
    """Returns a digest of the files as they were when they were opened."""
    contents = [*self.headers.items(), *self.files.items()]
    summary = [
      [(file.path.name, file.size, file.modified) for file in self._opened.values()],
      [(name, hashlib.sha256(data).hexdigest()) for name, data in contents],
    ]
    return hashlib.sha256(json.dumps(summary).encode()).hexdigest()


def tensor_places(
  headers: Mapping[str, bytes], sizes: Mapping[str, int] | None = None
) -> dict[str, dict[str, safetensors_files.Place]]:
  """Finds the tensors of safetensors files.

  Args:
    headers: the bytes before the tensors of each file, by its path in the folder.
    sizes: the sizes of the files; None if they follow from the headers.

  Returns:
    For each file, the places of its tensors by name. Names in a sub-folder begin with
    its path, or with that of the file if another one there has such names.
  """
  seen: set[str] = set()
  found = {}
  for file, header in headers.items():
    size = None if sizes is None else sizes[file]
    places = safetensors_files.places(header, size, file)
    folder = file.rpartition('/')[0]
    if folder and any(f'{folder}/{name}' in seen for name in places):
      folder = file
    prefix = f'{folder}/' if folder else ''
    places = {f'{prefix}{name}': place for name, place in places.items()}
    for name in places:
      if not all(name.split('/')):
        raise errors.CheckpointError(f'{file}: {name!r} cannot be the name of a tensor')
      if name in seen:
        raise errors.CheckpointError(f'{file}: {name} is in another file, too')
    seen |= places.keys()
    found[file] = places
  return found


def _record_of(name: str) -> str:
  """Returns the name of the record of a tensor, see `PlainFiles`."""
  words = name.split('.')
  numbers = [i for i, x in enumerate(words) if x.isdecimal()]
  experts = [i for i in numbers if i and words[i - 1] == 'experts']
  last = (*experts, *numbers, max(len(words) - 2, 0))[0] + 1
  return '.'.join(words[:last])


class PlainWriter(staging.StagedWriter):
  """Writes safetensors files whose tensors come one at a time, in any order.

  Attributes:
    specs: the tensors that the files have, by name.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    headers: Mapping[str, bytes],
    *,
    files: Mapping[str, bytes],
    overwrite: bool = True,
  ):
    """Checks the names and the headers. Nothing is written yet.

    Args:
      directory: the target directory, which is made if it does not exist.
      headers: see `PlainFiles`.
      files: the files to put beside the weights, by name.
      overwrite: whether files that exist may be replaced.
    """
    self._headers, self._places = headers, tensor_places(headers)
    self.specs = {
      name: place.spec
      for places in self._places.values()
      for name, place in places.items()
    }
    super().__init__(
      directory,
      weights=self._places,
      tensors=self.specs,
      files=files,
      overwrite=overwrite,
    )

  def _open(self, folder: pathlib.Path) -> staging.TensorWriter:
    """Makes the weights files in a folder."""
    writer = staging.PlacedWriter(folder)
    for file, places in self._places.items():
      offsets = {name: place.offset for name, place in places.items()}
      nbytes = len(self._headers[file])
      nbytes += sum(place.spec.nbytes for place in places.values())
      layout = staging.WeightsFile(file, self._headers[file], offsets, nbytes)
      writer.make(layout)
    return writer

  def add(self, name: str, tensor: np.ndarray) -> None:
    """Writes a tensor."""
    self._add(name, [tensor])

"""Checkpoints of any family: weights files as tensors and the bytes between them.

A weights file is cut into its tensors and the rest: the header of a safetensors file,
or the directory and the pickle of a PyTorch zip. Tensors and rest together give the
file back, byte for byte, whatever model the tensors belong to.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib

import numpy as np

from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import lazy
from rotbits_jax.checkpoints import writer
from rotbits_jax.system import outputs
from rotbits_jax.system import schema

Places = Mapping[str, tuple[int, lazy.LazyTensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsFile:
  """How a weights file divides into tensors and the rest.

  Attributes:
    name: of the file.
    nbytes: its size.
    places: the name of each tensor and its offset in bytes, by rising offset.
  """

  name: schema.FileName
  nbytes: schema.Size
  places: tuple[tuple[str, schema.Size], ...]

  def rest(self, sizes: Mapping[str, int]) -> list[tuple[int, int]]:
    """Returns begin and end of each part of the file between tensors.

    Args:
      sizes: bytes of each tensor.

    Raises:
      ValueError: if tensors overlap or reach beyond the end of the file.
    """
    parts, end = [], 0
    for name, offset in (*self.places, (self.name, self.nbytes)):
      if offset < end:
        raise ValueError(f'{self.name}: tensors overlap, or the file is too short')
      parts.append((end, offset))
      end = offset + sizes.get(name, 0)
    return [(begin, end) for begin, end in parts if begin < end]


class TensorFiles:
  """The weights files of a checkpoint of any family, read a tensor at a time.

  Attributes:
    path: the weights file, or the index of several.
    files: the files beside the weights, byte for byte. An index is one of them.
    left_out: names of files and folders beside the weights that are not kept.
    reason: why the checkpoint is not opened as a model; None if nobody tried.
    weights: how each weights file divides.
    specs: shape and dtype of each tensor, by name.
  """

  def __init__(
    self,
    path: pathlib.Path,
    weights: Mapping[pathlib.Path, Places],
    *,
    files: Mapping[str, bytes],
    left_out: tuple[str, ...] = (),
    reason: str | None = None,
  ):
    """Checks that names are unique and that tensors do not overlap.

    Args:
      path: see the class.
      weights: the tensors of each file by name: offset and numbers.
      files: see the class.
      left_out: see the class.
      reason: see the class.

    Raises:
      CheckpointError: if a name occurs twice, is empty, or tensors overlap.
    """
    self.path, self.files = path, dict(files)
    self.left_out, self.reason = left_out, reason
    self._opened = {file.name: lazy.File.of(file) for file in weights}
    self.specs: dict[str, lazy.LazyTensor] = {}
    divided = []
    for file, places in weights.items():
      if twice := self.specs.keys() & places.keys():
        raise errors.CheckpointError(f'{file}: {min(twice)} is in another file, too')
      self.specs |= {name: tensor for name, (_, tensor) in places.items()}
      # Tensors without numbers come first where several have one offset.
      offsets = sorted((at, x.nbytes, name) for name, (at, x) in places.items())
      ordered = tuple((name, at) for at, _, name in offsets)
      divided.append(
        WeightsFile(name=file.name, nbytes=self._opened[file.name].size, places=ordered)
      )
    self.weights = tuple(divided)
    try:
      for layout in self.weights:
        layout.rest(self.sizes())
    except ValueError as e:
      raise errors.CheckpointError(f'{path}: {e}') from e

  def sizes(self) -> dict[str, int]:
    """Returns the bytes of each tensor by name."""
    return {name: spec.nbytes for name, spec in self.specs.items()}

  @property
  def input_bytes(self) -> int:
    """Size of the weights files."""
    return sum(file.size for file in self._opened.values())

  def groups(self) -> dict[str, list[str]]:
    """Returns the names of the tensors by what they have in common.

    A layer is a group: its tensors have the same number in their names, like 3 in
    'transformer.h.3.attn.weight'. Elsewhere weight and bias of one name are a group.
    """
    found: dict[str, list[str]] = {}
    for name in self.specs:
      parts = name.split('.')
      number = next((i for i, x in enumerate(parts) if x.isdecimal()), None)
      last = number + 1 if number is not None else max(len(parts) - 1, 1)
      found.setdefault('.'.join(parts[:last]), []).append(name)
    return found

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor, a read-only view of a memory map of its own.

    Raises:
      CheckpointError: if a file has changed or is damaged.
    """
    return self.specs[name].read()

  def rest(self, file: WeightsFile) -> Iterator[memoryview]:
    """Yields the parts of a file that are between its tensors, in order.

    Raises:
      CheckpointError: if the file has changed.
    """
    for begin, end in file.rest(self.sizes()):
      yield self._opened[file.name].map(begin, end - begin)

  def fingerprint(self) -> str:
    """Returns a digest of the files as they were when they were opened."""
    summary = [
      [(file.path.name, file.size, file.modified) for file in self._opened.values()],
      schema.dump(self.weights),
      {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()},
    ]
    return hashlib.sha256(json.dumps(summary).encode()).hexdigest()


class TensorFilesWriter:
  """Writes weights files whose tensors come one at a time, in any order.

  The class is a context manager. The files are staged as by `writer.CheckpointWriter`.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    weights: tuple[WeightsFile, ...],
    *,
    sizes: Mapping[str, int],
    rests: Mapping[str, bytes],
    files: Mapping[str, bytes],
    overwrite: bool = True,
  ):
    """Checks the names and the sizes. Nothing is written yet.

    Args:
      directory: made if it does not exist.
      weights: the files to write.
      sizes: bytes of each tensor.
      rests: what is between the tensors of each file, joined.
      files: the files to put beside the weights, by name.
      overwrite: whether files that exist may be replaced.

    Raises:
      CheckpointError: if a name is not that of a file.
      ValueError: if the parts of a file do not make it up.
    """
    self._names = [file.name for file in weights]
    writer.check_names((*files, *self._names))
    self._path, self._overwrite = directory, overwrite
    self._weights, self._files, self._rests = weights, files, rests
    self._parts = {file.name: file.rest(sizes) for file in weights}
    for name, parts in self._parts.items():
      if sum(end - begin for begin, end in parts) != len(rests[name]):
        raise ValueError(f'{name}: the bytes between the tensors have another length')
    self._places = {
      name: (file.name, offset) for file in weights for name, offset in file.places
    }

  def __enter__(self) -> 'TensorFilesWriter':
    """Makes the staging directory.

    Raises:
      OSError: if the directory cannot be written, if a file in it must not be replaced,
        or if another process writes it.
    """
    self._directory = outputs.directory_target(self._path)
    if self._directory.exists():
      for name in (*self._files, *self._names):
        outputs.check(self._directory / name, overwrite=self._overwrite)
    with contextlib.ExitStack() as stack:
      stack.enter_context(outputs.named(self._path))
      staged = outputs.fresh(writer.staging(self._directory))
      self._staging = stack.enter_context(staged)
      for name, content in self._files.items():
        (self._staging / name).write_bytes(content)
      for file in self._weights:
        rest = memoryview(self._rests[file.name])
        with (self._staging / file.name).open('wb') as target:
          target.truncate(file.nbytes)
          for begin, end in self._parts[file.name]:
            target.seek(begin)
            target.write(rest[: end - begin])
            rest = rest[end - begin :]
      self._stack = stack.pop_all()
    return self

  def add(self, name: str, tensor: np.ndarray) -> None:
    """Writes a tensor."""
    file, offset = self._places.pop(name)
    with (self._staging / file).open('r+b') as target:
      target.seek(offset)
      for piece in lazy.row_major(tensor):
        target.write(piece)

  def __exit__(self, kind: object, error: object, trace: object) -> None:
    """Moves the files into place, or removes them after an exception.

    Raises:
      ValueError: if a tensor was not written.
    """
    with self._stack:
      if kind is not None:
        return
      if self._places:
        shown = ', '.join(itertools.islice(self._places, 8))
        raise ValueError(f'{len(self._places)} tensors are missing, such as {shown}')
      writer.move(self._staging, self._directory, self._names)

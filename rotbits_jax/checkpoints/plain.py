"""Plain checkpoints: safetensors files of any model, as tensors under their names.

The tensors of a safetensors file are contiguous: one begins where the one before it
ends. So the header and the tensors give the file back, byte for byte, whatever model
they belong to.

Raises:
  CheckpointError: if a file is missing or damaged, or has changed.
"""

from collections.abc import Mapping
import hashlib
import json
import os
import pathlib
from typing import Any

from rotbits_jax import structured
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import folder as folder_lib
from rotbits_jax.checkpoints import safetensors
from rotbits_jax.checkpoints import tensors as tensors_lib


class PlainFiles:
  """The safetensors files of a checkpoint of any family, read a record at a time.

  A record is a layer: its tensors have the same number in their names, like 3 in
  'transformer.h.3.attn.weight'. So is each expert of a layer, like expert 5 in
  'model.layers.3.mlp.experts.5.up_proj.weight', because a layer may have hundreds.
  Elsewhere weight and bias of one name are a record.

  Attributes:
    config: None, because the model is not known; so are `stem` and `stored_as`.
    path: the weights file, or the index of several.
    files: the files beside the weights, byte for byte. An index is one of them.
    left_out: names of files and folders beside the weights that are not kept.
    reason: why the checkpoint is not opened as a model; None if nobody tried.
    headers: the header of each weights file by its name, see
      `safetensors.read_header`.
    tensors: the tensors by name.
    records: names of the records.
  """

  config = stem = stored_as = None

  def __init__(
    self,
    path: pathlib.Path,
    weights: list[pathlib.Path],
    *,
    files: Mapping[str, bytes],
    left_out: tuple[str, ...] = (),
    reason: str | None = None,
  ):
    """Opens the weights files, which are in one folder."""
    self.path, self.files = path, dict(files)
    self.left_out, self.reason = left_out, reason
    self._opened = [tensors_lib.opened(file) for file in weights]
    self.headers: dict[str, bytes] = {}
    self.tensors: dict[str, tensors_lib.LazyTensor] = {}
    for file in self._opened:
      header = safetensors.read_header(file)
      tensors = safetensors.open_tensors(file, header, any_dtype=True)
      if twice := self.tensors.keys() & tensors.keys():
        raise errors.CheckpointError(
          f'{file.path}: {min(twice)} is in another file, too'
        )
      self.headers[file.path.name] = header
      self.tensors |= tensors
    self._records: dict[str, list[str]] = {}
    for name in self.tensors:
      if not all(name.split('/')):
        raise errors.CheckpointError(f'{path}: {name!r} cannot be the name of a tensor')
      self._records.setdefault(_record_of(name), []).append(name)
    self.records = tuple(self._records)

  @property
  def input_bytes(self) -> int:
    """Size of the weights files."""
    return sum(file.size for file in self._opened)

  def read(self, record: str) -> dict[str, Any]:
    """Returns the tensors of a record by name; a slash makes nested dicts."""
    names = self._records[record]
    return structured.unflatten({name: self.tensors[name].read() for name in names})

  def specs(self, record: str) -> dict[str, Any]:
    """Returns the shapes and dtypes of a record, like `read`; nothing is read."""
    names = self._records[record]
    return structured.unflatten({name: self.tensors[name].spec for name in names})

  def fingerprint(self) -> str:
    """Returns a digest of the files as they were when they were opened."""
    summary = [
      [(file.path.name, file.size, file.modified) for file in self._opened],
      {name: hashlib.sha256(x).hexdigest() for name, x in self.headers.items()},
      {name: hashlib.sha256(x).hexdigest() for name, x in self.files.items()},
    ]
    return hashlib.sha256(json.dumps(summary).encode()).hexdigest()


def open_plain(
  path: str | os.PathLike[str], *, reason: str | None = None
) -> PlainFiles:
  """Opens the safetensors files of a checkpoint of any family.

  Args:
    path: a directory with `model.safetensors`, or with an index, or with one other
      safetensors file; or a weights file or an index. No `config.json` is needed.
    reason: why the checkpoint is not opened as a model, if there is a reason.

  Returns:
    The tensors, the headers, and the other files.
  """
  weights = folder_lib.find_weights(pathlib.Path(path))
  if folder_lib.is_torch(weights):
    why = '' if reason is None else f'{reason}, and '
    raise errors.UnsupportedError(
      f'{why}{weights} is not safetensors, in which any family is stored'
    )
  shards, index = [weights], {}
  if weights.suffix == '.json':
    index = {weights.name: safetensors.read_index(weights)}
    shards = list(folder_lib.shards(weights, index[weights.name]))
  files, left_out = folder_lib.read_sidecars(weights.parent, {weights, *shards}, index)
  return PlainFiles(weights, shards, files=files, left_out=left_out, reason=reason)


def _record_of(tensor: str) -> str:
  """Returns the name of the record of a tensor, see `PlainFiles`."""
  words = tensor.split('.')
  numbers = [i for i, word in enumerate(words) if word.isdecimal()]
  experts = [i for i in numbers if i and words[i - 1] == 'experts']
  last = (*experts, *numbers, max(len(words) - 2, 0))[0] + 1
  return '.'.join(words[:last])

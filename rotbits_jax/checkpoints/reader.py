"""A checkpoint on disk that is read one record at a time."""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import factors
from rotbits_jax.checkpoints import families
from rotbits_jax.checkpoints import lazy
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.checkpoints.contents import Checkpoint

_DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
_SHOWN = 8  # names listed in an error


class CheckpointReader:
  """A checkpoint whose parameters are read when they are requested.

  Opening a checkpoint reads its names, shapes, dtypes and config. A record is a layer,
  or all parameters of a key outside the layers; see `models.names`. The
  parameters of a record are in memory until the caller deletes them.

  Attributes:
    config: sizes and switches. If the given config says that the head is tied, but the
      checkpoint stores a head, this config says that it is not tied.
    records: names of the records: the layers, then those outside the layers.
    path: the weights file, or the index if there are several.
    files: bytes of the sidecar files (configs, tokenizer, license, code) beside the
      weights, by name.
    stem: file name, without suffix, that SliceGPT gave to the weights and the slicing
      JSON; None if the model is dense.
    left_out: names of files and folders beside the weights that are not kept; and the
      metadata of safetensors files, if it is not.
    elements: how many elements all tensors have.
    nbytes: how many bytes all tensors have.
  """

  def __init__(
    self,
    tensors: Mapping[str, lazy.LazyTensor],
    config: models.ModelConfig,
    *,
    path: pathlib.Path | None = None,
    weights: Iterable[pathlib.Path] = (),
    files: Mapping[str, bytes] | None = None,
    stem: str | None = None,
    left_out: tuple[str, ...] = (),
  ):
    """Matches the tensors with the parameters that a model with this config has.

    The tensors have their names in the checkpoint. The files that hold them are `path`,
    which is None for tensors in memory, and `weights`.

    Raises:
      UnsupportedError: if a tensor is missing or unknown, or has a wrong shape or
        dtype; or if a head that must be tied differs from the embedding.
    """
    self.path, self.files, self.stem = path, dict(files or {}), stem
    self.left_out = left_out
    self._weights = [lazy.opened(x) for x in (path, *weights) if x is not None]
    self._tensors = tensors
    try:
      self.config = _untied(tensors, config)
      self._entries = _match(tensors, self.config)
    except errors.CheckpointError as e:
      where = '' if path is None else f'{path}: '
      raise errors.UnsupportedError(f'{where}{e}') from e
    self._buffers = sorted(filter(families.is_buffer, tensors))
    buffers = [models.names.BUFFERS] if self._buffers else []
    self.records = (*self._entries, *buffers)
    self.elements = sum(tensor.size for tensor in tensors.values())
    self.nbytes = sum(tensor.nbytes for tensor in tensors.values())

  stored_as = None  # the parameters are rounded

  @property
  def input_bytes(self) -> int:
    """Size of the files that hold the tensors."""
    sizes = {file.path: file.size for file in self._weights}
    if self.path is not None and self.path.suffix == '.json':  # an index
      del sizes[self.path]
    return sum(sizes.values())

  def read(self, record: str) -> models.Params:
    """Reads one of `records`.

    Returns:
      Nested dicts, with the record as their only key. Leaves are NumPy arrays, or
      structured leaves where the checkpoint has factors or quantised codes. Kernels are
      `[in, out]`.

    Raises:
      CheckpointError: if a file has changed or is damaged.
    """
    if record == models.names.BUFFERS:
      return {record: {name: self._tensors[name].read() for name in self._buffers}}
    found: models.Params = {}
    for entry in self._entries[record]:
      found |= entry.read(self._tensors[name].read() for name in entry.stored())
    return structured.unflatten(found)

  def specs(self, record: str) -> models.Params:
    """Returns the shapes and dtypes of one of `records`; nothing is read.

    That is the result of `read` with a `TensorSpec` in place of each array.
    """
    if record == models.names.BUFFERS:
      return {record: {name: self._tensors[name].spec for name in self._buffers}}
    found: models.Params = {}
    for entry in self._entries[record]:
      specs = [self._tensors[name].spec for name in entry.stored()]
      if entry.factored is not None:
        found |= entry.read(specs)
      else:
        for path, shape in entry.parameters().items():
          found[path] = lazy.TensorSpec(shape, specs[0].dtype)
    return structured.unflatten(found)

  def layer(self, index: int) -> models.Params:
    """Reads the parameters of a layer, see `read`.

    Returns:
      Nested dicts with the keys of `Model.layer`.

    Raises:
      CheckpointError: if a file has changed or is damaged.
      IndexError: if there is no such layer.
    """
    if not 0 <= index < self.config.num_layers:
      raise IndexError(f'the model has {self.config.num_layers} layers, got {index=}')
    name = models.names.layer(index)
    layer: models.Params = self.read(name)[name]
    return layer

  def outer(self) -> models.Params:
    """Reads the parameters outside the layers, see `read`."""
    found: models.Params = {}
    for record in self._entries:
      if models.names.layer_index(record) is None:
        found |= self.read(record)
    return found

  @functools.cached_property
  def buffers(self) -> dict[str, np.ndarray]:
    """The tensors that the forward pass does not use, by their names."""
    return dict(self.read(models.names.BUFFERS)[models.names.BUFFERS])

  def fingerprint(self) -> str:
    """Returns a digest of the files in their state when they were opened.

    It covers the config, the bytes of the sidecar files, and the names, sizes and times
    of change of the weights files. It also covers names, shapes and dtypes of the
    tensors, but not their elements, which are not read.
    """
    summary = {
      'weights': [(file.path.name, file.size, file.modified) for file in self._weights],
      'tensors': {
        name: (tensor.shape, tensor.dtype.name)
        for name, tensor in self._tensors.items()
      },
      'config': dataclasses.asdict(self.config),
      'files': {
        name: hashlib.sha256(content).hexdigest()
        for name, content in self.files.items()
      },
      'stem': self.stem,
    }
    return hashlib.sha256(json.dumps(summary, sort_keys=True).encode()).hexdigest()

  def load(self) -> Checkpoint:
    """Reads the whole checkpoint into memory.

    Returns:
      The checkpoint; the model's leaves are NumPy arrays.

    Raises:
      CheckpointError: if a file has changed or is damaged.
    """
    arrays = functools.partial(models.materialize, keep_factors=True)
    params = arrays(self.outer())

    def key(index: int) -> tuple[Any, ...]:
      name = models.names.layer(index)
      return models.stack_key(self.specs(name)[name])

    for layers in models.stack_ranges(range(self.config.num_layers), key):
      own = (arrays(self.layer(index)) for index in layers)
      stack = models.stack_layers(own, len(layers))
      params[models.names.stack(layers)] = stack
    model = models.Model(params, self.buffers, self.config)
    return Checkpoint(model, dict(self.files), self.stem)


def from_tensors(
  tensors: Mapping[str, np.ndarray], config: models.ModelConfig
) -> models.Model:
  """Makes a model from the tensors of a checkpoint, by their names there.

  If the config says that the head is tied, but there is a tensor for the head, it must
  equal the embedding. The model then has the head as a parameter, and its config says
  that the head is not tied. Two factors of a weight, see `factors`, become a
  `structured.LowRank`.

  Returns:
    The model; its leaves are NumPy arrays of the tensors' dtypes.

  Raises:
    CheckpointError: if a tensor is missing or unknown, or has a wrong shape or dtype,
      or if a head that must be tied differs from the embedding.
  """
  known = {name: lazy.LazyTensor.of(tensor) for name, tensor in tensors.items()}
  return CheckpointReader(known, config).load().model


def _match(
  tensors: Mapping[str, lazy.LazyTensor], config: models.ModelConfig
) -> dict[str, list[tensors_lib.ExpectedTensor]]:
  """Returns the entries of all records, after checking the tensors.

  Raises:
    CheckpointError: if a tensor is missing or unknown, or has a wrong shape or dtype.
  """
  if config.num_layers > len(tensors):  # before a table is made of what the config says
    raise errors.CheckpointError(
      f'tensors of the checkpoint: most are missing: there are {len(tensors)}, and the '
      f'config has {config.num_layers} layers'
    )
  factored = {}
  for own in tensors_lib.entries(config).values():
    for entry in own:
      is_matrix = len(entry.paths) == 1 and len(entry.shape) == 2
      found = factors.find(tensors, entry.name) if is_matrix else None
      if found is not None:
        factored[entry.paths[0]] = found
  records = tensors_lib.entries(config, factored)
  expected: dict[str, tuple[int, ...]] = {}
  for entry in itertools.chain(*records.values()):
    expected |= entry.stored()
  got = {name for name in tensors if not families.is_buffer(name)}
  problems = []
  states = {'missing': expected.keys() - got, 'unknown': got - expected.keys()}
  for state, names in states.items():
    if names:
      shown, more = ', '.join(sorted(names)[:_SHOWN]), len(names) - _SHOWN
      problems.append(f'{state}: {shown}' + (f' and {more} more' if more > 0 else ''))
  if problems:
    raise errors.CheckpointError(f'tensors of the checkpoint: {"; ".join(problems)}')
  for name, shape in expected.items():
    tensor = tensors[name]
    if tensor.shape != shape:
      raise errors.CheckpointError(
        f'{name}: expected shape {shape}, got {tensor.shape}'
      )
    if tensor.dtype not in _DTYPES:
      raise errors.CheckpointError(
        f'{name}: expected float16, bfloat16 or float32, got {tensor.dtype}'
      )
  return records


def _untied(
  tensors: Mapping[str, lazy.LazyTensor], config: models.ModelConfig
) -> models.ModelConfig:
  """Returns the config of a checkpoint that may store its tied head.

  Raises:
    CheckpointError: if the head differs from the embedding.
  """
  untied = dataclasses.replace(config, tied_head=False)
  known = tensors_lib.outer_entries(untied)
  head, embedding = known['head'][0].name, known['embed'][0].name
  if not config.tied_head or head not in tensors:
    return config
  if embedding in tensors and not _same_bits(tensors[head], tensors[embedding]):
    raise errors.CheckpointError(
      f'{head} differs from {embedding}, but the config says that they are tied'
    )
  return untied


def _same_bits(a: lazy.LazyTensor, b: lazy.LazyTensor) -> bool:
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  return structured.same_bits(a.read(), b.read())

"""A checkpoint that is read a layer at a time."""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import factors
from rotbits_jax.checkpoints import lazy
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.checkpoints.contents import Checkpoint


class Source:
  """A checkpoint whose parameters are read when they are asked for.

  Opening reads names, shapes, dtypes and the config. `outer` and `layer` give views of
  memory maps that are made for the call: when the views are dropped, the maps end and
  the memory is free. Nothing is copied, but for quantised files, whose numbers are
  computed.

  Attributes:
    path: the weights file, or the index of several.
    files: the files beside the weights (configs, tokenizer), byte for byte.
    stem: what SliceGPT named the weights and the slicing JSON; None if dense.
    left_out: names of files and folders beside the weights that are not kept.
  """

  def __init__(
    self,
    path: pathlib.Path,
    tensors: Mapping[str, lazy.LazyTensor],
    config: models.ModelConfig,
    *,
    files: Mapping[str, bytes],
    stem: str | None,
    weights: Iterable[pathlib.Path] = (),
    left_out: tuple[str, ...] = (),
  ):
    """Checks the tensors' names, shapes and dtypes.

    Args:
      path: see the class.
      tensors: the tensors by the names that they have in the checkpoint.
      config: sizes and switches.
      files: see the class.
      stem: see the class.
      weights: the other files that hold the tensors.
      left_out: see the class.

    Raises:
      UnsupportedError: if a tensor is missing, unknown, or of a wrong shape or dtype.
    """
    self.path, self.files, self.stem = path, dict(files), stem
    self.left_out = left_out
    self._weights = [lazy.File.of(file) for file in (path, *weights)]
    self._tensors = tensors
    try:
      self._parameters = tensors_lib.Parameters(tensors, config)
    except errors.CheckpointError as e:
      raise errors.UnsupportedError(f'{path}: {e}') from e

  @property
  def input_bytes(self) -> int:
    """Size of the files that hold the tensors."""
    sizes = {file.path: file.size for file in self._weights}
    if self.path.suffix == '.json':  # an index
      del sizes[self.path]
    return sum(sizes.values())

  @property
  def config(self) -> models.ModelConfig:
    """Sizes and switches of the model."""
    return self._parameters.config

  @property
  def numbers(self) -> int:
    """How many numbers all tensors hold."""
    return self._parameters.numbers

  @property
  def nbytes(self) -> int:
    """How many bytes all tensors hold."""
    return self._parameters.nbytes

  @functools.cached_property
  def buffers(self) -> dict[str, np.ndarray]:
    """The tensors that take no part in the mathematics, by their names."""
    return self._parameters.buffers()

  def outer(self) -> models.Params:
    """The parameters outside the layers, as `Model.outer` gives them.

    Returns:
      Nested dicts of read-only NumPy views, kernels `[in, out]`, and of
      `structured.LowRank` leaves of such views.

    Raises:
      CheckpointError: if a file has changed or is damaged.
    """
    return self._parameters.read(None)

  def layer(self, index: int) -> models.Params:
    """The parameters of a layer, as `Model.layer` gives them; see `outer`.

    Args:
      index: the layer.

    Raises:
      CheckpointError: if a file has changed or is damaged.
      IndexError: if there is no such layer.
    """
    if not 0 <= index < self.config.num_layers:
      raise IndexError(f'the model has {self.config.num_layers} layers, got {index=}')
    return self._parameters.read(index)

  def specs(self, index: int | None) -> models.Params:
    """What `layer` returns, or `outer` for None, without reading anything.

    Returns:
      Nested dicts of `lazy.TensorSpec`, which has a shape and a dtype, and of
      `structured.LowRank` leaves of these. `models.stack_key` takes it.
    """
    return self._parameters.specs(index)

  def dtypes(self) -> dict[str, np.dtype]:
    """Dtype of each parameter by its path in the model.

    Paths are 'embed/tokens', 'layers.3/attention/query/kernel' and so on; this is what
    `CheckpointWriter` takes.
    """
    return {path: np.dtype(leaf.dtype) for path, leaf in self._leaves()}

  def factors(self) -> dict[str, factors.Factored]:
    """How the weights that are stored as two factors are stored, by path.

    This is what `CheckpointWriter` takes.
    """
    return {
      path: factors.Factored(leaf.rank, leaf.names)
      for path, leaf in self._leaves()
      if isinstance(leaf, structured.LowRank)
    }

  def fingerprint(self) -> str:
    """A digest of the files as they were when they were opened.

    It covers the names, sizes, times of change and tensors of the weights, the config,
    and the bytes of the other files. The numbers are not read.
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
    """The whole checkpoint in memory.

    Returns:
      The checkpoint; the model's leaves are NumPy arrays.

    Raises:
      CheckpointError: if a file has changed or is damaged.
    """
    return Checkpoint(self._parameters.model(), dict(self.files), self.stem)

  def _leaves(self) -> list[tuple[str, Any]]:
    """The leaves of `specs` by their paths in the model."""
    return [
      (tensors_lib.unit_name(unit) + path, leaf)
      for unit in tensors_lib.units(self.config)
      for path, leaf in structured.flatten(self.specs(unit)).items()
    ]

"""A checkpoint on disk that is read one layer at a time."""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
import hashlib
import json
import pathlib

import numpy as np

from rotbits_jax import models
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import lazy
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.checkpoints.contents import Checkpoint


class CheckpointReader:
  """A checkpoint whose parameters are read when they are requested.

  Opening a checkpoint reads its names, shapes, dtypes and config. Each call of `outer`
  or `layer` makes memory maps of the files and returns views of them. The maps are
  closed, and their memory is freed, when the views are deleted. Numbers are not copied,
  except the numbers of quantised files, which are computed.

  Attributes:
    path: the weights file, or the index if there are several.
    files: bytes of the sidecar files (configs, tokenizer, license, code) beside the
      weights, by name.
    stem: file name, without suffix, that SliceGPT gave to the weights and the slicing
      JSON; None if the model is dense.
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
      tensors: the tensors by their names in the checkpoint.
      config: sizes and switches.
      files: see the class.
      stem: see the class.
      weights: the files that hold the tensors, besides `path`.
      left_out: see the class.

    Raises:
      UnsupportedError: if a tensor is missing or unknown, or has a wrong shape or
        dtype.
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
    """The tensors that the forward pass does not use, by their names."""
    return self._parameters.buffers()

  def outer(self) -> models.Params:
    """Reads the parameters outside the layers.

    Returns:
      Nested dicts with the keys of `Model.outer`. Leaves are read-only NumPy views, or
      `structured.LowRank` leaves of such views. Kernels are `[in, out]`.

    Raises:
      CheckpointError: if a file has changed or is damaged.
    """
    return self._parameters.read(None)

  def layer(self, index: int) -> models.Params:
    """Reads the parameters of a layer.

    Args:
      index: the layer.

    Returns:
      Nested dicts with the keys of `Model.layer`, and leaves as in `outer`.

    Raises:
      CheckpointError: if a file has changed or is damaged.
      IndexError: if there is no such layer.
    """
    if not 0 <= index < self.config.num_layers:
      raise IndexError(f'the model has {self.config.num_layers} layers, got {index=}')
    return self._parameters.read(index)

  def specs(self, index: int | None) -> models.Params:
    """Returns the shapes and dtypes of a layer's parameters; no number is read.

    Args:
      index: the layer; None for the parameters outside the layers.

    Returns:
      Nested dicts like those of `layer` or `outer`, with a `lazy.TensorSpec` in place
      of each array. `models.stack_key` accepts them as a layer.
    """
    return self._parameters.specs(index)

  def fingerprint(self) -> str:
    """Returns a digest of the files in their state when they were opened.

    It covers the config, the bytes of the sidecar files, and the names, sizes and times
    of change of the weights files. It also covers names, shapes and dtypes of the
    tensors, but not their numbers, which are not read.
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
    return Checkpoint(self._parameters.model(), dict(self.files), self.stem)

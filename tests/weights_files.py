"""Weights files as dicts of arrays, for tests that read or write a whole file."""

from collections.abc import Mapping
import os
import pathlib

import numpy as np

from rotbits_jax.checkpoints import lazy
from rotbits_jax.checkpoints import safetensors_files
from rotbits_jax.checkpoints import torch_zip

Tensors = Mapping[str, np.ndarray]


def read_torch(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  return {name: tensor.read() for name, tensor in torch_zip.open_file(path).items()}


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  opened = safetensors_files.open_file(path)
  return {name: tensor.read() for name, tensor in opened.items()}


def write_torch(path: pathlib.Path, tensors: Tensors, stem: str) -> None:
  """Writes a file whose top folder in the zip is the stem."""
  _write(torch_zip.TorchZipWriter(path, _specs(tensors), stem), tensors)


def write_safetensors(path: pathlib.Path, tensors: Tensors) -> None:
  shards = {path.name: _specs(tensors)}
  _write(safetensors_files.SafetensorsWriter(path.parent, shards), tensors)


def _specs(tensors: Tensors) -> dict[str, lazy.TensorSpec]:
  return {name: lazy.TensorSpec(x.shape, x.dtype) for name, x in tensors.items()}


def _write(
  writer: torch_zip.TorchZipWriter | safetensors_files.SafetensorsWriter,
  tensors: Tensors,
) -> None:
  for name, tensor in tensors.items():
    writer.add(name, lazy.row_major(tensor))
  writer.close()

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
  specs = {name: lazy.TensorSpec(x.shape, x.dtype) for name, x in tensors.items()}
  writer = torch_zip.TorchZipWriter(path, specs, stem)
  for name, tensor in tensors.items():
    writer.add(name, lazy.row_major(tensor))
  writer.close()


def write_safetensors(path: pathlib.Path, tensors: Tensors) -> None:
  path.write_bytes(safetensors_files.to_bytes(tensors))

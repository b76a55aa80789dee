"""Weights files as dicts of arrays, for tests that read or write a whole file."""

from collections.abc import Mapping
import os
import pathlib

import numpy as np

from rotbits_jax.checkpoints import safetensors
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.checkpoints import torch_zip
from rotbits_jax.system import files

Tensors = Mapping[str, np.ndarray]


def read_torch(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  return {
    name: tensor.read()
    for name, tensor in torch_zip.open_file(files.File.of(path)).items()
  }


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  file = files.File.of(path)
  opened = safetensors.open_tensors(file, safetensors.read_header(file))
  return {name: tensor.read() for name, tensor in opened.items()}


def write_torch(path: pathlib.Path, tensors: Tensors) -> None:
  writer = torch_zip.TorchZipWriter(path, specs_of(tensors))
  for name, tensor in tensors.items():
    writer.add(name, tensors_lib.row_major(tensor))
  writer.close()


def write_safetensors(path: pathlib.Path, tensors: Tensors) -> None:
  header = safetensors.header(specs_of(tensors))
  contents = [tensors[name].tobytes() for name in safetensors.places(header)]
  path.write_bytes(header + b''.join(contents))


def specs_of(tensors: Tensors) -> dict[str, tensors_lib.TensorSpec]:
  return {name: tensors_lib.TensorSpec(x.shape, x.dtype) for name, x in tensors.items()}

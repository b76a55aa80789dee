"""Decoding: reads the model, the checkpoint or the PyTree in a file, or a part of it.

Functions that read a file take its path, its bytes, or an open binary file. `decode`
and `load` hold the whole model in memory; `decode_to_directory` holds a few layers.
"""

from collections.abc import Iterator
import contextlib
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from rotbits_jax import checkpoints
from rotbits_jax import file
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.coding import weights
from rotbits_jax.file import manifest
from rotbits_jax.file import plain
from rotbits_jax.report import savings

Tree = dict[str, Any]


def decode(source: file.Readable, *, like: Any = None, progress: bool = False) -> Any:
  """Returns the model, or the PyTree, in a file, as NumPy arrays.

  Args:
    source: a path, bytes, or a binary file.
    like: a PyTree whose structure the PyTree in the file gets: lists, tuples, Optax
      states. Its arrays give shapes and dtypes, which must be those in the file.
    progress: whether to show the progress on stderr.

  Returns:
    The model with NumPy arrays; structured leaves stay structured. Memory holds at most
    one layer more than the model. For a PyTree and without `like`, the function returns
    nested dicts whose keys are keys of dicts, indices and names of fields. For a
    checkpoint that is stored as plain tensors, it returns the tensors by name.

  Raises:
    ContainerError: if the file is not of this format or is damaged.
    ValueError: if `like` has other leaves than the PyTree in the file.
    OSError: if the path cannot be read.
  """
  with file.Reader(source) as reader:
    found = reader.model(show_progress=progress)
  if like is None:
    return found
  if isinstance(found, models.Model):
    raise ValueError('the file holds a model, which has a structure: leave out `like`')
  return plain.unflatten_like(like, found)


def load(
  source: file.Readable,
  *,
  layers: range | None = None,
  sharding: file.Place | None = None,
  dtype: DTypeLike | None = None,
  integers: bool = False,
  progress: bool = False,
) -> Any:
  """Loads the model in a file as JAX arrays; structured leaves stay structured.

  Args:
    source: a path, bytes, or an open binary file.
    layers: the layers to load; all by default. Other layers are not read.
    sharding: a `jax.sharding.Sharding` for all arrays, or a function that takes the
      path and the shape of a parameter and returns one. Layers of equal shapes are
      stacked along the first axis, under a key like 'layers.0:24'. Layers that no
      device of this process gets are not read.
    dtype: dtype for all floating-point numbers, rounded to nearest; None for the dtype
      of each array in the file. Arrays that `near` has rounded are float32 there.
    integers: whether a matrix that the file stores as multiples of one step, as `near`
      does, stays integers with a step, see `structured.UniformlyQuantized`. It takes a
      quarter of the memory of float32 in int8, and half of it in int16, which a matrix
      gets if int8 is too short. The numbers are the same, bit for bit.
    progress: whether to show the progress on stderr.

  Raises:
    ContainerError: as for `decode`.
    OSError: if the path cannot be read.
  """
  with file.Reader(source) as reader:
    model = reader.model(
      layers=layers, place=sharding, integers=integers, show_progress=progress
    )
  if dtype is not None:
    model = structured.astype(model, dtype)
  return jax.tree.map(_on_device, model)


def decode_checkpoint(
  source: file.Readable, *, progress: bool = False
) -> checkpoints.Checkpoint:
  """Decodes the model in a file with its sidecar files and its stem.

  Raises:
    ContainerError: as for `decode`, or if the file does not hold a model.
    OSError: if the path cannot be read.
  """
  with file.Reader(source) as reader:
    model = reader.model(show_progress=progress)
    if not isinstance(model, models.Model):
      raise file.ContainerError(
        'the file holds plain tensors, not a model of a known family'
      )
    return checkpoints.Checkpoint(model, reader.files(), reader.stem)


def decode_to_directory(
  source: file.Readable,
  directory: str | os.PathLike[str],
  *,
  format: checkpoints.Format = 'safetensors',
  shard_size: int | None = None,
  dtype: DTypeLike | None = None,
  overwrite: bool = True,
  progress: bool = False,
) -> None:
  """Decodes a file to a checkpoint on disk, one layer at a time.

  Args:
    source: a path, bytes, or an open binary file.
    directory: the directory for the checkpoint.
    format: see `checkpoints.save_checkpoint`. Plain tensors come back in the files that
      they were encoded from.
    shard_size: greatest size of the tensors in a weights file, in bytes; None for one
      file.
    dtype: dtype for all floating-point numbers, rounded to nearest. By default the
      numbers keep the dtype of the encoded checkpoint.
    overwrite: whether existing files may be replaced.
    progress: whether to show the progress on stderr.

  Raises:
    ContainerError: as for `decode_checkpoint`.
    ValueError: if the format does not suit the model.
    OSError: if a path cannot be read or written, or a file must not be replaced.
  """
  with file.Reader(source) as reader:
    config = reader.config
    if reader.weights_files:
      if dtype is not None:
        raise ValueError('plain tensors keep their dtypes: leave out dtype')
      _decode_tensors(reader, directory, format, overwrite, progress)
      return
    if config is None:
      raise file.ContainerError(
        'the file holds a PyTree, not a checkpoint; `decode` in Python reads it'
      )
    if 'config.json' not in reader.files():
      raise file.ContainerError(
        'the file holds a model without its config.json, so that it cannot become a '
        'checkpoint; pass the whole checkpoint to `encode`, or its files and stem'
      )
    if config.family not in checkpoints.FAMILIES:
      raise file.ContainerError(
        f'the file holds a model of the family {config.family!r:.100}, whose '
        'checkpoints are not known'
      )
    dtypes = _dtypes_on_disk(reader, dtype)
    with _errors_of_file():
      writer = checkpoints.CheckpointWriter(
        directory,
        config,
        dtypes=dtypes,
        files=reader.files(),
        stem=reader.stem,
        format=format,
        shard_size=shard_size,
        factors=reader.factors(),
        buffers=reader.buffers(),
        overwrite=overwrite,
      )
    with writer:
      kept = (structured.FactorPair,)
      for index, params in reader.parts(show_progress=progress):
        params = models.materialize(params, but=kept)
        prefix = models.names.prefix(index)
        params = structured.unflatten(
          (path, structured.astype(leaf, dtypes[prefix + path]))
          for path, leaf in structured.flatten(params).items()
        )
        if index is None:
          writer.outer(params)
        else:
          writer.layer(index, params)


def read_record(source: file.Readable, name: str) -> Tree:
  """Reads one unit, such as a layer, without the others; see `file.Reader.unit`.

  Raises:
    ContainerError: as for `decode`, or if there is no such unit.
    OSError: if the path cannot be read.
  """
  with file.Reader(source) as reader:
    return reader.unit(name)


def read_tensor(source: file.Readable, path: str) -> Any:
  """Reads one parameter, such as 'layers.3/attention/query/kernel'.

  Only the unit of the parameter is read, and units that it needs.

  Raises:
    ContainerError: as for `decode`, or if there is no such parameter.
    OSError: if the path cannot be read.
  """
  with file.Reader(source) as reader:
    return reader.tensor(path)


def inspect(source: file.Readable) -> savings.Report:
  """Reports the content of a file and the savings of each step, without decoding.

  Raises:
    ContainerError: if the source is not of this format or its manifest is damaged.
    OSError: if the path cannot be read.
  """
  with file.Reader(source) as reader:
    return savings.from_reader(reader)


def _decode_tensors(
  reader: file.Reader,
  directory: str | os.PathLike[str],
  format: checkpoints.Format,
  overwrite: bool,
  progress: bool,
) -> None:
  """Writes the weights files of a checkpoint that is stored as plain tensors."""
  if format != 'safetensors':
    raise ValueError('plain tensors come back in the files that they were encoded from')
  with _errors_of_file():
    writer = checkpoints.TensorFilesWriter(
      directory,
      tuple(reader.weights_files.values()),
      sizes=reader.tensor_sizes(),
      rests=reader.rests(),
      files=reader.files(),
      overwrite=overwrite,
    )
  with writer:
    for name, tensor in reader.tensors(show_progress=progress):
      writer.add(name, tensor)


@contextlib.contextmanager
def _errors_of_file() -> Iterator[None]:
  """Turns errors of a writer into errors of the file from which it has all names."""
  try:
    yield
  except checkpoints.CheckpointError as error:
    raise file.ContainerError(
      f'no checkpoint can be made of the file: {error}'
    ) from error


def _dtypes_on_disk(
  reader: file.Reader, dtype: DTypeLike | None
) -> dict[str, np.dtype]:
  """Returns the dtype in which each parameter is written to a checkpoint, by path."""
  dtypes = reader.dtypes()
  if dtype is not None:
    wanted = np.dtype(jnp.dtype(dtype))
    return {
      path: wanted if jnp.issubdtype(own, jnp.floating) else own
      for path, own in dtypes.items()
    }
  name = reader.options.get(manifest.DTYPE)
  if name is None:
    return dtypes
  # The file has these arrays in float32, see `passes.Rounding`.
  others = reader.options.get(manifest.OTHER_DTYPES, {})
  if not isinstance(others, dict):
    raise file.ContainerError(f'{manifest.OTHER_DTYPES} must be an object')
  return {
    path: _dtype(others.get(path, name)) if own == np.float32 else own
    for path, own in dtypes.items()
  }


def _dtype(name: Any) -> np.dtype:
  dtype = weights.DTYPES.get(name) if isinstance(name, str) else None
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    raise file.ContainerError(f'the file names an unknown dtype, {name!r:.40}')
  return dtype


def _on_device(x: Any) -> Any:
  """Returns a JAX array, or the NumPy array itself if JAX would narrow its dtype.

  On a CPU both share their memory if it is aligned. Nothing else refers to this memory.
  """
  if not isinstance(x, np.ndarray) or jnp.result_type(x) != x.dtype:
    return x
  return jax.device_put(x)

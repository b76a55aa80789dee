"""Decoding of a file to a checkpoint on disk, one record at a time."""

import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import output
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file.container import ContainerError
from rotbits_jax.system import host

_BUFFERS = f'{models.names.BUFFERS}/'


@host.own_settings()
def decode_to_directory(
  source: reader_lib.Encoded,
  directory: str | os.PathLike[str],
  *,
  base: Any = None,
  format: checkpoints.Format = 'safetensors',
  shard_size: int | None = None,
  dtype: DTypeLike | None = None,
  code: bool = False,
  overwrite: bool = False,
  progress: bool = False,
) -> None:
  """Decodes a file to a checkpoint on disk, one layer at a time.

  Args:
    source: the file, or its `Reader`, see `rotbits_jax.open`.
    directory: the directory for the checkpoint. With `overwrite`, an older checkpoint
      in it is replaced; one with other files is not, nor is one of the source or the
      base.
    base: the base of the file, if it needs one and `source` is no reader.
    format: see `checkpoints.CheckpointWriter`. Plain tensors of no known family come
      back as they were, and take no format, shard_size or dtype.
    shard_size: greatest size of the tensors in a weights file, in bytes; None for the
      shards that the checkpoint had, or else one file.
    dtype: as in `load`, but one that holds the elements; None for those of the
      checkpoint.
    code: whether the format 'transformers' also gets the Python modules of the file. Do
      so only if you trust its author: `trust_remote_code` may run them.
    overwrite: whether an older checkpoint in the directory may be replaced.
    progress: whether to show progress on stderr.

  Raises:
    ContainerError: if the file is damaged, its base is missing or another one, or no
      checkpoint can be made of it.
    ValueError: if the directory has other files, or a dtype does not hold an element.
    OSError: if a path cannot be read or written.
  """
  reader = reader_lib.opened(source, base)
  reader.names()  # checks that no record is missing, and a base if one is needed
  keeps_files = (format, shard_size, dtype) == ('safetensors', None, None)
  is_plain, files = reader.is_plain and keeps_files, reader.files()
  model = None if is_plain else reader.plain_model()
  opened = model or reader
  specs: dict[str, Any] = {}
  for name in opened.records:
    specs |= structured.flatten(opened.specs(name))
  dtypes = _dtypes_on_disk(reader.manifest, specs, dtype)
  try:
    if is_plain:
      writer = checkpoints.FolderWriter(
        directory,
        reader.headers(),
        files=files,
        copies=reader.copies(),
        overwrite=overwrite,
      )
      if wrong := {name for name, _ in specs.items() ^ writer.specs.items()}:
        raise ContainerError(f'{min(wrong)}: the headers and the records differ')
      add: Any = writer.add_tensor
    else:
      config = opened.config
      if config is None or config.family not in checkpoints.FAMILIES:
        text = 'the family is unknown: use `decode` in Python, or no format and dtype'
        raise ContainerError(text)
      if reader.manifest.keeps != 'bits':
        files = checkpoints.with_own_head(files, config)
      if dtype is not None:
        files = checkpoints.with_dtype(files, structured.floating(dtype))
      writer = checkpoints.CheckpointWriter(
        directory,
        config,
        dtypes=dtypes,
        files=files,
        stem=reader.manifest.stem,
        format=format,
        shard_size=shard_size,
        buffers={x[len(_BUFFERS) :]: specs[x] for x in specs if x.startswith(_BUFFERS)},
        code=code,
        copies=reader.copies(),
        overwrite=overwrite,
      )
      add = writer.add
  except checkpoints.CheckpointError as error:  # all names are those of the file
    raise ContainerError(f'no checkpoint can be made of the file: {error}') from error
  output.check_inputs(writer.replaced(), [reader])
  records = reader.each(as_arrays=True, show_progress=progress)
  if model is not None:
    records = ((name, structured.flatten(model.read(name))) for name in model.records)
  with writer.open():
    for _, flat in records:
      for path, leaf in flat.items():
        add(path, _converted(path, leaf, dtypes[path]))


def _dtypes_on_disk(
  manifest: manifest_lib.Manifest, specs: dict[str, Any], dtype: DTypeLike | None
) -> dict[str, np.dtype]:
  """Returns the dtype that each parameter gets on disk, by its path."""
  dtypes = {path: np.dtype(spec.dtype) for path, spec in specs.items()}
  if manifest.message is not None:
    arrays = manifest.message.layout.arrays
    dtypes |= {path: jnp.dtype(array.dtype) for path, array in arrays.items()}
  for path, stored in dtypes.items():
    if stored == np.float32:  # which `near` stores in place of others
      name = manifest.dtypes.get(path, manifest.dtypes.get('', 'float32'))
      dtypes[path] = np.dtype(name)
    is_float = jnp.issubdtype(stored, jnp.floating) and not path.startswith(_BUFFERS)
    if dtype is not None and is_float:
      dtypes[path] = structured.floating(dtype)
  return dtypes


def _converted(path: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns a parameter in the dtype of the checkpoint, which must hold it."""
  if array.dtype == dtype:
    return array
  converted: np.ndarray = structured.astype(array, dtype)
  if not np.array_equal(np.isfinite(array), np.isfinite(converted)):
    raise ValueError(f'{path}: too large for {dtype.name}; decode with --dtype=float32')
  return converted

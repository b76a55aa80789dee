"""Decoding of a file to a checkpoint on disk, one record at a time."""

from collections.abc import Iterator
import contextlib
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.file import container
from rotbits_jax.file import output
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file.container import ContainerError
from rotbits_jax.system import host


@host.own_settings()
def decode_to_directory(
  source: container.Readable | reader_lib.Reader,
  directory: str | os.PathLike[str],
  *,
  base: Any = None,
  format: checkpoints.Format = 'safetensors',
  shard_size: int | None = None,
  dtype: DTypeLike | None = None,
  overwrite: bool = True,
  progress: bool = False,
) -> None:
  """Decodes a file to a checkpoint on disk, one layer at a time.

  Args:
    directory: the directory for the checkpoint. An older checkpoint in it is replaced;
      one with other files is not, nor is one of the source or the base.
    format: see `checkpoints.CheckpointWriter`. Plain tensors of no known family come
      back as they were, and take no format, shard_size or dtype.
    shard_size: greatest size of the tensors in a weights file, in bytes; None for the
      shards that the checkpoint had, or else one file.
    dtype: as in `load`, but one that holds the elements; None for those of the
      checkpoint.
  """
  with contextlib.ExitStack() as stack:
    reader = source
    if not isinstance(reader, reader_lib.Reader):
      reader = stack.enter_context(reader_lib.Reader(reader, base=base))
    is_plain = reader.is_plain
    if is_plain and (format, shard_size, dtype) == ('safetensors', None, None):
      _write_tensors(reader, directory, overwrite=overwrite, progress=progress)
      return
    model, files = reader.plain_model(), reader.files()
    config = reader.config if model is None else model.config
    if is_plain and model is None:
      raise ValueError(
        'tensors of no known family come back in the files and dtypes that they were '
        'encoded from: leave out format, shard_size and dtype'
      )
    if config is None:
      raise ContainerError(
        'the file holds a PyTree, not a checkpoint; `decode` in Python reads it'
      )
    if 'config.json' not in files:
      raise ContainerError(
        'the file holds a model without its config.json; pass a whole `Checkpoint` to '
        '`encode`'
      )
    if config.family not in checkpoints.FAMILIES:
      raise ContainerError(
        f'the file holds a model of the family {config.family!r:.100}, whose '
        'checkpoints are not known'
      )
    opened: Any = model or reader
    dtypes, buffers = reader.dtypes_on_disk(), models.names.BUFFERS
    if model is not None:
      specs = (structured.flatten(model.specs(name)) for name in model.records)
      dtypes = {path: spec.dtype for flat in specs for path, spec in flat.items()}
    shortcuts = reader.thin_shortcuts()
    reader.check_records()  # the writer plans all layers of the config, however many
    with _errors_of_file():
      if reader.keeps != 'bits':
        files = checkpoints.with_own_head(files, config)
      if dtype is not None:
        wanted = structured.floating(dtype)
        files = checkpoints.with_dtype(files, wanted)
        for path, stored in dtypes.items():
          dtypes[path] = wanted if jnp.issubdtype(stored, jnp.floating) else stored
      writer = checkpoints.CheckpointWriter(
        directory,
        config,
        dtypes=dtypes,
        files=files,
        stem=reader.stem,
        format=format,
        shard_size=shard_size,
        shortcuts=shortcuts,
        buffers=opened.specs(buffers)[buffers] if buffers in opened.records else {},
        overwrite=overwrite,
      )
    output.check_inputs(writer.replaced(), [reader])
    keep = shortcuts.keys() if format == 'transformers' else ()
    if model is None:
      records = reader.each(keep=keep, show_progress=progress)
    else:
      records = ((name, structured.flatten(model.read(name))) for name in model.records)
    with writer.open():
      for name, flat in records:
        for path, leaf in flat.items():
          is_final = name == buffers
          writer.add(path, leaf if is_final else _converted(path, leaf, dtypes[path]))


def _converted(path: str, leaf: Any, dtype: np.dtype) -> Any:
  """Returns a parameter in the dtype of the checkpoint."""
  converted = structured.astype(leaf, dtype)
  are_floats = all(jnp.issubdtype(x, jnp.floating) for x in (leaf.dtype, dtype))
  if are_floats and jnp.finfo(dtype).maxexp < jnp.finfo(leaf.dtype).maxexp:
    for x, y in zip(_numbers(leaf), _numbers(converted), strict=True):
      if not np.array_equal(np.isfinite(x), np.isfinite(y)):
        raise ValueError(
          f'{path}: its numbers are too large for {dtype.name}; decode with '
          '--dtype=float32'
        )
  return converted


def _numbers(leaf: Any) -> list[np.ndarray]:
  """Returns the arrays of a parameter that a checkpoint has."""
  pair = structured.pair(leaf)
  return [np.asarray(x) for x in jax.tree.leaves(leaf if pair is None else pair)]


def _write_tensors(
  reader: reader_lib.Reader,
  directory: str | os.PathLike[str],
  *,
  overwrite: bool,
  progress: bool,
) -> None:
  """Writes the weights files of a checkpoint that is stored as plain tensors."""
  with _errors_of_file():
    writer = checkpoints.FolderWriter(
      directory, reader.headers(), files=reader.files(), overwrite=overwrite
    )
    specs: dict[str, Any] = {}
    for record in reader.records:
      specs |= structured.flatten(reader.specs(record))
    for name in {**specs, **writer.specs}:
      if specs.get(name) != writer.specs.get(name):
        raise ContainerError(f'{name}: the headers and the records differ')
  output.check_inputs(writer.replaced(), [reader])
  with writer.open():
    for _, flat in reader.each(keep=(), show_progress=progress):
      for name, tensor in flat.items():
        writer.add_tensor(name, tensor)


@contextlib.contextmanager
def _errors_of_file() -> Iterator[None]:
  """Turns errors of a writer into errors of the file from which it has all names."""
  try:
    yield
  except checkpoints.CheckpointError as error:
    raise ContainerError(f'no checkpoint can be made of the file: {error}') from error

"""Snapshots: files that are decoded once, to folders that other programs load."""

from collections.abc import Sequence
import hashlib
import os
import pathlib

import rotbits_jax
from rotbits_jax import api
from rotbits_jax import checkpoints
from rotbits_jax import file
from rotbits_jax.file import directory
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file import shards
from rotbits_jax.system import files
from rotbits_jax.system import host
from rotbits_jax.system import outputs


@host.own_settings()
def snapshot(
  path: api.Path | file.Reader,
  base: api.Path | Sequence[api.Path] | None = None,
  *,
  progress: bool = False,
) -> pathlib.Path:
  """Decodes a file to a folder of the user's cache, unless it is there already.

      AutoModel.from_pretrained(rotbits_jax.snapshot('model.rotbits'))

  The folder is named by a digest of the file, whose own checksums can be forged. It
  appears when it is complete; do not write into it. It is in `snapshots` of the folder
  that the variable ROTBITS_JAX_CACHE names, or of `rotbits_jax` in XDG_CACHE_HOME or in
  ~/.cache. A sliced model gets the format 'transformers', see `decode_to_directory`.
  What killed calls left is removed.

  Args:
    path: the path of the file, or its `Reader`, which has its base.
    base: the paths of the base of the file, of the base of that, and so on.
    progress: whether to show progress on stderr.

  Returns:
    The path of the folder.

  Raises:
    ContainerError: if the file is damaged, or its base is missing or another one.
    ValueError: if the file is not on disk.
    OSError: if the folder cannot be written.
  """
  reader = reader_lib.opened(path, base)
  source = reader.inputs[0]
  if not isinstance(source, str | os.PathLike):
    raise ValueError('a snapshot is made of a file on disk, got one in memory')
  digest = hashlib.sha256(reader.fingerprint().encode())
  for shard in map(str, shards.find(source)[0]):
    with open(shard, 'rb') as content:
      digest.update(hashlib.file_digest(content, 'sha256').digest())
  name = f'{digest.hexdigest()}-{rotbits_jax.__version__}'
  folder = files.cache_folder() / 'snapshots' / name
  folder.parent.mkdir(parents=True, exist_ok=True)
  outputs.remove_stale(folder.parent)
  if not folder.is_dir():
    is_sliced = reader.config is not None and reader.config.sliced
    format: checkpoints.Format = 'transformers' if is_sliced else 'safetensors'
    try:
      directory.decode_to_directory(reader, folder, format=format, progress=progress)
    except FileExistsError:
      if not folder.is_dir():  # else another process was faster
        raise
  return folder

"""Snapshots: files that are decoded once, to folders that other programs load."""

from collections.abc import Sequence
import hashlib
import pathlib

import rotbits_jax
from rotbits_jax import api
from rotbits_jax import checkpoints
from rotbits_jax import file
from rotbits_jax.file import directory
from rotbits_jax.file import shards
from rotbits_jax.system import files
from rotbits_jax.system import host
from rotbits_jax.system import outputs


@host.own_settings()
def snapshot(
  path: api.Path,
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
  """
  reader = file.Reader(path, base=base)
  digest = hashlib.sha256(reader.fingerprint().encode())
  for shard in map(str, shards.find(path)[0]):
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

"""Snapshots: files that are decoded once, to folders that other programs load."""

from collections.abc import Sequence
import hashlib
import json
import pathlib
import tempfile

import jax.numpy as jnp
from numpy.typing import DTypeLike

import rotbits_jax
from rotbits_jax import api
from rotbits_jax import checkpoints
from rotbits_jax import file
from rotbits_jax.file import directory
from rotbits_jax.system import files
from rotbits_jax.system import host
from rotbits_jax.system import outputs


@host.own_settings()
def snapshot(
  path: api.Path,
  base: api.Path | Sequence[api.Path] | None = None,
  *,
  format: checkpoints.Format | None = None,
  dtype: DTypeLike | None = None,
  progress: bool = False,
) -> pathlib.Path:
  """Decodes a file to a folder of the user's cache, unless it is there already.

      AutoModel.from_pretrained(rotbits_jax.snapshot('model.rotbits'))

  The folder is named by a digest of the checksums in the file and of the arguments, and
  appears when it is complete; do not write into it. It is in `snapshots` of the folder
  that the variable ROTBITS_JAX_CACHE names, or of `rotbits_jax` in XDG_CACHE_HOME or in
  ~/.cache. The arguments are those of `decode_to_directory`; the default format is
  'transformers' for a sliced model, else the checkpoint's own.
  """
  reader = file.Reader(path, base=base)
  reader.names()  # checks the records before the cache is asked
  sliced = reader.config is not None and reader.config.sliced
  format = format or ('transformers' if sliced else 'safetensors')
  name = None if dtype is None else jnp.dtype(dtype).name
  key = json.dumps([reader.fingerprint(), format, name, rotbits_jax.__version__])
  digest = hashlib.sha256(key.encode()).hexdigest()
  folder = files.cache_folder() / 'snapshots' / digest
  if not folder.is_dir():
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.', dir=folder.parent) as scratch:
      written = pathlib.Path(scratch) / folder.name
      directory.decode_to_directory(
        reader, written, format=format, dtype=dtype, progress=progress
      )
      try:
        outputs.move(written, folder)
      except OSError:
        if not folder.is_dir():  # else another process was faster
          raise
  return folder

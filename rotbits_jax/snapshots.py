"""Snapshots: files that are decoded once, to folders that other programs load."""

from collections.abc import Sequence
import hashlib
import json
import pathlib

import jax.numpy as jnp
from numpy.typing import DTypeLike

import rotbits_jax
from rotbits_jax import api
from rotbits_jax import checkpoints
from rotbits_jax import file
from rotbits_jax.file import directory
from rotbits_jax.system import cache
from rotbits_jax.system import host


@host.own_settings()
def snapshot(
  path: api.Path,
  base: api.Path | Sequence[api.Path] | None = None,
  *,
  format: checkpoints.Format | None = None,
  dtype: DTypeLike | None = None,
  limit: int | None = None,
  progress: bool = False,
) -> pathlib.Path:
  """Decodes a file to a folder of the user's cache, once.

  The folder is for programs that load a checkpoint: transformers, vLLM, MaxText, Tunix,
  Keras. It appears when it is complete, and processes that need the same one at the
  same time decode it once. Do not write into it. The cache is the folder that the
  variable ROTBITS_JAX_CACHE names, or `rotbits_jax` in XDG_CACHE_HOME or in ~/.cache.

  A folder is found by the checksums in the file, the base, the format, the dtype and
  the version of this package, so that finding one reads the manifest and no weights.

  Args:
    path: the path of a file, or of shards.
    base: the path of the base of `encode`, or those of an encoded file and of the bases
      below it.
    format: see `checkpoints.save_checkpoint`. The default is 'transformers' for a
      sliced model, and the checkpoint's own layout for everything else.
    dtype: see `decode_to_directory`.
    limit: greatest number of bytes of all snapshots, see `prune_snapshots`. The new one
      stays in any case. By default none is removed.
    progress: whether to show the progress on stderr.

  Returns:
    The folder.

  Raises:
    ContainerError: as for `decode_to_directory`, also if the folder is there.
    ValueError: if the format does not suit the model, or the base is not on disk.
    OSError: if a path cannot be read, or if the cache cannot be written.
  """
  with file.Reader(path, base=base) as reader:
    reader.check_records()
    content = reader.fingerprint()
    if content is None:
      raise ValueError('the base of a snapshot must be on disk: give its path')
    sliced = reader.config is not None and reader.config.sliced
    format = format or ('transformers' if sliced else 'safetensors')
    wanted = None if dtype is None else jnp.dtype(dtype).name
    key = json.dumps([content, format, wanted, rotbits_jax.__version__])

    def write(folder: pathlib.Path) -> None:
      directory.write(reader, folder, format=format, dtype=dtype, progress=progress)

    name = hashlib.sha256(key.encode()).hexdigest()[: cache.DIGITS]
    found = cache.made(name, write, show=progress)
  if limit is not None:
    cache.prune(limit, keep=found)
  return found


def prune_snapshots(limit: int = 0) -> list[pathlib.Path]:
  """Removes the folders of `snapshot` that were not used for the longest time.

  A folder is used when `snapshot` returns it. One that is being written stays, and the
  rest of one whose process was killed goes.

  Args:
    limit: greatest number of bytes of the folders that stay.

  Returns:
    The folders that were removed.

  Raises:
    OSError: if a folder cannot be removed.
  """
  return cache.prune(limit)

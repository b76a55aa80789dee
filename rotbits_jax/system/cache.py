"""The folder in which a user's compiled programs and snapshots are kept."""

import os
import pathlib


def root() -> pathlib.Path:
  """Returns the folder, which need not exist; an OSError if the user has no home."""
  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  path = os.environ.get('ROTBITS_JAX_CACHE') or os.path.join(cache, 'rotbits_jax')
  if not os.path.isabs(path):
    raise OSError('no folder for a cache: set ROTBITS_JAX_CACHE to an absolute path')
  return pathlib.Path(path)

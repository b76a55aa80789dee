"""The folder in which a user's compiled programs and snapshots are kept."""

import os
import pathlib

VARIABLE = 'ROTBITS_JAX_CACHE'
"""The environment variable that names the folder of the cache."""


def root() -> pathlib.Path:
  """Returns the folder, which need not exist; an OSError if the user has no home."""
  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  path = os.environ.get(VARIABLE) or os.path.join(cache, 'rotbits_jax')
  if not os.path.isabs(path):
    raise OSError(f'there is no folder for a cache: set {VARIABLE} to an absolute path')
  return pathlib.Path(path)

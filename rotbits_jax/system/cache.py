"""The cache of a user: compiled programs and snapshots."""

import os
import pathlib

VARIABLE = 'ROTBITS_JAX_CACHE'
"""The environment variable that names the folder of the cache."""


def root() -> pathlib.Path:
  """Returns the folder of the cache, which need not exist.

  It is that of the variable, or `rotbits_jax` in XDG_CACHE_HOME or in ~/.cache.

  Raises:
    OSError: if the path is not absolute, as where the user has no home.
  """
  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  path = os.environ.get(VARIABLE) or os.path.join(cache, 'rotbits_jax')
  if not os.path.isabs(path):
    raise OSError(f'there is no folder for a cache: set {VARIABLE} to an absolute path')
  return pathlib.Path(path)

"""Arrays that each thread keeps and uses again.

Fresh memory costs more time than the work on it does. The arrays are aligned because
XLA then uses them without a copy.
"""

import threading

import jax
import numpy as np

from rotbits_jax.system import host

ROOM = 1 << 20
"""The elements of the arrays that most programs are compiled for."""

_local = threading.local()


def scratch(name: str, size: int, dtype: np.dtype | type) -> np.ndarray:
  """Returns this thread's array of this name, size and dtype."""
  arrays = _local.__dict__.setdefault('scratch', {})
  key = name, size, np.dtype(dtype)
  if key not in arrays:
    arrays[key] = host.empty((size,), dtype)
    arrays[key][...] = 0
  return arrays[key]


def taken(name: str, size: int, dtype: np.dtype | type) -> jax.Array:
  """Takes this thread's array of this name, size and dtype, to donate it."""
  arrays = _local.__dict__.setdefault('arrays', {})
  array: jax.Array | None = arrays.pop((name, size, np.dtype(dtype)), None)
  # A program that makes zeros would have to be compiled.
  return jax.device_put(np.zeros(size, dtype)) if array is None else array


def keep(name: str, array: jax.Array) -> None:
  """Keeps an array for `taken`."""
  _local.arrays[name, array.size, array.dtype] = array

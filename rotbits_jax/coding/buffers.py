"""Arrays that each thread keeps and uses again.

Fresh memory costs more time than the work on it does. The arrays are aligned because
XLA then uses them without a copy.
"""

import threading

import jax
import numpy as np

from rotbits_jax.system import host

_local = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
  """Returns this thread's array of this name, shape and dtype."""
  arrays = _local.__dict__.setdefault('scratch', {})
  key = name, shape, np.dtype(dtype)
  if key not in arrays:
    arrays[key] = host.empty(shape, dtype)
    arrays[key][...] = 0
  return arrays[key]


def taken(name: str, shape: tuple[int, ...], dtype: np.dtype | type) -> jax.Array:
  """Takes this thread's array of this name, shape and dtype, to donate it."""
  arrays = _local.__dict__.setdefault('arrays', {})
  array: jax.Array | None = arrays.pop((name, shape, np.dtype(dtype)), None)
  # A program that makes zeros would have to be compiled.
  return jax.device_put(np.zeros(shape, dtype)) if array is None else array


def keep(name: str, array: jax.Array) -> None:
  """Keeps an array for `taken`."""
  _local.arrays[name, array.shape, array.dtype] = array

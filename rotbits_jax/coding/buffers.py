"""Arrays that each thread keeps and uses again.

Fresh memory costs more time than the work on it does. The arrays are aligned because
XLA then uses them without a copy.
"""

from collections.abc import Callable
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


def filled(
  name: str,
  size: int,
  dtype: np.dtype | type,
  source: np.ndarray,
  function: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
  """Returns this thread's array of this name, filled by a function of another.

  Args:
    name: its name.
    size: its size; the array has any elements behind those of the function.
    dtype: its dtype.
    source: the other array, which does not change.
    function: is called unless this thread filled the array from this source last.
  """
  arrays = _local.__dict__.setdefault('filled', {})
  key = name, size, np.dtype(dtype)
  array, last = arrays.get(key, (None, None))
  if last is not source:
    found = function(source).reshape(-1)
    array = host.empty((size,), dtype) if array is None else array
    arrays.pop(key, None)  # in case that an interrupt leaves another content
    array[: found.size] = found
    arrays[key] = array, source
  return array


def taken(name: str, size: int, dtype: np.dtype | type) -> jax.Array:
  """Takes this thread's array of this name, size and dtype, to donate it."""
  arrays = _local.__dict__.setdefault('arrays', {})
  array: jax.Array | None = arrays.pop((name, size, np.dtype(dtype)), None)
  # A program that makes zeros would have to be compiled.
  return jax.device_put(np.zeros(size, dtype)) if array is None else array


def keep(name: str, array: jax.Array) -> None:
  """Keeps an array for `taken`."""
  _local.arrays[name, array.size, array.dtype] = array

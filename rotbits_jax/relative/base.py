"""The base of a file: arrays that it needs and does not hold.

A `structured.difference` is made from one array of another model, which the receiver
has. Arrays are found by their paths. Tensors of unknown families are also found if
their names differ by a prefix such as 'model.'. A base that lacks an array raises a
ValueError that names it.
"""

from collections.abc import Callable, Mapping
import functools
import math
import os
import re
import threading
from typing import Any

import jax
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.coding import pool
from rotbits_jax.relative import entries
from rotbits_jax.relative import measure
from rotbits_jax.structured import difference
from rotbits_jax.system import checksums
from rotbits_jax.system import host

_WRAPPERS = re.compile(r'((base_model|model|module|transformer|_orig_mod)\.)+')
_LARGE = 1 << 22  # elements of an array that is measured alone, because memory is short
_MOST_RECORDS = 4  # that are held, because records are decoded side by side


class Base:
  """The arrays of a base, a `passes.Source`, by path, a record at a time."""

  def __init__(self, source: Any, *, plain: bool):
    """Reads names, shapes and dtypes; `plain` names may differ by a prefix."""
    self.source = source
    inputs = getattr(source, 'inputs', [None])
    path = getattr(source, 'path', inputs[0])
    self.name = str(path) if isinstance(path, str | os.PathLike) else 'this'
    self.config: models.ModelConfig | None = getattr(source, 'config', None)
    self._specs: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for record in source.records:
      for path, leaf in structured.flatten(source.specs(record)).items():
        self._specs[path] = record, tuple(leaf.shape), np.dtype(leaf.dtype).name
    self._short: dict[str, list[str]] = {}
    for path in self._specs if plain else ():
      self._short.setdefault(_short(path), []).append(path)
    self._lock = threading.RLock()
    read = lambda record: structured.flatten(source.read(record))
    self._record = functools.lru_cache(_MOST_RECORDS)(read)

  def find(self, path: str) -> str | None:
    """Returns the path of the base's array for a path; None if it has none."""
    if path in self._specs:
      return path
    paths = self._short.get(_short(path), ())
    return paths[0] if len(paths) == 1 else None

  def array(self, path: str) -> np.ndarray | None:
    """Returns the base's array for a path to encode beside; None if it has none.

    Arrays that each machine sums by itself are none, because their bits may differ.
    """
    path_in_base = self.find(path)
    leaf = None if path_in_base is None else self._leaf(path_in_base)
    if leaf is None or not getattr(leaf, 'is_exact', True):
      return None
    return self._array(leaf)

  def _leaf(self, path: str) -> Any:
    if path not in self._specs:
      raise ValueError(f'{path}: other arrays of the base need it, but it lacks it')
    with self._lock:
      return self._record(self._specs[path][0])[path]

  def _array(self, leaf: Any) -> np.ndarray:
    """Returns the array of a leaf, given the arrays that it needs."""
    if getattr(leaf, 'needs', ()):
      leaf = leaf.materialize(*(self._array(self._leaf(x)) for x in leaf.needs))
    return np.asarray(jax.device_get(structured.materialize(leaf)))

  def check(self, wanted: entries.BaseArray) -> str:
    """Checks that the base has the array of an entry, unread; returns its path."""
    path = self.find(wanted.path)
    if path is None:
      raise ValueError(f'{self.name} is another base: it has no {wanted.path}')
    _, shape, dtype = self._specs[path]
    if (shape, dtype) != (wanted.shape, wanted.dtype):
      text = f'{dtype} {list(shape)}, not {wanted.dtype} {list(wanted.shape)}'
      raise ValueError(f'{self.name} is another base: its {path} is {text}')
    return path

  def get(self, wanted: entries.BaseArray) -> np.ndarray:
    """Returns the array of an entry."""
    path = self.check(wanted)
    array = host.contiguous(self._array(self._leaf(path)))
    if checksums.of_array(array) != wanted.crc32:
      raise ValueError(f'{self.name} is another base: its {path} has other elements')
    return array

  def beside(
    self, params: Mapping[str, Any], resolve: Callable[[str], Any]
  ) -> dict[str, measure.Measured]:
    """Returns how to store the arrays that take fewer bytes beside the base, by path.

    An embedding that is predicted from the head counts as an array, too; `resolve`
    returns the parameters that leaves need.
    """
    jobs = {}
    for path, leaf in params.items():
      is_predicted = isinstance(leaf, difference.Difference)
      is_array = is_predicted or not structured.is_structured(leaf)
      # The base is read here, because an encoded file takes jobs of its own.
      known = self.array(path) if is_array else None
      if known is not None:
        array = leaf.materialize(*map(resolve, leaf.needs)) if is_predicted else leaf
        name = str(self.find(path))
        jobs[path] = functools.partial(_beside, np.asarray(array), known, name)
    is_large = lambda path: math.prod(params[path].shape) > _LARGE
    stored = {path: jobs.pop(path)() for path in [*filter(is_large, jobs)]}
    stored |= zip(jobs, pool.run(jobs.values()), strict=True)
    return {path: measured for path, measured in stored.items() if measured is not None}


def _beside(target: np.ndarray, base: np.ndarray, path: str) -> measure.Measured | None:
  """Returns how to store an array beside that of a path in the base."""
  base = host.contiguous(base)
  return measure.beside(target, base, entries.BaseArray.of(path, base))


def _short(path: str) -> str:
  """Returns the name of a tensor without the prefixes that wrappers add."""
  wrappers = _WRAPPERS.match(path)
  return path if wrappers is None else path[wrappers.end() :]

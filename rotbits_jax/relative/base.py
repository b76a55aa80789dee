"""The base of a file: arrays that it needs and does not hold.

Arrays are found by their paths; tensors of unknown families also if their names differ
by a prefix such as 'model.'. A base that lacks an array raises a ValueError.
"""

import collections
from collections.abc import Callable, Mapping
import functools
import os
import re
import threading
from typing import Any

import jax
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.relative import entries
from rotbits_jax.relative import measure
from rotbits_jax.structured import difference
from rotbits_jax.system import checksums
from rotbits_jax.system import host

_WRAPPERS = re.compile(r'((base_model|model|module|transformer|_orig_mod)\.)+')
_MOST_RECORDS = 4  # that are held, because records are decoded side by side


class Base:
  """The arrays of a base, a `passes.Source`, by path, a record at a time."""

  def __init__(self, source: Any, *, plain: bool, crc32s: Any = dict):
    """Reads names, shapes and dtypes; `plain` names may differ by a prefix.

    `crc32s` returns known checksums, by path, dtype and shape.
    """
    self.source, self._crc32s = source, crc32s
    path = getattr(source, 'path', getattr(source, 'inputs', [None])[0])
    self.name = str(path) if isinstance(path, str | os.PathLike) else 'this'
    self.config: models.ModelConfig | None = getattr(source, 'config', None)
    self._specs: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for record in source.records:
      for path, leaf in structured.flatten(source.specs(record)).items():
        self._specs[path] = record, tuple(leaf.shape), np.dtype(leaf.dtype).name
    counts = collections.Counter(map(_short, self._specs if plain else ()))
    self._short = {_short(x): x for x in self._specs if counts[_short(x)] == 1}
    self._lock = threading.RLock()
    read = lambda record: structured.flatten(source.read(record))
    self._record = functools.lru_cache(_MOST_RECORDS)(read)

  def find(self, path: str) -> str | None:
    """Returns the path of the base's array for a path; None if it has none."""
    return path if path in self._specs else self._short.get(_short(path))

  def array(self, path: str) -> np.ndarray | None:
    """Returns the base's array for a path to encode beside; None if it has none.

    Arrays that each machine sums by itself are none, because their bits may differ.
    """
    place = self.find(path)
    leaf = None if place is None else self._leaf(place)
    return self._array(leaf) if getattr(leaf, 'is_exact', leaf is not None) else None

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
      text = f'is {dtype} {list(shape)}, not {wanted.dtype} {list(wanted.shape)}'
      raise ValueError(f'{self.name} is another base: its {path} {text}')
    return path

  def get(self, wanted: entries.BaseArray) -> np.ndarray:
    """Returns the array of an entry."""
    path = self.check(wanted)
    array = host.contiguous(self._array(self._leaf(path)))
    if self._crc32(path, array) != wanted.crc32:
      raise ValueError(f'{self.name} is another base: its {path} has other elements')
    return array

  def _crc32(self, path: str, array: np.ndarray) -> int:
    crc32 = self._crc32s().get((path, array.dtype.name, array.shape))
    return checksums.of_array(array) if crc32 is None else crc32

  def beside(
    self, params: Mapping[str, Any], resolve: Callable[[str], Any]
  ) -> dict[str, measure.Measured]:
    """Returns how to store the arrays that take fewer bytes beside the base, by path.

    The entries of the base's arrays lack their checksums.
    An embedding that is predicted from the head counts as an array, too; `resolve`
    returns the parameters that leaves need.
    """
    stored = {}
    for path, leaf in params.items():
      if isinstance(leaf, difference.Difference):
        leaf = leaf.materialize(*map(resolve, leaf.needs))
      array = None if structured.is_structured(leaf) else self.array(path)
      if array is not None:
        known = host.contiguous(array)
        if measured := measure.beside(np.asarray(leaf), known):
          place = str(self.find(path))
          entry = entries.BaseArray.of(place, known, 0)
          of_known = functools.partial(self._crc32, place, known)
          stored[path] = measured._replace(known=entry, of_known=of_known)
    return stored


def _short(path: str) -> str:
  """Returns the name of a tensor without the prefixes that wrappers add."""
  wrappers = _WRAPPERS.match(path)
  return path if wrappers is None else path[wrappers.end() :]

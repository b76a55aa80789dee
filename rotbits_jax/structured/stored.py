"""What a file keeps of a structured leaf, checked as it is read.

A stranger may have written it. `from_stored` of a leaf takes what it needs by the
methods below, each of which raises ValueError, and then calls `finish`.
"""

from collections.abc import Mapping
import sys
from typing import Any

import numpy as np

_MOST = (1 << 31) - 1  # length of an axis
_GREATEST = sys.float_info.max


class Stored:
  """The settings and arrays of an unstacked leaf; each is taken once."""

  def __init__(self, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]):
    self._settings, self._arrays = dict(settings), dict(arrays)

  def setting(self, name: str) -> Any:
    """Any JSON value."""
    if name not in self._settings:
      raise ValueError(f'the setting {name!r} is missing')
    return self._settings.pop(name)

  def size(self, name: str, least: int = 0) -> int:
    """The length of an axis."""
    return self.integer(name, least, _MOST)

  def integer(self, name: str, least: int, most: int) -> int:
    """An integer within bounds."""
    value = self.setting(name)
    if type(value) is not int or not least <= value <= most:
      raise ValueError(
        f'{name} must be an integer from {least} to {most}, got {value!r:.40}'
      )
    return value

  def sizes(self, name: str, count: int | None = None) -> tuple[int, ...]:
    """Lengths of axes; so many, if a count is given."""
    values = self.setting(name)
    if not isinstance(values, list | tuple) or count not in (None, len(values)):
      raise ValueError(f'{name} must be a list of lengths, got {values!r:.40}')
    if not all(type(n) is int and 0 <= n <= _MOST for n in values):
      raise ValueError(f'{name} must be lengths of axes, got {values!r:.40}')
    return tuple(values)

  def number(self, name: str) -> float:
    """A finite number."""
    value = self.setting(name)
    if type(value) not in (int, float) or not -_GREATEST <= value <= _GREATEST:
      raise ValueError(f'{name} must be a finite number, got {value!r:.40}')
    return value

  def flag(self, name: str) -> bool:
    """True or false."""
    value = self.setting(name)
    if type(value) is not bool:
      raise ValueError(f'{name} must be true or false, got {value!r:.40}')
    return value

  def text(self, name: str) -> str:
    """A string."""
    value = self.setting(name)
    if not isinstance(value, str):
      raise ValueError(f'{name} must be a string, got {value!r:.40}')
    return value

  def array(self, name: str, axes: int, dtype: Any = None) -> np.ndarray:
    """An array of so many axes, of a dtype if one is given."""
    if name not in self._arrays:
      raise ValueError(f'the array {name!r} is missing')
    found = self._arrays.pop(name)
    if found.ndim != axes or (dtype is not None and found.dtype != dtype):
      raise ValueError(
        f'the array {name!r} must have {axes} axes'
        f'{"" if dtype is None else f" and be {np.dtype(dtype)}"}, '
        f'got {found.dtype} {found.shape}'
      )
    return found

  def array_of(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Takes an array of a shape and a dtype."""
    found = self.array(name, len(shape), dtype)
    if found.shape != shape:
      raise ValueError(f'the array {name!r} must have {shape=}, got {found.shape}')
    return found

  def __contains__(self, name: str) -> bool:
    """Whether an array is there, and not yet taken."""
    return name in self._arrays

  def finish(self) -> None:
    """Refuses settings and arrays that were not taken."""
    left = [*self._settings, *self._arrays]
    if left:
      raise ValueError(f'the leaf has {left[0][:40]!r}, which is not known')

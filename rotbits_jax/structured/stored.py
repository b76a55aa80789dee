"""Checks the settings and arrays of a structured leaf in a file.

A stranger may have written them. `from_stored` of a leaf takes each setting and array
with a method of `Stored`, which raises a ValueError if it is missing or wrong, and then
calls `finish`.
"""

from collections.abc import Mapping
import sys
from typing import Any

import numpy as np

MOST = (1 << 31) - 1
"""The greatest length of an axis of a structured leaf."""

_GREATEST = sys.float_info.max


class Stored:
  """The settings and arrays of an unstacked leaf. Each can be taken once."""

  def __init__(self, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]):
    self._settings, self._arrays = dict(settings), dict(arrays)

  def setting(self, name: str) -> Any:
    """Takes any JSON value."""
    if name not in self._settings:
      raise ValueError(f'the setting {name!r} is missing')
    return self._settings.pop(name)

  def size(self, name: str, least: int = 0) -> int:
    """Takes the length of an axis."""
    return self.integer(name, least, MOST)

  def integer(self, name: str, least: int, most: int) -> int:
    """Takes an integer from `least` to `most`."""
    value = self.setting(name)
    if type(value) is not int or not least <= value <= most:
      raise ValueError(
        f'{name} must be an integer from {least} to {most}, got {value!r:.40}'
      )
    return value

  def sizes(self, name: str, count: int | None = None) -> tuple[int, ...]:
    """Takes a list of lengths of axes, of `count` lengths if that is given."""
    values = self.setting(name)
    if not isinstance(values, list | tuple) or count not in (None, len(values)):
      raise ValueError(f'{name} must be a list of lengths, got {values!r:.40}')
    if not all(type(n) is int and 0 <= n <= MOST for n in values):
      raise ValueError(f'{name} must be lengths of axes, got {values!r:.40}')
    return tuple(values)

  def number(self, name: str) -> float:
    """Takes a finite number."""
    value = self.setting(name)
    if type(value) not in (int, float) or not -_GREATEST <= value <= _GREATEST:
      raise ValueError(f'{name} must be a finite number, got {value!r:.40}')
    return value

  def flag(self, name: str) -> bool:
    """Takes true or false."""
    value = self.setting(name)
    if type(value) is not bool:
      raise ValueError(f'{name} must be true or false, got {value!r:.40}')
    return value

  def text(self, name: str) -> str:
    """Takes a string."""
    value = self.setting(name)
    if not isinstance(value, str):
      raise ValueError(f'{name} must be a string, got {value!r:.40}')
    return value

  def array(self, name: str, axes: int, dtype: Any = None) -> np.ndarray:
    """Takes an array with a number of axes, and of a dtype if one is given."""
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
    """Returns whether there is an array of this name that is not taken yet."""
    return name in self._arrays

  def finish(self) -> None:
    """Raises an error if a setting or an array was not taken."""
    left = [*self._settings, *self._arrays]
    if left:
      raise ValueError(f'the leaf has {left[0][:40]!r}, which is not known')

"""Strict reading of a JSON object: every attribute is used, checked or refused.

An attribute is a key of the object with its value.
"""

import math
from typing import Any

from rotbits_jax.checkpoints import errors
from rotbits_jax.system import strict_json

_MISSING: Any = object()
_MOST_CONFIG = 1 << 20  # bytes; configs have a few thousand


def parse_json(content: bytes, where: str, *, most: int = _MOST_CONFIG) -> Any:
  """Parses a JSON file of a checkpoint.

  The limit bounds memory: the parsed value may take 30 times as much as its text.

  Args:
    content: of the file.
    where: name of the file in error messages.
    most: the greatest size of the content in bytes.

  Returns:
    The JSON value.

  Raises:
    UnsupportedError: if the content is too long, or is JSON with an infinite number or
      the like, see `strict_json.LimitError`. Configs of families that are not known
      have these.
    CheckpointError: if the content is not JSON.
  """
  if len(content) > most:
    raise errors.UnsupportedError(
      f'{where}: the JSON has {len(content)} bytes, more than {most}'
    )
  try:
    return strict_json.loads(content)
  except strict_json.LimitError as e:
    raise errors.UnsupportedError(f'{where}: {e}') from e
  except ValueError as e:
    raise errors.CheckpointError(f'{where}: {e}') from e


def parse_object(
  content: bytes, where: str, *, most: int = _MOST_CONFIG
) -> dict[str, Any]:
  """Parses a JSON file of a checkpoint, which must be an object; see `parse_json`.

  Raises:
    CheckpointError: as `parse_json`, or if the value is no object.
  """
  parsed = parse_json(content, where, most=most)
  if not isinstance(parsed, dict):
    raise errors.CheckpointError(f'{where}: expected an object')
  return parsed


class Attributes:
  """A JSON object that remembers which attributes have been read.

  `take` marks an attribute as read, as do the methods that check a value. `finish`
  refuses the object if an attribute was not read. To refuse is to raise a
  `CheckpointError`.

  Attributes:
    where: name of the object in error messages.
  """

  def __init__(self, values: Any, where: str):
    if not isinstance(values, dict):
      raise errors.CheckpointError(
        f'{where}: expected an object, got {errors.cut(repr(values))}'
      )
    self._values, self._left, self.where = values, set(values), where

  def __contains__(self, name: str) -> bool:
    return name in self._values

  def take(self, name: str, default: Any = _MISSING) -> Any:
    """Returns the value of an attribute, or the default if the attribute is absent."""
    self._left.discard(name)
    value = self._values.get(name, default)
    if value is _MISSING:
      raise errors.CheckpointError(f'{self.where}: {name} is missing')
    return value

  def demand(self, *names: str) -> None:
    """Refuses the object if one of these attributes is absent."""
    for name in names:
      self.take(name)

  def size(self, name: str, default: Any = _MISSING, *, most: int = 2**31 - 1) -> int:
    """Returns a positive integer; null stands for the default, if there is one."""
    value = self.take(name, default)
    if value is None and default is not _MISSING:
      value = default
    if type(value) is not int or not 0 < value <= most:
      self.refuse(name, value, f'an integer from 1 to {most}')
    return value

  def number(self, name: str, default: Any = _MISSING) -> float:
    """Returns a positive finite number."""
    value = self.take(name, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
      self.refuse(name, value, 'a positive number')
    return float(value)

  def boolean(self, name: str, default: Any = _MISSING) -> bool:
    value = self.take(name, default)
    if not isinstance(value, bool):
      self.refuse(name, value, 'true or false')
    return value

  def choice(self, name: str, choices: tuple[Any, ...], default: Any = _MISSING) -> Any:
    """Returns a string that must be one of the choices."""
    value = self.take(name, default)
    if not isinstance(value, str) or value not in choices:
      self.refuse(name, value, f'one of {", ".join(map(str, choices))}')
    return value

  def require(self, **values: Any) -> None:
    """Refuses the object if one of these attributes is present with another value."""
    for name, expected in values.items():
      value = self.take(name, expected)
      if value != expected or isinstance(value, bool) != isinstance(expected, bool):
        self.refuse(name, value, repr(expected))

  def finish(self, ignored: frozenset[str] = frozenset()) -> None:
    """Refuses the object if an attribute was neither read nor is among `ignored`."""
    for name in sorted(self._left - ignored):
      self.refuse(name, self._values[name], 'no attribute of this name')

  def refuse(self, name: str, value: Any, expected: str) -> None:
    """Raises a `CheckpointError` that names an attribute, its value and `expected`."""
    raise errors.CheckpointError(
      f'{self.where}: {errors.cut(name)} is {errors.cut(repr(value))}; '
      f'supported: {expected}'
    )

"""Reading of JSON objects from untrusted files. Every field is checked.

Each method of `Fields` takes one field out of the object. It raises a `ContainerError`
if the field is missing or has a wrong value.
"""

import math
from typing import Any

from rotbits_jax.file import container

_MOST = 1 << 53  # JSON parsers of some languages do not read greater integers exactly

_MOST_AXES, _MOST_NUMBERS = 32, 1 << 48  # of an array

_LONGEST_NAME = 255  # bytes, as file systems have it


def is_file_name(name: str) -> bool:
  """Returns whether a string names a file of a folder and can be printed."""
  return (
    name not in ('', '.', '..')
    and name.isprintable()
    and len(name.encode()) <= _LONGEST_NAME
    and not any(c in name for c in '/\\')
  )


def printable(text: str) -> str:
  """Returns text on one line, with escapes for what would steer a terminal."""
  if text.isprintable():
    return text
  escape = lambda c: c.encode('unicode_escape').decode()
  return ''.join(c if c.isprintable() else escape(c) for c in text)


class Fields:
  """The fields of one JSON object; `finish` refuses unknown fields.

  An error begins with the names in `where`, joined by slashes. They may be long, so
  they are not joined before there is an error.
  """

  def __init__(self, value: Any, *where: str):
    self._where = where
    if not isinstance(value, dict):
      raise container.ContainerError(f'{"/".join(where)}: not a JSON object')
    self._fields = dict(value)

  def take(self, name: str) -> Any:
    """Takes any JSON value."""
    if name not in self._fields:
      raise self.error(name, 'is missing')
    return self._fields.pop(name)

  def integer(self, name: str, most: int = _MOST) -> int:
    """Takes an integer from 0 to `most`."""
    value = self.take(name)
    if type(value) is not int or not 0 <= value <= most:
      raise self.error(name, f'must be an integer from 0 to {most}')
    return value

  def signed(self, name: str) -> int:
    """Takes an integer from -2^53 to 2^53."""
    value = self.take(name)
    if type(value) is not int or not -_MOST <= value <= _MOST:
      raise self.error(name, 'must be an integer')
    return value

  def number(self, name: str) -> float:
    """Takes a number of up to 53 bits before the point."""
    value = self.take(name)
    if type(value) not in (int, float) or not -_MOST <= value <= _MOST:
      raise self.error(name, f'must be a number from {-_MOST} to {_MOST}')
    return float(value)

  def text(self, name: str) -> str:
    """Takes a string."""
    value = self.take(name)
    if not isinstance(value, str):
      raise self.error(name, 'must be a string')
    return value

  def file_name(self, name: str) -> str:
    """Takes a string that names a file and leads nowhere else."""
    value = self.text(name)
    if not is_file_name(value):
      raise self.error(name, 'must be the name of a file')
    return value

  def items(self, name: str) -> list[Any]:
    """Takes a list."""
    value = self.take(name)
    if not isinstance(value, list):
      raise self.error(name, 'must be a list')
    return value

  def texts(self, name: str) -> tuple[str, ...]:
    """Takes a list of strings."""
    values = self.items(name)
    if not all(isinstance(value, str) for value in values):
      raise self.error(name, 'must be a list of strings')
    return tuple(values)

  def shape(self, name: str) -> tuple[int, ...]:
    """Takes the shape of an array."""
    values = self.items(name)
    if len(values) > _MOST_AXES or not all(type(n) is int and n >= 0 for n in values):
      raise self.error(
        name, f'must be the shape of an array of up to {_MOST_AXES} axes'
      )
    # NumPy multiplies the lengths of the other axes, even if one of them is 0.
    if math.prod(n for n in values if n) > _MOST_NUMBERS:
      raise self.error(name, 'must be the shape of a smaller array')
    return tuple(values)

  def object(self, name: str) -> dict[str, Any]:
    """Takes a JSON object with any fields."""
    value = self.take(name)
    if not isinstance(value, dict):
      raise self.error(name, 'must be a JSON object')
    return value

  def optional(self, name: str) -> bool:
    """Tells whether a field is present and not null. Takes the field if it is null."""
    if self._fields.get(name) is None:
      self._fields.pop(name, None)
      return False
    return True

  def finish(self) -> None:
    """Raises an error if a field has not been taken."""
    if self._fields:
      raise self.error(next(iter(self._fields)), 'is not known')

  def error(self, name: str, problem: str) -> container.ContainerError:
    """Returns the error for a field, for the caller to raise."""
    where = '/'.join(self._where)
    return container.ContainerError(f'{where}: the field {name!r} {problem}')

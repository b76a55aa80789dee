"""Fields of JSON objects that a stranger may have written, checked as they are read."""

from typing import Any

from rotbits_jax.file import container

_MOST = 1 << 53  # JSON has no greater integers in all languages


_LONGEST_NAME = 255  # bytes, as file systems have it


def is_file_name(name: str) -> bool:
  """Whether a string names a file of a folder on any system, and can be printed."""
  return (
    name not in ('', '.', '..')
    and name.isprintable()
    and len(name.encode()) <= _LONGEST_NAME
    and not any(c in name for c in '/\\:')
  )


def printable(text: str) -> str:
  """Text of a stranger on one line, without what would steer a terminal."""
  if text.isprintable():
    return text
  escape = lambda c: c.encode('unicode_escape').decode()
  return ''.join(c if c.isprintable() else escape(c) for c in text)


class Fields:
  """The fields of one JSON object; unknown ones are refused by `finish`."""

  def __init__(self, value: Any, where: str):
    if not isinstance(value, dict):
      raise container.ContainerError(f'{where}: not a JSON object')
    self._fields, self._where = dict(value), where

  def take(self, name: str) -> Any:
    """Any JSON value."""
    if name not in self._fields:
      raise self.error(name, 'is missing')
    return self._fields.pop(name)

  def integer(self, name: str, most: int = _MOST) -> int:
    """An integer from 0 to `most`."""
    value = self.take(name)
    if type(value) is not int or not 0 <= value <= most:
      raise self.error(name, f'must be an integer from 0 to {most}')
    return value

  def signed(self, name: str) -> int:
    """An integer of up to 53 bits."""
    value = self.take(name)
    if type(value) is not int or not -_MOST <= value <= _MOST:
      raise self.error(name, 'must be an integer')
    return value

  def number(self, name: str) -> float:
    """A number of up to 53 bits before the point."""
    value = self.take(name)
    if type(value) not in (int, float) or not -_MOST <= value <= _MOST:
      raise self.error(name, f'must be a number from {-_MOST} to {_MOST}')
    return float(value)

  def text(self, name: str) -> str:
    """A string."""
    value = self.take(name)
    if not isinstance(value, str):
      raise self.error(name, 'must be a string')
    return value

  def file_name(self, name: str) -> str:
    """A string that names a file, and leads nowhere else."""
    value = self.text(name)
    if not is_file_name(value):
      raise self.error(name, 'must be the name of a file')
    return value

  def items(self, name: str) -> list[Any]:
    """A list."""
    value = self.take(name)
    if not isinstance(value, list):
      raise self.error(name, 'must be a list')
    return value

  def texts(self, name: str) -> tuple[str, ...]:
    """A list of strings."""
    values = self.items(name)
    if not all(isinstance(value, str) for value in values):
      raise self.error(name, 'must be a list of strings')
    return tuple(values)

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of an array."""
    values = self.items(name)
    most = (1 << 31) - 1
    if len(values) > 8 or not all(type(n) is int and 0 <= n <= most for n in values):
      raise self.error(name, 'must be the shape of an array')
    return tuple(values)

  def object(self, name: str) -> dict[str, Any]:
    """A JSON object, whatever its fields."""
    value = self.take(name)
    if not isinstance(value, dict):
      raise self.error(name, 'must be a JSON object')
    return value

  def optional(self, name: str) -> bool:
    """Whether a field is there and is not null; a null is taken."""
    if self._fields.get(name) is None:
      self._fields.pop(name, None)
      return False
    return True

  def finish(self) -> None:
    """Refuses what is left."""
    if self._fields:
      raise self.error(next(iter(self._fields)), 'is not known')

  def error(self, name: str, problem: str) -> container.ContainerError:
    return container.ContainerError(f'{self._where}: the field {name[:40]!r} {problem}')

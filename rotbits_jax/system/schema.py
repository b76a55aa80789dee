"""Typed JSON: frozen dataclasses to JSON values and back, for untrusted input.

The annotations of a dataclass describe the values of its fields:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Stream:
      name: str
      nbytes: Size
      crc32: Crc32 | None = None

    stream = schema.load(Stream, {'name': 'embed', 'nbytes': 12}, 'manifest')
    schema.dump(stream) == {'name': 'embed', 'nbytes': 12}

`load` accepts the values of `dump`, and refuses everything else: missing and unknown
fields, wrong types, numbers out of range. It allocates nothing in proportion to a
number that it reads. A dataclass checks how its fields fit together in `__post_init__`,
which raises a ValueError.

Annotations may be `bool`, `int` (from 0 to 2^53, which every JSON parser reads exactly;
any integer if it has a check), `float` (finite), `str`, `Literal`, `T | None`,
`tuple[T, ...]`, `tuple[A, B]`, `dict[str, T]`, a dataclass, and `Any` for a JSON value.
An annotation `Annotated[T, check]` adds a check: a function that takes the value and
returns what it must be, or None if it is right. A field that equals its default is left
out. A dataclass with the attribute `as_list = True` becomes the list of its fields, all
of them, because many records of one type are short that way.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import types
import typing
from typing import Annotated, Any, Literal, TypeVar, Union

T = TypeVar('T')

_GREATEST = 1 << 53
_MOST_LEVELS = 8  # of folders
_SHOWN = 60  # characters of a wrong value in an error


class SchemaError(ValueError):
  """Raised for a JSON value that does not fit its dataclass. It names the field."""


def between(least: int, most: int) -> Callable[[Any], str | None]:
  """Returns the check of a number from `least` to `most`, both included."""
  return _check(lambda x: least <= x <= most, f'must be from {least} to {most}')


def _check(fits: Callable[[Any], bool], expected: str) -> Callable[[Any], str | None]:
  """Returns the check that a function makes of a value."""
  return lambda value: None if fits(value) else expected


def is_file_name(name: str) -> bool:
  """Returns whether a string names a file in a folder and can be printed."""
  return (
    name not in ('', '.', '..')
    and name.isprintable()
    and len(name.encode()) <= 255  # the limit of file systems
    and not any(c in name for c in '/\\')
  )


def is_relative_path(name: str) -> bool:
  """Returns whether a string names a file in a folder or in its sub-folders.

  >>> is_relative_path('1_Pooling/config.json'), is_relative_path('../config.json')
  (True, False)
  """
  names = name.split('/')
  return len(names) <= _MOST_LEVELS and all(map(is_file_name, names))


def _is_path(value: str) -> bool:
  """Returns whether a string is the path of a parameter."""
  keys = value.split('/')
  return all(keys) and len(keys) <= 64  # trees are walked recursively


Size = Annotated[int, between(0, 1 << 48)]
"""The length of an axis, a count of elements, or a number of bytes."""

Crc32 = Annotated[int, between(0, 0xFFFFFFFF)]
FileName = Annotated[str, _check(is_file_name, 'must be the name of a file')]
Path = Annotated[str, _check(_is_path, 'must be up to 64 keys joined by slashes')]
"""The path of a parameter: keys joined by slashes."""

Integer = Annotated[int, between(-_GREATEST, _GREATEST)]
"""An integer from -2^53 to 2^53."""


def load(cls: type[T], value: Any, where: str = '') -> T:
  """Makes a dataclass from a JSON value: the inverse of `dump`.

  Args:
    cls: the dataclass.
    value: the JSON value, as `strict_json.loads` returns it.
    where: name of the value, for error messages.

  Returns:
    The dataclass.

  Raises:
    SchemaError: if the value does not fit. The message begins with `where` and the
      field.
  """
  return typing.cast(T, _load(cls, value, where))


def dump(record: Any) -> Any:
  """Returns a dataclass, or a value that one may hold, as a JSON value."""
  if dataclasses.is_dataclass(record):
    values = {x.name: getattr(record, x.name) for x in dataclasses.fields(record)}
    if getattr(record, 'as_list', False):
      return [dump(x) for x in values.values()]
    cls: Any = type(record)
    defaults = _fields(cls)
    return {
      name: dump(x) for name, x in values.items() if x != _default(defaults[name][0])
    }
  if isinstance(record, list | tuple):
    return [dump(x) for x in record]
  if isinstance(record, dict):
    return {key: dump(x) for key, x in record.items()}
  return record


_MISSING = dataclasses.MISSING


def _default(field: 'dataclasses.Field[Any]') -> Any:
  """Returns the default of a field, or `_MISSING`."""
  factory = field.default_factory
  return field.default if factory is _MISSING else factory()


@functools.cache
def _fields(cls: Any) -> dict[str, tuple['dataclasses.Field[Any]', Any]]:
  """Returns the fields of a dataclass, with their annotations, by name."""
  hints = typing.get_type_hints(cls, include_extras=True)
  return {x.name: (x, hints[x.name]) for x in dataclasses.fields(cls)}


@functools.cache
def _split(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
  """Returns an annotation without its arguments, and these."""
  origin = typing.get_origin(annotation)
  if origin is types.UnionType:
    origin = Union
  return origin or annotation, typing.get_args(annotation)


def _error(where: str, expected: str, value: Any = _MISSING) -> SchemaError:
  """Returns the error of a value."""
  got = '' if value is _MISSING else f', got {value!r:.{_SHOWN}}'
  return SchemaError(f'{where}: {expected}{got}' if where else f'{expected}{got}')


def _within(where: str, name: Any) -> str:
  """Returns the name of a value within another one."""
  return f'{where}/{name}' if where else str(name)


def _load(annotation: Any, value: Any, where: str) -> Any:
  """Returns a JSON value as a value of an annotation."""
  origin, args = _split(annotation)
  if origin is Annotated:
    # A number with a check may be any integer.
    is_number = args[0] is int and type(value) is int
    loaded = value if is_number else _load(args[0], value, where)
    for check in args[1:]:
      if (expected := check(loaded)) is not None:
        raise _error(where, expected, value)
    return loaded
  if origin in _SCALARS:
    expected, of_type = _SCALARS[origin]
    if not of_type(value):
      raise _error(where, expected, value)
    return float(value) if origin is float else value
  if origin is tuple:
    return _load_tuple(args, value, where)
  if origin is dict:
    if not isinstance(value, dict):
      raise _error(where, 'must be an object', value)
    return {key: _load(args[1], x, _within(where, key)) for key, x in value.items()}
  if origin is Union:
    return None if value is None else _load(args[0], value, where)
  if origin is Literal:
    if not any(type(value) is type(x) and value == x for x in args):
      raise _error(where, f'must be one of {", ".join(map(str, args))}', value)
    return value
  return value if origin is Any else _load_dataclass(origin, value, where)


# What a value must be, and whether it is. True is an int for isinstance.
_SCALARS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
  bool: ('must be true or false', lambda x: type(x) is bool),
  str: ('must be a string', lambda x: type(x) is str),
  int: (
    'must be an integer from 0 to 2^53',
    lambda x: type(x) is int and 0 <= x <= _GREATEST,
  ),
  float: (
    'must be a finite number',
    lambda x: type(x) in (int, float) and math.isfinite(x),
  ),
}


def _load_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
  """Returns a JSON list as a tuple."""
  if not isinstance(value, list | tuple):
    raise _error(where, 'must be a list', value)
  annotations = args[:1] * len(value) if args[-1] is ... else args
  if len(annotations) != len(value):
    raise _error(where, f'must be a list of {len(annotations)} values', value)
  pairs = enumerate(zip(annotations, value, strict=True))
  return tuple(_load(each, x, _within(where, i)) for i, (each, x) in pairs)


def _load_dataclass(cls: Any, value: Any, where: str) -> Any:
  """Returns a JSON object, or a list, as a dataclass."""
  fields = _fields(cls)
  if getattr(cls, 'as_list', False):
    if not isinstance(value, list | tuple) or len(value) != len(fields):
      raise _error(where, f'must be a list of {len(fields)} values', value)
    value = dict(zip(fields, value, strict=True))
  if not isinstance(value, dict):
    raise _error(where, 'must be an object', value)
  if unknown := value.keys() - fields.keys():
    raise _error(_within(where, f'{min(unknown):.40}'), 'is not known')
  loaded = {}
  for name, (field, annotation) in fields.items():
    if name in value:
      loaded[name] = _load(annotation, value[name], _within(where, name))
    elif _default(field) is _MISSING:
      raise _error(_within(where, name), 'is missing')
  try:
    return cls(**loaded)
  except SchemaError:
    raise
  except ValueError as error:
    raise _error(where, str(error)) from error

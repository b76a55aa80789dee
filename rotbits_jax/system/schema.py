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
of them, because many records of one kind are short that way.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import types
import typing
from typing import Annotated, Any, Literal, TypeVar, Union

T = TypeVar('T')
_Parser = Callable[[Any, str], Any]

_GREATEST = 1 << 53
_MOST_LEVELS = 8  # of folders
_SHOWN = 60  # characters of a wrong value in an error


class SchemaError(ValueError):
  """Raised for a JSON value that does not fit its dataclass. It names the field."""


def between(least: int, most: int) -> Callable[[Any], str | None]:
  """Returns the check of a number from `least` to `most`, both included."""
  expected = f'must be from {least} to {most}'
  return lambda value: None if least <= value <= most else expected


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
  parts = name.split('/')
  return len(parts) <= _MOST_LEVELS and all(map(is_file_name, parts))


def _file_name(value: Any) -> str | None:
  return None if is_file_name(value) else 'must be the name of a file'


def _relative_path(value: Any) -> str | None:
  return None if is_relative_path(value) else 'must be the path of a file in a folder'


def _path(value: Any) -> str | None:
  parts = value.split('/')
  is_path = all(parts) and len(parts) <= 64  # trees are walked recursively
  return None if is_path else 'must be up to 64 keys joined by slashes'


Size = Annotated[int, between(0, 1 << 48)]
"""The length of an axis, a count of elements, or a number of bytes."""

Crc32 = Annotated[int, between(0, 0xFFFFFFFF)]
FileName = Annotated[str, _file_name]
RelativePath = Annotated[str, _relative_path]
Path = Annotated[str, _path]
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
  kind: Any = cls
  return typing.cast(T, _parser(kind)(value, where))


def dump(record: Any) -> Any:
  """Returns a dataclass, or a value that one may hold, as a JSON value."""
  if dataclasses.is_dataclass(record):
    fields = dataclasses.fields(record)
    if getattr(record, 'as_list', False):
      return [dump(getattr(record, field.name)) for field in fields]
    found = {field.name: getattr(record, field.name) for field in fields}
    return {
      field.name: dump(found[field.name])
      for field in fields
      if found[field.name] != _default(field)
    }
  if isinstance(record, list | tuple):
    return [dump(x) for x in record]
  if isinstance(record, dict):
    return {key: dump(x) for key, x in record.items()}
  return record


_NONE: Any = object()


def _default(field: dataclasses.Field[Any]) -> Any:
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return _NONE if field.default is dataclasses.MISSING else field.default


def _refuse(where: str, expected: str, value: Any = _NONE) -> typing.NoReturn:
  got = '' if value is _NONE else f', got {value!r:.{_SHOWN}}'
  raise SchemaError(f'{where}: {expected}{got}' if where else f'{expected}{got}')


def _within(where: str, name: Any) -> str:
  return f'{where}/{name}' if where else str(name)


@functools.cache
def _parser(kind: Any) -> _Parser:
  """Returns the function that checks and converts a value of an annotation."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if kind is Any:
    return lambda value, where: value
  if origin is Annotated:
    return _checked(args[0], args[1:])
  if origin is Literal:
    return _literal(args)
  if origin in (Union, types.UnionType):
    return _optional(args)
  if origin is tuple:
    return _variadic(args[0]) if args[-1] is ... else _fixed(args)
  if origin is dict:
    return _mapping(args[1])
  if dataclasses.is_dataclass(kind):
    return _dataclass(kind)
  return _PLAIN[kind]


def _plain(
  types_: tuple[type, ...], expected: str, fits: Callable[[Any], bool]
) -> _Parser:
  def parse(value: Any, where: str) -> Any:
    # The type itself, because True is an int for isinstance.
    if type(value) not in types_ or not fits(value):
      _refuse(where, expected, value)
    return value

  return parse


_PLAIN: dict[Any, _Parser] = {
  bool: _plain((bool,), 'must be true or false', lambda x: True),
  str: _plain((str,), 'must be a string', lambda x: True),
  int: _plain(
    (int,), 'must be an integer from 0 to 2^53', lambda x: 0 <= x <= _GREATEST
  ),
}
_INTEGER = _plain((int,), 'must be an integer', lambda x: True)


def _float(value: Any, where: str) -> float:
  if type(value) not in (int, float) or not math.isfinite(value):
    _refuse(where, 'must be a finite number', value)
  return float(value)


_PLAIN[float] = _float


def _checked(kind: Any, checks: tuple[Any, ...]) -> _Parser:
  parse = _INTEGER if kind is int else _parser(kind)

  def parse_checked(value: Any, where: str) -> Any:
    found = parse(value, where)
    for check in checks:
      if (expected := check(found)) is not None:
        _refuse(where, expected, value)
    return found

  return parse_checked


def _literal(choices: tuple[Any, ...]) -> _Parser:
  def parse(value: Any, where: str) -> Any:
    if not any(type(value) is type(x) and value == x for x in choices):
      _refuse(where, f'must be one of {", ".join(map(str, choices))}', value)
    return value

  return parse


def _optional(kinds: tuple[Any, ...]) -> _Parser:
  (kind,) = (x for x in kinds if x is not type(None))
  parse = _parser(kind)
  return lambda value, where: None if value is None else parse(value, where)


def _variadic(kind: Any) -> _Parser:
  parse = _parser(kind)

  def parse_all(value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
      _refuse(where, 'must be a list', value)
    return tuple(parse(x, _within(where, i)) for i, x in enumerate(value))

  return parse_all


def _fixed(kinds: tuple[Any, ...]) -> _Parser:
  parsers = [_parser(kind) for kind in kinds]

  def parse_each(value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or len(value) != len(parsers):
      _refuse(where, f'must be a list of {len(parsers)} values', value)
    pairs = enumerate(zip(parsers, value, strict=True))
    return tuple(parse(x, _within(where, i)) for i, (parse, x) in pairs)

  return parse_each


def _mapping(kind: Any) -> _Parser:
  parse = _parser(kind)

  def parse_values(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
      _refuse(where, 'must be an object', value)
    return {key: parse(x, _within(where, key)) for key, x in value.items()}

  return parse_values


def _dataclass(cls: Any) -> _Parser:
  fields = {field.name: field for field in dataclasses.fields(cls)}
  hints = typing.get_type_hints(cls, include_extras=True)
  as_list = getattr(cls, 'as_list', False)

  @functools.cache  # at the first value, because classes may refer to each other
  def parsers() -> dict[str, _Parser]:
    return {name: _parser(hints[name]) for name in fields}

  def parse(value: Any, where: str) -> Any:
    if as_list:
      if not isinstance(value, list | tuple) or len(value) != len(fields):
        _refuse(where, f'must be a list of {len(fields)} values', value)
      value = dict(zip(fields, value, strict=True))
    if not isinstance(value, dict):
      _refuse(where, 'must be an object', value)
    for name in value:
      if name not in fields:
        _refuse(_within(where, f'{name:.40}'), 'is not known')
    found = {}
    for name, field in fields.items():
      if name in value:
        found[name] = parsers()[name](value[name], _within(where, name))
      elif (default := _default(field)) is _NONE:
        _refuse(_within(where, name), 'is missing')
      else:
        found[name] = default
    try:
      return cls(**found)
    except SchemaError:
      raise
    except ValueError as error:
      raise SchemaError(f'{where}: {error}' if where else str(error)) from error

  return parse

"""JSON of strangers: text to values, values to typed objects, and objects back.

    class Stream(schema.Object):
      name: str
      nbytes: schema.Size
      crc32: schema.Crc32 | None = None

    stream = schema.load(Stream, schema.parse(b'{"name":"embed","nbytes":12}'))
    schema.dump(stream) == {'name': 'embed', 'nbytes': 12}

`msgspec` refuses wrong types, missing and unknown fields, and numbers out of range. How
fields fit together is checked in `__post_init__`. A field that equals its default is
left out. Whatever is refused raises a ValueError.
"""

from collections.abc import Iterable
import json
import math
import re
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec

T = TypeVar('T')

_MOST_DEPTH = 64  # of nested lists and objects, because others walk them recursively
_MOST_LEVELS = 8  # of folders


class LimitError(ValueError):
  """Raised for JSON that `json.loads` reads, and `parse` does not."""


class Object(
  msgspec.Struct,
  frozen=True,
  kw_only=True,
  forbid_unknown_fields=True,
  omit_defaults=True,
  dict=True,  # for `functools.cached_property`
):
  """An object of JSON."""


class Row(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
  """A list of JSON with the values of all fields: short, for many of a type."""


def between(least: int, most: int) -> msgspec.Meta:
  """Returns the annotation of an integer from `least` to `most`, both included."""
  return msgspec.Meta(ge=least, le=most)


def one_of(names: Iterable[str]) -> msgspec.Meta:
  """Returns the annotation of a string that is one of these."""
  return msgspec.Meta(pattern=rf'\A(?:{"|".join(map(re.escape, names))})\Z')


Size = Annotated[int, between(0, 1 << 48)]
"""The length of an axis, a count of elements, or a number of bytes."""

Integer = Annotated[int, between(-(1 << 53), 1 << 53)]
"""An integer that every parser of JSON reads exactly."""

Crc32 = Annotated[int, between(0, 0xFFFFFFFF)]

Path = Annotated[str, msgspec.Meta(pattern=r'\A[^/]+(?:/[^/]+){0,63}\Z')]
"""The path of a parameter: up to 64 keys joined by slashes."""

Scalar = None | bool | Integer | float | str
"""A value of JSON that holds no others."""


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


def load(cls: type[T], value: Any, where: str = '') -> T:
  """Makes an object from a JSON value, which errors call `where`."""
  try:
    return msgspec.convert(value, cls)
  except msgspec.ValidationError as error:
    raise ValueError(f'{where}: {error}' if where else str(error)) from error


def dump(record: Any) -> Any:
  """Returns an object, or a value that one may hold, as a JSON value."""
  return msgspec.to_builtins(record)


def parse(data: bytes | str) -> Any:
  """Parses a JSON text of a stranger; bytes are UTF-8.

  Refuses what `json.loads` accepts beyond the standard, or what others cannot handle:
  infinite numbers, repeated keys, lone surrogates and deep nesting.
  """
  try:
    text = data if isinstance(data, str) else data.decode()
    value = json.loads(
      text,
      parse_constant=_refuse_constant,
      parse_float=_finite,
      object_pairs_hook=_object,
    )
    if '\\u' in text:  # else a surrogate is none of UTF-8
      json.dumps(value, ensure_ascii=False).encode()
  except (UnicodeEncodeError, RecursionError) as error:
    raise LimitError(f'not JSON: {error}') from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f'not JSON: {error}') from None
  level = [value]
  for _ in range(_MOST_DEPTH):
    level = [
      child
      for x in level
      if isinstance(x, list | dict)
      for child in (x.values() if isinstance(x, dict) else x)
    ]
  if any(isinstance(x, list | dict) for x in level):
    raise LimitError('not JSON: it is nested too deeply')
  return value


def _refuse_constant(constant: str) -> NoReturn:
  """Refuses NaN and infinity."""
  raise LimitError(f'the number {constant} is not JSON')


def _finite(text: str) -> float:
  """Returns a number, unless it overflows."""
  if not math.isfinite(number := float(text)):
    raise LimitError(f'the number {text[:20]} is too large')
  return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns an object whose keys differ."""
  value = dict(pairs)
  if len(value) < len(pairs):
    raise LimitError('a key is repeated')
  return value

"""JSON of strangers: text to values, values to typed objects, and objects back.

`msgspec` refuses wrong types, missing and unknown fields, and numbers out of range. How
fields fit together is checked in `__post_init__`. A field that equals its default is
left out. Whatever is refused raises a ValueError.
"""

from collections.abc import Iterable
import json
import re
from typing import Annotated, Any, TypeVar, dataclass_transform

import msgspec

T = TypeVar('T')

_MOST_DEPTH = 64  # of nested lists and objects, because others walk them recursively
_MOST_LEVELS = 8  # of folders


@dataclass_transform(
  kw_only_default=True, frozen_default=True, field_specifiers=(msgspec.field,)
)
class Object(
  msgspec.Struct,
  frozen=True,
  kw_only=True,
  forbid_unknown_fields=True,
  omit_defaults=True,
  dict=True,  # for `functools.cached_property`
):
  """An object of JSON."""


@dataclass_transform(frozen_default=True)
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
  """Returns whether a string names a file in a folder or in its sub-folders."""
  names = name.split('/')
  return len(names) <= _MOST_LEVELS and all(map(is_file_name, names))


def load(cls: type[T], value: Any, where: str = '') -> T:
  """Makes an object from a JSON value, which errors call `where`."""
  try:
    return msgspec.convert(value, cls)
  except msgspec.ValidationError as error:
    raise ValueError(f'{where}: {error}' if where else str(error)) from error


def decode(cls: type[T], data: bytes) -> T:
  """Makes an object from a JSON text in UTF-8 without repeated keys."""
  try:
    value = msgspec.json.decode(data, type=cls)
    json.loads(data, object_pairs_hook=_object)  # msgspec takes the last of equal keys
  except (msgspec.DecodeError, RecursionError) as error:
    raise ValueError(str(error)) from error
  return value


dump = msgspec.to_builtins
"""Returns an object, or a value that one may hold, as a JSON value."""


def parse(data: bytes | str) -> Any:
  """Parses a JSON text in UTF-8 without repeated keys and deeply nested values."""
  try:
    value = msgspec.json.decode(data)
    json.loads(data, object_pairs_hook=_object)  # msgspec takes the last of equal keys
  except (msgspec.DecodeError, RecursionError) as error:
    raise ValueError(f'not JSON: {error}') from None
  level = [value]
  for _ in range(_MOST_DEPTH):
    nodes = (x for x in level if isinstance(x, list | dict))
    level = [y for x in nodes for y in (x.values() if isinstance(x, dict) else x)]
  if any(isinstance(x, list | dict) for x in level):
    raise ValueError('not JSON: it is nested too deeply')
  return value


def _object(pairs: list[tuple[str, Any]]) -> None:
  """Refuses an object with two keys that are equal."""
  if len(dict(pairs)) < len(pairs):
    raise ValueError('not JSON: a key is repeated')

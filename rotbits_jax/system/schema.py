"""JSON of untrusted input: text to values, values to typed objects, and back.

`msgspec` refuses wrong types, missing and unknown fields, and numbers out of range, by
a ValueError. `__post_init__` checks how fields fit; defaults are left out.
"""

from collections.abc import Iterable
import json
import re
from typing import Annotated, Any, TypeVar, dataclass_transform

import msgspec

T = TypeVar('T')


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


def load(cls: type[T], value: Any, where: str = '') -> T:
  """Makes an object from a JSON value, which errors call `where`."""
  try:
    return msgspec.convert(value, cls)
  except msgspec.ValidationError as error:
    raise ValueError(f'{where}: {error}' if where else str(error)) from error


dump = msgspec.to_builtins
"""Returns an object, or a value that one may hold, as a JSON value."""


def decode(cls: Any, data: bytes | str) -> Any:
  """Makes an object, or a value, from a JSON text in UTF-8 without repeated keys."""
  try:
    value = msgspec.json.decode(data, type=cls)
    # msgspec takes the last of equal keys, but never writes two. To look takes longer.
    if msgspec.json.encode(value) != data.strip():
      json.loads(data, object_pairs_hook=_object)
  except (msgspec.DecodeError, ValueError, RecursionError) as error:
    raise ValueError(f'JSON: {error}') from None
  return value


def _object(pairs: list[tuple[str, Any]]) -> None:
  """Refuses an object with two keys that are equal."""
  if len(dict(pairs)) < len(pairs):
    raise ValueError('a key is repeated')

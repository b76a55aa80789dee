"""Parses JSON that may be untrusted.

`json.loads` accepts more than this package can handle: NaN and infinity, numbers that
overflow to infinity, repeated keys, lone surrogates, integers of any size, and deep
nesting, which makes recursive functions fail. Here all of these are errors.
"""

import collections
import json
import math
from typing import Any, NoReturn

MAX_DEPTH = 64
"""How deep lists and objects may nest."""

_MOST_DIGITS = 19  # of an integer; about 64 bits


class LimitError(ValueError):
  """The text is JSON for `json.loads`, but not within the limits of this module."""


def loads(data: bytes | str) -> Any:
  """Parses a JSON text; bytes are UTF-8.

  Raises:
    LimitError: if the text is JSON for `json.loads`, but not within the limits.
    ValueError: if the text is not JSON.
  """
  try:
    text = data if isinstance(data, str) else data.decode()
    value = json.loads(
      text,
      parse_constant=_refuse_constant,
      parse_float=_finite,
      parse_int=_integer,
      object_pairs_hook=_object,
    )
    if '\\u' in text:  # else a surrogate is none of UTF-8
      json.dumps(value, ensure_ascii=False).encode()
  except RecursionError:
    raise LimitError('not JSON: it is nested too deeply') from None
  except UnicodeDecodeError as error:
    raise ValueError(f'not JSON: {error.reason}') from None
  except UnicodeEncodeError:
    raise LimitError('not JSON: a lone surrogate') from None
  except json.JSONDecodeError as error:
    raise ValueError(f'not JSON: {error}') from None
  level = [value]
  for _ in range(MAX_DEPTH):
    nodes = [x.values() if isinstance(x, dict) else x for x in level if _nests(x)]
    level = [child for node in nodes for child in node]
  if any(map(_nests, level)):
    raise LimitError('not JSON: it is nested too deeply')
  return value


def _nests(value: Any) -> bool:
  """Returns whether a value is a list or an object."""
  return isinstance(value, list | dict)


def _refuse_constant(constant: str) -> NoReturn:
  """Refuses NaN and infinity."""
  raise LimitError(f'the number {constant} is not JSON')


def _finite(text: str) -> float:
  """Returns a number, unless it overflows."""
  number = float(text)
  if not math.isfinite(number):
    raise LimitError(f'the number {text[:20]} is too large')
  return number


def _integer(text: str) -> int:
  """Returns an integer of few digits; `int` takes long for many."""
  if len(text.lstrip('-')) > _MOST_DIGITS:
    raise LimitError(f'the integer {text[:20]}... is too large')
  return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns an object whose keys differ."""
  value = dict(pairs)
  if len(value) < len(pairs):
    (key, _), *_ = collections.Counter(key for key, _ in pairs).most_common(1)
    raise LimitError(f'the key {key[:40]!r} is repeated')
  return value

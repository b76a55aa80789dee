"""Parses JSON that may be untrusted.

`json.loads` accepts more than this package can handle: NaN and infinity, numbers that
overflow to infinity, repeated keys, lone surrogates, integers of any size, and deep
nesting, which makes recursive functions fail. Here all of these are errors.
"""

import json
import math
from typing import Any, NoReturn

MAX_DEPTH = 64
"""How deep lists and objects may nest."""

_MOST_DIGITS = 19  # of an integer; about 64 bits


class LimitError(ValueError):
  """The text is JSON for `json.loads`, but not within the limits of this module."""


def loads(data: bytes | str) -> Any:
  """Parses a JSON text.

  Args:
    data: the text; bytes are UTF-8.

  Returns:
    The value. Numbers are finite, and lists and objects nest at most `MAX_DEPTH` deep.

  Raises:
    LimitError: if the text is JSON, but not within these limits.
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
  except RecursionError:
    raise LimitError('not JSON: it is nested too deeply') from None
  except UnicodeDecodeError as error:
    raise ValueError(f'not JSON: {error.reason}') from None
  except json.JSONDecodeError as error:
    raise ValueError(f'not JSON: {error}') from None
  _check(value)
  return value


def _refuse_constant(constant: str) -> NoReturn:
  raise LimitError(f'the number {constant} is not JSON')


def _finite(text: str) -> float:
  number = float(text)
  if not math.isfinite(number):
    raise LimitError(f'the number {text[:20]} is too large')
  return number


def _integer(text: str) -> int:
  if len(text.lstrip('-')) > _MOST_DIGITS:
    raise LimitError(f'the integer {text[:20]}... is too large')
  return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for key, value in pairs:
    if key in found:
      raise LimitError(f'the key {key[:40]!r} is repeated')
    found[key] = value
  return found


def _check(value: Any) -> None:
  """Refuses nesting beyond `MAX_DEPTH` and lone surrogates, without recursion."""
  level = [value]
  for _ in range(MAX_DEPTH + 1):
    texts = [x for x in level if isinstance(x, str)]
    lists = [x for x in level if isinstance(x, list)]
    objects = [x for x in level if isinstance(x, dict)]
    for text in texts:
      try:
        text.encode()
      except UnicodeEncodeError:
        raise LimitError('not JSON: a lone surrogate') from None
    level = [item for x in lists for item in x]
    level += [item for x in objects for item in x.values()]
    level += [key for x in objects for key in x]
    if not lists and not objects:
      return
  raise LimitError('not JSON: it is nested too deeply')

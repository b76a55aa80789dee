"""Damages small containers in every way, and counts how reading them ends.

Every byte is flipped, every truncation made, streams are exchanged with those of
another file or with each other, and every field of the manifest is edited, with the
checksums that it then must have. Reading ends in a `ContainerError` that names the
stream, or, if a field says nothing about the numbers, in the same numbers. Anything
else is a failure. `tests/sweep_test.py` runs it.
"""

import collections
from collections.abc import Callable, Iterator
import copy
import functools
import itertools
import operator
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np

from fuzz import containers
import rotbits_jax
from rotbits_jax import models
from rotbits_jax import structured

_VALUES: tuple[Any, ...] = (
  *(None, True, -1, 0, 1 << 40, 1 << 62, 1e300, 'x', '../x', [], [[]], {}, {'x': 1}),
)
_DELETED: Any = object()


class Case(NamedTuple):
  """A damaged container."""

  damage: str  # 'flip', 'truncation', 'exchange' or 'field'
  where: str
  named: str  # what the error has to name; empty for anything
  make: Callable[[], bytes]


def cases(data: bytes, other: bytes) -> Iterator[Case]:
  """Yields all damage of a container, given another of the same config and preset."""
  for name, start, stop in containers.sections(data):
    for place in range(start, stop):
      where = f'byte {place} of {name or "the header"}'
      yield Case('flip', where, name, functools.partial(_flipped, data, place))
  for size in range(len(data)):
    yield Case('truncation', f'{size} bytes', '', functools.partial(bytes, data[:size]))
  streams, manifest = containers.unpack(data)
  their_streams, _ = containers.unpack(other)
  for name, stream in streams.items():
    if their_streams[name] != stream:
      # The streams of one message are read together, so any may be named.
      named = '' if manifest.get('message') else name
      changed = streams | {name: their_streams[name]}
      yield from _exchanges(changed, manifest, name, named)
  for a, b in itertools.combinations(streams, 2):
    if streams[a] != streams[b]:
      swapped = streams | {a: streams[b], b: streams[a]}
      yield from _exchanges(swapped, manifest, f'{a} and {b}', '')
  for path in list(_paths(manifest)):
    for value in _other_values(_at(manifest, path)):
      change = 'deleted' if value is _DELETED else f'is {value!r:.40}'
      make = functools.partial(_edited, streams, manifest, path, value)
      yield Case('field', f'{"/".join(map(str, path))} {change}', '', make)


def _flipped(data: bytes, place: int) -> bytes:
  """Returns a container with one bit of a byte flipped."""
  changed = bytes([data[place] ^ 1 << place % 8])
  return data[:place] + changed + data[place + 1 :]


def _exchanges(
  streams: dict[str, bytes], manifest: containers.Json, where: str, named: str
) -> Iterator[Case]:
  """Yields a container of other streams, without and with the right checksums."""
  for value in (manifest, containers.sealed(streams, copy.deepcopy(manifest))):
    make = functools.partial(containers.pack, streams, containers.to_json(value))
    yield Case('exchange', where, named, make)


def _edited(
  streams: dict[str, bytes], manifest: containers.Json, path: tuple[Any, ...], new: Any
) -> bytes:
  """Returns a container whose manifest has another value at a path."""
  edited = copy.deepcopy(manifest)
  parent = _at(edited, path[:-1])
  parent[path[-1]] = new
  if new is _DELETED:
    del parent[path[-1]]
  return containers.pack(streams, containers.to_json(edited))


def _paths(value: Any) -> Iterator[tuple[Any, ...]]:
  """Yields the keys that lead to each node of a JSON value."""
  if isinstance(value, dict | list):
    for key in value if isinstance(value, dict) else range(len(value)):
      yield (key,)
      yield from ((key, *path) for path in _paths(value[key]))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
  """Returns a node of a JSON value."""
  return functools.reduce(operator.getitem, path, value)


def _other_values(old: Any) -> Iterator[Any]:
  """Yields values to put in the place of one; those near it, too."""
  yield _DELETED
  values = list(_VALUES)
  if isinstance(old, dict):
    values.append(old | {'unknown': 1})
  if type(old) is int:
    values += [old + 1, old - 1, 2 * old]
  if isinstance(old, list):
    values += [old[:-1], [*old, *old[-1:]], old[::-1]]
  yield from (new for new in values if new != old or type(new) is not type(old))


def numbers(data: rotbits_jax.file.Readable) -> dict[str, tuple[str, bytes]]:
  """Returns the content of a container: the bits of all arrays, and the files."""
  reader = rotbits_jax.file.Reader(data)
  if reader.is_plain:  # as the command writes them
    with tempfile.TemporaryDirectory() as folder:
      rotbits_jax.decode_to_directory(data, folder)
  decoded = reader.content()
  content = {name: ('', text) for name, text in reader.files().items()}
  if isinstance(decoded, models.Model):
    layers = {f'layers.{i}': layer for i, layer in enumerate(decoded.layers())}
    decoded = decoded.outer() | layers
  for path, leaf in structured.expand(structured.flatten(decoded)).items():
    array = np.asarray(leaf)
    content[path] = f'{array.dtype} {array.shape}', array.tobytes()
  return content


def sweep(
  data: bytes, other: bytes, *, stride: int = 1, report: Callable[[str], None] = print
) -> collections.Counter[tuple[str, str]]:
  """Reads one of `stride` damaged containers; `other` has the same config and preset.

  Returns:
    How many cases of each type of damage ended as 'refused', 'same' or 'failed'.
  """
  expected, counts = numbers(data), collections.Counter[tuple[str, str]]()
  for i, case in enumerate(cases(data, other)):
    if i % stride and case.damage != 'exchange':
      continue
    try:
      is_same, problem = numbers(case.make()) == expected, ''
      if not (is_same and case.damage == 'field'):
        problem = 'the same numbers' if is_same else 'other numbers, and no error'
      end = 'same'
    except rotbits_jax.ContainerError as error:
      end, is_named = 'refused', case.named in str(error)
      problem = '' if is_named else f'the error does not name {case.named}: {error}'
    except Exception as error:
      problem = f'{type(error).__name__}: {error}'
    if problem:
      end = 'failed'
      report(f'{case.damage}, {case.where}: {problem}')
    counts[case.damage, end] += 1
    if not i % 2000:
      jax.clear_caches()  # programs of shapes that were edited
  return counts

"""Damages small containers in every way, and counts how reading them ends.

  python -m fuzz.sweep [--presets=free,exact] [--stride=1] [--results=RESULTS.md]

For each preset, and for plain tensors: every byte flipped, every truncation, sections
swapped, streams exchanged with those of another file, and every field of the manifest
edited; the latter two with and without the checksums that the manifest then must have.
Reading ends in a `ContainerError` that names the stream, or, if the field says nothing
about the numbers, in the same numbers. Anything else is a failure, and the exit code is
1.
"""

from collections.abc import Callable, Iterator
import copy
import functools
import itertools
import struct
import sys
import tempfile
import time
from typing import Any, NamedTuple
import warnings

from absl import flags
import jax
import numpy as np

from benchmarks import sections
from fuzz import containers
from fuzz import seeds
import rotbits_jax
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.cli import program
from rotbits_jax.file import container

FLAGS = flags.FlagValues()
_PRESETS = flags.DEFINE_list(
  'presets', None, 'Which presets; all by default.', flag_values=FLAGS
)
_STRIDE = flags.DEFINE_integer(
  'stride', 1, 'Takes one of so many cases.', lower_bound=1, flag_values=FLAGS
)
_RESULTS = flags.DEFINE_string(
  'results', None, 'A file whose section of counts is written anew.', flag_values=FLAGS
)

_VALUES: tuple[Any, ...] = (
  *(None, True, -1, 0, 1 << 40, 1 << 62, 1e300, 'x', '../x', [], [[]], {}, {'x': 1}),
)


class Case(NamedTuple):
  """A damaged container.

  Attributes:
    kind: of the damage.
    where: what was damaged.
    named: what the error has to name; empty for anything.
    make: makes the container.
    harmless: whether the numbers may be the same.
  """

  kind: str
  where: str
  named: str
  make: Callable[[], bytes]
  harmless: bool = False


def cases(data: bytes, other: bytes) -> Iterator[Case]:
  """Yields all damage of a container.

  Args:
    data: the container.
    other: one of another model with the same config and preset.
  """
  yield from _flips(data)
  for size in range(len(data)):
    yield Case('truncation', f'{size} bytes', '', functools.partial(_cut, data, size))
  yield from _swaps(data)
  yield from _exchanges(data, other)
  yield from _edits(data)


def _sections(data: bytes) -> list[tuple[str, int, int]]:
  """Returns the sections of a container: names, starts and stops."""
  (length,) = struct.unpack('<Q', data[:8])
  reader = container.StreamReader(data)
  found, start = [('', 0, 8 + length)], 8 + length
  for name in reader.names():
    found.append((name, start, start + reader.nbytes(name)))
    start += reader.nbytes(name)
  return found


def _flips(data: bytes) -> Iterator[Case]:
  for name, start, stop in _sections(data):
    for position in range(start, stop):
      where = f'byte {position} of {name or "the header"}'
      yield Case('flip', where, name, functools.partial(_flipped, data, position))


def _cut(data: bytes, size: int) -> bytes:
  return data[:size]


def _flipped(data: bytes, position: int) -> bytes:
  flipped = bytearray(data)
  flipped[position] ^= 1 << position % 8
  return bytes(flipped)


def _swaps(data: bytes) -> Iterator[Case]:
  sections = _sections(data)
  for a, b in itertools.combinations(sections, 2):
    parts = {name: data[start:stop] for name, start, stop in sections}
    parts[a[0]], parts[b[0]] = parts[b[0]], parts[a[0]]
    make = functools.partial(b''.join, [*parts.values()])
    if make() != data:
      yield Case('swap', f'{a[0]} and {b[0]}', '', make)
  streams, manifest = containers.unpack(data)
  text = containers.to_json(manifest)
  for x, y in itertools.combinations(streams, 2):
    if streams[x] != streams[y]:
      swapped = streams | {x: streams[y], y: streams[x]}
      make = functools.partial(containers.pack, swapped, text)
      yield Case('swap', f'{x} and {y} in the header, too', '', make)
      yield Case('swap', f'{x} and {y}, sealed', '', _sealed(swapped, manifest))


def _exchanges(data: bytes, other: bytes) -> Iterator[Case]:
  streams, manifest = containers.unpack(data)
  theirs, _ = containers.unpack(other)
  text = containers.to_json(manifest)
  for name, stream in streams.items():
    if theirs[name] == stream:
      continue
    exchanged = streams | {name: theirs[name]}
    make = functools.partial(containers.pack, exchanged, text)
    yield Case('exchange', name, name, make)
    # The streams of one message are read together, so that any may be named.
    named = '' if manifest.get('message') else name
    yield Case('exchange', f'{name}, sealed', named, _sealed(exchanged, manifest))


def _sealed(
  streams: dict[str, bytes], manifest: containers.Json
) -> Callable[[], bytes]:
  sealed = containers.sealed(streams, copy.deepcopy(manifest))
  return functools.partial(containers.pack, streams, containers.to_json(sealed))


def _edits(data: bytes) -> Iterator[Case]:
  streams, manifest = containers.unpack(data)
  for path in list(_paths(manifest)):
    for change, value in _changes(_at(manifest, path)):
      where = f'{"/".join(map(str, path))} {change}'
      make = functools.partial(_edited, streams, manifest, path, change, value)
      yield Case('field', where, '', make, harmless=True)


def _edited(
  streams: dict[str, bytes],
  manifest: containers.Json,
  path: tuple[Any, ...],
  change: str,
  value: Any,
) -> bytes:
  edited = copy.deepcopy(manifest)
  parent = _at(edited, path[:-1])
  if change == 'deleted':
    del parent[path[-1]]
  elif change == 'added':
    parent[path[-1]]['unknown'] = value
  else:
    parent[path[-1]] = value
  return containers.pack(streams, containers.to_json(edited))


def _paths(value: Any) -> Iterator[tuple[Any, ...]]:
  if isinstance(value, dict | list):
    for key in value if isinstance(value, dict) else range(len(value)):
      yield (key,)
      yield from ((key, *path) for path in _paths(value[key]))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
  for key in path:
    value = value[key]
  return value


def _changes(old: Any) -> Iterator[tuple[str, Any]]:
  yield 'deleted', None
  if isinstance(old, dict):
    yield 'added', 1
  values = list(_VALUES)
  if type(old) is int:
    values += [old + 1, old - 1, 2 * old]
  if isinstance(old, list):
    values += [old[:-1], [*old, *old[-1:]], old[::-1]]
  for new in values:
    if new != old or type(new) is not type(old):
      yield f'is {new!r:.40}', new


class Counts(NamedTuple):
  """How reading the cases of one kind ended."""

  cases: int = 0
  refused: int = 0
  same: int = 0
  failures: int = 0


def numbers(data: rotbits_jax.file.Readable) -> dict[str, tuple[str, bytes]]:
  """Returns the content of a container: the bits of all arrays, and the files."""
  with rotbits_jax.file.Reader(data) as reader:
    if reader.weights_files:  # as the command writes them
      with tempfile.TemporaryDirectory() as folder:
        rotbits_jax.decode_to_directory(data, folder)
    decoded = reader.read()
    found = {name: ('', content) for name, content in reader.files().items()}
  if isinstance(decoded, models.Model):
    outer, layers = decoded.outer(), list(decoded.layers())
    decoded = outer | {f'layers.{i}': layer for i, layer in enumerate(layers)}
  for path, leaf in structured.flatten(models.materialize(decoded)).items():
    array = np.asarray(leaf)
    found[path] = f'{array.dtype} {array.shape}', array.tobytes()
  return found


def sweep(
  data: bytes, other: bytes, *, stride: int = 1, report: Callable[[str], None] = print
) -> dict[str, Counts]:
  """Reads damaged containers.

  Args:
    data: a container.
    other: one of another model with the same config and preset.
    stride: takes one of so many flips, truncations and edits.
    report: is told of each failure.

  Returns:
    Counts by the kind of damage.
  """
  expected, found = numbers(data), dict[str, Counts]()
  for i, case in enumerate(cases(data, other)):
    if i % stride and case.kind not in ('swap', 'exchange'):
      continue
    counts = found.get(case.kind, Counts())
    refused = same = 0
    problem = ''
    try:
      same = int(numbers(case.make()) == expected)
      if not (same and case.harmless):
        problem = 'the same numbers' if same else 'other numbers, and no error'
    except rotbits_jax.ContainerError as error:
      refused = 1
      if case.named not in str(error):
        problem = f'an error that does not name {case.named}: {error}'
    except Exception as error:
      problem = f'{type(error).__name__}: {error}'
    if problem:
      report(f'{case.kind}, {case.where}: {problem}')
    found[case.kind] = Counts(
      counts.cases + 1,
      counts.refused + refused,
      counts.same + same,
      counts.failures + bool(problem),
    )
    if not i % 2000:
      jax.clear_caches()  # programs of shapes that were edited
  return found


def to_text(found: dict[str, dict[str, Counts]], seconds: float) -> str:
  """Returns a table of the counts."""
  lines = [
    f'{"preset":18}{"damage":12}{"cases":>9}{"refused":>9}{"same":>9}{"failures":>10}'
  ]
  for preset, kinds in found.items():
    for kind, x in kinds.items():
      lines.append(
        f'{preset:18}{kind:12}{x.cases:9,}{x.refused:9,}{x.same:9,}{x.failures:10,}'
      )
  total = sum(x.cases for kinds in found.values() for x in kinds.values())
  lines.append(f'{total:,} cases in {seconds:.0f} s')
  return '\n'.join(lines)


def main() -> None:
  warnings.simplefilter('ignore')
  start, found = time.monotonic(), dict[str, dict[str, Counts]]()
  for preset in _PRESETS.value or (*seeds.presets_of_sweep(), seeds.PLAIN):
    data, other = (seeds.container(preset, seed) for seed in (0, 1))
    report = lambda text, preset=preset: print(f'{preset}: {text}', flush=True)
    found[preset] = sweep(data, other, stride=_STRIDE.value, report=report)
    print(to_text(found, time.monotonic() - start), flush=True)
  if _RESULTS.value:
    text = to_text(found, time.monotonic() - start)
    body = sections.with_table(_ABOUT, text)
    sections.write(_RESULTS.value, 'Damaged files', body)
  if any(x.failures for kinds in found.values() for x in kinds.values()):
    raise SystemExit(1)


_ABOUT = """\
Written by `python -m fuzz.sweep --results=RESULTS.md`. A small sliced Llama, encoded
with each preset, and a checkpoint as plain tensors are damaged in every way: each byte
flipped, each truncation, sections swapped, streams exchanged with those of another
model, and each field of the manifest edited with the checksums made right. Reading must
end in a `ContainerError` that names the stream. A field that does not bear on the
numbers may leave them the same."""


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))

"""Edits the manifests of files of every kind, and reads what comes of it.

  python -m fuzz.manifests [--kind=base,recipe] [--edits=20000] [--seed=0]

Checksums are made right again, so an edit is seen by all that is behind them. An edited
file is refused with a `ContainerError`, or an `OSError` of the system, or it is read.
Any other error is a failure, and so is a read that takes too long or too much memory,
or that returns memory which was never written.
The first file of each failure is kept in --failures, and the exit code is 1.
"""

import collections
from collections.abc import Callable, Iterator
import contextlib
import functools
import json
import math
import pathlib
import random
import resource
import signal
import tempfile
import time
import traceback
from typing import Any, NamedTuple
from unittest import mock
import warnings

from absl import app
from absl import flags
import jax
import numpy as np

from fuzz import containers
from fuzz import edits
from fuzz import run
from fuzz import seeds
import rotbits_jax
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.file import container
from rotbits_jax.file import directory
from rotbits_jax.file import memory
from rotbits_jax.file import placement
from rotbits_jax.file import report as report_lib
from rotbits_jax.file import shards
from rotbits_jax.file import verification
from rotbits_jax.structured import difference
from rotbits_jax.system import checksums
from rotbits_jax.system import host

_KIND = flags.DEFINE_list('kind', None, 'Kinds of files; by default all.')
_EDITS = flags.DEFINE_integer('edits', 20_000, 'Edited files of each kind.')
_SEED = flags.DEFINE_integer('seed', 0, 'The number that decides all edits.')

_SMALL = 1 << 16  # elements of a leaf that is materialized
_MEMORY = 1 << 28  # bytes of the machine, as readers see it
_MOST_MEMORY = 1 << 20  # KiB that a file may take
_SECONDS = 10  # of processors that a file may take
_HANGS = 120  # seconds after which a read is given up
_PROGRAMS = 2000  # files after which compiled programs are dropped, of edited shapes

Files = dict[str, bytes]  # by name; one, or shards and their index


class Kind(NamedTuple):
  """Files of one kind, and what their readers need."""

  seeds: Callable[[], list[Files]]
  base: Callable[[], Any] = lambda: None
  is_delta: bool = False


class Checksum(int):
  """The checksum of a decoded array, which equals any: an edit cannot know it."""

  def __eq__(self, other: object) -> bool:
    return True

  def __ne__(self, other: object) -> bool:
    return False

  __hash__ = int.__hash__


class TooSlow(BaseException):
  """Raised in a read that hangs; nothing that is fuzzed catches it."""


def _single(*files: bytes) -> list[Files]:
  return [{'x.rotbits': data} for data in files]


KINDS: dict[str, Kind] = {
  'plain': Kind(lambda: _single(seeds.container(seeds.PLAIN))),
  'exact': Kind(lambda: _single(seeds.container('exact'))),
  'tree': Kind(
    lambda: _single(*(seeds.containers_of_trees()[x] for x in ('arrays', 'leaves')))
  ),
  'base': Kind(
    lambda: _single(
      seeds.containers_beside_base()['arrays beside a base'],
      seeds.containers_beside_base()['exact beside a base'],
    ),
    seeds.base,
  ),
  'recipe': Kind(
    lambda: _single(seeds.containers_beside_base()['free beside a base']), seeds.base
  ),
  'near': Kind(lambda: _single(seeds.container('near'), seeds.uniform_leaves())),
  'quantised': Kind(lambda: _single(*seeds.quantised().values())),
  'paper': Kind(
    lambda: _single(*map(seeds.container, ('paper', 'paper-published'))),
  ),
  'free': Kind(lambda: _single(seeds.container('free'), seeds.container_of_opt())),
  'delta': Kind(lambda: _single(seeds.delta()), lambda: seeds.steps()[0], True),
  'shards': Kind(lambda: [seeds.shards()]),
}
"""The kinds of files by name."""


# ---- edits ---------------------------------------------------------------------------


def edit(files: Files, donors: edits.Donors, rng: random.Random) -> Files:
  """Returns files with an edit of one manifest, or of the index, and checksums."""
  changed = dict(files)
  names = [name for name in files if name != shards.INDEX]
  if shards.INDEX not in files or rng.random() < 0.8:
    name = rng.choice(names)
    streams, manifest = containers.unpack(files[name])
    manifest = edits.edited(manifest, donors, rng)
    if isinstance(manifest, dict):
      manifest = containers.sealed(streams, manifest)
    changed[name] = containers.pack(streams, containers.to_json(manifest))
  if shards.INDEX in files:
    index = json.loads(files[shards.INDEX])
    for name in names:
      crc32 = container.StreamReader(changed[name]).manifest_crc32
      index['metadata']['manifest_crc32'][name] = crc32
    index['metadata']['total_size'] = sum(len(changed[name]) for name in names)
    if changed == files:
      index = edits.edited(index, donors, rng)
    changed[shards.INDEX] = containers.to_json(index)
  return changed


def donors() -> edits.Donors:
  """Returns the values of manifests of all kinds."""
  manifests = []
  for kind in KINDS.values():
    for files in kind.seeds():
      for name, data in files.items():
        is_index = name == shards.INDEX
        manifests.append(json.loads(data) if is_index else containers.unpack(data)[1])
  return edits.Donors.of(manifests)


# ---- reading -------------------------------------------------------------------------


def read(source: Any, kind: Kind, rng: random.Random) -> None:
  """Opens a file, reports on it, and reads it in one of several ways."""
  base = kind.base()
  if kind.is_delta and rng.random() < 0.7:
    rotbits_jax.apply(source, base)
    return
  reader = rotbits_jax.file.Reader(source, base=base)
  report = report_lib.from_reader(reader)
  report.to_text(verbose=True).encode()
  report.to_text().encode()
  json.dumps(report.to_json(verbose=True), allow_nan=False)
  reader.fingerprint()
  names = reader.names()
  rng.choice(_WAYS)(reader, names, rng)


def _content(reader: rotbits_jax.file.Reader, names: list[str], rng: Any) -> None:
  """Decodes the whole content, and materializes leaves that are small."""
  decoded = reader.content(integers=rng.random() < 0.5)
  if isinstance(decoded, models.Model):
    leaves = structured.flatten(decoded.params)
  elif reader.is_plain:  # by names, which may have slashes
    leaves = decoded
  else:
    leaves = structured.flatten(decoded)
  small = {path: leaf for path, leaf in leaves.items() if _is_small(leaf)}
  try:
    for leaf in structured.expand(small).values():
      np.asarray(leaf)
  except ValueError as error:
    if 'which is missing' not in str(error):  # a PyTree may have such a leaf alone
      raise


def _is_small(leaf: Any) -> bool:
  """Returns whether a leaf can be materialized here."""
  if isinstance(leaf, difference.Difference):
    return False
  return math.prod(leaf.shape) <= _SMALL


def _each(reader: rotbits_jax.file.Reader, names: list[str], rng: Any) -> None:
  """Decodes all records to arrays."""
  collections.deque(reader.each(as_arrays=rng.random() < 0.5), maxlen=0)


def _some(reader: rotbits_jax.file.Reader, names: list[str], rng: Any) -> None:
  """Decodes a few records and parameters alone."""
  for name in rng.sample(names, min(len(names), 2)):
    if name in reader.records:
      reader.read(name)
      paths = [leaf.path for leaf in reader.records[name].leaves]
      reader.specs(name)
      for path in rng.sample(paths, min(len(paths), 2)):
        reader.tensor(path)


def _verify(reader: rotbits_jax.file.Reader, names: list[str], rng: Any) -> None:
  """Verifies the file by itself."""
  verification.verify(reader, None)


def _directory(reader: rotbits_jax.file.Reader, names: list[str], rng: Any) -> None:
  """Decodes the file to a folder."""
  with tempfile.TemporaryDirectory() as folder:
    directory.decode_to_directory(reader, pathlib.Path(folder, 'decoded'))


def _load(reader: rotbits_jax.file.Reader, names: list[str], rng: Any) -> None:
  """Decodes some layers or all, as a model if plain tensors are one, to the device."""
  layers = None
  if reader.config is not None and rng.random() < 0.5:
    layers = range(rng.randrange(min(reader.config.num_layers, 3) + 1))
  reader.plain_model()
  try:
    content = reader.content(layers=layers, as_model=True)
  except ValueError as error:
    if 'a file of the preset paper decodes whole' not in str(error):
      raise
  else:
    placement.on_device(structured.astype(content, np.float32))


def _twice(reader: rotbits_jax.file.Reader, names: list[str], rng: Any) -> None:
  """Decodes the content into memory of two contents; both results must be equal."""
  found = []
  for byte in (0xAB, 0x54):
    with mock.patch.object(host, 'empty', functools.partial(_filled, byte)):
      decoded = reader.content()
    params: Any = decoded.params if isinstance(decoded, models.Model) else decoded
    found.append([np.asarray(x).tobytes() for x in jax.tree.leaves(params)])
  if found[0] != found[1]:
    raise AssertionError('memory is returned that was never written')


_empty = host.empty


def _filled(byte: int, *shape_and_dtype: Any) -> np.ndarray:
  """Returns an array of `host.empty` whose bytes are equal."""
  array = _empty(*shape_and_dtype)
  if array.size:
    array.reshape(-1).view(np.uint8)[...] = byte
  return array


def _page(reader: rotbits_jax.file.Reader, names: list[str], rng: Any) -> None:
  """Writes the report as a web page."""
  source, _ = reader.inputs
  report_lib.report_page(source).encode()


_WAYS = (_content, _twice, _each, _some, _verify, _directory, _load, _page)


# ---- running -------------------------------------------------------------------------


class Result(NamedTuple):
  """How reading ended: 'decoded', 'refused', or the place of the failure."""

  end: str
  details: str = ''


def attempt(files: Files, kind: Kind, rng: random.Random) -> Result:
  """Reads files, within limits of time and memory."""
  start = time.process_time()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  result = Result('decoded')
  signal.setitimer(signal.ITIMER_REAL, _HANGS)
  try:
    with _opened(files) as source:
      read(source, kind, rng)
  except (rotbits_jax.ContainerError, OSError):
    result = Result('refused')
  except TooSlow:
    result = Result('hangs')
  except Exception as error:
    result = Result(_place(error), traceback.format_exc())
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
  seconds = time.process_time() - start
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  if seconds > _SECONDS and result.end != 'hangs':
    return Result('slow', f'{seconds:.0f} s, {result}')
  if after - before > _MOST_MEMORY:
    return Result('memory', f'{after - before} KiB, {result}')
  return result


@contextlib.contextmanager
def _opened(files: Files) -> Iterator[Any]:
  """Returns the bytes of a file, or a folder of shards."""
  if len(files) == 1:
    yield next(iter(files.values()))
    return
  with tempfile.TemporaryDirectory() as folder:
    for name, data in files.items():
      pathlib.Path(folder, name).write_bytes(data)
    yield folder


def _place(error: BaseException) -> str:
  """Returns the type of an error, and where the package raised it."""
  frames = traceback.extract_tb(error.__traceback__)
  ours = [x for x in frames if '/rotbits_jax/' in x.filename] or list(frames)
  path = pathlib.Path(ours[-1].filename)
  return f'{type(error).__name__} at {path.parent.name}/{path.name}:{ours[-1].lineno}'


@contextlib.contextmanager
def limits() -> Iterator[None]:
  """Takes checksums of arrays for right, and lets memory be small."""
  of_array, joined = checksums.of_array, checksums.joined

  def hang(*unused: Any) -> None:
    raise TooSlow

  old = signal.signal(signal.SIGALRM, hang)
  try:
    with (
      mock.patch.object(checksums, 'of_array', lambda x: Checksum(of_array(x))),
      mock.patch.object(checksums, 'joined', lambda x: Checksum(joined(x))),
      mock.patch.object(memory, '_available', return_value=_MEMORY),
    ):
      yield
  finally:
    signal.signal(signal.SIGALRM, old)


def fuzz(
  name: str, count: int, *, seed: int = 0, failures: pathlib.Path | None = None
) -> collections.Counter[str]:
  """Reads edited files of a kind; returns how many ended in each way.

  Args:
    name: the kind, of `KINDS`.
    count: the number of edited files.
    seed: the number that decides all edits.
    failures: the folder in which the first file of each failure is kept.
  """
  kind, given = KINDS[name], donors()
  originals = kind.seeds()
  counts = collections.Counter[str]()
  for files in originals:  # a kind whose files are refused finds nothing
    with _opened(files) as source:
      rotbits_jax.file.Reader(source, base=kind.base()).content()
  with limits():
    for i in range(count):
      rng = random.Random(f'{name} {seed} {i}')
      files = edit(rng.choice(originals), given, rng)
      result = attempt(files, kind, rng)
      if result.end not in ('decoded', 'refused') and result.end not in counts:
        _keep(failures, f'{name}-{seed}-{i}', files, result)
      counts[result.end] += 1
      if i % _PROGRAMS == _PROGRAMS - 1:
        jax.clear_caches()
  return counts


def _keep(
  failures: pathlib.Path | None, name: str, files: Files, result: Result
) -> None:
  """Keeps a file that failed, with what it did."""
  print(f'{name}: {result.end}', flush=True)
  if failures is None:
    return
  folder = failures / name
  folder.mkdir(parents=True, exist_ok=True)
  for file, data in files.items():
    (folder / file).write_bytes(data)
  (folder / 'failure.txt').write_text(f'{result.end}\n{result.details}')


def table(counts: dict[str, collections.Counter[str]]) -> str:
  """Returns counts by kind as a table."""
  lines = [f'{"kind":<12}{"edits":>8}{"refused":>9}{"decoded":>9}{"failures":>10}']
  for name, ends in counts.items():
    total, refused, decoded = ends.total(), ends['refused'], ends['decoded']
    failed = total - refused - decoded
    lines.append(f'{name:<12}{total:>8}{refused:>9}{decoded:>9}{failed:>10}')
  return '\n'.join(lines)


def main(argv: list[str]) -> None:
  del argv
  warnings.simplefilter('ignore')
  folder, counts = pathlib.Path(run.FAILURES.value), {}
  for name in _KIND.value or KINDS:
    counts[name] = fuzz(name, _EDITS.value, seed=_SEED.value, failures=folder)
    print(table({name: counts[name]}), flush=True)
  print(table(counts))
  if any(ends.keys() - {'refused', 'decoded'} for ends in counts.values()):
    raise SystemExit(1)


if __name__ == '__main__':
  app.run(main)

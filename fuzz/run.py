"""Fuzzes what reads untrusted files, guided by coverage.

  python -m fuzz.run [--target=container] [--jobs=2] [--results=RESULTS.md]

A target (see `fuzz.targets`) reads inputs that atheris makes of the seeds. An error
that is not one of those promised is a failure, and so is an input that takes more time
or memory than the limits. The process that fuzzes is another one, which is started
again if an input ends it. The first input of each failure is kept, and the exit code is
1 if there was one.
"""

import collections
import concurrent.futures
import functools
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any
import warnings

from absl import flags

from benchmarks import sections
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_TARGET = flags.DEFINE_string(
  'target', 'all', 'What to fuzz: see fuzz.targets.', flag_values=FLAGS
)
_EXECUTIONS = flags.DEFINE_integer(
  'executions', 100_000, 'Inputs of each target.', lower_bound=1, flag_values=FLAGS
)
_SECONDS = flags.DEFINE_integer(
  'seconds', 0, 'Stops a target after so many seconds; 0 for never.', flag_values=FLAGS
)
_INPUT_SECONDS = flags.DEFINE_integer(
  'input_seconds', 30, 'An input that takes longer is a failure.', flag_values=FLAGS
)
_MEMORY = flags.DEFINE_integer(
  'memory_mb', 4096, 'Memory that the process may take.', flag_values=FLAGS
)
_JOBS = flags.DEFINE_integer(
  'jobs',
  1,
  'How many targets are fuzzed at a time.',
  lower_bound=1,
  flag_values=FLAGS,
)
_SEED = flags.DEFINE_integer('seed', 1, 'Of the mutations.', flag_values=FLAGS)
_FAILURES = flags.DEFINE_string(
  'failures', 'fuzz/failures', 'Where inputs that fail are kept.', flag_values=FLAGS
)
_CORPUS = flags.DEFINE_string(
  'corpus', 'fuzz/corpus', 'Further inputs, in a folder a target.', flag_values=FLAGS
)

_RESULTS = flags.DEFINE_string(
  'results', None, 'A file whose section of counts is written anew.', flag_values=FLAGS
)

_ABOUT = """\
Written by `python -m fuzz.run --results=RESULTS.md`. Atheris makes the inputs, guided
by coverage. The checksums of streams are made right, and those of arrays are
taken for right. An input is refused if it ends in the error that the reader promises. A
failure is any other error, the end of the process, an input that takes {memory_mb} MB
more memory, an input that takes longer than {input_seconds} s, or a target that refuses
each input."""

_PLACE = '/dev/shm' if os.path.isdir('/dev/shm') else None  # where files are made
_RESTARTS = 50  # of a process that inputs end
_NOTED = 100  # executions between two notes of the counts


class Result:
  """Counts of one target.

  Attributes:
    executions: inputs read.
    refused: how many ended in an error that is promised.
    slowest: seconds that an input took.
    failures: counts of other ends, by what they are and where.
  """

  def __init__(self, counts: dict[str, Any] | None = None):
    counts = counts or {}
    self.executions: int = counts.get('executions', 0)
    self.refused: int = counts.get('refused', 0)
    self.slowest: float = counts.get('slowest', 0.0)
    self.failures = collections.Counter[str](counts.get('failures', {}))

  def add(self, other: 'Result') -> None:
    """Adds the counts of another run."""
    self.executions += other.executions
    self.refused += other.refused
    self.slowest = max(self.slowest, other.slowest)
    self.failures += other.failures

  def to_json(self) -> dict[str, Any]:
    return dict(self.__dict__)


def fuzz(
  target: str,
  executions: int,
  *,
  seconds: int = 0,
  input_seconds: int = 30,
  memory_mb: int = 4096,
  seed: int = 1,
  failures: pathlib.Path,
  corpus: pathlib.Path,
) -> Result:
  """Fuzzes a target in processes of its own; see the flags."""
  total, stop = Result(), time.monotonic() + (seconds or 10**9)
  failures.mkdir(parents=True, exist_ok=True)
  for restart in range(_RESTARTS):
    left = executions - total.executions
    if left <= 0 or time.monotonic() > stop:
      break
    with tempfile.TemporaryDirectory(dir=_PLACE) as folder:
      notes = failures / f'{target}.running.json'
      notes.unlink(missing_ok=True)
      order = {
        'target': target,
        'executions': left,
        'stop': stop - time.monotonic() + time.time(),
        'input_seconds': input_seconds,
        'memory_mb': memory_mb,
        'seed': seed + restart,
        'failures': str(failures),
        'corpus': str(corpus / target),
        'notes': str(notes),
      }
      with (pathlib.Path(folder) / 'log').open('w+') as log:
        child = subprocess.run(
          [sys.executable, '-m', 'fuzz.run', json.dumps(order)],
          stdout=log,
          stderr=log,
          env=os.environ | {'TMPDIR': folder},  # it ends without cleaning up
          check=False,
        )
        log.seek(0)
        text = log.read()
      if not notes.exists():
        raise RuntimeError(f'the fuzzer did not start: {text[-2000:]}')
      part = Result(json.loads(notes.read_text()))
    if child.returncode:
      lines = [line for line in text.splitlines() if 'ERROR' in line] or ['']
      part.failures[f'the process ended, {child.returncode}: {lines[-1][:100]}'] += 1
      (failures / f'{target}.log').write_text(text[-20_000:])
    total.add(part)
    notes.unlink()
  if 0 < total.executions == total.refused:
    total.failures['each input was refused, the seeds too'] += 1
  return total


def _child(order: dict[str, Any]) -> None:
  """Fuzzes in this process, which ends with it."""
  import atheris

  with atheris.instrument_imports(include=['rotbits_jax']):
    from fuzz import targets
  import jax

  warnings.simplefilter('ignore')
  target = targets.TARGETS[order['target']]
  inputs = list(target.seeds())
  if not target.encodes:
    targets.accept_checksums()
  folder, notes = pathlib.Path(order['failures']), pathlib.Path(order['notes'])
  result = Result()

  def note() -> None:
    notes.write_text(json.dumps(result.to_json()))

  def fail(name: str, data: bytes) -> None:
    if not result.failures[name]:
      path = folder / f'{order["target"]}-{name.replace(" ", "_").replace(":", "_")}'
      path.write_bytes(data)
    result.failures[name] += 1

  def run(data: bytes) -> None:
    if result.executions >= order['executions'] or time.time() > order['stop']:
      note()
      os._exit(0)
    result.executions += 1
    start = time.monotonic()
    try:
      target.run(data)
    except target.expected:
      result.refused += 1
    except Exception as error:
      where = traceback.extract_tb(error.__traceback__)
      ours = [x for x in where if 'rotbits_jax' in x.filename] or list(where)
      place = f'{pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}'
      fail(f'{type(error).__name__} in {place}', data)
    seconds = time.monotonic() - start
    if seconds > order['input_seconds']:
      fail(f'an input of more than {order["input_seconds"]} s', data)
    result.slowest = max(result.slowest, seconds)
    if not result.executions % _NOTED:
      note()
    if not result.executions % 10_000:
      jax.clear_caches()  # programs of shapes that were mutated

  def mutate(data: bytes, most: int, seed: int) -> bytes:
    rng = random.Random(seed)
    if rng.random() < 0.5:  # else what is refused early crowds out the rest
      data = rng.choice(inputs)
    changed = target.mutate(
      data, rng, lambda part: bytes(atheris.Mutate(part, max(len(part) + 64, 64)))
    )
    return changed if len(changed) <= most else data

  with tempfile.TemporaryDirectory() as begin:
    for i, data in enumerate(inputs):
      (pathlib.Path(begin) / f'{i}').write_bytes(data)
      run(data)
    note()
    corpora = [begin, *([order['corpus']] if os.path.isdir(order['corpus']) else [])]
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    limit = order['memory_mb'] + used
    arguments = [
      sys.argv[0],
      f'-seed={order["seed"]}',
      f'-timeout={order["input_seconds"]}',
      f'-rss_limit_mb={limit}',
      f'-artifact_prefix={folder}/{order["target"]}-',
      '-max_len=65536',
      '-len_control=0',
      '-print_final_stats=1',
      *corpora,
    ]
    atheris.Setup(arguments, run, custom_mutator=mutate)
    atheris.Fuzz()


def to_text(results: dict[str, Result]) -> str:
  """Returns a table of the counts."""
  lines = [
    f'{"target":18}{"executions":>12}{"refused":>12}{"slowest s":>11}{"failures":>10}'
  ]
  for name, x in results.items():
    lines.append(
      f'{name:18}{x.executions:12,}{x.refused:12,}{x.slowest:11.1f}'
      f'{sum(x.failures.values()):10,}'
    )
    lines += [f'  {count:,} x {what}' for what, count in x.failures.most_common(20)]
  return '\n'.join(lines)


def main() -> None:
  names = _TARGET.value.split(',')
  if _TARGET.value == 'all':
    from fuzz import targets

    names = list(targets.TARGETS)
  fuzz_one = functools.partial(
    fuzz,
    executions=_EXECUTIONS.value,
    seconds=_SECONDS.value,
    input_seconds=_INPUT_SECONDS.value,
    memory_mb=_MEMORY.value,
    seed=_SEED.value,
    failures=pathlib.Path(_FAILURES.value),
    corpus=pathlib.Path(_CORPUS.value),
  )
  results = {}
  with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as threads:
    for name, result in zip(names, threads.map(fuzz_one, names), strict=True):
      results[name] = result
      print(to_text({name: result}), flush=True)
  if _RESULTS.value:
    about = _ABOUT.format(
      memory_mb=f'{_MEMORY.value:,}', input_seconds=_INPUT_SECONDS.value
    )
    body = sections.with_table(about, to_text(results))
    sections.write(_RESULTS.value, 'Fuzzing', body)
  if any(x.failures for x in results.values()):
    raise SystemExit(1)


if __name__ == '__main__':
  if len(sys.argv) == 2 and sys.argv[1].startswith('{'):
    _child(json.loads(sys.argv[1]))
  sys.exit(program.run(main, FLAGS))

"""Fuzzes what reads untrusted files, guided by coverage.

  python -m fuzz.run [--target=container,config] [--executions=100000]

A target (see `fuzz.targets`) reads inputs that atheris makes of the seeds, in a process
of its own. An error that is not promised ends it, and so does an input that takes more
time or memory than the limits. It is kept in --failures, and the exit code is 1.
"""

import contextlib
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import warnings

from absl import app
from absl import flags

_TARGET = flags.DEFINE_list('target', None, 'What to fuzz; by default all targets.')
_EXECUTIONS = flags.DEFINE_integer('executions', 100_000, 'Inputs of each target.')
_SECONDS = flags.DEFINE_integer('seconds', 0, 'Stops a target after so long; 0: never.')
FAILURES = flags.DEFINE_string('failures', 'fuzz/failures', 'Where failures are kept.')
_CHILD = flags.DEFINE_string('child', None, 'The target to fuzz in this process.')

CORPUS = pathlib.Path(__file__).parent / 'corpus'
_LIMITS = '-timeout=30', '-rss_limit_mb=6144', '-max_len=65536', '-len_control=0'


def fuzz(target: str, failures: pathlib.Path, **limits: int) -> str:
  """Fuzzes a target in a process of its own; returns the end of its log if it fails."""
  failures.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, '-m', 'fuzz.run', f'--child={target}']
  command += [f'--{name}={limit}' for name, limit in limits.items()]
  command.append(f'--failures={failures}')
  with tempfile.TemporaryDirectory() as folder:  # the process ends without cleaning up
    env = os.environ | {'TMPDIR': folder}
    done = subprocess.run(command, env=env, capture_output=True, errors='replace')
  print(f'{target}: {"failed" if done.returncode else "passed"}', flush=True)
  return (done.stdout + done.stderr)[-4000:] if done.returncode else ''


def _fuzz_here(name: str) -> None:
  """Fuzzes a target in this process, which ends with it."""
  import atheris

  with atheris.instrument_imports(include=['rotbits_jax']):
    from fuzz import targets
  warnings.simplefilter('ignore')
  target = targets.TARGETS[name]
  inputs = list(target.seeds())
  targets.accept_checksums()

  def run(data: bytes) -> None:
    with contextlib.suppress(target.expected):
      target.run(data)

  def mutate(data: bytes, most: int, seed: int) -> bytes:
    rng = random.Random(seed)
    if rng.random() < 0.5:  # else what is refused early crowds out the rest
      data = rng.choice(inputs)
    mutate_bytes = lambda part: bytes(atheris.Mutate(part, max(len(part) + 64, 64)))
    changed = target.mutate(data, rng, mutate_bytes)
    return changed if len(changed) <= most else data

  with tempfile.TemporaryDirectory() as begin:
    for i, data in enumerate(inputs):
      target.run(data)  # a target that refuses its seeds finds nothing
      pathlib.Path(begin, f'{i}').write_bytes(data)
    folders = [begin, *([str(CORPUS / name)] if (CORPUS / name).is_dir() else [])]
    ends = f'-runs={_EXECUTIONS.value}', f'-max_total_time={_SECONDS.value}'
    place = f'-artifact_prefix={FAILURES.value}/{name}-'
    arguments = [sys.argv[0], '-seed=1', place, *ends, *_LIMITS, *folders]
    atheris.Setup(arguments, run, custom_mutator=mutate)
    atheris.Fuzz()


def main(argv: list[str]) -> None:
  del argv
  if _CHILD.value:
    _fuzz_here(_CHILD.value)
    return
  from fuzz import targets

  limits = {'executions': _EXECUTIONS.value, 'seconds': _SECONDS.value}
  failures = pathlib.Path(FAILURES.value)
  logs = [fuzz(x, failures, **limits) for x in _TARGET.value or targets.TARGETS]
  if any(logs):
    raise SystemExit('\n'.join(filter(None, logs)))


if __name__ == '__main__':
  app.run(main)

"""Interrupts commands at random points, and looks at what is left: counts, in Markdown.

  python -m benchmarks.faults --checkpoint=DIR [--runs=100] [--seed=0]

Each run starts `rotbits encode` or `rotbits decode`, lets it reach a random operation
on the output's folder (a file that is opened, renamed or removed, a folder that is
made), and ends it a few milliseconds later, by a signal; or the file system takes no
more bytes; or two commands write one output. Afterwards the output must be the old one
or the new one, whole, with the checkpoint's bits, and the next run must complete it and
leave nothing else.
"""

import collections
import functools
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
from typing import Any

from absl import flags

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax.cli import main as cli
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'A small checkpoint.', required=True, flag_values=FLAGS
)
_RUNS = flags.DEFINE_integer(
  'runs', 100, 'Runs of each class.', lower_bound=1, flag_values=FLAGS
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the random points.', flag_values=FLAGS)

_EVENTS = ('open', 'os.chmod', 'os.mkdir', 'os.remove', 'os.rename', 'os.rmdir')
_MOST_DELAY = 0.01  # seconds from the operation to the end

# ---- in a process of its own ---------------------------------------------------------


def command(
  arguments: list[str], folder: str, at: int, delay: float, number: int, counter: Any
) -> None:
  """Runs a command and ends it at an operation on a folder.

  Args:
    arguments: of `rotbits`.
    folder: whose operations count.
    at: the operation; 0 for none.
    delay: seconds from there to the end.
    number: of the signal that ends it; SIGALRM has no handler and ends the process like
      SIGKILL, but by a timer.
    counter: gets the number of operations.
  """
  null = os.open(os.devnull, os.O_RDWR)
  for stream in (1, 2):
    os.dup2(null, stream)
  count = 0

  def hook(event: str, values: tuple[Any, ...]) -> None:
    nonlocal count
    if event not in _EVENTS or not any(folder in str(x) for x in values):
      return
    count += 1
    counter.value = count
    if count == at and number == signal.SIGALRM:
      signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))
    elif count == at:
      os.kill(os.getpid(), number)

  sys.addaudithook(hook)
  sys.argv = ['rotbits', *arguments]
  sys.exit(cli.main())


def start(arguments: list[str], folder: pathlib.Path, *end: Any) -> tuple[Any, Any]:
  """Starts `command`; returns the process and the count of operations."""
  context = multiprocessing.get_context('forkserver')
  counter = context.Value('i', 0)
  end = end or (0, 0.0, signal.SIGALRM)
  process = context.Process(
    target=command, args=(arguments, str(folder), *end, counter)
  )
  process.start()
  return process, counter


# ---- classes of faults ---------------------------------------------------------------


class Case:
  """A command whose output is new, or takes an old one's place."""

  def __init__(self, checkpoint: pathlib.Path, kind: str, old: bool):
    """Prepares the input, and knows what is right.

    Args:
      checkpoint: what is encoded.
      kind: 'encode', 'encode to shards' or 'decode'.
      old: whether there is an output already.
    """
    self.kind, self.old = kind, old
    self.checkpoint = checkpoint
    self.source = checkpoints.open_checkpoint(checkpoint)
    self.folder = pathlib.Path(tempfile.mkdtemp(prefix='faults-'))
    self.inputs = pathlib.Path(tempfile.mkdtemp(prefix='faults-input-'))
    self.target = self.folder / 'out'
    self.encoded = self.inputs / 'encoded'
    rotbits_jax.encode_to_file(self.source, self.encoded, preset='exact')

  @functools.cached_property
  def operations(self) -> int:
    """How many operations on the folder an undisturbed run needs."""
    self.reset()
    process, counter = start(self.arguments, self.folder)
    process.join()
    if process.exitcode:
      raise RuntimeError(f'{self.arguments}: exit code {process.exitcode}')
    return counter.value

  @property
  def hidden(self) -> list[str]:
    """What an interrupted run has left beside the output."""
    return [path.name for path in self.folder.iterdir() if path.name[0] == '.']

  @property
  def arguments(self) -> list[str]:
    if self.kind == 'decode':
      own = ['decode', f'--input={self.encoded}']
    else:
      own = ['encode', f'--checkpoint={self.checkpoint}', '--preset=exact']
    shards = ['--shard_size=100KB'] if 'shards' in self.kind else []
    return [*own, f'--output={self.target}', '--overwrite', *shards]

  def complete(self) -> None:
    """Runs the command to its end, in this process."""
    if self.kind == 'decode':
      rotbits_jax.decode_to_directory(self.encoded, self.target)
      return
    size = 100_000 if 'shards' in self.kind else None
    rotbits_jax.encode_to_file(
      self.source, self.target, preset='exact', shard_size=size
    )

  def reset(self) -> None:
    """Empties the folder, and puts the old output there."""
    shutil.rmtree(self.folder)
    self.folder.mkdir()
    if self.old:
      self.complete()
      self.mark()

  def mark(self) -> None:
    """Makes the old output another one than the new: an older tokenizer, say."""
    if self.kind == 'decode':
      (self.target / 'generation_config.json').write_text('{"old": true}')
    elif 'shards' not in self.kind:
      files = {**self.source.files, 'old.json': b'{}'}
      rotbits_jax.encode_to_file(self.source, self.target, preset='exact', files=files)

  def whole(self) -> str:
    """Says which output is there: 'none', 'old', 'new', or 'refused' by the reader.

    Raises:
      ValueError: if it reads as anything else than the checkpoint.
    """
    if self.kind == 'decode':
      if not self.target.exists():
        return 'none'
      _check_directory(self.source, self.target)
      mark = self.target / 'generation_config.json'
      return 'old' if self.old and mark.read_text() == '{"old": true}' else 'new'
    index = self.target.with_name('out.index.json')
    if not self.target.exists() and not index.exists():
      return 'none'
    try:
      with rotbits_jax.file.Reader(self.target) as reader:
        files = reader.files()
    except rotbits_jax.ContainerError:
      return 'refused'  # shards of two runs: noticed
    rotbits_jax.verification.read_all(self.target, self.source.load().model)
    return 'old' if 'old.json' in files else 'new'

  def finish(self) -> None:
    """Completes what was interrupted.

    Raises:
      ValueError: if something else is left than the output.
    """
    self.complete()
    if self.whole() != 'new':
      raise ValueError('the next run did not complete the output')
    if self.hidden:
      raise ValueError(f'left behind: {self.hidden}')

  def close(self) -> None:
    shutil.rmtree(self.folder)
    shutil.rmtree(self.inputs)


def _check_directory(source: checkpoints.Source, path: pathlib.Path) -> None:
  """Refuses a directory whose tensors are not the checkpoint's."""
  decoded = checkpoints.open_checkpoint(path).load().model
  data = rotbits_jax.encode(source, preset='exact', files={})
  rotbits_jax.verification.read_all(data, decoded)


def ended(case: Case, rng: random.Random, *, number: int) -> str:
  """Ends a command at a random operation by a signal; returns what is there then."""
  at, delay = rng.randint(1, case.operations), rng.uniform(0, _MOST_DELAY)
  case.reset()
  process, _ = start(case.arguments, case.folder, at, delay, number)
  process.join()
  expected = {0, -number, 128 + number}
  if process.exitcode not in expected:
    raise ValueError(f'exit code {process.exitcode}, expected {expected}')
  state = case.whole()
  if state == 'none' and case.old:
    raise ValueError('the old output is gone')
  hidden = case.hidden
  if hidden and number != signal.SIGALRM and case.kind == 'decode':
    raise ValueError(f'left behind: {hidden}')
  case.finish()
  return state + ' and leftovers' * bool(hidden)


def full_disk(case: Case, rng: random.Random) -> str:
  """Lets files grow to a random size only; returns what happened."""
  case.reset()
  case.complete()
  largest = max(path.stat().st_size for path in case.folder.rglob('*'))
  case.reset()
  _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(largest), hard))
  try:
    case.complete()
    return 'new'
  except OSError as error:
    if str(case.folder) not in str(error):
      raise ValueError(f'the error names no path: {error}') from error
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
  state = case.whole()
  if state == 'none' and case.old:
    raise ValueError('the old output is gone')
  if case.hidden:
    raise ValueError(f'left behind: {case.hidden}')
  case.finish()
  return state


def two_writers(case: Case, rng: random.Random) -> str:
  """Runs a command twice at a time; returns whether one of them was refused."""
  case.reset()
  pair = [start(case.arguments, case.folder) for _ in range(2)]
  for process, _ in pair:
    process.join()
  codes = sorted(process.exitcode for process, _ in pair)
  if codes not in ([0, 0], [0, program.BAD_INPUT]):
    raise ValueError(f'exit codes {codes}')
  case.finish()
  return 'new, one after the other' if codes == [0, 0] else 'new, one refused'


def wrong_shards(case: Case, rng: random.Random) -> str:
  """Takes a shard away, or puts another one in its place."""
  case.reset()
  case.complete()
  shards = sorted(case.folder.glob('out-*'))
  shard = rng.choice(shards)
  shard.unlink()
  if rng.random() < 0.5:
    shutil.copy(rng.choice([x for x in shards if x != shard]), shard)
  try:
    rotbits_jax.verify(case.target)
  except rotbits_jax.ContainerError:
    return 'refused'
  raise ValueError(f'{shard} is wrong and was not noticed')


def main() -> None:
  checkpoint = pathlib.Path(_CHECKPOINT.value).absolute()
  runs, rng = _RUNS.value, random.Random(_SEED.value)
  multiprocessing.set_forkserver_preload(
    ['rotbits_jax.cli.encode', 'rotbits_jax.cli.decode', 'rotbits_jax.verification']
  )
  print('| command | output | fault | runs | failures | what was there afterwards |')
  print('|---|---|---|---|---|---|')
  faults: dict[str, Any] = {
    'killed': functools.partial(ended, number=signal.SIGALRM),
    'SIGTERM': functools.partial(ended, number=signal.SIGTERM),
    'SIGINT': functools.partial(ended, number=signal.SIGINT),
    'no space': full_disk,
    'two writers': two_writers,
    'wrong shards': wrong_shards,
  }
  for kind in ('encode', 'encode to shards', 'decode'):
    for old in (False, True):
      for name, fault in faults.items():
        if name == 'wrong shards' and ('shards' not in kind or old):
          continue
        case = Case(checkpoint, kind, old)
        found, failures = collections.Counter[str](), 0
        for _ in range(runs):
          try:
            found[fault(case, rng)] += 1
          except ValueError as error:
            failures += 1
            print(f'{kind}, {name}: {error}', file=sys.stderr)
        case.close()
        states = ', '.join(f'{count} {state}' for state, count in found.items())
        row = (kind, 'old' if old else 'new', name, runs, failures, states)
        print(f'| {" | ".join(map(str, row))} |', flush=True)
  print('\nKilled by a timer whose signal has no handler, as by SIGKILL.')


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())

"""Lets commands fail at each operation on their files, and looks at what they leave.

  python -m fuzz.faults [--stride=1] [--results=RESULTS.md]

`encode` writes a file or shards, and `decode` a directory; the output is new, or it
replaces an older one. One operation on the files around the output goes wrong in each
run: the process is killed, at once or some milliseconds later; the disk is full; or the
user interrupts. An operation is an open, a rename, a removal or the like; Python's
audit events tell of it. Afterwards the older output is complete, or the new one is. A
directory may also be such that reading it gives an error. Beside the output there may
only be shards that its index does not name; the hidden folder from which the next run
of `encode` resumes; and after a kill that of `decode`. The next run ends well and
leaves only its output. In some runs two processes write the same output. If root runs
this program, the disk is also really full: a tmpfs of different sizes.
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, NamedTuple
from unittest import mock

from absl import flags
import numpy as np

from benchmarks import sections
from fuzz import seeds
from fuzz import sweep as sweep_lib
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax.cli import main as cli
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_STRIDE = flags.DEFINE_integer(
  'stride', 1, 'Takes one of so many operations.', lower_bound=1, flag_values=FLAGS
)
_RESULTS = flags.DEFINE_string(
  'results', None, 'A file whose section of counts is written anew.', flag_values=FLAGS
)

FAULTS = ('killed', 'killed later', 'disk full', 'interrupted')

_TAKE_ROOM = ('open', 'os.mkdir', 'os.rename', 'os.truncate')
_CHANGES = (*_TAKE_ROOM, 'os.chmod', 'os.remove', 'os.rmdir')
_NAME = 'out'
_SHARDS = '--shard_size=4KB'
_PAGE = 4096  # bytes
_SIZES = 12  # of a file system that is too small
_WRITERS = 6  # how often two runs write the same output


class Scenario(NamedTuple):
  """A command that writes an output.

  Attributes:
    command: 'encode' or 'decode'.
    flags: of the command, without the input and the output.
    older: the flags with which an older output was written; None if there is none.
    in_parts: whether files of the output appear one after the other. Until all are
      there, reading gives the older numbers or the new ones.
    may_fail: whether reading may also give an error until then.
  """

  command: str
  flags: tuple[str, ...] = ()
  older: tuple[str, ...] | None = None
  in_parts: bool = False
  may_fail: bool = False


_FILE = ('--preset=exact',)
_IN_SHARDS = ('--preset=exact', _SHARDS)
_OVER = '--overwrite'

SCENARIOS = {
  'encode, new file': Scenario('encode', _FILE),
  'encode over a file': Scenario('encode', (*_FILE, _OVER), _FILE),
  'encode, new shards': Scenario('encode', _IN_SHARDS, in_parts=True),
  'encode over shards': Scenario(
    'encode', (*_IN_SHARDS, _OVER), _IN_SHARDS, in_parts=True
  ),
  'encode file over shards': Scenario(
    'encode', (*_FILE, _OVER), _IN_SHARDS, in_parts=True
  ),
  'encode shards over file': Scenario(
    'encode', (*_IN_SHARDS, _OVER), _FILE, in_parts=True
  ),
  'decode, new directory': Scenario('decode'),
  'decode over a directory': Scenario(
    'decode', (_SHARDS, _OVER), (_SHARDS,), in_parts=True, may_fail=True
  ),
}


class Inputs(NamedTuple):
  """Inputs of the commands: two models as checkpoints and as files."""

  checkpoints: tuple[pathlib.Path, pathlib.Path]
  files: tuple[pathlib.Path, pathlib.Path]

  @classmethod
  def make(cls, folder: pathlib.Path) -> 'Inputs':
    """Writes the inputs into a folder."""
    for seed in (0, 1):
      model = seeds.sliced_model(seeds.LLAMA, seed=seed)
      files = {
        'config.json': json.dumps(seeds.LLAMA).encode(),
        'tiny.json': json.dumps(checkpoints.slicing_json(model.config)).encode(),
      }
      checkpoint = rotbits_jax.Checkpoint(model, files, 'tiny')
      rotbits_jax.save_checkpoint(checkpoint, folder / f'checkpoint{seed}')
      data = rotbits_jax.encode(checkpoint, preset='exact')
      (folder / f'file{seed}').write_bytes(data)
    pairs = [[folder / f'{x}{i}' for i in (0, 1)] for x in ('checkpoint', 'file')]
    return cls(*((a, b) for a, b in pairs))

  def arguments(
    self, scenario: Scenario, which: int, output: pathlib.Path
  ) -> list[str]:
    """Returns the arguments of a command.

    Args:
      scenario: the command.
      which: the input: 0 for the older output, 1 for the new one.
      output: path of the output.
    """
    if scenario.command == 'encode':
      given = f'--checkpoint={self.checkpoints[which]}'
    else:
      given = f'--input={self.files[which]}'
    own = scenario.flags if which else scenario.older or ()
    return [scenario.command, given, f'--output={output}', *own]


# ---- one run -------------------------------------------------------------------------


class _Trap:
  """Counts operations on files in a folder, and lets one of them go wrong."""

  def __init__(self) -> None:
    self.folder, self.at, self.seen, self.fault = '', 0, 0, ''
    sys.addaudithook(self._hook)

  def set(self, folder: pathlib.Path, at: int = 0, fault: str = '') -> None:
    """Waits for operation `at` in a folder, counted from 1; 0 for none."""
    self.folder, self.at, self.seen, self.fault = str(folder), at, 0, fault

  def _hook(self, event: str, args: tuple[Any, ...]) -> None:
    if not self.folder or event not in _CHANGES:
      return
    if not any(isinstance(x, str | os.PathLike) and self._inside(x) for x in args):
      return
    if event == 'open' and args[2] & os.O_ACCMODE == os.O_RDONLY:
      return
    self.seen += 1
    if self.seen == self.at and (self.fault != 'disk full' or event in _TAKE_ROOM):
      _ACTS[self.fault]()

  def _inside(self, path: Any) -> bool:
    # Names without a folder are those of a removal, which knows an open folder.
    text = os.fspath(path)
    return isinstance(text, str) and (text.startswith(self.folder) or '/' not in text)


@functools.cache
def trap() -> _Trap:
  """Returns this process's trap; a hook cannot be removed."""
  return _Trap()


def _kill() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def _kill_later() -> None:
  threading.Timer(next(_delays), _kill).start()


# Seconds until a run is killed in the middle of what follows an operation.
_delays = itertools.cycle((0.0005, 0.002, 0.008))


def _fill() -> None:
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _interrupt() -> None:
  os.kill(os.getpid(), signal.SIGINT)


_ACTS = dict(zip(FAULTS, (_kill, _kill_later, _fill, _interrupt), strict=True))
_CODES = {'disk full': program.BAD_INPUT, 'interrupted': 130}


def run(arguments: list[str]) -> tuple[int, str]:
  """Runs a command in this process; returns the exit code and the last error."""
  stream = io.StringIO()
  with (
    mock.patch.object(sys, 'argv', ['rotbits', *arguments]),
    contextlib.redirect_stdout(io.StringIO()),
    contextlib.redirect_stderr(stream),
  ):
    code = cli.main()
  return code, stream.getvalue().strip().rpartition('\n')[-1]


def _start(
  arguments: list[str], folder: pathlib.Path, at: int = 0, fault: str = ''
) -> 'subprocess.Popen[str]':
  """Runs a command in a process of its own, which may be killed."""
  order = json.dumps([str(folder), at, fault, arguments])
  return subprocess.Popen(
    [sys.executable, '-m', 'fuzz.faults', '--child', order],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def _end(process: 'subprocess.Popen[str]') -> tuple[int, str]:
  """Waits for a command; returns the exit code and the last error."""
  _, error = process.communicate()
  return process.returncode, error.strip().rpartition('\n')[-1]


def _child(order: str) -> int:
  folder, at, fault, arguments = json.loads(order)
  trap().set(pathlib.Path(folder), at, fault)
  code, error = run(arguments)
  print(error, file=sys.stderr)
  return code


def content(folder: pathlib.Path) -> dict[str, str]:
  """Returns a digest of every file in a folder, by its path from there."""
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def numbers(scenario: Scenario, folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns what reading the output gives; None if it gives an error."""
  output = folder / _NAME
  try:
    if scenario.command == 'encode':
      return dict(sweep_lib.numbers(output))
    model, files, _ = rotbits_jax.load_checkpoint(output)
  except (ValueError, OSError):
    return None
  tensors = checkpoints.to_tensors(model)
  return files | {name: np.asarray(x).tobytes() for name, x in tensors.items()}


def _visible(found: dict[str, str]) -> dict[str, str]:
  """Returns what `content` found outside the hidden folder of the output."""
  hidden = f'.{_NAME}.partial/'
  return {name: x for name, x in found.items() if not name.startswith(hidden)}


def _room(folder: pathlib.Path) -> int:
  """Returns the bytes that the files of a folder take on a disk, in whole pages."""
  sizes = [path.stat().st_size for path in folder.rglob('*') if path.is_file()]
  return sum(-(-size // _PAGE) * _PAGE for size in sizes)


class Expected(NamedTuple):
  """What a folder holds before a run, and after one without a fault.

  Attributes:
    files: the files before, by name.
    old: digests of them, see `content`.
    new: digests of the files after.
    readable: what reading gives before and after, see `numbers`.
    operations: how many operations the run takes.
    old_room: bytes that the files take before, see `_room`.
    new_room: bytes that the output takes.
  """

  files: dict[str, bytes]
  old: dict[str, str]
  new: dict[str, str]
  readable: tuple[dict[str, Any] | None, dict[str, Any] | None]
  operations: int
  old_room: int
  new_room: int


def expected(scenario: Scenario, inputs: Inputs, folder: pathlib.Path) -> Expected:
  """Runs a scenario without a fault in an empty folder."""
  prepare({}, folder)
  if scenario.older is not None:
    run(inputs.arguments(scenario, 0, folder / _NAME))
  files = {name: (folder / name).read_bytes() for name in content(folder)}
  old, old_room, before = content(folder), _room(folder), numbers(scenario, folder)
  trap().set(folder)
  code, error = run(inputs.arguments(scenario, 1, folder / _NAME))
  if code:
    raise ValueError(f'without a fault: {error}')
  new, seen = content(folder), trap().seen
  readable = before, numbers(scenario, folder)
  if readable[1] is None:
    raise ValueError('the output cannot be read')
  return Expected(files, old, new, readable, seen, old_room, _room(folder))


def prepare(files: dict[str, bytes], folder: pathlib.Path) -> None:
  """Empties a folder, and writes files into it."""
  trap().set(folder)
  for path in folder.iterdir():
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  for name, data in files.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)


def problem(
  scenario: Scenario,
  inputs: Inputs,
  folder: pathlib.Path,
  known: Expected,
  fault: str,
  at: int,
) -> str | None:
  """Runs a scenario with a fault, and returns what is wrong afterwards.

  Args:
    scenario: the scenario.
    inputs: see `Inputs`.
    folder: where the output is written; only this.
    known: see `Expected`.
    fault: one of `FAULTS`.
    at: the operation that goes wrong, from 1.
  """
  prepare(known.files, folder)
  arguments = inputs.arguments(scenario, 1, folder / _NAME)
  killed = fault.startswith('killed')
  if killed:
    code, error = _end(_start(arguments, folder, at, fault))
  else:
    trap().set(folder, at, fault)
    code, error = run(arguments)
    trap().set(folder)
  if fault == 'disk full' and code == 0:  # the run could do without this operation
    found = content(folder)
    return None if found == known.new else f'exit code 0: {sorted(found)}'
  if code != _CODES.get(fault, -signal.SIGKILL):
    return f'exit code {code}: {error}'
  may_leave = killed or scenario.command == 'encode'
  return left(scenario, inputs, folder, known, may_leave=may_leave)


def left(
  scenario: Scenario,
  inputs: Inputs,
  folder: pathlib.Path,
  known: Expected,
  *,
  may_leave: bool,
) -> str | None:
  """Returns what is wrong in a folder after a fault, and after the next run.

  Args:
    scenario: the scenario.
    inputs: see `Inputs`.
    folder: where the output is written.
    known: see `Expected`.
    may_leave: whether the hidden folder of the output may be there.
  """
  found = content(folder)
  if not _is_whole(scenario, folder, known):
    return f'{sorted(found)}: neither the older output nor the new one'
  if not may_leave and any(folder.glob('.*')):
    return f'left behind: {sorted(found)}'
  code, error = 0, ''
  if found != known.new or any(folder.glob('.*')):
    again = scenario._replace(flags=(*scenario.flags, '--overwrite'))
    code, error = run(inputs.arguments(again, 1, folder / _NAME))
  if code or content(folder) != known.new or any(folder.glob('.*')):
    return f'the next run: exit code {code}: {error}: {sorted(content(folder))}'
  return None


def _is_whole(scenario: Scenario, folder: pathlib.Path, known: Expected) -> bool:
  """Returns whether the output is the older one or the new one.

  An output in parts is one of them if reading it gives the numbers of one.
  """
  if _visible(content(folder)) in (known.old, known.new):
    return True
  if not scenario.in_parts:
    return False
  found = numbers(scenario, folder)
  return found in known.readable or (found is None and scenario.may_fail)


def problem_of_two_writers(
  scenario: Scenario, inputs: Inputs, folder: pathlib.Path, known: Expected
) -> str | None:
  """Runs a scenario twice at the same time; see `problem`."""
  prepare(known.files, folder)
  arguments = inputs.arguments(scenario, 1, folder / _NAME)
  ended = [_end(x) for x in [_start(arguments, folder), _start(arguments, folder)]]
  codes = sorted(code for code, _ in ended)
  if codes not in ([0, 0], [0, program.BAD_INPUT]):
    return f'they ended so: {ended}'
  return left(scenario, inputs, folder, known, may_leave=False)


# ---- a file system that is too small -------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: int) -> Iterator[None]:
  """Mounts a file system of a size in bytes; root may do so.

  Raises:
    PermissionError: if this process may not.
  """
  if sys.platform != 'linux' or os.geteuid():
    raise PermissionError('only root mounts file systems')
  options = f'size={-(-size // _PAGE) * _PAGE}'
  mount = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    raise PermissionError('mount is not allowed here')
  try:
    yield
  finally:
    subprocess.run(['umount', str(folder)], check=True)


def problem_of_small_disk(
  scenario: Scenario, inputs: Inputs, folder: pathlib.Path, known: Expected, part: int
) -> str | None:
  """Runs a scenario on a disk with room for a part of the output; see `problem`."""
  with small_disk(folder, known.old_room + known.new_room * part // _SIZES):
    prepare(known.files, folder)
    code, error = run(inputs.arguments(scenario, 1, folder / _NAME))
    if code not in (0, program.BAD_INPUT):
      return f'exit code {code}: {error}'
    found = content(folder)
    whole = _is_whole(scenario, folder, known)
    if not whole or (code == 0 and _visible(found) != known.new):
      return f'exit code {code}, left behind: {sorted(found)}'
  return None


# ---- all of them ---------------------------------------------------------------------


def sweep(
  stride: int, report: Callable[[str], None] = print
) -> dict[tuple[str, str], tuple[int, int]]:
  """Runs every scenario with every fault.

  Args:
    stride: takes one of so many operations.
    report: is told of each failure.

  Returns:
    The number of runs and of failures, by scenario and fault.
  """
  counts: dict[tuple[str, str], tuple[int, int]] = {}

  def note(name: str, fault: str, where: str, wrong: str | None) -> None:
    runs, failures = counts.get((name, fault), (0, 0))
    counts[name, fault] = runs + 1, failures + (wrong is not None)
    if wrong is not None:
      report(f'{name}, {fault} at {where}: {wrong}')

  with tempfile.TemporaryDirectory() as place:
    inputs, folder = Inputs.make(pathlib.Path(place)), pathlib.Path(place) / 'work'
    folder.mkdir()
    for name, scenario in SCENARIOS.items():
      expected(scenario, inputs, folder)  # the first run is slow, and may save more
      known = expected(scenario, inputs, folder)
      for fault in FAULTS:
        for at in range(1, known.operations + 1, stride):
          wrong = problem(scenario, inputs, folder, known, fault, at)
          note(name, fault, f'operation {at}', wrong)
      for k in range(0, _WRITERS, stride):
        wrong = problem_of_two_writers(scenario, inputs, folder, known)
        note(name, 'two writers', f'run {k}', wrong)
      with contextlib.suppress(PermissionError):
        for part in range(0, _SIZES, stride):
          wrong = problem_of_small_disk(scenario, inputs, folder, known, part)
          note(name, 'small disk', f'{part}/{_SIZES} of the room', wrong)
  return counts


def to_text(counts: dict[tuple[str, str], tuple[int, int]], seconds: float) -> str:
  """Returns a table of the counts."""
  lines = [f'{"command":24}{"fault":14}{"runs":>6}{"failures":>10}']
  for (name, fault), (runs, failures) in counts.items():
    lines.append(f'{name:24}{fault:14}{runs:6}{failures:10}')
  total = sum(runs for runs, _ in counts.values())
  return '\n'.join([*lines, f'{total} runs in {seconds:.0f} s'])


def main() -> None:
  start = time.monotonic()
  counts = sweep(_STRIDE.value)
  text = to_text(counts, time.monotonic() - start)
  print(text)
  if _RESULTS.value:
    sections.write(_RESULTS.value, 'Faults', sections.with_table(_ABOUT, text))
  if any(failures for _, failures in counts.values()):
    raise SystemExit(1)


_ABOUT = """\
Written by `python -m fuzz.faults --results=RESULTS.md`. In each run one operation on
the files around the output goes wrong (an open, a rename, a removal, ...), and every
operation of a command is tried. Two writers are processes with the same output at the
same time. A small disk is a tmpfs with room for a part of the output. The older output
must then be complete, or the new one. A directory may also give an error when it is
read, and never numbers of both. What else is left, shards and a hidden folder, must be
removed by the next run."""


if __name__ == '__main__':
  if sys.argv[1:2] == ['--child']:
    sys.exit(_child(sys.argv[2]))
  sys.exit(program.run(main, FLAGS))

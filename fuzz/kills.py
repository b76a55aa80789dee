"""Ends the commands by signals at many moments, and looks at what they leave.

  python -m fuzz.kills [--moments=20] [--signal=TERM,KILL] [--command=encode,decode]

The moments are spread over the time that a command takes. After TERM, INT and HUP
nothing is beside the target, except the whole shards of a run that can be continued.
After KILL the next run removes what is left. The target is missing, the old one or the
new one. The exit code is 1 if any of this fails.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from absl import app
from absl import flags

_MOMENTS = flags.DEFINE_integer('moments', 20, 'Runs of each command and signal.', 1)
_SIGNAL = flags.DEFINE_list('signal', ['TERM', 'INT', 'HUP', 'KILL'], 'The signals.')
_COMMAND = flags.DEFINE_list('command', None, 'The commands; by default all.')

_ROOT = pathlib.Path(__file__).parents[1]
_LIMIT = 300  # seconds that a command may take

Files = dict[str, bytes]
"""The content of a file or a folder, by relative paths."""


class Command(NamedTuple):
  """A command that writes {out}; {in} has the inputs, see `make_inputs`."""

  arguments: str
  has_old: bool = False  # whether {out} exists and is replaced
  keeps_shards: bool = False  # whether a run that was ended can be continued


COMMANDS = {
  'encode': Command('encode {in}/model {out}'),
  'encode --base': Command('encode {in}/model {out} --base={in}/base'),
  'encode --shard_size': Command(
    'encode {in}/model {out} --shard_size=200KB', keeps_shards=True
  ),
  'encode --verify': Command('encode {in}/model {out} --verify'),
  'encode --overwrite': Command('encode {in}/model {out} --overwrite', has_old=True),
  'decode': Command('decode {in}/file {out}'),
  'decode --overwrite': Command('decode {in}/file {out} --overwrite', has_old=True),
  'slice': Command('slice {in}/model {out} --sparsity=0.25 --text={in}/text'),
  'snapshot': Command('snapshot {in}/file'),
}


class Bench:
  """A folder with inputs, and what a command makes of them."""

  def __init__(self, folder: pathlib.Path, command: Command):
    """Runs the command once, to know what it writes, and again for the time."""
    self._inputs, self._command = folder / 'in', command
    self._place = folder / 'place'  # the target is the only thing in it
    self.old: Files = {}
    self._reset()
    self.old = files(self._place)
    for _ in range(2):
      self._reset()
      start = time.monotonic()
      self._finish()
      self.seconds = time.monotonic() - start
    self.new = files(self._place)

  def end(self, name: str, share: float) -> list[str]:
    """Ends a run by a signal after a share of its time; returns what is wrong."""
    self._reset()
    number = signal.Signals[f'SIG{name}']
    with self._started() as process:
      try:
        process.wait(share * self.seconds)
      except subprocess.TimeoutExpired:
        process.send_signal(number)
      code = process.wait(_LIMIT)
    wrong = []
    if code not in (0, 128 + number, -number):
      wrong.append(f'exit code {code}')
    if name == 'KILL':
      target, _ = self._found()
      self._finish(overwrite=target == self.new)
      if files(self._place) != self.new:
        wrong.append(f'after the next run: {sorted(files(self._place))}')
    else:
      target, hidden = self._found()
      if hidden and not (self._command.keeps_shards and self._are_shards(hidden)):
        wrong.append(f'left: {sorted(hidden)}')
    if target not in (self.old, self.new) and not all(x.endswith('/') for x in target):
      wrong.append(f'a part of the target: {sorted(target)}')
    return wrong

  def _found(self) -> tuple[Files, Files]:
    """Returns the files and folders of the target, and hidden ones."""
    found = files(self._place)
    hidden = {
      name: content
      for name, content in found.items()
      if any(part.startswith('.') for part in name.split('/'))
    }
    return {x: found[x] for x in found.keys() - hidden.keys()}, hidden

  def _are_shards(self, hidden: Files) -> bool:
    """Returns whether all hidden files are whole shards, in folders."""
    shards = set(self.new.values())
    return all(name.endswith('/') or x in shards for name, x in hidden.items())

  def _reset(self) -> None:
    """Lets the older target alone be in the place, if the command replaces one."""
    shutil.rmtree(self._place, ignore_errors=True)
    self._place.mkdir()
    if self._command.has_old:
      name = 'old-folder' if 'decode' in self._command.arguments else 'old-file'
      source = self._inputs / name
      copy = shutil.copytree if source.is_dir() else shutil.copy
      copy(source, self._place / 'x')

  def _finish(self, *, overwrite: bool = False) -> None:
    """Runs the command to its end; perhaps it replaces a target."""
    has_flag = overwrite and 'snapshot' not in self._command.arguments
    with self._started(*(['--overwrite'] if has_flag else [])) as process:
      code = process.wait(_LIMIT)
    if code:
      raise RuntimeError(f'{self._command.arguments}: exit code {code}')

  @contextlib.contextmanager
  def _started(self, *more: str) -> Iterator[subprocess.Popen]:
    """Starts the command in a process of its own."""
    paths = {'in': self._inputs, 'out': self._place / 'x'}
    arguments = self._command.arguments.format(**paths).split()
    command = [sys.executable, '-m', 'rotbits_jax', *arguments, *more]
    compiled = os.environ.get('JAX_COMPILATION_CACHE_DIR', self._inputs / 'compiled')
    env = os.environ | {
      'ROTBITS_JAX_CACHE': str(self._place),
      'JAX_COMPILATION_CACHE_DIR': str(compiled),
      'PYTHONPATH': str(_ROOT),
    }
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(command, env=env, stdout=nothing, stderr=nothing)
    try:
      yield process
    finally:
      process.kill()
      process.wait()


def files(folder: pathlib.Path) -> Files:
  """Returns all files in a folder, and its folders, whose names end with a slash."""
  found = {}
  for path in folder.rglob('*'):
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
      found[f'{name}/'] = b''
    else:
      found[name] = path.read_bytes()
  return found


def make_inputs(folder: pathlib.Path) -> None:
  """Makes the inputs of the commands from small checkpoints."""
  import rotbits_jax
  from tests import word_checkpoints

  folder.mkdir()
  word_checkpoints.copy_with_tokenizer('llama-tiny-dense', folder)
  (folder / 'llama-tiny-dense').rename(folder / 'model')
  shutil.copytree(folder / 'model', folder / 'base')
  (folder / 'text').write_text(word_checkpoints.random_text(400))
  rotbits_jax.encode_to_file(folder / 'model', folder / 'file', preset='exact')
  # Others, so it can be seen which of both is there.
  (folder / 'base' / 'LICENSE').write_text('another one')
  rotbits_jax.encode_to_file(folder / 'base', folder / 'old-file', preset='exact')
  rotbits_jax.decode_to_directory(folder / 'file', folder / 'old-folder')
  config = folder / 'old-folder' / 'config.json'
  config.write_text(config.read_text() + '\n')


def table(
  commands: list[str], signals: list[str], moments: int
) -> Iterator[tuple[str, list[str]]]:
  """Yields a row for each command, and what was wrong.

  Args:
    commands: names in `COMMANDS`.
    signals: names of signals, without SIG.
    moments: how many runs of each command are ended by each signal.
  """
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    make_inputs(folder / 'in')
    for command in commands:
      bench = Bench(folder, COMMANDS[command])
      cells, wrong = [], []
      for ending in signals:
        shares = [(i + 0.5) / moments for i in range(moments)]
        results = [(share, bench.end(ending, share)) for share in shares]
        cells.append(f'{sum(not x for _, x in results)}/{moments}')
        wrong += [f'{command}, {ending} at {y:.0%}: {x}' for y, x in results if x]
      counts = ''.join(f'{cell:>8}' for cell in cells)
      yield f'{command:<20}{bench.seconds:>6.1f} s{counts}', wrong


def main(argv: list[str]) -> None:
  del argv
  signals = [name.upper() for name in _SIGNAL.value]
  print(f'{"command":<20}{"takes":>8}{"".join(f"{x:>8}" for x in signals)}')
  failures = []
  rows = table(_COMMAND.value or [*COMMANDS], signals, _MOMENTS.value)
  for row, wrong in rows:
    print(row, flush=True)
    failures += wrong
  if failures:
    raise SystemExit('\n'.join(failures))


if __name__ == '__main__':
  app.run(main)

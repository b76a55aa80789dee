"""A fault at any operation on files leaves the older output or the new one.

Paths that lead nowhere end in one line.
"""

import contextlib
import errno
import functools
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import rotbits_jax

ROOT = pathlib.Path(__file__).parents[1]
DENSE = ROOT / 'tests/testdata/llama-tiny-dense'
CHANGES = {
  *('open', 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate'),
  *('os.chmod', 'shutil.rmtree', 'os.link', 'os.symlink'),
}
TREES = [{name: np.full(500, i) for name in 'abc'} for i in range(2)]


def encode(index, out, **options):
  rotbits_jax.encode_to_file(TREES[index], out, overwrite=True, **options)


SCENARIOS = {
  'file': lambda out, i: encode(i, out),
  'shards': lambda out, i: encode(i, out, shard_size=5000),
  'directory': lambda out, i: rotbits_jax.decode_to_directory(
    checkpoint(), out, shard_size=200_000 * (i + 1), overwrite=True
  ),
}


@functools.cache
def checkpoint():
  return rotbits_jax.encode(rotbits_jax.load_checkpoint(DENSE), preset='exact')


class Trap:
  """Counts operations on files in a folder, and lets one of them go wrong."""

  def __init__(self):
    self.set('')
    sys.addaudithook(self.hook)

  def set(self, folder, at=0, fault=None):
    self.folder, self.at, self.seen, self.fault = str(folder), at, 0, fault

  def hook(self, event, args):
    if (
      not self.folder
      or event not in CHANGES
      or not str(args[0]).startswith(self.folder)
    ):
      return
    if event == 'open' and args[2] & os.O_ACCMODE == os.O_RDONLY:
      return
    self.seen += 1
    if self.seen == self.at:
      self.fault()


trap = functools.cache(Trap)  # a hook cannot be removed


def fill():
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt():
  raise KeyboardInterrupt


def kill():
  os.kill(os.getpid(), signal.SIGKILL)


def content(out):
  """Returns what reading the output gives."""
  if any(out.glob('*.safetensors')):
    model = rotbits_jax.load_checkpoint(out).model
    return [x.tobytes() for x in jax.tree.leaves(model.params)]
  return {name: x.tolist() for name, x in rotbits_jax.decode(out).items()}


def files(folder):
  paths = folder.rglob('*')
  return {x.relative_to(folder): x.read_bytes() for x in paths if x.is_file()}


@pytest.mark.parametrize('fault', [fill, interrupt])
@pytest.mark.parametrize('name', SCENARIOS)
def test_every_operation(name, fault, tmp_path, subtests):
  write, out = SCENARIOS[name], tmp_path / 'out'
  write(out, 0)
  old = content(out)
  trap().set(tmp_path)
  write(out, 1)
  operations, new, expected = trap().seen, content(out), files(tmp_path)
  assert operations > 4
  for at in range(1, operations + 1, max(operations // 12, 1)):
    with subtests.test(at=at):
      trap().set('')
      write(out, 0)
      trap().set(tmp_path, at, fault)
      with contextlib.suppress(OSError, KeyboardInterrupt):
        write(out, 1)
      trap().set('')
      assert content(out) in (old, new)
      write(out, 1)
      assert files(tmp_path) == expected


def assert_one_line(result, *words):
  """Checks that a command has ended with code 2 and one line."""
  code, out, err = result
  assert (code, out, err.count('\n')) == (2, '', 1), result
  assert all(word in err for word in words), err


COMMANDS = 'encode', 'decode', 'verify', 'inspect', 'estimate', 'snapshot', 'report'


@pytest.mark.parametrize('command', COMMANDS)
def test_a_flag_file_that_is_missing(rotbits, command, tmp_path):
  flag = f'--flagfile={tmp_path / "missing"}'
  assert_one_line(rotbits(command, 'x', flag), f'rotbits {command}: ', 'flagfile')


# ml_collections loads config files the old way.
@pytest.mark.filterwarnings('ignore:.*load_module:DeprecationWarning')
def test_a_flag_file_has_the_options_of_a_config(rotbits, tmp_path):
  config = ROOT / 'configs/free.py'
  (tmp_path / 'flags').write_text(f'--config={config}\n--config.tolerance=x\n')
  result = rotbits('encode', DENSE, f'--flagfile={tmp_path / "flags"}')
  assert_one_line(result, 'tolerance')


@pytest.fixture(name='loop')
def _loop(tmp_path):
  """Makes a loop of two symbolic links."""
  (tmp_path / 'loop').symlink_to('other')
  (tmp_path / 'other').symlink_to('loop')
  return tmp_path / 'loop'


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('below', ['', 'below'])
def test_an_input_that_is_a_loop_of_links(rotbits, loop, command, below):
  assert_one_line(rotbits(command, loop / below), 'loop')


@pytest.mark.parametrize(
  'arguments',
  [
    ('encode', DENSE, '{}'),
    ('encode', DENSE, '{}', '--shard_size=1MB', '--overwrite'),
    ('encode', DENSE, '{}/below'),
    ('encode', DENSE, '{}.rotbits', '--base={}'),
    ('encode', DENSE, '{}.rotbits', '--preset=near', '--max_kl=1', '--text={}'),
    ('decode', '{file}', '{}', '--overwrite'),
    ('decode', '{file}', '{}/below'),
    ('decode', '{file}', '{}.out', '--base={}'),
    ('report', '{file}', '{}'),
    ('verify', '{file}', '--against={}'),
    ('verify', '{file}', '--base={}'),
    ('verify', '{file}', f'--against={DENSE}', '--text={}'),
    ('snapshot', '{file}', '--base={}'),
    ('inspect', '{file}', '--flagfile={}'),
  ],
)
def test_an_argument_that_is_a_loop_of_links(rotbits, loop, tmp_path, arguments):
  file = tmp_path / 'x.rotbits'
  file.write_bytes(checkpoint())
  before = sorted(tmp_path.iterdir())
  given = [str(x).format(loop, file=file) for x in arguments]
  assert_one_line(rotbits(*given), 'loop')
  assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize('command', ['encode', 'estimate'])
def test_weights_that_are_a_loop_of_links(rotbits, tmp_path, command):
  folder = tmp_path / 'model'
  folder.mkdir()
  (folder / 'config.json').write_bytes((DENSE / 'config.json').read_bytes())
  (folder / 'model.safetensors').symlink_to('model.safetensors')
  assert_one_line(rotbits(command, folder), 'model.safetensors')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['file', 'shards'])
def test_a_run_that_is_killed(name, tmp_path):
  write, out = SCENARIOS[name], tmp_path / 'out'
  write(out, 1)
  expected, new = files(tmp_path), content(out)
  for at in (3, 8):
    write(out, 0)
    old = content(out)
    program = (
      f'from tests import faults_test as f; import pathlib; '
      f'f.trap().set({str(tmp_path)!r}, {at}, f.kill); '
      f'f.SCENARIOS[{name!r}](pathlib.Path({str(out)!r}), 1)'
    )
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert content(out) in (old, new)
    write(out, 1)
    assert files(tmp_path) == expected

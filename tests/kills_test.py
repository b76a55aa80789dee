"""Signals that end a command: nothing is left beside the target."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from fuzz import kills
import rotbits_jax

ROOT = pathlib.Path(__file__).parents[1]
DENSE = ROOT / 'tests/testdata/llama-tiny-dense'

# A command that gets a signal when a function of a module is called.
CODE = """
import importlib, os, signal, sys

from rotbits_jax.cli import main

number, place = int(sys.argv.pop(1)), sys.argv.pop(1)
for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
  signal.signal(other, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
module, _, path = place.partition(':')
owner = importlib.import_module(module)
*parts, name = path.split('.')
for part in parts:
  owner = getattr(owner, part)
function = getattr(owner, name)

def ended(*arguments, **options):
  os.kill(os.getpid(), number)
  return function(*arguments, **options)

setattr(owner, name, ended)
sys.exit(main.main())
"""


def end(folder, number, place, *arguments):
  """Returns the exit code and stderr of a command that gets a signal."""
  done = subprocess.run(
    [sys.executable, '-c', CODE, str(int(number)), place, *arguments],
    capture_output=True,
    check=False,
    cwd=folder,
    env=os.environ | {'PYTHONPATH': str(ROOT), 'ROTBITS_JAX_CACHE': str(folder)},
    text=True,
    timeout=100,
  )
  return done.returncode, done.stderr


RECORD = 'rotbits_jax.file.encode:Encoder.encode_record'
MOVE = 'rotbits_jax.system.outputs:move'
TENSOR = 'rotbits_jax.checkpoints.writer:FolderWriter.add_tensor'


@pytest.fixture(name='folder')
def _folder(tmp_path):
  rotbits_jax.encode_to_file(DENSE, tmp_path / 'file')
  return tmp_path


@pytest.mark.parametrize(
  ('place', 'arguments'),
  [
    (RECORD, f'encode {DENSE} x'),
    (RECORD, f'encode {DENSE} x --shard_size=200KB'),
    (MOVE, f'encode {DENSE} x --verify'),
    (TENSOR, 'decode file x'),
  ],
)
def test_a_command_that_is_ended_leaves_nothing(place, arguments, folder):
  code, _ = end(folder, signal.SIGTERM, place, *arguments.split())
  assert code == 128 + signal.SIGTERM
  assert os.listdir(folder) == ['file']


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGHUP])
def test_exit_codes_tell_the_signal(number, folder):
  assert end(folder, number, TENSOR, 'decode', 'file', 'x') == (128 + number, '')
  assert os.listdir(folder) == ['file']


def test_a_snapshot_that_is_ended_leaves_nothing(folder):
  code, _ = end(folder, signal.SIGTERM, TENSOR, 'snapshot', 'file')
  assert code == 128 + signal.SIGTERM
  assert os.listdir(folder / 'snapshots') == []


@pytest.mark.parametrize(
  'place', [TENSOR, MOVE, 'pathlib:Path.rename', 'rotbits_jax.system.outputs:_settle']
)
def test_an_older_folder_is_there_or_the_new_one(place, folder):
  rotbits_jax.decode_to_directory(folder / 'file', folder / 'x')
  config = folder / 'x' / 'config.json'
  config.write_text(config.read_text() + '\n')
  old = kills.files(folder / 'x')
  arguments = 'decode', 'file', 'x', '--overwrite'
  code, _ = end(folder, signal.SIGTERM, place, *arguments)
  assert code == 128 + signal.SIGTERM
  assert sorted(os.listdir(folder)) == ['file', 'x']
  found = kills.files(folder / 'x')
  assert found.keys() == old.keys()
  assert found['model.safetensors'] == old['model.safetensors']


def test_whole_shards_of_an_ended_run_stay_without_half_ones(folder):
  place, arguments = MOVE, f'encode {DENSE} x --shard_size=200KB'
  code, _ = end(folder, signal.SIGTERM, place, *arguments.split())
  assert code == 128 + signal.SIGTERM
  left = [name for name in kills.files(folder) if not name.endswith('/')]
  assert all('/model-' in name or name == 'file' for name in left)


@pytest.mark.slow
def test_the_table_of_kills():
  for _, wrong in kills.table([*kills.COMMANDS], ['TERM', 'KILL'], 2):
    assert not wrong

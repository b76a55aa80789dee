"""Files and folders of shards: they appear at once, whoever writes them."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import file
from rotbits_jax.file import encode
from rotbits_jax.file import shards
from tests import random_models

ROOT = pathlib.Path(__file__).parents[1]
SLICED, DENSE = map(checkpoints.example, ('phi2-tiny-sliced-0.25', 'llama-tiny-dense'))
TREE = {'a': {'b': np.arange(3)}, 'c': np.ones(4, np.float32), 'd': np.zeros((9, 9))}
OTHER = {'a': {'b': np.arange(3) + 1}, 'c': np.zeros(4, np.float32)}


def streams(path):
  """Returns the manifest's entry of each record, with the checksum of its stream."""
  reader = file.Reader(path)
  return dict(reader.records)


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(path, source=TREE, **options):
  rotbits_jax.encode_to_file(source, path, **({'shard_size': 1} | options))


@contextlib.contextmanager
def coded(killed_at=None):
  """Yields a list of the records that are coded; one ends the process, as it were."""
  names, encode_record = [], encode.Encoder.encode_record

  def noted(self, record, resolve, **options):
    names.append(record.name)
    if record.name == killed_at:
      raise KeyboardInterrupt
    return encode_record(self, record, resolve, **options)

  with mock.patch.object(encode.Encoder, 'encode_record', noted):
    if killed_at is None:
      yield names
    else:
      with pytest.raises(KeyboardInterrupt):
        yield names


@pytest.mark.parametrize('source', [TREE, {}, SLICED])
def test_shards_hold_the_streams_of_one_file(tmp_path, source):
  write(tmp_path / 'one', source, shard_size=None)
  write(tmp_path / 'many', source, shard_size=250_000 if source is SLICED else 1)
  assert streams(tmp_path / 'many') == streams(tmp_path / 'one')
  assert streams(tmp_path / 'many' / shards.INDEX) == streams(tmp_path / 'one')
  files = contents(tmp_path / 'many')
  index = json.loads(files.pop(shards.INDEX))
  assert index['metadata']['total_size'] == sum(map(len, files.values()))
  assert sorted(index['metadata']['manifest_crc32']) == sorted(files)
  assert rotbits_jax.inspect(tmp_path / 'many').file_bytes == sum(
    map(len, files.values())
  )


@pytest.mark.parametrize('preset', ['exact', 'free', 'near'])
def test_shards_are_jobs_that_run_in_any_order(tmp_path, preset):
  source = checkpoints.load_checkpoint(SLICED).model
  options = {'preset': preset, 'shard_size': 250_000}
  write(tmp_path / 'at_once', source, **options)
  plan = rotbits_jax.plan_shards(source, tmp_path / 'alone', **options)
  assert len(plan) > 2
  for index in reversed(range(len(plan))):
    rotbits_jax.plan_shards(source, tmp_path / 'alone', **options).encode(index)
    assert not (tmp_path / 'alone').exists()
  plan.publish()
  assert contents(tmp_path / 'alone') == contents(tmp_path / 'at_once')
  assert sorted(x.name for x in tmp_path.iterdir()) == ['alone', 'at_once']


def test_a_set_that_is_not_whole_is_not_published(tmp_path):
  plan = rotbits_jax.plan_shards(TREE, tmp_path / 'x', shard_size=1)
  plan.encode(1)
  with pytest.raises(FileNotFoundError):
    plan.publish()
  assert not (tmp_path / 'x').exists()


def test_a_killed_run_finds_its_shards_again(tmp_path):
  source, path = {name: np.arange(i + 3) for i, name in enumerate('abcde')}, tmp_path
  write(path / 'expected', source)
  with coded(killed_at='c'):
    write(path / 'x', source)
  with coded(killed_at='d') as names:
    write(path / 'x', source)
  assert names == ['c', 'd']
  with coded() as names:  # another source, and another preset
    write(path / 'y', source | {'a': np.ones(3)})
    write(path / 'z', checkpoints.Checkpoint(source, {'note': b''}, None))
  assert len(names) == 10
  with coded() as names:
    write(path / 'x', source, check=True)
  assert names == ['d', 'e']
  assert contents(path / 'x') == contents(path / 'expected')
  assert len([*path.iterdir()]) == 4


def test_which_folders_are_replaced(tmp_path):
  path = tmp_path / 'x'
  write(path, OTHER)
  with pytest.raises(FileExistsError, match='overwrite'):
    write(path)
  write(path, overwrite=True)
  assert len(contents(path)) == 4
  for name in ('mine', 'model-1-of-1.rotbits', 'copy.rotbits.index.json'):
    (path / name).touch()
    with pytest.raises(FileExistsError, match=f'{name} would be lost'):
      write(path, overwrite=True)
    (path / name).unlink()
  (path / shards.INDEX).rename(tmp_path / 'index')  # which names the shards
  with pytest.raises(FileExistsError, match='rotbits would be lost'):
    write(path, overwrite=True)
  with pytest.raises(IsADirectoryError):
    write(path, shard_size=None)
  shutil.rmtree(path)
  path.write_bytes(b'x')
  with pytest.raises(NotADirectoryError):
    write(path)


def test_no_file_of_an_input_is_replaced(tmp_path):
  source = tmp_path / 'in'
  shutil.copytree(SLICED, source)
  write(tmp_path / 'base')
  kept = {**contents(source), **contents(tmp_path / 'base')}
  for path, options in (
    (source / 'config.json', {'shard_size': None}),
    (source, {'shard_size': 250_000}),
    (tmp_path / 'base', {'source': TREE, 'base': tmp_path / 'base'}),
  ):
    with pytest.raises((ValueError, FileExistsError)):
      write(path, **({'source': source, 'overwrite': True} | options))
  assert {**contents(source), **contents(tmp_path / 'base')} == kept
  write(source / 'x.rotbits', source, shard_size=None)
  options = {'shard_size': None, 'overwrite': True}
  write(source / 'x.rotbits', source, **options)  # a result is no input


@pytest.mark.parametrize('replaced', ['source', 'base'])
@pytest.mark.parametrize('moment', ['first', 'last'])
def test_an_input_that_is_replaced_by_another_of_its_size_and_time(
  tmp_path, replaced, moment
):
  paths = {name: tmp_path / name for name in ('source', 'base')}
  for path in paths.values():
    shutil.copytree(DENSE, path)
  target = paths[replaced] / 'model.safetensors'
  state, other = target.stat(), tmp_path / 'other'
  other.write_bytes(target.read_bytes()[:-1] + b'x')
  os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
  encode_record, records = encode.Encoder.encode_record, []

  def replace(self, record, resolve, **options):
    records.append(record.name)
    if len(records) == (1 if moment == 'first' else len(self.counts)):
      other.replace(target)
    return encode_record(self, record, resolve, **options)

  patch = mock.patch.object(encode.Encoder, 'encode_record', replace)
  words = 'changed after it was opened'
  with patch, pytest.raises((OSError, ValueError), match=words):
    write(tmp_path / 'x', paths['source'], base=paths['base'], shard_size=None)
  assert sorted(x.name for x in tmp_path.iterdir()) == ['base', 'source']


WRONG_INDEXES = (
  (lambda x: x['weight_map'].pop('a'), 'is not that of these shards'),
  (lambda x: x['weight_map'].update(e=x['weight_map']['a']), 'is not that of'),
  (lambda x: x['weight_map'].update(a=x['weight_map']['c']), 'is not that of'),
  (lambda x: x['weight_map'].update(a='../x'), 'is not that of'),
  (lambda x: x['metadata'].pop('manifest_crc32'), 'manifest_crc32'),
  (lambda x: x.update(more=1), 'more'),
  (lambda x: x.update(more=' ' * (1 << 25)), 'bytes, more than'),
  (lambda x: x['metadata']['manifest_crc32'].popitem(), 'is not that of'),
)


def test_an_index_must_fit_its_shards(tmp_path):
  write(tmp_path / 'x')
  index = tmp_path / 'x' / shards.INDEX
  text = index.read_text()
  for change, words in WRONG_INDEXES:
    value = json.loads(text)
    change(value)
    index.write_text(json.dumps(value))
    with pytest.raises(file.ContainerError, match=words):
      file.Reader(tmp_path / 'x')


def test_an_index_with_a_changed_byte_is_refused_or_says_the_same(tmp_path):
  write(tmp_path / 'x', OTHER)
  index = tmp_path / 'x' / shards.INDEX
  data, expected = index.read_bytes(), streams(tmp_path / 'x')
  for position in range(len(data)):
    damaged = bytearray(data)
    damaged[position] ^= 1 << position % 7
    index.write_bytes(damaged)
    with contextlib.suppress(file.ContainerError):
      assert streams(tmp_path / 'x') == expected, position


def test_shards_of_other_runs_are_noticed(tmp_path):
  write(tmp_path / 'x')
  write(tmp_path / 'y', checkpoints.Checkpoint(TREE, {'note': b''}, None))
  last = max(tmp_path.glob('x/model-*'))
  data = last.read_bytes()
  shutil.copy(tmp_path / 'y' / last.name, last)
  with pytest.raises(file.ContainerError, match='is not that of these shards'):
    file.Reader(tmp_path / 'x')
  last.write_bytes(data)
  file.Reader(tmp_path / 'x')
  last.unlink()
  with pytest.raises(file.ContainerError, match='missing'):
    file.Reader(tmp_path / 'x')


def test_the_file_is_within_a_percent_of_the_size(tmp_path):
  config = random_models.BASE | {'num_hidden_layers': 2, 'vocab_size': 600}
  model, target = random_models.random_model(config, np.float16), 45_000
  path = tmp_path / 'near.rotbits'
  options = {'preset': 'near', 'shard_size': None}
  write(path, model, target_size=target, offsets={'head/kernel': -1.0}, **options)
  assert 0.99 * target <= path.stat().st_size <= target
  for size in (5_000, 10**9):
    with pytest.raises(ValueError, match='near has steps'):
      write(tmp_path / 'x', model, target_size=size, **options)
  with pytest.raises(ValueError, match='finds the step'):
    write(tmp_path / 'x', model, target_size=target, step=-5.0, **options)
  assert not (tmp_path / 'x').exists()


@pytest.mark.slow
def test_processes_write_the_bytes_of_one(tmp_path):
  write(tmp_path / 'one', DENSE, shard_size=200_000)
  program = (
    'import jax, sys\n'
    f'jax.distributed.initialize("localhost:{20000 + os.getpid() % 20000}", 4, '
    'int(sys.argv[1]))\n'
    'import rotbits_jax\n'
    f'rotbits_jax.encode_to_file({str(DENSE)!r}, {str(tmp_path / "four")!r}, '
    'shard_size=200_000)\n'
  )
  processes = [
    subprocess.Popen([sys.executable, '-c', program, str(i)], cwd=ROOT)
    for i in range(4)
  ]
  assert [process.wait(timeout=500) for process in processes] == [0] * 4
  assert contents(tmp_path / 'four') == contents(tmp_path / 'one')


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:os.fork')  # by Ray, which runs a program then
def test_a_cluster_writes_the_bytes_of_one_process(tmp_path, monkeypatch):
  monkeypatch.setenv('RAY_AUTH_MODE', 'disabled')  # else it makes a token
  ray = pytest.importorskip('ray')
  from examples import encode_on_ray

  write(tmp_path / 'one', DENSE, shard_size=200_000)
  environment = {'env_vars': {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}}
  ray.init(num_cpus=2, include_dashboard=False, runtime_env=environment)
  try:
    paths = str(DENSE), str(tmp_path / 'ray')
    encode_on_ray.encode(*paths, shard_size=200_000)
  finally:
    ray.shutdown()
  assert contents(tmp_path / 'ray') == contents(tmp_path / 'one')

"""Outputs: which paths may be written, and how old results are kept."""

import concurrent.futures
import contextlib
import errno
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import word_checkpoints

import rotbits_jax
from rotbits_jax.system import files
from rotbits_jax.system import locks
from rotbits_jax.system import outputs
from rotbits_jax.system import signals

ROOT = pathlib.Path(__file__).parents[1]
DENSE = ROOT / 'tests/testdata/llama-tiny-dense'


def fifo(folder):
  os.mkfifo(folder / 'x')
  return folder / 'x'


@pytest.mark.parametrize(
  ('make', 'words'),
  [
    (fifo, 'not a regular file'),
    (lambda folder: os.devnull, 'not a regular file'),
    (lambda folder: '', 'not a regular file'),
  ],
)
def test_what_is_not_written(tmp_path, make, words):
  with pytest.raises(OSError, match=words):
    outputs.check(pathlib.Path(make(tmp_path)).resolve(), overwrite=True)


def test_what_a_killed_run_left_is_removed(tmp_path):
  staging = outputs.staging(tmp_path / 'x')
  (staging / 'folder').mkdir(parents=True)
  (staging / 'folder' / 'file').write_text('half')
  (staging / 'link').symlink_to(tmp_path)
  with outputs.writer(tmp_path / 'x') as folder:
    assert list(folder.iterdir()) == []
    assert {*staging.iterdir()} == {folder, staging / 'lock'}
  assert list(tmp_path.iterdir()) == []


def test_a_link_is_no_staging_folder(tmp_path):
  outside = tmp_path / 'outside'
  outside.mkdir()
  (outside / 'file').write_text('stays')
  staging = outputs.staging(tmp_path / 'x')
  staging.symlink_to(outside)
  with pytest.raises(OSError, match='exists'), outputs.writer(tmp_path / 'x'):
    raise AssertionError
  assert os.listdir(outside) == ['file']


@contextlib.contextmanager
def another_process(call):
  """Lets another process be in a context of `outputs`, given as code."""
  code = f"""
import pathlib, sys
from rotbits_jax.system import outputs
with {call} as folder:
  (folder / 'half').write_text('x')
  print(folder, flush=True)
  sys.stdin.read()
"""
  pipe = subprocess.PIPE
  command = [sys.executable, '-c', code]
  with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as other:
    yield pathlib.Path(other.stdout.readline().strip())
    other.stdin.close()
    assert other.wait() == 0


TREE = {'a': np.arange(9), 'b': np.ones(9)}
DIGEST = '0123456789abcdef'


@pytest.mark.parametrize('shard_size', [None, 1])
@pytest.mark.parametrize(
  'call', ['outputs.writer({})', f'outputs.job({{}}, {DIGEST!r}, alone=False)']
)
def test_a_second_writer_is_refused_and_touches_nothing(tmp_path, call, shard_size):
  target = tmp_path / 'x'
  with another_process(call.format(f'pathlib.{target!r}')) as folder:
    (folder / 'half').write_text('of the first')
    with pytest.raises(OSError, match='another process writes here'):
      rotbits_jax.encode_to_file(TREE, target, shard_size=shard_size)
    assert (folder / 'half').read_text() == 'of the first'


def test_a_check_touches_nothing_of_a_writer(tmp_path):
  with outputs.writer(tmp_path / 'x') as folder:
    outputs.check(tmp_path / 'x', overwrite=False)
    outputs.directory_target(tmp_path / 'x')
    assert folder.exists()


def test_a_second_writer_of_a_folder_is_refused(tmp_path):
  rotbits_jax.encode_to_file(DENSE, tmp_path / 'file')
  with (
    another_process(f'outputs.writer(pathlib.{tmp_path / "x"!r})'),
    pytest.raises(OSError, match='another process writes here'),
  ):
    rotbits_jax.decode_to_directory(tmp_path / 'file', tmp_path / 'x')


@pytest.mark.parametrize(
  ('arguments', 'place'),
  [
    ('encode {dense} x', ''),
    ('encode {dense} x --overwrite --preset=free', ''),
    ('encode {dense} x --shard_size=200KB', ''),
    ('encode {dense} x --preset=near --target_size=100KB', ''),
    ('decode file x', ''),
    ('report file x', ''),
    ('slice {words} x --sparsity=0.25 --text=text', ''),
    ('snapshot file', 'snapshots'),
  ],
)
def test_commands_refuse_a_target_that_another_process_writes(
  arguments, place, rotbits, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('ROTBITS_JAX_CACHE', str(tmp_path))
  (tmp_path / 'file').write_bytes(encoded())
  (tmp_path / 'text').write_text(word_checkpoints.random_text(40))
  words = word_checkpoints.copy_with_tokenizer(DENSE.name, tmp_path)
  target = tmp_path / 'x'
  if place:
    target = rotbits_jax.snapshot(tmp_path / 'file')
    shutil.rmtree(target)
  with another_process(f'outputs.writer(pathlib.{target!r})') as folder:
    code, out, err = rotbits(*arguments.format(dense=DENSE, words=words).split())
    assert (code, out) == (2, '')
    assert err.endswith(f'{target}: another process writes here\n')
    assert os.listdir(folder) == ['half']


def test_a_bad_input_is_named_and_touches_nothing_of_a_writer(
  rotbits, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with another_process(f'outputs.writer(pathlib.{tmp_path / "x"!r})') as folder:
    for command in ('encode', 'decode'):
      code, _, err = rotbits(command, 'missing', 'x')
      assert code == 2
      assert 'missing' in err
    assert os.listdir(folder) == ['half']


def test_the_next_snapshot_removes_what_a_killed_one_left(tmp_path, monkeypatch):
  monkeypatch.setenv('ROTBITS_JAX_CACHE', str(tmp_path))
  (tmp_path / 'file').write_bytes(encoded())
  left = outputs.staging(tmp_path / 'snapshots' / 'of another file')
  (left / 'half').mkdir(parents=True)
  snapshot = rotbits_jax.snapshot(tmp_path / 'file')
  assert [*(tmp_path / 'snapshots').iterdir()] == [snapshot]


def test_processes_of_one_job_share_its_folder(tmp_path):
  target = tmp_path / 'x'
  call = f'outputs.job(pathlib.{target!r}, {DIGEST!r}, alone=False)'
  with another_process(call) as folder:
    with outputs.job(target, DIGEST, alone=False) as same:
      assert same == folder
    with (
      pytest.raises(OSError, match='another process'),
      outputs.job(target, DIGEST, alone=True),
    ):
      raise AssertionError
    assert os.listdir(folder) == ['half']


def test_shards_that_a_process_writes_are_not_removed(tmp_path):
  stale = outputs.job_folder(tmp_path / 'x', 'f' * 16)
  stale.mkdir(parents=True)
  (stale / 'shard').touch()
  call = f'outputs.job(pathlib.{tmp_path / "x"!r}, {DIGEST!r}, alone=False)'
  with another_process(call) as folder:
    outputs.remove_stale(tmp_path, 'x')
    assert folder.exists()
    assert not stale.parent.exists()


def test_a_thread_may_write_what_it_has_reserved(tmp_path):
  with outputs.reserved(tmp_path / 'x'):
    rotbits_jax.encode_to_file(TREE, tmp_path / 'x', shard_size=1)
    rotbits_jax.encode_to_file(TREE, tmp_path / 'y')
  assert sorted(os.listdir(tmp_path)) == ['x', 'y']


def test_a_folder_gets_its_name_back_after_a_kill_between_the_renames(tmp_path):
  older = tmp_path / '.x.replaced'
  older.mkdir()
  (older / 'model.safetensors').write_text('old')
  with pytest.raises(FileExistsError):
    rotbits_jax.save_checkpoint(rotbits_jax.load_checkpoint(DENSE), tmp_path / 'x')
  assert (tmp_path / 'x/model.safetensors').read_text() == 'old'
  assert os.listdir(tmp_path) == ['x']


def test_an_older_folder_that_was_not_removed_is_removed(tmp_path):
  for name in ('.x.replaced', 'x'):
    (tmp_path / name).mkdir()
  with outputs.writer(tmp_path / 'x'):
    pass
  assert os.listdir(tmp_path) == ['x']


def test_file_systems_without_locks_are_named_once(tmp_path, monkeypatch, capsys):
  def flock(*arguments):
    raise OSError(errno.ENOLCK, 'No locks available')

  locks._warn.cache_clear()
  monkeypatch.setattr(locks.fcntl, 'flock', flock)
  for name in 'xy':
    rotbits_jax.encode_to_file(TREE, tmp_path / name)
  assert capsys.readouterr().err.count('No locks available') == 1
  assert sorted(os.listdir(tmp_path)) == ['x', 'y']


def test_without_locks_a_writer_keeps_what_another_prepares(tmp_path, monkeypatch):
  monkeypatch.setattr(locks, 'fcntl', None)
  with (
    outputs.writer(tmp_path / 'x') as first,
    another_thread(outputs.writer(tmp_path / 'x')) as second,
  ):
    assert first.exists()
    assert second.exists()
  assert os.listdir(tmp_path) == []


@contextlib.contextmanager
def another_thread(context):
  """Enters and leaves a context in another thread."""
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    yield pool.submit(context.__enter__).result()
    pool.submit(context.__exit__, None, None, None).result()


def modes(folder):
  paths = (folder, *folder.rglob('*'))
  return {x.relative_to(folder).as_posix(): x.stat().st_mode & 0o777 for x in paths}


def test_modes_of_new_results_are_those_of_the_umask(tmp_path):
  rotbits_jax.encode_to_file(DENSE, tmp_path / 'file')
  rotbits_jax.decode_to_directory(tmp_path / 'file', tmp_path / 'out')
  umask = os.umask(0)
  os.umask(umask)
  expected = modes(tmp_path / 'out')
  assert expected.pop('.') == 0o777 & ~umask
  assert {*expected.values(), modes(tmp_path)['file']} == {0o666 & ~umask}


def test_what_is_overwritten_keeps_its_mode(tmp_path):
  for _ in range(2):
    rotbits_jax.encode_to_file(DENSE, tmp_path / 'file', overwrite=True)
    rotbits_jax.decode_to_directory(tmp_path / 'file', tmp_path / 'out', overwrite=True)
    for name in ('file', 'out/model.safetensors'):
      (tmp_path / name).chmod(0o600)
    (tmp_path / 'out').chmod(0o750)
  rotbits_jax.encode_to_file(DENSE, tmp_path / 'file', overwrite=True)
  rotbits_jax.decode_to_directory(tmp_path / 'file', tmp_path / 'out', overwrite=True)
  found = modes(tmp_path)
  assert found['file'] == found['out/model.safetensors'] == 0o600
  assert found['out'] == 0o750


def test_nobody_else_reads_what_is_prepared(tmp_path):
  with outputs.writer(tmp_path / 'x') as folder:
    assert folder.parent.stat().st_mode & 0o777 == 0o700


def test_folders_are_synced_after_the_rename(tmp_path, monkeypatch):
  synced, fsync = [], os.fsync
  state_of = lambda path: (path.stat().st_dev, path.stat().st_ino)

  def noted(handle):
    state = os.fstat(handle)
    synced.append((state.st_dev, state.st_ino, (tmp_path / 'x').exists()))
    fsync(handle)

  monkeypatch.setattr(os, 'fsync', noted)
  with outputs.writer(tmp_path / 'x') as folder:
    (folder / 'sub').mkdir()
    (folder / 'sub' / 'file').touch()
    outputs.move(folder, tmp_path / 'x')
  for name in ('x', 'x/sub', 'x/sub/file'):
    assert (*state_of(tmp_path / name), False) in synced
  assert synced[-1] == (*state_of(tmp_path), True)


def change(path, number):
  with signals.unbroken():
    signal.raise_signal(number)
    path.touch()


def test_a_signal_waits_until_a_change_is_whole(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    change(tmp_path / 'x', signal.SIGINT)
  assert (tmp_path / 'x').exists()


def end_twice(ending):
  with ending.raised():
    try:
      signal.raise_signal(signal.SIGTERM)
    finally:
      signal.raise_signal(signal.SIGTERM)
      signal.raise_signal(signal.SIGHUP)
      ending.cleaned = True


def test_signals_of_a_moment_are_one():
  ending = signals.Ending()
  with pytest.raises(KeyboardInterrupt):
    end_twice(ending)
  assert ending.cleaned
  assert ending.number == signal.SIGTERM


# ml_collections loads config files the old way.
pytestmark = pytest.mark.filterwarnings('ignore:.*load_module:DeprecationWarning')

URLS = 's3://bucket/x', 'gs://bucket/x', 'hf://org/model', 'https://a.b/c', 'file:///x'
USES = {
  'encode': lambda url: rotbits_jax.encode(url),
  'encode base': lambda url: rotbits_jax.encode(DENSE, base=url),
  'encode_to_file': lambda url: rotbits_jax.encode_to_file(TREE, url),
  'shards': lambda url: rotbits_jax.encode_to_file(TREE, url, shard_size=1),
  'decode': lambda url: rotbits_jax.decode(url),
  'decode base': lambda url: rotbits_jax.decode(encoded_with_base(), base=url),
  'decode_to_directory': lambda url: rotbits_jax.decode_to_directory(encoded(), url),
  'verify': lambda url: rotbits_jax.verify(url),
  'against': lambda url: rotbits_jax.verify(encoded(), against=url),
  'snapshot': lambda url: rotbits_jax.snapshot(url),
  'load': lambda url: rotbits_jax.load(url),
  'load_checkpoint': lambda url: rotbits_jax.load_checkpoint(url),
  'save_checkpoint': lambda url: rotbits_jax.save_checkpoint(
    rotbits_jax.load_checkpoint(DENSE), url
  ),
  'inspect': lambda url: rotbits_jax.inspect(url),
  'apply': lambda url: rotbits_jax.apply(url, TREE),
  'read_tensor': lambda url: rotbits_jax.read_tensor(url, 'a'),
}


@functools.cache
def encoded():
  return rotbits_jax.encode(DENSE)


@functools.cache
def encoded_with_base():
  return rotbits_jax.encode(DENSE, base=DENSE)


@pytest.mark.parametrize('name', USES)
def test_urls_are_refused_wherever_paths_enter(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for url in (URLS[0], pathlib.Path(URLS[0])):
    with pytest.raises(ValueError, match=r'gcsfuse.*fsspec'):
      USES[name](url)
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
  'arguments',
  [
    'encode {url}',
    'encode {dense} {url}',
    'encode {dense} {url} --shard_size=1MB',
    'encode {dense} x --base={url}',
    'encode {dense} x --preset=near --text={url}',
    'decode {url}',
    'decode {file} {url}',
    'decode {file} x --base={url}',
    'estimate {url}',
    'inspect {url}',
    'report {url}',
    'report {file} {url}',
    'verify {url}',
    'verify {file} --against={url}',
    'evaluate {url} --text=x',
    'evaluate {dense} --text={url}',
    'snapshot {url}',
    'slice {url} x --sparsity=0.25 --text=x',
    'slice {dense} {url} --sparsity=0.25 --text=x',
    'slice {dense} x --sparsity=0.25 --text={url}',
  ],
)
def test_commands_refuse_urls(arguments, rotbits, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').write_bytes(encoded())
  words = arguments.format(url='gs://b/x', dense=DENSE, file='file').split()
  code, out, err = rotbits(*words)
  assert (code, out) == (2, '')
  assert 'gcsfuse' in err
  assert os.listdir(tmp_path) == ['file']


@pytest.mark.parametrize('url', URLS)
def test_urls_of_all_schemes_are_refused(url):
  with pytest.raises(ValueError, match='only local paths'):
    files.local_path(url)


def test_the_way_out_for_hugging_face():
  words = 'hf download org/model --local-dir=model$'
  for url in ('hf://org/model', 'hf://org/model@main/sub/x', 'hf://org/model/'):
    with pytest.raises(ValueError, match=words):
      files.local_path(url)
  with pytest.raises(ValueError, match=words):
    rotbits_jax.load_checkpoint('org/model')
  assert 'hf' not in files.missing('/org/model') + files.missing('model')


@pytest.mark.parametrize('path', ['a:b', 'C:/x', '~/x', 'a/b:/c', 'x:/'])
def test_paths_with_colons_are_no_urls(path):
  assert files.local_path(path)


def test_home_is_expanded_wherever_paths_enter(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  source = rotbits_jax.checkpoints.example('llama-tiny-dense')
  rotbits_jax.encode_to_file(source, '~/a', preset='exact')
  rotbits_jax.decode_to_directory('~/a', '~/b')
  checkpoint = rotbits_jax.load_checkpoint('~/b')
  rotbits_jax.save_checkpoint(checkpoint, pathlib.Path('~/c'))
  rotbits_jax.encode_to_file('~/c', '~/d', base='~/a', shard_size=10**5)
  assert rotbits_jax.verify('~/d', against='~/b', base='~/a').same_bits
  with pytest.raises(ValueError, match='input'):
    rotbits_jax.encode_to_file('~/c', '~/c/config.json', overwrite=True)
  assert sorted(os.listdir(tmp_path)) == ['a', 'b', 'c', 'd']

"""Outputs: which paths may be written, and how old results are kept."""

import os
import pathlib

import pytest

import rotbits_jax
from rotbits_jax.system import outputs


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
  with outputs.fresh(staging) as folder:
    assert list(folder.iterdir()) == []
  assert list(tmp_path.iterdir()) == []


def test_a_link_is_no_staging_folder(tmp_path):
  outside = tmp_path / 'outside'
  outside.mkdir()
  (outside / 'file').write_text('stays')
  staging = outputs.staging(tmp_path / 'x')
  staging.symlink_to(outside)
  with pytest.raises(OSError, match='exists'), outputs.fresh(staging):
    raise AssertionError
  assert (outside / 'file').exists()


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

"""Snapshots: a decoded folder for each content of a file, made once."""

import pathlib
from unittest import mock

import numpy as np
import pytest

import rotbits_jax
from rotbits_jax.file import directory

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
DENSE = TESTDATA / 'llama-tiny-dense'
SLICED = TESTDATA / 'phi2-tiny-sliced-0.25'


@pytest.fixture(autouse=True, name='cache')
def fixture_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('ROTBITS_JAX_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache/snapshots'


def encoded(source, path, **options):
  rotbits_jax.encode_to_file(source, path, **options)
  return path


def test_it_is_the_decoded_folder_and_is_made_once(tmp_path, cache):
  path = encoded(DENSE, tmp_path / 'x')
  folder = rotbits_jax.snapshot(path)
  rotbits_jax.decode_to_directory(path, tmp_path / 'decoded')
  read = lambda parent: {x.name: x.read_bytes() for x in parent.iterdir()}
  assert read(folder) == read(tmp_path / 'decoded')
  with mock.patch.object(directory, 'decode_to_directory', side_effect=AssertionError):
    assert rotbits_jax.snapshot(path.rename(tmp_path / 'y')) == folder
  assert list(cache.iterdir()) == [folder]


def test_a_sliced_model_gets_its_code(tmp_path):
  path = encoded(SLICED, tmp_path / 'x', preset='exact')
  assert (rotbits_jax.snapshot(path) / 'modeling_sliced.py').exists()


def test_bad_input_leaves_nothing(tmp_path, cache):
  path = encoded(DENSE, tmp_path / 'x')
  damaged = bytearray(path.read_bytes())
  damaged[len(damaged) // 3] ^= 1
  path.write_bytes(damaged)
  trees = encoded({'w': np.ones(8)}, tmp_path / 'tree')
  for file in (path, trees):
    with pytest.raises(rotbits_jax.ContainerError):
      rotbits_jax.snapshot(file)
  assert list(cache.iterdir()) == []
  good = rotbits_jax.snapshot(encoded(DENSE, tmp_path / 'good'))
  with pytest.raises(rotbits_jax.ContainerError):  # its manifest is that of `good`
    rotbits_jax.snapshot(path)
  assert list(cache.iterdir()) == [good]

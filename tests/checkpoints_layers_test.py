"""Checkpoints that are read and written one layer at a time."""

import itertools
import json
import os
import shutil
from unittest import mock

import chex
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import weights_files

from rotbits_jax import checkpoints
from rotbits_jax import structured
from rotbits_jax.checkpoints import CheckpointError
from rotbits_jax.checkpoints import tensors as tensors_lib
from tests import cases

DENSE, SLICED = 'llama-tiny-dense', 'llama-tiny-sliced-head-0.25'


def opened(name=DENSE):
  return checkpoints.open_checkpoint(cases.TESTDATA / name)


def dtypes_of(source):
  records = (structured.flatten(source.specs(record)) for record in source.records)
  return {path: np.dtype(x.dtype) for specs in records for path, x in specs.items()}


def writer_of(source, directory, **changes):
  """Makes a writer for the checkpoint that a source holds."""
  known = {
    'dtypes': dtypes_of(source),
    'files': source.files,
    'stem': source.stem,
    'buffers': source.buffers,
  }
  return checkpoints.CheckpointWriter(directory, source.config, **known | changes)


def write(source, directory, records, **changes):
  with writer_of(source, directory, **changes).open() as writer:
    for record in records:
      for path, leaf in reversed(structured.flatten(source.read(record)).items()):
        writer.add(path, leaf)


def backwards(source):
  return list(reversed(source.records))


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize('name', cases.CHECKPOINTS)
def test_layers_are_those_of_the_model_in_memory(name):
  source, checkpoint = opened(name), checkpoints.load_checkpoint(cases.TESTDATA / name)
  model = checkpoint.model
  assert source.config == model.config
  assert (source.files, source.stem) == checkpoint[1:]
  assert set(source.records) == set(model.records)
  for record in source.records:
    params, specs = source.read(record), structured.flatten(source.specs(record))
    chex.assert_trees_all_equal(params, model.read(record))
    for path, leaf in structured.flatten(params).items():
      assert (specs[path].shape, specs[path].dtype) == (leaf.shape, leaf.dtype)
  tensors = checkpoints.to_tensors(model)
  assert source.nbytes == sum(x.nbytes for x in tensors.values())


def test_a_layer_needs_its_own_shard_only(tmp_path):
  expected = opened().load().model
  write(opened(), tmp_path, backwards(opened()), shard_size=1)
  source = checkpoints.open_checkpoint(tmp_path)
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  for name, shard in index['weight_map'].items():
    if '.layers.1.' not in name:
      (tmp_path / shard).unlink()
  chex.assert_trees_all_equal(source.layer(1), expected.layer(1))
  with pytest.raises(CheckpointError, match='No such file'):
    source.outer()


@pytest.mark.parametrize('name', [DENSE, 'phi2-tiny-sliced-0.25'])
def test_a_file_that_changes_is_not_read(tmp_path, name):
  source = checkpoints.open_checkpoint(
    shutil.copytree(cases.TESTDATA / name, tmp_path / 'x')
  )
  source.layer(0)
  os.utime(source.path, ns=(0, 0))
  with pytest.raises(CheckpointError, match=f'{source.path}: .* changed after it'):
    source.layer(0)


def test_a_storage_is_verified_when_it_is_read_first(tmp_path):
  folder = shutil.copytree(cases.TESTDATA / 'phi2-tiny-sliced-0.25', tmp_path / 'x')
  (path,) = folder.glob('*.pt')
  row = weights_files.read_torch(path)['model.layers.2.mlp.fc1.weight'][5].tobytes()
  content = bytearray(path.read_bytes())
  content[content.index(row)] ^= 1
  path.unlink()  # its old content may still be mapped
  path.write_bytes(content)
  source = checkpoints.open_checkpoint(folder)
  source.layer(0)
  with pytest.raises(CheckpointError, match=rf'^{path}: the member .* checksum$'):
    source.layer(2)


@pytest.mark.parametrize('name', cases.CHECKPOINTS)
def test_layers_in_any_order_make_the_same_files(tmp_path, name):
  source = opened(name)
  for format in ('safetensors', 'slicegpt') if 'sliced' in name else ('safetensors',):
    here, there = tmp_path / format, tmp_path / f'{format} at once'
    write(source, here, backwards(source), format=format)
    checkpoints.save_checkpoint(source.load(), there, format)
    if format == 'safetensors':
      assert contents(here) == contents(there)
    loaded, expected = map(checkpoints.load_checkpoint, (here, there))
    chex.assert_trees_all_equal(loaded.model, expected.model)
    assert loaded[1:] == expected[1:] == (source.files, source.stem)


def test_shards(tmp_path):
  source = opened()
  tensors = checkpoints.to_tensors(source.load().model)
  limit = max(x.nbytes for x in tensors.values()) - 1
  checkpoints.save_checkpoint(source.load(), tmp_path / 'x')
  write(source, tmp_path / 'x', backwards(source), shard_size=limit, overwrite=True)
  index = json.loads((tmp_path / 'x' / 'model.safetensors.index.json').read_text())
  assert index['metadata'] == {'total_size': source.nbytes}
  shards = sorted(set(index['weight_map'].values()))
  count, found = len(shards), {}
  assert shards == [f'model-{i + 1:05}-of-{count:05}.safetensors' for i in range(count)]
  assert set(shards) <= contents(tmp_path / 'x').keys()
  assert 'model.safetensors' not in contents(tmp_path / 'x')
  for shard in shards:
    part = safetensors.numpy.load_file(tmp_path / 'x' / shard)
    assert len(part) == 1 or sum(x.nbytes for x in part.values()) <= limit
    found |= part
  assert found.keys() == index['weight_map'].keys()
  chex.assert_trees_all_equal(found, tensors)
  # The model that is loaded has an index, so it is saved in the same shards.
  checkpoints.save_checkpoint(
    checkpoints.load_checkpoint(tmp_path / 'x'), tmp_path / 'y'
  )
  assert contents(tmp_path / 'y') == contents(tmp_path / 'x')


@pytest.mark.parametrize('format', ['safetensors', 'slicegpt'])
def test_a_missing_layer_leaves_nothing(tmp_path, format):
  source = opened(SLICED)
  records = [record for record in backwards(source) if record != 'layers.1']
  with pytest.raises(ValueError, match=r'9 tensors have not .* model\.layers\.1'):
    write(source, tmp_path / 'x', records, format=format)
  assert not list(tmp_path.iterdir())


def without(dtypes, path):
  return {x: dtype for x, dtype in dtypes.items() if x != path}


REFUSED = (
  (SLICED, {'shard_size': 0}, 'shard_size must be positive'),
  (SLICED, {'shard_size': 9, 'format': 'slicegpt'}, 'shard_size .* slicegpt'),
  (SLICED, {'format': 'npz'}, "got 'npz'"),
  (DENSE, {'format': 'slicegpt'}, 'only a sliced model'),
  (SLICED, {'stem': None}, 'needs a stem'),
  (SLICED, {'stem': 'other'}, r'the file other\.json is missing'),
  (DENSE, {'files': {'../x': b''}}, 'not the name of a file'),
  (DENSE, {'files': {'model.safetensors': b''}}, 'two files have the name'),
  ('phi3-tiny-dense', {'dtypes': {'layers.0/mlp/up/kernel': 'f4'}}, 'several dtypes'),
)


def test_settings_that_are_refused(tmp_path, subtests):
  for name, change, match in REFUSED:
    source = opened(name)
    if 'files' in change:
      change = {'files': source.files | change['files']}
    if change.get('dtypes'):
      change = {'dtypes': dtypes_of(source) | change['dtypes']}
    with subtests.test(match), pytest.raises(ValueError, match=match):
      writer_of(source, tmp_path / 'x', **change)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, 'float64', 'bool'])
def test_arrays_are_written_row_by_row(dtype):
  rng = np.random.default_rng(0)
  x = rng.integers(0, 2 if dtype == 'bool' else 100, (150, 130)).astype(dtype)
  arrays = (
    x, x.T, x[::2, ::-1], x[:, 3:70].T, x[:0].T, x[:, :0], x[0], x[:, 0], x[3, 4],
    x.reshape(15, 10, 130).swapaxes(0, 2), np.broadcast_to(x[0], (70, 130)),
  )  # fmt: skip
  for array, piece in itertools.product(arrays, (1, 10_000, 1 << 23)):
    with mock.patch.object(tensors_lib, '_PIECE', piece):
      parts = [bytes(part) for part in tensors_lib.row_major(np.asarray(array))]
    assert b''.join(parts) == array.tobytes()

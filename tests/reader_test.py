"""The reader refuses what a manifest must not say, by name and before the work."""

import dataclasses
import os
from unittest import mock

import jax
import numpy as np
import pytest

from fuzz import containers
from fuzz import seeds
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import file
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.file import memory
from rotbits_jax.file import reader

TREE = {'a': {'b': np.arange(3)}, 'c': np.ones(4, np.float32)}
WRONG = (None, -1, 2**62, True, 'x', [], {}, [[]], {'x': 1}, 1e300)
# Fields that may hold other values of their type, because decoding does not need them.
FREE = {'preset', 'options', 'keeps', 'stem', 'savings', 'input', 'files', 'stack_key'}


def edited(data, edit):
  """Returns a container after an edit of its streams and its manifest."""
  streams, manifest = containers.unpack(data)
  edit(streams, manifest)
  return containers.pack(streams, containers.to_json(manifest))


def edited_tree(edit):
  source = rotbits_jax.Checkpoint(TREE, {'x': bytes(1 << 20)}, None)
  return edited(rotbits_jax.encode(source), edit)


def notes(*values):
  """Returns the edit that gives a record these notes."""
  return lambda _, m: m['records'][0].update(savings=[['x', 1, 1, list(values)]])


def renamed(name):
  """Returns the edit that gives another file of the checkpoint this name."""

  def edit(streams, manifest):
    streams[f'files/{name}'] = streams.pop('files/x')
    manifest['files'] = {name: manifest['files']['x']}

  return edit


TREES = {
  'longer stream': (
    lambda s, m: m['records'][0].update(nbytes=1),
    'a: the header',
  ),
  'no leaves': (lambda s, m: m['records'][0].update(leaves=[]), 'a: .*not under its'),
  'two leaves of a path': (
    lambda s, m: m['records'][0]['leaves'].append(m['records'][0]['leaves'][0]),
    'two leaves have the same name',
  ),
  'a leaf of another record': (
    lambda s, m: m['records'][0]['leaves'][0].update(path='c/b'),
    'a: a leaf of the record is not under its name',
  ),
  'a stream that the header lacks': (
    lambda s, m: s.pop('files/x'),
    'files/x: the header and the manifest differ',
  ),
  'a stream that the manifest lacks': (
    lambda s, m: s.update(d=b''),
    'd: the header and the manifest differ',
  ),
  'a bomb': (lambda s, m: m['files']['x'].__setitem__(2, 1 << 40), r'files\[...\]'),
  'a note that is none': (notes(3), r'records\[0\].savings\[0\]'),
  **{
    f'a file {name!r:.9}': (renamed(name), 'not the name of a file')
    for name in ('../x', '/x', 'x/../y', '\x1b', 'x\\y', 'x' * 300, '.git/config')
  },
}


def test_manifests_of_trees(subtests):
  for name, (edit, words) in TREES.items():
    with subtests.test(name), pytest.raises(file.ContainerError, match=words):
      rotbits_jax.decode(edited_tree(edit))


def test_every_field_of_the_manifest_is_checked():
  data = seeds.container('free')
  streams, manifest = containers.unpack(data)
  record = manifest['records'][0]
  for place in (manifest, record, record['leaves'][0], record['leaves'][-1]):
    for name, old in list(place.items()):
      for new in [x for x in WRONG if x != old or type(x) is not type(old)]:
        place[name] = new
        try:
          rotbits_jax.decode(containers.pack(streams, containers.to_json(manifest)))
        except file.ContainerError:
          continue
        assert name in FREE or (name == 'config' and new is None)  # a PyTree
      place[name] = old


@pytest.mark.parametrize('size', [0, (1 << 20) - 1, (1 << 20) + 1])
def test_other_files_are_inflated_to_a_size_that_is_bounded(size):
  data = edited_tree(lambda s, m: m['files']['x'].__setitem__(2, size))
  with pytest.raises(file.ContainerError, match='files/x: it must inflate to'):
    file.Reader(data).files()


def test_what_decodes_to_more_than_memory_is_refused_before_it_is_allocated(
  tmp_path, monkeypatch
):
  data = rotbits_jax.encode({'a': np.zeros(1 << 17), 'b': np.zeros(1 << 17)})
  limit = tmp_path / 'limit'
  monkeypatch.setattr(memory, '_LIMITS', (limit, 'missing'))
  for text, is_read in {'100\n': (), f'{3 << 19}\n': 'a', 'max\n': 'ab'}.items():
    limit.write_text(text)
    memory._available.cache_clear()
    calls = {
      'a': lambda: rotbits_jax.read_record(data, 'a'),
      'b': lambda: rotbits_jax.decode(data),
    }
    for name, call in calls.items():
      if name in is_read:
        call()
      else:
        with pytest.raises(file.ContainerError, match='it decodes to'):
          call()
  memory._available.cache_clear()
  full = mock.patch.object(reader.host, 'empty', side_effect=MemoryError)
  with full, pytest.raises(file.ContainerError, match='more than memory holds'):
    rotbits_jax.decode(data)


@pytest.mark.parametrize('read', [rotbits_jax.decode, rotbits_jax.load])
def test_a_file_that_shrinks_while_it_is_read(tmp_path, read):
  path, read_file = tmp_path / 'x', file.container.files.File.read
  rotbits_jax.encode_to_file(seeds.sliced_model(seeds.LLAMA), path, preset='exact')
  whole, reads = path.read_bytes(), []

  def read_less(self, offset, out):
    reads.append(offset)
    if len(reads) == 5:  # behind the header and the manifest
      path.write_bytes(whole[: offset + out.size // 2])
      os.utime(path, ns=self.identity[2:3] * 2)
    return read_file(self, offset, out)

  patch = mock.patch.object(file.container.files.File, 'read', read_less)
  with patch, pytest.raises(file.ContainerError, match='changed after'):
    read(path)


def test_small_leaves_that_need_one_large_array_over_and_over_are_refused():
  leaf = structured.Tied(np.zeros((64, 1), np.float16), 300)
  tree = {'head': {'kernel': np.ones((64, 300), np.float16)}}
  reader = file.Reader(rotbits_jax.encode(tree | {'x': [leaf] * 9}))
  assert len(reader.read('x')['x']) == 9
  data = rotbits_jax.encode(tree | {'x': [leaf] * 40})
  with pytest.raises(file.ContainerError, match='need large arrays too often'):
    file.Reader(data)


def test_a_parameter_that_a_leaf_needs_must_be_there():
  dense = rotbits_jax.load_checkpoint(checkpoints.example('llama-tiny-dense')).model
  tied = structured.Tied(
    np.eye(dense.config.hidden_size, dtype=np.float16), dense.config.vocab_size
  )
  model = dataclasses.replace(dense, params=dense.params | {'embed': {'tokens': tied}})

  def edit(streams, manifest):
    del streams['head']
    manifest['config']['tied_head'] = True
    manifest['records'] = [x for x in manifest['records'] if x['name'] != 'head']

  data = edited(rotbits_jax.encode(model, preset='exact'), edit)
  with pytest.raises(file.ContainerError):
    rotbits_jax.decode(data)


@pytest.mark.parametrize('name', ['llama-tiny-dense', 'phi3-tiny-dense'])
def test_plain_tensors_of_a_known_family_load_as_the_model(tmp_path, name):
  source = checkpoints.example(name)
  expected = rotbits_jax.load_checkpoint(source).model
  rotbits_jax.encode_to_file(checkpoints.open_plain(source), tmp_path / 'x')
  model = rotbits_jax.load(tmp_path / 'x')
  assert model.config == expected.config
  jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)
  part = rotbits_jax.load(tmp_path / 'x', layers=range(1, 2))
  assert models.names.stacks(part.params) == (range(1, 2),)
  rotbits_jax.decode_to_directory(tmp_path / 'x', tmp_path / 'out')
  for path in (tmp_path / 'out').iterdir():
    assert path.read_bytes() == (source / path.name).read_bytes()
  rotbits_jax.decode_to_directory(tmp_path / 'x', tmp_path / 'half', dtype='bfloat16')
  half = rotbits_jax.load_checkpoint(tmp_path / 'half').model.params
  jax.tree.map(
    np.testing.assert_array_equal, half, structured.astype(expected.params, 'bfloat16')
  )

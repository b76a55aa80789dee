"""Tests of checkpoints that are read one layer at a time."""

import json
import os
import pathlib
import shutil
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import numpy as np
import weights_files

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import CheckpointError
from rotbits_jax.checkpoints import lazy
from rotbits_jax.system import files

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
FIXTURES = sorted(path.parent.name for path in TESTDATA.glob('*/config.json'))


class SourceTest(parameterized.TestCase):
  def copy(self, name):
    scratch = self.enterContext(tempfile.TemporaryDirectory())
    return pathlib.Path(shutil.copytree(TESTDATA / name, f'{scratch}/x'))

  def sharded(self, name='llama-tiny-dense'):
    """Copies a checkpoint to shards; `outer`, `0`, `1`, ... hold one unit each."""
    directory = self.copy(name)
    weights = directory / 'model.safetensors'
    tensors = weights_files.read_safetensors(weights)
    shards = {}
    for tensor in tensors:
      parts = tensor.split('.')
      unit = parts[2] if parts[1] == 'layers' else 'outer'
      shards.setdefault(f'{unit}.safetensors', []).append(tensor)
    for shard, names in shards.items():
      weights_files.write_safetensors(directory / shard, {n: tensors[n] for n in names})
    weight_map = {n: shard for shard, names in shards.items() for n in names}
    index = json.dumps({'metadata': {}, 'weight_map': weight_map})
    (directory / 'model.safetensors.index.json').write_text(index)
    weights.unlink()
    return directory

  @parameterized.parameters(*FIXTURES)
  def test_it_gives_what_the_model_in_memory_gives(self, name):
    source = checkpoints.open_checkpoint(TESTDATA / name)
    checkpoint = checkpoints.load_checkpoint(TESTDATA / name)
    model = checkpoint.model
    self.assertEqual(source.config, model.config)
    self.assertEqual((source.files, source.stem), checkpoint[1:])
    self.assertEqual(source.path.parent, TESTDATA / name)
    self.assertEqual(set(source.records), set(model.records))
    for record in source.records:
      params, specs = source.read(record), structured.flatten(source.specs(record))
      chex.assert_trees_all_equal(params, model.read(record))
      for path, leaf in structured.flatten(params).items():
        spec = specs[path]
        self.assertEqual((spec.shape, spec.dtype), (leaf.shape, leaf.dtype))
      self.assertEqual(models.stack_key(source.specs(record)), models.stack_key(params))
    chex.assert_trees_all_equal(source.outer(), model.outer())
    tensors = checkpoints.to_tensors(model)
    self.assertEqual(source.elements, sum(x.size for x in tensors.values()))
    self.assertEqual(source.nbytes, sum(x.nbytes for x in tensors.values()))

  def test_a_call_reads_new_arrays(self):
    source = checkpoints.open_checkpoint(TESTDATA / 'phi3-tiny-sliced-0.25')
    first, second = source.layer(1), source.layer(1)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
      self.assertFalse(np.shares_memory(a, b))

  def test_a_layer_needs_its_own_shard_only(self):
    directory = self.sharded()
    expected = checkpoints.load_checkpoint(TESTDATA / 'llama-tiny-dense').model
    chex.assert_trees_all_equal(checkpoints.load_checkpoint(directory).model, expected)
    source = checkpoints.open_checkpoint(directory)
    for shard in directory.glob('*.safetensors'):
      if shard.name != '1.safetensors':
        shard.unlink()
    chex.assert_trees_all_equal(source.layer(1), expected.layer(1))
    with self.assertRaisesRegex(CheckpointError, 'outer.safetensors: No such file'):
      source.outer()

  def test_a_layer_reads_its_own_tensors_only(self):
    source = checkpoints.open_checkpoint(TESTDATA / 'llama-tiny-dense')
    with mock.patch.object(
      files.File, 'read', autospec=True, side_effect=files.File.read
    ) as read:
      layer = source.layer(1)
    places = [(call.args[1], call.args[2].nbytes) for call in read.mock_calls]
    leaves = jax.tree.leaves(layer)
    self.assertLen(set(places), len(leaves))
    self.assertEqual(sum(size for _, size in places), sum(x.nbytes for x in leaves))

  def test_there_is_no_such_layer(self):
    source = checkpoints.open_checkpoint(TESTDATA / 'llama-tiny-dense')
    for index in (-1, source.config.num_layers):
      with self.assertRaisesRegex(IndexError, f'layers, got index={index}'):
        source.layer(index)

  @parameterized.parameters('llama-tiny-dense', 'phi2-tiny-sliced-0.25')
  def test_a_file_that_changes_is_not_read(self, name):
    source = checkpoints.open_checkpoint(self.copy(name))
    source.layer(0)
    os.utime(source.path, ns=(0, 0))
    with self.assertRaisesRegex(CheckpointError, f'{source.path}: .* changed after it'):
      source.layer(0)

  def test_fingerprint(self):
    directory = self.sharded()
    fingerprint = lambda: checkpoints.open_checkpoint(directory).fingerprint()
    seen = {fingerprint()}
    self.assertEqual(seen, {fingerprint()})
    config = json.loads((directory / 'config.json').read_text())
    for change in (
      lambda: os.utime(directory / '1.safetensors', ns=(0, 0)),
      lambda: os.utime(directory / 'model.safetensors.index.json', ns=(0, 0)),
      lambda: (directory / 'tokenizer.json').write_text('{}'),
      lambda: (directory / 'tokenizer.json').write_text('{ }'),
      lambda: (directory / 'config.json').write_text(
        json.dumps(config | {'rms_norm_eps': 1e-3})
      ),
    ):
      change()
      self.assertNotIn(fingerprint(), seen)
      seen.add(fingerprint())

  def test_a_storage_is_verified_when_it_is_read_first(self):
    directory = self.copy('phi2-tiny-sliced-0.25')
    path = next(directory.glob('*.pt'))
    tensors = weights_files.read_torch(path)
    name = 'model.layers.2.mlp.fc1.weight'
    content = bytearray(path.read_bytes())
    row = tensors[name][5].tobytes()
    content[content.index(row)] ^= 1
    del tensors
    path.write_bytes(content)
    source = checkpoints.open_checkpoint(directory)
    source.layer(0)
    with self.assertRaisesRegex(CheckpointError, rf'^{path}: the member .* checksum$'):
      source.layer(2)
    with self.assertRaisesRegex(CheckpointError, 'checksum'):
      source.load()

  def test_factors(self):
    directory = self.copy('llama-tiny-dense')
    path = directory / 'model.safetensors'
    tensors = {
      name: np.array(x) for name, x in weights_files.read_safetensors(path).items()
    }
    rng = np.random.default_rng(0)
    rows, columns = tensors.pop('model.layers.1.mlp.down_proj.weight').shape
    left, right = rng.normal(size=(rows, 3)), rng.normal(size=(3, columns))
    tensors['model.layers.1.mlp.down_u_proj.weight'] = left.astype(np.float16)
    tensors['model.layers.1.mlp.down_v_proj.weight'] = right.astype(np.float16)
    weights_files.write_safetensors(path, tensors)
    source = checkpoints.open_checkpoint(directory)
    spec = source.specs('layers.1')['layers.1']['mlp']['down']['kernel']
    self.assertEqual((spec.rank, spec.names), (3, 'svd_llm'))
    leaf = source.layer(1)['mlp']['down']['kernel']
    self.assertEqual(leaf.shape, (columns, rows))
    np.testing.assert_array_equal(leaf.v, left.astype(np.float16).T)
    self.assertEqual(
      models.stack_key(source.specs('layers.1')),
      models.stack_key(source.read('layers.1')),
    )
    self.assertEqual(
      source.load().model.stacks, tuple(range(i, i + 1) for i in range(3))
    )

  def test_a_tied_head_that_differs_is_refused_on_opening(self):
    directory = self.copy('llama-tiny-dense')
    path = directory / 'model.safetensors'
    config = json.loads((directory / 'config.json').read_text())
    (directory / 'config.json').write_text(
      json.dumps(config | {'tie_word_embeddings': True})
    )
    match = f'{path}: lm_head.weight differs from model.embed_tokens.weight'
    with self.assertRaisesRegex(CheckpointError, match):
      checkpoints.open_checkpoint(directory)
    tensors = {
      name: np.array(x) for name, x in weights_files.read_safetensors(path).items()
    }
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
    weights_files.write_safetensors(path, tensors)
    source = checkpoints.open_checkpoint(directory)
    self.assertFalse(source.config.tied_head)

  def test_buffers_are_read_when_they_are_asked_for(self):
    directory = self.copy('llama-tiny-dense')
    path = directory / 'model.safetensors'
    tensors = {
      name: np.array(x) for name, x in weights_files.read_safetensors(path).items()
    }
    name = 'model.layers.0.self_attn.rotary_emb.inv_freq'
    tensors[name] = np.arange(4, dtype=np.float32)
    weights_files.write_safetensors(path, tensors)
    source = checkpoints.open_checkpoint(directory)
    chex.assert_trees_all_equal(source.buffers, {name: tensors[name]})
    self.assertEqual(source.elements, sum(x.size for x in tensors.values()))


class FileTest(absltest.TestCase):
  def test_parts_of_a_file(self):
    scratch = self.enterContext(tempfile.TemporaryDirectory())
    path = pathlib.Path(scratch, 'x')
    content = np.random.default_rng(0).bytes(1 << 21)
    path.write_bytes(content)
    file = lazy.opened(path)
    for offset, size in ((0, 5), (7, 0), (4099, 9000), (1, (1 << 21) - 1)):
      read = lazy.read(file, offset, size)
      self.assertEqual(read.tobytes(), content[offset : offset + size])
    for offset, size in ((-1, 3), (0, -1), (0, len(content) + 1), (len(content), 1)):
      with self.assertRaisesRegex(CheckpointError, 'truncated'):
        lazy.read(file, offset, size)
    self.assertEqual(lazy.content(path, file.size), content)
    with self.assertRaisesRegex(CheckpointError, 'bytes, more than'):
      lazy.content(path, file.size - 1)
    path.write_bytes(content + b'x')
    with self.assertRaisesRegex(CheckpointError, 'changed after it'):
      lazy.read(file, 0, 1)
    path.unlink()
    for read in (lambda: lazy.opened(path), lambda: lazy.read(file, 0, 1)):
      with self.assertRaisesRegex(CheckpointError, 'No such file'):
        read()

  def test_a_pointer_that_git_left_is_named(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    pointer = 'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n'
    for name in ('model.safetensors', 'pytorch_model.bin', 'model.gguf'):
      with self.subTest(name=name):
        (folder / name).write_text(pointer)
        with self.assertRaisesRegex(CheckpointError, f'{name}: a pointer of Git LFS'):
          checkpoints.open_any(folder / name)
        (folder / name).unlink()

  def test_a_file_that_shrinks_while_it_is_read_is_an_error(self):
    path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), 'x')
    path.write_bytes(bytes(1 << 22))
    file, fstat = lazy.opened(path), os.fstat

    def shrink(handle):
      found = fstat(handle)
      os.truncate(path, 1 << 20)  # after the state of the file was compared
      return found

    with (
      mock.patch.object(os, 'fstat', shrink),
      self.assertRaisesRegex(CheckpointError, f'{path}: the file changed'),
    ):
      lazy.read(file, 0, file.size)


if __name__ == '__main__':
  absltest.main()

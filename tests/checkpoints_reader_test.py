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
from rotbits_jax.checkpoints import tensors as tensors_lib
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
  def test_a_file_that_shrinks_while_it_is_read_is_an_error(self):
    path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), 'x')
    path.write_bytes(bytes(1 << 22))
    file, fstat = tensors_lib.opened(path), os.fstat

    def shrink(handle):
      found = fstat(handle)
      os.truncate(path, 1 << 20)  # after the state of the file was compared
      return found

    with (
      mock.patch.object(os, 'fstat', shrink),
      self.assertRaisesRegex(CheckpointError, f'{path}: the file changed'),
    ):
      tensors_lib.read(file, 0, file.size)


if __name__ == '__main__':
  absltest.main()

"""Tests of the benchmark's synthetic checkpoints, at tiny sizes."""

import dataclasses
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from benchmarks import synthetic
from configs import published
from rotbits_jax import checkpoints
from rotbits_jax import models


def dense(name):
  """Makes a tiny model of the same family as a published model."""
  config = checkpoints.parse_config(published.MODELS[name])
  hidden, layers = 96, 2
  return dataclasses.replace(
    config,
    hidden_size=hidden,
    intermediate_size=160,
    num_layers=layers,
    num_heads=4,
    num_kv_heads=4,
    head_dim=24,
    vocab_size=120,
    max_positions=32,
    learned_positions=34 if config.learned_positions else 0,
    rotary_dim=24 if config.rotary_dim else 0,
    segment_widths=(hidden,) * (2 * layers + 1),
  )


class SyntheticTest(parameterized.TestCase):
  def write(self, name, **settings):
    directory = self.enterContext(tempfile.TemporaryDirectory())
    path = pathlib.Path(directory, 'x')
    settings = {'sparsity': 0.25, 'name': name, 'dtype': np.float32} | settings
    config = synthetic.write(path, dense(name), **settings)
    return config, path

  @parameterized.parameters('llama-2-7b', 'opt-1.3b')
  def test_it_is_a_checkpoint(self, name):
    config, path = self.write(name, dtype=np.float16)
    self.assertEqual(config.segment_widths, (72,) * 4 + (96,))
    checkpoint = checkpoints.load_checkpoint(path)
    self.assertEqual(checkpoint.model.config, config)
    self.assertEqual(checkpoint.stem, f'{name}_0.25')
    logits = jax.jit(models.logits)(checkpoint.model, np.arange(20)[None])
    self.assertTrue(np.isfinite(logits).all())
    self.assertGreater(np.std(logits), 0.1)

  @parameterized.parameters(('llama-2-7b', 0.25), ('opt-1.3b', 0.2), ('opt-1.3b', 0.6))
  def test_shortcuts_are_those_of_subspaces(self, name, sparsity):
    config, path = self.write(name, sparsity=sparsity)
    model = checkpoints.load_checkpoint(path).model
    shortcuts = [
      layer[shortcut]['kernel']
      for layer in model.layers()
      for shortcut in ('attention_shortcut', 'mlp_shortcut')
    ]
    width = config.segment_widths[0]
    units = max(0, 2 * width - 96)
    for matrix in shortcuts[:-1]:
      values = np.linalg.svd(matrix, compute_uv=False)
      np.testing.assert_allclose(values[:units], 1, atol=1e-5)
      self.assertTrue((values[units:] < 0.9999).all())
      self.assertGreater(values[-1], 0)
      self.assertLess(values[-1], 0.5)
      self.assertGreater(np.std(values[units:]), 0.1)
      # The gauge is random, so no entry is large.
      self.assertLess(np.abs(matrix).max(), 0.7)
    np.testing.assert_allclose(
      shortcuts[-1] @ shortcuts[-1].T, np.eye(width), atol=1e-5
    )

  def test_a_tied_embedding_is_the_rotated_head(self):
    _, path = self.write('opt-1.3b')
    outer = checkpoints.load_checkpoint(path).model.outer()
    head, embedding = outer['head']['kernel'].T, outer['embed']['tokens']
    image, *_ = np.linalg.lstsq(head, embedding)
    np.testing.assert_allclose(head @ image, embedding, atol=1e-5)
    np.testing.assert_allclose(image.T @ image, np.eye(72), atol=1e-4)

  def test_the_embedding_follows_the_chain_of_subspaces(self):
    """If nothing is cut off, V_last^T V_0 is the product of the shortcuts."""
    _, path = self.write('opt-1.3b', sparsity=0.0)
    model = checkpoints.load_checkpoint(path).model
    product = np.eye(96)
    for layer in model.layers():
      for shortcut in ('attention_shortcut', 'mlp_shortcut'):
        product = product @ layer[shortcut]['kernel']
    outer = model.outer()
    np.testing.assert_allclose(
      outer['head']['kernel'].T @ product.T, outer['embed']['tokens'], atol=1e-4
    )

  def test_numbers_depend_on_the_seed_only(self):
    files = [
      (path / 'model.safetensors').read_bytes()
      for _, path in (self.write('llama-2-7b', seed=seed) for seed in (0, 0, 1))
    ]
    self.assertEqual(files[0], files[1])
    self.assertNotEqual(files[0], files[2])

  def test_shards(self):
    config, path = self.write('llama-2-7b', shard_size=100_000)
    self.assertGreater(len(list(path.glob('model-*.safetensors'))), 3)
    source = checkpoints.open_checkpoint(path)
    self.assertEqual(source.elements, models.count_elements(config))

  def test_other_families_are_refused(self):
    config = dataclasses.replace(dense('llama-2-7b'), family='phi3')
    with self.assertRaisesRegex(ValueError, 'an OPT or a Llama'):
      synthetic.write('x', config, sparsity=0.25, name='x')

  @parameterized.parameters(1, 5, 64, 65, 200)
  def test_rotations(self, n):
    rotation = synthetic.Rotation.random(n, np.random.default_rng(0))
    matrix = rotation.apply(np.eye(n, dtype=np.float32))
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(n), atol=1e-5)
    np.testing.assert_allclose(
      rotation.apply_transposed(np.eye(n, dtype=np.float32)), matrix.T, atol=1e-6
    )


if __name__ == '__main__':
  absltest.main()

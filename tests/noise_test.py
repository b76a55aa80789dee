"""The noise floor: a random rotation keeps the function and changes the numbers."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import random_models

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from tests import transform_checks

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
DENSE = ('llama-tiny-dense', 'phi2-tiny-dense', 'phi3-tiny-dense')
OPT = {
  'model_type': 'opt',
  'hidden_size': 12,
  'ffn_dim': 8,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'vocab_size': 31,
  'max_position_embeddings': 20,
  'word_embed_proj_dim': 12,
}


class RandomlyRotatedTest(parameterized.TestCase):
  @parameterized.parameters(*DENSE, 'phi2-tiny-sliced-0.25')
  def test_only_rounding_moves_the_logits(self, name):
    model = checkpoints.load_checkpoint(TESTDATA / name).model
    # The shape of the tokens is that of transforms_test, which compiles this, too.
    tokens = np.load(TESTDATA / name / 'ref_logits.npz')['input_ids'][:, :24]
    rotated = passes.randomly_rotated(model, key=jax.random.key(0))
    logits = transform_checks.fast_logits(model, tokens)
    error = np.abs(transform_checks.fast_logits(rotated, tokens) - logits)
    self.assertGreater(error.mean(), 0)
    self.assertLess(error.mean(), 2e-3 * np.abs(logits).mean())
    same = jax.tree.map(
      lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), model, rotated
    )
    self.assertTrue(all(jax.tree.leaves(same)))

  @parameterized.parameters('heads', 'segments')
  def test_structured_leaves_are_materialized(self, case):
    if case == 'heads':
      model = random_models.random_model(OPT)
      layers = list(model.layers())
      rng = np.random.default_rng(0)
      for layer in layers:
        u, v = rng.standard_normal((2, 12, 4)).astype(np.float32)
        layer['attention']['value']['kernel'] = structured.LowRank(u, v.T)
      model = models.from_layers(model.config, model.outer(), layers)
      chain = (passes.remove_biases(),)
    else:
      model = random_models.sliced_llama([18, 18, 18, 18, 24])
      chain = (passes.remove_residual_gauge(), passes.retie_embedding())
    compact, _ = passes.run_chain(chain, model)
    rotated = passes.randomly_rotated(compact, key=jax.random.key(0))
    for leaf in jax.tree.leaves(rotated.params, is_leaf=structured.is_structured):
      self.assertFalse(structured.is_structured(leaf))
    tokens = np.arange(8)[None]
    expected = transform_checks.fast_logits(model, tokens)
    actual = transform_checks.fast_logits(rotated, tokens)
    np.testing.assert_allclose(actual, expected, atol=3e-4)


if __name__ == '__main__':
  absltest.main()

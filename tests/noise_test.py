"""The noise floor: the same function, other numbers, whatever the model."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import symmetries

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
DENSE = ('llama-tiny-dense', 'phi2-tiny-dense', 'phi3-tiny-dense')


class RandomlyRotatedTest(parameterized.TestCase):
  @parameterized.parameters(*DENSE, 'phi2-tiny-sliced-0.25')
  def test_only_rounding_moves_the_logits(self, name):
    model = checkpoints.load_checkpoint(TESTDATA / name).model
    tokens = np.load(TESTDATA / name / 'ref_logits.npz')['input_ids'][:, :8]
    rotated = symmetries.randomly_rotated(model, key=jax.random.key(0))
    logits = np.asarray(models.logits(model, tokens))
    error = np.abs(np.asarray(models.logits(rotated, tokens)) - logits)
    self.assertGreater(error.mean(), 0)
    self.assertLess(error.mean(), 2e-3 * np.abs(logits).mean())
    same = jax.tree.map(
      lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), model, rotated
    )
    self.assertTrue(all(jax.tree.leaves(same)))


if __name__ == '__main__':
  absltest.main()

"""Rounding with error feedback."""

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax.symmetries import steps
from tests import random_models

STEP = 0.25


def _correlated(rng, count, rows=2000):
  """Draws inputs of which a few directions hold most of the variance."""
  mixing = rng.standard_normal((count, count)) / np.arange(1, count + 1)[:, None]
  return rng.standard_normal((rows, count)) @ mixing


def _reference(kernel, step, moments):
  """Rounds one number after the other in float64, by the inverse of the moments."""
  kernel, count = np.float64(kernel).copy(), len(kernel)
  damped = moments + 0.01 * np.mean(np.diag(moments)) * np.eye(count)
  order = np.argsort(np.diag(moments), kind='stable')[::-1]
  rounded = np.zeros_like(kernel)
  left = list(order)
  while left:
    i = left[0]
    rounded[i] = np.rint(kernel[i] / step) * step
    inverse = np.linalg.inv(damped[np.ix_(left, left)])
    change = inverse[:, 0] / inverse[0, 0]
    kernel[left] -= np.outer(change, kernel[i] - rounded[i])
    left = left[1:]
  return rounded


class FeedbackTest(parameterized.TestCase):
  @parameterized.parameters(40, 130)
  def test_numbers_are_those_of_the_reference(self, count):
    rng = np.random.default_rng(0)
    inputs = _correlated(rng, count)
    moments = inputs.T @ inputs
    kernel = rng.standard_normal((count, 24))
    arguments = jnp.float32(kernel), jnp.float32(STEP), jnp.float32(moments)
    found = STEP * steps.with_feedback(*arguments).integers
    np.testing.assert_array_equal(np.asarray(found) % STEP, 0)
    # A number in the middle between two multiples may be rounded to either, and then
    # the numbers after it in its column differ, too.
    same = np.asarray(found) == _reference(kernel, STEP, moments)
    self.assertGreater(same.all(axis=0).mean(), 0.9)

  def test_outputs_have_smaller_errors(self):
    rng = np.random.default_rng(1)
    inputs, kernel = _correlated(rng, 200), rng.standard_normal((200, 50))
    arguments = jnp.float32(kernel), jnp.float32(STEP)
    moments = jnp.float32(inputs.T @ inputs)
    rounded = STEP * steps.with_feedback(*arguments, moments).integers
    plain = steps.multiples(*arguments)
    error = lambda x: np.square(inputs @ (np.asarray(x) - kernel)).sum()
    self.assertLess(error(rounded), 0.5 * error(plain))


class InputMomentsTest(parameterized.TestCase):
  def test_the_moments_of_the_first_layer_are_those_of_its_inputs(self):
    model = random_models.sliced_llama([18] * 7)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 9))
    found = {}
    for _, factors in models.fisher_factors(model, [tokens]):
      found |= factors.by_path()
    self.assertEqual(found['layers.2/mlp/down/kernel'].shape, (32, 32))
    self.assertEqual(found['head/kernel'].shape, (18, 18))
    x = np.float64(model.params['embed']['tokens'])[tokens].reshape(-1, 18)
    hidden = model.config.hidden_size
    x /= np.sqrt(np.square(x).sum(-1, keepdims=True) / hidden + model.config.norm_eps)
    moments = found['layers.0/attention/query/kernel']
    np.testing.assert_allclose(moments, x.T @ x, rtol=1e-4, atol=1e-4)


if __name__ == '__main__':
  absltest.main()

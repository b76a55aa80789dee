"""Numbers are rounded once, small ones to one step, beside a reference in float64."""

import itertools
import types

from absl.testing import parameterized
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.passes import rounding
from rotbits_jax.passes import transform
from rotbits_jax.symmetries import steps

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32)


def _normal(shape, scale=1.0, seed=0):
  values = np.random.default_rng(seed).normal(size=shape) * scale
  return values.astype(np.float32)


def _round(leaf, dtype, octaves, uniform=False):
  rounded, effect = rounding.round_leaf(leaf, np.dtype(dtype), octaves, uniform)
  return structured.materialize(rounded), rounding.Effect(*map(float, effect))


class RoundTest(parameterized.TestCase):
  def test_numbers_are_multiples_of_a_power_of_two(self):
    for dtype, scale, octaves in itertools.product(
      [np.float16, ml_dtypes.bfloat16], [1.0, 0.03], [-7.0, -3.5]
    ):
      with self.subTest(dtype=dtype, scale=scale, octaves=octaves):
        self.check_multiples(_normal((40, 50), scale), dtype, octaves)

  def test_arrays_of_all_sizes_are_rounded_alike(self):
    # The sizes are those at which other programs round an array.
    for shape in (
      *((64, 64), (64, 65), (3, 5, 7), (1024, 1023), (1024, 1024), (1025, 1024)),
    ):
      with self.subTest(shape=shape):
        self.check_multiples(_normal(shape), np.float16, -7.0)

  def check_multiples(self, values, dtype, octaves):
    rounded, effect = _round(jnp.asarray(values), dtype, octaves)
    rms = np.sqrt(np.mean(np.float64(values) ** 2))
    self.assertEqual(np.log2(effect.step), np.floor(np.log2(rms) + octaves))
    steps = np.rint(values / effect.step)
    coarse = np.abs(values) >= effect.step * 2.0 ** (jnp.finfo(dtype).nmant + 1)
    expected = np.where(coarse, values.astype(dtype), steps * effect.step)
    np.testing.assert_array_equal(np.asarray(rounded).astype(np.float64), expected)
    squares = np.sum((expected - values) ** 2)
    self.assertAlmostEqual(effect.squares / squares, 1, delta=1e-4)

  def test_uniform_steps_are_quarters_of_an_octave_apart(self):
    for dtype, octaves in itertools.product(DTYPES, [-5.0, -4.8, -4.55, -4.3]):
      with self.subTest(dtype=dtype, octaves=octaves):
        values = _normal((40, 50))
        rounded, effect = _round(jnp.asarray(values), dtype, octaves, uniform=True)
        self.assertEqual(rounded.dtype, np.float32)
        rms = np.sqrt(np.mean(np.float64(values) ** 2))
        self.assertLess(abs(np.log2(effect.step / rms) - octaves), 0.17)
        self.assertIn(np.frexp(effect.step)[0] * 8, (4, 5, 6, 7))
        steps = np.rint(values / np.float32(effect.step)).astype(np.float64)
        np.testing.assert_array_equal(np.asarray(rounded), steps * effect.step)

  def test_an_array_that_no_transform_changed_keeps_its_bits(self):
    values = jnp.asarray(_normal((40, 50)).astype(np.float16), jnp.float32)
    kept, effect = _round(values, np.float16, -8.0)
    np.testing.assert_array_equal(kept, values.astype(np.float16))
    self.assertEqual(effect.step, 0)
    changed, _ = _round(values, np.float16, -8.0, uniform=True)
    self.assertTrue(np.any(np.asarray(changed) != np.asarray(kept)))

  def test_outliers_of_more_steps_than_integers_have_are_kept(self):
    kernel = np.float32(0.02 * np.random.default_rng(7).standard_normal((64, 64)))
    kernel[3, 4], kernel[5, 6] = -3e6, 3e6
    inputs = rounding.Inputs(np.eye(64, dtype=np.float32), 0, np.ones(64, np.float32))
    rule = passes.Rounding(-12.0, uniform=True, inputs={'a': inputs})
    context = passes.Context(None, {}, np.dtype(np.float32))
    found, *_ = transform.round_params(rule, {'a': jnp.asarray(kernel)}, context)
    np.testing.assert_allclose(found['a'], kernel, rtol=1e-6, atol=1e-5)

  def test_a_multiple_that_would_become_infinite_is_the_one_below(self):
    values = np.full((64, 64), 2.0**15, np.float32)
    values[3, 4], values[5, 6] = 65504, -65504  # 15.99 steps
    expected = np.clip(values, -15 * 2.0**12, 15 * 2.0**12)
    moments, ones = np.eye(64, dtype=np.float32), np.ones(64, np.float32)
    for given in (None, (moments, 0), (moments, 0, ones)):
      inputs = None if given is None else rounding.Inputs(*given)
      rounded, _ = rounding.round_leaf(
        jnp.asarray(values), np.dtype(np.float16), -3.0, True, inputs
      )
      np.testing.assert_array_equal(structured.materialize(rounded), expected)

  @parameterized.named_parameters(
    ('a norm makes it large', {}, 1e-6, True),
    ('it stays small', {}, 1.0, False),
    ('positions are added', {'learned_positions': 9}, 1e-6, False),
  )
  def test_a_small_row_of_an_embedding(self, changes, epsilon, is_kept):
    table, path = _normal((50, 40)), 'embed/tokens'
    table[3] /= 100
    fields = {'learned_positions': 0, 'hidden_size': 40}
    config = types.SimpleNamespace(**fields | changes, norm_eps=epsilon)
    half = np.dtype(np.float16)
    source = types.SimpleNamespace(config=config)
    context = passes.Context(source, {path: half}, half)
    rule = passes.Rounding(0.0)
    found, _, _ = transform.round_params(rule, {path: jnp.asarray(table)}, context)
    errors = np.linalg.norm(np.float32(found[path]) - table, axis=1)
    relative = errors / np.linalg.norm(table, axis=1)
    self.assertEqual(relative[3] < 8 * 2.0**-11, is_kept)
    self.assertLess(np.delete(relative, 3).max(), 2 * 2.0**-11)

  def test_extreme_scales(self):
    for scale in (0.0, 1e-30, 3e38):
      with self.subTest(scale=scale):
        values = np.full((2, 3), scale, np.float32)
        rounded, _ = _round(jnp.asarray(values), np.float32, -4.0, uniform=True)
        np.testing.assert_allclose(rounded, values, rtol=2.0**-4)


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
    found = STEP * steps.quantize(*arguments).integers
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
    rounded = STEP * steps.quantize(*arguments, moments).integers
    plain = steps.multiples(*arguments)
    error = lambda x: np.square(inputs @ (np.asarray(x) - kernel)).sum()
    self.assertLess(error(rounded), 0.5 * error(plain))

"""The published rotation codec is exact, or within its threshold if it has one."""

import math

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding.bits_back import codes
from rotbits_jax.coding.bits_back import correction as correction_lib
from rotbits_jax.coding.bits_back import eigen
from tests import codec_checks

N = 24


def _weights(n: int, seed: int = 0) -> jax.Array:
  """Returns bit patterns of float16 weights."""
  rng = np.random.default_rng(seed)
  weights = 0.05 * rng.standard_normal(n * (n + 1) // 2)
  return jnp.asarray(weights.astype(np.float16).view(np.uint16))


def _noisy(q: jax.Array, noise: float) -> np.ndarray:
  q = np.asarray(q, np.float64)
  n = q.shape[0]
  error = np.random.default_rng(1).standard_normal((n, n))
  error = (error - error.T) * (noise / np.sqrt(2 * n))
  signs = np.where(np.arange(n) % 2, 1, -1)
  return ((q + error @ q) * signs).astype(np.float32)


def _levels(correction: correction_lib.Correction) -> np.ndarray:
  """Returns the level of each number of an N-dimensional rotation."""
  base, extra, *_ = correction
  return np.asarray(correction_lib.levels(base, extra, eigen.places(N)[0]))


class NumbersTest(parameterized.TestCase):
  def test_numbers_are_float16_where_that_is_finite(self):
    patterns = np.arange(65536).astype(np.uint16)
    with jax.numpy_dtype_promotion('strict'):
      values = np.asarray(eigen.number(jnp.asarray(patterns)))
      ordinals = eigen.ordinal(jnp.asarray(patterns))
      restored = eigen.ordinal(ordinals)
      positions = np.asarray(eigen.position(jnp.asarray(values)), int)
    expected = patterns.view(np.float16).astype(np.float32)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(values[finite], expected[finite])
    self.assertTrue(np.isfinite(values).all())
    self.assertTrue((np.abs(values[~finite]) >= 65536).all())
    np.testing.assert_array_equal(restored, patterns)
    is_zero = values == 0
    np.testing.assert_array_equal(
      positions[~is_zero], np.asarray(ordinals).view(np.int16)[~is_zero]
    )


class EigenTest(parameterized.TestCase):
  @parameterized.parameters(2e-4, 5e-2)
  def test_numbers_come_back_whatever_the_last_bits(self, noise):
    patterns = _weights(N)
    q = _rotation(patterns, N)
    np.testing.assert_allclose(q.T @ q, np.eye(N), atol=5e-6)
    recovered = _noisy(q, noise)
    correction = _correct(recovered, recovered, patterns)
    for seed in range(3):
      np.testing.assert_array_equal(_recover(recovered, correction), patterns)
      steps = np.random.default_rng(seed).integers(-4, 5, (N, N)).astype(np.float32)
      recovered = _noisy(q, noise) + steps * np.spacing(_noisy(q, noise))

  @parameterized.parameters(1e-5, 1e-4, 1.0)
  def test_threshold_leaves_in_what_is_below_it(self, threshold):
    patterns = _weights(N)
    q = _rotation(patterns, N)
    recovered = _noisy(q, 1e-3)
    correction = _correct(recovered, recovered, patterns, threshold)
    sent = _levels(correction) == 16
    back = np.asarray(_recover(recovered, correction))
    np.testing.assert_array_equal(back[sent], np.asarray(patterns)[sent])
    values = [np.asarray(x).view(np.float16).astype(float) for x in (back, patterns)]
    error = abs(values[0] - values[1])
    self.assertLessEqual(error.max(), threshold + 2.0**-12)
    self.assertEqual(sent.any(), threshold < 1)
    self.assertFalse(sent.all())
    self.assertGreater((error > 0).mean(), 0.01 if threshold > 1e-5 else 0)

  def test_message_comes_back(self):
    code = codes.eigen_code(N, None)
    codec = code.codec()
    empty = rans.stacked(jnp.zeros((1, 8), jnp.uint16), room=N * N)
    message = jax.jit(codec.push)(empty, _weights(N))  # initial bits
    rest, patterns = jax.jit(codec.pop)(message)
    np.testing.assert_array_equal(patterns, _weights(N))
    recovered = _noisy(_rotation(patterns, N), 2e-4)
    correction = code.correct(recovered, recovered, patterns)
    arrays, words = correction_lib.pack(correction, code.groups())
    sent = sum(8 * x.nbytes for x in arrays[:2]) + 16 * words.size
    sent += sum(tables.entropy_bits(np.bincount(x)) for x in arrays[2:])
    net = rans.content_bits(message) - rans.content_bits(rest) - sent
    self.assertGreater(net / math.comb(N, 2), 10)

    correction = correction_lib.unpack(arrays, lambda _: words, code.groups())
    restored = _recover(recovered, correction)
    codec_checks.assert_same_message(jax.jit(codec.push)(rest, restored), message)


_rotation = jax.jit(eigen.rotation, static_argnums=1)
_correct = jax.jit(eigen.correct, static_argnums=3)
_recover = jax.jit(eigen.recover)

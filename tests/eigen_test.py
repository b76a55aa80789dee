"""The published rotation codec is exact, or within its threshold if it has one."""

import itertools
import math

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.coding.bits_back import correction as correction_lib
from rotbits_jax.coding.bits_back import eigen
from tests import codec_checks

SPACINGS = {'float16': eigen.FLOAT16, 'even': eigen.EVEN}
N = 24


def _weights(n: int, seed: int = 0) -> jax.Array:
  """Returns bit patterns of float16 weights."""
  rng = np.random.default_rng(seed)
  weights = 0.05 * rng.standard_normal(n * (n + 1) // 2)
  return jnp.asarray(weights.astype(np.float16).view(np.uint16))


def _bits(n: int, seed: int = 0) -> jax.Array:
  """Returns random patterns of 16 bits."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, 65536, n * (n + 1) // 2), jnp.uint16)


def _noisy(q: jax.Array, noise: float) -> np.ndarray:
  q = np.asarray(q, np.float64)
  n = q.shape[0]
  error = np.random.default_rng(1).standard_normal((n, n))
  error = (error - error.T) * (noise / np.sqrt(2 * n))
  signs = np.where(np.arange(n) % 2, 1, -1)
  return ((q + error @ q) * signs).astype(np.float32)


def _levels(correction: correction_lib.Correction) -> np.ndarray:
  """Returns the level of each number of an N-dimensional rotation."""
  level = lambda x: correction_lib.levels(x, eigen._places(N)[0])
  return np.asarray(jax.jit(level)(correction))


class SpacingTest(parameterized.TestCase):
  def test_float16_is_float16_where_that_is_finite(self):
    patterns = np.arange(65536).astype(np.uint16)
    with jax.numpy_dtype_promotion('strict'):
      ordinals = eigen._ordinal(jnp.asarray(patterns))
      values = np.asarray(eigen.FLOAT16.value(ordinals))
      restored = eigen._pattern(ordinals)
    expected = patterns.view(np.float16).astype(np.float32)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(values[finite], expected[finite])
    self.assertTrue(np.isfinite(values).all())
    self.assertTrue((np.abs(values[~finite]) >= 65536).all())
    np.testing.assert_array_equal(restored, patterns)

  @parameterized.parameters('float16', 'even')
  def test_positions_invert_values(self, name):
    spacing = SPACINGS[name]
    ordinals = jnp.arange(65536).astype(jnp.uint16)
    with jax.numpy_dtype_promotion('strict'):
      values = spacing.value(ordinals)
      positions = np.array(spacing.position(values))
      between = np.asarray(spacing.position((values[1:] + values[:-1]) / 2))
    self.assertTrue((np.diff(np.asarray(values)) >= 0).all())
    positions[32767] = np.round(positions[32767] - 1e-3)  # -0 is +0 here
    if name == 'float16':
      self.assertEqual(positions[32767], 32768)
      positions[32767], between = 32767, np.delete(between, [32766, 32767])
    np.testing.assert_allclose(positions, np.arange(65536), atol=5e-3)
    fraction = between - np.floor(between)
    np.testing.assert_allclose(fraction, 0.5, atol=1e-2)


class SymmetricEigTest(parameterized.TestCase):
  def test_numbers_come_back_whatever_the_last_bits(self):
    for content, spacing, noise in itertools.product(
      [_weights, _bits], list(SPACINGS), [2e-4, 5e-2]
    ):
      with self.subTest(content=content, spacing=spacing, noise=noise):
        patterns = content(N)
        q, spectrum = _rotation(patterns, N, spacing)
        np.testing.assert_allclose(q.T @ q, np.eye(N), atol=5e-6)
        recovered = _noisy(q, noise)
        correction = _correct(recovered, spectrum, patterns, spacing)
        for seed in range(3):
          np.testing.assert_array_equal(
            _recover(recovered, spectrum, correction, spacing), patterns
          )
          steps = np.random.default_rng(seed).integers(-4, 5, (N, N)).astype(np.float32)
          recovered = _noisy(q, noise) + steps * np.spacing(_noisy(q, noise))

  @parameterized.parameters(1e-5, 1e-4, 1.0)
  def test_threshold_leaves_in_what_is_below_it(self, threshold):
    patterns = _weights(N)
    q, spectrum = _rotation(patterns, N, 'float16')
    recovered = _noisy(q, 1e-3)
    correction = _correct(recovered, spectrum, patterns, 'float16', threshold)
    sent = _levels(correction) == 16
    back = np.asarray(_recover(recovered, spectrum, correction, 'float16'))
    np.testing.assert_array_equal(back[sent], np.asarray(patterns)[sent])
    values = [np.asarray(x).view(np.float16).astype(float) for x in (back, patterns)]
    error = abs(values[0] - values[1])
    self.assertLessEqual(error.max(), threshold + 2.0**-12)
    self.assertEqual(sent.any(), threshold < 1)
    self.assertFalse(sent.all())
    self.assertGreater((error > 0).mean(), 0.01 if threshold > 1e-5 else 0)

  def test_message_comes_back(self):
    codec, spectra = eigen.codec(N), eigen.spectrum_codec(N)
    message = jax.jit(codec.push)(rans.empty(8, 200), _weights(N))  # initial bits
    rest, patterns = jax.jit(codec.pop)(message)
    np.testing.assert_array_equal(patterns, _weights(N))
    q, spectrum = _rotation(patterns, N, 'float16')
    recovered = _noisy(q, 2e-4)
    correction = _correct(recovered, spectrum, patterns, 'float16')
    frequencies = jnp.asarray(correction_lib.fit(correction))
    both = codecs.serial(spectra, eigen.correction_codec(N, frequencies))
    sent = rans.check(jax.jit(both.push)(rest, (spectrum, correction)))
    net = rans.content_bits(message) - rans.content_bits(sent)
    self.assertGreater(net / math.comb(N, 2), 10)

    read, (spectrum, correction) = jax.jit(both.pop)(sent)
    restored = _recover(recovered, spectrum, correction, 'float16')
    codec_checks.assert_same_message(jax.jit(codec.push)(read, restored), message)


_rotation = jax.jit(
  lambda x, n, name: eigen.rotation(x, n, SPACINGS[name]),
  static_argnums=(1, 2),
)
_correct = jax.jit(
  lambda q, w, x, name, threshold=None: eigen.correct(
    q, w, x, SPACINGS[name], threshold
  ),
  static_argnums=(3, 4),
)
_recover = jax.jit(
  lambda q, w, x, name: eigen.recover(q, w, x, SPACINGS[name]),
  static_argnums=3,
)

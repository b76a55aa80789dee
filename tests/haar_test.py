"""The Haar codec is exact, uniform over the group, and robust to rounding."""

import functools
import itertools
import math
import zlib

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding.bits_back import correction as correction_lib
from rotbits_jax.coding.bits_back import haar
from tests import codec_checks

rotate = jax.jit(haar.rotation, static_argnums=(1, 2))
correct = jax.jit(lambda q, cells: haar.correct(q, q, cells))
recover = jax.jit(haar.recover)
places = jax.jit(haar.places, static_argnums=(0, 1))


def _sample(n: int, k: int) -> jax.Array:
  """Draws the cells of random frames without the codec."""
  rng = np.random.default_rng(0)
  row = np.asarray(places(n, k)[0])
  slots = rng.integers(0, tables.TOTAL, row.size)
  bins = np.zeros(slots.shape, int)
  for i, v in enumerate(n - row):
    if v >= 2:
      ends = np.cumsum(haar.bin_tables(n)[v - 2])
      bins[i] = np.searchsorted(ends, slots[i], side='right')
  fine = rng.integers(0, np.where(row < n - 1, 1 << 10, 2), slots.shape)
  return jnp.asarray(bins << 10 | fine, jnp.uint16)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rotate_all(cells: jax.Array, n: int, k: int) -> jax.Array:
  return jax.vmap(lambda x: haar.rotation(x, n, k))(cells)


def _noisy(q: jax.Array, noise: float, seed: int = 1) -> np.ndarray:
  """Returns an orthogonal matrix, or a frame, at relative distance `noise` from q."""
  q = np.asarray(q, np.float64)
  error = np.random.default_rng(seed).standard_normal((q.shape[0],) * 2)
  error = (error - error.T) * (noise / np.sqrt(2 * q.shape[0]))
  return (q + error @ (q + error @ q / 2)).astype(np.float32)


def _ulps(q: np.ndarray, seed: int) -> np.ndarray:
  """Changes every entry by one to four units in the last place."""
  rng = np.random.default_rng(seed)
  steps = rng.choice(np.array([-4, -3, -2, -1, 1, 2, 3, 4], np.float32), q.shape)
  return q + steps * np.spacing(q)


def _distribution(v: int, points: np.ndarray) -> np.ndarray:
  """Returns the distribution function of the ratio t when v coordinates are left."""
  angle = np.linspace(-np.pi / 2, np.pi / 2, 200001)
  density = np.cos(angle) ** (v - 2)
  mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
  return np.interp(np.arcsin(np.clip(points, -1, 1)), angle, mass / mass[-1])


def _ks_distance(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the Kolmogorov-Smirnov distance of two samples of equal size.

  Its unit is the distance that equally distributed samples exceed once in 1000 cases.
  """
  both = np.concatenate([a, b])
  cdfs = [np.searchsorted(np.sort(x), both, side='right') / x.size for x in (a, b)]
  return float(abs(cdfs[0] - cdfs[1]).max() / (1.95 * math.sqrt(2 / a.size)))


class CodecTest(absltest.TestCase):
  def test_bins_have_the_probability_of_a_ratio(self):
    for v in (2, 3, 4, 5, 8, 16, 17, 40, 300):
      with self.subTest(v=v):
        frequencies = haar.bin_tables(300)[v - 2]
        if v == 2:  # uniform on the circle
          np.testing.assert_array_equal(frequencies, tables.TOTAL // 64)
          continue
        edges = np.linspace(-1, 1, 65) * min(1, 4 / math.sqrt(v))
        expected = np.diff(_distribution(v, edges)) * tables.TOTAL
        self.assertLess(abs(frequencies - expected).max(), 2)

  def test_tables_are_the_same_on_every_machine(self):
    # Files were written with these tables; a change makes the files unreadable.
    data = haar.bin_tables(100).astype('<u4').tobytes()
    self.assertEqual(zlib.crc32(data), 1923565467)


class RotationTest(absltest.TestCase):
  def test_is_orthogonal(self):
    for n, k in ((1, 1), (2, 2), (40, 40), (40, 32)):
      with self.subTest(n=n, k=k):
        q = np.asarray(rotate(_sample(n, k), n, k), np.float64)
        np.testing.assert_allclose(q.T @ q, np.eye(k), atol=2e-6)


class UniformityTest(parameterized.TestCase):
  N, COUNT = 5, 20000

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    message = codec_checks.random_message(0, 10, 30_000)
    codec = haar.codec(cls.N, cls.N)
    sample = lambda message, _: codec.pop(message)
    message, cells = jax.jit(
      lambda message: jax.lax.scan(sample, message, length=cls.COUNT)
    )(message)
    rans.check(message)
    cls.q = np.asarray(_rotate_all(cells, cls.N, cls.N))
    key = jax.random.key(0)
    cls.reference = np.asarray(jax.random.orthogonal(key, cls.N, (cls.COUNT,)))

  @parameterized.named_parameters(
    ('trace', lambda q: np.trace(q, axis1=1, axis2=2)),
    ('entry', lambda q: q[:, 3, 4]),
    ('minor', lambda q: q[:, 0, 0] * q[:, 1, 1] - q[:, 0, 1] * q[:, 1, 0]),
    ('turned', lambda q: np.einsum('i,bij,j', [1, 2, -3, 0.5, 1], q, [0, 1, 1, -1, 2])),
    ('square', lambda q: np.trace(q @ q, axis1=1, axis2=2)),
  )
  def test_is_distributed_as_jax_random_orthogonal(self, statistic):
    ours, theirs = statistic(self.q), statistic(self.reference)
    self.assertLess(_ks_distance(ours, theirs), 1)


class RecoveryTest(parameterized.TestCase):
  def test_a_few_ulps_change_nothing(self):
    for shape, noise in itertools.product(
      [(1, 1), (2, 2), (40, 40), (40, 32)], [0.0, 1e-4, 1e-3, 1e-2]
    ):
      with self.subTest(shape=shape, noise=noise):
        cells = _sample(*shape)
        recovered = _noisy(rotate(cells, *shape), noise)
        correction = correct(recovered, cells)
        np.testing.assert_array_equal(recover(recovered, correction), cells)
        for seed in range(3):
          moved = _ulps(recovered, seed)
          self.assertTrue((moved != recovered).any())
          np.testing.assert_array_equal(recover(moved, correction), cells)

  def test_columns_of_the_other_sign_are_turned(self):
    cells = _sample(40, 40)
    signs = np.where(np.arange(40) % 3 == 0, -1, 1).astype(np.float32)
    recovered = _noisy(rotate(cells, 40, 40), 1e-4)
    turned = correct(recovered * signs, cells)
    np.testing.assert_array_equal(turned.others[0], signs < 0)
    np.testing.assert_array_equal(recover(recovered * signs, turned), cells)
    straight = correct(recovered, cells)
    chex.assert_trees_all_equal(turned[:3], straight[:3])

  @parameterized.parameters(0.0, 1.0, np.nan)
  def test_any_matrix_gives_the_cells_back(self, value):
    cells = _sample(40, 40)
    recovered = np.full((40, 40), value, np.float32)
    np.testing.assert_array_equal(recover(recovered, correct(recovered, cells)), cells)

  def test_message_comes_back_with_nearly_all_bits(self):
    n = 40
    codec = haar.codec(n, n)
    message = codec_checks.random_message(0, 16, 150)
    rest, cells = jax.jit(codec.pop)(message)
    columns = np.arange(n, 1, -1)
    mean_share = np.average(np.log2(columns / n) / 2, weights=columns)
    for noise, loss in ((2e-4, 0.9), (1e-3, 0.7), (1e-2, 0.7)):
      recovered = _noisy(rotate(cells, n, n), noise)
      correction = correct(recovered, cells)
      arrays, words = correction_lib.pack(correction, places(n, n)[1])

      decoded = correction_lib.unpack(arrays, lambda _, x=words: x, places(n, n)[1])
      chex.assert_trees_all_equal(decoded, correction)
      restored = jax.jit(codec.push)(rest, recover(_ulps(recovered, 3), decoded))
      codec_checks.assert_same_message(restored, message)

      # The bits of a number of unit variance that is known up to a normal error.
      ideal = -math.log2(noise) - mean_share
      sent = sum(tables.entropy_bits(np.bincount(x)) for x in arrays) + 16 * words.size
      net = rans.content_bits(message) - rans.content_bits(rest) - sent
      self.assertBetween(net / (n * (n - 1) / 2), ideal - loss, ideal)

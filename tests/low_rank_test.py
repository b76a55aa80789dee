"""The gauge of low-rank pairs: the product is kept, with r^2 elements fewer."""

from absl.testing import absltest
import jax
import numpy as np

from rotbits_jax import structured
from rotbits_jax.symmetries import heads

_fix_pair = jax.jit(heads.fix_low_rank)


def _pair(m, n, rank, dtype=np.float16, seed=0):
  rng = np.random.default_rng(seed)
  u, v = rng.standard_normal((m, rank)), rng.standard_normal((rank, n))
  return structured.LowRank(u.astype(dtype), v.astype(dtype))


def _product(leaf):
  """Returns the product of a `LowRank` in float64."""
  return np.float64(leaf.u) @ np.float64(leaf.v)


def _definition(leaf):
  """Returns the matrix of a shortened `LowRank` in float64."""
  u, v = np.float64(leaf.u), np.float64(leaf.v)
  below, other = (u, v) if leaf.shortened == 'u' else (v.T, u.T)
  square = np.eye(leaf.rank) - below.T @ below / 4
  matrix = np.concatenate([square, below]) @ other
  return matrix if leaf.shortened == 'u' else matrix.T


def _relative(array, expected):
  return np.linalg.norm(np.float64(array) - expected) / np.linalg.norm(expected)


class FixPairTest(absltest.TestCase):
  def test_product_is_kept_and_no_number_is_large(self):
    for m, n, rank in ((24, 16, 8), (16, 24, 8), (16, 16, 16), (16, 24, 1)):
      with self.subTest(m=m, n=n, rank=rank):
        pair = _pair(m, n, rank, np.float32)
        fixed = _fix_pair(pair.u, pair.v)
        self.assertLess(_relative(_definition(fixed), _product(pair)), 2e-6)
        below = getattr(fixed, fixed.shortened)
        self.assertLessEqual(np.linalg.norm(below, 2), 2 + 1e-5)
        self.assertEqual(fixed.shape, (m, n))
        self.assertEqual(fixed.shortened, 'v' if m > n else 'u')

  def test_factors_of_any_rank_and_scale_are_kept(self):
    pair = _pair(24, 16, 8, np.float32)
    u, v = np.array(pair.u), np.array(pair.v)
    u[:, 3] = u[:, 5] - u[:, 6]  # so that the rank is 6
    v[7] = 0
    scales = np.float32(10.0) ** np.arange(-4, 4)
    u, v = u * scales, v / scales[:, None]
    fixed = _fix_pair(u, v)
    expected = np.float64(u) @ np.float64(v)
    self.assertLess(_relative(_definition(fixed), expected), 1e-5)

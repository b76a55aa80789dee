"""The gauge of low-rank pairs: the product is kept, with r^2 elements fewer."""

import types

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.symmetries import low_rank

_fix_pair = jax.jit(low_rank.fix_pair)


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


def _fix_pairs(params):
  """Applies the transform to leaves outside the layers, by path, without rounding."""
  dtypes = {path: np.dtype(leaf.dtype) for path, leaf in params.items()}
  source = types.SimpleNamespace(config=None)
  context = passes.Context(source, dtypes, np.dtype(np.float32))  # of most numbers
  fix = passes.remove_low_rank_gauge()
  return fix.outer(context, (), dict(params))


class FixPairsTest(parameterized.TestCase):
  @parameterized.parameters(np.float16, ml_dtypes.bfloat16)
  def test_rounding_does_as_much_harm_as_to_the_plain_pair(self, dtype):
    tree = {'a': _pair(64, 48, 24, dtype), 'b/c': _pair(48, 64, 24, dtype, 1)}
    fixed, notes = _fix_pairs(tree)
    unit = float(jnp.finfo(dtype).eps) / 2
    for note, pair, leaf in (
      (notes[0], tree['a'], fixed['a']),
      (notes[1], tree['b/c'], fixed['b/c']),
    ):
      self.assertTrue(leaf.shortened)
      error = _relative(_definition(leaf.astype(dtype)), _product(pair))
      self.assertLess(error, 0.8 * unit)
      np.testing.assert_allclose(note['error'], error, rtol=0.02)
      np.testing.assert_allclose(note['plain_error'], 0.58 * unit, rtol=0.1)
      self.assertEqual(note['elements'], 24 * (64 + 48 - 24))
      self.assertEqual(note['rank'], 24)
      self.assertEqual(tuple(note['shape']), pair.shape)
    self.assertEqual([note['tensor'] for note in notes], ['a', 'b/c'])

  def test_what_overflows_or_is_not_finite_or_no_pair_stays(self):
    huge = structured.LowRank(
      np.full((8, 2), 4e4, np.float16), np.full((2, 8), 4e4, np.float16)
    )
    broken = _pair(24, 16, 8)
    broken = broken.replace(v=np.where(broken.v > 2, np.nan, broken.v))
    tree = {
      'array': np.ones((4, 4), np.float16),
      'broken': broken,
      'huge': huge,
      'wide': _pair(4, 8, 6),  # r > m
      'triangle': structured.TrapezoidalRows(None, np.tril(np.ones((4, 4)))),
    }
    fixed, notes = _fix_pairs(tree)
    for name, leaf in tree.items():
      self.assertIs(fixed[name], leaf)
    self.assertEqual([note['tensor'] for note in notes], ['broken', 'huge'])
    self.assertIn('not finite', notes[0]['obstacle'])

"""Canonicalizers split off a rotation, and find it again in the rotated matrix."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.symmetries import canonical

NAMES = tuple(canonical.CANONICALIZERS)


def _orthogonal(n: int, seed: int) -> np.ndarray:
  key = jax.random.key(seed)
  return np.asarray(jax.random.orthogonal(key, n), np.float64)


def _spread(n: int, m: int, seed: int = 0) -> np.ndarray:
  """Returns a matrix with the singular values 1, 2, ..., n."""
  left, right = _orthogonal(n, seed + 1), _orthogonal(m, seed + 2)
  return (left * np.arange(n, 0, -1.0)) @ right[:n]


class CanonicalTest(parameterized.TestCase):
  @parameterized.parameters(*NAMES)
  def test_rotation_of_the_reference_is_found(self, name):
    canonicalize = jax.jit(canonical.CANONICALIZERS[name])
    for shape in ((1, 1), (6, 6), (6, 11)):
      w = _spread(*shape)
      reference, q = canonicalize(w)
      np.testing.assert_allclose(q @ reference, w, atol=1e-5)
      np.testing.assert_allclose(q.T @ q, np.eye(shape[0]), atol=2e-6)
      for seed in range(3):
        turn = _orthogonal(shape[0], seed)
        again, found = canonicalize(turn @ np.asarray(reference, np.float64))
        np.testing.assert_allclose(found, turn, atol=2e-5)
        np.testing.assert_allclose(again, reference, atol=1e-4)

  def test_svd_reference_has_orthogonal_rows_of_falling_norm(self):
    reference = np.asarray(canonical.svd(_spread(5, 8))[0])
    gram = np.diag(np.arange(5, 0, -1.0) ** 2)
    np.testing.assert_allclose(reference @ reference.T, gram, atol=1e-4)
    self.assertTrue((reference.sum(axis=1) > 0).all())

  def test_qr_reference_is_upper_triangular_with_positive_diagonal(self):
    reference = np.asarray(canonical.qr(_spread(5, 8))[0])
    np.testing.assert_allclose(np.tril(reference[:, :5], -1), 0, atol=1e-5)
    self.assertTrue((np.diag(reference) > 0).all())

  def test_polar_reference_is_symmetric_and_positive(self):
    reference = np.asarray(canonical.polar_shortcut(_spread(5, 8))[0], np.float64)
    block = reference[:, :5]
    np.testing.assert_allclose(block, block.T, atol=1e-5)
    self.assertTrue((np.linalg.eigvalsh(block) > 0).all())

  @parameterized.parameters(*NAMES)
  def test_degenerate_matrices_give_orthogonal_rotations(self, name):
    cases = {
      'zero': np.zeros((6, 8)),
      'identity': np.eye(6, 8),
      'equal': _orthogonal(8, 0)[:6],
      'zero rows': _spread(6, 8) * (np.arange(6) % 2)[:, None],
      'low rank': _spread(2, 8)[[0, 1, 0, 1, 0, 1]],
      'narrow': _spread(4, 4)[[0, 1, 2, 3, 0, 1]],
    }
    for case, w in cases.items():
      reference, q = canonical.CANONICALIZERS[name](w)
      self.assertEqual((reference.dtype, q.dtype), (jnp.float32, jnp.float32))
      np.testing.assert_allclose(q.T @ q, np.eye(6), atol=1e-5, err_msg=case)
      np.testing.assert_allclose(q @ reference, w, atol=1e-5, err_msg=case)


if __name__ == '__main__':
  absltest.main()

"""Structured leaves: what is stored is enough to get the leaf back."""

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured


def _lower(seed, rows, columns, dtype=np.float16, scale=0.1):
  rng = np.random.default_rng(seed)
  return np.tril(rng.standard_normal((rows, columns)) * scale).astype(dtype)


LEAVES = {
  'gram': lambda seed: structured.IdentityMinusGram(
    b=_lower(seed, 6, 2 + seed), c=_lower(seed, 6, 1), columns=6
  ),
  'gram_wide': lambda seed: structured.IdentityMinusGram(
    b=_lower(seed, 6, 3), c=_lower(seed, 6, 0), columns=9
  ),
  'gram_of_rank_0': lambda seed: structured.IdentityMinusGram(
    b=_lower(seed, 6, 0), c=_lower(seed, 6, 0), columns=9
  ),
  'triangle': lambda seed: structured.SymmetricTriangle(_lower(seed, 5, 5), columns=7),
  'trapezoidal': lambda seed: structured.Trapezoidal(_lower(seed, 7, 4)),
}
"""Every kind of leaf; a new one joins all tests by a row here."""


class StructuredTest(parameterized.TestCase):
  @parameterized.parameters(*LEAVES)
  def test_stored_numbers_give_the_leaf_back(self, name):
    leaf = LEAVES[name](0)
    settings, arrays = leaf.stored()
    again = structured.KINDS[leaf.kind].from_stored(settings, arrays)
    chex.assert_trees_all_equal(again, leaf)
    self.assertEqual(again.shape, leaf.materialize().shape)
    self.assertEqual(again.dtype, leaf.materialize().dtype)

  @parameterized.parameters(*LEAVES)
  def test_layers_undo_stack(self, name):
    leaves = [LEAVES[name](seed) for seed in range(3)]
    stack = type(leaves[0]).stack(leaves)
    self.assertEqual(stack.shape, (3, *leaves[0].shape))
    for i, leaf in enumerate(leaves):
      chex.assert_trees_all_equal(stack.layer(i), leaf)
      chex.assert_trees_all_equal(stack.materialize()[i], leaf.materialize())

  @parameterized.parameters(*LEAVES)
  def test_passes_through_jit_and_vmap(self, name):
    stack = type(LEAVES[name](0)).stack([LEAVES[name](i) for i in range(2)])
    unbatched = jax.jit(jax.vmap(lambda leaf: leaf.materialize()))(stack)
    chex.assert_trees_all_equal(unbatched, stack.materialize())

  @parameterized.parameters(*LEAVES)
  def test_counts_what_is_stored(self, name):
    leaf = LEAVES[name](0)
    _, arrays = leaf.stored()
    numbers = sum(a.size for a in arrays.values())
    self.assertEqual(structured.count_numbers([leaf]), numbers)
    self.assertEqual(structured.count_bytes({'x': leaf}), 2 * numbers)

  def test_gram_stands_for_the_identity_less_b_bt_plus_c_ct(self):
    leaf = LEAVES['gram'](0)
    b, c = np.float64(leaf.b), np.float64(leaf.c)
    expected = np.eye(6) - b @ b.T + c @ c.T
    np.testing.assert_allclose(np.float64(leaf.materialize()), expected, atol=1e-3)

  @parameterized.parameters('gram', 'gram_wide', 'gram_of_rank_0')
  def test_apply_is_a_product_with_the_matrix(self, name):
    leaf = LEAVES[name](1)
    x = np.random.default_rng(0).standard_normal((2, 3, 6)).astype(np.float32)
    wide = leaf.replace(b=jnp.float32(leaf.b), c=jnp.float32(leaf.c))
    expected = x @ np.asarray(wide.materialize())
    np.testing.assert_allclose(
      np.asarray(leaf.apply(jnp.asarray(x))), expected, atol=1e-5
    )

  def test_trapezoids_keep_nothing_above_the_diagonal(self):
    matrix = np.arange(1, 13).reshape(4, 3)
    self.assertEqual(
      structured.pack_lower(matrix).tolist(), [1, 4, 5, 7, 8, 9, 10, 11, 12]
    )
    with self.assertRaisesRegex(ValueError, 'trapezoid'):
      structured.unpack_lower(np.zeros(8), (4, 3))

  def test_kinds_are_unique(self):
    with self.assertRaisesRegex(ValueError, 'trapezoidal'):
      structured.register(structured.Trapezoidal)


if __name__ == '__main__':
  absltest.main()

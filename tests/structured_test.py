"""Structured leaves come back from the numbers that they store."""

import tracemalloc

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


def _normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


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
  'row_trapezoids': lambda seed: structured.RowTrapezoids(
    np.concatenate([_lower(seed, 8, 5).T, _lower(seed + 9, 8, 3).T]), blocks=(5, 3)
  ),
  'head_columns': lambda seed: structured.HeadColumns(
    turned=_normal(seed, 7, 8), rest=_normal(seed + 9, 4, 6), heads=2
  ),
  'head_planes': lambda seed: structured.HeadPlanes(
    below=_normal(seed, 4, 36), top=_normal(seed + 9, 2, 14), groups=2, head_dim=6
  ),
  'head_rows': lambda seed: structured.HeadRows(
    first=_normal(seed, 6, 2), others=_normal(seed + 9, 12, 5), groups=2
  ),
  'constant': lambda seed: structured.Constant.like(_lower(seed, 3, 4), 1.5),
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
    self.assertEqual(structured.count_elements([leaf]), numbers)
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
    with self.assertRaisesRegex(ValueError, r'4 x 3 trapezoid has 9 numbers'):
      structured.unpack_lower(np.zeros(8), (4, 3))

  def test_row_trapezoids_keep_nothing_below_a_blocks_diagonal(self):
    matrix = np.arange(1, 13).reshape(4, 3)
    _, arrays = structured.RowTrapezoids(matrix, (3, 1)).stored()
    self.assertEqual(arrays['upper'].tolist(), [1, 2, 3, 5, 6, 9, 10, 11, 12])
    _, arrays = structured.RowTrapezoids(matrix, (2,), full=2).stored()
    self.assertEqual(arrays['upper'].tolist(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12])

  def test_a_tied_embedding_is_the_heads_image(self):
    rng = np.random.default_rng(0)
    head, matrix = rng.standard_normal((5, 9)), rng.standard_normal((5, 3))
    tied = structured.Tied(np.float32(matrix), tokens=9)
    self.assertEqual(tied.shape, (9, 3))
    np.testing.assert_allclose(
      tied.expand(np.float32(head)), head.T @ matrix, atol=1e-5
    )
    rows = np.asarray(tied.rows(np.float32(head), jnp.asarray([[2, 8], [0, 12]])))
    np.testing.assert_allclose(rows[0], (head.T @ matrix)[[2, 8]], atol=1e-5)
    self.assertTrue(np.isnan(rows[1, 1]).all())
    with self.assertRaisesRegex(ValueError, 'needs head/kernel'):
      tied.materialize()

  def test_multiples_stand_for_products(self):
    integers = np.arange(-6, 6, dtype=np.int8).reshape(2, 3, 2)
    steps = np.float32([0.75, 3])
    stack = structured.UniformlyQuantized(integers, steps, 'float32')
    expected = integers * steps[:, None, None]
    chex.assert_trees_all_equal(np.asarray(stack.materialize()), expected)
    found = jax.jit(jax.vmap(lambda leaf: leaf.materialize()))(stack)
    chex.assert_trees_all_equal(np.asarray(found), expected)
    layers = [stack.layer(i) for i in range(2)]
    chex.assert_trees_all_equal(structured.UniformlyQuantized.stack(layers), stack)
    narrow = structured.astype(stack, jnp.bfloat16)
    chex.assert_trees_all_equal(
      narrow.materialize(), stack.materialize().astype(jnp.bfloat16)
    )
    rows = np.asarray(layers[1].rows(jnp.asarray([[2, 0], [1, 3]])))
    chex.assert_trees_all_equal(rows[0], expected[1, [2, 0]])
    self.assertTrue(np.isnan(rows[1, 1]).all())
    self.assertEqual(structured.count_bytes(layers[0]), expected[0].nbytes)

  @parameterized.parameters(*LEAVES)
  def test_rounds_its_numbers(self, name):
    leaf = LEAVES[name](0).astype(np.float32)
    self.assertEqual(leaf.dtype, np.float32)
    chex.assert_trees_all_equal(leaf.astype(np.float16), LEAVES[name](0))

  @parameterized.parameters(*LEAVES)
  def test_what_a_stranger_stored_is_a_value_error(self, name):
    leaf = LEAVES[name](0)
    settings, arrays = leaf.stored()
    wrong = None, True, -1, 1.5, 1 << 62, 10**400, 'x', [], [[]], [1 << 40], {}
    changed = [(settings | {'unknown': 1}, arrays)]
    changed.append((settings, arrays | {'unknown': np.zeros(1)}))
    for key, old in settings.items():
      changed.append(({k: x for k, x in settings.items() if k != key}, arrays))
      changed += [
        (settings | {key: new}, arrays)
        for new in wrong
        # Another number or shape is another constant, and no error.
        if not (type(old) is float and type(new) in (int, float) and new != 10**400)
        and not (key == 'shape' and new == [])
      ]
    for key, old in arrays.items():
      changed.append((settings, {k: x for k, x in arrays.items() if k != key}))
      changed.append((settings, arrays | {key: old[None]}))
      changed.append((settings, arrays | {key: old.reshape(-1)[:0, None]}))
    for case, (own_settings, own_arrays) in enumerate(changed):
      with self.subTest(case=case), self.assertRaises(ValueError):
        type(leaf).from_stored(own_settings, own_arrays)

  def test_few_numbers_do_not_ask_for_a_large_matrix(self):
    one = {'lower': np.ones(1, np.float16)}
    with self.assertRaisesRegex(ValueError, '1 numbers are too few'):
      structured.Trapezoidal.from_stored({'lower': [1, 1 << 30]}, one)
    with self.assertRaisesRegex(ValueError, '2 numbers are too few'):
      structured.RowTrapezoids.from_stored(
        {'blocks': [1 << 30] * 2, 'full': 0, 'columns': 1},
        {'upper': np.ones(2, np.float16)},
      )
    with self.assertRaisesRegex(ValueError, 'too large'):
      structured.Constant.from_stored(
        {'value': 1.0, 'shape': [1 << 30] * 2}, {'empty': np.zeros(0, np.float16)}
      )

  def test_matrices_without_numbers_take_no_memory(self):
    none = np.zeros(0, np.float16)
    tracemalloc.start()
    self.addCleanup(tracemalloc.stop)
    leaf = structured.Trapezoidal.from_stored({'lower': [0, 1 << 24]}, {'lower': none})
    self.assertEqual(leaf.shape, (0, 1 << 24))
    for settings in (
      {'blocks': [1 << 24], 'full': 0, 'columns': 0},
      {'blocks': [0] * 9, 'full': 0, 'columns': 1 << 24},
    ):
      with self.assertRaisesRegex(ValueError, 'need rows and columns'):
        structured.RowTrapezoids.from_stored(settings, {'upper': none})
    self.assertLess(tracemalloc.get_traced_memory()[1], 1 << 20)

  def test_kinds_are_unique(self):
    with self.assertRaisesRegex(ValueError, 'trapezoidal'):
      structured.register(structured.Trapezoidal)


if __name__ == '__main__':
  absltest.main()

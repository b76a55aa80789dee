"""Structured leaves come back from the numbers that they store."""

from absl.testing import absltest
import chex
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured
from tests import cases

LEAVES = cases.LEAVES


class StructuredTest(absltest.TestCase):
  def test_stored_numbers_give_the_leaf_back(self):
    for name in LEAVES:
      with self.subTest(name=name):
        leaf = LEAVES[name](0)
        settings, arrays = leaf.stored()
        again = structured.TYPES[leaf.type_name].from_stored(settings, arrays)
        chex.assert_trees_all_equal(again, leaf)
        self.assertEqual(again.shape, leaf.materialize().shape)
        self.assertEqual(again.dtype, leaf.materialize().dtype)
        numbers = sum(x.size for x in arrays.values())
        self.assertEqual(structured.count_elements([leaf]), numbers)
        nbytes = sum(x.nbytes for x in arrays.values())
        self.assertEqual(structured.count_bytes({'x': leaf}), nbytes)

  def test_layers_undo_stack(self):
    for name in LEAVES:
      with self.subTest(name=name):
        leaves = [LEAVES[name](seed) for seed in range(3)]
        stack = type(leaves[0]).stack(leaves)
        self.assertEqual(stack.shape, (3, *leaves[0].shape))
        for i, leaf in enumerate(leaves):
          chex.assert_trees_all_equal(stack.layer(i), leaf)
          chex.assert_trees_all_equal(stack.materialize()[i], leaf.materialize())

  def test_passes_through_jit_and_vmap(self):
    for name in LEAVES:
      with self.subTest(name=name):
        stack = type(LEAVES[name](0)).stack([LEAVES[name](i) for i in range(2)])
        unbatched = jax.jit(jax.vmap(lambda leaf: leaf.materialize()))(stack)
        chex.assert_trees_all_equal(unbatched, stack.materialize())

  def test_gram_stands_for_the_identity_less_b_bt_plus_c_ct(self):
    leaf = LEAVES['gram'](0)
    b, c = np.float64(leaf.b), np.float64(leaf.c)
    expected = np.eye(6) - b @ b.T + c @ c.T
    np.testing.assert_allclose(np.float64(leaf.materialize()), expected, atol=1e-3)

  def test_apply_and_rows_are_those_of_the_matrix(self):
    for name in LEAVES:
      with self.subTest(name=name):
        leaf = LEAVES[name](1)
        matrix = np.float64(leaf.astype(np.float32).materialize())
        x = np.random.default_rng(0).standard_normal((2, 3, len(matrix)))
        found = leaf.apply(jnp.float32(x))
        self.assertEqual(found.dtype, jnp.float32)
        np.testing.assert_allclose(found, x @ matrix, atol=1e-4)
        rows = leaf.astype(np.float32).rows(jnp.asarray([[1, 99]]))
        np.testing.assert_allclose(rows[0, 0], matrix[1], atol=1e-5)
        self.assertTrue(np.isnan(rows[0, 1]).all())

  def test_trapezoids_store_nothing_above_the_diagonal(self):
    matrix = np.arange(1, 13).reshape(4, 3)
    _, arrays = structured.TrapezoidalRows(None, matrix).stored()
    self.assertEqual(arrays['lower_corner'].tolist(), [1, 4, 5, 7, 8, 9])
    self.assertEqual(arrays['lower'].tolist(), [[10, 11, 12]])
    _, arrays = structured.TrapezoidalRows(None, matrix.T).stored()
    self.assertEqual(arrays['lower_corner'].tolist(), [1, 2, 5, 3, 6, 9])
    self.assertEqual(arrays['lower'].shape, (0, 4))
    for corner, below in (((5,), (0, 3)), ((6,), (1, 4)), ((6,), (0, 2))):
      with self.assertRaisesRegex(ValueError, 'no triangle has'):
        structured.TrapezoidalRows.from_stored(
          {}, {'lower_corner': np.zeros(corner), 'lower': np.zeros(below)}
        )

  def test_a_tied_embedding_is_the_heads_image(self):
    rng = np.random.default_rng(0)
    head, matrix = rng.standard_normal((5, 9)), rng.standard_normal((5, 3))
    tied = structured.Tied(np.float32(matrix), tokens=9)
    self.assertEqual(tied.shape, (9, 3))
    np.testing.assert_allclose(
      tied.materialize(np.float32(head)), head.T @ matrix, atol=1e-5
    )
    rows = np.asarray(tied.rows(np.float32(head), jnp.asarray([[2, 8], [0, 12]])))
    np.testing.assert_allclose(rows[0], (head.T @ matrix)[[2, 8]], atol=1e-5)
    self.assertTrue(np.isnan(rows[1, 1]).all())
    with self.assertRaisesRegex(ValueError, 'needs head/kernel'):
      tied.materialize()
    params = {'embed/tokens': tied, 'head/kernel': np.float32(head)}
    expanded = structured.expand(params)['embed/tokens']
    np.testing.assert_allclose(expanded, head.T @ matrix, atol=1e-5)

  def test_multiples_of_steps_of_lines(self):
    leaf = LEAVES['multiples'](1).astype(np.float32)
    factors = lambda x: (4 + x % 4) * 2.0 ** (x // 4 - 2)
    rows, columns = factors(leaf.row_exponents), factors(leaf.column_exponents)
    expected = np.float32(leaf.integers * 0.625 * rows[:, None] * columns)
    chex.assert_trees_all_equal(np.asarray(leaf.materialize()), expected)
    found = np.asarray(leaf.rows(jnp.asarray([5, 0, 6])))
    chex.assert_trees_all_equal(found[:2], expected[[5, 0]])
    self.assertTrue(np.isnan(found[2]).all())
    settings, arrays = leaf.stored()
    for key, wrong, words in (
      ('row_exponents', np.full(6, 65, np.int8), 'at most 64'),
      ('column_exponents', np.full(5, -128, np.int8), 'at most 64'),
      ('column_exponents', np.zeros(4, np.int8), 'cannot have'),
      ('step', np.float32(np.nan), 'no step'),
      ('step', np.float32(0.6), 'no step'),
      ('step', np.float32(2.0**70), 'no step'),
    ):
      with (
        self.subTest(key=key, words=words),
        self.assertRaisesRegex(ValueError, words),
      ):
        structured.UniformlyQuantized.from_stored(
          settings, arrays | {key: np.asarray(wrong)}
        )

  def test_rounds_its_numbers(self):
    for name in LEAVES:
      with self.subTest(name=name):
        leaf = LEAVES[name](0).astype(np.float32)
        self.assertEqual(leaf.dtype, np.float32)
        chex.assert_trees_all_equal(leaf.astype(np.float16), LEAVES[name](0))

  def test_untrusted_input_is_a_value_error_or_has_another_shape(self):
    for name in LEAVES:
      with self.subTest(name=name):
        leaf = LEAVES[name](0)
        settings, arrays = leaf.stored()
        wrong = None, True, -1, 1.5, 1 << 62, 10**400, 'x', [], [[]], [1 << 40], {}
        changed = [(settings | {'unknown': 1}, arrays)]
        changed.append((settings, arrays | {'unknown': np.zeros(1)}))
        for key in settings:
          changed.append(({k: x for k, x in settings.items() if k != key}, arrays))
          changed += [(settings | {key: new}, arrays) for new in wrong]
        for key, old in arrays.items():
          changed.append((settings, {k: x for k, x in arrays.items() if k != key}))
          changed.append((settings, arrays | {key: old[None]}))
          changed.append((settings, arrays | {key: old.reshape(-1)[:0, None]}))
        for case, (own_settings, own_arrays) in enumerate(changed):
          with self.subTest(case=case):
            try:
              other = type(leaf).from_stored(own_settings, own_arrays)
            except ValueError:
              continue
            # The manifest has these, too.
            key = lambda leaf: (leaf.shape, leaf.stack_key())
            self.assertNotEqual(key(other), key(leaf))

  def test_few_numbers_do_not_ask_for_a_large_matrix(self):
    one = {'lower_corner': np.ones(1, np.float16)}
    wide = np.zeros((0, 1 << 30), np.float16)
    # The first kernel of a stream of 8,448 may have so many.
    kernel = structured.TrapezoidalRows(None, np.tri(4224, 8448, dtype=np.float16))
    again = structured.TrapezoidalRows.from_stored(*kernel.stored())
    self.assertEqual(again.shape, kernel.shape)
    with self.assertRaisesRegex(ValueError, '1 numbers are too few'):
      structured.TrapezoidalRows.from_stored({}, one | {'lower': wide})
    gram = {f'{x}_corner': np.ones(1, np.float16) for x in 'bc'}
    with self.assertRaisesRegex(ValueError, 'columns do not fit'):
      structured.IdentityMinusGram.from_stored(
        {'columns': 1}, gram | {x: np.zeros((0, 1 << 20), np.float16) for x in 'bc'}
      )
    with self.assertRaisesRegex(ValueError, 'too large'):
      structured.Constant.from_stored(
        {'tail': [1 << 30] * 2}, {'value': np.array(1, np.float16)}
      )

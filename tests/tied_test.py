"""Embeddings that are tied to the head, up to rounding or bit for bit."""

import dataclasses
from fractions import Fraction
import itertools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.symmetries import tied
from tests import random_models
from tests import transform_checks

BF16 = ml_dtypes.bfloat16
D, WIDTH, TOKENS = 24, 18, 2048


def _matrices(dtype, *, seed=0, tokens=TOKENS, scale=0.1):
  """Makes an embedding `[V, d]` and a head `[D, V]`, both sliced from one matrix."""
  rng = np.random.default_rng(seed)
  dense = rng.standard_normal((tokens, D)) * scale
  gain = np.exp(0.2 * rng.standard_normal(D))
  table = dense @ random_models.orthogonal(rng, D)[:, :WIDTH]
  head = (dense * gain) @ random_models.orthogonal(rng, D)
  return table.astype(dtype), head.T.astype(dtype)


def _model(table, head, **other_embeddings):
  dtype = head.dtype
  model = random_models.sliced_llama([table.shape[1]] * 2 + [len(head)], dtype)
  params = model.params | {
    'embed': {'tokens': table, **other_embeddings},
    'head': {'kernel': head},
  }
  config = dataclasses.replace(model.config, vocab_size=len(table))
  return dataclasses.replace(model, params=params, config=config)


def _apply(model, **options):
  return transform_checks.apply(passes.retie_embedding(**options), model)


def _apply_exactly(model):
  return transform_checks.apply(passes.retie_exactly(), model, rounding=None)


def _bits(array):
  return np.asarray(array).view(np.uint16)


class RetieEmbeddingTest(parameterized.TestCase):
  def _assert_left_alone(self, model, *, reported):
    after, notes = _apply(model)
    transform_checks.assert_same_bits(after, model)
    self.assertLen(notes, reported)
    return notes

  @parameterized.parameters(np.float16, BF16, np.float32)
  def test_a_tied_embedding_is_stored_as_a_map(self, dtype):
    table, head = _matrices(dtype)
    model = _model(table, head)
    after, (saving,) = passes.run_chain((passes.retie_embedding(),), model)
    leaf = after.params['embed']['tokens']
    self.assertIsInstance(leaf, structured.Tied)
    self.assertEqual((leaf.shape, leaf.dtype), (table.shape, table.dtype))
    self.assertEqual(saving.elements, (TOKENS - D) * WIDTH)
    product = np.float64(head).T @ np.float64(leaf.map)
    off = np.float64(table) - product
    error = np.linalg.norm(off) / np.linalg.norm(np.float64(table))
    self.assertLess(error, 1.2 * passes.make_context(model).roundoff)
    (note,) = saving.notes
    self.assertEqual(note['form'], 'tied')
    self.assertEqual(note['elements'], D * WIDTH)
    np.testing.assert_allclose(note['error'], error, rtol=0.02)
    worst = np.max(
      np.linalg.norm(off, axis=1) / np.linalg.norm(np.float64(table), axis=1)
    )
    np.testing.assert_allclose(note['worst'], worst, rtol=0.02)

  def test_fits_the_head_that_will_be_stored(self):
    table, head = _matrices(np.float32)
    model = dataclasses.replace(_model(table, head), stored_as='float16')
    outer, (note,) = transform_checks.apply_outer(passes.retie_embedding(), model)
    map = outer['embed/tokens'].map
    stored = np.float64(head.astype(np.float16)).T
    error = lambda x: np.linalg.norm(stored @ x - table) / np.linalg.norm(table)
    best = np.linalg.lstsq(stored, np.float64(table))[0]
    self.assertLess(error(np.float64(map)), 1.01 * error(best))
    rounded = map.astype(np.float16)
    np.testing.assert_allclose(note['error'], error(np.float64(rounded)), rtol=0.005)
    after, _ = _apply(model)
    np.testing.assert_array_equal(after.params['embed']['tokens'].map, rounded)

  def test_works_on_a_structured_head(self):
    table, head = _matrices(np.float16)
    upper = np.linalg.qr(np.float64(head), mode='r').astype(np.float16)
    leaf = structured.TrapezoidalRows.of(upper, D)
    model = _model(table, head)
    model = dataclasses.replace(model, params=model.params | {'head': {'kernel': leaf}})
    after, (saving,) = passes.run_chain((passes.retie_embedding(),), model)
    self.assertEqual(saving.notes[0]['form'], 'tied')
    expanded = np.float64(after.materialize().params['embed']['tokens'])
    error = np.linalg.norm(expanded - table) / np.linalg.norm(np.float64(table))
    self.assertLess(error, 1.5 * 2**-11)
    # `retie_exactly` does nothing, because the head is a structured leaf.
    self.assertEmpty(_apply_exactly(model)[1])

  def test_an_embedding_of_its_own_is_left_alone(self):
    for tokens in (TOKENS, 2 * D):  # sampled, and too few to sample
      table, _ = _matrices(np.float16, seed=1, tokens=tokens)
      _, head = _matrices(np.float16, seed=2, tokens=tokens)
      (note,) = self._assert_left_alone(_model(table, head), reported=1)
      self.assertEqual((note['form'], note['elements']), ('array', table.size))
      self.assertGreater(note['misfit'], 0.1)

  def test_one_token_that_does_not_fit_is_enough_to_leave_it_alone(self):
    table, head = _matrices(np.float16)
    table[7] *= 1.01
    (note,) = self._assert_left_alone(_model(table, head), reported=1)
    self.assertGreater(note['worst'], 0.009)
    self.assertLess(note['misfit'], 1.2 * 2**-11)  # this alone is accurate enough

  def test_the_tolerance_decides(self):
    model = _model(*_matrices(np.float16))
    _, notes = _apply(model, tolerance=0.1)
    self.assertEqual(notes[0]['form'], 'array')

  def test_heads_may_lack_rank(self):
    _, head = _matrices(np.float16, tokens=512)
    head[3] = 0
    head[5] = head[6]
    weights = np.random.default_rng(3).standard_normal((D, WIDTH))
    table = (np.float64(head).T @ weights).astype(np.float16)
    after, notes = _apply(_model(table, head))
    self.assertEqual(notes[0]['form'], 'tied')
    map = np.float64(after.params['embed']['tokens'].map)
    np.testing.assert_array_equal(map[3], 0)
    off = np.float64(head).T @ map - table
    self.assertLess(np.linalg.norm(off), 2**-11 * np.linalg.norm(np.float64(table)))

  def test_tokens_may_be_unused(self):
    table, head = _matrices(np.float16)
    table[::2], head[:, ::2] = 0, 0
    after, notes = _apply(_model(table, head))
    self.assertEqual(notes[0]['form'], 'tied')
    map = np.float64(after.params['embed']['tokens'].map)
    off = np.float64(head).T @ map - table
    self.assertLess(
      np.linalg.norm(off), 1.5 * 2**-11 * np.linalg.norm(np.float64(table))
    )
    leaf, *_ = _exactly(table, head)
    self.assertIsInstance(leaf, structured.TiedExactly)

  def test_an_embedding_that_is_the_head_is_tied_by_the_identity(self):
    table, _ = _matrices(np.float16)
    model = _model(table, np.ascontiguousarray(table.T), positions=table[:9])
    after, notes = _apply(model)
    self.assertEqual(notes[0]['error'], 0.0)
    np.testing.assert_array_equal(after.params['embed']['tokens'].map, np.eye(WIDTH))
    np.testing.assert_array_equal(
      after.params['embed']['positions'], model.params['embed']['positions']
    )

  @parameterized.parameters('nan_head', 'inf_table', 'few_tokens', 'no_head', 'tied')
  def test_what_cannot_be_tied_is_left_alone(self, case):
    table, head = _matrices(np.float16, tokens=D if case == 'few_tokens' else 64)
    if case == 'nan_head':
      head[1, 2] = np.nan
    if case == 'inf_table':
      table[1, 2] = np.inf
    model = _model(table, head)
    if case == 'no_head':
      params = {k: v for k, v in model.params.items() if k != 'head'}
      model = dataclasses.replace(model, params=params)
    if case == 'tied':
      model, _ = _apply(model)
    reported = case in ('nan_head', 'inf_table')
    notes = self._assert_left_alone(model, reported=reported)
    after, more = _apply_exactly(model)
    transform_checks.assert_same_bits(after, model)
    self.assertEqual(more, notes)
    for note in notes:
      self.assertIn('not finite', note['obstacle'])


def _exactly(table, head):
  """Applies `retie_exactly`; returns the leaf, the note and the saved bytes."""
  chain = (passes.retie_exactly(),)
  model, (saving,) = passes.run_chain(chain, _model(table, head), rounding=None)
  (note,) = saving.notes
  return model.params['embed']['tokens'], note, saving.bytes


def _all_finite(dtype):
  """Returns all finite numbers of a dtype from 0 upwards, in float64."""
  count = int(jnp.finfo(dtype).max.view(np.uint16)) + 1
  return np.arange(count, dtype=np.uint16).view(dtype).astype(np.float64)


def _reference_residuals(table, head, map, shifts, scale):
  """Computes residuals with fractions: how many numbers of the dtype lie between."""
  grid = _all_finite(table.dtype)
  off = np.zeros(table.shape, np.int64)
  weights = [
    [round(Fraction(float(x)) * Fraction(2) ** int(s)) for x in row]
    for row, s in zip(head, shifts, strict=True)
  ]
  for i, j in np.ndindex(*table.shape):
    total = sum(row[i] * int(t) for row, t in zip(weights, map[:, j], strict=True))
    product = Fraction(total) / Fraction(2) ** scale
    size = abs(product)
    above = min(int(np.searchsorted(grid, float(size))), grid.size - 1)
    near = [max(above - 1, 0), above]
    ordinal = min(near, key=lambda n: (abs(Fraction(float(grid[n])) - size), -n))
    ordinal = -1 - ordinal if product < 0 else ordinal
    number = table[i, j]
    actual = int(np.searchsorted(grid, abs(float(number))))
    off[i, j] = (-1 - actual if np.signbit(number) else actual) - ordinal
  return off


class RetieExactlyTest(parameterized.TestCase):
  @parameterized.parameters(np.float16, BF16)
  def test_every_bit_comes_back_from_what_is_stored(self, dtype):
    table, head = _matrices(dtype)
    leaf, note, saved = _exactly(table, head)
    self.assertIsInstance(leaf, structured.TiedExactly)
    self.assertEqual((leaf.shape, leaf.dtype), (table.shape, table.dtype))
    again = structured.TiedExactly.from_stored(*leaf.stored())
    chex.assert_trees_all_equal(again, leaf)
    np.testing.assert_array_equal(_bits(again.materialize(head)), _bits(table))
    # About half of each number is saved; T and exceptions cost a little.
    self.assertGreater(saved, 0.45 * table.nbytes)
    self.assertEqual(note['form'], 'tied_exactly')
    self.assertEqual(note['error'], 0.0)
    self.assertEqual(note['elements'], structured.count_elements(leaf))

  @parameterized.parameters(np.float16, BF16)
  def test_residuals_take_few_bits(self, dtype):
    table, head = _matrices(dtype)
    leaf, *_ = _exactly(table, head)
    self.assertLess(leaf.exceptions.size, 0.01 * table.size)
    small = np.concatenate([np.abs(np.int32(r)) <= 4 for r in leaf.residuals[-3:]])
    self.assertGreater(small.mean(), 0.95)

  @parameterized.parameters(np.float16, BF16)
  def test_odd_tokens_are_exceptions_and_do_not_bend_the_map(self, dtype):
    table, head = _matrices(dtype)
    plain, note, _ = _exactly(table, head)
    greatest, least = jnp.finfo(dtype).max, jnp.finfo(dtype).smallest_subnormal
    table[3] = greatest
    table[4] = -greatest
    table[5] = np.random.default_rng(5).standard_normal(WIDTH)
    table[6] = least
    table[7] = -3 * np.float32(least)
    table[8] = 0
    table[9] = np.float32(-0.0)
    leaf, odd_note, _ = _exactly(table, head)
    np.testing.assert_array_equal(_bits(leaf.materialize(head)), _bits(table))
    self.assertLess(odd_note['exceptions'], note['exceptions'] + 8 * WIDTH)
    difference = leaf.map / np.ldexp(1.0, leaf.scale - np.int32(leaf.shifts))[:, None]
    difference -= (
      plain.map / np.ldexp(1.0, plain.scale - np.int32(plain.shifts))[:, None]
    )
    self.assertLess(np.abs(difference).max(), 1e-2)

  def test_subnormal_embeddings_come_back(self):
    rng = np.random.default_rng(0)
    head = rng.standard_normal((D, TOKENS)).astype(np.float16)
    table = np.float64(head).T @ rng.standard_normal((D, WIDTH)) * 1e-6
    table = table.astype(np.float16)
    self.assertLess(np.abs(table).max(), 2**-14)
    leaf, *_ = _exactly(table, head)
    self.assertIsInstance(leaf, structured.TiedExactly)
    np.testing.assert_array_equal(_bits(leaf.materialize(head)), _bits(table))

  def test_predictions_are_the_exact_products(self):
    for dtype, exponents in itertools.product(
      (np.float16, BF16), ('least', 'usual', 'wide', 'greatest')
    ):
      with self.subTest(dtype=dtype, exponents=exponents):
        info, rng = jnp.finfo(dtype), np.random.default_rng(0)
        # Exponents of the tokens; the exponents of the products are up to 3 higher.
        low, high = {
          'least': (info.minexp - info.nmant - 3, info.minexp + 3),
          'usual': (-9, 3),
          'wide': (-38, 3),  # a wider range than fixed point has
          'greatest': (info.maxexp - 9, info.maxexp - 3),
        }[exponents]
        sizes = 2.0 ** rng.integers(low, high, (1, 32))
        head = (rng.uniform(-1, 1, (5, 32)) * sizes).astype(dtype)
        map = rng.integers(-(1 << 14), 1 << 14, (5, 3))
        steps = np.array([14, 15, 13, 14, 14])
        table = np.float64(head).T @ np.ldexp(map, -steps[:, None])
        table *= 1 + info.eps * rng.integers(-9, 9, table.shape)
        table = table.astype(dtype)
        table[0] *= -1
        leaf = structured.TiedExactly.from_table(table, head, np.int32(map), steps)
        self.assertLen(leaf.residuals, 1)  # too few numbers for several classes
        expected = _reference_residuals(table, head, map, leaf.shifts, leaf.scale)
        self.assertGreater(len(np.unique(expected)), 10)
        marked = np.where(np.abs(expected) < 128, expected, -128)
        np.testing.assert_array_equal(leaf.residuals[0], marked.reshape(-1))
        np.testing.assert_array_equal(_bits(leaf.materialize(head)), _bits(table))

  def test_products_that_overflow_come_back(self):
    table, head = _matrices(np.float16)
    head = (np.float32(head) * 2e5).clip(-65504, 65504).astype(np.float16)
    table = (np.float32(table) * 2e5).clip(-65504, 65504).astype(np.float16)
    map = np.full((D, WIDTH), 1 << 14, np.int32)
    leaf = structured.TiedExactly.from_table(table, head, map, np.full(D, 13))
    np.testing.assert_array_equal(_bits(leaf.materialize(head)), _bits(table))

  def test_the_order_of_sums_does_not_matter(self):
    table, head = _matrices(np.float16)
    leaf, *_ = _exactly(table, head)
    order = np.random.default_rng(0).permutation(D)
    turned = leaf.replace(map=leaf.map[order], shifts=leaf.shifts[order])
    np.testing.assert_array_equal(_bits(turned.materialize(head[order])), _bits(table))

  def test_device_arrays_give_the_same_bits(self):
    table, head = _matrices(BF16)
    leaf, *_ = _exactly(table, head)
    loaded = jax.tree.map(jnp.asarray, (leaf, head))
    np.testing.assert_array_equal(_bits(loaded[0].materialize(loaded[1])), _bits(table))
    self.assertIs(structured.astype(leaf, np.float32), leaf)

  def test_materializes_with_the_model(self):
    table, head = _matrices(np.float16)
    model = _model(table, head)
    after, _ = _apply_exactly(model)
    materialized = after.materialize().params['embed']['tokens']
    np.testing.assert_array_equal(_bits(materialized), _bits(table))

  def test_integers_of_more_than_16_bits_are_stored(self):
    table, head = _matrices(np.float16, tokens=64)
    map = np.random.default_rng(0).integers(-(1 << 23) + 1, 1 << 23, (D, WIDTH))
    exponents = np.full(D, 20)
    leaf = structured.TiedExactly.from_table(table, head, np.int32(map), exponents)
    settings, arrays = leaf.stored()
    self.assertEqual(arrays['map'].dtype, np.int32)
    again = structured.TiedExactly.from_stored(settings, arrays)
    np.testing.assert_array_equal(again.map, map)
    np.testing.assert_array_equal(_bits(again.materialize(head)), _bits(table))

  def test_an_embedding_of_its_own_is_left_alone(self):
    for tokens in (TOKENS, 2 * D):
      table, _ = _matrices(np.float16, seed=1, tokens=tokens)
      _, head = _matrices(np.float16, seed=2, tokens=tokens)
      leaf, note, _ = _exactly(table, head)
      self.assertIs(leaf, table)
      self.assertEqual((note['form'], note['elements']), ('array', table.size))

  def test_numbers_of_32_bits_are_left_alone(self):
    model = _model(*_matrices(np.float32))
    after, notes = _apply_exactly(model)
    transform_checks.assert_same_bits(after, model)
    self.assertEmpty(notes)

  def test_arrays_of_other_sizes_are_refused(self):
    for name in ('map', 'shifts', 'residuals_0', 'residuals_1'):
      with self.subTest(name=name):
        table, head = _matrices(np.float16)
        settings, arrays = _exactly(table, head)[0].stored()
        arrays[name] = arrays[name][:-1]
        with self.assertRaisesRegex(
          ValueError, r'embedding of \(2048, 1[78]\) cannot have'
        ):
          structured.TiedExactly.from_stored(settings, arrays)

  def test_settings_of_no_embedding_are_refused(self):
    for name, value in (
      ('scale', 4000),
      ('scale', '47'),
      ('first', -1),
      ('first', None),
      ('first', 256),
    ):
      with self.subTest(name=name, value=value):
        settings, arrays = _exactly(*_matrices(np.float16))[0].stored()
        with self.assertRaises(ValueError):
          structured.TiedExactly.from_stored(settings | {name: value}, arrays)

  def test_another_head_is_refused(self):
    table, head = _matrices(np.float16)
    leaf, *_ = _exactly(table, head)
    with self.assertRaisesRegex(ValueError, r'shape \(24, 2048\), got'):
      leaf.materialize(head[:, 1:])
    with self.assertRaisesRegex(ValueError, r'has \d+ entries, which are too'):
      leaf.materialize(head[::-1])
    with self.assertRaisesRegex(ValueError, 'too large'):
      leaf.materialize(np.float32(head) * 64)
    head[2, 2] = np.nan
    with self.assertRaisesRegex(ValueError, 'too large'):
      leaf.materialize(head)
    with self.assertRaisesRegex(ValueError, r'has \d+ entries, which are too'):
      _, head = _matrices(np.float16)
      leaf.replace(exceptions=leaf.exceptions[1:]).materialize(head)


class LeastSquaresTest(absltest.TestCase):
  def test_is_what_lapack_finds(self):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((200, 12)) * np.exp(3 * rng.standard_normal(12))
    a[:, 1] = a[:, 0] * (1 + 1e-3 * rng.standard_normal(200))
    b = rng.standard_normal((200, 5))
    expected = np.linalg.lstsq(a, b)[0]
    np.testing.assert_allclose(
      tied.least_squares(tied.Equations(a.T @ a, a.T @ b)), expected, rtol=1e-6
    )


if __name__ == '__main__':
  absltest.main()

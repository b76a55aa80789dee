"""Embeddings that are tied to the head, up to rounding or bit for bit."""

import dataclasses

from absl.testing import parameterized
import chex
import ml_dtypes
import msgspec
import numpy as np

from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.structured import difference
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
  config = msgspec.structs.replace(model.config, vocab_size=len(table))
  return dataclasses.replace(model, params=params, config=config)


def _apply(model):
  return transform_checks.apply(passes.retie_embedding(), model)


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

  def test_an_embedding_of_its_own_is_left_alone(self):
    for tokens in (TOKENS, 2 * D):  # sampled, and too few to sample
      table, _ = _matrices(np.float16, seed=1, tokens=tokens)
      _, head = _matrices(np.float16, seed=2, tokens=tokens)
      (note,) = self._assert_left_alone(_model(table, head), reported=1)
      self.assertEqual((note['form'], note['elements']), ('array', table.size))
      self.assertGreater(note['misfit'], 0.1)
      leaf, *_ = _exactly(table, head)
      self.assertIs(leaf, table)

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
    self.assertEqual([x['tensor'] for x in more], [x['tensor'] for x in notes])


def _exactly(table, head):
  """Applies `retie_exactly`; returns the leaf, the note and the saved bytes."""
  chain = (passes.retie_exactly(),)
  model, (saving,) = passes.run_chain(chain, _model(table, head), rounding=None)
  (note,) = saving.notes
  return model.params['embed']['tokens'], note, saving.bytes


class RetieExactlyTest(parameterized.TestCase):
  @parameterized.parameters(np.float16, BF16)
  def test_every_bit_comes_back_from_what_is_stored(self, dtype):
    table, head = _matrices(dtype)
    leaf, note, saved = _exactly(table, head)
    self.assertIsInstance(leaf, difference.Difference)
    self.assertEqual((leaf.shape, leaf.dtype), (table.shape, table.dtype))
    again = difference.Difference.from_stored(*leaf.stored())
    chex.assert_trees_all_equal(again, leaf)
    np.testing.assert_array_equal(_bits(again.materialize(head)), _bits(table))
    # About half of each number is saved; T costs a little.
    self.assertGreater(saved, 0.45 * table.nbytes)
    self.assertEqual(note['form'], 'difference')
    self.assertEqual(note['error'], 0.0)
    self.assertEqual(note['elements'], structured.count_elements(leaf))

  def test_subnormal_embeddings_come_back(self):
    rng = np.random.default_rng(0)
    head = rng.standard_normal((D, TOKENS)).astype(np.float16)
    table = np.float64(head).T @ rng.standard_normal((D, WIDTH)) * 1e-6
    table = table.astype(np.float16)
    self.assertLess(np.abs(table).max(), 2**-14)
    leaf, *_ = _exactly(table, head)
    self.assertIsInstance(leaf, difference.Difference)
    np.testing.assert_array_equal(_bits(leaf.materialize(head)), _bits(table))

"""Biases of attention that the output does not need: they go, and the logits stay."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import numpy as np

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.symmetries import heads
from tests import random_models
from tests import transform_checks

OPT = {
  'model_type': 'opt',
  'hidden_size': 12,
  'ffn_dim': 8,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'vocab_size': 31,
  'max_position_embeddings': 20,
  'word_embed_proj_dim': 12,
}
PHI = {
  'model_type': 'phi',
  'hidden_size': 24,
  'intermediate_size': 8,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'vocab_size': 31,
  'partial_rotary_factor': 2 / 3,
  'rope_theta': 50.0,
}
QWEN2 = {
  'model_type': 'qwen2',
  'hidden_size': 12,
  'intermediate_size': 8,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'num_key_value_heads': 1,
  'vocab_size': 31,
  'max_position_embeddings': 32,
  'rope_theta': 50.0,
}
CONFIGS = {'opt': OPT, 'phi': PHI, 'qwen2': QWEN2}


@functools.cache
def _model(family, dtype=np.float32):
  return random_models.random_model(CONFIGS[family], dtype)


def _reference_logits(family, model):
  return random_models.reference_logits(CONFIGS[family], model)


def _apply(model):
  return transform_checks.apply(passes.remove_biases(), model)


def _removed(layer):
  """Returns the projections of a layer's attention whose zero bias is not stored."""
  attention = layer['attention']
  found = {k for k, v in attention.items() if structured.is_structured(v.get('bias'))}
  for name in found:
    assert not np.any(attention[name]['bias'].materialize())
  return found


class BiasesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('opt', {'key', 'value'}, 24), ('phi', {'value'}, 12), ('qwen2', set(), 0)
  )
  def test_what_the_output_does_not_need_is_removed(self, family, removed, numbers):
    model = _model(family)
    rewritten, (saving,) = passes.run_chain((passes.remove_biases(),), model)
    self.assertEqual([_removed(x) for x in rewritten.layers()], [removed] * 2)
    # A constant stores its value.
    self.assertEqual(saving.elements, 2 * (numbers - len(removed)))
    expected = _reference_logits(family, model)
    np.testing.assert_allclose(
      _reference_logits(family, rewritten), expected, rtol=0, atol=1e-5
    )

  def test_notes_name_what_is_zero_now(self):
    _, notes = _apply(_model('opt', np.float16))
    names = [f'layers.{i}/attention/{n}/bias' for i in (0, 1) for n in ('key', 'value')]
    self.assertEqual([note['tensor'] for note in notes], names)
    for note in notes:
      found = (note['form'], note['shape'], note['elements'], note['error'])
      self.assertEqual(found, ('constant', [12], 1, 0.0))

  def test_value_biases_add_up_over_the_query_heads(self):
    rng = np.random.default_rng(0)
    out, value, kernel = (rng.standard_normal(s) for s in ((5,), (2, 3), (2, 4, 3, 5)))
    expected = out + sum(value[g] @ kernel[g, j] for g in range(2) for j in range(4))
    take_up = functools.partial(heads.with_value_bias, kv_heads=2)
    arrays = (out, value.reshape(6), kernel.reshape(24, 5))
    arrays = tuple(x.astype(np.float32) for x in arrays)
    got = jax.jit(take_up)(*arrays)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    stacked = jax.vmap(take_up)(*(np.stack([x, 2 * x]) for x in arrays))
    np.testing.assert_allclose(stacked[0], expected, atol=1e-5)

  def test_the_transforms_of_heads_cope_with_biases_that_are_gone(self):
    model = _model('opt')
    chain = (
      passes.remove_biases(),
      passes.remove_value_gauge(),
      passes.remove_query_key_gauge(),
    )
    rewritten, savings = passes.run_chain(chain, model)
    self.assertEqual([s.elements for s in savings], [44, 144, 144])
    self.assertEqual([_removed(x) for x in rewritten.layers()], [{'key', 'value'}] * 2)
    expected = _reference_logits('opt', model)
    np.testing.assert_allclose(
      _reference_logits('opt', rewritten), expected, rtol=0, atol=1e-4
    )

  def test_a_second_time_changes_nothing(self):
    once, _ = _apply(_model('opt'))
    twice, notes = _apply(once)
    chex.assert_trees_all_equal(twice, once)
    self.assertEmpty(notes)

  @parameterized.parameters(
    ('value', np.nan, {'key'}), ('value', 6e4, {'key'}), ('key', np.inf, {'value'})
  )
  def test_numbers_that_do_not_fit_stay_where_they_are(self, name, number, removed):
    model = _model('opt', np.float16)
    first, second = (jax.tree.map(np.array, layer) for layer in model.layers())
    first['attention'][name]['bias'][:] = number
    model = models.from_layers(model.config, model.outer(), [first, second])
    rewritten, _ = _apply(model)
    left, right = rewritten.layers()
    self.assertEqual(_removed(left), removed)
    self.assertEqual(_removed(right), {'key', 'value'})
    chex.assert_trees_all_equal(left['attention'][name], first['attention'][name])
    if name == 'value':
      chex.assert_trees_all_equal(left['attention']['out'], first['attention']['out'])

  def test_a_structured_bias_is_left_alone(self):
    model = _model('phi')
    attention = model.params['layers.0:2']['attention']
    biases = [structured.Constant.like(x, 0.5) for x in attention['value']['bias']]
    value = attention['value'] | {'bias': structured.Constant.stack(biases)}
    layers = model.params['layers.0:2'] | {'attention': attention | {'value': value}}
    strange = model.replace(params=model.params | {'layers.0:2': layers})
    same, notes = _apply(strange)
    chex.assert_trees_all_equal(same, strange)
    self.assertEmpty(notes)


if __name__ == '__main__':
  absltest.main()

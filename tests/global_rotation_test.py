"""The global gauge: trapezoidal readers, and the same function."""

import dataclasses
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax import symmetries
from rotbits_jax.symmetries import global_rotation
from tests import random_models

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
TOKENS = np.arange(16).reshape(2, 8)
CHAIN = (symmetries.remove_gauge(), symmetries.remove_global_gauge())


def _logits(model):
  return np.asarray(jax.jit(models.logits)(model, TOKENS))


class PureFunctionsTest(absltest.TestCase):
  def test_upper_rotation_is_a_qr_factor(self):
    matrix = np.random.default_rng(0).standard_normal((6, 9))
    got = np.float64(global_rotation.upper_rotation(jnp.float32(matrix)))
    np.testing.assert_allclose(got.T @ got, np.eye(6), atol=1e-6)
    np.testing.assert_allclose(np.tril(got.T @ matrix, -1), 0, atol=1e-5)

  def test_folded_scales_give_the_same_kernel_products(self):
    model = checkpoints.load_checkpoint(TESTDATA / 'llama-tiny-dense').model
    rng = np.random.default_rng(0)
    layer = jax.tree.map(np.float32, next(iter(model.layers())))
    for norm in ('attention_norm', 'mlp_norm'):
      layer[norm]['scale'] = rng.uniform(0.5, 2, 128).astype(np.float32)
    folded = global_rotation.fold_norm_scales(layer)
    for part, norm, name in (
      ('attention', 'attention_norm', 'value'),
      ('mlp', 'mlp_norm', 'gate'),
    ):
      expected = layer[norm]['scale'][:, None] * layer[part][name]['kernel']
      np.testing.assert_allclose(folded[part][name]['kernel'], expected, rtol=1e-6)
      np.testing.assert_array_equal(folded[norm]['scale'], 1)
    np.testing.assert_array_equal(
      folded['mlp']['down']['kernel'], layer['mlp']['down']['kernel']
    )


class GlobalGaugeTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('one width', [18] * 5, [18], []),
    ('unsliced head', [18, 18, 18, 18, 24], [18], [6]),
    ('wider twice', [12, 14, 14, 18, 24], [12, 2], [4, 6]),
  )
  def test_readers_are_trapezoidal_and_the_function_the_same(self, widths, first, last):
    model = random_models.sliced_llama(widths)
    after, (residual, gauge) = symmetries.run_chain(CHAIN, model)
    up = next(iter(after.layers()))['mlp']['up']['kernel']
    self.assertEqual((up.blocks, up.full), (tuple(first), 0))
    if last:
      head = after.params['head']['kernel']
      self.assertEqual((head.blocks, head.full), (tuple(last), sum(first)))
    else:
      self.assertIsInstance(after.params['head']['kernel'], np.ndarray)
    saved = sum(n * (n - 1) // 2 for n in (*first, *last))
    self.assertEqual(gauge.numbers, saved)
    np.testing.assert_allclose(_logits(after), _logits(model), atol=3e-4)
    # The shortcuts have kept the form that the residual gauge gave them.
    again, (saving,) = symmetries.run_chain(CHAIN[:1], model)
    self.assertEqual(saving.numbers, residual.numbers)
    for a, b in zip(after.layers(), again.layers(), strict=True):
      for name in ('attention_shortcut', 'mlp_shortcut'):
        x, y = a[name]['kernel'], b[name]['kernel']
        self.assertEqual((x.kind, x.shape), (y.kind, y.shape))
        self.assertEqual(
          structured.count_numbers(x.from_stored(*x.stored())),
          structured.count_numbers(y),
        )

  def test_where_the_stream_gets_narrower_nothing_is_left(self):
    model = random_models.sliced_llama([24, 18, 18, 18, 18])
    after, (_, gauge) = symmetries.run_chain(CHAIN, model)
    self.assertEqual((gauge.numbers, gauge.notes), (0, []))
    np.testing.assert_allclose(_logits(after), _logits(model), atol=3e-4)

  def test_without_the_residual_gauge_the_last_segment_is_free(self):
    model = random_models.sliced_llama([18] * 5)
    after, (gauge,) = symmetries.run_chain(CHAIN[1:], model)
    self.assertEqual(gauge.numbers, 18 * 17 // 2)
    np.testing.assert_array_equal(
      after.params['embed']['tokens'], model.params['embed']['tokens']
    )
    np.testing.assert_allclose(_logits(after), _logits(model), atol=3e-4)

  def test_a_dense_rmsnorm_model_has_one_rotation_and_no_norm_scales(self):
    model = checkpoints.load_checkpoint(TESTDATA / 'llama-tiny-dense').model
    rng = np.random.default_rng(0)
    scales = lambda x: rng.uniform(0.5, 2, x.shape).astype(np.float32)
    params = jax.tree.map(np.float32, model.params)
    params['final_norm'] = jax.tree.map(scales, params['final_norm'])
    for norm in ('attention_norm', 'mlp_norm'):
      params['blocks_0'][norm] = jax.tree.map(scales, params['blocks_0'][norm])
    model = dataclasses.replace(model, params=params)
    after, (gauge,) = symmetries.run_chain(CHAIN[1:], model)
    norms = 2 * model.config.num_layers + 1
    self.assertEqual(gauge.numbers, 128 * 127 // 2 + norms * 128)
    logits = _logits(model)
    self.assertLess(np.abs(_logits(after) - logits).max(), 1e-4 * np.abs(logits).max())

  @parameterized.parameters('phi2-tiny-dense', 'tied')
  def test_layernorm_and_tied_dense_models_are_left_alone(self, name):
    model = checkpoints.load_checkpoint(
      TESTDATA / name.replace('tied', 'llama-tiny-dense')
    ).model
    if name == 'tied':
      config = dataclasses.replace(model.config, tied_head=True)
      params = {k: v for k, v in model.params.items() if k != 'head'}
      model = dataclasses.replace(model, params=params, config=config)
    after, notes = symmetries.remove_global_gauge().apply(model)
    self.assertIs(after, model)
    self.assertEmpty(notes)

  def test_numbers_that_would_overflow_are_left_alone(self):
    model = random_models.sliced_llama([18] * 3, np.float16)
    head = np.array(model.params['head']['kernel'])
    head[:3, 0] = 65504
    params = model.params | {'head': {'kernel': head}}
    model = dataclasses.replace(model, params=params)
    after, (gauge,) = symmetries.run_chain(CHAIN[1:], model)
    self.assertEqual(gauge.numbers, 0)
    np.testing.assert_array_equal(after.params['head']['kernel'], head)


if __name__ == '__main__':
  absltest.main()

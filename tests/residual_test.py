"""The residual gauge: the function stays, the numbers go."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import random_models

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax import symmetries
from rotbits_jax.symmetries import residual

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
SLICED = (
  'llama-tiny-sliced-head-0.25',
  'opt-small-sliced-0.2',
  'phi2-tiny-sliced-0.25',
  'phi3-tiny-sliced-0.25',
)


def _logits(model, tokens=None):
  tokens = np.arange(12)[None] % 40 if tokens is None else tokens
  fast_compile = {'xla_backend_optimization_level': 0}
  return np.asarray(
    jax.jit(models.logits, compiler_options=fast_compile)(model, tokens)
  )


def _gauge(model, **kwargs):
  return symmetries.remove_gauge(**kwargs).apply(model)


class PureFunctionsTest(parameterized.TestCase):
  @parameterized.parameters((5, 5), (4, 7), (1, 1), (1, 3))
  def test_polar_agrees_with_numpy(self, d, e):
    matrix = np.random.default_rng(d).standard_normal((d, e))
    got = jax.jit(residual.polar)(jnp.float32(matrix))
    u, o = np.float64(got.u), np.float64(got.rotation)
    psd = u * np.float64(got.values) @ u.T
    values, vectors = np.linalg.eigh(matrix @ matrix.T)
    expected = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    np.testing.assert_allclose(psd, expected, atol=1e-5)
    np.testing.assert_allclose(o @ o.T, np.eye(e), atol=1e-5)
    np.testing.assert_allclose(np.pad(psd, ((0, 0), (0, e - d))) @ o, matrix, atol=1e-5)

  def test_cumulative_rotations_are_the_products_in_order(self):
    rng = np.random.default_rng(0)
    steps = np.stack([random_models.orthogonal(rng, 6) for _ in range(9)])
    first = random_models.orthogonal(rng, 6)
    got = jax.jit(residual.cumulative_rotations)(jnp.float32(steps), jnp.float32(first))
    expected = first
    np.testing.assert_allclose(np.asarray(got[0]), expected, atol=1e-6)
    for step, rotation in zip(steps, got[1:], strict=True):
      expected = step.T @ expected
      np.testing.assert_allclose(np.asarray(rotation), expected, atol=1e-5)

  def test_many_products_stay_orthogonal(self):
    rng = np.random.default_rng(0)
    steps = np.stack([random_models.orthogonal(rng, 16) for _ in range(200)])
    steps = steps.astype(np.float32)
    got = np.float64(residual.cumulative_rotations(jnp.asarray(steps), jnp.eye(16)))
    error = np.abs(np.swapaxes(got, 1, 2) @ got - np.eye(16)).max()
    self.assertLess(error, 2e-6)

  def test_vmap_equals_a_loop(self):
    stack = jnp.float32(np.random.default_rng(0).standard_normal((3, 4, 6)))
    batched = jax.vmap(residual.polar)(stack)
    for i in range(3):
      single = residual.polar(stack[i])
      np.testing.assert_allclose(batched.rotation[i], single.rotation, atol=1e-6)

  def test_gram_factor_is_trapezoidal_and_right(self):
    rng = np.random.default_rng(0)
    rotation = random_models.orthogonal(rng, 6)
    u = random_models.orthogonal(rng, 6)[:, :3]
    weights = np.array([0.0, 0.4, 0.9])
    got = residual.gram_factor(*(jnp.float32(x) for x in (rotation, u, weights)))
    expected = rotation.T @ (u * weights) @ u.T @ rotation
    np.testing.assert_allclose(np.asarray(got @ got.T), expected, atol=1e-6)
    np.testing.assert_array_equal(np.triu(np.asarray(got), 1), 0)
    np.testing.assert_allclose(np.asarray(got[:, 2]), 0, atol=1e-6)


class GaugeTest(parameterized.TestCase):
  @parameterized.parameters(*SLICED)
  def test_numbers_fall_as_the_shapes_say(self, name):
    checkpoint = checkpoints.load_checkpoint(TESTDATA / name)
    config = checkpoint.model.config
    _, (saving,) = symmetries.run_chain(
      (symmetries.remove_gauge(tolerance=1.5),), checkpoint.model
    )
    cut = [config.hidden_size - d for d in config.segment_widths]
    ideal = 0
    for d, e, k, j in zip(
      config.segment_widths, config.segment_widths[1:], cut, cut[1:], strict=False
    ):
      rank = min(k, j)
      ideal += d * e - (d * rank - rank * (rank - 1) // 2)
    # Ranks fall short of D - d where slices overlap; noise may add a column or two.
    self.assertGreater(saving.numbers, 0.99 * ideal)

  def test_exact_numbers_of_a_float32_model(self):
    """The rank is D - d, and the function the same to float32's rounding."""
    model = random_models.sliced_llama([18] * 5)
    gauged, notes = _gauge(model)
    self.assertEqual([n['rank'] for n in notes], [6] * 4)
    self.assertEqual([n['numbers'] for n in notes], [18 * 6 - 15] * 4)
    np.testing.assert_allclose(_logits(gauged), _logits(model), atol=2e-4)

  @parameterized.named_parameters(
    ('widening', [12, 14, 14, 18, 24]),
    ('narrowing', [24, 20, 18, 18, 16]),
    ('mixed', [16, 20, 14, 14, 24]),
    ('one_wide', [1, 1, 1, 1, 24]),
    ('single_layer', [18, 18, 24]),
  )
  def test_widths_may_vary(self, widths):
    model = random_models.sliced_llama(widths)
    gauged, notes = _gauge(model)
    np.testing.assert_allclose(_logits(gauged), _logits(model), atol=3e-4)
    for note, d, e in zip(notes, widths, widths[1:], strict=False):
      self.assertEqual(note['form'] == 'trapezoidal', d > e, note)

  def test_unsliced_end_stores_nothing(self):
    gauged, notes = _gauge(random_models.sliced_llama([18, 18, 18, 18, 24]))
    self.assertEqual(notes[-1]['numbers'], 0)
    last = list(gauged.layers())[-1]['mlp_shortcut']['kernel'].materialize()
    np.testing.assert_array_equal(np.asarray(last), np.eye(18, 24))

  def test_singular_values_above_one_take_a_second_factor(self):
    grow = lambda rng, m: m + 0.5 * np.outer(rng.standard_normal(18), m[0]) / 18
    model = random_models.sliced_llama([18] * 5, shortcut=grow)
    gauged, _ = _gauge(model)
    kernel = gauged.params['blocks_0']['attention_shortcut']['kernel']
    self.assertGreater(kernel.c.shape[-1], 0)
    np.testing.assert_allclose(_logits(gauged), _logits(model), atol=3e-4)

  def test_shortcuts_far_from_the_identity_become_triangles(self):
    tiny = lambda rng, m: 1e-3 * rng.standard_normal(m.shape)
    model = random_models.sliced_llama([18] * 5, np.float16, shortcut=tiny)
    gauged, notes = _gauge(model)
    self.assertEqual({n['form'] for n in notes}, {'symmetric_triangle'})
    self.assertEqual(notes[0]['numbers'], 18 * 19 // 2)
    self.assertLess(max(n['error'] for n in notes), 2**-11)
    np.testing.assert_allclose(_logits(gauged), _logits(model), atol=3e-2)

  @parameterized.parameters(0, 5)
  def test_rank_deficient_shortcuts(self, rank):
    project = lambda rng, m: m[:, :rank] @ m[:rank, :] if rank else 0 * m
    model = random_models.sliced_llama([18] * 5, shortcut=project)
    gauged, _ = _gauge(model)
    np.testing.assert_allclose(_logits(gauged), _logits(model), atol=3e-4)

  @parameterized.named_parameters(
    ('attention', ('attention', 'value', 'kernel'), {1, 2}),
    ('shortcut', ('attention_shortcut', 'kernel'), {2, 3}),
    ('down', ('mlp', 'down', 'kernel'), {3, 4}),
  )
  def test_non_finite_numbers_stay_where_they_are(self, path, segments):
    model = random_models.sliced_llama([18] * 5, np.float16)
    layers = list(model.layers())
    array = layers[1]
    for key in path:
      array = array[key]
    array[2, 3] = np.nan
    broken = models.from_layers(model.config, model.outer(), layers)
    gauged, notes = _gauge(broken)
    for before, after in zip(
      broken.layers(), gauged.materialize().layers(), strict=True
    ):
      same = jax.tree.map(
        lambda a, b: np.array_equal(*(np.isfinite(np.float32(x)) for x in (a, b))),
        before,
        after,
      )
      self.assertTrue(all(jax.tree.leaves(same)), same)
    kept = {n['tensor'] for n in notes if n['form'] == 'array'}
    self.assertNotEmpty(kept)
    self.assertLess(len(kept), 4)

  def test_overflow_in_a_rotation_is_avoided(self):
    model = random_models.sliced_llama([18] * 5, np.float16)
    layers = list(model.layers())
    layers[1]['mlp']['down']['kernel'][0] = 60_000
    large = models.from_layers(model.config, model.outer(), layers)
    gauged, _ = _gauge(large)
    for leaf in jax.tree.leaves(gauged.materialize().params):
      self.assertTrue(np.isfinite(np.float32(leaf)).all())
    kernel = list(gauged.layers())[1]['mlp']['down']['kernel']
    np.testing.assert_array_equal(kernel[0], np.full(18, 60_000, np.float16))

  def test_dense_models_have_nothing_to_fix(self):
    model = checkpoints.load_checkpoint(TESTDATA / 'llama-tiny-dense').model
    gauged, notes = _gauge(model)
    self.assertIs(gauged, model)
    self.assertEmpty(notes)

  def test_a_rotated_model_has_the_same_function(self):
    model = random_models.sliced_llama([18, 18, 20, 20, 24])
    rotated = symmetries.randomly_rotated(model, key=jax.random.key(1))
    np.testing.assert_allclose(_logits(rotated), _logits(model), atol=3e-4)
    moved = jnp.abs(rotated.params['embed']['tokens'] - model.params['embed']['tokens'])
    self.assertGreater(float(moved.mean()), 0.1)

  def test_a_structured_model_can_be_fixed_again(self):
    model, _ = _gauge(random_models.sliced_llama([18] * 5))
    again, notes = _gauge(model)
    self.assertTrue(
      structured.is_structured(again.params['blocks_0']['mlp_shortcut']['kernel'])
    )
    self.assertEqual([n['rank'] for n in notes], [6] * 4)
    np.testing.assert_allclose(_logits(again), _logits(model), atol=2e-4)


if __name__ == '__main__':
  absltest.main()

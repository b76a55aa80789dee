"""The residual gauge keeps the function with fewer numbers."""

import dataclasses
import functools
import itertools
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import random_models
import transform_checks

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.symmetries import canonical
from rotbits_jax.symmetries import norms
from rotbits_jax.symmetries import rotations
from rotbits_jax.symmetries import shortcuts

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
SLICED = (
  'llama-tiny-sliced-head-0.25',
  'phi2-tiny-sliced-0.25',
  'phi3-tiny-sliced-0.25',
)
TOKENS = np.arange(12)[None] % 40


def _logits(model):
  return transform_checks.fast_logits(model, TOKENS)


def _gauge(model, **options):
  """Returns the rewritten model, and the notes on its shortcuts."""
  transform = passes.remove_residual_gauge(**options)
  gauged, notes = transform_checks.apply(transform, model)
  return gauged, [note for note in notes if 'shortcut' in note['tensor']]


def _triangle(n):
  """Returns how many numbers a rotation of n dimensions makes zero."""
  return n * (n - 1) // 2


class PureFunctionsTest(parameterized.TestCase):
  def test_polar_agrees_with_numpy(self):
    for d, e in ((5, 5), (4, 7), (1, 1), (1, 3)):
      with self.subTest(d=d, e=e):
        matrix = np.random.default_rng(d).standard_normal((d, e))
        got = jax.jit(canonical.polar)(jnp.float32(matrix))
        u, o = np.float64(got.u), np.float64(got.rotation)
        psd = u * np.float64(got.values) @ u.T
        values, vectors = np.linalg.eigh(matrix @ matrix.T)
        expected = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
        np.testing.assert_allclose(psd, expected, atol=1e-5)
        np.testing.assert_allclose(o @ o.T, np.eye(e), atol=1e-5)
        np.testing.assert_allclose(
          np.pad(psd, ((0, 0), (0, e - d))) @ o, matrix, atol=1e-5
        )

  def test_polar_from_gram_agrees_with_numpy_for_small_and_no_singular_values(self):
    rng = np.random.default_rng(0)
    for d, e, least in ((64, 64, 0.0), (64, 80, 1e-3), (48, 48, 0.05), (3, 3, 1.0)):
      with self.subTest(d=d, e=e, least=least):
        left, right = (random_models.orthogonal(rng, n) for n in (d, e))
        values = np.append(rng.uniform(0.1, 1, d - 3), [least] * 3)
        matrix = (left * values) @ right[:d]
        got, trusted = jax.jit(canonical._polar_from_gram)(jnp.float32(matrix))
        self.assertGreater(trusted, 0.03)
        u, o = np.float64(got.u), np.float64(got.rotation)
        psd = (u * np.float64(got.values)) @ u.T
        np.testing.assert_allclose(psd, (left * values) @ left.T, atol=1e-5)
        np.testing.assert_allclose(o @ o.T, np.eye(e), atol=1e-5)
        np.testing.assert_allclose(psd @ o[:d], matrix, atol=1e-5)
    flat = jnp.diag(jnp.repeat(jnp.array([1.0, 1e-3]), 32))  # too many small ones
    self.assertLess(canonical._polar_from_gram(flat)[1], 0.03)
    # Where nothing is left for the last rows, they may be any.
    dropped = jnp.diag(jnp.arange(64) != 3).astype(jnp.float32)
    outlier = dropped.at[3, 3].set(1).at[5, 5].set(1000)
    for matrix in (dropped, 0.15 * dropped, outlier):
      got, trusted = canonical._polar_from_gram(matrix)
      off = np.abs(np.float64(got.rotation) @ got.rotation.T - np.eye(64)).max()
      self.assertTrue(trusted < 0.03 or off < 1e-5)

  def test_shortcuts_without_some_coordinates(self):
    tokens = np.arange(9)[None]
    for scale in (0.15, 1.0):
      cut = lambda rng, m, s=scale: s * np.diag(np.arange(12) != 3)
      model = random_models.sliced_llama((12, 12, 12), np.float32, shortcut=cut)
      again = rotbits_jax.decode(rotbits_jax.encode(model, preset='free'))
      found, expected = (models.logits(x, tokens) for x in (again, model))
      np.testing.assert_allclose(found, expected, atol=1e-4)

  def test_next_rotation_is_the_product_of_its_definition(self):
    rng = np.random.default_rng(0)
    step, rotation = random_models.orthogonal(rng, 9), random_models.orthogonal(rng, 6)
    free = random_models.orthogonal(rng, 3)
    arrays = [jnp.float32(x) for x in (step, rotation, free)]
    both = np.zeros((9, 9))
    both[:6, :6], both[6:, 6:] = rotation, free
    got = jax.jit(rotations.next_rotation)(*arrays)
    np.testing.assert_allclose(np.asarray(got), step.T @ both, atol=1e-6)
    same_width = rotations.next_rotation(arrays[1], arrays[1])
    np.testing.assert_allclose(np.asarray(same_width), np.eye(6), atol=1e-6)

  def test_a_scan_over_many_layers_is_the_walk_and_orthogonal(self):
    rng = np.random.default_rng(0)
    steps = np.stack([random_models.orthogonal(rng, 16) for _ in range(200)])
    first = random_models.orthogonal(rng, 16)
    walk, expected = first, []
    for step in steps:
      walk = step.T @ walk
      expected.append(walk)
    got = jax.jit(rotations.running_rotations)(jnp.float32(steps), jnp.float32(first))
    got = np.float64(got)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    error = np.abs(np.swapaxes(got, 1, 2) @ got - np.eye(16)).max()
    self.assertLess(error, 2e-6)

  def test_vmap_equals_a_loop(self):
    stack = jnp.float32(np.random.default_rng(0).standard_normal((3, 4, 6)))
    batched = jax.vmap(canonical.polar)(stack)
    for i in range(3):
      single = canonical.polar(stack[i])
      np.testing.assert_allclose(batched.rotation[i], single.rotation, atol=1e-6)

  @parameterized.parameters((3, 3), (3, 0), (6, 6), (2, 1), (0, 0))
  def test_factors_are_trapezoidal_and_right(self, *columns):
    rng = np.random.default_rng(0)
    rotation, u = (random_models.orthogonal(rng, 6) for _ in range(2))
    values = np.array([1.7, 1.2, 1.001, 0.9, 0.6, 0.1])
    polar = canonical.Polar(jnp.float32(u), jnp.float32(values), jnp.eye(6))
    factors = functools.partial(shortcuts.factors, tolerance=0.01, columns=columns)
    for factor, own, k, count in zip(
      jax.jit(factors)(jnp.float32(rotation), polar),
      (np.where(values < 1, 1 - values, 0), np.where(values > 1.01, values - 1, 0)),
      columns,
      (3, 2),
      strict=True,
    ):
      factor = np.asarray(factor)
      self.assertEqual(factor.shape, (6, k))
      own[np.argsort(-own)[k:]] = 0  # columns are for the values farthest from 1
      expected = rotation.T @ (u * own) @ u.T @ rotation
      np.testing.assert_allclose(factor @ factor.T, expected, atol=1e-6)
      np.testing.assert_array_equal(np.triu(factor, 1), 0)
      np.testing.assert_array_equal(factor[:, count:], 0)
      self.assertTrue((np.diag(factor) >= 0).all())

  @parameterized.parameters(np.float16, ml_dtypes.bfloat16)
  def test_the_form_of_a_shortcut_follows_from_its_values(self, dtype):
    """A shortcut near the identity has few columns; one far from it is an array."""
    near = np.concatenate([[1.5], np.linspace(1.0002, 0.9998, 14), [0.25] * 3])
    unit = float(jnp.finfo(dtype).eps) / 2
    for values, form in (
      (near, 'identity_minus_gram'),
      (near * 1e-3, 'array'),
    ):
      fill = lambda rng, _, x=values: x[:, None] * random_models.orthogonal(rng, 18)
      model = random_models.sliced_llama([18] * 3, dtype, shortcut=fill)
      gauged, notes = _gauge(model, tolerance=1.5)
      self.assertEqual({n['form'] for n in notes}, {form})
      kernel = gauged.layer(0)['attention_shortcut']['kernel']
      wide = np.float64(structured.materialize(structured.astype(kernel, np.float32)))
      found = np.linalg.svd(wide, compute_uv=False)
      np.testing.assert_allclose(found, values, atol=3 * unit * values.max())
      self.assertLess(max(n['error'] for n in notes), 2 * unit)

  def test_upper_rotation_is_a_qr_factor(self):
    matrix = np.random.default_rng(0).standard_normal((6, 9))
    got = np.float64(rotations.upper_rotation(jnp.float32(matrix)))
    np.testing.assert_allclose(got.T @ got, np.eye(6), atol=1e-6)
    np.testing.assert_allclose(np.tril(got.T @ matrix, -1), 0, atol=1e-5)
    self.assertTrue((np.diag(got.T @ matrix) > 0).all())

  def test_folded_scales_give_the_same_kernel_products(self):
    model = checkpoints.load_checkpoint(TESTDATA / 'llama-tiny-dense').model
    layer = structured.flatten(jax.tree.map(np.float32, model.layer(0)))
    rng = np.random.default_rng(0)
    for norm in ('attention_norm/scale', 'mlp_norm/scale'):
      layer[norm] = rng.uniform(0.5, 2, 128).astype(np.float32)
    folded = norms.fold_norm_scales(layer, model.config)
    self.assertEqual(folded.keys(), layer.keys())
    for path, norm in (
      ('attention/query/kernel', 'attention_norm/scale'),
      ('attention/key/kernel', 'attention_norm/scale'),
      ('attention/value/kernel', 'attention_norm/scale'),
      ('mlp/gate/kernel', 'mlp_norm/scale'),
      ('mlp/up/kernel', 'mlp_norm/scale'),
    ):
      expected = layer[norm][:, None] * layer[path]
      np.testing.assert_allclose(folded[path], expected, rtol=1e-6)
      np.testing.assert_array_equal(folded[norm], 1)
    for path in ('attention/out/kernel', 'mlp/down/kernel'):
      np.testing.assert_array_equal(folded[path], layer[path])

  def test_no_rotation_exceeds_the_range_that_is_foreseen(self):
    rng = np.random.default_rng(0)
    flat = {
      'reads': rng.standard_normal((6, 9)),
      'writes': rng.standard_normal((9, 6)),
      'both': rng.standard_normal((6, 6)),
      'bias': rng.standard_normal(6),
      'none': rng.standard_normal(6),
    }
    axes = {
      'reads': (0, 'neuron'),
      'writes': ('neuron', -1),
      'both': (0, -1),
      'bias': (-1,),
      'none': ('neuron',),
    }
    # A rotation that aligns the largest row or column with an axis makes the largest
    # number.
    norm = lambda x, axis=None: np.linalg.norm(x, axis=axis).max()
    expected = {
      'reads': norm(flat['reads'], 0),
      'writes': norm(flat['writes'], 1),
      'both': norm(flat['both']),
      'bias': norm(flat['bias']),
      'none': np.abs(flat['none']).max(),
    }
    bound = jax.jit(rotations.largest_norm, static_argnums=1)
    for path, largest in expected.items():
      found = bound(jnp.float32(flat[path]), axes[path])
      np.testing.assert_allclose(found, largest, rtol=1e-5, err_msg=path)
    flat['reads'][2, 3] = np.nan
    self.assertTrue(np.isnan(bound(jnp.float32(flat['reads']), axes['reads'])))
    flat['writes'][2, 3] = np.inf
    tokens = bound(jnp.float32(flat['writes']), ('vocabulary', 0))
    finite = np.delete(flat['writes'], 2, axis=0)
    np.testing.assert_allclose(tokens, norm(finite, 1), rtol=1e-5)


class GaugeTest(parameterized.TestCase):
  @parameterized.parameters(*SLICED)
  def test_numbers_fall_as_the_shapes_say(self, name):
    self.check_numbers(name)

  @pytest.mark.slow
  def test_numbers_of_a_trained_model_fall_as_the_shapes_say(self):
    self.check_numbers('opt-small-sliced-0.2')

  def check_numbers(self, name):
    model = checkpoints.load_checkpoint(TESTDATA / name).model
    config = model.config
    _, (saving,) = passes.run_chain(
      (passes.remove_residual_gauge(tolerance=1.5),), model
    )
    cut = [config.hidden_size - d for d in config.segment_widths]
    edges = [0, *sorted(set(config.segment_widths))]
    free = sum(_triangle(b - a) for a, b in itertools.pairwise(edges))
    ideal = free
    for d, e, k, j in zip(
      config.segment_widths, config.segment_widths[1:], cut, cut[1:], strict=False
    ):
      rank = min(k, j)
      ideal += d * e - (d * rank - _triangle(rank))
    # Ranks are below D - d where slices overlap; rounding may add a column or two.
    self.assertGreater(saving.elements, 0.99 * ideal)
    kernels = [n for n in saving.notes if n['form'] == 'trapezoidal_rows']
    fewer = sum(np.prod(n['shape']) - n['elements'] for n in kernels)
    self.assertEqual(fewer, free)

  def test_exact_numbers_of_a_float32_model(self):
    """The rank is D - d, and the function stays up to the rounding of float32."""
    model = random_models.sliced_llama([18] * 5)
    gauged, notes = _gauge(model)
    self.assertEqual([n['rank'] for n in notes], [6] * 4)
    self.assertEqual([n['elements'] for n in notes], [18 * 6 - 15] * 4)
    np.testing.assert_allclose(_logits(gauged), _logits(model), atol=2e-4)

  @parameterized.named_parameters(
    ('mixed', [16, 20, 14, 14, 24]),
    ('single_layer', [18, 18, 24]),
  )
  def test_widths_may_vary(self, widths):
    self.check_widths(widths)

  @parameterized.named_parameters(
    ('widening', [12, 14, 14, 18, 24]),
    ('narrowing', [24, 20, 18, 18, 16]),
    ('one_wide', [1, 1, 1, 1, 24]),
  )
  @pytest.mark.slow
  def test_more_widths_may_vary(self, widths):
    self.check_widths(widths)

  def check_widths(self, widths):
    model = random_models.sliced_llama(widths)
    gauged, notes = _gauge(model)
    np.testing.assert_allclose(_logits(gauged), _logits(model), atol=3e-4)
    for note, d, e in zip(notes, widths, widths[1:], strict=False):
      # One number has no factors.
      self.assertEqual(note['form'] == 'array', d > e or (d, e) == (1, 1), note)

  def test_unsliced_end_stores_nothing(self):
    gauged, notes = _gauge(random_models.sliced_llama([18, 18, 18, 18, 24]))
    self.assertEqual(notes[-1]['elements'], 0)
    last = list(gauged.layers())[-1]['mlp_shortcut']['kernel'].materialize()
    np.testing.assert_array_equal(np.asarray(last), np.eye(18, 24))

  def test_singular_values_above_one_take_a_second_factor(self):
    grow = lambda rng, m: m + 0.5 * np.outer(rng.standard_normal(18), m[0]) / 18
    model = random_models.sliced_llama([18] * 5, shortcut=grow)
    gauged, _ = _gauge(model)
    kernel = gauged.layer(1)['attention_shortcut']['kernel']
    self.assertGreater(kernel.c.shape[-1], 0)
    np.testing.assert_allclose(_logits(gauged), _logits(model), atol=3e-4)

  @parameterized.parameters(0, 5)
  def test_rank_deficient_shortcuts(self, rank):
    project = lambda rng, m: m[:, :rank] @ m[:rank, :] if rank else 0 * m
    model = random_models.sliced_llama([18] * 5, shortcut=project)
    gauged, _ = _gauge(model)
    np.testing.assert_allclose(_logits(gauged), _logits(model), atol=3e-4)

  def test_a_model_that_cannot_be_rotated_is_left_alone(self):
    for case in (
      *(f'attention/{name}/kernel' for name in ('query', 'out')),
      *('attention_shortcut/kernel', 'mlp/down/kernel', 'head/kernel', 'large'),
    ):
      with self.subTest(case=case):
        model = random_models.sliced_llama([18] * 5, np.float16)
        layers = [structured.flatten(layer) for layer in model.layers()]
        outer = structured.flatten(jax.tree.map(np.array, model.outer()))
        path = 'mlp/down/kernel' if case == 'large' else case
        changed = outer if path in outer else layers[1]
        changed[path][2, 3] = np.nan
        if case == 'large':
          changed[path][2] = 60_000  # a rotation could make it 250,000
        layers = [structured.unflatten(layer) for layer in layers]
        broken = models.from_layers(model.config, structured.unflatten(outer), layers)
        same, (saving,) = passes.run_chain((passes.remove_residual_gauge(),), broken)
        transform_checks.assert_same_bits(same, broken)
        (note,) = saving.notes
        prefix = '' if path in outer else 'layers.1/'
        self.assertStartsWith(note['obstacle'], f'{prefix}{path} has weights')

  def test_tokens_that_are_not_finite_do_not_matter(self):
    model = random_models.sliced_llama([18] * 5, np.float16)
    table = np.array(model.params['embed']['tokens'])
    table[39, 2], table[38] = np.nan, np.inf
    params = model.params | {'embed': {'tokens': table}}
    gauged, notes = _gauge(dataclasses.replace(model, params=params))
    expected, _ = _gauge(model)
    self.assertLen(notes, 4)
    np.testing.assert_array_equal(_logits(gauged), _logits(expected))
    np.testing.assert_array_equal(
      np.isfinite(gauged.params['embed']['tokens']).all(axis=1), np.arange(40) < 38
    )

  def test_a_rotated_model_has_the_same_function(self):
    model = random_models.sliced_llama([18, 18, 20, 20, 24])
    rotated = passes.randomly_rotated(model, key=jax.random.key(1))
    np.testing.assert_allclose(_logits(rotated), _logits(model), atol=3e-4)
    moved = np.abs(rotated.params['embed']['tokens'] - model.params['embed']['tokens'])
    self.assertGreater(float(moved.mean()), 0.1)

  def test_a_structured_model_can_be_fixed_again(self):
    model, _ = _gauge(random_models.sliced_llama([18] * 5))
    again, notes = _gauge(model)
    self.assertTrue(structured.is_structured(again.layer(0)['mlp_shortcut']['kernel']))
    self.assertEqual([n['rank'] for n in notes], [6] * 4)
    np.testing.assert_allclose(_logits(again), _logits(model), atol=2e-4)


class FreeRotationsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('one width', [18] * 5, {0: 18}),
    ('unsliced head', [18, 18, 18, 18, 24], {0: 18, 'head': 6}),
    ('wider everywhere', [12, 14, 14, 18, 24], {'head': 6}),
  )
  def test_readers_are_trapezoidal_and_the_function_the_same(self, widths, expected):
    self.check_readers(widths, expected)

  @parameterized.named_parameters(
    ('wider after an mlp', [12, 12, 15, 18, 18], {0: 12}),
    ('narrower first', [24, 18, 18, 18, 18], {}),
    ('narrower, then wider', [18, 18, 16, 16, 24], {0: 18, 'head': 8}),
  )
  @pytest.mark.slow
  def test_readers_of_other_widths_are_trapezoidal(self, widths, expected):
    self.check_readers(widths, expected)

  def check_readers(self, widths, expected):
    model = random_models.sliced_llama(widths)
    transform = passes.remove_residual_gauge()
    after, notes = transform_checks.apply(transform, model)
    readers = {i: x['mlp']['up']['kernel'] for i, x in enumerate(after.layers())}
    readers['head'] = after.params['head']['kernel']
    found = {
      name: kernel.lower.shape[1]
      for name, kernel in readers.items()
      if structured.is_structured(kernel)
    }
    self.assertEqual(found, expected)
    kernels = [note for note in notes if 'shortcut' not in note['tensor']]
    self.assertLen(kernels, len(expected))
    for note in kernels:
      self.assertLess(note['error'], 1e-6)
    for name, rows in expected.items():
      size = structured.count_elements(readers[name])
      self.assertEqual(size, np.prod(readers[name].shape) - _triangle(rows))
    np.testing.assert_allclose(_logits(after), _logits(model), atol=3e-4)

  def test_a_dense_rmsnorm_model_has_one_rotation_and_no_norm_scales(self):
    model = checkpoints.load_checkpoint(TESTDATA / 'llama-tiny-dense').model
    rng = np.random.default_rng(0)
    scales = lambda x: rng.uniform(0.5, 2, x.shape).astype(np.float32)
    params = jax.tree.map(np.float32, model.params)
    params['final_norm'] = jax.tree.map(scales, params['final_norm'])
    for norm in ('attention_norm', 'mlp_norm'):
      params['layers.0:3'][norm] = jax.tree.map(scales, params['layers.0:3'][norm])
    model = dataclasses.replace(model, params=params)
    after, (gauge,) = passes.run_chain((passes.remove_residual_gauge(),), model)
    norms = 2 * model.config.num_layers + 1
    self.assertEqual(gauge.elements, _triangle(128) + norms * 127)
    logits = _logits(model)
    self.assertLess(np.abs(_logits(after) - logits).max(), 1e-4 * np.abs(logits).max())

  @parameterized.parameters('layernorm', 'tied', 'large', 'nan')
  def test_dense_models_that_cannot_be_rotated_are_left_alone(self, case):
    name = 'phi2-tiny-dense' if case == 'layernorm' else 'llama-tiny-dense'
    model = checkpoints.load_checkpoint(TESTDATA / name).model
    if case == 'tied':
      config = dataclasses.replace(model.config, tied_head=True)
      params = {k: v for k, v in model.params.items() if k != 'head'}
      model = dataclasses.replace(model, params=params, config=config)
    if case in ('large', 'nan'):
      head = np.array(model.params['head']['kernel'])
      head[:3, 0] = 65504 if case == 'large' else np.nan
      params = model.params | {'head': {'kernel': head}}
      model = dataclasses.replace(model, params=params)
    transform = passes.remove_residual_gauge()
    after, (saving,) = passes.run_chain((transform,), model)
    transform_checks.assert_same_bits(after, model)
    self.assertEqual(saving.elements, 0)
    reasons = [note['obstacle'] for note in saving.notes]
    self.assertLen(reasons, case in ('large', 'nan'))
    for reason in reasons:
      self.assertStartsWith(reason, 'head/kernel has weights')


if __name__ == '__main__':
  absltest.main()

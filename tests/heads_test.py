"""The gauges of attention heads: the function stays, with h^2 numbers fewer a head."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.symmetries import heads
from tests import random_models
from tests import transform_checks

LLAMA = {
  'model_type': 'llama',
  'hidden_size': 12,
  'intermediate_size': 8,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 6,
  'vocab_size': 31,
  'max_position_embeddings': 32,
  'rope_theta': 50.0,
  'rms_norm_eps': 1e-3,
}
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
PHI = LLAMA | {
  'model_type': 'phi',
  'hidden_size': 24,
  'partial_rotary_factor': 2 / 3,
}
PHI = {k: v for k, v in PHI.items() if k not in ('head_dim', 'rms_norm_eps')}
QWEN2 = LLAMA | {'model_type': 'qwen2'}

# Name, config.json, h and r. They save K h^2 and K (h - r)^2 numbers.
FAMILIES = (
  ('opt', OPT, 6, 0),
  ('llama_with_groups', LLAMA, 6, 6),
  ('phi_with_partial_rope_and_biases', PHI, 6, 4),
  ('qwen2_with_biases_and_rope', QWEN2, 6, 6),
)
_basis = jax.jit(heads.basis)
_fix_values = jax.jit(functools.partial(heads.fix_values, kv_heads=2))

CHAIN = (passes.remove_value_gauge(), passes.remove_query_key_gauge())


def _random(shape, seed=0, scale=1.0):
  values = np.random.default_rng(seed).standard_normal(shape)
  return (scale * values).astype(np.float32)


@functools.cache
def _model(family, dtype=np.float32):
  config_json = {name: config for name, config, *_ in FAMILIES}[family]
  return random_models.random_model(config_json, dtype)


def _with_first(model, name, change):
  """Changes a kernel in the attention of the first layer."""
  first, *others = (jax.tree.map(np.array, layer) for layer in model.layers())
  kernel = first['attention'][name]['kernel']
  first['attention'][name]['kernel'] = change(kernel)
  return models.from_layers(model.config, model.outer(), [first, *others])


def _spanned(below):
  """Returns `[I - B^T B / 4; B]` in float64."""
  below = np.float64(below)
  return np.concatenate([np.eye(below.shape[1]) - below.T @ below / 4, below])


MATRICES = {
  'random': _random((9, 4)),
  'square': _random((4, 4)),
  'of_rank_1': np.outer(_random(9), _random(4, 1)),
  'zero': np.zeros((9, 4), np.float32),
  'opposite_to_the_first_rows': np.eye(9, 4, dtype=np.float32) * -3,
  'orthogonal_to_the_first_rows': np.eye(9, 4, -4, dtype=np.float32),
  'of_equal_rows': np.ones((9, 4), np.float32),
  'ill_conditioned': _random((9, 4)) * np.float32([1e4, 1, 1e-3, 1e-6]),
}


class BasisTest(absltest.TestCase):
  def test_spans_a_matrix_of_any_rank_and_is_well_conditioned(self):
    for name in MATRICES:
      with self.subTest(name=name):
        matrix = MATRICES[name]
        below, factor = _basis(matrix)
        self.assertEqual(below.dtype, matrix.dtype)
        spanned = _spanned(below)
        wide = np.asarray(factor, spanned.dtype)
        tolerance = 2e-6 * max(np.linalg.norm(matrix), 1e-30)
        np.testing.assert_allclose(spanned @ wide, matrix, rtol=0, atol=tolerance)
        self.assertLess(np.linalg.cond(spanned), 2 + 1e-5)
        if below.size:
          self.assertLess(np.linalg.norm(below, 2), 2 + 1e-5)

  def test_a_change_of_basis_changes_nothing(self):
    matrix = MATRICES['random']
    mixed = matrix @ _random((4, 4), 5)
    below, again = (_basis(x).below for x in (matrix, mixed))
    np.testing.assert_allclose(np.asarray(below), again, rtol=0, atol=1e-4)

  def test_passes_through_vmap(self):
    stack = np.stack([_random((9, 4), seed) for seed in range(3)])
    batched = jax.jit(jax.vmap(heads.basis))(stack)
    for i, matrix in enumerate(stack):
      chex.assert_trees_all_close(
        jax.tree.map(lambda x, i=i: x[i], batched), _basis(matrix), atol=1e-5
      )


class LeavesTest(parameterized.TestCase):
  @parameterized.parameters(0, 4)
  def test_columns_of_a_head_are_a_basis_beside_those_that_rope_turns(self, rotary):
    d, count, m = 7, 2, 3
    turned = _random((d, count * rotary), 1) if rotary else None
    rest = _random((d - m, count * m), 2)
    leaf = structured.HeadColumns(turned, rest, heads=count)
    kernel = np.asarray(leaf.materialize())
    self.assertEqual(kernel.shape, leaf.shape)
    for i in range(count):
      head = kernel[:, i * (rotary + m) : (i + 1) * (rotary + m)]
      if rotary:
        known = turned[:, i * rotary : (i + 1) * rotary]
        np.testing.assert_array_equal(head[:, :rotary], known)
      expected = _spanned(rest[:, i * m : (i + 1) * m])
      np.testing.assert_allclose(head[:, rotary:], expected, atol=1e-5)

  @parameterized.parameters((1, 3), (2, 5), (3, 4))
  def test_rows_of_a_group_are_one_basis(self, group, width):
    h, groups = 3, 2
    first = _random((groups * h, width - h), 1)
    others = _random((groups * (group - 1) * h, width), 2) if group > 1 else None
    leaf = structured.HeadRows(first, others, groups=groups, head_dim=h)
    kernel = np.asarray(leaf.materialize())
    self.assertEqual(kernel.shape, leaf.shape)
    for i in range(groups):
      block = kernel[i * group * h : (i + 1) * group * h]
      basis = np.concatenate(np.split(block, group), axis=1).T
      np.testing.assert_allclose(basis, _spanned(basis[h:]), atol=1e-5)
      if group > 1:
        known = others.reshape(groups, -1, width)[i]
        np.testing.assert_array_equal(block[h:], known)
      np.testing.assert_array_equal(block[:h, h:], first.reshape(groups, h, -1)[i])

  def test_sizes_that_do_not_fit_are_an_error(self):
    columns = {'rotary': np.zeros((7, 8)), 'below': np.zeros((4, 6))}
    structured.HeadColumns.from_stored({'heads': 2}, columns)
    for count, name, shape in (
      (2, 'rotary', (5, 8)),
      (2, 'rotary', (7, 5)),
      (2, 'below', (4, 5)),
      (4, 'below', (4, 6)),
      (0, 'below', (4, 6)),
    ):
      with self.assertRaisesRegex(ValueError, 'cannot have'):
        structured.HeadColumns.from_stored(
          {'heads': count}, columns | {name: np.zeros(shape)}
        )
    rows = {'first': np.zeros((6, 2)), 'others': np.zeros((12, 5))}
    structured.HeadRows.from_stored({'groups': 2, 'head_dim': 3}, rows)
    for groups, name, shape in (
      (3, 'first', (6, 2)),
      (0, 'first', (0, 2)),
      (2, 'first', (6, 5)),
      (2, 'others', (10, 5)),
    ):
      with self.assertRaisesRegex(ValueError, 'cannot have'):
        structured.HeadRows.from_stored(
          {'groups': groups, 'head_dim': 3}, rows | {name: np.zeros(shape)}
        )


VALUE, VALUE_BIAS, OUT = heads.VALUES
QUERY, QUERY_BIAS, KEY, KEY_BIAS = heads.KEYS


class PairsTest(parameterized.TestCase):
  def test_values_and_outputs_keep_their_products(self):
    h = 3
    pair = {
      VALUE: _random((7, 2 * h)),
      VALUE_BIAS: _random(2 * h, 1),
      OUT: _random((4 * h, 5), 2),
    }
    fixed, gauge = _fix_values(pair)
    fixed = structured.materialize(fixed)
    for j in range(4):
      at = slice(j // 2 * h, j // 2 * h + h)

      def product(pair, j=j, at=at):
        wide = jax.tree.map(np.float64, pair)
        rows = np.concatenate([wide[VALUE], wide[VALUE_BIAS][None]])
        return rows[:, at] @ wide[OUT][j * h : j * h + h]

      np.testing.assert_allclose(product(fixed), product(pair), atol=1e-5)
      own = gauge[j // 2] @ fixed[OUT][j * h : j * h + h]
      np.testing.assert_allclose(own, pair[OUT][j * h : j * h + h], atol=1e-5)

  @parameterized.parameters(0, 4)
  def test_queries_and_keys_keep_the_products_that_rope_does_not_rotate(self, rotary):
    d, groups, m = 7, 2, 3
    h = rotary + m
    pair = {
      QUERY: _random((d, 2 * groups * h)),
      QUERY_BIAS: _random(2 * groups * h, 1),
      KEY: _random((d, groups * h), 2),
      KEY_BIAS: _random(groups * h, 3),
    }
    fix = functools.partial(heads.fix_keys, kv_heads=groups, rotary=rotary)
    fixed = structured.materialize(jax.jit(fix)(pair).params)

    def products(pair, j):
      """Returns a query and a key head where RoPE rotates, and their product else."""
      sides = []
      for names, i in (((QUERY, QUERY_BIAS), j), ((KEY, KEY_BIAS), j // 2)):
        kernel, bias = (np.float64(pair[name]) for name in names)
        rows = np.concatenate([kernel, bias[None]])
        sides.append(rows[:, i * h : (i + 1) * h])
      # The last row is the bias of the key. It is left out where RoPE does not rotate,
      # because it adds the same number to all scores of a query there.
      product = sides[0][:, rotary:] @ sides[1][:-1, rotary:].T
      return [side[:, :rotary] for side in sides], product

    for j in range(2 * groups):
      chex.assert_trees_all_close(products(fixed, j), products(pair, j), atol=1e-4)
    kept = np.asarray(fixed[KEY_BIAS]).reshape(groups, h)
    self.assertTrue((kept[:, rotary:] == 0).all())
    self.assertTrue((kept[:, :rotary] != 0).all())

  def test_layers_pass_through_vmap(self):
    pair = {
      VALUE: _random((3, 7, 6)),
      VALUE_BIAS: _random((3, 6), 1),
      OUT: _random((3, 12, 5), 2),
    }
    stacked = jax.jit(jax.vmap(_fix_values))(pair)
    for i in range(3):
      alone = _fix_values(jax.tree.map(lambda x, i=i: x[i], pair))
      layer = models.unstack_layer(stacked.params, i)
      chex.assert_trees_all_close(layer, alone.params, atol=1e-5)

  def test_errors_of_products_are_those_of_numpy(self):
    left, right = _random((2, 9, 3)), _random((2, 7, 3), 1)
    near = left + _random(left.shape, 2, 1e-3), right + _random(right.shape, 3, 1e-3)
    wide = lambda a, b: np.float64(a) @ np.float64(b).transpose(0, 2, 1)
    expected = np.linalg.norm(wide(left, right) - wide(*near))
    got = jax.jit(heads.product_error)((left, right), near)
    np.testing.assert_allclose(got, expected, rtol=1e-4)

  def test_rotations_of_values_and_keys_keep_the_function(self):
    model = _model('opt')
    rotations = np.linalg.qr(_random((2, 2, 6, 6)))[0]
    layers = structured.flatten(model.params['layers.0:2'])
    rotate = jax.jit(jax.vmap(heads.rotate_heads))
    rotated = dict(layers)
    for paths in (heads.VALUES, heads.KEYS):
      rotated |= rotate({path: layers[path] for path in paths}, rotations)
    params = model.params | {'layers.0:2': structured.unflatten(rotated)}
    moved = rotated[OUT] - layers[OUT]
    self.assertGreater(np.abs(moved).mean(), 0.1)
    np.testing.assert_allclose(
      random_models.reference_logits(OPT, model.replace(params=params)),
      random_models.reference_logits(OPT, model),
      atol=1e-4,
    )


class TransformsTest(parameterized.TestCase):
  @parameterized.named_parameters(*FAMILIES)
  def test_function_is_kept_and_numbers_are_saved(self, config_json, h, rotary):
    model = _model({id(c): n for n, c, *_ in FAMILIES}[id(config_json)])
    fixed, savings = passes.run_chain(CHAIN, model)
    expected = random_models.reference_logits(config_json, model)
    np.testing.assert_allclose(
      random_models.reference_logits(config_json, fixed), expected, rtol=0, atol=1e-4
    )
    layers, groups, m = 2, model.config.num_kv_heads, h - rotary
    self.assertEqual(
      [s.elements for s in savings],
      [layers * groups * h**2, layers * groups * m**2],
    )

  def test_normed_queries_and_keys_have_no_gauge(self):
    for config_json in (LLAMA | {'model_type': 'qwen3', 'attention_bias': True},):
      model = random_models.random_model(config_json)
      fixed, (values, keys) = passes.run_chain(CHAIN, model)
      self.assertEqual((values.elements, keys.elements), (2 * 2 * 6**2, 0))
      tokens = np.arange(9)[None]
      np.testing.assert_allclose(
        transform_checks.fast_logits(fixed, tokens),
        transform_checks.fast_logits(model, tokens),
        atol=1e-4,
      )

  def test_leaves_run_in_the_forward_pass(self):
    model = _model('phi_with_partial_rope_and_biases')
    fixed, _ = passes.run_chain(CHAIN, model)
    attention = fixed.params['layers.0:2']['attention']
    self.assertIsInstance(attention['out']['kernel'], structured.HeadRows)
    self.assertIsInstance(attention['key']['kernel'], structured.HeadColumns)
    tokens = np.random.default_rng(1).integers(31, size=(1, 9))
    np.testing.assert_allclose(
      jax.jit(models.logits)(fixed, tokens)[0],
      random_models.reference_logits(PHI, model),
      rtol=0,
      atol=1e-4,
    )

  def test_notes_tell_the_form_the_numbers_and_the_errors(self):
    model = _model('phi_with_partial_rope_and_biases', np.float16)
    chain = (
      passes.remove_value_gauge(tolerance=3.0),
      passes.remove_query_key_gauge(tolerance=3.0),
    )
    fixed, (values, keys) = passes.run_chain(chain, model)
    for note, name in ((values.notes[1], 'out'), (keys.notes[1], 'key')):
      leaf = list(fixed.layers())[1]['attention'][name]['kernel']
      self.assertEqual(note['tensor'], f'layers.1/attention/{name}/kernel')
      self.assertEqual(note['form'], leaf.type_name)
      self.assertEqual(note['shape'], list(leaf.shape))
      self.assertEqual(note['elements'], structured.count_elements(leaf))
      self.assertEqual(leaf.dtype, np.float16)
      # Each of the two kernels has a rounding error of 0.42 roundoffs.
      for error in ('error', 'plain_error'):
        self.assertBetween(note[error] * 2**11, 0.3, 0.8)

  def test_error_in_the_notes_is_that_of_the_rounded_product(self):
    model = _model('llama_with_groups', np.float16)
    fixed, (values, _) = passes.run_chain(CHAIN, model)

    def product(model):
      attention = next(model.layers())['attention']
      value, out = (np.float64(attention[n]['kernel']) for n in ('value', 'out'))
      value = value.reshape(12, 2, 1, 6).transpose(1, 2, 0, 3)
      return value @ out.reshape(2, 2, 6, 12)

    expected = product(model)
    # The forward pass also materializes in float32.
    wide = fixed.replace(params=structured.astype(fixed.params, np.float32))
    error = np.linalg.norm(product(wide.materialize()) - expected)
    error /= np.linalg.norm(expected)
    self.assertAlmostEqual(values.notes[0]['error'] / error, 1, delta=0.01)

  def test_a_layer_that_rounding_would_harm_stays_as_it_is(self):
    model = _model('phi_with_partial_rope_and_biases', np.float16)
    for factory in (passes.remove_value_gauge, passes.remove_query_key_gauge):
      same, notes = transform_checks.apply(factory(tolerance=0.1), model)
      chex.assert_trees_all_equal(same, model)
      self.assertEqual([(n['form'], n['error']) for n in notes], [('array', 0.0)] * 2)

  @parameterized.named_parameters(
    ('too_large_products', lambda x: x * np.float16(3e4)),
    ('infinities', lambda x: x * np.float16(np.inf)),
    ('a_nan', lambda x: np.where(np.arange(x.size).reshape(x.shape) == 5, np.nan, x)),
  )
  def test_a_layer_whose_numbers_do_not_fit_stays_as_it_is(self, change):
    model = _model('llama_with_groups', np.float16)
    with np.errstate(invalid='ignore', over='ignore'):
      broken = _with_first(model, 'out', lambda x: change(x).astype(np.float16))
      broken = _with_first(broken, 'value', lambda x: x * np.float16(8))
    for dtype in (np.float16, np.float32):  # of all but the attention that changed
      with self.subTest(dtype.__name__):
        outer, *layers = structured.astype([broken.outer(), *broken.layers()], dtype)
        layers[0]['attention'] = next(broken.layers())['attention']
        mixed = models.from_layers(model.config, outer, layers)
        self.assertEqual(passes.make_context(mixed).dtype, dtype)
        fixed, _ = passes.run_chain(CHAIN[:1], mixed)
        one, two = (x['attention']['out']['kernel'] for x in fixed.layers())
        self.assertNotIsInstance(one, structured.HeadRows)
        self.assertIsInstance(two, structured.HeadRows)
        before, after = (next(x.layers())['attention'] for x in (broken, fixed))
        chex.assert_trees_all_equal(after, before)

  @parameterized.named_parameters(
    ('a_zero_head', lambda x: x * (np.arange(x.shape[-1]) >= 6)),
    ('no_rank', lambda x: x * 0),
    ('rank_1', lambda x: np.outer(x[:, 0], x[0])),
    ('equal_rows', lambda x: np.broadcast_to(x[:1], x.shape)),
  )
  def test_degenerate_kernels_are_fixed_all_the_same(self, change):
    model = _model('opt')
    for name in ('value', 'out', 'query', 'key'):
      model = _with_first(model, name, change)
    fixed, savings = passes.run_chain(CHAIN, model)
    self.assertEqual([s.elements for s in savings], [144, 144])
    np.testing.assert_allclose(
      random_models.reference_logits(OPT, fixed),
      random_models.reference_logits(OPT, model),
      atol=1e-4,
    )

  def test_what_is_not_known_is_left_alone(self):
    model = _model('llama_with_groups')
    kernel = model.params['layers.0:2']['attention']['out']['kernel']
    attention = model.params['layers.0:2']['attention'] | {
      'out': {
        'kernel': structured.Constant.stack(
          [structured.Constant.like(x, 0.5) for x in kernel]
        )
      },
      'key': {'kernel': np.zeros((2, 12, 12), np.int8)},
    }
    layers = model.params['layers.0:2'] | {'attention': attention}
    strange = model.replace(params=model.params | {'layers.0:2': layers})
    for transform in CHAIN:
      same, notes = transform_checks.apply(transform, strange)
      chex.assert_trees_all_equal(same, strange)
      self.assertEmpty(notes)

  def test_a_segment_narrower_than_a_head_is_left_alone(self):
    config_json = LLAMA | {'hidden_size': 4}
    config = checkpoints.parse_config(config_json, None)
    zeros = functools.partial(
      jax.tree.map, jnp.zeros, is_leaf=lambda x: isinstance(x, tuple)
    )
    layers = [zeros(models.layer_shapes(config, i)) for i in range(2)]
    model = models.from_layers(config, zeros(models.outer_shapes(config)), layers)
    for transform in CHAIN:
      same, notes = transform_checks.apply(transform, model)
      chex.assert_trees_all_equal(same, model)
      self.assertEmpty(notes)


if __name__ == '__main__':
  absltest.main()

"""Canonical weights of stacked layers in one call, beside the way that streams."""

import functools
import re

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.symmetries import rotations
from tests import cases
from tests import devices
from tests import random_models
from tests import transform_checks

FAMILIES = random_models.FAMILIES
TOKENS = np.arange(12)[None]
_canonicalize = jax.jit(rotbits_jax.canonicalize, static_argnums=1)


@functools.cache
def _model(family, kind):
  """Makes a dense model, or a sliced one whose head is sliced or not."""
  config_json = FAMILIES[family]
  if kind == 'dense':
    return random_models.random_model(config_json)
  steps = 1 if family == 'phi2' else 2
  widths = [18] * (steps * config_json['num_hidden_layers'] + 1)
  if kind == 'sliced':
    widths[-1] = config_json['hidden_size']
  return random_models.sliced(config_json, widths)


_KINDS = {  # of each family; `test_every_kind` has the others
  'llama': ('dense', 'sliced', 'sliced head'),
  'mistral': ('dense',),
  'qwen2': ('sliced',),
  'qwen3': ('dense', 'sliced'),
  'phi3': ('sliced head',),
  'opt': ('dense', 'sliced'),
  'phi2': ('sliced head',),
}
CASES = [
  {'testcase_name': f'{family}_{kind}', 'family': family, 'kind': kind}
  for family, kinds in _KINDS.items()
  for kind in kinds
]


@functools.cache
def _result(family, kind):
  model = _model(family, kind)
  params, gauges = _canonicalize(model.params, model.config)
  return model.replace(params=params), gauges


def _arrays(params):
  wide = structured.flatten(jax.tree.map(jnp.asarray, params))
  return {path: np.asarray(structured.materialize(x)) for path, x in wide.items()}


def check_sharded(kind):
  """Checks a model whose layer axis, or the last one, is sharded over 8 devices."""
  model = random_models.sliced_llama([18] * 33)
  mesh = jax.make_mesh((8,), ('layers',), axis_types=(jax.sharding.AxisType[kind],))

  def put(key, tree):
    axes = ('layers',) if models.names.stacked_layers(key) else ()
    spec = jax.sharding.PartitionSpec(*axes)
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))

  params = {key: put(key, tree) for key, tree in model.params.items()}
  compiled = _canonicalize.lower(params, model.config).compile()
  found, _ = compiled(params)
  for leaf in jax.tree.leaves(found['layers.0:16']):
    assert leaf.sharding.shard_shape(leaf.shape)[0] == 2
  # Only rotations of segments are sent.
  sent = r'= \(?(\S+) (?:all-gather|all-reduce|all-to-all|collective-permute)\('
  shapes = re.findall(sent, compiled.as_text())
  assert shapes
  assert all('18,18]' in shape for shape in shapes), shapes
  expected, _ = _canonicalize(model.params, model.config)
  chex.assert_trees_all_close(jax.device_get(found), expected, atol=3e-5)

  def divided(x):
    axes = [None] * (x.ndim - 1) + ['layers'] * (x.shape[-1] % 8 == 0)
    spec = jax.sharding.PartitionSpec(*axes)
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

  found, _ = _canonicalize(jax.tree.map(divided, model.params), model.config)
  chex.assert_trees_all_close(jax.device_get(found), expected, atol=3e-5)
  sharded = model.replace(params=params)
  logits = transform_checks.fast_logits(model, TOKENS)
  for function in (models.logits, jax.jit(models.logits)):
    np.testing.assert_allclose(function(sharded, TOKENS), logits, atol=1e-4)
  for preset in ('exact', 'free'):
    data = rotbits_jax.encode(sharded, preset=preset)
    assert data == rotbits_jax.encode(model, preset=preset)
  like = {'layers': params['layers.0:16']['mlp']['up']['kernel']}
  again = rotbits_jax.decode(rotbits_jax.encode(like), like=like)
  assert again['layers'].sharding == like['layers'].sharding


def _sum(params, config):
  """Returns the sum of all canonical elements."""
  arrays = _arrays_of(rotbits_jax.canonicalize(params, config)[0])
  return sum(x.sum() for x in arrays.values())


def _arrays_of(params):
  return {
    path: structured.materialize(x) for path, x in structured.flatten(params).items()
  }


UP = 'layers.0:3/mlp/up/kernel'
WRONG = {
  'a missing parameter': (lambda x: x.pop(UP), f'{UP} must have'),
  'an extra parameter': (
    lambda x: x.update({'head/bias': jnp.ones(2)}),
    r'head/bias must have the shape None, got \(2,\)',
  ),
  'a cut parameter': (
    lambda x: x.update({UP: x[UP][..., :-1]}),
    f'{UP} must have the shape',
  ),
}


class CanonicalizeTest(parameterized.TestCase):
  @parameterized.named_parameters(*CASES)
  def test_all_checks(self, family, kind):
    self.check_function(family, kind)
    self.check_second_time(family, kind)
    self.check_streams(family, kind)

  def check_function(self, family, kind):
    """The function is kept with fewer numbers."""
    model, (result, gauges) = _model(family, kind), _result(family, kind)
    logits = transform_checks.fast_logits(model, TOKENS)
    found = transform_checks.fast_logits(result, TOKENS)
    np.testing.assert_allclose(found, logits, atol=3e-5 * np.abs(logits).max())
    for path, leaf in result.leaves():
      self.assertEqual(leaf.dtype, np.float32, path)
    expected = models.layout.symmetries(model.config)
    self.assertEqual(gauges.first is not None, expected.segments or expected.stream)
    self.assertEqual(bool(gauges.segments), expected.segments)
    count = lambda x: structured.count_elements(dict(x.leaves()))
    self.assertLess(count(result), count(model))

  def check_second_time(self, family, kind):
    """A second time changes nothing."""
    once, _ = _result(family, kind)
    params, gauges = _canonicalize(once.params, once.config)
    chex.assert_trees_all_close(_arrays(params), _arrays(once.params), atol=5e-5)
    if gauges.first is not None:
      eye = np.eye(len(gauges.first))
      np.testing.assert_allclose(gauges.first, eye, atol=5e-5)

  def check_streams(self, family, kind):
    """The way that streams agrees."""
    model, (result, _) = _model(family, kind), _result(family, kind)
    # A tolerance for everything, because float32 numbers have no rounding error.
    chain = (
      passes.remove_residual_gauge(),
      passes.remove_head_gauges(tolerance=1e9),
    )
    streamed, _ = passes.run_chain(chain, model)
    found = models.from_layers(model.config, result.outer(), list(result.layers()))
    for (path, a), (_, b) in zip(found.leaves(), streamed.leaves(), strict=True):
      a, b = (np.asarray(structured.materialize(x)) for x in (a, b))
      np.testing.assert_allclose(a, b, atol=5e-5, err_msg=path)

  def check_unique(self, model):
    """The form is the same a second time, and after a random rotation."""
    function = functools.partial(
      rotbits_jax.canonicalize, config=model.config, tolerance=0.8 * 2**-11
    )
    compiled = jax.jit(function)
    expected = _arrays(compiled(model.params)[0])
    rotated = passes.randomly_rotated(model, key=jax.random.key(3))
    for params in (structured.unflatten(expected), rotated.params):
      for path, array in _arrays(compiled(params)[0]).items():
        error = np.linalg.norm(array - expected[path])
        # Of float32, through a factorisation of columns that may repeat.
        self.assertLessEqual(error, 2e-5 * np.linalg.norm(array), path)

  @parameterized.parameters(*cases.CHECKPOINTS)
  @pytest.mark.slow
  def test_the_form_of_a_fixture_is_unique(self, name):
    model = checkpoints.load_checkpoint(cases.TESTDATA / name).model
    self.check_unique(jax.tree.map(lambda x: np.asarray(x, np.float32), model))

  @parameterized.parameters('dense', 'sliced')
  def test_columns_that_repeat_are_no_pivots(self, kind):
    model = jax.tree.map(np.copy, _model('llama', kind))
    layers = min(filter(models.names.stacked_layers, model.params))
    for linear in (model.params['head'], model.params[layers]['mlp']['up']):
      linear['kernel'][..., 1:4] = linear['kernel'][..., :1]
    self.check_unique(model)
    head = rotbits_jax.decode(rotbits_jax.encode(model, preset='free')).params['head']
    is_leaf = isinstance(head['kernel'], structured.TrapezoidalRows)
    self.assertEqual(
      is_leaf and head['kernel'].pivots[:5].tolist(),
      kind == 'sliced' and [1, 0, 0, 0, 1],
    )

  @parameterized.parameters(*FAMILIES)
  @pytest.mark.slow
  def test_every_kind(self, family):
    for kind in {'dense', 'sliced', 'sliced head'} - {*_KINDS[family]}:
      with self.subTest(kind=kind):
        self.check_function(family, kind)
        self.check_second_time(family, kind)
        self.check_streams(family, kind)

  def test_an_outer_vmap_maps_over_models(self):
    pair = [random_models.sliced_llama([18] * 9, seed=seed) for seed in range(2)]
    config = pair[0].config
    stack = jax.tree.map(lambda *x: np.stack(x), *(model.params for model in pair))
    function = functools.partial(rotbits_jax.canonicalize, config=config)
    both = jax.jit(jax.vmap(function))(stack)
    for i, model in enumerate(pair):
      expected = _canonicalize(model.params, config)
      own = jax.tree.map(lambda x, i=i: x[i], both)
      chex.assert_trees_all_close(own, expected, atol=3e-5)

  def test_bfloat16_input_is_widened_first(self):
    model = _model('llama', 'sliced head')
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), model)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float32), narrow)
    found, gauges = _canonicalize(narrow.params, model.config)
    tolerance = 0.8 * 2**-8
    function = functools.partial(rotbits_jax.canonicalize, tolerance=tolerance)
    expected, _ = jax.jit(function, static_argnums=1)(wide.params, model.config)
    chex.assert_trees_all_close(found, expected, atol=3e-5)
    # The columns that are left are those of the values that differ from 1.
    canonical = model.replace(params=found)
    for i, layer in enumerate(canonical.layers()):
      for name, values in zip(
        ('attention_shortcut', 'mlp_shortcut'),
        gauges.singular_values['layers.0:4'],
        strict=True,
      ):
        leaf = layer[name]['kernel']
        counts = rotations.ranks(values[i], tolerance)
        self.assertEqual([leaf.b.shape[1], leaf.c.shape[1]], counts.tolist())

  def test_segments_that_get_narrower_are_refused(self):
    model = random_models.sliced_llama([18, 18, 16, 16, 24])
    with self.assertRaisesRegex(ValueError, 'do not get narrower'):
      rotbits_jax.canonicalize(model.params, model.config)

  @parameterized.parameters(*WRONG)
  def test_a_wrong_parameter_is_named(self, name):
    change, text = WRONG[name]
    model = _model('llama', 'sliced')
    params = structured.flatten(model.params)
    change(params)
    with self.assertRaisesRegex(ValueError, text):
      _canonicalize(structured.unflatten(params), model.config)

  def test_another_config_is_refused(self):
    dense = _model('llama', 'dense')
    sliced = _model('llama', 'sliced')
    with self.assertRaisesRegex(ValueError, 'embed/tokens must have the shape'):
      _canonicalize(sliced.params, dense.config)

  def test_gradients_of_a_dense_model_are_finite(self):
    model = _model('llama', 'dense')
    gradients = jax.jit(jax.grad(functools.partial(_sum, config=model.config)))(
      model.params
    )
    for path, gradient in structured.flatten(gradients).items():
      self.assertTrue(np.isfinite(gradient).all(), path)

  def test_gradients_of_shortcuts_are_refused(self):
    model = _model('llama', 'sliced')
    with self.assertRaisesRegex(ValueError, 'no gradients through the shortcuts'):
      jax.grad(functools.partial(_sum, config=model.config))(model.params)

  @parameterized.parameters('dense', 'sliced')
  def test_a_mapped_call_may_be_divided_by_shard_map(self, kind):
    model = _model('llama', kind)
    function = functools.partial(rotbits_jax.canonicalize, config=model.config)
    mesh = jax.make_mesh((1,), ('models',), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec('models')
    divided = jax.shard_map(
      jax.vmap(function), mesh=mesh, in_specs=spec, out_specs=spec
    )
    found = jax.jit(divided)(jax.tree.map(lambda x: x[None], model.params))
    expected = _canonicalize(model.params, model.config)
    first = jax.tree.map(lambda x: x[0], found)
    chex.assert_trees_all_close(first, expected, atol=3e-5)

  @parameterized.parameters('Auto', 'Explicit')
  @pytest.mark.slow
  @pytest.mark.daily
  def test_a_sharded_layer_axis_stays_sharded(self, kind):
    devices.run(f'from tests import canonicalize_test as t; t.check_sharded({kind!r})')


# ---- which symmetries there are ------------------------------------------------------

EVERY = models.layout.Symmetries(segments=True, values=True, queries=True)
SYMMETRIES = {
  ('llama', False): EVERY._replace(segments=False, stream=True),
  ('llama', True): EVERY,
  ('phi3', False): EVERY._replace(segments=False, stream=True),
  ('phi3', True): EVERY,
  ('qwen2', False): EVERY._replace(segments=False, stream=True),
  ('qwen3', False): EVERY._replace(segments=False, stream=True, queries=False),
  ('qwen3', True): EVERY._replace(queries=False),
  ('opt', False): EVERY._replace(segments=False, key_bias=True),
  ('opt', True): EVERY._replace(key_bias=True),
  ('phi2', False): EVERY._replace(segments=False),
  ('phi2', True): EVERY,
}


class SymmetriesTest(absltest.TestCase):
  def test_symmetries_are_those_of_the_table(self):
    for (family, sliced), expected in SYMMETRIES.items():
      config = _model(family, 'sliced' if sliced else 'dense').config
      symmetries = models.layout.symmetries
      self.assertEqual(symmetries(config), expected, (family, sliced))
    tied = random_models.BASE | {'num_hidden_layers': 1, 'tie_word_embeddings': True}
    config = random_models.random_model(tied).config
    self.assertEqual(symmetries(config), EVERY._replace(segments=False))

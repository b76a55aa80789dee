"""Transforms stand in any order, round once, and count every saving."""

import dataclasses
import functools
import itertools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from fuzz import seeds
import rotbits_jax
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from tests import cases
from tests import random_models
from tests import transform_checks

TRANSFORMS = cases.transforms()
TOKENS = np.arange(12)[None]
TWO_LAYERS = {'num_hidden_layers': 2}


def _sliced(dtype):
  """A sliced OPT whose embedding is tied to the head, with a structured kernel."""
  model = random_models.sliced(
    random_models.OPT | TWO_LAYERS, [18, 18, 18, 18, 24], dtype
  )
  rng = np.random.default_rng(0)
  head = np.float32(model.params['head']['kernel'])
  table = head.T @ rng.standard_normal((24, 18)).astype(np.float32) / 5
  embed = model.params['embed'] | {'tokens': table.astype(dtype)}
  layers = list(model.layers())
  for layer in layers:
    b, c = np.tril(rng.standard_normal((2, 18, 6)) / 5).astype(dtype)
    kernel = structured.IdentityMinusGram(b, c, columns=40)
    layer['mlp']['up'] = layer['mlp']['up'] | {'kernel': kernel}
  return models.from_layers(model.config, model.outer() | {'embed': embed}, layers)


MODELS = {
  'sliced': _sliced,
  'dense': lambda dtype: random_models.random_model(
    random_models.BASE | TWO_LAYERS, dtype
  ),
  'layernorm': lambda dtype: random_models.random_model(
    random_models.FAMILIES['phi2'] | TWO_LAYERS, dtype
  ),
}


@functools.cache
def _model(name, dtype=np.float32):
  model = MODELS[name](dtype)
  return model, transform_checks.fast_logits(model, TOKENS)


def _rounding(chain):
  return None if 'exactly tied embedding' in chain[0].name else passes.NEAREST


class PairsTest(parameterized.TestCase):
  @parameterized.parameters(*MODELS)
  def test_a_pair_keeps_the_function_or_is_refused(self, name):
    model, logits = _model(name)
    for first, second in itertools.product(TRANSFORMS, TRANSFORMS):
      pair = TRANSFORMS[first], TRANSFORMS[second]
      with self.subTest(first=first, second=second):
        if second == 'residual gauge':
          with self.assertRaisesRegex(ValueError, f"'({first}|{second})' .*"):
            passes.chain(*pair)
          continue
        after, _ = passes.run_chain(pair, model, rounding=_rounding(pair))
        found = transform_checks.fast_logits(after, TOKENS)
        np.testing.assert_allclose(found, logits, atol=1e-4 * np.abs(logits).max())


class RefusalsTest(parameterized.TestCase):
  def test_presets_refuse_what_they_cannot_take(self):
    chain = passes.chain(TRANSFORMS['attention heads'])
    preset = presets.exact()._replace(transform=chain, keeps='approximation')
    with self.assertRaisesRegex(ValueError, 'must keep the dtype float16, got float32'):
      rotbits_jax.encode(_model('dense', np.float16)[0], preset=preset)
    with self.assertRaisesRegex(ValueError, "'residual gauge' has a state"):
      presets.free(transforms=(TRANSFORMS['residual gauge'],))
    presets.free(transforms=(TRANSFORMS['rotation'],))

  def test_a_large_error_ends_the_work_in_every_preset(self):
    path = 'mlp/down/kernel'

    def layer(context, state, index, params):
      del context, state, index
      params[path] = params[path] * 1.5
      return params, {path: {'error': 0.5}}

    transform = passes.Transform('damage', layer=layer)
    message = f'damage: layers.0/{path} has a relative error of 0.5'
    model, _ = _model('dense', np.float16)
    for make in (presets.free, presets.near):
      with self.assertRaisesRegex(ValueError, message):
        rotbits_jax.encode(model, preset=make(transforms=(transform,)))

  def test_another_function_is_refused_unless_it_is_meant(self):
    model, _ = _model('dense', np.float16)
    path, words = 'mlp/down/kernel', 'the transforms make a different function: KL '

    def free(factor):
      layer = lambda c, s, i, params: (params | {path: params[path] * factor}, {})
      return presets.free(transforms=(passes.Transform('times', layer=layer),))

    for factor in (1.1, np.nan):
      with self.assertRaisesRegex(ValueError, words):
        rotbits_jax.encode(model, preset=free(factor))
    rotbits_jax.encode(model, preset=free(1.1)._replace(keeps='approximation'))
    rotbits_jax.encode(model, preset=free(1.0))


def _scaled(factor):
  """Makes a transform that multiplies all parameters."""
  scaled = lambda params: {path: x * np.float32(factor) for path, x in params.items()}
  return passes.Transform(
    f'times {factor}',
    layer=lambda context, state, index, params: (scaled(params), {}),
    outer=lambda context, state, params: (scaled(params), {}),
  )


class RunChainTest(parameterized.TestCase):
  def test_numbers_are_rounded_once(self):
    model = random_models.sliced_llama([18] * 3, np.float16)
    thirds, _ = passes.run_chain((_scaled(1 / 3), _scaled(3)), model)
    for before, after in zip(
      jax.tree.leaves(model.params), jax.tree.leaves(thirds.params), strict=True
    ):
      np.testing.assert_array_equal(before, after)
    self.assertIsNone(thirds.stored_as)

  def test_every_leaf_gets_its_own_format_back(self):
    model = random_models.sliced_llama([18] * 5, np.float16)
    layers = list(model.layers())
    layers[1]['mlp']['up'] = jax.tree.map(np.float32, layers[1]['mlp']['up'])
    mixed = models.from_layers(model.config, model.outer(), layers)
    formats = [str(x.dtype) for _, x in mixed.leaves()]
    self.assertIn('float32', formats)
    again, _ = passes.run_chain((_scaled(1),), mixed)
    self.assertEqual([str(x.dtype) for _, x in again.leaves()], formats)
    for (path, before), (_, after) in zip(mixed.leaves(), again.leaves(), strict=True):
      np.testing.assert_array_equal(before, after, err_msg=path)

  def test_a_model_that_is_not_rounded_yet_is_rounded_once(self):
    model = random_models.sliced_llama([18] * 3, np.float32)
    unrounded = dataclasses.replace(model, stored_as='float16')
    expected = jax.tree.map(np.float16, model.params)
    tripled, (saving,) = passes.run_chain((_scaled(3),), unrounded)
    np.testing.assert_array_equal(
      tripled.params['head']['kernel'],
      np.float16(3 * model.params['head']['kernel']),
    )
    self.assertEqual((saving.elements, saving.bytes), (0, 0))
    for a, b in zip(
      jax.tree.leaves(unrounded.rounded().params),
      jax.tree.leaves(expected),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)


# ---- a transform of a third party ----------------------------------------------------


def running_sum():
  """Makes a transform with a state, pure functions of a layer, and notes.

  The state counts layers and sums their down kernels. The parameters outside the layers
  are divided by the sum, so that the result depends on the order of all calls.
  """
  path = 'mlp/down/kernel'

  def advance(context, state, index, params):
    count, total = state or (0, context.config.num_layers * 1.0)
    assert count == index
    return count + 1, total + jnp.sum(jnp.abs(params[path]))

  def layer(context, state, index, params):
    params[path] = params[path] / 2
    return params, {path: {'sum': state[1]}}

  def outer(context, state, outer):
    index, total = state
    assert index == context.config.num_layers
    kernel = structured.materialize(outer['head/kernel']) / total
    outer['head/kernel'] = structured.Constant.like(kernel, 0.0)
    return outer, {'head/kernel': {}}

  return passes.Transform('sums', advance=advance, layer=layer, outer=outer)


class MakeTest(absltest.TestCase):
  def test_a_third_partys_transform_joins_a_chain(self):
    model = random_models.sliced_llama([18] * 7, np.float16)
    after, (saving,) = passes.run_chain((running_sum(),), model)
    self.assertEqual(saving.name, 'sums')
    self.assertEqual(saving.elements, model.params['head']['kernel'].size - 1)
    self.assertEqual(saving.bytes, 2 * saving.elements)
    total = 3.0
    for note, layer, halved in zip(
      saving.notes, model.layers(), after.layers(), strict=False
    ):
      kernel = np.float32(layer['mlp']['down']['kernel'])
      total += np.abs(kernel).sum()
      np.testing.assert_allclose(note['sum'], total, rtol=5e-3)
      got = np.float32(halved['mlp']['down']['kernel'])
      np.testing.assert_allclose(got, kernel / 2, atol=2e-3)
    with self.assertRaisesRegex(ValueError, "'sums' has a state"):
      passes.chain(passes.remove_residual_gauge(), running_sum())
    chain = (running_sum(), passes.remove_head_gauges())
    _, savings = passes.run_chain(chain, model)
    self.assertEqual([len(s.notes) for s in savings], [4, 3])


# ---- chains of transforms, and a part of a model -------------------------------------


def _wide():
  """Makes a sliced model with segments of many widths and layers that do not stack."""
  return random_models.sliced_llama([16, 20, 20, 14, 14, 18, 24], np.float16)


SOURCES = {
  'wide': _wide,
  'opt': lambda: seeds.sliced_model(seeds.OPT | {'num_hidden_layers': 3}),
  'phi2_sliced': lambda: cases.load('phi2-tiny-sliced-0.25').model,
  'llama_dense': lambda: cases.load('llama-tiny-dense').model,
  'phi2_dense': lambda: cases.load('phi2-tiny-dense').model,
}


@functools.cache
def _whole(name):
  """Returns the context, the chain, and all that `rewrite` yields."""
  context = passes.make_context(SOURCES[name]())
  transform = presets.free().transform
  if name == 'phi2_dense':
    transform = passes.chain(running_sum(), passes.remove_head_gauges())
  return context, transform, list(passes.rewrite(context, transform))


class ChainTest(parameterized.TestCase):
  @parameterized.parameters('wide', 'llama_dense')
  def test_chains_of_chains_are_chains(self, name):
    a, b = passes.remove_residual_gauge(), passes.remove_head_gauges()
    c = passes.Transform('nothing')
    source = SOURCES[name]()
    expected = transform_checks.records(passes.chain(a, b, c), source)
    self.assertEqual(
      [s.name for s in expected[0].savings],
      ['residual gauge', 'attention heads', 'nothing'],
    )
    for chain in (
      passes.chain(passes.chain(a, b), c),
      passes.chain(a, passes.chain(b, c)),
      passes.chain(passes.chain(), a, passes.chain(b), c),
    ):
      transform_checks.assert_same_records(
        transform_checks.records(chain, source), expected
      )


class RewriteTest(parameterized.TestCase):
  @parameterized.parameters(*SOURCES)
  def test_a_run_that_begins_at_a_layer_gives_the_same_bits(self, name):
    context, transform, yielded = _whole(name)
    count = context.config.num_layers
    self.assertLen(yielded, count + 1)
    starts = sorted({0, 1, count // 2, count - 1, count})
    for k, with_state in itertools.product(starts, (True, False)):
      state = yielded[k - 1][1] if with_state and k else None
      rest = passes.rewrite(context, transform, layers=range(k, count), state=state)
      for (records, _), (expected, _) in zip(rest, yielded[k:], strict=True):
        transform_checks.assert_same_records(records, expected)

"""A chain of transforms rounds numbers once and counts every saving."""

import dataclasses
import functools
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from fuzz import seeds
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from tests import random_models
from tests import transform_checks

TESTDATA = pathlib.Path(__file__).parent / 'testdata'


def _map(name, function):
  """Makes a transform that applies a function to every leaf."""
  on_all = lambda params: {path: function(x) for path, x in params.items()}
  return passes.Transform(
    name,
    layer=lambda context, state, index, params: (on_all(params), []),
    outer=lambda context, state, params: (on_all(params), []),
  )


def _scaled(factor):
  """Makes a transform that multiplies all parameters."""
  return _map(f'times {factor}', lambda x: x * np.float32(factor))


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
    context = passes.make_context(mixed)
    self.assertEqual(context.dtype, np.float16)
    self.assertEqual(context.limit('layers.1/mlp/down/kernel'), 65504)
    self.assertGreater(context.limit('layers.1/mlp/up/kernel'), 1e38)
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
    numbers, size = passes.count_model(unrounded)
    self.assertEqual(size, 2 * numbers)
    for a, b in zip(
      jax.tree.leaves(unrounded.rounded().params),
      jax.tree.leaves(expected),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)

  def test_savings_add_up(self):
    model = random_models.sliced_llama([18] * 5, np.float16)
    chain = (passes.remove_residual_gauge(), passes.remove_value_gauge())
    after, savings = passes.run_chain(chain, model)
    self.assertEqual([s.name for s in savings], ['residual gauge', 'value gauge'])
    numbers, size = passes.count_model(model)
    self.assertEqual(
      passes.count_model(after),
      (
        numbers - sum(s.elements for s in savings),
        size - sum(s.bytes for s in savings),
      ),
    )
    self.assertGreater(min(s.elements for s in savings), 0)


# ---- a transform of a third party ----------------------------------------------------


def running_sum():
  """Makes a transform with a state, pure functions of a layer, and notes.

  The state counts layers and sums their down kernels. The parameters outside the layers
  are divided by the sum, so that the result depends on the order of all calls.
  """

  def init(context):
    return jnp.zeros((), jnp.int32), jnp.asarray(context.config.num_layers * 1.0)

  path = 'mlp/down/kernel'

  def advance(context, state, index, params):
    count, total = state
    assert int(count) == index
    return count + 1, total + jnp.sum(jnp.abs(params[path]))

  def layer(context, state, index, params):
    params[path] = kernel = params[path] / 2
    return params, [passes.note(f'layers.{index}/{path}', kernel, sum=state[1])]

  def outer(context, state, outer):
    index, total = state
    assert int(index) == context.config.num_layers
    kernel = structured.materialize(outer['head/kernel']) / total
    outer['head/kernel'] = leaf = structured.Constant.like(kernel, 0.0)
    return outer, [passes.note('head/kernel', leaf)]

  return passes.Transform('sums', init=init, advance=advance, layer=layer, outer=outer)


class MakeTest(absltest.TestCase):
  def test_a_third_partys_transform_joins_a_chain(self):
    model = random_models.sliced_llama([18] * 7, np.float16)
    after, (saving,) = passes.run_chain((running_sum(),), model)
    self.assertEqual(saving.name, 'sums')
    self.assertEqual(saving.elements, model.params['head']['kernel'].size - 1)
    self.assertEqual(saving.bytes, 2 * saving.elements)
    total = 3.0
    for i, (note, layer) in enumerate(zip(saving.notes, model.layers(), strict=False)):
      kernel = layer['mlp']['down']['kernel']
      total += np.abs(np.float64(kernel)).sum()
      self.assertEqual(note['tensor'], f'layers.{i}/mlp/down/kernel')
      np.testing.assert_allclose(note['sum'], total, rtol=5e-3)
      got = after.layer(i)['mlp']['down']['kernel']
      np.testing.assert_allclose(np.float32(got), np.float32(kernel) / 2, atol=2e-3)
    self.assertEqual(saving.notes[-1]['form'], 'constant')
    chain = (passes.remove_residual_gauge(), running_sum())
    _, savings = passes.run_chain(chain, model)
    self.assertEqual([len(s.notes) for s in savings], [7, 4])

  def test_what_is_left_out_stays(self):
    model = random_models.sliced_llama([18] * 3, np.float16)
    same, savings = passes.run_chain((passes.Transform('nothing'),), model)
    transform_checks.assert_same_bits(same, model)
    self.assertEqual(savings, [passes.Saving('nothing', 0, 0)])


# ---- chains of transforms, and a part of a model -------------------------------------


def _wide():
  """Makes a sliced model with segments of many widths and layers that do not stack."""
  return random_models.sliced_llama([16, 20, 20, 14, 14, 18, 24], np.float16)


SOURCES = {
  'wide': _wide,
  'alike': lambda: random_models.sliced_llama([18] * 8 + [24], np.float16),
  'opt': lambda: seeds.sliced_model(seeds.OPT | {'num_hidden_layers': 3}),
  'phi2_sliced': lambda: _load('phi2-tiny-sliced-0.25'),
  'llama_dense': lambda: _load('llama-tiny-dense'),
  'phi2_dense': lambda: _load('phi2-tiny-dense'),
}


@functools.cache
def _load(name):
  return checkpoints.load_checkpoint(TESTDATA / name).model


@functools.cache
def _whole(name):
  """Returns the context, and all that `rewrite` yields for the chain of `free`."""
  context = passes.make_context(SOURCES[name]())
  return context, list(passes.rewrite(context, presets.free().transform))


class ChainTest(parameterized.TestCase):
  @parameterized.parameters('wide', 'llama_dense')
  def test_chains_of_chains_are_chains(self, name):
    a, b, c = (
      passes.remove_residual_gauge(),
      passes.remove_value_gauge(),
      running_sum(),
    )
    source = SOURCES[name]()
    expected = transform_checks.records(passes.chain(a, b, c), source)
    self.assertEqual(
      [s.name for s in expected[0].savings], ['residual gauge', 'value gauge', 'sums']
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
  @parameterized.product(name=tuple(SOURCES), how=('state', 'skip'))
  def test_a_run_that_begins_at_a_layer_gives_the_same_bits(self, name, how):
    context, yielded = _whole(name)
    count = context.config.num_layers
    self.assertLen(yielded, count + 1)
    transform = presets.free().transform
    for k in sorted({0, 1, count // 2, count - 1, count}):
      state = None
      if how == 'state' and k:
        state = yielded[k - 1][1]
      rest = passes.rewrite(context, transform, layers=range(k, count), state=state)
      for (records, _), (expected, _) in zip(rest, yielded[k:], strict=True):
        transform_checks.assert_same_records(records, expected)

  def test_a_state_that_depends_on_an_earlier_transform(self):
    path = 'mlp/up/kernel'
    double = passes.Transform(
      'double',
      layer=lambda context, state, index, params: (
        params | {path: 2 * params[path]},
        [],
      ),
    )
    total = passes.Transform(
      'total',
      init=lambda context: jnp.float32(0),
      advance=lambda context, state, index, params: state + jnp.abs(params[path]).sum(),
    )
    context = passes.make_context(_load('llama-tiny-dense'))
    found = []
    for layers in (range(3), range(1, 3), range(2, 3)):
      rewritten = passes.rewrite(
        context, passes.chain(double, total), layers=layers, outer=False
      )
      *_, (_, (_, state)) = rewritten
      found.append(float(state))
    self.assertGreater(found[0], 0)
    self.assertEqual(found, [found[0]] * 3)

  def test_records_are_the_model(self):
    context, yielded = _whole('wide')
    names = [record.name for records, _ in yielded for record in records]
    self.assertEqual(names, ['layers.0', 'layers.1', 'layers.2', 'embed', 'head'])
    savings = [record.savings for records, _ in yielded for record in records]
    self.assertEqual([len(s) for s in savings], [6, 6, 6, 6, 0])
    self.assertEqual(context.config.num_layers, 3)


if __name__ == '__main__':
  absltest.main()

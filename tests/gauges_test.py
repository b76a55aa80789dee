"""Each gauge transform keeps the function and stores as many fewer elements as it says.

A row of `CASES` is a transform on a model; the elements follow from the group.
"""

import functools
from typing import Any, NamedTuple

from absl.testing import parameterized
import jax
import numpy as np

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from tests import random_models
from tests import transform_checks

TWO_LAYERS = {'num_hidden_layers': 2}
CONFIGS = {
  family: config_json | TWO_LAYERS
  for family, config_json in random_models.FAMILIES.items()
}
TOKENS = np.arange(12)[None]


def _triangle(n):
  """Returns how many entries a rotation of n dimensions makes zero."""
  return n * (n - 1) // 2


def _shortcut(d, e, rank):
  """Returns how many elements the low-rank form of a shortcut `[d, e]` saves."""
  return d * e - (d * rank - _triangle(rank))


class Case(NamedTuple):
  """A transform, a family or segment widths, and the elements that it saves."""

  transform: passes.Transform
  model: Any
  elements: int


RESIDUAL = passes.remove_residual_gauge()
HEADS = passes.remove_head_gauges()
ROTATION = passes.random_rotation(key=jax.random.key(1))

# A constant stores its value, in place of each bias of keys and values. K h^2 and
# K (h - r)^2 a layer are those of GL(h).
CASES = {
  'heads of opt': Case(HEADS, 'opt', 2 * (48 - 2) + 2 * 2 * 3 * 8**2),
  'heads of llama': Case(HEADS, 'llama', 2 * 2 * 8**2),
  'heads of phi': Case(HEADS, 'phi2', 2 * (12 - 1) + 2 * (12**2 + 6**2)),
  'heads of qwen2': Case(HEADS, 'qwen2', 2 * 2 * 8**2),
  'heads of qwen3': Case(HEADS, 'qwen3', 2 * 2 * 8**2),
  # 32 bytes name the pivots: a neuron is nearly a combination of those before it.
  'stream of llama': Case(RESIDUAL, 'llama', _triangle(24) + 5 * 23 - 32),
  'stream of opt': Case(RESIDUAL, 'opt', 0),
  'rotation of llama': Case(ROTATION, 'llama', 0),
  'rotation of opt': Case(ROTATION, 'opt', 0),
  'rotation of segments': Case(ROTATION, (18, 18, 20, 20, 24), 0),
  'one width': Case(RESIDUAL, (18,) * 5, 4 * _shortcut(18, 18, 6) + _triangle(18)),
  'unsliced end': Case(
    RESIDUAL,
    (18, 18, 18, 18, 24),
    3 * _shortcut(18, 18, 6) + 18 * 24 + _triangle(18) + _triangle(6),
  ),
  'wider everywhere': Case(RESIDUAL, (12, 14, 14, 18, 24), -1),
  'narrower, then wider': Case(RESIDUAL, (18, 18, 16, 16, 24), -1),
  'one wide': Case(RESIDUAL, (1, 1, 1, 1, 24), -1),
}


@functools.cache
def _model(name):
  """Makes a dense model of a family, or a sliced Llama of these widths."""
  if isinstance(name, str):
    return random_models.random_model(CONFIGS[name])
  return random_models.sliced_llama(name)


class GaugesTest(parameterized.TestCase):
  @parameterized.parameters(*CASES)
  def test_the_function_is_kept_with_fewer_elements(self, name):
    transform, family, elements = CASES[name]
    model = _model(family)
    after, (saving,) = passes.run_chain((transform,), model)
    if elements >= 0:
      self.assertEqual(saving.elements, elements)
    else:
      self.assertGreater(saving.elements, 0)
    if (
      isinstance(family, str) and family != 'qwen3'
    ):  # beside the second forward pass, in float64
      expected = random_models.reference_logits(CONFIGS[family], model)
      found = random_models.reference_logits(CONFIGS[family], after.materialize())
    else:
      expected = transform_checks.fast_logits(model, TOKENS)
      found = transform_checks.fast_logits(after, TOKENS)
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    leaves = dict(after.leaves())
    for note in saving.notes:
      leaf = leaves[note['tensor']]
      self.assertEqual(note['elements'], structured.count_elements(leaf))
      self.assertEqual(tuple(note['shape']), leaf.shape)


# ---- what is not changed -------------------------------------------------------------


def _changed(model, path, change):
  """Changes a parameter of the first layer, or one outside the layers."""
  outer = structured.flatten(model.outer())
  layers = [structured.flatten(layer) for layer in model.layers()]
  params = outer if path in outer else layers[0]
  with np.errstate(all='ignore'):
    params[path] = change(np.array(params[path])).astype(params[path].dtype)
  layers = [structured.unflatten(layer) for layer in layers]
  return models.from_layers(model.config, structured.unflatten(outer), layers)


def _nan(array):
  array.reshape(-1)[5] = np.nan
  return array


def _large(array):
  array[2] = 60_000  # a rotation could make it 250,000
  return array


SLICED = (18,) * 5
OUT = 'attention/out/kernel'
# A transform, the model, the parameter that has such weights, and how many structured
# leaves the transform makes all the same.
OBSTACLES = {
  'a shortcut': (RESIDUAL, SLICED, 'attention_shortcut/kernel', _nan, 0),
  'a large row': (RESIDUAL, SLICED, 'mlp/down/kernel', _large, 0),
  'a dense head': (RESIDUAL, 'llama', 'head/kernel', _nan, 0),
  'an output': (HEADS, 'llama', OUT, _nan, 1),
  'a value bias': (HEADS, 'opt', 'attention/value/bias', _nan, 5),
}


class ObstaclesTest(parameterized.TestCase):
  @parameterized.parameters(*OBSTACLES)
  def test_weights_that_cannot_be_changed_stay(self, name):
    transform, family, path, change, made = OBSTACLES[name]
    half = lambda model: jax.tree.map(lambda x: x.astype(np.float16), model)
    model = _changed(half(_model(family)), path, change)
    after, (saving,) = passes.run_chain((transform,), model)
    before, leaves = dict(model.leaves()), dict(after.leaves())
    changed = [x for x, leaf in leaves.items() if structured.is_structured(leaf)]
    self.assertLen(changed, made)
    tensor = path if path in before else f'layers.0/{path}'
    self.assertTrue(structured.same_bits(before[tensor], leaves[tensor]))
    self.assertIn('array', [note['form'] for note in saving.notes])

  @parameterized.parameters(
    lambda x: x * (np.arange(x.shape[-1]) >= 8),
    lambda x: x * 0,
    lambda x: np.outer(x[:, 0], x[0]),
  )
  def test_heads_of_any_rank_are_fixed(self, change):
    model = _model('opt')
    for name in ('value', 'out', 'query', 'key'):
      model = _changed(model, f'attention/{name}/kernel', change)
    after, (saving,) = passes.run_chain((HEADS,), model)
    self.assertEqual(saving.elements, CASES['heads of opt'].elements)
    expected = random_models.reference_logits(CONFIGS['opt'], model)
    found = random_models.reference_logits(CONFIGS['opt'], after)
    np.testing.assert_allclose(found, expected, atol=1e-4)


# ---- shortcuts of other kinds --------------------------------------------------------

SHORTCUTS = {
  'of lower rank': lambda rng, m: m[:, :5] @ m[:5, :],
  'of zeros': lambda rng, m: 0 * m,
  'without a coordinate': lambda rng, m: 0.15 * np.diag(np.arange(18) != 3),
  'above 1': lambda rng, m: m + 0.5 * np.outer(rng.standard_normal(18), m[0]) / 18,
  'far from 1': lambda rng, m: 1e-3 * m * np.linspace(1, 2, 18),
}


class ShortcutsTest(parameterized.TestCase):
  @parameterized.parameters(*SHORTCUTS)
  def test_the_function_is_kept(self, name):
    model = random_models.sliced_llama(SLICED, shortcut=SHORTCUTS[name])
    after, notes = transform_checks.apply(RESIDUAL, model)
    expected = transform_checks.fast_logits(model, TOKENS)
    found = transform_checks.fast_logits(after, TOKENS)
    np.testing.assert_allclose(found, expected, atol=3e-4)
    if name == 'far from 1':
      forms = {note['form'] for note in notes if 'shortcut' in note['tensor']}
      self.assertEqual(forms, {'array'})
    if name == 'above 1':
      kernel = after.layer(1)['attention_shortcut']['kernel']
      self.assertGreater(kernel.c.shape[-1], 0)

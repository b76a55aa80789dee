"""Numbers that are not finite, and outliers, do no harm to the other numbers."""

import functools
import itertools

import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from tests import chains_test
from tests import transform_checks

ROLES = {
  'sliced': (
    *('embed/tokens', 'embed/positions', 'head/kernel'),
    *(f'attention/{x}/kernel' for x in ('query', 'key', 'value', 'out')),
    *(f'attention/{x}/bias' for x in ('query', 'key', 'value', 'out')),
    *('mlp/up/kernel', 'mlp/up/bias', 'mlp/down/kernel', 'mlp/down/bias'),
    *('attention_shortcut/kernel', 'mlp_shortcut/kernel'),
  ),
  'dense': (
    *('embed/tokens', 'final_norm/scale', 'head/kernel'),
    *('attention/value/kernel', 'mlp/gate/kernel', 'mlp_norm/scale'),
  ),
}
# What some predictions do not depend on, and a kernel whose rotation would spread it.
QUICK = {
  ('sliced', 'embed/tokens'),
  ('sliced', 'embed/positions'),
  ('sliced', 'head/kernel'),
  ('sliced', 'mlp/up/bias'),
  ('sliced', 'mlp_shortcut/kernel'),
  ('dense', 'embed/tokens'),
}
ALL = {(name, path) for name, paths in ROLES.items() for path in paths}
NUMBERS = np.nan, -np.inf
LARGEST_ERROR = {'exact': 0, 'free': 0.02, 'near': 0.3}


@functools.cache
def model_of(name):
  return chains_test.MODELS[name](np.float16)


def changed(name, path, change):
  """Returns a model in which a function has changed an array of the second layer."""
  model = model_of(name)
  outer = structured.flatten(model.outer())
  layers = [structured.flatten(layer) for layer in model.layers()]
  params = outer if path in outer else layers[1]
  leaf = params[path]
  array = np.array(leaf.u if structured.is_structured(leaf) else leaf)
  change(array)
  params[path] = leaf.replace(u=array) if structured.is_structured(leaf) else array
  layers = [structured.unflatten(layer) for layer in layers]
  return models.from_layers(model.config, structured.unflatten(outer), layers)


def test_a_number_that_is_not_finite_changes_no_other_prediction(subtests):
  for (name, path), number in zip(sorted(QUICK), itertools.cycle(NUMBERS)):
    with subtests.test(name=name, path=path, number=number):
      check_not_finite(name, path, number)


@pytest.mark.slow
def test_other_numbers_that_are_not_finite_change_no_prediction(subtests):
  for (name, path), number in itertools.product(sorted(ALL), NUMBERS):
    with subtests.test(name=name, path=path, number=number):
      check_not_finite(name, path, number)


def check_not_finite(name, path, number):
  def change(array):
    array[(-1,) * array.ndim] = number  # of an unused token, if of an embedding

  model = changed(name, path, change)
  expected = transform_checks.fast_logits(model, chains_test.TOKENS)
  finite = np.isfinite(expected)
  for preset, most in LARGEST_ERROR.items():
    decoded = rotbits_jax.decode(rotbits_jax.encode(model, preset=preset))
    found = transform_checks.fast_logits(decoded, chains_test.TOKENS)
    np.testing.assert_array_equal(np.isfinite(found), finite, preset)
    if finite.any():
      atol = most * np.std(expected, where=finite)
      np.testing.assert_allclose(found[finite], expected[finite], rtol=0, atol=atol)


@pytest.mark.parametrize('rows', [1, 32])
def test_huge_weights_do_not_make_the_step_coarse(rows):
  """One, or a whole column, as a rotation makes of one."""
  steps = {}
  for size in (0.0, 3e4):

    def change(kernel, size=size):
      kernel[:rows, 4] = size

    model = changed('dense', 'mlp/down/kernel', change)
    (saving,) = [
      saving
      for record in transform_checks.records(
        passes.Transform('nothing'), model, rounding=passes.to_steps(-5.0)
      )
      for saving in record.savings
      if record.name == 'layers.1' and saving.name == passes.ROUNDING
    ]
    (note,) = [x for x in saving.notes if x['tensor'] == 'layers.1/mlp/down/kernel']
    steps[size] = note['step']
    assert note.get('outliers', 0) == (rows if size else 0)
  assert steps[3e4] <= 1.1 * steps[0.0]

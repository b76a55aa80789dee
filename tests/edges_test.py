"""Models with numbers at the edges keep their function."""

import functools
import itertools

import numpy as np
import pytest

from fuzz import seeds
import rotbits_jax
from rotbits_jax import models
from rotbits_jax import structured
from tests import chains_test
from tests import random_models
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
  array = np.array(leaf.b if structured.is_structured(leaf) else leaf)
  change(array)
  params[path] = leaf.replace(b=array) if structured.is_structured(leaf) else array
  layers = [structured.unflatten(layer) for layer in layers]
  return models.from_layers(model.config, structured.unflatten(outer), layers)


def test_a_number_that_is_not_finite_changes_no_other_prediction(subtests):
  for (name, path), number in zip(sorted(ALL)[::4], itertools.cycle(NUMBERS)):
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
  for preset, most in LARGEST_ERROR.items():
    check_function(model, preset, most)


def check_function(model, preset, most):
  """Compares the finite logits before and after; others stay as they are."""
  decoded = rotbits_jax.decode(rotbits_jax.encode(model, preset=preset))
  tokens = chains_test.TOKENS % model.config.vocab_size
  expected, found = (transform_checks.fast_logits(x, tokens) for x in (model, decoded))
  finite = np.isfinite(expected)
  np.testing.assert_array_equal(np.isfinite(found), finite, preset)
  if finite.any():
    atol = most * np.std(expected, where=finite)
    np.testing.assert_allclose(found[finite], expected[finite], rtol=0, atol=atol)


@pytest.mark.parametrize('edit', ['zero', 'subnormal', 'greatest'])
@pytest.mark.parametrize(
  'path', ['attention_shortcut/kernel', 'attention/query/kernel', 'mlp/down/kernel']
)
def test_kernels_of_zeros_and_of_least_and_greatest_numbers(path, edit):
  def change(x):
    edited = {'zero': x * 0, 'subnormal': x * 2.0**-22}.get(edit, np.sign(x) * 65504)
    x[...] = edited.astype(np.float16)

  check_function(changed('sliced', path, change), 'free', 0.02)


@pytest.mark.parametrize('preset', ['exact', 'free', 'near'])
def test_a_hidden_size_of_1(preset):
  sizes = {'hidden_size': 1, 'word_embed_proj_dim': 1, 'num_attention_heads': 1}
  model = random_models.random_model(seeds.OPT | sizes, np.float16)
  check_function(model, preset, 0.05)

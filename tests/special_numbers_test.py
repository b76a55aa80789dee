"""Numbers at the edges of what can be stored come back and do no harm to others."""

import functools
import itertools

import jax
import ml_dtypes
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


FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
OTHERS = (np.bool_, np.int8, np.int16, np.int32, np.int64)
OTHERS += (np.uint8, np.uint16, np.uint32, np.uint64)
SHAPE = (96, 80)


def bits(array):
  return array.view(np.dtype(f'u{array.dtype.itemsize}'))


def special_floats(dtype, rng):
  """Arrays of one dtype, by name: values at the edges, alone and among others."""
  dtype = np.dtype(dtype)
  unsigned = np.dtype(f'u{dtype.itemsize}')
  normal = rng.normal(size=SHAPE).astype(dtype)
  mixed = normal.copy()
  mixed[3, 4], mixed[5], mixed[:, 7] = np.nan, np.inf, -np.inf
  bits(mixed)[9, 9] |= 1
  zeros = normal.copy()
  zeros[rng.random(SHAPE) < 0.5] = 0
  zeros[rng.random(SHAPE) < 0.3] *= -1
  small = rng.integers(0, 50, SHAPE).astype(unsigned)
  sign = unsigned.type(1 << (8 * dtype.itemsize - 1))
  greatest = np.full(SHAPE, jax.numpy.finfo(dtype).max, dtype)
  any_bits = np.frombuffer(rng.bytes(normal.nbytes), dtype).reshape(SHAPE)
  return {
    'any bits': any_bits,
    'infinite': np.full(SHAPE, -np.inf, dtype),
    'mixed': mixed,
    'NaN': np.full(SHAPE, np.nan, dtype),
    'zeros': np.zeros(SHAPE, dtype),
    'negative zeros': -np.zeros(SHAPE, dtype),
    'zeros among others': zeros,
    'subnormal': small.view(dtype),
    'negative subnormal': (small | sign).view(dtype),
    'greatest': greatest * np.sign(normal),
  }


@pytest.mark.parametrize('dtype', FLOATS)
def test_floats(dtype):
  check_tree({'x': special_floats(dtype, np.random.default_rng(0))})


def test_every_dtype_in_every_shape():
  rng = np.random.default_rng(0)
  shapes = {'()': (), '(0)': (0,), '(3, 0, 2)': (3, 0, 2), '(1, 1)': (1, 1)}
  check_tree(
    {
      np.dtype(dtype).name: {
        name: np.asarray(100 * rng.normal(size=shape), dtype)
        for name, shape in (shapes | {'(7, 300)': (7, 300)}).items()
      }
      for dtype in (*FLOATS, *OTHERS)
    }
  )


def check_tree(tree):
  data = rotbits_jax.encode(tree, preset='exact')
  read = {key: rotbits_jax.read_record(data, key)[key] for key in tree}
  for found in (rotbits_jax.decode(data), jax.device_get(rotbits_jax.load(data)), read):
    assert structured.same_bits(found, tree)

"""Arrays whose numbers carry less than their dtype allows are packed, bit for bit."""

import dataclasses
import json
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import ml_dtypes
import numpy as np
import pytest
import random_models

from benchmarks import levels as benchmark
import rotbits_jax
from rotbits_jax import models
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.file import packing
from rotbits_jax.presets import steps as steps_lib
from rotbits_jax.structured import packed

DTYPES = np.float16, ml_dtypes.bfloat16, np.float32
SHAPE = 96, 256


def _normal(shape=SHAPE, seed=0):
  return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


def _dequantised(numbers, count, *, block, base):
  """Rounds blocks along rows to a step of 11 bits, as GGUF does in float32."""
  blocks = numbers.reshape(-1, block)
  least = blocks.min(1, keepdims=True) if base else np.zeros((len(blocks), 1))
  least = least.astype(np.float16).astype(np.float32)
  step = np.abs(blocks - least).max(1, keepdims=True) / count
  step = step.astype(np.float16).astype(np.float32)
  index = np.clip(np.rint((blocks - least) / step), 0 if base else -count, count)
  return (index * step + least).reshape(numbers.shape)


def _sparse(numbers):
  return np.where(np.random.default_rng(1).random(numbers.shape) < 0.8, 0, numbers)


def _palette(numbers, of_rows):
  tables = np.sort(_normal((len(numbers) if of_rows else 1, 16), seed=2), axis=1)
  index = np.random.default_rng(1).integers(0, 16, numbers.shape)
  return np.take_along_axis(tables, index, 1) if of_rows else tables[0][index]


ARRAYS = {
  'sparse': (structured.Sparse, _sparse(_normal())),
  'with_base': (
    structured.Levels,
    _dequantised(_normal(), 15, block=32, base=True),
  ),
  'without_base': (
    structured.Levels,
    _dequantised(_normal(), 127, block=32, base=False),
  ),
  'rows': (
    structured.Levels,
    _dequantised(_normal(), 127, block=SHAPE[1], base=False),
  ),
  'palette': (structured.Table, _palette(_normal(), False)),
  'palette_of_rows': (structured.Table, _palette(_normal((64, 1024)), True)),
}
"""Arrays by name, each with the class of the leaf that suits it."""


def _pack(array):
  return packing.pack({'a': array}).get('a')


def _special(array):
  """Puts special numbers into an array."""
  array = array.copy()
  info = ml_dtypes.finfo(array.dtype)
  array[3, 7], array[4, 9], array[5, 11] = np.nan, np.inf, -np.inf
  array[6, 1], array[6, 2], array[40, 3] = -0.0, info.smallest_subnormal, info.max
  packed.bits(array)[50, 60] = packed.bits(array)[3, 7] + 1  # another NaN
  return array


def _assert_same_bits(a, b):
  assert (a.dtype, a.shape) == (b.dtype, b.shape)
  np.testing.assert_array_equal(packed.bits(np.asarray(a)), packed.bits(np.asarray(b)))


class PackTest(parameterized.TestCase):
  @parameterized.product(name=list(ARRAYS), dtype=DTYPES, transposed=(False, True))
  def test_a_leaf_stands_for_the_array_bit_for_bit(self, name, dtype, transposed):
    kind, numbers = ARRAYS[name]
    array = numbers.astype(dtype)
    array = array.T if transposed else array
    leaf = _pack(array)
    self.assertIsInstance(leaf, kind)
    _assert_same_bits(leaf.array(), array)
    settings, arrays = leaf.stored()
    settings = json.loads(json.dumps(settings))
    again = structured.TYPES[leaf.kind].from_stored(settings, arrays)
    _assert_same_bits(again.array(), array)
    data = rotbits_jax.encode({'a': array}, preset='exact')
    _assert_same_bits(rotbits_jax.decode(data)['a'], array)
    self.assertLess(len(data), array.nbytes / 1.7)

  @parameterized.product(name=list(ARRAYS), dtype=DTYPES)
  def test_special_numbers_are_kept(self, name, dtype):
    array = _special(ARRAYS[name][1].astype(dtype))
    leaf = _pack(array)
    self.assertIsNotNone(leaf)
    _assert_same_bits(leaf.array(), array)

  @parameterized.parameters(*DTYPES)
  def test_any_numbers_fit_a_grid_with_residuals(self, dtype):
    array = _special(_normal().astype(dtype))
    for has_base in (False, True):
      grid = structured.Grid(True, 32, has_base, (15, 31), 11)
      leaf = structured.Levels.from_array(array, grid)
      self.assertGreater(leaf.exceptions.size, 0)
      _assert_same_bits(leaf.array(), array)

  def test_negative_zeros_follow_a_negative_step(self):
    numbers = _dequantised(_normal(), 7, block=32, base=False)
    numbers[numbers == 0] = -0.0
    leaf = _pack(numbers.astype(np.float16))
    self.assertIsNone(leaf.residuals)
    self.assertTrue((leaf.step < 0).any())
    _assert_same_bits(leaf.array(), numbers.astype(np.float16))

  def test_bases_that_bfloat16_rounds_are_found(self):
    numbers = _dequantised(_normal((256, 256)), 15, block=32, base=True)
    leaf = _pack(numbers.astype(ml_dtypes.bfloat16))
    self.assertIsInstance(leaf, structured.Levels)
    missed = 0 if leaf.residuals is None else np.count_nonzero(leaf.residuals)
    self.assertLess(missed, 1e-2 * numbers.size)

  @parameterized.parameters(*DTYPES)
  def test_dense_arrays_stay_as_they_are(self, dtype):
    self.assertIsNone(_pack(_normal((256, 256)).astype(dtype)))

  @parameterized.parameters((63, 65), (4095,), (0, 3), ())
  def test_small_arrays_stay_as_they_are(self, *shape):
    self.assertIsNone(_pack(np.zeros(shape, np.float16)))

  def test_axes_before_the_last_are_rows(self):
    array = ARRAYS['with_base'][1].astype(np.float16).reshape(4, 24, 256)
    _assert_same_bits(_pack(array).array(), array)
    flat = ARRAYS['sparse'][1].astype(np.float16).reshape(-1)
    _assert_same_bits(_pack(flat).array(), flat)

  @parameterized.parameters('90% zeros', '2:4 sparse')
  def test_pruned_arrays_take_their_entropy(self, name):
    array, bits = benchmark.pruned(512)[name]
    size = len(rotbits_jax.encode({'a': array}, preset='exact'))
    self.assertLess(size, 1.03 * bits * array.size / 8)
    self.assertGreater(size, 0.99 * bits * array.size / 8)

  def test_levels_take_the_entropy_of_their_indices(self):
    numbers = _dequantised(_normal((512, 512)), 15, block=32, base=True)
    array = numbers.astype(np.float16)
    counts = np.bincount(_pack(array).index.reshape(-1))
    shares = counts[counts > 0] / array.size
    of_block = 2 * 11 / 32  # base and step, by the bits that vary
    bits = -(shares * np.log2(shares)).sum() + of_block
    size = len(rotbits_jax.encode({'a': array}, preset='exact'))
    self.assertLess(size, 1.03 * bits * array.size / 8)


# No transform changes the MLPs of a model with a tied head.
_TIED = {'tie_word_embeddings': True}


def _model(**settings):
  """A dense model of which some layers were dequantised, and one was pruned."""
  settings |= {'num_hidden_layers': 4, 'hidden_size': 64, 'intermediate_size': 128}
  model = random_models.random_model(random_models.BASE | settings, np.float16)
  layers = list(model.layers())
  kernel = lambda i: layers[i]['mlp']['up']['kernel']
  for i in (0, 1):
    numbers = np.float32(kernel(i).T)
    layers[i]['mlp']['up']['kernel'] = np.ascontiguousarray(
      _dequantised(numbers, 15, block=32, base=True).astype(np.float16).T
    )
  layers[2]['mlp']['up']['kernel'] = _sparse(kernel(2)).astype(np.float16)
  return models.from_layers(model.config, model.outer(), layers, {})


def _dequantised_model():
  """A dense model with a tied head of which all layers were dequantised."""
  model = _model(num_key_value_heads=2, **_TIED)

  def dequantised(path, x):
    if not path.endswith('kernel'):
      return x
    numbers = _dequantised(np.float32(x.T), 15, block=32, base=True)
    return np.ascontiguousarray(numbers.astype(np.float16).T)

  layers = [
    structured.unflatten((k, dequantised(k, x)) for k, x in flat.items())
    for flat in map(structured.flatten, model.layers())
  ]
  return models.from_layers(model.config, model.outer(), layers, {})


def _kinds(data):
  with rotbits_jax.file.Reader(data) as reader:
    return {leaf.kind for unit in reader.units.values() for leaf in unit.leaves}


class FileTest(parameterized.TestCase):
  def test_layers_with_different_leaves_share_a_stack(self):
    model = _model()
    data = rotbits_jax.encode(model, preset='exact')
    self.assertContainsSubset({'levels', 'sparse', ''}, _kinds(data))
    again = rotbits_jax.decode(data)
    self.assertEqual(jax.tree.structure(again.params), jax.tree.structure(model.params))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
      np.testing.assert_array_equal(packed.bits(a), packed.bits(np.asarray(b)))
    unit = rotbits_jax.read_record(data, 'layers.1')
    for a, b in zip(
      jax.tree.leaves(unit), jax.tree.leaves(model.layer(1)), strict=True
    ):
      np.testing.assert_array_equal(packed.bits(a), packed.bits(np.asarray(b)))

  def test_buffers_are_packed(self):
    buffers = {'table': _sparse(_normal()).astype(np.float16)}
    model = dataclasses.replace(_model(), buffers=buffers)
    again = rotbits_jax.decode(rotbits_jax.encode(model, preset='exact'))
    np.testing.assert_array_equal(again.buffers['table'], buffers['table'])

  def test_steps_that_take_fewer_bytes_are_left_to_the_coder(self):
    data = rotbits_jax.encode(_model(), preset='near', step=-2)
    self.assertTrue({'levels', 'sparse', 'table'}.isdisjoint(_kinds(data)))

  def test_near_keeps_numbers_that_take_fewer_bytes_than_their_steps(self):
    model, path = _model(**_TIED), 'mlp/up/kernel'
    preset = presets.near(step=-6)
    data = rotbits_jax.encode(model, preset=preset)
    self.assertIn('levels', _kinds(data))
    again = list(rotbits_jax.decode(data).layers())
    for i, layer in enumerate(model.layers()):
      kernel, decoded = (structured.flatten(x)[path] for x in (layer, again[i]))
      if i < 2:
        _assert_same_bits(decoded, np.asarray(kernel))
      else:
        self.assertEqual(decoded.dtype, np.float32)
    report = rotbits_jax.inspect(data)
    rounded = {note['tensor'] for note in report.notes['rounding']}
    self.assertIn(f'layers.3/{path}', rounded)
    self.assertNotIn(f'layers.0/{path}', rounded)
    with mock.patch.object(packing, 'find', return_value={}):
      self.assertLess(len(data), len(rotbits_jax.encode(model, preset=preset)))

  def test_near_takes_no_more_than_exact_for_dequantised_layers(self):
    model = _dequantised_model()
    sizes = {}
    for preset in ('near', 'exact'):
      with rotbits_jax.file.Reader(rotbits_jax.encode(model, preset=preset)) as reader:
        sizes[preset] = reader.units['layers.0'].nbytes
        kinds = {leaf.kind for leaf in reader.units['layers.0'].leaves}
        self.assertEqual(kinds, {'levels', ''})
    self.assertLessEqual(sizes['near'], sizes['exact'])

  @pytest.mark.slow
  def test_the_search_for_steps_leaves_kept_numbers_out(self):
    model, path = _model(**_TIED), 'mlp/up/kernel'
    layers = list(model.layers())
    for layer in layers[2:]:
      layer['mlp']['up']['kernel'] = layers[0]['mlp']['up']['kernel']
    model = models.from_layers(model.config, model.outer(), layers, {})
    tokens = np.arange(24) % model.config.vocab_size
    text = steps_lib._Text.make(model, tokens, None)
    rounded = list(text.rounded(-6.0, {}, {}).layers())
    data = rotbits_jax.encode(model, preset='near', step=-6)
    decoded = list(rotbits_jax.decode(data).layers())
    for i, layer in enumerate(model.layers()):
      kernels = [structured.flatten(x)[path] for x in (layer, rounded[i], decoded[i])]
      for kernel in kernels[1:]:
        np.testing.assert_array_equal(np.float32(kernel), np.float32(kernels[0]))
    with mock.patch.object(steps_lib, 'PROBE', -6.0):
      found = steps_lib.calibrate(model, tokens)
    self.assertIn('layers.*/mlp/down/kernel', found.offsets)
    self.assertNotIn(f'layers.*/{path}', found.offsets)

  def test_near_packs_each_matrix_once(self):
    self.check_matrices_are_packed_once('encode')

  @pytest.mark.slow
  def test_the_search_packs_each_matrix_once(self):
    self.check_matrices_are_packed_once('search')

  def check_matrices_are_packed_once(self, job):
    model, find, found = _dequantised_model(), packing.find, []

    def noted(arrays):
      packings = find(arrays)
      found.extend(packings)
      return packings

    with mock.patch.object(packing, 'find', noted):
      if job == 'encode':
        rotbits_jax.encode(model, preset='near')
      else:
        tokens = np.arange(24) % model.config.vocab_size
        steps_lib.search(model, tokens, max_kl=0.1)
    self.assertIn('layers.0/attention/query/kernel', found)
    self.assertIn('layers.3/mlp/up/kernel', found)
    self.assertLen(found, len(set(found)))

  def test_a_matrix_that_changes_is_packed_again(self):
    find = packings.once(packing.find)
    arrays = {name: ARRAYS[name][1].astype(np.float16) for name in ('rows', 'palette')}
    first = find(arrays)
    self.assertIs(find({'rows': arrays['rows']})['rows'], first['rows'])
    for changed in (arrays['palette'], arrays['rows'].astype(np.float32)):
      again = find(arrays | {'rows': changed})
      self.assertIs(again['palette'], first['palette'])
      _assert_same_bits(again['rows'].leaf.array(), changed)
    self.assertNotIn('rows', find({'rows': _normal().astype(np.float16)}))

  def test_other_numbers_than_the_digests_are_refused(self):
    array = ARRAYS['with_base'][1].astype(np.float16)
    data = rotbits_jax.encode({'a': array}, preset='exact')
    wrong = np.zeros(array.shape, array.dtype)
    with (
      mock.patch.object(structured.Levels, 'array', return_value=wrong),
      self.assertRaisesRegex(rotbits_jax.file.ContainerError, 'a/a: .* differ'),
    ):
      rotbits_jax.decode(data)

  def test_a_shape_beyond_the_stored_bits_is_refused(self):
    array = ARRAYS['sparse'][1].astype(np.float16)
    data = rotbits_jax.encode({'a': array}, preset='exact')
    with rotbits_jax.file.Reader(data) as reader:
      unit = reader.units['a']
    leaf = dataclasses.replace(unit.leaves[0], shape=(1 << 20, 1 << 20))
    value = dataclasses.replace(unit, leaves=(leaf,)).to_json()
    with self.assertRaisesRegex(rotbits_jax.file.ContainerError, 'cannot stand for'):
      type(unit).from_json(value)


WRONG = {
  'sparse': [
    ('shape', [96, 264], "'mask' must have"),
    ('shape', [96, -1], 'lengths of axes'),
    ('shape', 'ab', 'list of lengths'),
    ('transposed', 1, 'true or false'),
    ('across', 2, 'true or false'),
    ('mask', lambda x: x[1:], "'mask' must have"),
    ('mask', lambda x: x & 0x7F, 'does not fit'),
    ('tail', lambda x: x[1:], 'does not fit'),
    ('tail', lambda x: np.zeros(128, x.dtype), 'no sparse leaf'),
    ('values', lambda x: x.astype(np.float64), 'not packed'),
    ('values', lambda x: x[:, 1:], 'no sparse leaf'),
  ],
  'with_base': [
    ('shape', [96, 128], "'index' must have"),
    ('dtype', 'float64', 'not packed'),
    ('index', lambda x: x.view(np.int8), "'index' must have"),
    ('step', lambda x: x[:, :3], "'base' must have"),
    ('step', lambda x: x.reshape(-1), "'step' must have"),
    ('base', lambda x: x.astype(np.float16), "'base' must have"),
  ],
  'without_base': [
    ('step', lambda x: x[:, :3], 'steps of shape'),
    ('step', lambda x: x[1:], 'steps of shape'),
  ],
  'palette': [
    ('index', lambda x: x | 0x80, 'beyond a table'),
    ('index', lambda x: x[1:], "'index' must have"),
    ('table', lambda x: x[:, :0], 'tables of shape'),
    ('table', lambda x: np.concatenate([x, x]), 'tables of shape'),
    ('table', lambda x: x[:, :3], 'beyond a table'),
  ],
}
"""Settings and arrays that do not fit, with the error."""


class FromStoredTest(parameterized.TestCase):
  @parameterized.parameters(
    (name, *case) for name, cases in WRONG.items() for case in cases
  )
  def test_refuses(self, name, key, wrong, error):
    leaf = _pack(ARRAYS[name][1].astype(np.float16))
    settings, arrays = leaf.stored()
    if key in arrays:
      arrays[key] = wrong(arrays[key])
    else:
      settings[key] = wrong
    with self.assertRaisesRegex(ValueError, error):
      type(leaf).from_stored(settings, arrays).array()

  @parameterized.parameters(([0, 3],), ([1 << 24, 1 << 24, 0],), ([1] * 9,))
  def test_refuses_shapes_that_are_not_packed(self, shape):
    settings = {'shape': shape, 'transposed': False}
    with self.assertRaisesRegex(ValueError, 'no packed array'):
      structured.Table.from_stored(settings, {})

  @parameterized.parameters(-1, 1)
  def test_refuses_another_number_of_exceptions(self, change):
    array = _special(ARRAYS['with_base'][1].astype(np.float16))
    settings, arrays = _pack(array).stored()
    arrays['exceptions'] = np.resize(
      arrays['exceptions'], arrays['exceptions'].size + change
    )
    leaf = structured.Levels.from_stored(settings, arrays)
    with self.assertRaisesRegex(ValueError, 'exceptions'):
      leaf.array()


if __name__ == '__main__':
  absltest.main()

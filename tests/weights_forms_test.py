"""Arrays that carry less than their dtype allows come back, and take little more."""

import itertools
import json
import lzma

from absl.testing import absltest
from absl.testing import parameterized
import ml_dtypes
import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.coding import coder
from rotbits_jax.coding import specs
from rotbits_jax.coding import forms
from rotbits_jax.system import schema

FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)
SHAPE = 96, 256


def _normal(shape=SHAPE, seed=0):
  return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


def _pruned(shape=SHAPE, share=0.8):
  numbers = _normal(shape)
  return np.where(np.random.default_rng(1).random(shape) < share, 0, numbers)


def _palette(shape, of_rows):
  rng = np.random.default_rng(1)
  lists = np.sort(_normal((shape[0] if of_rows else 1, 16), seed=2), axis=1)
  index = rng.integers(0, 16, shape)
  return np.take_along_axis(lists, index, 1) if of_rows else lists[0][index]


ARRAYS = {
  'pruned': ('all', _pruned()),
  'palette': ('all', _palette(SHAPE, of_rows=False)),
  'palette_of_rows': ('row', _palette((64, 1024), of_rows=True)),
  'palette_of_columns': ('column', _palette((64, 1024), of_rows=True).T),
}
"""Arrays by name, each with the lists of the codebook that suits it."""


def _bits(array):
  return forms.bit_patterns(np.ascontiguousarray(array))


def _size(array):
  """Encodes and decodes an array, and returns its form and the bytes of the stream."""
  encoded = coder.encode([array])
  spec = schema.load(
    specs.StreamSpec, json.loads(json.dumps(schema.dump(encoded.spec)))
  )
  (decoded,) = coder.decode(spec, encoded.data)
  assert (decoded.dtype, decoded.shape) == (array.dtype, array.shape)
  np.testing.assert_array_equal(_bits(decoded), _bits(array))
  return spec.arrays[0].form, encoded.data.size


def _entropy(values):
  """Returns the bytes of the order-0 entropy of values."""
  return tables.entropy_bits(np.unique(values, return_counts=True)[1]) / 8


class CodebookTest(parameterized.TestCase):
  def test_arrays_come_back_in_fewer_bytes(self):
    for name, dtype in itertools.product(list(ARRAYS), FLOATS):
      with self.subTest(name=name, dtype=dtype):
        lists, numbers = ARRAYS[name]
        form, size = _size(numbers.astype(dtype))
        self.assertIsInstance(form, forms.Codebook)
        self.assertEqual(form.lists, lists)
        plain = numbers.astype(dtype).nbytes
        self.assertLess(size, plain / 1.7)

  def test_special_numbers_are_kept(self):
    for name, dtype in itertools.product(list(ARRAYS), FLOATS):
      with self.subTest(name=name, dtype=dtype):
        array = ARRAYS[name][1].astype(dtype)
        array[3, 7], array[4, 9], array[5, 11] = np.nan, np.inf, -np.inf
        array[6, 1], array[6, 2] = -0.0, ml_dtypes.finfo(dtype).smallest_subnormal
        # Another NaN.
        _bits(array).reshape(array.shape)[50, 60] = _bits(array[3])[7] + 1
        _size(array)

  def test_dense_arrays_have_no_form(self):
    for dtype in FLOATS:
      with self.subTest(dtype=dtype):
        self.assertIsNone(_size(_normal((256, 256)).astype(dtype))[0])

  @parameterized.parameters((np.float16, 13.46), (ml_dtypes.bfloat16, 10.46))
  def test_pruned_arrays_take_their_entropy(self, dtype, of_number):
    array = _pruned((512, 512), 0.9).astype(dtype)
    zeros = _entropy(array == 0)
    ideal = zeros + np.count_nonzero(array) * of_number / 8
    self.assertLess(_size(array)[1], 1.02 * ideal)

  def test_two_zeros_in_four_take_their_entropy(self):
    for transposed in (False, True):
      with self.subTest(transposed=transposed):
        rng = np.random.default_rng(0)
        order = rng.random((512 * 128, 4)).argsort(axis=1).reshape(512, 512)
        array = np.where(order < 2, 0, _normal((512, 512))).astype(np.float16)
        form, size = _size(array.T if transposed else array)
        self.assertEqual(form.transposed, transposed)
        ideal = (np.log2(6) / 4 + 13.46 / 2) * array.size / 8
        self.assertLess(size, 1.02 * ideal)

  def test_signs_of_zeros_cost_a_bit(self):
    array = _pruned((512, 512), 0.9).astype(np.float16)
    signed = np.where(np.random.default_rng(3).random(array.shape) < 0.5, array, 0.0)
    signed = np.where(array == 0, np.copysign(array, signed - 0.5), array)
    signed = signed.astype(np.float16)
    signs = (
      np.count_nonzero(array == 0)
      * _entropy(np.signbit(signed[array == 0]))
      / max(np.count_nonzero(array == 0), 1)
    )
    self.assertLess(_size(signed)[1], 1.01 * (_size(array)[1] + signs) + 300)

  def test_zeros_and_few_values_take_no_more_than_xz(self):
    for array in (_pruned((512, 512), 0.9), _palette((512, 512), of_rows=False)):
      array = array.astype(np.float16)
      self.assertLess(_size(array)[1], len(lzma.compress(array.tobytes())))

  def test_constants_take_nothing(self):
    for dtype, value in itertools.product(
      ['bool', 'int8', 'uint16', 'int32', 'int64', 'uint64', 'float64', 'float16'],
      [0, 1],
    ):
      with self.subTest(dtype=dtype, value=value):
        self.assertLess(_size(np.full(1 << 17, value, dtype))[1], 400)

  def test_booleans_take_their_entropy(self):
    array = np.random.default_rng(0).random((300, 1000)) < 0.1
    self.assertLess(_size(array)[1], 1.02 * _entropy(array) + 300)

  def test_integers_take_their_entropy(self):
    for dtype in ('int16', 'int32', 'int64', 'uint32', 'uint64'):
      with self.subTest(dtype=dtype):
        values = np.random.default_rng(0).normal(size=(300, 1000)) * 100
        values = np.abs(values) if dtype[0] == 'u' else values
        array = np.round(values).astype(dtype)
        self.assertLess(_size(array)[1], 1.01 * _entropy(array) + 500)

  def test_tokens_take_little_more_than_their_entropy(self):
    array = (np.random.default_rng(0).zipf(1.3, 200_000) % 50_000).astype(np.int64)
    self.assertLess(_size(array)[1], 1.3 * _entropy(array))

  def test_any_number_of_values(self):
    for count in (1, 3, 17, 255, 256, 900):
      with self.subTest(count=count):
        rng = np.random.default_rng(0)
        values = np.unique(rng.integers(0, 1 << 31, count))
        array = values.astype(np.int32)[rng.integers(0, values.size, (100, 333))]
        codes = array.size * np.log2(values.size) / 8
        self.assertLess(_size(array)[1], 1.02 * codes + 8 * count + 600)


class DamageTest(absltest.TestCase):
  def _parts(self, name):
    array = ARRAYS[name][1].astype(np.float16)
    found = list(forms.codebooks(np.ascontiguousarray(array)))
    form, parts = next(x for x in found if x[0].lists == ARRAYS[name][0])
    return array, form, parts

  def test_join_makes_the_array(self):
    for name in ARRAYS:
      with self.subTest(name=name):
        array, form, parts = self._parts(name)
        shapes = [(part.dtype, part.shape) for part in parts]
        self.assertEqual(form.parts(array.dtype, array.shape), shapes)
        out = np.zeros(array.shape, array.dtype)
        form.join(parts, out)
        np.testing.assert_array_equal(_bits(out), _bits(array))

  def test_codes_beyond_the_codebook_are_refused(self):
    array = np.arange(4096).reshape(64, 64).astype(np.uint16) % 20 * 99
    ((form, parts),) = forms.codebooks(array)
    form.join(parts, np.zeros_like(array))
    parts[0][3, 7] = 20
    with self.assertRaisesRegex(ValueError, 'beyond'):
      form.join(parts, np.zeros_like(array))

  def test_another_number_of_others_is_refused(self):
    array, form, parts = self._parts('pruned')
    parts[0] = parts[0] ^ 1
    with self.assertRaisesRegex(ValueError, 'others|beyond'):
      form.join(parts, np.zeros(array.shape, array.dtype))


class UniformTest(absltest.TestCase):
  def test_multiples_of_a_unit_are_integers(self):
    for given, factor, dtype in itertools.product(
      [(3, 1), (30, 1), (150, 2)], [1, 3, 5, 7], [np.float32, np.float16]
    ):
      with self.subTest(given=given, factor=factor, dtype=dtype):
        scale, nbytes = given
        if dtype == np.float16 and scale * factor > 100:
          continue  # float16 does not have these numbers
        whole = np.rint(np.random.default_rng(0).normal(size=9999) * scale)
        array = (np.ldexp(factor * whole, -9) + 0.0).astype(dtype)  # no -0
        form, size = _size(array)
        self.assertIsInstance(form, forms.Uniform)
        self.assertEqual(form.unit, factor * 2.0**-9)
        self.assertLessEqual(form.nbytes, nbytes)
        self.assertLess(size, 1.02 * _entropy(whole) + 200)

  def test_units_at_the_limits(self):
    for i in range(4):
      with self.subTest(i=i):
        whole = np.arange(1 - (1 << 15), 1 << 15)
        for exponent in (-126, -20, 106):
          form = forms.Uniform(4 * (exponent + 152) + i, 2)
          array = (whole * (4.0 + i) * 2.0**exponent).astype(np.float32)
          out = np.empty_like(array)
          form.join([whole.astype(np.int16)], out)
          np.testing.assert_array_equal(out, array)

  def test_a_negative_zero_is_kept(self):
    array = np.float32([0.0, -0.0, 1.0, 2.0] * 2000)
    self.assertNotIsInstance(_size(array)[0], forms.Uniform)


if __name__ == '__main__':
  absltest.main()

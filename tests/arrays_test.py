"""Arrays come back bit for bit, in about as many bytes as their entropy."""

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax.coding import arrays
from rotbits_jax.coding import floats
from rotbits_jax.coding import tables

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32)


def _normal(shape, dtype, seed=0, scale=0.05):
  return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def _size(streams):
  return sum(stream.nbytes for stream in streams.values())


def _assert_same_bits(actual, expected):
  assert actual.dtype == expected.dtype
  assert actual.shape == expected.shape
  assert actual.tobytes() == expected.tobytes()


class FloatsTest(parameterized.TestCase):
  @parameterized.parameters(*DTYPES)
  def test_join_undoes_split_for_every_kind_of_number(self, dtype):
    layout = floats.LAYOUTS[np.dtype(dtype)]
    if layout.width == 16:
      bits = np.arange(1 << 16).astype(np.uint16)
    else:
      bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000).astype(np.uint32)
    values = bits.view(dtype)
    symbols, rests = floats.split(jnp.asarray(values))
    self.assertLess(int(symbols.max()), layout.alphabet)
    self.assertLess(int(rests.max()), 1 << layout.rest_bits)
    _assert_same_bits(np.asarray(floats.join(symbols, rests, np.dtype(dtype))), values)

  def test_symbol_is_exponent_and_top_of_the_mantissa(self):
    symbols, rests = floats.split(jnp.asarray([-1.5], jnp.float16))
    self.assertEqual(int(symbols[0]), 15 << 3 | 0b100)
    self.assertEqual(int(rests[0]), 1 << 7)

  @parameterized.product(width=[0, 1, 5, 7, 8, 13, 21], count=[0, 1, 7, 8, 1001])
  def test_bit_packing_round_trips_densely(self, width, count):
    values = np.random.default_rng(1).integers(0, 1 << width, count).astype(np.uint32)
    packed = floats.pack_bits(values, width)
    self.assertEqual(packed.size, floats.packed_size(count, width))
    self.assertLess(8 * packed.size - width * count, 8 * max(width, 1))
    np.testing.assert_array_equal(floats.unpack_bits(packed, count, width), values)


class ArraysTest(parameterized.TestCase):
  def _round_trip(self, given, numbers_per_lane=2048):
    unit, streams = arrays.encode(given, numbers_per_lane=numbers_per_lane)
    for actual, expected in zip(arrays.decode(unit, streams), given, strict=True):
      _assert_same_bits(actual, expected)
    return _size(streams)

  @parameterized.parameters(*DTYPES)
  def test_many_shapes_in_one_unit(self, dtype):
    shapes = [(100, 300), (7,), (0, 3), (), (1, 1), (5000,), (2, 3, 4)]
    self._round_trip([_normal(shape, dtype, i) for i, shape in enumerate(shapes)])

  @parameterized.parameters(*DTYPES)
  def test_special_numbers(self, dtype):
    values = _normal(20_000, np.float32)
    values[:6] = [np.nan, np.inf, -np.inf, -0.0, 1e-8, 6e4]
    self._round_trip([values.astype(dtype)])

  def test_other_dtypes_are_kept_as_they_are(self):
    given = [np.arange(50), np.array([True, False]), np.zeros(3), np.int8([1, -1])]
    self._round_trip(given)
    with self.assertRaisesRegex(ValueError, 'complex64'):
      self._round_trip([np.zeros(3, np.complex64)])

  def test_nothing_at_all(self):
    self.assertEqual(self._round_trip([]), 0)

  @parameterized.parameters(*DTYPES)
  def test_modelled_part_is_within_03_percent_of_its_entropy(self, dtype):
    values = _normal(1_000_000, dtype)
    layout = floats.LAYOUTS[np.dtype(dtype)]
    symbols = np.asarray(floats.split(jnp.asarray(values))[0])
    entropy = tables.entropy_bits(np.bincount(symbols)) / 8
    rest = floats.packed_size(values.size, layout.rest_bits)
    size = self._round_trip([values])
    self.assertLess(size - rest, 1.003 * entropy)

  def test_overhead_is_below_a_thousandth_on_ten_million_numbers(self):
    values = _normal(10_000_000, np.float16)
    symbols = np.asarray(floats.split(jnp.asarray(values))[0])
    ideal = tables.entropy_bits(np.bincount(symbols)) / 8 + values.size
    _, streams = arrays.encode([values], numbers_per_lane=2048)
    self.assertLess(_size(streams) / ideal - 1, 1e-3)

  @parameterized.parameters(*DTYPES)
  def test_noise_and_tiny_tensors_cost_no_more_than_they_hold(self, dtype):
    width = np.dtype(dtype).itemsize
    noise = np.random.default_rng(0).integers(0, 256, 50_000 * width).astype(np.uint8)
    self.assertEqual(self._round_trip([noise.view(dtype)]), noise.size)
    self.assertLessEqual(self._round_trip([_normal(10, dtype)]), 10 * width)

  def test_numbers_widened_from_a_shorter_format_cost_what_they_did(self):
    narrow = _normal(100_000, np.float16)
    size, wide = self._round_trip([narrow]), self._round_trip([narrow.astype('f4')])
    self.assertLess(wide, 1.01 * size)

  def test_constant_arrays_cost_almost_nothing(self):
    self.assertLess(self._round_trip([np.zeros(100_000, np.float16)]), 300)

  def test_a_lane_far_longer_than_the_others(self):
    # Every other column is constant, so that half of the lanes stay empty.
    values = _normal((1024, 64), np.float16)
    values[:, ::2] = 0
    self._round_trip([values], numbers_per_lane=1024)

  def test_wrong_streams_are_refused(self):
    unit, streams = arrays.encode([_normal(10_000, np.float16)], numbers_per_lane=256)
    for name in arrays.STREAMS:
      with self.assertRaises(ValueError):
        arrays.decode(unit, streams | {name: streams[name][:-1]})
    damaged = streams['rans'].copy()
    damaged[200] ^= 1
    try:  # a flipped word may also decode to other numbers: the digest's business
      decoded = arrays.decode(unit, streams | {'rans': damaged})
    except ValueError:
      return
    self.assertNotEqual(decoded[0].tobytes(), _normal(10_000, np.float16).tobytes())


if __name__ == '__main__':
  absltest.main()

"""Arrays come back bit for bit, in about as many bytes as their entropy."""

import base64
import json
import math
import zlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import arrays
from rotbits_jax.coding.weights import floats
from rotbits_jax.coding.weights import integers

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32)
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16)


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


class IntegersTest(parameterized.TestCase):
  @parameterized.parameters(*INTEGERS)
  def test_join_undoes_split_for_every_number(self, dtype):
    width = 8 * np.dtype(dtype).itemsize
    values = np.arange(1 << width).astype(f'u{width // 8}').view(dtype)
    least = integers.least_low(values)
    self.assertEqual(least, max(width - integers.MODELLED_BITS, 0))
    for low in range(least, width):
      symbols, rests = integers.split(values, low)
      self.assertLess(int(symbols.max()), 1 << integers.MODELLED_BITS)
      self.assertLess(int(rests.max()), 1 << low)
      joined = integers.join(symbols, rests, low, np.dtype(dtype))
      _assert_same_bits(joined, values)

  def test_small_magnitudes_are_small_symbols(self):
    symbols, _ = integers.split(np.int16([0, -1, 1, -2, 2]), 0)
    self.assertEqual(symbols.tolist(), [0, 1, 2, 3, 4])


class ArraysTest(parameterized.TestCase):
  def _round_trip(self, given, numbers_per_lane=2048):
    unit, streams, *_ = arrays.encode(given, numbers_per_lane=numbers_per_lane)
    specs = [json.dumps(spec.to_json()) for spec in unit.arrays]
    specs = [arrays.ArraySpec.from_json(json.loads(spec)) for spec in specs]
    value = json.loads(json.dumps(unit.to_json()))
    self.assertEqual(arrays.UnitSpec.from_json(value, specs), unit)
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
    self._round_trip([values.astype(dtype), values.reshape(50, -1).astype(dtype)])

  def test_other_dtypes_are_kept_as_they_are(self):
    given = [np.arange(50), np.array([True, False]), np.zeros(3), np.int8([1, -1])]
    self._round_trip(given)
    with self.assertRaisesRegex(ValueError, 'complex64'):
      self._round_trip([np.zeros(3, np.complex64)])
    with self.assertRaisesRegex(ValueError, 'complex64'):
      arrays.ArraySpec.from_json(['complex64', [3], None])

  def test_all_dtypes_in_one_unit(self):
    given = [_normal((60, 100), dtype) for dtype in DTYPES]
    given += [_normal((60, 100), dtype, scale=20) for dtype in (np.int8, np.int16)]
    given += [np.arange(9), _normal((60, 100), np.uint8, scale=0) + 3]
    self._round_trip(given)

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
    streams = arrays.encode([values], numbers_per_lane=2048).streams
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
    unit, streams, *_ = arrays.encode(
      [_normal(10_000, np.float16)], numbers_per_lane=256
    )
    for name in arrays.STREAMS:
      with self.assertRaises(ValueError):
        arrays.decode(unit, streams | {name: streams[name][:-1]})
    message = rans.from_words(streams['rans'], unit.lanes)
    size = message.size + 1
    words = np.concatenate([np.zeros_like(message.words[:1]), message.words])
    longer = rans.Message(message.state, words, size, size, size)
    with self.assertRaisesRegex(ValueError, 'does not hold just'):
      arrays.decode(unit, streams | {'rans': rans.to_words(longer)})
    damaged = streams['rans'].copy()
    damaged[200] ^= 1
    try:  # a flipped word may also decode to other numbers: the digest's business
      decoded = arrays.decode(unit, streams | {'rans': damaged})
    except ValueError:
      return
    self.assertNotEqual(decoded[0].tobytes(), _normal(10_000, np.float16).tobytes())


class ScalesTest(parameterized.TestCase):
  """Lines that differ in scale cost what they do one by one."""

  def _encode(self, given):
    encoded = arrays.encode(given, numbers_per_lane=4096)
    decoded = arrays.decode(encoded.unit, encoded.streams)
    for actual, expected in zip(decoded, given, strict=True):
      _assert_same_bits(actual, expected)
    return encoded.streams

  def _one_scale(self, shape, dtype):
    """Bytes of as many normal numbers of one scale, averaged over scales."""
    sizes = [
      _size(self._encode([_normal(shape, dtype, i, 0.05 * 2 ** (i / 4))]))
      for i in range(4)
    ]
    return np.mean(sizes)

  @parameterized.product(dtype=DTYPES, axis=[0, 1])
  def test_rows_or_columns_of_different_scale(self, dtype, axis):
    shape = (200, 500) if axis == 0 else (500, 200)
    values = _normal(shape, np.float32)
    octaves = np.random.default_rng(1).standard_normal(200)
    values *= np.expand_dims(2**octaves, 1 - axis).astype(np.float32)
    size = _size(self._encode([values.astype(dtype)]))
    # 200 labels of less than 8 bits, a few tables, and what labels in steps lose.
    self.assertLess(size, self._one_scale(shape, dtype) + 200 + 400)
    # An own table for all numbers would cost 0.2 bits a number more.
    self.assertGreater(self._one_table(values.astype(dtype)) - size, 0.1 / 8 * 100_000)

  @parameterized.parameters(np.float16, np.float32)
  def test_rows_and_columns_of_different_scale(self, dtype):
    rng = np.random.default_rng(1)
    octaves = rng.standard_normal((200, 1)) + rng.standard_normal(500)
    values = _normal((200, 500), np.float32) * np.float32(2) ** octaves
    size = _size(self._encode([values.astype(dtype)]))
    self.assertLess(size, self._one_scale((200, 500), dtype) + 700 + 600)

  def _one_table(self, values):
    layout = floats.LAYOUTS[values.dtype]
    symbols = np.asarray(floats.split(jnp.asarray(values.reshape(-1)))[0])
    rests = floats.packed_size(values.size, layout.rest_bits)
    return tables.entropy_bits(np.bincount(symbols)) / 8 + rests

  def test_arrays_of_one_scale_share_a_table(self):
    given = [_normal((40, 50), np.float16, i) for i in range(50)]
    self.assertLess(self._encode(given)['tables'].nbytes, 100)

  def test_rows_of_zeros_cost_nothing(self):
    values = _normal((1000, 200), np.float16)
    dense = _size(self._encode([values[:500]]))
    values[1::2] = 0
    rests = 500 * 200
    self.assertLess(_size(self._encode([values])) - rests, dense + 300)

  def test_other_distributions_have_tables_of_their_own(self):
    values = np.random.default_rng(0).integers(1, 9, (200, 500)).astype(np.float16)
    self.assertLess(_size(self._encode([values])), 1.01 * 3 / 8 * values.size + 300)

  def test_heavy_tails_cost_no_more_than_with_one_table(self):
    values = np.random.default_rng(0).standard_t(2, (200, 500)).astype(np.float32)
    size = _size(self._encode([values]))
    self.assertLess(size, 1.002 * self._one_table(values) + 500)

  def test_more_tables_than_a_byte_counts(self):
    rng = np.random.default_rng(0)
    given = [rng.permutation(256)[:4][rng.integers(0, 4, 600)] for _ in range(170)]
    size = _size(self._encode([x.astype(np.uint8) for x in given]))
    self.assertLess(size, 170 * (600 / 4 + 30) + 300)


class IntegerArraysTest(parameterized.TestCase):
  def _size(self, values):
    encoded = arrays.encode([values], numbers_per_lane=4096)
    (decoded,) = arrays.decode(encoded.unit, encoded.streams)
    _assert_same_bits(decoded, values)
    return _size(encoded.streams)

  def _entropy(self, values):
    _, counts = np.unique(values, return_counts=True)
    return tables.entropy_bits(counts) / 8

  @parameterized.parameters((np.int8, 0.8), *((dtype, 25) for dtype in INTEGERS))
  def test_come_near_their_entropy(self, dtype, deviation):
    centre = 120 if np.dtype(dtype).kind == 'u' else 0
    values = np.round(_normal((200, 500), float, scale=deviation) + centre)
    values = values.astype(dtype)
    self.assertLess(self._size(values), 1.005 * self._entropy(values) + 250)

  def test_weights_with_structural_zeros(self):
    values = np.round(_normal((200, 500), float, scale=25)).astype(np.int8)
    values[np.random.default_rng(1).random(values.shape) < 0.6] = 0
    self.assertLess(self._size(values), 1.005 * self._entropy(values) + 250)

  def test_columns_of_different_scale(self):
    values = _normal((500, 200), float, scale=2.0 ** np.linspace(1, 5, 200))
    values = np.round(values).astype(np.int8)
    entropy = sum(self._entropy(values[:, i]) for i in range(200))
    # The entropies of 500 numbers each are too small: by half a bit a symbol, about.
    self.assertLess(self._size(values), 1.02 * entropy + 500)

  @parameterized.parameters(np.int16, np.uint16)
  def test_wide_ones_leave_noise_aside(self, dtype):
    values = _normal((200, 500), float, scale=2000)
    values = np.abs(values) if dtype == np.uint16 else values
    ideal = math.log2(2000 * math.sqrt(2 * math.pi * math.e)) / 8 * values.size
    ideal -= values.size / 8 if dtype == np.uint16 else 0
    self.assertLess(self._size(np.round(values).astype(dtype)), 1.005 * ideal + 500)

  @parameterized.parameters(*INTEGERS)
  def test_noise_and_few_numbers_cost_no_more_than_they_hold(self, dtype):
    info = np.iinfo(dtype)
    noise = np.random.default_rng(0).integers(info.min, info.max + 1, 50_000)
    self.assertEqual(self._size(noise.astype(dtype)), 50_000 * info.bits // 8)
    few = np.array([info.min, info.max, 0, 1], dtype)
    self.assertEqual(self._size(few), few.nbytes)

  @parameterized.parameters(*INTEGERS)
  def test_extremes(self, dtype):
    values = np.zeros((50, 80), dtype)
    values[3, 4:6] = np.iinfo(dtype).min, np.iinfo(dtype).max
    self.assertLess(self._size(values), 300 + 4000 * (np.iinfo(dtype).bits - 8) // 32)

  def test_rare_outliers_are_rare_symbols(self):
    values = np.round(_normal((200, 500), float, scale=2)).astype(np.int16)
    values[::50, 7] = 8000
    self.assertLess(self._size(values), 1.005 * self._entropy(values) + 250)


class FormatTest(parameterized.TestCase):
  RANS = (
    'BLDyZ0RV5!;{X5vBuJ4WM2Qk4@Ul)CSg6Jy=`A?YmG2OhrMT(5Mq3wbIC@nI%hSeci<xw}U=Yotd'
    'K@DuN4-4t_hM<N@DX&t)I24g?(P'
  )
  TABLES = (
    'jl;1GfG_~Sup}_hv19*#upg8U5R!ed&%@0=LZWF>r5I@?j=BDv!w)ZGU;qGk+GAi~U|{Mzvzmb=j'
    'e+6p*^CT^f&zw$3WkOThK>$~2@`<Q4h#%dOiVxmsFDfHML_`jVhj@'
  )
  RAW = 'B1DN2BuJ4WM2Qk4NRc8$i4r78ks?Hi5+q2G' * 4 + 'B1DN2BuJ4WM2Qk4NRa'

  def test_golden_unit(self):
    """It was written once and must be read forever, or the format's version changes."""
    i = np.arange(1200)
    exchanged = np.where(i * i % 23 == 1, i % 5 - 2, 0).astype(np.int8).reshape(40, 30)
    powers = np.where(i * i % 7 > 2, -1, 1) * 2.0 ** (i // 30 % 4 - i % 3)
    streams = {
      name: np.frombuffer(base64.b85decode(text), dtype)
      for name, text, dtype in (
        ('rans', self.RANS, '<u2'),
        ('tables', self.TABLES, np.uint8),
        ('raw', self.RAW, np.uint8),
      )
    }
    unit = arrays.UnitSpec(
      arrays=(
        arrays.ArraySpec(shape=(40, 30), dtype='int8', rest=0),
        arrays.ArraySpec(shape=(40, 30), dtype='float16', rest=1),
      ),
      lanes=1,
      exchangeable=((0, 1),),
    )
    decoded = arrays.decode(unit, streams)
    _assert_same_bits(decoded[1], powers.astype(np.float16).reshape(40, 30))
    self.assertCountEqual(decoded[0].T.tolist(), exchanged.T.tolist())
    self.assertEqual(zlib.crc32(decoded[0].tobytes()), 1609124861)


class StackedTest(parameterized.TestCase):
  @parameterized.parameters(1, 3)
  def test_words_come_back_from_under_the_content(self, depth):
    words = np.random.default_rng(0).integers(0, 1 << 16, (depth, 5)).astype(np.uint16)
    message = rans.stacked(jnp.asarray(words), 9)
    one = jnp.ones(5, jnp.uint32)
    push = jax.jit(lambda m: rans.push(m, one, one, 16))
    pop = jax.jit(lambda m: rans.pop(m, lambda slot: (slot, slot, one), 16)[0])
    for step in (*[push] * 4, *[pop] * 4):
      message = step(message)
    rans.check(message)
    self.assertEqual(message.size.tolist(), [depth - 1] * 5)
    np.testing.assert_array_equal(message.words[: depth - 1], words[:-1])
    np.testing.assert_array_equal(rans.payload(message), words[-1])
    for _ in range(depth - 1):
      message = pop(message)
    rans.check(message)
    with self.assertRaises(rans.MessageError):
      rans.check(pop(message))


class NeuronsTest(parameterized.TestCase):
  """The order of an MLP's neurons is free in a unit of arrays, exactly."""

  def _mlp(self, width, neurons, dtype=np.float16, bias=None, seed=0):
    given = [
      _normal((200, 200), dtype, seed),
      _normal((width, neurons), dtype, seed + 1),
      _normal((neurons,), bias or dtype, seed + 2),
      _normal((neurons, width), dtype, seed + 3),
    ]
    return given, {1: 1, 2: 0, 3: 0}

  def _neurons(self, given, axes):
    rows = [np.moveaxis(given[i], axis, 0) for i, axis in axes.items()]
    count = len(rows[0])
    return [b''.join(row[i].tobytes() for row in rows) for i in range(count)]

  def _encode(self, given, axes, lanes=32):
    """Checks what must hold, and returns the result."""
    coded = sum(x.size for x in given if x.dtype != np.int64)
    # Few numbers of lanes share few compiled functions.
    numbers_per_lane = max(coded // lanes, 1)
    encoded = arrays.encode(given, numbers_per_lane=numbers_per_lane, exchangeable=axes)
    decoded = arrays.decode(encoded.unit, encoded.streams)
    for i, (actual, stored) in enumerate(zip(decoded, encoded.arrays, strict=True)):
      _assert_same_bits(actual, stored)
      if i not in axes:
        _assert_same_bits(actual, given[i])
    before, after = (self._neurons(x, axes) for x in (given, decoded))
    self.assertCountEqual(before, after)
    if encoded.unit.exchangeable:
      self.assertEqual(encoded.unit.exchangeable, tuple(sorted(axes.items())))
    else:
      self.assertEqual(encoded.order_bits, 0)
      self.assertEqual(before, after)
    return encoded

  def _saved_bits(self, given, encoded):
    """What the file is shorter than without an order."""
    numbers = sum(x.size for x in given) // 32
    plain = arrays.encode(given, numbers_per_lane=numbers)
    return 8 * (_size(plain.streams) - _size(encoded.streams))

  @parameterized.parameters(np.float16, ml_dtypes.bfloat16, np.float32, np.int8)
  def test_saves_the_logarithm_of_the_factorial(self, dtype):
    given, axes = self._mlp(64, 500, np.float32, bias=np.float32)
    scale = 400 if dtype == np.int8 else 1
    given = [(x * scale).astype(dtype) for x in given]
    encoded = self._encode(given, axes)
    ideal = math.lgamma(501) / math.log(2)
    self.assertAlmostEqual(encoded.order_bits / ideal, 1, delta=0.005)
    self.assertAlmostEqual(self._saved_bits(given, encoded) / ideal, 1, delta=0.04)

  # More than 4096 neurons are chosen in two digits each.
  @parameterized.parameters((1, 2), (512, 40), (64, 5000))
  def test_lanes_do_not_matter(self, lanes, neurons):
    given, axes = self._mlp(40, neurons)
    encoded = self._encode(given, axes, lanes)
    self.assertEqual(encoded.unit.lanes, lanes)
    ideal = math.lgamma(neurons + 1) / math.log(2)
    self.assertAlmostEqual(encoded.order_bits, ideal, delta=0.002 * ideal + 4)

  def test_equal_neurons_are_told_apart_by_nothing(self):
    given, axes = self._mlp(64, 500)
    for i, axis in axes.items():
      lines = np.moveaxis(given[i], axis, 0)
      lines[:100] = lines[0]
      lines[200:220] = lines[200]
    encoded = self._encode(given, axes)
    logs = math.lgamma(501) - math.lgamma(101) - math.lgamma(21)
    self.assertAlmostEqual(encoded.order_bits * math.log(2) / logs, 1, delta=0.005)

  def test_all_neurons_equal(self):
    given, axes = self._mlp(64, 500)
    given = [np.zeros_like(x) if i in axes else x for i, x in enumerate(given)]
    encoded = self._encode(given, axes)
    self.assertEqual(encoded.unit.exchangeable, ((1, 1), (2, 0), (3, 0)))
    self.assertAlmostEqual(encoded.order_bits, 0, delta=1)
    self.assertLess(abs(self._saved_bits(given, encoded)), 64)

  def test_neurons_of_different_scale_and_dtype(self):
    given, axes = self._mlp(64, 500, bias=np.float32)
    octaves = np.random.default_rng(5).standard_normal(500)
    given[1] = (given[1] * 2**octaves).astype(np.float16)
    given[3] = (given[3] * 2 ** octaves[:, None]).astype(np.float16)
    encoded = self._encode(given, axes)
    saved = self._saved_bits(given, encoded) * math.log(2) / math.lgamma(501)
    self.assertAlmostEqual(saved, 1, delta=0.1)

  def test_axes_in_the_middle(self):
    given = [_normal((200, 200), np.float16), _normal((4, 500, 3), np.float16, 1)]
    given += [_normal((5, 500, 4), np.int64, 2, scale=1e6)]
    self._encode(given, {1: 1, 2: 1})

  def test_is_left_out_where_it_cannot_be(self):
    given, axes = self._mlp(64, 500)
    cases = (
      (given, {1: 1, 3: 1}),  # 500 neurons and 64
      ([given[0], given[1][:, :1], given[2][:1], given[3][:1]], axes),
      ([given[0][0, :9], *given[1:]], axes),  # too few bits to choose an order by
      ([np.zeros((0, 3)), *given[1:]], axes),
      (given, {}),
      ([np.arange(6), np.arange(4), np.arange(4)], {1: 0, 2: 0}),  # nothing to code
    )
    for others, wrong in cases:
      encoded = arrays.encode(others, numbers_per_lane=3000, exchangeable=wrong)
      self.assertEqual(encoded.unit.exchangeable, ())
      self.assertEqual(encoded.order_bits, 0)
      decoded = arrays.decode(encoded.unit, encoded.streams)
      for actual, expected in zip(decoded, others, strict=True):
        _assert_same_bits(actual, expected)

  def test_axes_that_are_none_are_refused(self):
    given, _ = self._mlp(20, 30)
    for wrong in ({9: 0}, {-1: 0}, {1: 2}, {2: -1}):
      with self.assertRaisesRegex(ValueError, 'no axis'):
        arrays.encode(given, numbers_per_lane=3000, exchangeable=wrong)

  def test_wrong_streams_are_refused(self):
    given, axes = self._mlp(64, 500)
    unit, streams, stored, _ = self._encode(given, axes)
    for name in arrays.STREAMS:
      with self.assertRaises(ValueError):
        arrays.decode(unit, streams | {name: streams[name][:-1]})
    for name in ('rans', 'raw'):
      for position in np.linspace(0, streams[name].size - 1, 20).astype(int):
        damaged = streams[name].copy()
        damaged[position] ^= 1
        try:  # what decodes to other numbers is the digest's business
          decoded = arrays.decode(unit, streams | {name: damaged})
        except ValueError:
          continue
        pairs = zip(decoded, stored, strict=True)
        self.assertTrue(any(x.tobytes() != y.tobytes() for x, y in pairs), name)


if __name__ == '__main__':
  absltest.main()

"""Records of arrays come back bit for bit, in about as many bytes as their entropy."""

import base64
import concurrent.futures
import copy
import dataclasses
import itertools
import json
import math
import tempfile
import tracemalloc
from unittest import mock
import weakref

from absl.testing import absltest
from absl.testing import parameterized
import ml_dtypes
import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.coding import coder
from rotbits_jax.coding import specs
from rotbits_jax.coding import blocks
from rotbits_jax.coding import contexts
from rotbits_jax.coding import layouts
from rotbits_jax.coding import pool
from rotbits_jax.coding import scales
from rotbits_jax.coding import streams
from rotbits_jax.system import schema

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32)
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16)


def _normal(shape, dtype, seed=0, scale=0.05):
  return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def _assert_same_bits(actual, expected):
  assert actual.dtype == expected.dtype
  assert actual.shape == expected.shape
  assert actual.tobytes() == expected.tobytes()


def _load(value):
  return schema.load(specs.StreamSpec, value)


def _dump(spec):
  return json.loads(json.dumps(schema.dump(spec)))


def _round_trip(given):
  """Encodes and decodes arrays, checks the result, and returns the stream's length."""
  encoded = coder.encode(given)
  assert _load(_dump(encoded.spec)) == encoded.spec
  assert encoded.data.dtype == np.uint8
  assert encoded.data.shape == (encoded.spec.nbytes,)
  decoded = coder.decode(encoded.spec, encoded.data)
  for actual, expected in zip(decoded, given, strict=True):
    _assert_same_bits(actual, np.asarray(expected))
  return encoded.data.size


def _modelled(values):
  """Returns the bytes of the entropy of the symbols of floats, and of the raw bits."""
  layout = layouts.Float(values.dtype, 0)
  bits = values.reshape(-1).view(layout.unsigned)
  symbols = np.asarray(layout.split(bits, 1)[0])
  entropy = tables.entropy_bits(np.bincount(symbols)) / 8
  return entropy, values.size * layout.most_raw_bits / 8


class RecordsTest(absltest.TestCase):
  def test_many_shapes_in_one_record(self):
    for dtype in DTYPES:
      with self.subTest(dtype=dtype):
        shapes = [(100, 300), (7,), (0, 3), (), (1, 1), (5000,), (2, 3, 4)]
        _round_trip([_normal(shape, dtype, i) for i, shape in enumerate(shapes)])

  def test_special_numbers(self):
    for dtype in DTYPES:
      with self.subTest(dtype=dtype):
        values = _normal(20_000, np.float32)
        values[:6] = [np.nan, np.inf, -np.inf, -0.0, 1e-8, 6e4]
        _round_trip([values.astype(dtype), values.reshape(50, -1).astype(dtype)])

  def test_every_bit_pattern(self):
    for dtype in DTYPES:
      with self.subTest(dtype=dtype):
        width = np.dtype(dtype).itemsize
        bits = np.arange(1 << 16).astype(f'u{width}') << 8 * (width - 2)
        _round_trip([np.concatenate([bits, np.zeros_like(bits)]).view(dtype)])

  def test_any_order_in_memory(self):
    for dtype in (*DTYPES, *INTEGERS):
      with self.subTest(dtype=dtype):
        values = _normal((90, 110), dtype, scale=25)
        _round_trip(
          [
            *(
              values.T,
              values[::2, 3:],
              values[:, ::-1],
              np.broadcast_to(values[0], (9, 110)),
            ),
            values.reshape(9, 10, 110).transpose(2, 0, 1),
            values.astype(np.float64).T,
          ]
        )

  def test_few_elements_are_kept_as_they_are(self):
    given = [np.arange(20), np.array([True, False]), np.zeros(3), np.int8([1, -1])]
    self.assertEqual(_round_trip(given), sum(x.nbytes for x in given))
    with self.assertRaisesRegex(ValueError, 'complex64'):
      coder.encode([np.zeros(3, np.complex64)])

  def test_all_dtypes_in_one_record(self):
    given = [_normal((60, 100), dtype) for dtype in DTYPES]
    given += [_normal((60, 100), dtype, scale=20) for dtype in (np.int8, np.int16)]
    given += [np.arange(9), _normal((60, 100), np.uint8, scale=0) + np.uint8(3)]
    _round_trip(given)

  def test_nothing_at_all(self):
    self.assertEqual(_round_trip([]), 0)
    self.assertEqual(_round_trip([np.zeros((0, 3), np.float16)]), 0)

  def test_several_blocks_of_several_arrays(self):
    # The capacity is small, because large arrays are slow without XLA's optimisations.
    with mock.patch.object(blocks, 'CAPACITY', 3000):
      given = [_normal((70, 100), np.float16), _normal((31, 41), np.float16, 1)]
      given += [np.repeat(np.float16([2, 3]), 1500)]
      encoded = coder.encode(given)
      self.assertLen(encoded.spec.groups[0].blocks, 3)
      _round_trip(given)

  def test_few_bytes_cannot_ask_for_much_work(self):
    encoded = coder.encode([_normal((600, 1000), np.float16)])
    (group,) = encoded.spec.groups
    parts = dataclasses.replace(group, elements=1000, blocks=(8,) * 600)
    with self.assertRaisesRegex(ValueError, '600 blocks for 600000 elements'):
      dataclasses.replace(encoded.spec, groups=(parts,))
    own = scales.Buckets(0, 1, np.ones(2, np.uint8), np.ones(1, np.uint8))
    table = np.full((1, 1), 1 << 14)
    found = contexts.Contexts((own,), (0,), 1, np.zeros(1, bool), table)
    layout = layouts.Int(np.dtype(np.int8), 0)
    data = contexts.to_bytes(found)
    self.assertEqual(contexts.from_bytes(data, layout, [(2, 1 << 20)]).first, (0,))
    with self.assertRaisesRegex(ValueError, 'rows of 1048577 elements'):
      contexts.from_bytes(data, layout, [(2, (1 << 20) + 1)])

  def test_modelled_part_is_within_03_percent_of_its_entropy(self):
    for dtype in DTYPES:
      with self.subTest(dtype=dtype):
        values = _normal(500_000, dtype)
        entropy, rest = _modelled(values)
        self.assertLess(_round_trip([values]) - rest, 1.003 * entropy)

  def test_noise_and_tiny_tensors_cost_no_more_than_they_hold(self):
    for dtype in DTYPES:
      with self.subTest(dtype=dtype):
        width = np.dtype(dtype).itemsize
        noise = (
          np.random.default_rng(0).integers(0, 256, 50_000 * width).astype(np.uint8)
        )
        self.assertEqual(_round_trip([noise.view(dtype)]), noise.size)
        self.assertLessEqual(_round_trip([_normal(10, dtype)]), 10 * width)

  def test_small_integers_beside_noise_cost_what_they_do_alone(self):
    rng = np.random.default_rng(0)
    noise = [rng.integers(-(1 << 15), 1 << 15, 5000, np.int16) for _ in range(6)]
    few = [rng.integers(0, 40, 3000).astype(np.int16) for _ in range(3)]
    alone = _round_trip(few)
    self.assertLess(alone, 3 * 3000 * 6 / 8)
    both = _round_trip([*noise, *few])
    self.assertLess(both, sum(x.nbytes for x in noise) + 1.02 * alone + 200)

  def test_numbers_widened_from_a_shorter_format_cost_what_they_did(self):
    narrow = _normal(100_000, np.float16)
    size, wide = _round_trip([narrow]), _round_trip([narrow.astype('f4')])
    self.assertLess(wide, 1.01 * size)

  def test_constant_arrays_cost_almost_nothing(self):
    for value in (0, 1, -3, 0.1):
      self.assertLess(_round_trip([np.full(100_000, value, np.float16)]), 300)

  def test_a_lane_far_longer_than_the_others(self):
    # Every other column is constant, so that half of the lanes stay empty.
    values = _normal((4096, 64), np.float16)
    values[:, ::2] = 0
    _round_trip([values])


class DecodeTest(parameterized.TestCase):
  given = _normal((70, 90), np.float16), np.arange(7), _normal(9000, np.float32)

  def _encoded(self):
    return coder.encode(self.given)

  def test_into_given_arrays(self):
    encoded = self._encoded()
    stacks = [np.zeros((3, *x.shape), x.dtype) for x in self.given]
    out = [stack[1] for stack in stacks]
    decoded = coder.decode(encoded.spec, encoded.data, out=out)
    for stack, actual, expected in zip(stacks, decoded, self.given, strict=True):
      self.assertTrue(np.shares_memory(actual, stack))
      _assert_same_bits(stack[1], expected)
      self.assertFalse(stack[::2].any())

  def test_wrong_arrays_are_refused(self):
    encoded = self._encoded()
    good = [np.zeros_like(x) for x in self.given]
    frozen = np.zeros_like(good[1])
    frozen.flags.writeable = False
    for wrong in (
      good[:2],
      [good[0].T.copy(), *good[1:]],
      [np.empty((90, 70), np.float16).T, *good[1:]],
      [good[0].astype(np.int16), *good[1:]],
      [good[0], frozen, good[2]],
    ):
      with self.assertRaises(ValueError):
        coder.decode(encoded.spec, encoded.data, out=wrong)

  def test_numbers_on_a_grid_decode_to_integers(self):
    rng, step = np.random.default_rng(0), np.float32(5 * 2**-10)
    integers = [rng.normal(0, 20, x).astype(np.int8) for x in ((90, 64), (64, 90))]
    integers.append(rng.normal(0, 400, (50, 60)).astype(np.int16))
    given = [x * step for x in integers]
    encoded = coder.encode(given)
    # The first two arrays share a group, and one of them gets numbers.
    dtypes = np.int8, np.float32, np.int16
    out = [np.empty(x.shape, d) for x, d in zip(given, dtypes, strict=True)]
    decoded = coder.decode(encoded.spec, encoded.data, out=out)
    for i, expected in enumerate(given):
      found = decoded[i] * step if i != 1 else decoded[i]
      _assert_same_bits(found, expected)
      grid = encoded.spec.grid(encoded.spec.arrays[i])
      self.assertEqual(grid.unit, step)
      self.assertEqual(grid.integer_dtype, np.int16 if i == 2 else np.int8)
    arrays = list(encoded.spec.arrays)
    arrays[2] = dataclasses.replace(arrays[2], crc32=1)
    wrong = dataclasses.replace(encoded.spec, arrays=tuple(arrays))
    with self.assertRaisesRegex(ValueError, 'array 2 .* checksum differs'):
      coder.decode(wrong, encoded.data, out=out)
    out[2] = np.empty(out[2].shape, np.int8)  # it does not hold the integers
    with self.assertRaisesRegex(ValueError, 'array 2'):
      coder.decode(encoded.spec, encoded.data, out=out)

  def test_from_memory_of_any_kind(self):
    encoded = self._encoded()
    directory = tempfile.TemporaryDirectory()
    self.addCleanup(directory.cleanup)
    path = f'{directory.name}/stream'
    shifted = np.concatenate([np.zeros(1, np.uint8), encoded.data])
    shifted.tofile(path)
    mapped = np.memmap(path, np.uint8, 'r', offset=1)
    for data in (memoryview(encoded.data.tobytes()), shifted[1:], mapped):
      decoded = coder.decode(encoded.spec, data)
      for actual, expected in zip(decoded, self.given, strict=True):
        _assert_same_bits(actual, expected)
        self.assertFalse(np.shares_memory(actual, np.asarray(data)))
        self.assertTrue(actual.flags.writeable)

  def test_threads_do_not_matter(self):
    given = [_normal((40, 300), np.float16, i) for i in range(3)]
    streams = set()
    for count in (1, 2, 5):
      with (
        mock.patch.object(pool, 'threads', lambda count=count: count),
        mock.patch.object(pool, '_pools', {}),
        mock.patch.object(blocks, 'CAPACITY', 4000),
      ):
        encoded = coder.encode(given)
        streams.add((encoded.data.tobytes(), encoded.spec))
        coder.decode(encoded.spec, encoded.data)
    self.assertLen(streams, 1)

  def test_records_side_by_side(self):
    given = [_normal((40, 200), np.float16, i) for i in range(4)]
    records = [coder.encode([array] * 3) for array in given]
    with concurrent.futures.ThreadPoolExecutor(4) as callers:
      results = callers.map(lambda x: coder.decode(x.spec, x.data), records * 4)
      for expected, decoded in zip(given * 4, results, strict=True):
        for actual in decoded:
          _assert_same_bits(actual, expected)


class ScalesTest(parameterized.TestCase):
  """Lines of different scales take as many bytes as if each was coded separately."""

  def _one_scale(self, shape, dtype):
    """Returns the bytes of normal numbers of one scale, averaged over scales."""
    sizes = [
      _round_trip([_normal(shape, dtype, i, 0.05 * 2 ** (i / 4))]) for i in range(4)
    ]
    return np.mean(sizes)

  def test_rows_or_columns_of_different_scale(self):
    for dtype, axis in itertools.product(DTYPES, [0, 1]):
      with self.subTest(dtype=dtype, axis=axis):
        shape = (200, 500) if axis == 0 else (500, 200)
        values = _normal(shape, np.float32)
        octaves = np.random.default_rng(1).standard_normal(200)
        values *= np.expand_dims(2**octaves, 1 - axis).astype(np.float32)
        size = _round_trip([values.astype(dtype)])
        # 200 labels of less than 8 bits, a few tables, and the loss of rounded labels.
        self.assertLess(size, self._one_scale(shape, dtype) + 200 + 400)
        # One table for all numbers would take 0.2 bits more for each number.
        one_table = sum(_modelled(values.astype(dtype)))
        self.assertGreater(one_table - size, 0.1 / 8 * 100_000)

  @parameterized.parameters(np.float16, np.float32)
  def test_rows_and_columns_of_different_scale(self, dtype):
    rng = np.random.default_rng(1)
    octaves = rng.standard_normal((200, 1)) + rng.standard_normal(500)
    values = (_normal((200, 500), np.float32) * 2**octaves).astype(dtype)
    self.assertLess(
      _round_trip([values]), self._one_scale((200, 500), dtype) + 700 + 600
    )

  def test_arrays_of_one_scale_share_a_table(self):
    encoded = coder.encode([_normal((40, 50), np.float16, i) for i in range(50)])
    self.assertLess(sum(x.contexts for x in encoded.spec.groups), 100)

  def test_rows_of_zeros_cost_nothing(self):
    values = _normal((1000, 200), np.float16)
    dense = _round_trip([values[:500]])
    values[1::2] = 0
    rests = 500 * 200
    self.assertLess(_round_trip([values]) - rests, dense + 300)

  def test_other_distributions_have_tables_of_their_own(self):
    values = np.random.default_rng(0).integers(1, 9, (200, 500)).astype(np.float16)
    self.assertLess(_round_trip([values]), 1.01 * 3 / 8 * values.size + 300)

  def test_heavy_tails_cost_no_more_than_with_one_table(self):
    values = np.random.default_rng(0).standard_t(2, (200, 500)).astype(np.float32)
    self.assertLess(_round_trip([values]), 1.002 * sum(_modelled(values)) + 500)

  @parameterized.parameters(300, 1100)
  def test_more_tables_than_a_byte_counts(self, count):
    # A group has `contexts.MAX_TABLES` tables at most.
    rng = np.random.default_rng(0)
    given = [rng.permutation(256)[:4][rng.integers(0, 4, 300)] for _ in range(count)]
    given = [x.astype(np.uint8) for x in given]
    self.assertLess(_round_trip(given), count * (300 / 4 + 30) + 300)
    self.assertLen(coder.encode(given).spec.groups, -(-count // 255))


class IntegersTest(parameterized.TestCase):
  def _entropy(self, values):
    _, counts = np.unique(values, return_counts=True)
    return tables.entropy_bits(counts) / 8

  def test_come_near_their_entropy(self):
    for dtype, deviation in ((np.int8, 0.8), *((dtype, 25) for dtype in INTEGERS)):
      with self.subTest(dtype=dtype, deviation=deviation):
        centre = 120 if np.dtype(dtype).kind == 'u' else 0
        values = np.round(_normal((200, 500), float, scale=deviation) + centre)
        values = values.astype(dtype)
        self.assertLess(_round_trip([values]), 1.005 * self._entropy(values) + 250)

  def test_weights_with_structural_zeros(self):
    values = np.round(_normal((200, 500), float, scale=25)).astype(np.int8)
    values[np.random.default_rng(1).random(values.shape) < 0.6] = 0
    self.assertLess(_round_trip([values]), 1.005 * self._entropy(values) + 250)

  def test_columns_of_different_scale(self):
    values = _normal((500, 200), float, scale=2.0 ** np.linspace(1, 5, 200))
    values = np.round(values).astype(np.int8)
    entropy = sum(self._entropy(values[:, i]) for i in range(200))
    # The entropy of only 500 numbers is too small, by about half a bit a symbol.
    self.assertLess(_round_trip([values]), 1.02 * entropy + 500)

  @parameterized.parameters(np.int16, np.uint16)
  def test_wide_ones_leave_noise_aside(self, dtype):
    values = _normal((200, 500), float, scale=2000)
    values = np.abs(values) if dtype == np.uint16 else values
    ideal = math.log2(2000 * math.sqrt(2 * math.pi * math.e)) / 8 * values.size
    ideal -= values.size / 8 if dtype == np.uint16 else 0
    self.assertLess(_round_trip([np.round(values).astype(dtype)]), 1.005 * ideal + 500)

  def test_noise_and_few_numbers_cost_no_more_than_they_hold(self):
    for dtype in INTEGERS:
      with self.subTest(dtype=dtype):
        info = np.iinfo(dtype)
        noise = np.random.default_rng(0).integers(info.min, info.max + 1, 50_000)
        self.assertEqual(_round_trip([noise.astype(dtype)]), 50_000 * info.bits // 8)
        few = np.array([info.min, info.max, 0, 1], dtype)
        self.assertEqual(_round_trip([few]), few.nbytes)

  def test_extremes(self):
    for dtype in INTEGERS:
      with self.subTest(dtype=dtype):
        values = np.zeros((50, 80), dtype)
        values[3, 4:6] = np.iinfo(dtype).min, np.iinfo(dtype).max
        size = _round_trip([values])
        self.assertLess(size, 300 + 4000 * (np.iinfo(dtype).bits - 8) // 32)

  def test_as_many_symbols_as_a_table_has_slots(self):
    # Half of the rows are zeros, so that nearly all others have symbols of their own.
    values = np.zeros((512, 512), np.int16)
    values[::2] = np.random.default_rng(0).integers(-(2**13), 2**13, (256, 512))
    self.assertLess(_round_trip([values]), 0.5 * values.nbytes)

  @parameterized.parameters(2**8.2, 2**11.6)
  def test_multiples_of_a_fine_step_cost_their_entropy(self, deviation):
    whole = np.round(_normal((500, 1000), float, scale=deviation))
    values = np.float32(whole * 5 / 1024) + np.float32(0)  # no -0
    ideal = math.log2(deviation * math.sqrt(2 * math.pi * math.e)) / 8 * values.size
    self.assertLess(_round_trip([values]), 1.002 * ideal)

  def test_rare_outliers_are_rare_symbols(self):
    values = np.round(_normal((200, 500), float, scale=2)).astype(np.int16)
    values[::50, 7] = 8000
    self.assertLess(_round_trip([values]), 1.005 * self._entropy(values) + 250)


class DamageTest(absltest.TestCase):
  """A damaged file is decoded correctly or raises ValueError, in little memory."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    scaled = _normal((200, 200), np.float32) * 2 ** np.linspace(0, 4, 200)[:, None]
    scaled[:5] = 0
    pruned = _normal((90, 60), np.float32)
    pruned[np.random.default_rng(1).random(pruned.shape) < 0.8] = 0
    cls.given = [
      scaled.astype(np.float16),
      np.ones(300, np.float16),
      _normal((50, 40), np.float32),
      np.arange(5),
      np.round(_normal((40, 40), float, scale=9)).astype(np.int8),
      pruned,
      np.float32(np.round(_normal((40, 40), float, scale=30)) + 0.0),
    ]
    encoded = coder.encode(cls.given)
    forms = {type(x.form).__name__ for x in encoded.spec.arrays}
    assert forms == {'NoneType', 'Halves', 'Codebook', 'Uniform'}
    cls.value, cls.data = _dump(encoded.spec), encoded.data
    cls.expected = [x.tobytes() for x in cls.given]

  def _check(self, value, data):
    """Returns whether a file is refused; if it is not, its arrays must be right."""
    try:
      decoded = coder.decode(_load(value), data)
    except ValueError:
      return True
    self.assertEqual([x.tobytes() for x in decoded], self.expected)
    return False

  def test_flipped_bits(self):
    rng = np.random.default_rng(0)
    head = sum(group[3] for group in self.value['groups'])
    positions = [*range(head), *rng.integers(head, self.data.size, 100)]
    refused = 0
    for position in positions:
      damaged = self.data.copy()
      damaged[position] ^= 1 << rng.integers(0, 8)
      refused += self._check(self.value, damaged)
    # Some bits have no meaning: at the ends of streams, and where two scale buckets
    # share a table.
    self.assertGreater(refused, 0.97 * len(positions))

  def test_missing_bytes(self):
    for size in (0, 1, self.data.size // 2, self.data.size - 1):
      with self.assertRaisesRegex(ValueError, 'stream'):
        coder.decode(_load(self.value), self.data[:size])
    longer = np.append(self.data, np.uint8(0))
    for wrong in (longer, self.data[None], self.data.view(np.int8), self.data > 0):
      with self.assertRaisesRegex(ValueError, 'stream'):
        coder.decode(_load(self.value), wrong)

  def test_other_numbers_under_right_sizes(self):
    for data in (np.zeros_like(self.data), ~self.data, self.data[::-1].copy()):
      self.assertTrue(self._check(self.value, data))

  def test_a_checksum_names_its_array(self):
    for i, array in enumerate(self.value['arrays']):
      value = copy.deepcopy(self.value)
      value['arrays'][i][2] = array[2] ^ 1
      with self.assertRaisesRegex(ValueError, f'array {i} '):
        coder.decode(_load(value), self.data)

  def _paths(self, value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in items:
      if isinstance(part, list | dict):
        yield from self._paths(part, (*path, key))
      else:
        yield (*path, key)

  def _changed(self, value, path, new):
    if not path:
      return new
    value = copy.copy(value)  # the whole of it is slow to copy
    value[path[0]] = self._changed(value[path[0]], path[1:], new)
    return value

  def test_every_field_changed(self):
    tracemalloc.start()
    self.addCleanup(tracemalloc.stop)
    paths = list(self._paths(self.value))
    self.assertGreater(len(paths), 80)
    accepted = []
    for path in paths:
      old = self.value
      for key in path:
        old = old[key]
      others = [-1, 0, 1, 1 << 20, 1 << 33, 1 << 62, 1 << 70, 1.5, True, None, 'x']
      others += ['float64', [], {}, [[]], [0] * 5, [1 << 40]]
      if isinstance(old, list):
        others += [old[:-1], old + old[-1:], [None, *old]]
      elif type(old) is int:
        others += [old + 1, old - 1]
      for new in others:
        if new == old and type(new) is type(old):
          continue
        if not self._check(self._changed(self.value, path, new), self.data):
          accepted.append((path, new))
    # Integers of 8 bits may be decoded to 16 bits first.
    wider = [(('arrays', i, 4, 1), 2) for i in (1, 6)]
    self.assertContainsSubset(accepted, wider)
    self.assertLess(tracemalloc.get_traced_memory()[1], 100e6)

  def test_groups_are_bounded(self):
    value = {
      'arrays': [['float16', [16], 0, [i], None, None] for i in range(300)],
      'groups': [['float', 8, 1, 20, 1, 16, [20]]] * 300,
    }
    with self.assertRaisesRegex(ValueError, '300 groups are too many'):
      _load(value)

  def test_codebooks_are_bounded(self):
    for others, values in ((1 << 26, 1), (0, 4096)):
      codebook = ['all', values, False, others, False]
      value = {
        'arrays': [['uint8', [1], 0, [None, None, None, None], None, codebook]],
        'groups': [],
      }
      with self.assertRaisesRegex(ValueError, 'more values than the array has'):
        _load(value)

  def test_the_tables_of_few_groups_are_in_memory_at_once(self):
    values = np.round(_normal((200, 500), float, scale=25)).astype(np.int16)
    arrays = [values, values + np.int16(1), values - np.int16(1)]
    with mock.patch.object(streams, '_fits', return_value=False):
      encoded = coder.encode(arrays)
    self.assertLen(encoded.spec.groups, 3)
    made, most = [], []
    read = streams._Group.read

    def counted(*args):
      group = read(*args)
      made.append(weakref.ref(group.contexts.frequencies))
      most.append(sum(x() is not None for x in made))
      return group

    with (
      mock.patch.object(streams, '_GROUPS', 1),
      mock.patch.object(streams._Group, 'read', counted),
    ):
      decoded = coder.decode(encoded.spec, encoded.data)
    self.assertLessEqual(max(most), 2)
    for actual, expected in zip(decoded, arrays, strict=True):
      _assert_same_bits(actual, expected)

  def test_arrays_of_many_layouts_are_stored(self):
    rng = np.random.default_rng(0)
    # Smaller arrays of integers share their layouts.
    normal = [rng.standard_normal(16_400) * 2.0**i for i in range(22)]
    arrays = [np.rint(abs(x)).astype(d) for x in normal for d in (np.int32, np.uint32)]
    encoded = coder.encode(arrays)
    self.assertBetween(len(encoded.spec.groups), 20, 21)  # of 32 layouts
    decoded = coder.decode(encoded.spec, encoded.data)
    for actual, expected in zip(decoded, arrays, strict=True):
      _assert_same_bits(actual, expected)

  def test_huge_arrays_are_refused_before_they_are_allocated(self):
    for dtype, shape, group in (
      ('float16', [1 << 20, 1 << 20], 0),
      ('float64', [1 << 40], None),
      ('float64', [0, 1 << 70], None),
      ('float64', [1] * 65, None),
    ):
      with self.subTest(dtype=dtype, shape=shape, group=group):
        value = {
          'arrays': [[dtype, shape, 0, [group], None, None]],
          'groups': [['float', 8, 1, 20, 1, 10, [20]]] if group == 0 else [],
        }
        with self.assertRaises(ValueError):
          coder.decode(_load(value), np.zeros(40, np.uint8))


class FormatTest(parameterized.TestCase):
  def test_golden_record(self):
    """This record must stay readable, unless the version of the format changes."""
    i = np.arange(1200)
    whole = (i * i % 1009 % 5 * (i % 7 < 3)).astype(np.int8).reshape(20, 60)
    powers = np.where(i * i % 7 > 2, -1, 1) * 2.0 ** (i // 30 % 4 - i % 3)
    given = [whole, powers.astype(np.float16).reshape(40, 30)]
    spec = _load(json.loads(GOLDEN_SPEC))
    data = np.frombuffer(base64.b85decode(GOLDEN_STREAM), np.uint8)
    for actual, expected in zip(coder.decode(spec, data), given, strict=True):
      _assert_same_bits(actual, expected)


GOLDEN_SPEC = (
  '{"arrays":[["int8",[20,60],3063479529,[0],null,null],["float16",[40,30],566126'
  '355,[0],[592,1],null]],"groups":[["int",0,1,93,1,2400,[376]]]}'
)
GOLDEN_STREAM = (
  'b7X)376t|eMg~SsK}lk;ASWXp1OThAudlCX7zJbl0C?JCWa=+uX6Y|v=XfK+FVJ5ouV8!F-r<c10|y'
  'sF7{hCZ1cp!s1|eMt7Suy!YcsF{AqxX50RPttx3&NP0096N5d{DM03UoL5{W%Fc+XRK4{@5V^d|vgE'
  'Af0qcvYNd_Lp8C8Cm%M-QB~I?=v-F$sAfOAZGu}M51h6WYcqJAUi7SAs%3%r6e2aSQ*x<^=c6TRdTj'
  'gW1*pasBNQp&b2fQwc>6gzcl)jycmn#VRoG8&}0+qXx$vKkl7(J@z*it_x8#tE>hTus#~MMlzKnq5D'
  'KLej(uu=<+RjcqsMio84G+l=&G7Kyed*fJX!TVt66=9OAA9n{M}|P`gp~OYoWqAzwzuqj=SK?`pjZ+'
  'mVF42*t<A3^QrwdcT<EJ<r%S@+(_C)bdK0Q&^9#C%vJ0GZdihGa}t}pwNv{3;%MCFrGpF-e|fwi`;y'
  '0L#i1jRSk3rZ4}k5JdOCN73QE&1ZqW=fa1QjcS#$}CJ>`B_FAETIoYU#!zrgzlGm{sLNn?rq=OMIKL'
  '2KM0M=vEmKfyTk5IVNUb23wkoo6SPO;w~3|HMejdH'
)


if __name__ == '__main__':
  absltest.main()

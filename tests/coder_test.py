"""Records of arrays come back bit for bit, in about as many bytes as their entropy."""

from concurrent import futures
import copy
import itertools
import json
import math
import tracemalloc
from unittest import mock
import zlib

from absl.testing import parameterized
import ml_dtypes
import numpy as np
import pytest

from benchmarks import ideals
from rotbits_jax import pool
from rotbits_jax.coding import blocks
from rotbits_jax.coding import coder
from rotbits_jax.coding import plans
from rotbits_jax.coding import specs
from rotbits_jax.coding import tables
from rotbits_jax.structured import ulps
from rotbits_jax.system import schema

FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16)


def normal(shape, dtype, seed=0, scale=0.05):
  return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def integers(shape, dtype, scale, seed=0):
  return np.round(normal(shape, float, seed, scale)).astype(dtype)


def noise(size, dtype):
  width = np.dtype(dtype).itemsize
  return np.frombuffer(np.random.default_rng(0).bytes(size * width), dtype)


def pruned(share, dtype=ml_dtypes.bfloat16, shape=(400, 500)):
  array = normal(shape, dtype)
  array[np.random.default_rng(1).random(shape) < share] = 0
  return array


def same_bits(actual, expected):
  assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
  assert actual.tobytes() == expected.tobytes()


def load(value):
  return schema.load(specs.StreamSpec, value)


def dump(spec):
  return json.loads(json.dumps(schema.dump(spec)))


def round_trip(arrays, known=None):
  """Encodes and decodes arrays, and returns the length of the stream."""
  known = known or {}
  encoded = coder.encode(arrays, known)
  assert load(dump(encoded.spec)) == encoded.spec
  assert encoded.data.shape == (encoded.spec.nbytes,)
  later = {i: lambda x=x: x.bits for i, x in known.items()}
  decoded = coder.decode(encoded.spec, encoded.data, known=later)
  for actual, expected in zip(decoded, arrays, strict=True):
    same_bits(actual, np.asarray(expected))
  return encoded.data.size


def entropy(values):
  """Returns the bytes of the entropy of integers."""
  return tables.entropy_bits(np.unique(values, return_counts=True)[1]) / 8


def modelled(values):
  """Returns the bytes of the entropy of the bins of floats, and of their raw bits."""
  form = ulps.FORMATS[values.dtype]
  bits = values.reshape(-1).view(f'i{values.itemsize}')
  bins = (bits & np.iinfo(bits.dtype).max) >> form.nmant - 1
  return entropy(bins) + values.size * form.nmant / 8


def gaussian(deviation):
  """Returns the bytes of the entropy of a rounded normal number."""
  return math.log2(deviation * math.sqrt(2 * math.pi * math.e)) / 8


def cauchy(shape, dtype, seed=0):
  with np.errstate(over='ignore'):
    return np.random.default_rng(seed).standard_cauchy(shape).astype(dtype)


SPECIAL = [np.nan, np.inf, -np.inf, -0.0, 1e-8, 6e4]
RECORDS = {
  'nothing': [],
  'nothing in an array': [np.zeros((0, 3), np.float16)],
  'few elements': [np.arange(20), np.array([True, False]), np.zeros(3), np.int8([1])],
  'all dtypes': [
    *(normal((60, 100), x) for x in ulps.FORMATS),
    *(integers((60, 100), x, 20) for x in (np.int8, np.int16, np.int32)),
    *(np.abs(integers((60, 100), x, 20)) for x in (np.uint8, np.uint16, np.uint32)),
    *(normal((60, 100), np.float64), np.arange(9000), -np.arange(9000)),
  ],
  'any order': [
    *(normal((90, 110), x, scale=25)[::2, :2:-1] for x in (*FLOATS, *INTEGERS)),
    normal((90, 110), np.float16).T,
    np.broadcast_to(normal(110, np.float16), (9, 110)),
  ],
  'extremes': [
    np.array([[np.iinfo(x).min, np.iinfo(x).max] * 40, [0] * 80], x)
    for x in (*INTEGERS, np.int32, np.uint32)
  ],
  'a wide alphabet': [
    integers((512, 512), np.int16, 4000)
    * (np.arange(512) % 2).astype(np.int16)[:, None]
  ],
  'a lane longer than others': [
    normal((4096, 64), np.float16) * (np.arange(64) % 2).astype(np.float16)
  ],
  'unaligned memory': [normal((1 << 22) + i, np.float32)[13:] for i in (13, 76)],
  'short axes': [
    *(normal((900, n), x) for n in (1, 2, 3) for x in FLOATS),
    *(normal(shape, np.float16) for shape in ((1, 900), (30, 40, 3), (30, 40, 1))),
    *(cauchy((30, 40, n), np.float32) for n in (1, 2, 3)),
  ],
  'columns without scales': [normal((2, (1 << 20) + 2), np.float16) * [[1], [9]]],
  'zeros': [pruned(x) for x in (0.01, 0.5, 0.99)]
  + [pruned(0.5, np.int16), pruned(0.5, np.float32, (5000,))],
} | {
  f'{np.dtype(x).name} {name}': arrays
  for x in FLOATS
  for name, arrays in {
    'of many shapes': [
      normal(shape, x, i)
      for i, shape in enumerate([(100, 300), (7,), (0, 3), (), (1, 1), (2, 3, 4)])
    ],
    'special': [np.array([SPECIAL * 3000]).astype(x), np.array(SPECIAL, x)],
    'heavy tails': [
      *(cauchy(shape, x) for shape in ((99, 101), (40, 30, 9), (5001,))),
      np.abs(cauchy((99, 100), x)),
      np.where(cauchy((99, 100), x) > 9, np.nan, cauchy((99, 100), x, 1)).astype(x),
    ],
    'every pattern': [
      (np.arange(1 << 16) << 8 * (np.dtype(x).itemsize - 2))
      .astype(f'u{np.dtype(x).itemsize}')
      .view(x)
    ],
  }.items()
}

ROWS = 2.0 ** normal((200, 1), float, 1, scale=1)
COLUMNS = 2.0 ** normal(250, float, 2, scale=1).repeat(2)  # two share a scale
_WHOLE = normal((200, 500), float)
PRUNED_CODES = integers((200, 500), np.int8, 36) * (normal((200, 500), float, 1) > 0)

_RNG = np.random.default_rng(0)
DISTRIBUTIONS = {
  'squares': _WHOLE**2,
  'fourth powers': _WHOLE**4,
  'two sizes': _WHOLE * _RNG.choice([1, 1e-20], (200, 500)),
  'lognormal': np.exp(6 * _RNG.normal(size=(200, 500))),
  'Cauchy': cauchy((200, 500), float),
  'alternating columns': _WHOLE * np.where(np.arange(500) % 2, 1, 1e-3),
  'channels': _WHOLE.reshape(50, 40, 50, 1) * np.exp(_RNG.normal(size=(50, 1, 1, 1))),
  'short axis': _WHOLE.reshape(50, 500, 4) * np.exp(_RNG.normal(size=(50, 1, 1))),
}


def ideal_bytes(array):
  """Returns the bytes that an array may take: 1% above its ideal, and its tables."""
  return 1.01 * ideals.bits(array) / 8 + 300


# Arrays, and a bound of the bytes of their stream.
RATES = {
  **{
    f'{np.dtype(x).name}': ([normal(500_000, x)], 1.002 * modelled(normal(500_000, x)))
    for x in FLOATS
  },
  **{
    f'scales of {name}, {np.dtype(x).name}': (
      [(_WHOLE * scale).astype(x)],
      # The scales, a few tables, and the loss of rounded scales.
      modelled(_WHOLE.astype(x)) + lines + 800,
    )
    for x in (ml_dtypes.bfloat16, np.float32)
    for name, scale, lines in (
      ('rows', ROWS, 200),
      ('columns', COLUMNS, 500),
      ('both', ROWS * COLUMNS, 700),
    )
  },
  'heavy tails': (
    [np.random.default_rng(0).standard_t(2, (200, 500)).astype(np.float32)],
    1.002
    * modelled(np.random.default_rng(0).standard_t(2, (200, 500)).astype(np.float32))
    + 500,
  ),
  **{
    f'{name}, {np.dtype(x).name}': ([values.astype(x)], ideal_bytes(values.astype(x)))
    for name, values in DISTRIBUTIONS.items()
    for x in (ml_dtypes.bfloat16, np.float32)
  },
  'noise': ([noise(50_000, np.float16), noise(50_000, np.int8)], 150_000),
  'half of the elements': ([pruned(0.5)], 200_000 / 8 + 100_000 * 1.32 + 500),
  'half of the codes': ([PRUNED_CODES], 1.01 * entropy(PRUNED_CODES) + 250),
  'wide integers': ([integers((200, 500), np.int16, 2000)], 1.005e5 * gaussian(2000)),
  'integers of columns': (
    [integers((500, 200), np.int8, 2.0 ** np.linspace(1, 5, 200))],
    1.02e5 * np.mean([gaussian(2.0**x) for x in np.linspace(1, 5, 200)]),
  ),
  'bytes': (
    [np.uint8(120 + integers((200, 500), int, 25))],
    1.005 * entropy(integers((200, 500), int, 25)) + 250,
  ),
}


def near(array, size, seed=0):
  """Returns known numbers that differ from an array by numbers of a size."""
  rng, known = np.random.default_rng(seed), np.asarray(array, np.float64)
  known = (known + size * rng.normal(size=array.shape)).astype(array.dtype)
  form = ulps.FORMATS.get(array.dtype)
  ulp = 2.0 ** float(form.minexp - form.nmant) if form else 1
  line = np.array([int(4 * np.log2(0.7 * size / ulp)) + 4 * bool(form)])
  return plans.Known(
    known.reshape(-1).view(f'u{array.itemsize}'), (line, np.zeros(1, int))
  )


class RecordsTest(parameterized.TestCase):
  @parameterized.named_parameters((x, RECORDS[x]) for x in RECORDS)
  def test_comes_back(self, arrays):
    round_trip(arrays)

  @parameterized.named_parameters((x, *RATES[x]) for x in RATES)
  def test_rate(self, arrays, bound):
    size = round_trip(arrays)
    self.assertLess(size, bound + 1)
    nbytes = sum(x.nbytes for x in arrays)
    self.assertLessEqual(size, nbytes)
    self.assertLess(abs(coder.estimate(arrays) - size), 0.01 * nbytes + 500)

  def test_known_numbers(self):
    rng = np.random.default_rng(0)
    for dtype in (np.int16, np.int32):
      array = rng.integers(-100, 100, 300_001).astype(dtype)
      for size in (0.1, 1, 6, 300):
        known = near(array, size)
        off = array - known.bits.view(dtype)
        nbytes = round_trip([array], {0: known})
        self.assertLess(nbytes, 1.02 * entropy(off) + 1500)
    for dtype in ulps.FORMATS:
      array = normal((301, 77), dtype)
      array[0, : len(SPECIAL)] = np.array(SPECIAL).astype(dtype)
      for size in (1e-9, 1e-4, 1e-2):
        known = near(array, size)
        estimate = coder.estimate([array], {0: known})
        nbytes = round_trip([array, array], dict.fromkeys((0, 1), known))
        self.assertLess(abs(2 * estimate - nbytes), 0.02 * array.nbytes + 500)
        self.assertLess(nbytes, round_trip([array, array]))

  def test_known_numbers_come_last(self):
    both = [normal((70, 90), np.float16), normal(9000, np.float32)]
    known = near(both[1], 1e-3)
    encoded = coder.encode(both, {1: known})
    out, seen = [np.zeros_like(x) for x in both], []

    def later():
      seen.append(out[0].copy())
      return known.bits

    coder.decode(encoded.spec, encoded.data, out=out, known={1: later})
    for actual, expected in zip(out, both, strict=True):
      same_bits(actual, expected)
    same_bits(seen[0], both[0])
    for functions in ({1: lambda: known.bits[:9]}, {1: lambda: ~known.bits}, {}):
      with self.assertRaises(ValueError):
        coder.decode(encoded.spec, encoded.data, known=functions)

  def test_into_given_arrays(self):
    arrays = [normal((70, 90), np.float16), np.arange(7), normal(9000, np.float32)]
    encoded = coder.encode(arrays)
    stacks = [np.zeros((3, *x.shape), x.dtype) for x in arrays]
    coder.decode(encoded.spec, encoded.data, out=[stack[1] for stack in stacks])
    for stack, expected in zip(stacks, arrays, strict=True):
      same_bits(stack[1], expected)
      self.assertFalse(stack[::2].any())

  def test_threads_do_not_matter(self):
    arrays, streams = [normal((40, 300), np.float16, i) for i in range(3)], set()
    for count in (1, 2, 5):
      with (
        mock.patch.object(pool, 'threads', lambda count=count: count),
        mock.patch.object(pool, '_POOL', futures.ThreadPoolExecutor(5, '', pool._set)),
        mock.patch.object(blocks, 'CAPACITY', 4000),
      ):
        round_trip(arrays)
        encoded = coder.encode(arrays)
        self.assertGreater(len(encoded.spec.groups[0].blocks), 1)
        streams.add((encoded.data.tobytes(), encoded.spec))
    self.assertLen(streams, 1)


@pytest.mark.parametrize('dtype', [np.uint8, np.float16, np.float32, np.float64])
def test_arrays_in_any_memory_come_back(dtype):
  array = (normal((3, (1 << 19) + 96), np.float16) * 50).astype(dtype)
  for offset in (1, 2, 8, 24, 31, 40, 63):
    memory = np.empty(array.nbytes + 2 * 64, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    given = memory[start : start + array.nbytes].view(dtype).reshape(array.shape)
    given[...] = array
    round_trip([given])


class DamageTest(parameterized.TestCase):
  """A damaged stream is decoded correctly or raises ValueError, in little memory."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    scaled = normal((200, 200), np.float32) * 2 ** np.linspace(0, 4, 200)[:, None]
    array = normal((30, 101), ml_dtypes.bfloat16)
    cls.known = near(array, 1e-3)
    cls.arrays = [
      scaled.astype(np.float16),
      np.ones(300, np.float16),
      normal((50, 40), np.float32),
      np.arange(5000),
      integers((40, 40), np.int8, 9),
      -pruned(0.8, np.float32, (90, 60)),
      array,
      cauchy((90, 100), np.float16),
      (cauchy((30, 20, 9), np.float32) ** 2) * ROWS[:30, :, None] ** 3,
    ]
    encoded = coder.encode(cls.arrays, {6: cls.known})
    assert [len(x.parts) for x in encoded.spec.arrays] == [1, 1, 1, 1, 1, 3, 1, 1, 1]
    types = {group.type_name for group in encoded.spec.groups}
    assert types >= {'floats', 'singles', 'positive'}, types
    cls.value, cls.data = dump(encoded.spec), encoded.data
    cls.expected = [x.tobytes() for x in cls.arrays]

  def check(self, value, data):
    """Returns whether a stream is refused; if it is not, its arrays must be right."""
    try:
      decoded = coder.decode(load(value), data, known={6: lambda: self.known.bits})
    except ValueError:
      return True
    self.assertEqual([x.tobytes() for x in decoded], self.expected)
    return False

  def test_flipped_bits(self):
    self.assertFalse(self.check(self.value, self.data))
    rng = np.random.default_rng(0)
    head = sum(group[2] for group in self.value['groups'])
    places = [*range(0, head, 3), *rng.integers(head, self.data.size, 100)]
    refused = 0
    for place in places:
      damaged = self.data.copy()
      damaged[place] ^= 1 << rng.integers(0, 8)
      refused += self.check(self.value, damaged)
    # Some bits have no meaning: at ends of streams, in counts of bins of which no
    # product changes, and in what is said of classes that do not occur.
    self.assertGreater(refused, 0.9 * len(places))

  def test_other_bytes(self):
    for data in (np.zeros_like(self.data), ~self.data, self.data[::-1].copy()):
      self.assertTrue(self.check(self.value, data))
    longer = np.append(self.data, np.uint8(0))
    for wrong in (self.data[:-1], longer, self.data[None], self.data.view(np.int8)):
      with self.assertRaisesRegex(ValueError, 'stream'):
        coder.decode(load(self.value), wrong)

  def _paths(self, value, path=()):
    yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
      if isinstance(part, list | dict):
        yield from self._paths(part, (*path, key))
      else:
        yield (*path, key)

  def _changed(self, value, path, new):
    if not path:
      return new
    value = copy.copy(value)
    value[path[0]] = self._changed(value[path[0]], path[1:], new)
    return value

  def test_every_field_changed(self):
    tracemalloc.start()
    self.addCleanup(tracemalloc.stop)
    for path in self._paths(self.value):
      old = self.value
      for key in path:
        old = old[key]
      others = [-1, 0, 1 << 20, 1 << 62, 1 << 70, 1.5, True, None, 'x', 'float64', {}]
      others += [[[]], [0] * 5, [1 << 40]]
      if isinstance(old, list):
        others += [old[:-1], old + old[-1:], [None, *old]]
      elif type(old) is int:
        others += [old + 1, old - 1]
      for new in others:
        if new != old or type(new) is not type(old):
          self.check(self._changed(self.value, path, new), self.data)
    self.assertLess(tracemalloc.get_traced_memory()[1], 150e6)

  @parameterized.parameters(
    ('float16', [1 << 20, 1 << 20], 0, None),
    ('float64', [1 << 40], None, None),
    ('float64', [0, 1 << 70], None, None),
    ('float64', [1] * 65, None, None),
    ('float16', [4], None, 5),
  )
  def test_huge_arrays_are_refused_before_they_are_allocated(
    self, dtype, shape, group, nonzeros
  ):
    groups = [group] * (3 if nonzeros else 1)
    value = {
      'arrays': [[dtype, shape, 0, groups, nonzeros]],
      'groups': [['floats', 8, 20, [200]]] if group == 0 else [],
    }
    with self.assertRaises(ValueError):
      coder.decode(load(value), np.zeros(40, np.uint8))

  def test_groups_and_blocks_are_bounded(self):
    many = {
      'arrays': [['float16', [16], 0, [i], None] for i in range(300)],
      'groups': [['floats', 8, 20, [200]]] * 300,
    }
    small = dump(coder.encode([normal((600, 1000), np.float16)]).spec)
    small['groups'][0][3:] = [[200] * 600]
    for value in (many, small):
      with self.assertRaisesRegex(ValueError, 'too many|600 blocks'):
        load(value)


def test_equal_elements_take_fewer_bytes_than_plain_ones():
  for dtype, size in itertools.product(FLOATS, (384, 1024, 5000)):
    for number in (0, -0.0, 1, 0.37):
      array = np.full(size, number, dtype)
      assert round_trip([array]) < array.nbytes, (dtype, size, number)


def test_damage_names_the_array():
  arrays = [cauchy((40, 50), np.float16), cauchy((40, 50), np.float32) ** 2]
  encoded = coder.encode(arrays)
  assert {x.type_name for x in encoded.spec.groups} == {'singles', 'positive'}
  ends = np.cumsum([x.contexts + sum(x.blocks) for x in encoded.spec.groups])
  for end in ends:
    damaged = encoded.data.copy()
    damaged[end - 50] ^= 1  # a raw bit
    with pytest.raises(ValueError, match=r'array [01] of the record is damaged'):
      coder.decode(encoded.spec, damaged)


def test_golden_record():
  """This record must stay readable, unless the version of the format changes."""
  i = np.arange(4800)
  whole = (i * i % 1009 % 5 * (i % 7 < 3)).astype(np.int8).reshape(40, 120)
  powers = np.where(i * i % 7 > 2, -1, 1) * 2.0 ** (i // 30 % 4 - i % 3)
  given = [whole, powers.astype(np.float16).reshape(80, 60), powers * (i % 3 > 0)]
  given[2] = given[2].astype(np.float32)
  known = powers.astype(np.float16)
  given.append((powers * (1 + (i * i % 101 - 50) / 2000)).astype(np.float16))
  lines = np.full(1, 4 * 18), np.zeros(1, int)
  encoded = coder.encode(given, {3: plans.Known(known.view(np.uint16), lines)})
  spec = json.dumps(dump(encoded.spec), separators=(',', ':'))
  assert zlib.crc32(encoded.data) == GOLDEN[0], zlib.crc32(encoded.data)
  assert zlib.crc32(spec.encode()) == GOLDEN[1], zlib.crc32(spec.encode())


GOLDEN = 2753588296, 101135034

"""The order of rows is coded for free, exactly, ties included."""

import collections
import math

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax.coding import arrays
from rotbits_jax.coding import bits_back
from rotbits_jax.coding import codecs
from rotbits_jax.coding import permutation
from rotbits_jax.coding import rans
from tests import codec_checks


def _starts(*sizes: int) -> jax.Array:
  """Blocks of the given sizes, as the first place of each place's block."""
  return jnp.asarray(np.repeat(np.cumsum([0, *sizes[:-1]]), sizes), jnp.int32)


def _log2_factorial(n: int) -> float:
  return math.lgamma(n + 1) / math.log(2)


class UniformTest(parameterized.TestCase):
  @parameterized.parameters(((), 1), ((30,), 4), ((1, 7, 2), 2))
  def test_is_exact(self, sizes, lanes):
    starts = _starts(*sizes) if sizes else jnp.zeros(0, jnp.int32)
    rng = np.random.default_rng(len(sizes))
    blocks = [
      rng.permutation(n) + s for n, s in zip(sizes, np.unique(starts), strict=True)
    ]
    symbol = jnp.asarray(np.concatenate([[], *blocks]), jnp.int32)
    message = codec_checks.random_message(0, lanes, 60)
    sampled = codec_checks.check_codec(permutation.uniform(starts), symbol, message)
    np.testing.assert_array_equal(starts[sampled], starts)
    self.assertLen(set(sampled.tolist()), starts.size)

  def test_all_permutations_are_alike(self):
    pop = jax.jit(permutation.uniform(jnp.zeros(4, jnp.int32)).pop)
    message = codec_checks.random_message(0, 8, 400)
    counts = collections.Counter()
    for _ in range(2400):
      message, sample = pop(message)
      counts[tuple(sample.tolist())] += 1
    rans.check(message)
    self.assertLen(counts, 24)
    chi_square = sum((c - 100) ** 2 / 100 for c in counts.values())
    self.assertLess(chi_square, 50)  # 23 degrees of freedom: p = 0.001

  @parameterized.parameters(300, 6000)
  def test_takes_the_logarithm_of_the_factorial(self, n):
    codec = permutation.uniform(jnp.zeros(n, jnp.int32))
    message = codec_checks.random_message(n, 64, n // 50 + 20)
    rest, sample = jax.jit(codec.pop)(message)
    taken = rans.content_bits(message) - rans.content_bits(rans.check(rest))
    self.assertAlmostEqual(taken / _log2_factorial(n), 1, delta=2e-3)
    codec_checks.assert_same_message(jax.jit(codec.push)(rest, sample), message)

  def test_choices_among_many(self):
    sizes = np.array([1, 2, 4096, 4097, 65536, 65537, 70001, (1 << 28) - 1, 1 << 28])
    codec = permutation._two_digits(jnp.asarray(sizes, jnp.uint32))
    message = codec_checks.random_message(0, 2, 20)
    for symbol in (sizes - 1, sizes // 2, 0 * sizes):
      symbol = jnp.asarray(symbol, jnp.uint32)
      sampled = codec_checks.check_codec(codec, symbol, message)
      self.assertTrue((np.asarray(sampled) < sizes).all())


class ArrangementsTest(parameterized.TestCase):
  @parameterized.parameters(((3, 1, 4, 1, 1), 3))
  def test_is_exact(self, sizes, lanes):
    starts = _starts(*sizes)
    codec = permutation.arrangements(starts)
    _, symbol = jax.jit(codec.pop)(codec_checks.random_message(7, lanes, 60))
    message = codec_checks.random_message(1, lanes, 60)
    sampled = codec_checks.check_codec(codec, symbol, message)
    for start in np.unique(starts):
      rows = np.asarray(sampled)[np.asarray(starts[sampled]) == start]
      np.testing.assert_array_equal(rows, np.sort(rows))

  def test_takes_the_logarithm_of_the_distinct_orders(self):
    sizes = [100, 1, 1, 40, *[1] * 200]
    codec = permutation.arrangements(_starts(*sizes))
    message = codec_checks.random_message(1, 16, 100)
    rest, _ = jax.jit(codec.pop)(message)
    taken = rans.content_bits(message) - rans.content_bits(rest)
    ideal = _log2_factorial(sum(sizes)) - sum(map(_log2_factorial, sizes))
    self.assertAlmostEqual(taken / ideal, 1, delta=5e-3)


class OrderTest(parameterized.TestCase):
  @parameterized.parameters(np.float16, np.float32, np.uint8, np.int64)
  def test_sorts_by_raw_bits(self, dtype):
    rng = np.random.default_rng(0)
    rows = rng.integers(-2, 3, (200, 3)).astype(dtype)
    order, starts = permutation.canonical_order(rows)
    bits = rows.view(f'u{rows.itemsize}').tolist()
    expected = sorted(range(200), key=lambda i: (bits[i], i))
    self.assertEqual(order.tolist(), expected)
    ordered = [bits[i] for i in expected]
    self.assertEqual(starts.tolist(), [ordered.index(row) for row in ordered])

  @parameterized.parameters((0, 3), (3, 0), (1, 1))
  def test_degenerate_shapes(self, n, columns):
    rows = np.zeros((n, columns), np.float16)
    order, starts = permutation.canonical_order(rows)
    self.assertEqual(order.tolist(), list(range(n)))
    self.assertEqual(starts.tolist(), [0] * n)

  def test_signed_zeros_and_nans_are_what_their_bits_are(self):
    rows = np.array([[-0.0], [np.nan], [0.0], [np.nan]], np.float16)
    order, starts = permutation.canonical_order(rows)
    self.assertEqual(order.tolist(), [2, 1, 3, 0])
    self.assertEqual(starts.tolist(), [0, 1, 1, 3])

  def test_inverse(self):
    p = np.random.default_rng(0).permutation(50)
    np.testing.assert_array_equal(permutation.inverse(jnp.asarray(p)), np.argsort(p))


class BitsBackTest(parameterized.TestCase):
  @parameterized.parameters((60, 2, False), (60, 1, True))
  def test_the_order_of_rows_is_free(self, n, columns, ties):
    rng = np.random.default_rng(n)
    rows = rng.integers(0, 4 if ties else 1 << 16, (n, columns)).astype(np.uint16)
    raw = codecs.uniform(jnp.full(rows.shape, 1 << 16))
    push_raw, pop_raw = jax.jit(raw.push), jax.jit(raw.pop)
    push_order = jax.jit(lambda m, s, x: permutation.arrangements(s).push(m, x))
    pop_order = jax.jit(lambda m, s: permutation.arrangements(s).pop(m))

    def canonical(stored):
      return stored[permutation.canonical_order(stored)[0]]

    def posterior(reference):
      _, starts = permutation.canonical_order(reference)

      def pop(message):
        message, arrangement = pop_order(message, starts)
        return message, reference[np.asarray(arrangement)]

      def push(message, stored):
        order, _ = permutation.canonical_order(stored)
        return push_order(message, starts, permutation.inverse(jnp.asarray(order)))

      return codecs.Codec(push, pop)

    def pop(message):
      message, bits = pop_raw(message)
      return message, np.asarray(bits).astype(np.uint16)

    codec = bits_back.bits_back(
      prior=codecs.Codec(lambda m, x: push_raw(m, jnp.asarray(x)), pop),
      likelihood=lambda stored: codecs.certain(canonical(stored)),
      posterior=posterior,
    )
    message = codec_checks.random_message(1, 4, 60)
    symbol = canonical(rows)
    codec_checks.check_codec(codec, symbol, message, jit=False)
    longer = codec.push(message, symbol)
    cost = rans.content_bits(longer) - rans.content_bits(message)
    _, counts = np.unique(rows, axis=0, return_counts=True)
    free = _log2_factorial(n) - sum(_log2_factorial(int(c)) for c in counts)
    self.assertAlmostEqual(cost, 16 * rows.size - free, delta=0.01 * free + 1)


def _normal(shape, dtype, seed=0, scale=0.05):
  return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def _size(streams):
  return sum(stream.nbytes for stream in streams.values())


def _assert_same_bits(actual, expected):
  assert actual.dtype == expected.dtype
  assert actual.shape == expected.shape
  assert actual.tobytes() == expected.tobytes()


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

"""The order of rows is coded for free and exactly, even if rows are equal."""

import collections
import math

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.coding.bits_back import permutation
from tests import codec_checks


def _starts(*sizes: int) -> jax.Array:
  """Returns, for each place, the first place of its block; blocks have these sizes."""
  return jnp.asarray(np.repeat(np.cumsum([0, *sizes[:-1]]), sizes), jnp.int32)


def _log2_factorial(n: int) -> float:
  return math.lgamma(n + 1) / math.log(2)


class UniformTest(parameterized.TestCase):
  @parameterized.parameters(((), 1), ((1,), 2), ((30,), 4), ((1, 7, 2), 2))
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

    codec = codecs.bits_back(
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


if __name__ == '__main__':
  absltest.main()

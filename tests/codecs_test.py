"""Codecs are exact inverses in both orders, and as short as they should be."""

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from tests import codec_checks


def _every_slot(bits: int) -> rans.Message:
  """Returns a message with one lane for each slot that a symbol can be popped from."""
  return rans.seeded(jnp.arange(1 << bits, dtype=jnp.uint16), 2)._replace(
    size=jnp.ones(1 << bits, jnp.int32)
  )


class UniformTest(absltest.TestCase):
  def test_is_exact(self):
    for shape, lanes in (((40,), 1), ((3, 5), 4), ((2, 3, 4), 7), ((0,), 3)):
      with self.subTest(shape=shape, lanes=lanes):
        rng = np.random.default_rng(lanes)
        sizes = rng.integers(1, 65537, shape)
        sizes.flat[:3] = [1, 65536, 65535]
        codec = codecs.uniform(jnp.asarray(sizes, jnp.uint32))
        symbol = jnp.asarray(rng.integers(0, sizes), jnp.uint32)
        message = codec_checks.random_message(lanes, lanes, 60)
        sampled = codec_checks.check_codec(codec, symbol, message, eager=lanes == 4)
        self.assertTrue((np.asarray(sampled) < sizes).all())

  def test_slots_are_shared_out_evenly(self):
    for size in (1, 2, 3, 1000, 32767, 65535, 65536):
      with self.subTest(size=size):
        codec = codecs.uniform(jnp.full(1 << 16, size, jnp.uint32))
        _, symbols = codec.pop(_every_slot(16))
        counts = np.bincount(np.asarray(symbols), minlength=size)
        self.assertEqual(counts.size, size)
        self.assertLessEqual(abs(counts - 65536 / size).max(), 1)
        self.assertTrue((np.diff(np.asarray(symbols).astype(np.int64)) >= 0).all())

  def test_costs_the_logarithm_of_the_size(self):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 5000, 20000)
    codec = codecs.uniform(jnp.asarray(sizes, jnp.uint32))
    message = codec_checks.random_message(0, 32, 700)
    before = rans.content_bits(message)
    message = codec.push(message, jnp.asarray(rng.integers(0, sizes), jnp.uint32))
    cost = rans.content_bits(rans.check(message)) - before
    self.assertAlmostEqual(cost / np.log2(sizes).sum(), 1, delta=2e-3)


class CategoricalTest(absltest.TestCase):
  def test_is_exact(self):
    for count, alphabet, lanes in ((1, 1, 1), (3, 2, 2), (5, 17, 3), (9, 64, 8)):
      with self.subTest(count=count, alphabet=alphabet, lanes=lanes):
        rng = np.random.default_rng(alphabet)
        counts = rng.integers(0, 50, (count, alphabet)) * rng.integers(0, 2, alphabet)
        counts[:, alphabet // 2] = 1
        frequencies = np.stack([tables.quantize(row) for row in counts])
        contexts = rng.integers(0, count, (6, 7))
        symbol = [rng.choice(np.flatnonzero(frequencies[c])) for c in contexts.flat]
        codec = codecs.categorical(jnp.asarray(contexts), jnp.asarray(frequencies))
        symbol = jnp.asarray(symbol, jnp.uint32).reshape(6, 7)
        message = codec_checks.random_message(count, lanes, 60)
        sampled = codec_checks.check_codec(codec, symbol, message, eager=lanes == 3)
        self.assertTrue((frequencies[contexts, np.asarray(sampled)] > 0).all())

  def test_every_slot_is_its_owner_s(self):
    frequencies = tables.quantize(np.array([0, 5, 0, 0, 90, 1, 1, 0, 300, 0]))[None]
    contexts = jnp.zeros(tables.TOTAL, jnp.uint32)
    codec = codecs.categorical(contexts, jnp.asarray(frequencies))
    _, symbols = codec.pop(_every_slot(tables.PRECISION))
    np.testing.assert_array_equal(symbols, tables.slots(frequencies)[0])


class CombinatorsTest(parameterized.TestCase):
  def test_serial_pops_the_last_first(self):
    low = codecs.uniform(jnp.full(4, 16, jnp.uint32))
    parts = codecs.serial(low, codecs.certain(None), codecs.uniform(jnp.full(3, 7)))
    symbol = jnp.arange(4, dtype=jnp.uint32), None, jnp.arange(3, dtype=jnp.uint32)
    message = codec_checks.random_message(0, 2, 20)
    codec_checks.check_codec(parts, symbol, message)
    rest, _ = codecs.uniform(jnp.full(3, 7)).pop(parts.push(message, symbol))
    np.testing.assert_array_equal(low.pop(rest)[1], symbol[0])

  def test_serial_refuses_another_number_of_symbols(self):
    parts = codecs.serial(codecs.certain(1), codecs.certain(2))
    with self.assertRaises(ValueError):
      parts.push(codec_checks.random_message(0, 2, 20), (1,))


if __name__ == '__main__':
  absltest.main()

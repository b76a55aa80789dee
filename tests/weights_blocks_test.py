"""Blocks are exact for any number of lanes, and damaged blocks are refused."""

import itertools

from absl.testing import absltest
from absl.testing import parameterized
import ml_dtypes
import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.coding import blocks
from rotbits_jax.coding import layouts
from rotbits_jax.coding import statistics


def _example(dtype, count, seed=0):
  """Makes elements as bit patterns, their contexts, a layout and tables."""
  rng = np.random.default_rng(seed)
  contexts = rng.integers(0, 3, count)
  values = (rng.standard_normal(count) * 2.0**contexts).astype(dtype)
  layout = layouts.Float(values.dtype, layouts.Float(values.dtype, 0).most_raw_bits)
  bits = values.view(layout.unsigned)
  # Every symbol can be coded, so that the tables can be used for other elements, too.
  counts = np.ones((3, layout.alphabet), np.int64)
  np.add.at(counts, (contexts, np.asarray(layout.split(bits, 1)[0])), 20)
  return bits, contexts, layout, tables.quantize(counts)


class BlocksTest(parameterized.TestCase):
  def _encode(self, bits, contexts, layout, frequencies, lanes):
    made = blocks.tables_of(frequencies)
    fills = (lambda out, x=x: np.copyto(out, x, 'unsafe') for x in (bits, contexts))
    coded, planes = blocks.encode(*fills, bits.size, lanes, layout, made)
    return coded, np.concatenate(planes), made

  def _decode(self, coded, planes, contexts, layout, made, lanes):
    fill = lambda out: np.copyto(out, contexts, 'unsafe')
    found = np.empty(contexts.size, layout.unsigned)
    write = lambda bits: np.copyto(found, bits)
    blocks.decode(coded, planes, fill, contexts.size, lanes, layout, made, write)
    return found

  def test_any_number_of_lanes(self):
    for dtype, shape in itertools.product(
      [np.float16, ml_dtypes.bfloat16, np.float32],
      [(1, 1), (100, 1), (1000, 7), (5000, 64), (20_000, 64), (70, 64)],
    ):
      with self.subTest(dtype=dtype, shape=shape):
        count, lanes = shape
        bits, contexts, layout, frequencies = _example(dtype, count)
        coded, planes, made = self._encode(bits, contexts, layout, frequencies, lanes)
        self.assertEqual(planes.size, blocks.planes_size(count, layout))
        self.assertLess(planes.size, layout.raw_bits * (count + 8) / 8)
        decoded = self._decode(coded, planes, contexts, layout, made, lanes)
        np.testing.assert_array_equal(decoded, bits)

  def test_a_lane_costs_four_bytes(self):
    sizes = {}
    for lanes in (2, 64):
      bits, contexts, layout, frequencies = _example(np.float16, 30_000)
      sizes[lanes] = self._encode(bits, contexts, layout, frequencies, lanes)[0].size
    self.assertLess((sizes[64] - sizes[2]) / 62, 4.5)

  def test_lanes_are_worth_their_bytes(self):
    for count, nbytes, lanes in (
      (1, 9, 1),
      (8191, 2047, 1),
      (16_384, 0, 2),
      (2000, 8192, 4),
      (1 << 20, 0, 64),
    ):
      with self.subTest(count=count, nbytes=nbytes):
        self.assertEqual(blocks.lanes_for(count, nbytes), lanes)
        self.assertLessEqual(-(-count // lanes), blocks.STEPS)

  def test_bytes_that_are_no_block_are_refused(self):
    bits, contexts, layout, frequencies = _example(np.float16, 900)
    coded, planes, made = self._encode(bits, contexts, layout, frequencies, 4)
    decode = lambda coded: self._decode(coded, planes, contexts, layout, made, 4)
    for size in range(0, coded.size, 7):
      with self.assertRaises(ValueError):
        decode(coded[:size])
    for position in (*range(6), *range(22, 26)):  # the least size, b, and the sizes
      damaged = coded.copy()
      damaged[position] ^= 64
      with self.assertRaises(ValueError):
        decode(damaged)

  @parameterized.parameters(10, 40_000)
  def test_symbols_are_counted_in_their_buckets(self, count):
    bits, buckets, layout, _ = _example(np.float16, count)
    fills = (lambda out, x=x: np.copyto(out, x, 'unsafe') for x in (bits, buckets))
    shape = 3, layout.alphabet
    expected = np.zeros(shape, np.int64)
    np.add.at(expected, (buckets, np.asarray(layout.split(bits, 1)[0])), 1)
    found = statistics.histogram(*fills, count, shape, layout)
    np.testing.assert_array_equal(found, expected)


if __name__ == '__main__':
  absltest.main()

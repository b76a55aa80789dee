"""Bits of noise choose the order of lines, and come back from the order."""

import math
import tracemalloc

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from rotbits_jax.coding.bits_back import permutation
from rotbits_jax.coding.weights import order


def _sort(lines):
  return order.sort(lines[:, :8], lambda rows: lines[rows])


class SortTest(parameterized.TestCase):
  @parameterized.parameters((1, 5), (300, 1), (300, 3), (300, 8), (300, 20), (2, 0))
  def test_is_lexicographic(self, count, width):
    lines = np.random.default_rng(0).integers(0, 4, (count, width)).astype(np.uint8)
    lines[count // 2 :, :9] = 0  # many lines agree in their first bytes
    found, distinct = _sort(lines)
    rows = [row.tobytes() for row in lines]
    self.assertEqual(distinct, len(set(rows)))
    self.assertEqual([rows[i] for i in found[:distinct]], sorted(set(rows)))
    self.assertCountEqual(found.tolist(), range(count))
    # The first of several equal lines is the distinct one; the others are in order.
    self.assertEqual(sorted(found[:distinct]), sorted(map(rows.index, set(rows))))
    others = [(rows[i], i) for i in found[distinct:]]
    self.assertEqual(others, sorted(others))

  def test_is_the_order_of_bits_back_coding(self):
    lines = np.random.default_rng(0).integers(0, 256, (200, 30)).astype(np.uint8)
    expected, _ = permutation.canonical_order(lines)
    np.testing.assert_array_equal(_sort(lines)[0], expected)


class OrderTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 3, 17, 256, 257, 1536, 5000)
  def test_noise_comes_back(self, distinct):
    size = order.noise_size(distinct)
    for noise in (
      np.random.default_rng(0).integers(0, 256, size).astype(np.uint8),
      np.zeros(size, np.uint8),
      np.full(size, 255, np.uint8),
    ):
      places, stored = order.pop(noise, distinct)
      self.assertCountEqual(places.tolist(), range(distinct))
      self.assertEqual(stored.size, order.stored_size(distinct))
      np.testing.assert_array_equal(order.push(stored, places), noise)

  @parameterized.parameters(17, 500, 1536, 11008)
  def test_saves_the_logarithm_of_the_factorial(self, distinct):
    saved = 8 * (order.noise_size(distinct) - order.stored_size(distinct))
    ideal = math.lgamma(distinct + 1) / math.log(2)
    self.assertLessEqual(saved, ideal)
    self.assertGreater(saved, 0.997 * ideal - 8)

  def test_all_orders_are_as_likely(self):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (6000, order.noise_size(3))).astype(np.uint8)
    found = [tuple(order.pop(x, 3)[0]) for x in noise]
    for places in set(found):
      self.assertAlmostEqual(found.count(places), 1000, delta=150)
    self.assertLen(set(found), 6)

  def test_orders_of_many_lengths_take_little_memory(self):
    order.noise_size(order.MAX_LINES)
    tracemalloc.start()
    self.addCleanup(tracemalloc.stop)
    for distinct in range(order.MAX_LINES - 40, order.MAX_LINES):
      order.noise_size(distinct)
      order.stored_size(distinct)
    self.assertLess(tracemalloc.get_traced_memory()[0], 1 << 20)

  def test_bytes_that_are_none_are_refused(self):
    stored = np.full(order.stored_size(300), 255, np.uint8)
    with self.assertRaisesRegex(ValueError, 'damaged'):
      order.push(stored, np.arange(300)[::-1].copy())


if __name__ == '__main__':
  absltest.main()

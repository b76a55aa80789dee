"""Frequency tables: exact sums, no symbol lost, close to the entropy."""

from absl.testing import absltest
import numpy as np

from rotbits_jax.coding import tables

_RNG = np.random.default_rng(0)
COUNTS = {
  'normal': np.bincount(
    np.clip(_RNG.normal(100, 12, 100_000), 0, 255).astype(int), minlength=256
  ),
  'lone': np.eye(1, 256, 17, dtype=int)[0] * 1000,
  'two': np.array([1, 10**9]),
  'skewed': np.array([10**9] + [1] * 255),
  'uniform': np.ones(2048, int),
  'full': np.ones(tables.TOTAL, int),
  'full_and_great': np.full(tables.TOTAL, 7 << 27),
  'nearly_full_and_great': np.r_[np.full(16_100, 7 << 27), np.zeros(284, int)],
  'power_law': (1e6 / np.arange(1, 1000) ** 2).astype(int) + 1,
}


class TablesTest(absltest.TestCase):
  def test_frequencies_add_up_and_keep_every_symbol(self):
    for name in COUNTS:
      with self.subTest(name=name):
        counts = COUNTS[name]
        frequencies = tables.quantize(counts)
        self.assertEqual(frequencies.sum(), tables.TOTAL)
        np.testing.assert_array_equal(frequencies > 0, counts > 0)

  def test_cost_is_within_a_tenth_of_a_percent_of_the_entropy(self):
    for name in ('normal', 'uniform', 'full'):
      with self.subTest(name=name):
        counts = COUNTS[name]
        cost = tables.cost_bits(counts, tables.quantize(counts))
        self.assertLess(cost / tables.entropy_bits(counts) - 1, 1e-3)

  def test_slots_invert_the_cumulative_frequencies_exhaustively(self):
    for name in COUNTS:
      with self.subTest(name=name):
        frequencies = tables.quantize(COUNTS[name])[None]
        owners = tables.slots(frequencies)[0]
        entries = tables.pack_intervals(frequencies)[0][owners].astype(np.int64)
        start, length = entries & 0xFFFF, (entries >> 16) + 1
        slots = np.arange(tables.TOTAL)
        self.assertTrue(np.all((start <= slots) & (slots < start + length)))
        np.testing.assert_array_equal(length, frequencies[0][owners])

  def test_bytes_round_trip(self):
    stack = np.stack([tables.quantize(COUNTS[n]) for n in ('normal', 'lone', 'skewed')])
    data = tables.to_bytes(stack)
    np.testing.assert_array_equal(tables.from_bytes(data, 3, 256), stack)

  def test_bad_bytes_are_refused(self):
    stack = tables.quantize(COUNTS['normal'])[None]
    data = tables.to_bytes(stack)
    for bad, count in ((data[:-3], 1), (b'', 1), (data, 2), (data, 0)):
      with self.assertRaises(ValueError):
        tables.from_bytes(bad, count, 256)
    with self.assertRaises(ValueError):
      tables.from_bytes(data, 1, 16)
    stack[0, 100] += 1
    with self.assertRaisesRegex(ValueError, 'add up'):
      tables.from_bytes(tables.to_bytes(stack), 1, 256)


if __name__ == '__main__':
  absltest.main()

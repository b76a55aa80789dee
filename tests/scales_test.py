"""Tests of scale buckets, and of the normal distribution's integer tables."""

import math
import zlib

from absl.testing import absltest
import ml_dtypes
import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.coding import contexts
from rotbits_jax.coding import layouts
from rotbits_jax.coding import plans
from rotbits_jax.coding import scales

# Dtype, number of bits besides the symbol, and a common class.
FORMATS = (
  (np.float16, 0, -40),
  (np.float16, 0, -104),  # many numbers have exponent 0
  (ml_dtypes.bfloat16, 0, -37),
  (np.float32, 0, 11),
  (np.int8, 0, 35),
  (np.int8, 2, 35),
  (np.int16, 5, 101),
)


def _layout(dtype, raw_bits):
  kind = layouts.Int if np.dtype(dtype).kind == 'i' else layouts.Float
  return kind(np.dtype(dtype), raw_bits)


def _weights(layout, classes):
  every = np.arange(layout.alphabet)
  return scales.normal_weights(layout, layout.alphabet, classes, every)


def _sort(matrix):
  (buckets,) = plans._sorted([np.ascontiguousarray(matrix, np.float32)])
  return buckets


def _buckets(lines, shape, start=0, count=None):
  """Returns the bucket of each element from `start` on."""
  found = np.full(math.prod(shape) if count is None else count, 255, np.uint8)
  lines.write(found, start, shape[1], 1, 0)
  return found if count is not None else found.reshape(shape)


def _below(x):
  """Returns the share of a standard normal distribution below each x, float64."""
  return np.array([(1 + math.erf(v / math.sqrt(2))) / 2 for v in np.ravel(x)])


def _masses(layout, deviation):
  """Returns the share of each symbol in a normal distribution, float64 `[A]`."""
  if layout.dtype.kind == 'i':
    n = np.arange(layout.alphabet << layout.raw_bits)
    value = np.where(n % 2, -(n + 1) // 2, n // 2)
    share = _below((value + 0.5) / deviation) - _below((value - 0.5) / deviation)
    return share.reshape(-1, 1 << layout.raw_bits).sum(axis=1)
  low = layout.most_raw_bits - 1
  infinite = ((1 << layout.format.exponent) - 1) << 3
  patterns = (np.arange(infinite) << low).astype(layout.unsigned)
  edges = np.full(layout.alphabet + 1, np.inf)
  edges[:infinite] = patterns.view(layout.dtype).astype(np.float64)
  return 2 * np.diff(_below(edges / deviation))


class NormalTest(absltest.TestCase):
  def test_weights_are_the_normal_distribution(self):
    for dtype, low, k in FORMATS:
      with self.subTest(dtype=dtype, low=low, k=k):
        layout = _layout(dtype, low)
        weights = _weights(layout, np.array([k]))[0]
        expected = _masses(layout, 2 ** (k / 8))
        share = weights / weights.sum()
        likely = expected > 2e-3
        np.testing.assert_allclose(share[likely], expected[likely], rtol=0.02)
        loss = expected * np.log2(np.maximum(expected, 1e-300) / share)
        self.assertLess(loss.sum(), 2e-5)

  def test_tables_are_the_same_on_every_machine(self):
    """The tables are part of the format, so a change here breaks every file."""
    classes = np.array([-1500, -200, -104, -37, -3, 0, 18, 90, 512, scales.ZERO])
    digest = 0
    for dtype, low, _ in FORMATS:
      frequencies = tables.quantize(_weights(_layout(dtype, low), classes))
      digest = zlib.crc32(frequencies.astype('<u2').tobytes(), digest)
    self.assertEqual(digest, 314723645)

  def test_any_class_gives_weights_that_make_tables(self):
    classes = np.array([-(1 << 15) - 255 * 32768, scales.ZERO, 1 << 15, 255 << 15])
    for dtype, low, _ in FORMATS:
      layout = _layout(dtype, low)
      weights = _weights(layout, classes)
      self.assertGreaterEqual(weights.min(), 1)
      np.testing.assert_array_equal(weights.max(axis=1), 1 << 30)
      some = np.arange(3, layout.alphabet, 7)  # without the most frequent ones
      found = scales.normal_weights(layout, layout.alphabet, classes, some)
      np.testing.assert_array_equal(found, weights[:, some])

  def test_powers_are_exact(self):
    for i in (0, 37, 255):
      with self.subTest(i=i):
        power = int(scales._powers()[i])
        self.assertLessEqual(power**256, 2 ** (30 * 256 - i))
        self.assertGreater((power + 1) ** 256, 2 ** (30 * 256 - i))


class SortTest(absltest.TestCase):
  def _normal(self, shape, deviation=1.0, seed=0):
    return np.random.default_rng(seed).standard_normal(shape) * deviation

  def _classes(self, lines, shape):
    """Returns the class of each number."""
    return lines.classes(_buckets(lines, shape))

  def _check(self, matrix, octaves, rows, columns):
    """Checks which axes are sorted, and scales up to half a step for each axis."""
    lines = _sort(matrix)
    self.assertEqual((lines.rows.size > 1, lines.columns.size > 1), (rows, columns))
    off = self._classes(lines, matrix.shape) / 8 - octaves
    self.assertLess(np.abs(off).max(), max(rows + columns, 1) * lines.step / 16 + 1e-6)

  def test_lines_of_different_scale_are_found(self):
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.int16):
      with self.subTest(dtype=dtype):
        amplify = 100 if dtype == np.int16 else 1
        values = self._normal(
          (100, 300), amplify * 2 ** np.linspace(0, 3, 100)[:, None]
        )
        values = values.astype(dtype)
        squares = np.mean(np.float64(values) ** 2, axis=1, keepdims=True)
        self._check(values, np.log2(squares) / 2, True, False)
        self._check(values.T.copy(), np.log2(squares.T) / 2, False, True)

  def test_scales_of_rows_and_columns_multiply(self):
    rows, columns = 2 ** self._normal((100, 1)), 2 ** self._normal((1, 300), seed=1)
    # If all numbers of a line have the same magnitude, its scale is exact.
    signs = np.where(self._normal((100, 300), seed=2) > 0, 1, -1)
    self._check(signs * rows * columns, np.log2(rows * columns), True, True)

  def test_one_scale_is_one_line(self):
    values = self._normal((40, 60), 0.25)
    self._check(values, np.log2(np.mean(values**2)) / 2, False, False)
    self.assertEqual(set(self._classes(_sort(values), (40, 60)).flat), {-16})

  def test_long_lines_get_a_finer_step_than_short_ones(self):
    octaves = self._normal(200, 1.5, seed=1)[:, None]
    short, long = (_sort(self._normal((200, n), 2**octaves)) for n in (16, 20_000))
    self.assertEqual((short.columns.size, long.columns.size), (1, 1))
    self.assertEqual(long.step, 1)
    self.assertGreater(short.step, 1)

  def test_lines_of_zeros_are_apart(self):
    values = self._normal((64, 50))
    values[::3] = 0
    values[:, 7] = 0
    lines = _sort(values)
    classes = self._classes(lines, values.shape)
    zeros = (np.arange(64) % 3 == 0)[:, None]
    if lines.columns.size > 1:
      zeros = zeros | (np.arange(50) == 7)
    np.testing.assert_array_equal(
      classes == scales.ZERO, np.broadcast_to(zeros, classes.shape)
    )

  def test_special_numbers_are_sorted_somewhere(self):
    for value in (0.0, np.nan, np.inf, 1e-45, 3e38):
      with self.subTest(value=value):
        for shape in ((1, 1), (1, 50), (50, 1), (30, 40)):
          values = np.zeros(shape, np.float32)
          values[:, ::2] = value
          lines = _sort(values)
          self.assertIn(lines.rows.size, (1, shape[0]))
          self.assertIn(lines.columns.size, (1, shape[1]))
          self.assertLess(np.abs(self._classes(lines, shape)).max(), 1 << 15)

  def test_buckets_are_those_of_elements(self):
    rng = np.random.default_rng(0)
    for low in (0, 1):
      rows, columns = (rng.integers(low, 9, n).astype(np.uint8) for n in (7, 5))
      for axes in ((rows, columns), (rows, columns[:1] | 1), (rows[:1] | 1, columns)):
        lines = scales.Buckets(-3, 2, *axes)
        both = np.broadcast_to(axes[0][:, None], (7, 5)), axes[1]
        expected = np.where(both[0] * both[1] > 0, both[0] + both[1].astype(int) - 1, 0)
        np.testing.assert_array_equal(_buckets(lines, (7, 5)), expected)
        np.testing.assert_array_equal(lines.used(), np.unique(expected))
        self.assertEqual(lines.has_zeros, 0 in expected)
        for start, stop in ((0, 35), (0, 5), (3, 4), (3, 17), (10, 20), (34, 35)):
          part = _buckets(lines, (7, 5), start, stop - start)
          np.testing.assert_array_equal(part, expected.reshape(-1)[start:stop])

  def test_buckets_are_less_than_a_byte_counts(self):
    values = self._normal((300, 400), 2.0 ** np.linspace(-25, 25, 300)[:, None])
    values *= 2.0 ** np.linspace(-25, 25, 400)
    lines = _sort(values)
    self.assertGreater(lines.step, 1)
    self.assertLess(lines.top, scales.MAX_BUCKETS)
    self.assertGreater(min(lines.rows.max(), lines.columns.max()), 50)


class ContextsTest(absltest.TestCase):
  """Contexts of four arrays with classes, and of one with one table."""

  SHAPES = ((20, 30), (7, 11), (6, 5), (40,), (3, 5, 4))
  LAYOUT = layouts.Float(np.dtype(np.float16), 8)

  def _contexts(self):
    rng = np.random.default_rng(0)
    lines = lambda low, n: rng.integers(low, 5, n).astype(np.uint8)
    one = np.ones(1, np.uint8)
    buckets = (
      scales.Buckets(-40, 1, lines(0, 20), one),
      scales.Buckets(-38, 1, one, lines(1, 11)),
      scales.Buckets(-44, 4, lines(1, 6), lines(0, 5)),
      scales.Buckets(-80, 1, one, one),
      None,
    )
    counts = []
    for own in buckets:
      used = own.used() if own else np.zeros(1, int)
      count = np.zeros((own.top + 1 if own else 1, self.LAYOUT.alphabet), np.int64)
      for bucket in used:
        occurring = rng.choice(self.LAYOUT.alphabet, 20, replace=False)
        count[bucket, occurring] = rng.integers(1, 9, 20)
      counts.append(count)
    return contexts.fit(self.LAYOUT, buckets, counts), counts

  def test_lines_of_one_class_share_a_table(self):
    made, _ = self._contexts()
    # -38 is bucket 3 of the first array and bucket 1 of the second.
    self.assertEqual(made.first[1], made.first[0] + 2)
    # Another step, a distant class, zeros and the last array have other tables.
    self.assertTrue(contexts.fits(made.buckets, 256))
    self.assertFalse(contexts.fits(made.buckets * 250, 256))
    others = [made.first[2], made.first[3], made.zero, made.first[4]]
    self.assertLen({*others, *range(made.first[0], made.first[0] + 6)}, 10)

  def test_every_number_gets_its_lines_table(self):
    made, _ = self._contexts()
    for i, (shape, lines) in enumerate(zip(self.SHAPES, made.buckets, strict=True)):
      written = np.zeros(math.prod(shape), np.uint8)
      made.write(written, i, 0, shape)
      if lines is None:
        expected = made.first[i]
      else:
        own = _buckets(lines, scales.matrix_shape(shape)).reshape(-1).astype(int)
        expected = np.where(own, made.first[i] + own - 1, made.zero)
      np.testing.assert_array_equal(written, expected)

  def test_every_symbol_counted_can_be_coded(self):
    made, counts = self._contexts()
    for i, count in enumerate(counts):
      for label in np.flatnonzero(count.any(axis=1)):
        table = made.zero if made.buckets[i] and not label else made.first[i] + label
        table -= made.buckets[i] is not None and label > 0
        self.assertTrue(np.all(made.frequencies[table][count[label] > 0] > 0))

  def test_bytes_round_trip(self):
    made, _ = self._contexts()
    self.assertIn(True, made.normal)
    self.assertIn(False, made.normal)
    back = contexts.from_bytes(contexts.to_bytes(made), self.LAYOUT, self.SHAPES)
    np.testing.assert_array_equal(back.frequencies, made.frequencies)
    np.testing.assert_array_equal(back.normal, made.normal)
    self.assertEqual((back.first, back.zero), (made.first, made.zero))
    for ours, theirs in zip(back.buckets, made.buckets, strict=True):
      self.assertEqual(ours is None, theirs is None)
      if ours:
        self.assertEqual(ours[:2], theirs[:2])
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        np.testing.assert_array_equal(ours.columns, theirs.columns)

  def test_bad_bytes_are_refused(self):
    made, _ = self._contexts()
    data = contexts.to_bytes(made)
    read = lambda data, shapes: contexts.from_bytes(data, self.LAYOUT, shapes)
    for size in range(0, len(data), 3):
      with self.assertRaises(ValueError):
        read(data[:size], self.SHAPES)
    for shapes in (((21, 30), *self.SHAPES[1:]), self.SHAPES[1:], ()):
      with self.assertRaises(ValueError):
        read(data, shapes)
    for position in range(len(data)):
      damaged = bytearray(data)
      damaged[position] ^= 1 << position % 8
      try:  # damage may also yield another made, which the checksum detects
        read(bytes(damaged), self.SHAPES)
      except ValueError:
        continue

  def test_bad_buckets_are_refused(self):
    for head, labels in (
      ([5, 0, 1], []),
      ([1, 0, 0], []),
      ([1, 0, 9], []),
      ([-1, 0, 1], []),
      ([2, 0, 1], [255]),
      ([4, 0, 1], [200, 200, 200]),
      ([2, 0, 1], []),
      ([1, 0, 1], [1]),
    ):
      with self.subTest(head=head, labels=labels):
        lined = np.array([256, *head], '<i2').tobytes() + bytes(labels)
        data = contexts._deflate(lined) + contexts._deflate(b'\x80' + bytes(32))
        with self.assertRaises(ValueError):
          contexts.from_bytes(
            data + tables.to_bytes(np.zeros((0, 256), int)), self.LAYOUT, ((1, 2),)
          )

  def test_more_symbols_than_elements_are_refused(self):
    lined = np.array([256, 4, 0, 1], '<i2').tobytes() + bytes([127, 127])
    data = contexts._deflate(lined) + contexts._deflate(b'\xff' * (32 + 253 * 32))
    data += tables.to_bytes(np.zeros((0, 256), int))
    with self.assertRaisesRegex(ValueError, '64768 symbols cannot occur in 1 elements'):
      contexts.from_bytes(data, self.LAYOUT, ((1, 1),))

  def test_what_is_inflated_is_bounded(self):
    bomb = contexts._deflate(bytes(1 << 24))
    for data in (bomb, contexts._deflate(b'\0\1' + bytes(6)) + bomb):
      with self.assertRaisesRegex(ValueError, 'too long'):
        contexts.from_bytes(data, self.LAYOUT, ((1, 2),))
    packed = contexts._deflate(b'\0\1' + bytes(6)) + contexts._deflate(bytes(1))
    with self.assertRaises(ValueError):
      contexts.from_bytes(
        packed + zlib.compress(bytes(1 << 24)), self.LAYOUT, ((1, 2),)
      )


if __name__ == '__main__':
  absltest.main()

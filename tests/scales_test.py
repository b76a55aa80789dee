"""Lines find their scale, and the normal distribution's integer tables are right."""

import math
import zlib

from absl.testing import absltest
from absl.testing import parameterized
import ml_dtypes
import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import contexts
from rotbits_jax.coding.weights import floats
from rotbits_jax.coding.weights import scales

# Dtype, bits beside the symbol, and a class that is common in it.
FORMATS = (
  (np.float16, 0, -40),
  (np.float16, 0, -104),  # many numbers have exponent 0
  (ml_dtypes.bfloat16, 0, -37),
  (np.float32, 0, 11),
  (np.int8, 0, 35),
  (np.int8, 2, 35),
  (np.int16, 5, 101),
)


def _form(dtype, low):
  return scales.format_of(np.dtype(dtype), low)


def _below(x):
  """The share of a standard normal distribution below each x, float64."""
  return np.array([(1 + math.erf(v / math.sqrt(2))) / 2 for v in np.ravel(x)])


def _masses(form, deviation):
  """The normal distribution's share of each symbol, float64 `[A]`."""
  if form.dtype.kind == 'i':
    n = np.arange(form.alphabet << form.low)
    value = np.where(n % 2, -(n + 1) // 2, n // 2)
    share = _below((value + 0.5) / deviation) - _below((value - 0.5) / deviation)
    return share.reshape(-1, 1 << form.low).sum(axis=1)
  layout = floats.LAYOUTS[form.dtype]
  low = layout.mantissa - layout.modelled_mantissa
  infinite = ((1 << layout.exponent) - 1) << layout.modelled_mantissa
  bits = (np.arange(infinite) << low).astype(f'u{form.dtype.itemsize}')
  edges = np.full(form.alphabet + 1, np.inf)
  edges[:infinite] = bits.view(form.dtype).astype(np.float64)
  return 2 * np.diff(_below(edges / deviation))


class NormalTest(parameterized.TestCase):
  @parameterized.parameters(*FORMATS)
  def test_weights_are_the_normal_distribution(self, dtype, low, k):
    form = _form(dtype, low)
    weights = scales.normal_weights(form, np.array([k]))[0]
    expected = _masses(form, 2 ** (k / 8))
    share = weights / weights.sum()
    likely = expected > 2e-3
    np.testing.assert_allclose(share[likely], expected[likely], rtol=0.02)
    loss = expected * np.log2(np.maximum(expected, 1e-300) / share)
    self.assertLess(loss.sum(), 2e-5)

  def test_tables_are_the_same_on_every_machine(self):
    """They are part of the format: a change here breaks every file."""
    classes = np.array([-1500, -200, -104, -37, -3, 0, 18, 90, 512, scales.ZERO])
    digest = 0
    for dtype, low, _ in FORMATS:
      frequencies = tables.quantize(scales.normal_weights(_form(dtype, low), classes))
      digest = zlib.crc32(frequencies.astype('<u2').tobytes(), digest)
    self.assertEqual(digest, 314723645)

  def test_any_class_gives_weights_that_make_tables(self):
    classes = np.array([-(1 << 15) - 255 * 32768, scales.ZERO, 1 << 15, 255 << 15])
    for dtype, low, _ in FORMATS:
      weights = scales.normal_weights(_form(dtype, low), classes)
      self.assertGreaterEqual(weights.min(), 1)
      self.assertLessEqual(weights.max(), 1 << 30)

  @parameterized.parameters(0, 37, 255)
  def test_powers_are_exact(self, i):
    power = int(scales._powers()[i])
    self.assertLessEqual(power**256, 2 ** (30 * 256 - i))
    self.assertGreater((power + 1) ** 256, 2 ** (30 * 256 - i))


class SortTest(parameterized.TestCase):
  def _normal(self, shape, deviation=1.0, seed=0):
    return np.random.default_rng(seed).standard_normal(shape) * deviation

  def _classes(self, lines, shape):
    """The class of each number."""
    labels = lines.spread(np.arange(scales.MAX_LABELS), shape)
    return lines.classes(labels)

  def _check(self, matrix, octaves, rows, columns):
    """That these axes are sorted, and the scale is right to half a step an axis."""
    lines = scales.sort(matrix)
    self.assertEqual((lines.rows.size > 1, lines.columns.size > 1), (rows, columns))
    off = self._classes(lines, matrix.shape) / 8 - octaves
    self.assertLess(np.abs(off).max(), max(rows + columns, 1) * lines.step / 16 + 1e-6)

  @parameterized.parameters(np.float16, ml_dtypes.bfloat16, np.float32, np.int16)
  def test_lines_of_different_scale_are_found(self, dtype):
    amplify = 100 if dtype == np.int16 else 1
    values = self._normal((100, 300), amplify * 2 ** np.linspace(0, 3, 100)[:, None])
    values = values.astype(dtype)
    squares = np.mean(np.float64(values) ** 2, axis=1, keepdims=True)
    self._check(values, np.log2(squares) / 2, True, False)
    self._check(values.T.copy(), np.log2(squares.T) / 2, False, True)

  def test_scales_of_rows_and_columns_multiply(self):
    rows, columns = 2 ** self._normal((100, 1)), 2 ** self._normal((1, 300), seed=1)
    # Numbers of one magnitude are told apart exactly.
    signs = np.where(self._normal((100, 300), seed=2) > 0, 1, -1)
    self._check(signs * rows * columns, np.log2(rows * columns), True, True)

  def test_one_scale_is_one_line(self):
    values = self._normal((40, 60), 0.25)
    self._check(values, np.log2(np.mean(values**2)) / 2, False, False)
    self.assertEqual(set(self._classes(scales.sort(values), (40, 60)).flat), {-16})

  def test_long_lines_get_a_finer_step_than_short_ones(self):
    octaves = self._normal(200, 1.5, seed=1)[:, None]
    short, long = (
      scales.sort(self._normal((200, n), 2**octaves)) for n in (16, 20_000)
    )
    self.assertEqual((short.columns.size, long.columns.size), (1, 1))
    self.assertEqual(long.step, 1)
    self.assertGreater(short.step, 1)

  def test_lines_of_zeros_are_apart(self):
    values = self._normal((64, 50))
    values[::3] = 0
    values[:, 7] = 0
    lines = scales.sort(values)
    classes = self._classes(lines, values.shape)
    zeros = (np.arange(64) % 3 == 0)[:, None]
    if lines.columns.size > 1:
      zeros = zeros | (np.arange(50) == 7)
    np.testing.assert_array_equal(
      classes == scales.ZERO, np.broadcast_to(zeros, classes.shape)
    )

  @parameterized.parameters(0.0, np.nan, np.inf, 1e-45, 3e38)
  def test_special_numbers_are_sorted_somewhere(self, value):
    for shape in ((1, 1), (1, 50), (50, 1), (30, 40)):
      values = np.zeros(shape, np.float32)
      values[:, ::2] = value
      lines = scales.sort(values)
      self.assertIn(lines.rows.size, (1, shape[0]))
      self.assertIn(lines.columns.size, (1, shape[1]))
      self.assertLess(np.abs(self._classes(lines, shape)).max(), 1 << 15)

  def test_labels_are_those_of_numbers(self):
    rng = np.random.default_rng(0)
    for low in (0, 1):
      rows, columns = (rng.integers(low, 9, n).astype(np.uint8) for n in (7, 5))
      for axes in ((rows, columns), (rows, columns[:1]), (rows[:1], columns)):
        lines = scales.Lines(-3, 2, *axes)
        spread = lines.spread(np.arange(scales.MAX_LABELS), (7, 5))
        both = np.broadcast_to(axes[0][:, None], (7, 5)), axes[1]
        expected = np.where(both[0] * both[1] > 0, both[0] + both[1].astype(int) - 1, 0)
        np.testing.assert_array_equal(spread, expected)
        np.testing.assert_array_equal(lines.labels(), np.unique(expected))


class ContextsTest(parameterized.TestCase):
  """Models of three arrays of one format, one of another, one with its own table."""

  SHAPES = ((20, 30), (7, 11), (6, 5), (40,), (3, 5, 4))

  def _model(self):
    rng = np.random.default_rng(0)
    half, brain = _form(np.float16, 0), _form(ml_dtypes.bfloat16, 0)
    formats = (half, half, half, brain, half)
    labels = lambda low, n: rng.integers(low, 5, n).astype(np.uint8)
    one = np.ones(1, np.uint8)
    lines = (
      scales.Lines(-40, 2, labels(0, 20), one),
      scales.Lines(-38, 1, one, labels(1, 11)),
      scales.Lines(-44, 4, labels(1, 6), labels(0, 5)),
      scales.Lines(-38, 1, one, one),
      None,
    )
    counts = []
    for form, line in zip(formats, lines, strict=True):
      used = line.labels() if line else np.zeros(1, int)
      count = np.zeros((used.max() + 1, form.alphabet), np.int64)
      for label in used:
        occurring = rng.choice(form.alphabet, 20, replace=False)
        count[label, occurring] = rng.integers(1, 9, 20)
      counts.append(count)
    return contexts.fit(formats, lines, counts)[0], counts

  def test_lines_of_one_class_share_a_table(self):
    model, _ = self._model()
    # -38 is label 2 of the first array and label 1 of the second, -36 3 and 3.
    self.assertEqual(model.indices[0][2], model.indices[1][1])
    self.assertEqual(model.indices[0][3], model.indices[1][3])
    # The other format has another table for -38, and the last array one of its own.
    others = model.indices[3][1], model.indices[4][0]
    self.assertNotIn(model.indices[1][1], others)
    self.assertLen(set(others), 2)

  def test_every_number_gets_its_lines_table(self):
    model, _ = self._model()
    spread = model.contexts(self.SHAPES, np.dtype(np.uint8))
    parts = np.split(spread, np.cumsum([math.prod(x) for x in self.SHAPES])[:-1])
    indices, lines = model.indices, model.lines
    rows, columns = parts[0].reshape(20, 30), parts[1].reshape(7, 11)
    self.assertTrue(np.all(rows == indices[0][lines[0].rows][:, None]))
    self.assertTrue(np.all(columns == indices[1][lines[1].columns]))
    for row, left in zip(parts[2].reshape(6, 5), lines[2].rows, strict=True):
      for context, right in zip(row, lines[2].columns, strict=True):
        label = int(left) + int(right) - 1 if right else 0
        self.assertEqual(context, indices[2][label])
    self.assertEqual(set(parts[3].tolist()), {indices[3][1]})
    self.assertEqual(set(parts[4].tolist()), {indices[4][0]})

  def test_every_symbol_counted_can_be_coded(self):
    model, counts = self._model()
    for index, count in zip(model.indices, counts, strict=True):
      for label in np.flatnonzero(count.any(axis=1)):
        row = model.frequencies[index[label], : count.shape[1]]
        self.assertTrue(np.all(row[count[label] > 0] > 0))

  def test_bytes_round_trip(self):
    model, _ = self._model()
    self.assertIn(True, model.normal)
    self.assertIn(False, model.normal)
    back = contexts.from_bytes(contexts.to_bytes(model), model.formats, self.SHAPES)
    np.testing.assert_array_equal(back.frequencies, model.frequencies)
    np.testing.assert_array_equal(back.normal, model.normal)
    for ours, theirs in zip(back.lines, model.lines, strict=True):
      self.assertEqual(ours is None, theirs is None)
      if ours:
        self.assertEqual(ours[:2], theirs[:2])
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        np.testing.assert_array_equal(ours.columns, theirs.columns)

  def test_bad_bytes_are_refused(self):
    model, _ = self._model()
    data = contexts.to_bytes(model)
    read = lambda data, shapes: contexts.from_bytes(data, model.formats, shapes)
    for size in range(0, len(data), 3):
      with self.assertRaises(ValueError):
        read(data[:size], self.SHAPES)
    with self.assertRaisesRegex(ValueError, 'lines'):
      read(data, ((21, 30), *self.SHAPES[1:]))
    for position in range(len(data)):
      damaged = bytearray(data)
      damaged[position] ^= 1 << position % 8
      try:  # it may also be another model: the digest's business
        read(bytes(damaged), self.SHAPES)
      except ValueError:
        continue


if __name__ == '__main__':
  absltest.main()

"""Elements are split into symbols and raw bits and joined again."""

import itertools

from absl.testing import absltest
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax.coding import layouts

FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32)


def _patterns(dtype):
  """Returns all bit patterns of 8 or 16 bits, or many of 32 bits."""
  width = 8 * np.dtype(dtype).itemsize
  if width <= 16:
    return np.arange(1 << width).astype(f'u{width // 8}')
  return np.random.default_rng(0).integers(0, 1 << 32, 100_000).astype(np.uint32)


def _check_round_trip(layout, bits):
  assert layout.is_valid()
  least = layout.unsigned.type(layout.min_exponent)
  widths = layouts.piece_widths(layout.raw_bits)
  out = tuple(jnp.zeros(bits.size, x) for x in (np.uint16, *(np.uint8 for _ in widths)))
  count = np.int32(bits.size)
  symbols, *pieces = layouts.split(out, bits, least, count, layout=layout.program)
  assert int(symbols.max(initial=0)) < layout.alphabet
  for piece, width in zip(pieces, widths, strict=True):
    assert int(piece.max(initial=0)) < 1 << width
  parts = jnp.zeros(bits.shape, bits.dtype), symbols, tuple(pieces), least, count
  joined = np.asarray(layouts.join(*parts, layout=layout.program))
  assert joined.dtype == bits.dtype
  np.testing.assert_array_equal(joined, bits)


class FloatsTest(absltest.TestCase):
  def test_join_undoes_split_for_every_kind_of_number(self):
    for dtype in FLOATS:
      with self.subTest(dtype=dtype):
        full = layouts.Float(np.dtype(dtype), 0).most_raw_bits
        _check_round_trip(layouts.Float(np.dtype(dtype), full), _patterns(dtype))

  def test_symbol_is_exponent_and_top_of_the_mantissa(self):
    bits = np.array([-1.5], np.float16).view(np.uint16)
    symbols, raw = layouts.Float(np.dtype(np.float16), 8).split(bits, 1)
    self.assertEqual(int(symbols[0]), 15 << 3 | 0b100)
    self.assertEqual(int(raw[0]), 1 << 7)

  def test_zeros_at_the_end_are_left_out(self):
    for dtype, raw_bits in ((np.float16, 8), (np.float16, 5), (np.float32, 8)):
      with self.subTest(dtype=dtype, raw_bits=raw_bits):
        dtype = np.dtype(dtype)
        zeros = layouts.Float(dtype, 0).most_raw_bits - raw_bits
        bits = _patterns(dtype) >> zeros << zeros
        layout, _ = layouts.of_floats(bits, dtype)
        self.assertEqual(layout, layouts.Float(dtype, raw_bits))
        _check_round_trip(layout, bits)

  def test_numbers_without_raw_bits(self):
    dtype = np.dtype(np.float16)
    for value, raw_bits in ((1.5, 0), (-1.5, 1), (0.0, 0), (-0.0, 1)):
      bits = np.array([value], dtype).view(np.uint16)
      layout, _ = layouts.of_floats(bits, dtype)
      self.assertLessEqual(layout.raw_bits, raw_bits)
      _check_round_trip(layout, bits)

  def test_any_numbers_have_a_layout(self):
    for dtype, value in itertools.product(FLOATS, [np.inf, np.nan, 1.0]):
      with self.subTest(dtype=dtype, value=value):
        bits = np.array([0, value, 1e-7, -3], dtype).view(
          f'u{np.dtype(dtype).itemsize}'
        )
        _check_round_trip(layouts.of_floats(bits, np.dtype(dtype))[0], bits)

  def test_a_rare_number_changes_the_layout(self):
    # Samples do not have it.
    bits = np.full(1 << 18, 1.5, np.float32).view(np.uint32)
    bits[100_001] = np.float32(1.1).view(np.uint32)
    layout, _ = layouts.of_floats(bits, np.dtype(np.float32))
    self.assertEqual(layout.raw_bits, 21)
    _check_round_trip(layout, bits)


class MinimumExponentTest(absltest.TestCase):
  """Small numbers share a step; the reference counts the steps in float64."""

  def test_magnitudes_above_a_minimum_exponent(self):
    for dtype, least in itertools.product(FLOATS, [1, 2, 9, 25]):
      with self.subTest(dtype=dtype, least=least):
        dtype = np.dtype(dtype)
        form = layouts.FORMATS[dtype]
        bits = _rounded(_patterns(dtype), form, least)
        raised = np.asarray(layouts.raised(jnp.asarray(bits), form, least))
        top = form.mantissa
        with np.errstate(invalid='ignore'):
          values = np.abs(bits.view(dtype).astype(np.float64))
        small = values < 2.0 ** (least + 1 - form.bias)
        steps = np.ldexp(values[small], form.bias + top - least)
        magnitude = (1 << form.width - 1) - 1
        np.testing.assert_array_equal(raised[small] & magnitude, steps)
        np.testing.assert_array_equal(
          raised[~small], bits[~small] - np.array((least - 1) << top, bits.dtype)
        )
        lowered = np.asarray(layouts.lowered(jnp.asarray(raised), form, least))
        np.testing.assert_array_equal(lowered, bits)

  def test_it_is_found(self):
    for dtype in FLOATS:
      with self.subTest(dtype=dtype):
        dtype = np.dtype(dtype)
        form = layouts.FORMATS[dtype]
        values = np.random.default_rng(0).normal(size=20_000) * 2.0**-5
        least = form.bias - 5
        bits = _rounded(values.astype(dtype).view(f'u{dtype.itemsize}'), form, least)
        found, _ = layouts.of_floats(bits, dtype)
        self.assertEqual(found, layouts.Float(dtype, found.most_raw_bits, least))
        _check_round_trip(found, bits)


def _rounded(bits, form, least):
  """Rounds numbers towards zero to multiples of the step of a minimum exponent."""
  top = form.mantissa
  magnitude = bits & ((1 << form.width - 1) - 1)
  exponent = np.maximum(magnitude >> top, 1).astype(np.int64)
  below = np.clip(least - exponent, 0, form.width - 1).astype(bits.dtype)
  # The leading 1 of a number is also cut off, if it is below the step.
  cut = np.where(below > top, bits & (1 << form.width - 1), bits >> below << below)
  return cut.astype(bits.dtype)


class IntegersTest(absltest.TestCase):
  def test_join_undoes_split_for_every_number(self):
    for dtype in INTEGERS:
      with self.subTest(dtype=dtype):
        bits = _patterns(dtype)
        width = 8 * np.dtype(dtype).itemsize
        least = layouts.least_raw_bits(bits.view(dtype))
        self.assertEqual(least, max(width - 14, 0))
        for raw_bits in range(least, width):
          _check_round_trip(layouts.Int(np.dtype(dtype), raw_bits), bits)

  def test_small_magnitudes_are_small_symbols(self):
    bits = np.int16([0, -1, 1, -2, 2]).view(np.uint16)
    symbols, _ = layouts.Int(np.dtype(np.int16), 0).split(bits, 1)
    self.assertEqual(symbols.tolist(), [0, 1, 2, 3, 4])


class LayoutTest(absltest.TestCase):
  def test_unknown_ones_are_refused(self):
    for name, dtype, raw_bits, min_exponent in (
      ('float', np.float16, 9, 1),
      ('float', np.float16, -1, 1),
      ('float', np.float16, 8, 31),
      ('float', np.float16, 8, 0),
      ('float', np.int8, 1, 1),
      ('int', np.int8, 8, 1),
      ('int', np.int8, 0, 2),
      ('int', np.int64, 40, 1),
      ('int', np.float16, 0, 1),
    ):
      with self.subTest(
        name=name, dtype=dtype, raw_bits=raw_bits, min_exponent=min_exponent
      ):
        layout = layouts.TYPES[name](np.dtype(dtype), raw_bits, min_exponent)
        self.assertFalse(layout.is_valid())


if __name__ == '__main__':
  absltest.main()

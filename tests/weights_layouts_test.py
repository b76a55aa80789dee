"""Numbers are split into symbols and rests and joined again; rests go into planes."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax.coding.weights import floats
from rotbits_jax.coding.weights import integers
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import planes

FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16)


def _patterns(dtype):
  """Returns all bit patterns of 8 or 16 bits, or many of 32 bits."""
  width = 8 * np.dtype(dtype).itemsize
  if width <= 16:
    return np.arange(1 << width).astype(f'u{width // 8}')
  return np.random.default_rng(0).integers(0, 1 << 32, 100_000).astype(np.uint32)


def _check_round_trip(layout, bits):
  step, program = np.int32(layout.step), layout.program
  symbols, rests = map(np.asarray, program.split(jnp.asarray(bits), step))
  assert symbols.max(initial=0) < layout.alphabet
  assert rests.max(initial=0) < 1 << layout.rest
  joined = np.asarray(program.join(jnp.asarray(symbols), jnp.asarray(rests), step))
  assert joined.dtype == bits.dtype
  np.testing.assert_array_equal(joined, bits)


class FloatsTest(parameterized.TestCase):
  @parameterized.parameters(*FLOATS)
  def test_join_undoes_split_for_every_kind_of_number(self, dtype):
    values = _patterns(dtype).view(dtype)
    symbols, rests = floats.split(jnp.asarray(values))
    joined = np.asarray(floats.join(symbols, rests, np.dtype(dtype)))
    self.assertEqual(joined.tobytes(), values.tobytes())
    full = floats.LAYOUTS[np.dtype(dtype)].rest_bits
    _check_round_trip(layouts.Float(np.dtype(dtype), full), _patterns(dtype))

  def test_symbol_is_exponent_and_top_of_the_mantissa(self):
    symbols, rests = floats.split(jnp.asarray([-1.5], jnp.float16))
    self.assertEqual(int(symbols[0]), 15 << 3 | 0b100)
    self.assertEqual(int(rests[0]), 1 << 7)

  @parameterized.parameters((np.float16, 8), (np.float16, 5), (np.float32, 8))
  def test_zeros_at_the_end_are_left_out(self, dtype, rest):
    dtype = np.dtype(dtype)
    zeros = floats.LAYOUTS[dtype].rest_bits - rest
    bits = _patterns(dtype) >> zeros << zeros
    layout = layouts.of_floats(bits, dtype)
    self.assertEqual(layout, layouts.Float(dtype, rest))
    _check_round_trip(layout, bits)

  def test_numbers_without_rests(self):
    dtype = np.dtype(np.float16)
    for value, rest in ((1.5, 0), (-1.5, 1), (0.0, 0), (-0.0, 1)):
      bits = np.array([value], dtype).view(np.uint16)
      layout = layouts.of_floats(bits, dtype)
      self.assertLessEqual(layout.rest, rest)
      _check_round_trip(layout, bits)

  @parameterized.product(width=[0, 1, 5, 7, 8, 13, 21], count=[0, 1, 7, 8, 1001])
  def test_bit_packing_round_trips_densely(self, width, count):
    values = np.random.default_rng(1).integers(0, 1 << width, count).astype(np.uint32)
    packed = floats.pack_bits(values, width)
    self.assertEqual(packed.size, floats.packed_size(count, width))
    self.assertLess(8 * packed.size - width * count, 8 * max(width, 1))
    np.testing.assert_array_equal(floats.unpack_bits(packed, count, width), values)


class FloorTest(parameterized.TestCase):
  """Small numbers share a step; the reference counts the steps in float64."""

  @parameterized.product(dtype=FLOATS, floor=[1, 2, 9, 25])
  def test_magnitudes_above_a_floor(self, dtype, floor):
    dtype = np.dtype(dtype)
    layout = floats.LAYOUTS[dtype]
    bits = _floored(_patterns(dtype), layout, floor)
    raised = np.asarray(floats.raise_floor(jnp.asarray(bits), layout, floor))
    top = layout.mantissa
    with np.errstate(invalid='ignore'):
      values = np.abs(bits.view(dtype).astype(np.float64))
    bias = (1 << layout.exponent - 1) - 1
    small = values < 2.0 ** (floor + 1 - bias)
    steps = np.ldexp(values[small], bias + top - floor)
    magnitude = (1 << layout.width - 1) - 1
    np.testing.assert_array_equal(raised[small] & magnitude, steps)
    np.testing.assert_array_equal(
      raised[~small], bits[~small] - np.array((floor - 1) << top, bits.dtype)
    )
    lowered = np.asarray(floats.lower_floor(jnp.asarray(raised), layout, floor))
    np.testing.assert_array_equal(lowered, bits)

  @parameterized.product(dtype=FLOATS)
  def test_the_floor_of_numbers_is_found(self, dtype):
    dtype = np.dtype(dtype)
    layout = floats.LAYOUTS[dtype]
    values = np.random.default_rng(0).normal(size=20_000) * 2.0**-5
    floor = (1 << layout.exponent - 1) - 1 - 5
    bits = _floored(values.astype(dtype).view(f'u{dtype.itemsize}'), layout, floor)
    found = layouts.of_floats(bits, dtype)
    self.assertEqual(found, layouts.Float(dtype, layout.rest_bits, floor - 1))
    _check_round_trip(found, bits)


def _floored(bits, layout, floor):
  """Rounds numbers towards zero to multiples of the step of a floor."""
  top = layout.mantissa
  magnitude = bits & ((1 << layout.width - 1) - 1)
  exponent = np.maximum(magnitude >> top, 1).astype(np.int64)
  below = np.clip(floor - exponent, 0, layout.width - 1).astype(bits.dtype)
  # The leading 1 of a number is also cut off, if it is below the step.
  cut = np.where(below > top, bits & (1 << layout.width - 1), bits >> below << below)
  return cut.astype(bits.dtype)


class GridTest(parameterized.TestCase):
  @parameterized.product(
    dtype=FLOATS, kind=[layouts.SmallGrid, layouts.LargeGrid], exponent=[-14, 0]
  )
  def test_join_undoes_split_for_every_integer(self, dtype, kind, exponent):
    dtype = np.dtype(dtype)
    most = min(1 << floats.LAYOUTS[dtype].mantissa + 1, (1 << 15) - 1)
    whole = np.arange(-most, most + 1)
    bits = _bits(whole * 2.0**exponent, dtype)
    _check_round_trip(kind(dtype, 16 - kind.symbol_bits, 4 * (exponent + 150)), bits)

  @parameterized.parameters(*range(4))
  def test_units_between_powers_of_two(self, i):
    whole = np.arange(1 - (1 << 15), 1 << 15)
    for exponent in (-126, -20, 106):
      bits = _bits(whole * (4.0 + i) * 2.0**exponent, np.float32)
      step = 4 * (exponent + 152) + i
      _check_round_trip(layouts.LargeGrid(np.dtype(np.float32), 5, step), bits)

  @parameterized.product(
    given=[(3, 'grid8', 0), (30, 'grid8', 1), (150, 'grid8', 4)],
    factor=[1, 3, 5, 7],
    dtype=[np.float32, np.float16],
  )
  def test_multiples_of_a_unit_are_a_grid(self, given, factor, dtype):
    scale, kind, rest = given
    dtype = np.dtype(dtype)
    if dtype == np.float16 and scale * factor > 100:
      self.skipTest('float16 does not have these numbers')
    whole = np.rint(np.random.default_rng(0).normal(size=9999) * scale)
    bits = _bits(np.ldexp(factor * whole, -9), dtype)
    found = layouts.of_floats(bits, dtype)
    self.assertEqual(found.kind, kind)
    unit = (4 + found.step % 4) * 2.0 ** (found.step // 4 - 152)
    self.assertEqual(unit, factor * 2.0**-9)
    self.assertLessEqual(found.rest, rest)
    _check_round_trip(found, bits)

  def test_a_negative_zero_is_kept(self):
    bits = np.array([0.0, -0.0, 1.0, 2.0], np.float32).view(np.uint32)
    found = layouts.of_floats(bits, np.dtype(np.float32))
    self.assertIsInstance(found, layouts.Float)
    _check_round_trip(found, bits)

  @parameterized.product(dtype=FLOATS, value=[np.inf, np.nan, 1.0])
  def test_any_numbers_have_a_layout(self, dtype, value):
    bits = np.array([0, value, 1e-7, -3], dtype).view(f'u{np.dtype(dtype).itemsize}')
    _check_round_trip(layouts.of_floats(bits, np.dtype(dtype)), bits)


def _bits(values, dtype):
  """Bit patterns of numbers, none of which is -0."""
  return (values + 0.0).astype(dtype).view(f'u{np.dtype(dtype).itemsize}')


class IntegersTest(parameterized.TestCase):
  @parameterized.parameters(*INTEGERS)
  def test_join_undoes_split_for_every_number(self, dtype):
    bits = _patterns(dtype)
    width = 8 * np.dtype(dtype).itemsize
    least = max(width - integers.MODELLED_BITS, 0)
    for rest in range(least, width):
      _check_round_trip(layouts.Int(np.dtype(dtype), rest), bits)

  def test_small_magnitudes_are_small_symbols(self):
    bits = np.int16([0, -1, 1, -2, 2]).view(np.uint16)
    symbols, _ = layouts.Int(np.dtype(np.int16), 0).split(jnp.asarray(bits), 0)
    self.assertEqual(symbols.tolist(), [0, 1, 2, 3, 4])


class LayoutTest(parameterized.TestCase):
  def test_layouts_are_made_by_name(self):
    for layout in (
      layouts.Float(np.dtype(np.float16), 8),
      layouts.Float(np.dtype(np.float16), 8, 3),
      layouts.Int(np.dtype(np.int8), 0),
      layouts.SmallGrid(np.dtype(np.float32), 3, 563),
      layouts.LargeGrid(np.dtype(np.float16), 0, 560),
    ):
      made = layouts.layout(layout.kind, layout.dtype, layout.rest, layout.step)
      self.assertEqual(made, layout)
      self.assertEqual(hash(made), hash(layout))

  @parameterized.parameters(
    ('step', np.float16, 8, 0),
    ('float', np.float16, 9, 0),
    ('float', np.float16, -1, 0),
    ('float', np.float16, 8, 30),
    ('float', np.float16, 8, -1),
    ('float', np.int8, 1, 0),
    ('int', np.int8, 8, 0),
    ('int', np.int8, 0, 1),
    ('int', np.int32, 3, 0),
    ('grid8', np.float16, 9, 560),
    ('grid11', np.float16, 6, 560),
    ('grid8', np.float32, 0, 103),
    ('grid8', np.float32, 0, 1044),
    ('grid8', np.int8, 0, 560),
  )
  def test_unknown_ones_are_refused(self, kind, dtype, rest, step):
    with self.assertRaisesRegex(ValueError, 'layout'):
      layouts.layout(kind, np.dtype(dtype), rest, step)


class PlanesTest(parameterized.TestCase):
  @parameterized.product(
    rest=[0, 1, 3, 5, 8, 13, 21], shape=[(1, 1), (7, 3), (500, 8), (501, 8), (64, 64)]
  )
  def test_rows_are_read_as_they_were_packed(self, rest, shape):
    count, lanes = shape
    rng = np.random.default_rng(1)
    values = rng.integers(0, 1 << rest, count).astype(np.uint32)
    sizes = planes.sizes(count, lanes, rest)
    packed = planes.pack(values, lanes, rest)
    self.assertEqual(packed.size, sum(sizes))
    # Each plane wastes less than a row of bytes.
    self.assertLess(8 * packed.size - rest * count, 8 * lanes * max(len(sizes), 1))
    padded = jnp.asarray(np.pad(packed, (0, lanes)))
    starts = jnp.asarray(np.cumsum([0, *sizes])[:-1], jnp.int32)
    steps = -(-count // lanes)
    read = jax.jit(
      jax.vmap(
        lambda t: planes.read(
          padded, starts, t, jnp.int32(lanes), rest, np.dtype(np.uint32), lanes
        )
      )
    )
    rows = np.asarray(read(jnp.arange(steps))).reshape(-1)[:count]
    np.testing.assert_array_equal(rows, values)


if __name__ == '__main__':
  absltest.main()

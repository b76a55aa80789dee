"""Numbers divide into symbols and rests and come back; rests in planes likewise."""

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
  """All bit patterns, or many."""
  width = 8 * np.dtype(dtype).itemsize
  if width <= 16:
    return np.arange(1 << width).astype(f'u{width // 8}')
  return np.random.default_rng(0).integers(0, 1 << 32, 100_000).astype(np.uint32)


def _check_round_trip(layout, bits):
  symbols, rests = (np.asarray(x) for x in layout.split(jnp.asarray(bits)))
  assert symbols.max(initial=0) < layout.alphabet
  assert rests.max(initial=0) < 1 << layout.rest
  joined = np.asarray(layout.join(jnp.asarray(symbols), jnp.asarray(rests)))
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
    layout = layouts.Float.of(bits, dtype)
    self.assertEqual(layout.rest, rest)
    _check_round_trip(layout, bits)

  def test_numbers_without_rests(self):
    dtype = np.dtype(np.float16)
    for value, rest in ((1.5, 0), (-1.5, 1), (0.0, 0), (-0.0, 1)):
      bits = np.array([value], dtype).view(np.uint16)
      layout = layouts.Float.of(bits, dtype)
      self.assertEqual(layout.rest, rest)
      _check_round_trip(layout, bits)

  @parameterized.product(width=[0, 1, 5, 7, 8, 13, 21], count=[0, 1, 7, 8, 1001])
  def test_bit_packing_round_trips_densely(self, width, count):
    values = np.random.default_rng(1).integers(0, 1 << width, count).astype(np.uint32)
    packed = floats.pack_bits(values, width)
    self.assertEqual(packed.size, floats.packed_size(count, width))
    self.assertLess(8 * packed.size - width * count, 8 * max(width, 1))
    np.testing.assert_array_equal(floats.unpack_bits(packed, count, width), values)


class IntegersTest(parameterized.TestCase):
  @parameterized.parameters(*INTEGERS)
  def test_join_undoes_split_for_every_number(self, dtype):
    bits = _patterns(dtype)
    width = 8 * np.dtype(dtype).itemsize
    least = integers.least_low(bits.view(dtype))
    self.assertEqual(least, max(width - integers.MODELLED_BITS, 0))
    for rest in range(least, width):
      _check_round_trip(layouts.Int(np.dtype(dtype), rest), bits)

  def test_small_magnitudes_are_small_symbols(self):
    bits = np.int16([0, -1, 1, -2, 2]).view(np.uint16)
    symbols, _ = layouts.Int(np.dtype(np.int16), 0).split(jnp.asarray(bits))
    self.assertEqual(symbols.tolist(), [0, 1, 2, 3, 4])


class LayoutTest(parameterized.TestCase):
  def test_layouts_are_made_by_name(self):
    for layout in (
      layouts.Float(np.dtype(np.float16), 8),
      layouts.Int(np.dtype(np.int8), 0),
    ):
      made = layouts.layout(layout.kind, layout.dtype, layout.rest)
      self.assertEqual(made, layout)
      self.assertEqual(hash(made), hash(layout))

  @parameterized.parameters(
    ('step', np.float16, 8),
    ('float', np.float16, 9),
    ('float', np.float16, -1),
    ('float', np.int8, 1),
    ('int', np.int8, 8),
    ('int', np.int32, 3),
  )
  def test_unknown_ones_are_refused(self, kind, dtype, rest):
    with self.assertRaisesRegex(ValueError, 'layout'):
      layouts.layout(kind, np.dtype(dtype), rest)


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
    # Less than a row of bytes is wasted in a plane.
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

"""The programs that code blocks: many blocks at once, and damaged blocks."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import blocks
from rotbits_jax.coding.weights import floats
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import planes


def _example(dtype, count, seed=0):
  """Makes numbers as bit patterns, their contexts, a layout and tables."""
  rng = np.random.default_rng(seed)
  dtype = np.dtype(dtype)
  contexts = rng.integers(0, 3, count)
  values = (rng.standard_normal(count) * 2.0**contexts).astype(dtype)
  layout = layouts.Float(dtype, floats.LAYOUTS[dtype].rest_bits)
  # Every symbol can be coded, so that the tables can be used for other numbers, too.
  counts = np.ones((3, layout.alphabet), np.int64)
  symbols = np.asarray(floats.split(jnp.asarray(values))[0])
  np.add.at(counts, (contexts, symbols), 20)
  return values.view(layout.unsigned), contexts, layout, tables.quantize(counts)


class BlocksTest(parameterized.TestCase):
  def _encode(self, bits, contexts, layout, frequencies, lanes):
    made = blocks.tables_of(frequencies, decoding=True)

    def fill(out, places):
      out[:], places[:] = bits, contexts

    return *blocks.encode(fill, bits.size, lanes, layout, made), made

  def _decode(self, coded, rests, contexts, layout, made, lanes):
    read, found = lambda out: np.copyto(out, contexts, 'unsafe'), []
    blocks.decode(
      *(coded, rests, read, lambda bits: found.append(bits.copy())),
      *(contexts.size, lanes, layout, made),
    )
    return found[0]

  @parameterized.product(
    dtype=[np.float16, ml_dtypes.bfloat16, np.float32],
    shape=[(1, 1), (100, 1), (1000, 7), (5000, 64), (20_000, 64), (70, 64)],
  )
  def test_any_number_of_lanes(self, dtype, shape):
    count, lanes = shape
    bits, contexts, layout, frequencies = _example(dtype, count)
    coded, rests, made = self._encode(bits, contexts, layout, frequencies, lanes)
    self.assertEqual(rests.size, blocks.rest_size(count, lanes, layout))
    decoded = self._decode(coded, rests, contexts, layout, made, lanes)
    np.testing.assert_array_equal(decoded, bits)

  def test_a_lane_costs_three_bytes(self):
    sizes = {}
    for lanes in (2, 64):
      bits, contexts, layout, frequencies = _example(np.float16, 30_000)
      coded, *_ = self._encode(bits, contexts, layout, frequencies, lanes)
      sizes[lanes] = coded.size
    self.assertLess((sizes[64] - sizes[2]) / 62, 4)

  @parameterized.parameters((1, 1), (4095, 1), (8192, 2), (1 << 20, 64))
  def test_lanes_are_worth_their_bytes(self, count, most):
    lanes = blocks.lanes_for(count)
    self.assertLessEqual(lanes, most)
    self.assertGreaterEqual(lanes, most // 2)
    self.assertLessEqual(-(-count // lanes), blocks.STEPS)

  def test_bytes_that_are_no_block_are_refused(self):
    bits, contexts, layout, frequencies = _example(np.float16, 900)
    coded, rests, made = self._encode(bits, contexts, layout, frequencies, 4)
    decode = lambda coded: self._decode(coded, rests, contexts, layout, made, 4)
    for size in range(0, coded.size, 7):
      with self.assertRaises(ValueError):
        decode(coded[:size])
    for position in range(16, 24):  # the least size, their width, and the sizes
      with self.assertRaises(ValueError):
        damaged = coded.copy()
        damaged[position] ^= 64
        decode(damaged)

  def test_many_at_once(self):
    count, lanes, capacity = 600, 8, 640
    parts, expected = [], []
    for seed in range(3):
      bits, contexts, layout, _ = _example(np.float16, count, seed)
      frequencies = _example(np.float16, count)[3]
      coded, rests, made = self._encode(bits, contexts, layout, frequencies, lanes)
      sizes = coded[4 * lanes + 4 : 5 * lanes + 4].astype(np.int32)
      sizes += coded[4 * lanes : 4 * lanes + 2].view('<u2')
      words = coded[5 * lanes + 4 :].view('<u2')
      padded = np.full(capacity + 2 * lanes, made.void, np.uint8)
      padded[:count] = contexts
      parts.append(
        (
          np.zeros(capacity + 2 * lanes, np.uint16),
          np.pad(words, (0, capacity - words.size)),
          coded[: 4 * lanes].view('<u4'),
          np.cumsum(sizes) - sizes,
          np.cumsum(sizes),
          padded,
          np.pad(rests, (0, 2 * lanes)),
        )
      )
      expected.append(bits)
    starts = np.cumsum([0, *planes.sizes(count, lanes, layout.rest)])[:-1]

    @jax.jit
    @jax.vmap
    def decode(*block):
      out, words, states, begins, ends, contexts, rests = block
      return blocks.decode_block(
        *(out, words, states, begins.astype(jnp.int32), ends.astype(jnp.int32)),
        *(contexts, rests, jnp.asarray(starts, jnp.int32)),
        *(jnp.asarray(made.intervals), jnp.asarray(made.slots)),
        *(jnp.int32(lanes), jnp.int32(-(-count // lanes)), jnp.int32(layout.step)),
        layout=layout.program,
      )

    out, state, _ = decode(*map(np.stack, zip(*parts, strict=True)))
    np.testing.assert_array_equal(np.asarray(out)[:, :count], np.stack(expected))
    self.assertFalse(np.asarray(state).any())


if __name__ == '__main__':
  absltest.main()

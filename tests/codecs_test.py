"""Codecs are exact inverses in both orders, and as short as they should be."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding.bits_back import haar
from rotbits_jax.system import native
from tests import codec_checks

RNG = np.random.default_rng(0)
BITS = np.concatenate([[0, 16, 15], RNG.integers(0, 17, 21)])
COUNTS = RNG.integers(0, 9, (3, 17)) * RNG.integers(0, 2, 17)
FREQUENCIES = np.insert(COUNTS, 8, tables.TOTAL - COUNTS.sum(axis=1), axis=1)
CONTEXTS = RNG.integers(0, 3, 42)
MOST = FREQUENCIES.argmax(axis=1)[CONTEXTS]


def uint32(x):
  return jnp.asarray(x, jnp.uint32)


def uint16(x):
  return jnp.asarray(x, jnp.uint16)


def cells(n, k):
  message = codec_checks.random_message(n, 4, 200)
  return haar.codec(n, k).pop(message)[1]


# A codec and one of its symbols.
CODECS = {
  'uniform': (codecs.uniform(uint32(BITS)), uint16(RNG.integers(0, 1 << BITS))),
  'categorical': (codecs.categorical(uint32(CONTEXTS), FREQUENCIES), uint16(MOST)),
  'one symbol': (
    codecs.categorical(jnp.zeros(9, jnp.uint32), np.array([[tables.TOTAL]])),
    uint16([0] * 9),
  ),
  'haar': (haar.codec(9, 9), cells(9, 9)),
  'haar, a frame': (haar.codec(7, 3), cells(7, 3)),
}


def every_slot(bits):
  """Returns a message with one lane for each slot that a symbol can be popped from."""
  slots = jnp.arange(1 << bits, dtype=jnp.uint16)
  return rans.stacked(jnp.stack([jnp.zeros_like(slots), slots]))


class CodecsTest(parameterized.TestCase):
  @parameterized.named_parameters((name, name) for name in CODECS)
  def test_is_exact(self, name):
    codec, symbol = CODECS[name]
    for lanes in (1, 7):
      message = codec_checks.random_message(lanes, lanes, 90)
      codec_checks.check_codec(codec, symbol, message, eager=name == 'uniform')

  @parameterized.parameters(0, 1, 10, 16)
  def test_slots_are_shared_out_evenly(self, bits):
    codec = codecs.uniform(jnp.full(1 << 16, bits, jnp.uint32))
    expected = np.repeat(np.arange(1 << bits), 1 << 16 - bits)
    np.testing.assert_array_equal(codec.pop(every_slot(16))[1], expected)

  def test_every_slot_is_its_owner_s(self):
    frequencies = np.array([[0, 5, 0, 0, 90, 1, 1, 0, tables.TOTAL - 97, 0]])
    codec = codecs.categorical(jnp.zeros(tables.TOTAL, jnp.uint32), frequencies)
    _, symbols = codec.pop(every_slot(tables.PRECISION))
    np.testing.assert_array_equal(symbols, np.repeat(np.arange(10), frequencies[0]))

  def test_costs_as_many_bits(self):
    bits = RNG.integers(0, 13, 20000)
    message = codec_checks.random_message(0, 32, 700)
    longer = jax.jit(codecs.uniform(uint32(bits)).push)(message, uint16(0 * bits))
    cost = rans.content_bits(rans.check(longer)) - rans.content_bits(message)
    self.assertAlmostEqual(cost / bits.sum(), 1, delta=2e-3)


def loops_of_thunks(function, *arguments):
  """Returns the loops of the entry that an executor of thunks would run."""
  text = jax.jit(function).lower(*arguments).compile().as_text()
  entry = text[text.index('\nENTRY') :]
  return [line for line in entry.split('\n') if ' while(' in line]


def doubled(x, n):
  return jax.lax.fori_loop(0, n, lambda i, x: x + x[i], x)


def test_a_coder_is_not_a_loop_of_thunks():
  rows = np.random.default_rng(0).integers(0, 1 << 16, (200, 8))
  message = rans.stacked(jnp.asarray(rows, jnp.uint16))
  codec = codecs.categorical(jnp.arange(100) % 3, np.full((3, 4), 1 << 12))
  rest, symbols = jax.jit(codec.pop)(message)
  assert not loops_of_thunks(codec.pop, message)
  assert not loops_of_thunks(codec.push, rest, symbols)


def test_other_platforms_have_no_attributes():
  exported = jax.export.export(jax.jit(native.loop(doubled)), platforms=['cuda'])
  assert 'small_call' not in exported(jnp.ones(64), 3).mlir_module()


@pytest.mark.parametrize('size', [8, 1 << 14])
def test_closures_and_constants(size):
  """XLA aborts if an operand of a native function is a large constant."""
  rng = np.random.default_rng(0)
  table, numbers = rng.integers(0, 9, (2, size)), jnp.arange(size)

  def looked_up(x, n):
    step = lambda i, x: x + jnp.asarray(table[0])[i] + numbers[i]
    return jax.lax.fori_loop(0, n, step, x)

  found = jax.jit(native.loop(looked_up))(jnp.asarray(table[1]), 5)
  np.testing.assert_array_equal(found, table[1] + table[0][:5].sum() + 10)

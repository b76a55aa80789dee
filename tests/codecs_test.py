"""Codecs are exact inverses in both orders, and as short as they should be."""

import functools

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
from tests import devices

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


SERIAL = codecs.serial(
  codecs.uniform(jnp.full(8, 3, jnp.uint32)),
  codecs.categorical(uint32(CONTEXTS), FREQUENCIES),
)
NOISY = np.array([[3, 1], [1, 3]]) * tables.TOTAL // 4


def noisy_bits(count):
  """Returns the codec of bits of which a latent bit is a noisy copy."""
  return codecs.bits_back(
    prior=codecs.uniform(jnp.full(count, 1, jnp.uint32)),
    likelihood=lambda z: codecs.categorical(z, NOISY),
    posterior=lambda x: codecs.categorical(x, NOISY),
  )


# A codec and one of its symbols.
CODECS = {
  'uniform': (codecs.uniform(uint32(BITS)), uint16(RNG.integers(0, 1 << BITS))),
  'serial': (SERIAL, (uint16(np.arange(8)), uint16(MOST))),
  'bits back': (noisy_bits(8), uint16([0, 1, 1, 0, 1, 0, 0, 1])),
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


# ---- inside JAX ----------------------------------------------------------------------

COUNT = 6
SYMBOLS = uint16(np.arange(COUNT * 24).reshape(COUNT, 24) % 16)
NIBBLES = codecs.uniform(jnp.full(24, 4, jnp.uint32))


def pushed(message):
  """Pushes all symbols, one call after the other."""
  return functools.reduce(NIBBLES.push, SYMBOLS, message)


def scanned(message):
  step = lambda message, symbols: (NIBBLES.push(message, symbols), None)
  return jax.lax.scan(step, message, SYMBOLS)[0]


def looped(message):
  step = lambda state: (state[0] + 1, NIBBLES.push(state[1], SYMBOLS[state[0]]))
  is_left = lambda state: state[0] < COUNT
  return jax.lax.while_loop(is_left, step, (0, message))[1]


def mapped(message):
  both = jax.tree.map(lambda x: jnp.stack([x, x]), message)
  for symbols in SYMBOLS:
    both = jax.vmap(NIBBLES.push, (0, None))(both, symbols)
  return jax.tree.map(lambda x: x[1], both)


class CompositionTest(parameterized.TestCase):
  @parameterized.parameters(scanned, looped, mapped)
  def test_pushes_are_those_of_a_python_loop(self, push):
    message = codec_checks.random_message(0, 4, 30)
    self.assertEqual(rans.check(push(message)), pushed(message))

  def test_pops_in_a_scan_undo_pushes(self):
    message = codec_checks.random_message(0, 4, 30)
    step = lambda message, _: NIBBLES.pop(message)
    rest, symbols = jax.lax.scan(step, pushed(message), length=COUNT)
    self.assertEqual(rest, message)
    np.testing.assert_array_equal(symbols[::-1], SYMBOLS)

  def test_a_compiled_push_is_traced_once(self):
    traces = []

    @jax.jit
    def push(message, symbols):
      traces.append(message)
      return NIBBLES.push(message, symbols)

    functools.reduce(push, SYMBOLS, codec_checks.random_message(0, 4, 30))
    self.assertLen(traces, 1)

  @parameterized.parameters('Auto', 'Explicit')
  def test_lanes_may_be_divided_over_devices(self, kind):
    devices.run(f'from tests import codecs_test as t; t.check_sharded({kind!r})')


def check_sharded(kind):
  """Checks a message whose lanes are divided over 8 devices."""
  axis_types = (jax.sharding.AxisType[kind],)
  mesh = jax.make_mesh((8,), ('lanes',), axis_types=axis_types)
  message = codec_checks.random_message(0, 16, 30)
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('lanes'))
  sharded = jax.device_put(message, sharding)
  full = jax.jit(NIBBLES.push)(sharded, SYMBOLS[0])
  assert full == NIBBLES.push(message, SYMBOLS[0])
  left, symbols = jax.jit(NIBBLES.pop)(full)
  assert left == message
  np.testing.assert_array_equal(symbols, SYMBOLS[0])
  for array in (*full, *left):
    assert array.sharding.shard_shape(array.shape)[0] == 2, array.sharding


# ---- codecs of codecs ----------------------------------------------------------------


def test_bits_back_costs_the_evidence():
  message = codec_checks.random_message(0, 1, 200)
  longer = noisy_bits(1000).push(message, jnp.ones(1000, jnp.uint16))
  cost = rans.content_bits(longer) - rans.content_bits(message)
  # A bit each. If the latents did not come back, it would be 1.8.
  np.testing.assert_allclose(cost, 1000, rtol=0.01)


# ---- wrong arguments -----------------------------------------------------------------

INDICES = np.zeros(3, np.uint32)
FULL = np.full((1, 1), tables.TOTAL)
ERRORS = {
  'many bits': (lambda: codecs.uniform(uint32([3, 20])), 'to 16, got 3 to 20'),
  'many NumPy bits': (lambda: codecs.uniform(np.array([20])), 'got 20 to 20'),
  'negative bits': (lambda: codecs.uniform(np.array([-1])), 'got -1 to -1'),
  'a matrix of bits': (lambda: codecs.uniform(uint32([[3]])), r'bits.shape=\(1, 1\)'),
  'real bits': (lambda: codecs.uniform(jnp.ones(3)), 'bits.dtype=float32'),
  'no symbol': (lambda: codecs.uniform(uint32([])), r'bits.shape=\(0,\)'),
  'totals': (lambda: codecs.categorical(INDICES, FULL - 1), 'sums from 16383'),
  'a negative frequency': (
    lambda: codecs.categorical(INDICES, np.array([[tables.TOTAL + 1, -1]])),
    'must be non-negative',
  ),
  'a vector of frequencies': (
    lambda: codecs.categorical(INDICES, FULL[0]),
    r'frequencies.shape=\(1,\)',
  ),
  'probabilities': (
    lambda: codecs.categorical(INDICES, np.ones((1, 1))),
    'frequencies.dtype=',
  ),
  'no such table': (
    lambda: codecs.categorical(INDICES + 2, FULL),
    'contexts must be from 0 to 1, got 2',
  ),
  'few symbols': (
    lambda: NIBBLES.push(codec_checks.random_message(0, 3, 9), uint16([1])),
    r'symbols.shape=\(1,\)',
  ),
  'wide frames': (lambda: haar.codec(4, 5), 'got n=4, k=5'),
  'frames of no columns': (lambda: haar.codec(4, 0), 'got n=4, k=0'),
  'a frame of other cells': (
    lambda: haar.rotation(uint16([1, 2]), 4, 4),
    r'cells.shape=\(2,\)',
  ),
  'a vector of words': (lambda: rans.stacked(uint16([1, 2])), r'words.shape=\(2,\)'),
  'no words': (lambda: rans.stacked(uint16([[]])), r'words.shape=\(1, 0\)'),
  'words of 32 bits': (lambda: rans.stacked(uint32([[1]])), 'uint32'),
  'negative room': (lambda: rans.stacked(uint16([[1]]), room=-1), 'room=-1'),
}


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters(*ERRORS)
  def test_a_wrong_argument_is_named(self, name):
    call, text = ERRORS[name]
    with self.assertRaisesRegex(ValueError, text):
      call()

  def test_shapes_are_checked_under_jit(self):
    with self.assertRaisesRegex(ValueError, 'bits.shape'):
      jax.jit(lambda x: codecs.uniform(x).pop(rans.stacked(x)))(uint32([[1]]))


# ---- native loops --------------------------------------------------------------------


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

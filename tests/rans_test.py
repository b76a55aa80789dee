"""The coder and its tables are exact, and as short as the probabilities allow."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from tests import codec_checks

LANES, PRECISION = 5, 12

# Four symbols divide [0, 2^12) into unequal parts.
BOUNDS = jnp.asarray([0, 1, 100, 3000, 1 << PRECISION], jnp.uint32)


def interval(symbol, _=None):
  return BOUNDS[symbol], BOUNDS[symbol + 1] - BOUNDS[symbol]


def owner(slot, _):
  return jnp.searchsorted(BOUNDS, slot, side='right') - 1


def words_pushed(message, count):
  """Pushes `count` words of 16 bits onto each lane."""
  ones = jnp.ones((count, message.lanes), jnp.uint32)
  return rans.push_all(message, ones, ones, 16)


def words_popped(message, count):
  ones = jnp.ones((count, message.lanes), jnp.uint32)
  same = lambda x, one: x
  return rans.pop_all(message, ones, same, lambda *pair: pair, 16)[0]


def content(message):
  words, size = np.asarray(message.words), np.asarray(message.size)
  stacks = [words[i, : size[i]].tolist() for i in range(message.lanes)]
  return np.asarray(message.state).tolist(), stacks


def reference_push(state, stack, start, frequency, precision):
  """Pushes to one lane with Python integers, as in the definition."""
  if (state // frequency) << precision >= 1 << 32:
    stack.append(state & 0xFFFF)
    state >>= 16
  return (state // frequency << precision) + state % frequency + start


class RansTest(absltest.TestCase):
  def test_push_agrees_with_python_integers(self):
    for precision in (10, 12, 16):
      with self.subTest(precision=precision):
        rng, total = np.random.default_rng(precision), 1 << precision
        message = codec_checks.random_message(0, LANES, 40)
        states, stacks = content(message)
        starts = rng.integers(0, total, (30, LANES))
        frequencies = rng.integers(1, total - starts + 1)
        pairs = jnp.asarray(starts, jnp.uint32), jnp.asarray(frequencies, jnp.uint32)
        message = rans.push_all(message, *pairs, precision)
        for row in zip(starts[::-1], frequencies[::-1], strict=True):
          states = [
            reference_push(x, stack, int(s), int(f), precision)
            for x, stack, s, f in zip(states, stacks, *row, strict=True)
          ]
        self.assertEqual(content(message), (states, stacks))

  def test_divmod_is_exact_at_the_edges(self):
    rng = np.random.default_rng(0)
    y = np.concatenate([np.arange(1, 300), 2 ** np.arange(17), [65535, 65521]])
    y = np.repeat(y, 200).astype(np.uint64)
    limit = np.minimum(1 << 22, (1 << 32) // y)
    quotients = (rng.random(y.size) * limit).astype(np.uint64)
    quotients[::3] = limit[::3] - 1
    remainders = rng.integers(0, 1 << 16, y.size).astype(np.uint64) % y
    remainders[::2], remainders[1::4] = 0, (y - 1)[1::4]
    x = quotients * y + remainders
    found = rans._divmod(jnp.asarray(x, jnp.uint32), jnp.asarray(y, jnp.uint32))
    np.testing.assert_array_equal(found[0], quotients)
    np.testing.assert_array_equal(found[1], remainders)

  def test_pop_undoes_push_and_push_undoes_pop(self):
    push = lambda m, x: rans.push_all(m, *interval(x), PRECISION)
    contexts = jnp.zeros((20, LANES))
    pop = lambda m: rans.pop_all(m, contexts, owner, interval, PRECISION)
    for compiled in (jax.jit, lambda function: function):
      message = codec_checks.random_message(1, LANES, 40)
      symbols = np.random.default_rng(0).integers(0, 4, (20, LANES))
      restored, popped = compiled(pop)(compiled(push)(message, jnp.asarray(symbols)))
      np.testing.assert_array_equal(popped, symbols)
      self.assertEqual(content(restored), content(message))
      restored = compiled(push)(*compiled(pop)(message))
      self.assertEqual(content(restored), content(message))

  def test_underflow_is_noticed_later(self):
    dry = words_pushed(words_popped(rans.empty(LANES), 2), 4)
    with self.assertRaisesRegex(rans.MessageError, f'{16 * 2 * LANES} bits'):
      rans.check(dry)

  def test_words_round_trip(self):
    for seed in (0, 1, 7):
      message = codec_checks.random_message(seed, LANES, 40)
      words = rans.to_words(message)
      self.assertEqual(content(rans.from_words(words, LANES, 40)), content(message))
      for wrong, room in ((words[:-1], 40), (words[:8], 40), (words, 30)):
        with self.assertRaises(rans.MessageError):
          rans.from_words(wrong, LANES, room)

  def test_words_come_back_from_under_the_content(self):
    for depth in (1, 3):
      words = np.random.default_rng(0).integers(0, 1 << 16, (depth, 5), np.uint16)
      message = rans.stacked(jnp.asarray(words))
      message = words_popped(words_pushed(message, 4), 4)
      np.testing.assert_array_equal(rans.unstacked(rans.check(message)), words)
      message = rans.check(words_popped(message, depth - 1))
      with self.assertRaises(rans.MessageError):
        rans.check(words_popped(message, 1))

  def test_golden_words(self):
    """The emitted words are part of the format, so a change here breaks every file."""
    message = rans.stacked(jnp.asarray([[7, 65535, 0]], jnp.uint16))
    i = np.arange(9)[::-1, None]
    starts = jnp.asarray(np.hstack([i, 100 * i, 0 * i + 3000]), jnp.uint32)
    frequencies = jnp.broadcast_to(jnp.asarray([1, 50, 1000], jnp.uint32), (9, 3))
    message = rans.push_all(message, starts, frequencies, 12)
    golden = [1, 0, 28680, 9001, 7376, 4096, 1163, 5, 5, 2, 0]
    golden += [28672, 1, 2, 12292, 5, 6, 32905, 24923, 634, 15936]
    self.assertEqual(rans.to_words(message).tolist(), golden)


_RNG = np.random.default_rng(0)
COUNTS = {
  'normal': np.bincount(
    np.clip(_RNG.normal(100, 12, 100_000), 0, 255).astype(int), minlength=256
  ),
  'lone': np.eye(1, 256, 17, dtype=int)[0] * 1000,
  'two': np.array([1, 10**9]),
  'skewed': np.array([10**9] + [1] * 255),
  'uniform': np.ones(2048, int),
  'full': np.ones(tables.TOTAL // 2, int),
  'full_and_great': np.full(tables.TOTAL // 2, 7 << 27),
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
        shares = tables.quantize(counts) / tables.TOTAL
        used = counts > 0
        cost = -np.sum(counts[used] * np.log2(shares[used]))
        self.assertLess(cost / tables.entropy_bits(counts) - 1, 1e-3)

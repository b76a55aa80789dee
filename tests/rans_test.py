"""Messages are exact, and their words are those of the format."""

from absl.testing import absltest
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.paper import stack
from tests import codec_checks

LANES = 5


def words_of(count, lanes=LANES):
  """Returns the codec of `count` words of 16 bits of each lane."""
  return codecs.uniform(jnp.full(count * lanes, 16, jnp.uint32))


def words_pushed(message, count):
  return words_of(count).push(message, jnp.ones(count * LANES, jnp.uint16))


def words_popped(message, count):
  return words_of(count).pop(message)[0]


def message_of(words, room=40):
  return rans.stacked(jnp.asarray(words, jnp.uint16), room=room)


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
        state, pushed = message.state, [list(x) for x in stacks]
        for _ in range(30):
          starts = rng.integers(0, total, LANES)
          frequencies = rng.integers(1, total - starts + 1)
          pair = jnp.asarray(starts, jnp.uint32), jnp.asarray(frequencies, jnp.uint32)
          state, words, moved = rans.push_step(state, *pair, precision)
          for i in np.flatnonzero(moved):
            pushed[i].append(int(words[i]))
          states = [
            reference_push(x, stack, int(s), int(f), precision)
            for x, stack, s, f in zip(states, stacks, starts, frequencies, strict=True)
          ]
        self.assertEqual((state.tolist(), pushed), (states, stacks))

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

  def test_underflow_is_noticed_later(self):
    dry = words_pushed(words_popped(message_of([[0] * LANES]), 2), 4)
    with self.assertRaisesRegex(ValueError, 'ran dry'):
      rans.check(dry)

  def test_overflow_is_noticed_later(self):
    full = words_pushed(message_of([[0] * LANES], room=2), 4)
    self.assertGreater(full.size.min(), full.capacity)  # it tells the words needed
    with self.assertRaisesRegex(ValueError, 'overflowed: a lane has room for 2 words'):
      rans.check(words_popped(full, 4))

  def test_the_last_word_of_room_can_be_used(self):
    message = message_of([[0] * LANES], room=4)
    full = rans.check(words_pushed(message, 4))
    self.assertEqual(full.size.tolist(), [4] * LANES)
    self.assertEqual(rans.check(words_popped(full, 4)), message)

  def test_equal_messages_hold_the_same_words(self):
    message = message_of([[1] * LANES, [2] * LANES], room=3)
    same = message._replace(words=message.words.at[:, 1:].set(7))
    other = message._replace(words=message.words.at[0, 0].set(7))
    self.assertTrue(message == same)
    self.assertFalse(message != same)
    self.assertFalse(message == other)

  def test_words_round_trip(self):
    for seed in (0, 1, 7):
      message = codec_checks.random_message(seed, LANES, 40)
      words = rans.to_words(message)
      pop = stack.WordStack(words).pop
      self.assertEqual(content(rans.from_words(pop, LANES, 40)), content(message))
      for wrong, room in ((words[1:], 40), (words[-8:], 40), (words, 30)):
        with self.assertRaises(ValueError):
          rans.from_words(stack.WordStack(wrong).pop, LANES, room)

  def test_words_come_back_from_under_the_content(self):
    for depth in (2, 3):
      words = np.random.default_rng(0).integers(0, 1 << 16, (depth, 5), np.uint16)
      message = message_of(words)
      message = words_popped(words_pushed(message, 4), 4)
      np.testing.assert_array_equal(rans.unstacked(rans.check(message)), words)
      message = rans.check(words_popped(message, depth - 1))
      with self.assertRaises(ValueError):
        rans.check(words_popped(message, 1))

  def test_golden_words(self):
    """The emitted words are part of the format, so a change here breaks every file."""
    frequencies = np.array([[1, 50, 1000, tables.TOTAL - 1051]])
    codec = codecs.categorical(jnp.zeros(31, jnp.uint32), frequencies)
    symbols = jnp.arange(31, dtype=jnp.uint16) % 4
    words = rans.to_words(codec.push(message_of([[7, 65535, 0]]), symbols))
    self.assertEqual(words.tolist(), GOLDEN)


GOLDEN = [
  *(25012, 22638, 32768, 31122, 49152, 42934, 32768, 12179, 36717, 16384, 24307, 49),
  *(16384, 132, 25, 4997, 17429, 2, 4, 4, 4),
]

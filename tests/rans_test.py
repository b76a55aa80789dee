"""The coder is exact in both orders and as short as its probabilities allow."""

import itertools

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import rans

LANES, PRECISION = 5, 12


def _random_message(seed: int, depth: int = 40, room: int = 40) -> rans.Message:
  """Returns a message with random content and lanes of unequal depth."""
  rng = np.random.default_rng(seed)
  size = rng.integers(depth // 2, depth, LANES).astype(np.int32)
  return rans.Message(
    state=jnp.asarray(rng.integers(1 << 16, 1 << 32, LANES), jnp.uint32),
    words=jnp.asarray(rng.integers(0, 1 << 16, (LANES, depth + room)), jnp.uint16),
    size=jnp.asarray(size),
    lowest=jnp.asarray(size),
    highest=jnp.asarray(size),
  )


def _content(message: rans.Message) -> tuple[list[int], list[list[int]]]:
  words, size = np.asarray(message.words), np.asarray(message.size)
  stacks = [words[i, : size[i]].tolist() for i in range(message.lanes)]
  return np.asarray(message.state).tolist(), stacks


def _reference_push(
  state: int, stack: list[int], start: int, frequency: int, precision: int
) -> int:
  """Pushes to one lane with Python integers, as in the definition."""
  if (state // frequency) << precision >= 1 << 32:
    stack.append(state & 0xFFFF)
    state >>= 16
  return (state // frequency << precision) + state % frequency + start


class RansTest(absltest.TestCase):
  def test_push_agrees_with_python_integers(self):
    for precision in (10, 12, 16):
      with self.subTest(precision=precision):
        rng = np.random.default_rng(precision)
        total = 1 << precision
        message = _random_message(0)
        states, stacks = _content(message)
        for _ in range(30):
          start = rng.integers(0, total, LANES)
          frequency = np.array([rng.integers(1, total - s + 1) for s in start])
          message = rans.push(
            message,
            jnp.asarray(start, jnp.uint32),
            jnp.asarray(frequency, jnp.uint32),
            precision,
          )
          states = [
            _reference_push(x, stack, int(s), int(f), precision)
            for x, stack, s, f in zip(states, stacks, start, frequency, strict=True)
          ]
        self.assertEqual(_content(message), (states, stacks))

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
    got = rans._divmod(jnp.asarray(x, jnp.uint32), jnp.asarray(y, jnp.uint32))
    np.testing.assert_array_equal(np.asarray(got[0]), quotients)
    np.testing.assert_array_equal(np.asarray(got[1]), remainders)

  def test_pop_undoes_push_and_push_undoes_pop(self):
    # Four symbols divide [0, 2^12) into unequal parts.
    bounds = jnp.asarray([0, 1, 100, 3000, 1 << PRECISION], jnp.uint32)

    def lookup(slot):
      symbol = jnp.searchsorted(bounds, slot, side='right') - 1
      return symbol, bounds[symbol], bounds[symbol + 1] - bounds[symbol]

    def push(message, symbol):
      start = bounds[symbol]
      return rans.push(message, start, bounds[symbol + 1] - start, PRECISION)

    def pop(message):
      return rans.pop(message, lookup, PRECISION)

    eager = push, pop
    compiled = jax.jit(push), jax.jit(pop)
    for (push, pop), seed in itertools.product((eager, compiled), range(3)):
      with self.subTest(compiled=push is compiled[0], seed=seed):
        message = _random_message(seed)
        before = _content(message)
        symbols = np.random.default_rng(seed).integers(0, 4, (20, LANES))
        for symbol in symbols:
          message = push(message, jnp.asarray(symbol))
        for symbol in symbols[::-1]:
          message, popped = pop(message)
          np.testing.assert_array_equal(np.asarray(popped), symbol)
        self.assertEqual(_content(message), before)
        popped = []
        for _ in range(20):
          message, symbol = pop(message)
          popped.append(symbol)
        for symbol in popped[::-1]:
          message = push(message, symbol)
        self.assertEqual(_content(message), before)

  def test_whole_interval_leaves_a_lane_as_it_is(self):
    message = _random_message(3)
    start = jnp.zeros(LANES, jnp.uint32)
    after = rans.push(message, start, jnp.full(LANES, 1 << 16, jnp.uint32), 16)
    self.assertEqual(_content(after), _content(message))

  def test_running_dry_says_how_many_bits_are_missing(self):
    message = rans.empty(LANES, 10)
    uniform = lambda slot: (slot, slot, jnp.ones_like(slot))
    for _ in range(2):
      message, symbol = rans.pop(message, uniform, 16)
    # Later pushes do not hide that the message was dry.
    for _ in range(4):
      message = rans.push(message, symbol, jnp.ones_like(symbol), 16)
    with self.assertRaisesRegex(rans.MessageError, f'{16 * 2 * LANES} bits'):
      rans.check(message)

  def test_overflow_is_noticed_even_if_popped_again(self):
    message = rans.empty(LANES, 3)
    one = jnp.ones(LANES, jnp.uint32)
    for _ in range(5):
      message = rans.push(message, one, one, 16)
    for _ in range(5):
      message, _ = rans.pop(message, lambda slot: (slot, slot, one), 16)
    with self.assertRaisesRegex(rans.MessageError, '2 words more'):
      rans.check(message)

  def test_words_round_trip(self):
    for seed in (0, 1, 7):
      with self.subTest(seed=seed):
        message = _random_message(seed)
        words = rans.to_words(message)
        self.assertEqual(_content(rans.from_words(words, LANES)), _content(message))
        with self.assertRaises(rans.MessageError):
          rans.from_words(words[:-1], LANES)
        with self.assertRaises(rans.MessageError):
          rans.from_words(words[:8], LANES)

  def test_payload_comes_back_from_under_the_content(self):
    payload = jnp.asarray([0, 1, 65535, 4711, 32768], jnp.uint16)
    message = rans.seeded(payload, 10)
    one = jnp.ones(LANES, jnp.uint32)
    for _ in range(6):
      message = rans.push(message, one, one, 16)
    for _ in range(6):
      message, _ = rans.pop(message, lambda slot: (slot, slot, one), 16)
    np.testing.assert_array_equal(np.asarray(rans.payload(message)), payload)

  def test_precision_out_of_range_is_refused(self):
    one = jnp.ones(LANES, jnp.uint32)
    for precision in (9, 17):
      with self.assertRaisesRegex(ValueError, 'precision'):
        rans.push(_random_message(0), one, one, precision)

  def test_golden_words(self):
    """The emitted words are part of the format, so a change here breaks every file."""
    message = rans.seeded(jnp.asarray([7, 65535, 0], jnp.uint16), 8)
    for i in range(9):
      start = jnp.asarray([i, 100 * i, 3000], jnp.uint32)
      frequency = jnp.asarray([1, 50, 1000], jnp.uint32)
      message = rans.push(message, start, frequency, 12)
    golden = [1, 0, 1, 28680, 9001, 7376, 4096, 1163, 5, 517, 0]
    golden += [28672, 1, 2, 12292, 5, 6, 32905, 24923, 634, 15936]
    self.assertEqual(rans.to_words(message).tolist(), golden)


if __name__ == '__main__':
  absltest.main()

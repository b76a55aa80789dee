"""Tests of messages that hold words below their content."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import rans


class StackedTest(parameterized.TestCase):
  @parameterized.parameters(1, 3)
  def test_words_come_back_from_under_the_content(self, depth):
    words = np.random.default_rng(0).integers(0, 1 << 16, (depth, 5)).astype(np.uint16)
    message = rans.stacked(jnp.asarray(words), 9)
    one = jnp.ones(5, jnp.uint32)
    push = jax.jit(lambda m: rans.push(m, one, one, 16))
    pop = jax.jit(lambda m: rans.pop(m, lambda slot: (slot, slot, one), 16)[0])
    for step in (*[push] * 4, *[pop] * 4):
      message = step(message)
    rans.check(message)
    self.assertEqual(message.size.tolist(), [depth - 1] * 5)
    np.testing.assert_array_equal(message.words[:, : depth - 1].T, words[:-1])
    np.testing.assert_array_equal(rans.payload(message), words[-1])
    for _ in range(depth - 1):
      message = pop(message)
    rans.check(message)
    with self.assertRaises(rans.MessageError):
      rans.check(pop(message))


if __name__ == '__main__':
  absltest.main()

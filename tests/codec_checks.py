"""Checks that every codec must pass."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans


def random_message(seed: int, lanes: int, depth: int) -> rans.Message:
  """Returns a message with random states and words, and room for as many more."""
  rng = np.random.default_rng(seed)
  size = jnp.asarray(rng.integers(depth - depth // 8, depth + 1, lanes), jnp.int32)
  return rans.Message(
    state=jnp.asarray(rng.integers(1 << 16, 1 << 32, lanes), jnp.uint32),
    words=jnp.asarray(rng.integers(0, 1 << 16, (lanes, 2 * depth)), jnp.uint16),
    size=size,
  )


def assert_same_message(a: rans.Message, b: rans.Message) -> None:
  """Asserts equal content."""
  np.testing.assert_array_equal(a.state, b.state)
  np.testing.assert_array_equal(a.size, b.size)
  depth = int(np.max(a.size, initial=0))
  used = np.arange(depth) < np.asarray(a.size)[:, None]
  stacks = [np.asarray(x.words)[:, :depth][used] for x in (a, b)]
  np.testing.assert_array_equal(*stacks)


def check_codec(
  codec: codecs.Codec, symbol: Any, message: rans.Message, *, eager: bool = False
) -> None:
  """Asserts that push and pop invert each other, under strict dtype promotion.

  Args:
    codec: the codec.
    symbol: a symbol of the codec.
    message: a message with enough content for a symbol.
    eager: True to check that `jit` makes no difference, which takes longer.
  """
  push, pop = jax.jit(codec.push), jax.jit(codec.pop)
  with jax.numpy_dtype_promotion('strict'):
    pushed = rans.check(push(message, symbol))
    restored, popped = pop(pushed)
    assert_same_message(restored, message)
    chex.assert_trees_all_equal(popped, symbol)

    rest, sampled = pop(message)
    rans.check(rest)
    assert_same_message(rans.check(push(rest, sampled)), message)
    if eager:
      assert_same_message(codec.push(message, symbol), pushed)
      uncompiled, resampled = codec.pop(message)
      assert_same_message(uncompiled, rest)
      chex.assert_trees_all_equal(resampled, sampled)

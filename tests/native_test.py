"""Loops are one native function on the CPU, and as usual elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.system import native


def loops_of_thunks(function, *arguments):
  """Returns the loops of the entry that an executor of thunks would run."""
  text = jax.jit(function).lower(*arguments).compile().as_text()
  entry = text[text.index('\nENTRY') :]
  return [line for line in entry.split('\n') if ' while(' in line]


def doubled(x, n):
  return jax.lax.fori_loop(0, n, lambda i, x: x + x[i], x)


def test_a_loop_is_not_a_loop_of_thunks():
  x = jnp.ones(64)
  assert not loops_of_thunks(native.loop(doubled), x, 3)
  np.testing.assert_array_equal(native.loop(doubled)(x, 3), doubled(x, 3))


def test_a_coder_is_not_a_loop_of_thunks():
  rows = np.random.default_rng(0).integers(0, 1 << 16, (200, 8))
  message = rans.stacked(jnp.asarray(rows, jnp.uint16), 300)
  codec = codecs.categorical(jnp.arange(100) % 3, jnp.full((3, 4), 1 << 12))
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


def test_vmap():
  x = jnp.arange(12.0).reshape(2, 6)
  expected = jnp.stack([doubled(row, n) for row, n in zip(x, (3, 4), strict=True)])
  batched = jax.vmap(native.loop(doubled))(x, jnp.array([3, 4]))
  np.testing.assert_array_equal(batched, expected)

"""Matrix products whose rounding depends neither on threads nor on the machine.

XLA's CPU backend may divide the inner sum of a product among its threads. Rounding then
depends on the number of threads, which depends on the number of devices. The backend
does so only if the sum is long and the result is small. In this case `matmul` divides
the sum itself, always in the same way.
"""

import jax
import jax.numpy as jnp

_BLOCK = 64  # XLA does not divide a sum of so few terms
_LARGE = 1 << 23  # numbers; XLA does not divide the sums of a larger result


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns `a @ b`, `[m, k]` or `[k]` times `[k, n]`, in full float32 precision."""
  if a.ndim == 1:
    return matmul(a[None], b)[0]
  m, k = a.shape
  n = b.shape[1]
  is_divided = k > _BLOCK and 0 < m * n <= _LARGE
  if not is_divided or jax.default_backend() != 'cpu':
    return _product(a, b)
  padding = -k % _BLOCK
  rows = jnp.pad(a, ((0, 0), (0, padding))).reshape(m, -1, _BLOCK).swapaxes(0, 1)
  columns = jnp.pad(b, ((0, padding), (0, 0))).reshape(-1, _BLOCK, n)

  def add(
    total: jax.Array, blocks: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, None]:
    return total + _product(*blocks), None

  # Made like both, it varies over the same axes of `jax.shard_map`.
  start = jnp.zeros_like(a, shape=(m, n)) + jnp.zeros_like(b, shape=(m, n))
  return jax.lax.scan(add, start, (rows, columns))[0]


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision='highest')

"""Matrix products whose rounding does not depend on how many threads there are.

XLA's CPU backend may divide the inner sum of a product among threads, and then rounding
depends on their number, which depends on that of the devices. It does so only where the
sum is long and the result small. There the sum is divided here, in the same way always.
"""

import jax
import jax.numpy as jnp

_BLOCK = 64  # terms of a sum, too few to be divided among threads
_LARGE = 1 << 23  # numbers of a result, too many for copies of it in a cache


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """`a @ b` with full float32 precision: `[m, k]` or `[k]`, times `[k, n]`."""
  if a.ndim == 1:
    return matmul(a[None], b)[0]
  product = lambda x, y: jnp.matmul(x, y, precision='highest')
  (m, k), n = a.shape, b.shape[1]
  if k <= _BLOCK or not 0 < m * n <= _LARGE or jax.default_backend() != 'cpu':
    return product(a, b)
  padding = -k % _BLOCK
  rows = jnp.pad(a, ((0, 0), (0, padding))).reshape(m, -1, _BLOCK).swapaxes(0, 1)
  columns = jnp.pad(b, ((0, padding), (0, 0))).reshape(-1, _BLOCK, n)

  def add(
    total: jax.Array, blocks: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, None]:
    return total + product(*blocks), None

  start = jnp.zeros((m, n), jnp.result_type(a, b))
  return jax.lax.scan(add, start, (rows, columns))[0]

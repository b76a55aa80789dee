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
  product = lambda x, y: jnp.matmul(x, y, precision='highest')
  (m, k), n = a.shape, b.shape[1]
  if k <= _BLOCK or not 0 < m * n <= _LARGE or jax.default_backend() != 'cpu':
    return product(a, b)
  padding = -k % _BLOCK
  rows = jnp.pad(a, ((0, 0), (0, padding))).reshape(m, -1, _BLOCK).swapaxes(0, 1)
  columns = jnp.pad(b, ((0, padding), (0, 0))).reshape(-1, _BLOCK, n)

  add = lambda total, blocks: (total + product(*blocks), None)
  start = jnp.zeros((m, n), jnp.result_type(a, b))
  return jax.lax.scan(add, start, (rows, columns))[0]

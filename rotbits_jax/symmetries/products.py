"""Matrix products whose rounding depends neither on threads nor on the machine.

XLA's CPU backend may divide the inner sum of a product among its threads. Rounding then
depends on the number of threads, which depends on the number of devices. The backend
does so only if the sum is long and the result is small. In this case `matmul` divides
the sum itself, always in the same way. `times` adds integers, on the host.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured import exact

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


def times(rows: np.ndarray, basis: np.ndarray, unit: int) -> np.ndarray:
  """Returns `rows @ basis`, `[n, d]`, for integers of a basis in units of 2^-unit."""
  if rows.shape[1] != len(basis):
    raise ValueError(f'a basis of {basis.shape} cannot take rows of {rows.shape[1]}')
  numbers, powers = integers(rows)
  return np.ldexp(exact.product(numbers, basis.astype(np.float64)), -powers - unit)


def integers(
  rows: np.ndarray, bits: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns rows `[n, D]` times powers of two as integers of so many bits, and powers.

  By default, their norms are at most 2^26. Numbers must be finite.
  """
  most = np.abs(rows).max(axis=1, initial=0, keepdims=True)
  if not np.isfinite(most).all():
    raise ValueError('a product needs finite numbers, got some that are not finite')
  bits = 26 - (rows.shape[1].bit_length() + 1) // 2 if bits is None else bits
  powers = bits - np.frexp(most)[1].astype(np.int32)
  return np.rint(np.ldexp(rows, powers)), powers

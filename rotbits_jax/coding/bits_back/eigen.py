r"""The published code of a rotation: eigenvectors of a symmetric matrix of numbers.

To sample a rotation, the encoder pops S = n (n + 1) / 2 numbers of 16 bits from the
message. In the published scheme these are float16 weights that were pushed before. They
form the lower triangle of a symmetric matrix

    A = Q diag(w) Q^T,

whose eigenvectors Q are the rotation. The decoder recovers Q_hat, which is near Q. It
also gets the n numbers w = diag(Q_hat^T A Q_hat), which are near the eigenvalues and
bring Q_hat diag(w) Q_hat^T as near to A as possible. So the rotation saves
n (n - 1) / 2 numbers. The decoder computes this product, rounds its entries to 16-bit
numbers and pushes them back. The signs of eigenvectors cancel in the product. An SVD
often mixes neighbouring singular vectors; that hardly changes the product, because
neighbouring eigenvalues are close.

A correction repairs the errors of Q_hat, in one of two ways:

* exact: every number is made exact (see `correction`);
* threshold: a number whose error exceeds a threshold is sent in full, and the other
  numbers keep their errors. So the message that comes back *differs* in the popped
  numbers. Float16 weights that were pushed as uniform 16-bit symbols only lose
  precision by that; entropy-coded symbols would be corrupted.

The paper (arXiv 2410.01309) does not specify the numbers. Here every 16-bit pattern
stands for a finite number, because a message may hold any pattern: those of infinity
and NaN continue the scale of float16 up to 131008. The numbers w are 16-bit integers on
an even grid over their range, because the rounding of float16 would change the product
about as much as the errors of Q_hat do. They ascend, nearly always, and their
differences are small. A row of the triangle is a group of the correction, and the
arrays `others` are

    scale    float32 [], the greatest |w|
    steps    uint16 [n]; the sums of the first ones, modulo 2^16, are
             32767.5 (1 + w / scale)

Shape letters: n dimensions, S numbers. Functions are unbatched.
"""

import functools

import jax
import jax.numpy as jnp

from rotbits_jax.coding.bits_back import correction as correction_lib
from rotbits_jax.coding.bits_back import haar

_matmul = functools.partial(jnp.matmul, precision='highest')

# What the bits of a normal float16 lack, 13 bits higher, to be those of a float32.
_BIAS = (127 - 15) << 23


def rotation(patterns: jax.Array, n: int) -> jax.Array:
  """Returns the rotation of patterns, uint16 `[S]`: float32 `[n, n]`."""
  return jnp.linalg.eigh(_matrix(patterns, n))[1]


def _matrix(patterns: jax.Array, n: int) -> jax.Array:
  """Returns A: float32 `[n, n]`."""
  values = number(patterns)
  # A few numbers far greater than all others would dominate the matrix. They are
  # clipped, and each costs a full correction.
  limit = 4 * jnp.quantile(jnp.abs(values), 0.9)
  values = jnp.clip(values, -limit, limit)
  row, column = places(n)
  lower = jnp.zeros((n, n), jnp.float32).at[row, column].set(values)
  return lower.at[column, row].set(values)


def correct(
  recovered: jax.Array,
  other: jax.Array,
  patterns: jax.Array,
  threshold: float | None = None,
) -> correction_lib.Correction:
  """Returns the correction with which `recover` finds the patterns.

  Args:
    recovered: Q_hat, float32 `[n, n]`.
    other: Q_hat as another machine may recover it.
    patterns: uint16 `[S]`.
    threshold: the greatest error of a number; None for exact numbers.
  """
  n = len(recovered)
  ordinals = ordinal(patterns)
  w = (recovered * _matmul(_matrix(patterns, n), recovered)).sum(axis=0)
  scale = jnp.abs(w).max(initial=jnp.finfo(jnp.float32).tiny)
  steps = jnp.round(32767.5 + 32767.5 * (w / scale)).astype(jnp.uint16)
  spectrum = scale, jnp.diff(steps, prepend=jnp.uint16(0))
  matrix = _product(recovered, *spectrum)
  row, column = places(n)
  estimates = matrix[row, column]
  if threshold is not None:
    # Comparisons with NaN are false, so a NaN is sent in full.
    left = jnp.abs(estimates - number(patterns)) <= threshold
    level = jnp.where(left, 0, correction_lib.LEVELS - 1)
    base = jnp.zeros(n, jnp.int32)
    numbers = correction_lib.with_levels(ordinals, level, base, row)
    return numbers._replace(others=spectrum)
  # The margin covers differences of float32 linear algebra between machines. They are
  # proportional to the norms of the rows that a rotation mixes.
  norm = jnp.sqrt(jnp.square(matrix).mean(axis=1))
  reach = (norm[row] + norm[column]) * 2.0**-15
  here = position(estimates)
  wobble = jnp.maximum(
    position(estimates + reach) - here, here - position(estimates - reach)
  )
  elsewhere = position(_product(other, *spectrum)[row, column])
  numbers = correction_lib.correct(here, ordinals, elsewhere, wobble + 1 / 8, row, n)
  return numbers._replace(others=spectrum)


def recover(recovered: jax.Array, correction: correction_lib.Correction) -> jax.Array:
  """Returns the patterns, uint16 `[S]`; their numbers may differ by the threshold."""
  base, extra, residue, spectrum = correction
  row, column = places(len(recovered))
  positions = position(_product(recovered, *spectrum)[row, column])
  level = correction_lib.levels(base, extra, row)
  return ordinal(correction_lib.nearest(positions, level, residue))


def _product(q: jax.Array, scale: jax.Array, steps: jax.Array) -> jax.Array:
  """Returns `Q diag(w) Q^T`."""
  whole = jnp.cumsum(steps, dtype=jnp.uint16).astype(jnp.float32)
  return _matmul(q * (scale * ((whole - 32767.5) / 32767.5)), q.T)


def places(n: int) -> tuple[jax.Array, jax.Array]:
  """Returns the row and the column of each number in the triangle: int32 `[S]`."""
  row, column = haar.places(n + 1, n)  # its columns are rows here, from the last one on
  return n - 1 - column, row - column


def ordinal(patterns: jax.Array) -> jax.Array:
  """Returns the ordinals of patterns, or the patterns of ordinals: uint16, modulo 2^16.

  That of +0 is 0, that of -0 is -1, and so on in the order of the numbers.
  """
  return patterns ^ jnp.where(patterns >> 15 == 1, jnp.uint16(0x7FFF), jnp.uint16(0))


def number(patterns: jax.Array) -> jax.Array:
  """Returns the numbers of patterns, float32."""
  magnitude = (patterns & 0x7FFF).astype(jnp.int32)
  normal = ((magnitude << 13) + _BIAS).view(jnp.float32)
  small = magnitude.astype(jnp.float32) * 2.0**-24
  value = jnp.where(magnitude < 1024, small, normal)
  return jnp.where(patterns >> 15 == 1, -value, value)


def position(numbers: jax.Array) -> jax.Array:
  """Returns the real ordinals of numbers, float32."""
  magnitude = jnp.minimum(jnp.abs(numbers), jnp.float32(131008.0))
  normal = (magnitude.view(jnp.int32) - _BIAS).astype(jnp.float32)
  is_normal = magnitude >= 2.0**-14  # false for NaN
  ordinals = jnp.where(is_normal, normal * 2.0**-13, magnitude * 2.0**24)
  return jnp.where(numbers < 0, -1 - ordinals, ordinals)

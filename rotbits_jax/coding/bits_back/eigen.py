r"""The published code of a rotation: eigenvectors of a symmetric matrix of numbers.

To sample a rotation, the encoder pops S = n (n + 1) / 2 numbers of 16 bits from the
message. In the published scheme these are float16 weights that were pushed before. They
form the lower triangle of a symmetric matrix

    A = Q diag(w) Q^T,

whose eigenvectors Q are the rotation. The decoder also needs the n eigenvalues w, so
the rotation saves n (n - 1) / 2 numbers. The decoder recovers Q_hat, which is near Q,
computes Q_hat diag(w) Q_hat^T, rounds its entries to 16-bit numbers and pushes them
back. The signs of eigenvectors cancel in this product. An SVD often mixes neighbouring
singular vectors; that hardly changes the product, because neighbouring eigenvalues are
close.

A correction repairs the errors of Q_hat, in one of two ways:

* exact: every number is made exact (see `correction`);
* threshold: a number whose error exceeds a threshold is sent in full, and the other
  numbers keep their errors. So the message that comes back *differs* in the popped
  numbers. Float16 weights that were pushed as uniform 16-bit symbols only lose
  precision by that; entropy-coded symbols would be corrupted.

The paper (arXiv 2410.01309) does not specify the numbers. Here every 16-bit pattern
stands for a finite number, because a message may hold any pattern: see `FLOAT16`, and
`EVEN` for messages whose words are uniform bits and not weights. Eigenvalues are 16-bit
integers on an even grid over their range, because the rounding of float16 would change
the product about as much as the errors of Q_hat do.

Shape letters: n dimensions, S numbers. Functions are unbatched.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rotbits_jax.coding import codecs
from rotbits_jax.coding.bits_back import correction as correction_lib
from rotbits_jax.coding.bits_back import haar

_matmul = functools.partial(jnp.matmul, precision='highest')


class Spectrum(NamedTuple):
  """The eigenvalues, `scale * (steps - 32767.5) / 32767.5`."""

  scale: jax.Array  # float32 [], the greatest absolute eigenvalue
  steps: jax.Array  # uint16 [n]


class Spacing(NamedTuple):
  """The numbers for which the 16-bit patterns stand.

  The ordinal of a pattern, uint16, is its place in the order of the float16 numbers.
  The least number has the ordinal 0, -0 has 32767 and +0 has 32768.
  """

  value: Callable[[jax.Array], jax.Array]  # ordinals to float32
  position: Callable[[jax.Array], jax.Array]  # float32 to real ordinals, float32


def codec(n: int) -> codecs.Codec:
  """Returns the codec of 16-bit patterns, uniformly distributed: uint16 `[S]`."""
  return _raw(n * (n + 1) // 2)


def spectrum_codec(n: int) -> codecs.Codec:
  """Returns the codec of spectra: 16 bits per eigenvalue and 32 bits for the scale."""
  bitcast = jax.lax.bitcast_convert_type
  return codecs.mapped(
    codecs.serial(_raw(n), _raw(2)),
    lambda spectrum: (spectrum.steps, bitcast(spectrum.scale, jnp.uint16)),
    lambda parts: Spectrum(bitcast(parts[1], jnp.float32), parts[0]),
  )


def _raw(size: int) -> codecs.Codec:
  """Returns the codec of uint16 `[size]` with uniform entries."""
  uniform = codecs.deferred(lambda: codecs.uniform(jnp.full(size, 1 << 16, jnp.uint32)))
  return codecs.mapped(uniform, lambda x: x, lambda x: x.astype(jnp.uint16))


def rotation(
  patterns: jax.Array, n: int, spacing: Spacing
) -> tuple[jax.Array, Spectrum]:
  """Returns the rotation `[n, n]`, float32, and the spectrum of patterns `[S]`."""
  values = spacing.value(_ordinal(patterns))
  # A few numbers far greater than all others would dominate the matrix. They are
  # clipped, and each costs a full correction.
  limit = 4 * jnp.quantile(jnp.abs(values), 0.9)
  values = jnp.clip(values, -limit, limit)
  eigenvalues, q = jnp.linalg.eigh(_symmetric(values, n))
  scale = jnp.abs(eigenvalues).max(initial=jnp.finfo(jnp.float32).tiny)
  steps = jnp.round(32767.5 + 32767.5 * (eigenvalues / scale)).astype(jnp.uint16)
  return q, Spectrum(scale, steps)


def correct(
  recovered: jax.Array,  # Q_hat, float32 [n, n]
  spectrum: Spectrum,  # that `rotation` returned
  patterns: jax.Array,  # uint16 [S]
  spacing: Spacing,
  threshold: float | None = None,  # the greatest error that a number may keep
  other: jax.Array | None = None,  # as for `haar.correct`
) -> correction_lib.Correction:
  """Returns the correction with which `recover` finds the patterns.

  The numbers of a row of the triangle are a group. Without a threshold all are exact.
  """
  n = recovered.shape[0]
  ordinals = _ordinal(patterns)
  matrix = _rebuild(recovered, spectrum)
  estimates = _triangle(matrix)
  row, column = _places(n)
  if threshold is not None:
    # Comparisons with NaN are false, so a NaN is sent in full.
    left = jnp.abs(estimates - spacing.value(ordinals)) <= threshold
    level = jnp.where(left, 0, correction_lib.LEVELS - 1)
    base = jnp.zeros(n, jnp.int32)
    return correction_lib.with_levels(ordinals, level, base, row)
  # The margin covers differences of float32 linear algebra between machines. They are
  # proportional to the norms of the rows that a rotation mixes.
  norm = jnp.sqrt(jnp.square(matrix).mean(axis=1))
  reach = (norm[row] + norm[column]) * 2.0**-15
  position = spacing.position(estimates)
  wobble = jnp.maximum(
    spacing.position(estimates + reach) - position,
    position - spacing.position(estimates - reach),
  )
  others = None
  if other is not None:
    others = spacing.position(_triangle(_rebuild(other, spectrum)))
  return correction_lib.correct(position, ordinals, wobble + 1 / 8, row, n, others)


def recover(
  recovered: jax.Array,
  spectrum: Spectrum,
  correction: correction_lib.Correction,
  spacing: Spacing,
) -> jax.Array:
  """Returns the patterns, uint16 `[S]`, from which a rotation was computed.

  With a threshold, the numbers of some patterns differ by up to the threshold.
  """
  row, _ = _places(recovered.shape[0])
  position = spacing.position(_triangle(_rebuild(recovered, spectrum)))
  level = correction_lib.levels(correction, row)
  return _pattern(correction_lib.nearest(position, level, correction.residue))


def correction_codec(n: int, frequencies: jax.Array) -> codecs.Codec:
  """Returns the codec of corrections, given the tables of `correction.fit`."""
  return codecs.deferred(lambda: correction_lib.codec(_places(n)[0], n, frequencies))


def _rebuild(q: jax.Array, spectrum: Spectrum) -> jax.Array:
  """Returns `Q diag(w) Q^T`."""
  steps = spectrum.steps.astype(jnp.float32)
  eigenvalues = spectrum.scale * ((steps - 32767.5) / 32767.5)
  return _matmul(q * eigenvalues, q.T)


def _ordinal(patterns: jax.Array) -> jax.Array:
  """Returns the ordinals of patterns; `Spacing` defines them."""
  return jnp.where(patterns >> 15 == 1, ~patterns, patterns | jnp.uint16(0x8000))


def _pattern(ordinals: jax.Array) -> jax.Array:
  """Returns the patterns of ordinals: the inverse of `_ordinal`."""
  return jnp.where(ordinals >> 15 == 1, ordinals & jnp.uint16(0x7FFF), ~ordinals)


def _places(n: int) -> tuple[jax.Array, jax.Array]:
  """Returns the row and the column of each number in the triangle: int32 `[S]`."""
  row, column = haar.places(n + 1, n)  # its columns are rows here, from the last one on
  return n - 1 - column, row - column


def _triangle(matrix: jax.Array) -> jax.Array:
  """Returns the lower triangle of a matrix: `[n, n]` to `[S]`."""
  row, column = _places(matrix.shape[0])
  return matrix.at[row, column].get(mode='promise_in_bounds')


def _symmetric(values: jax.Array, n: int) -> jax.Array:
  """Returns the symmetric matrix with this lower triangle: `[S]` to `[n, n]`."""
  row, column = _places(n)
  lower = jnp.zeros((n, n), values.dtype).at[row, column].set(values)
  return lower.at[column, row].set(values)


def _float16_value(ordinals: jax.Array) -> jax.Array:
  """Returns the numbers of ordinals."""
  offset = ordinals.astype(jnp.int32) - 32768
  magnitude = jnp.where(offset < 0, -1 - offset, offset)
  exponent = jnp.maximum(magnitude >> 10, 1)
  mantissa = magnitude - ((exponent - 1) << 10)
  value = jnp.ldexp(mantissa.astype(jnp.float32), exponent - 25)
  return jnp.where(offset < 0, -value, value)


def _float16_position(values: jax.Array) -> jax.Array:
  """Returns the real ordinals of numbers."""
  # The lower bound is far below the least positive number, so 0 gets the position of 0.
  magnitude = jnp.clip(jnp.abs(values), 2.0**-40, 131008.0)
  _, exponent = jnp.frexp(magnitude)
  exponent = jnp.maximum(exponent + 14, 1)
  mantissa = jnp.ldexp(magnitude, 25 - exponent)
  position = mantissa + ((exponent - 1) << 10).astype(jnp.float32)
  return jnp.where(values < 0, 32767 - position, 32768 + position)


FLOAT16 = Spacing(_float16_value, _float16_position)
"""The numbers of float16, for messages that hold plain float16 or bfloat16 weights.

The patterns for infinity and NaN continue the scale up to 131008.
"""

EVEN = Spacing(
  lambda ordinals: (ordinals.astype(jnp.float32) - 32767.5) / 32768,
  lambda values: jnp.clip(values * 32768 + 32767.5, 0, 65535),
)
"""Even steps from -1 to 1, for messages that hold uniform bits."""

r"""The published code of a rotation: eigenvectors of a symmetric matrix of numbers.

To sample a rotation, n (n + 1) / 2 16-bit numbers are popped from the message, which
in the published scheme are float16 weights coded before. They are the lower triangle
of a symmetric matrix

    A = Q diag(w) Q^T,

whose eigenvectors Q are the rotation. The n eigenvalues w are pushed back, so that
n (n - 1) / 2 numbers have been taken. The decoder has Q_hat and w, computes
Q_hat diag(w) Q_hat^T, rounds to 16-bit numbers and pushes these. Signs of eigenvectors
cancel, and need not be recovered. Nor does it matter much if vectors mix whose
eigenvalues are close, as neighbouring singular vectors do.

A correction makes up for errors of Q_hat, in one of two ways:

* exact: every number is made exact (see `correction`);
* threshold: numbers that would be wrong by more than a threshold are sent as they are,
  and all others are left as they come out. So the message that comes back *differs*
  from the one that was there, in numbers popped, by up to the threshold. That harms
  nothing but precision if they are float16 weights that were pushed as uniform 16-bit
  symbols; if they are anything else, like an index or an entropy-coded symbol, it
  corrupts what lies below. Corrections of rotations that lie below were made for the
  numbers as they were, too. So only decoding tells what will be decoded.

The paper (arXiv 2410.01309) does not say how its numbers are laid out. Here every
16-bit pattern is a finite number, since a message may hold any: see `FLOAT16`, and
`EVEN` for messages whose words are not weights but uniform bits. Eigenvalues are 16-bit
integers on an even grid over their range: float16 would round them too coarsely, by
about as much as the weights' own rounding turns Q_hat.

Shape letters: S = n (n + 1) / 2 numbers. Functions are unbatched but for the codecs.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.coding.bits_back import correction as correction_lib

_matmul = functools.partial(jnp.matmul, precision='highest')


class Spectrum(NamedTuple):
  """The eigenvalues that are pushed back: `scale * (steps - 32767.5) / 32767.5`."""

  scale: jax.Array  # float32 [], the greatest absolute eigenvalue
  steps: jax.Array  # uint16 [n]


class Spacing(NamedTuple):
  """Which numbers the 16-bit patterns stand for.

  Ordinals are the patterns in the order of their float16 numbers: uint16, the least
  number has 0, -0 has 32767 and +0 has 32768.
  """

  value: Callable[[jax.Array], jax.Array]  # ordinals to float32
  position: Callable[[jax.Array], jax.Array]  # float32 to real ordinals, float32


def num_numbers(n: int) -> int:
  """S."""
  return n * (n + 1) // 2


def codec(n: int, batch: tuple[int, ...] = ()) -> codecs.Codec:
  """The codec of bit patterns of float16 numbers: uint16 `[*batch, S]`."""
  return _raw((*batch, num_numbers(n)))


def spectrum_codec(n: int, batch: tuple[int, ...] = ()) -> codecs.Codec:
  """The codec of spectra, at 16 bits an eigenvalue and 32 for the scale."""
  parts = codecs.serial(_raw((*batch, n)), _raw((*batch, 2)))

  def push(message: rans.Message, spectrum: Spectrum) -> rans.Message:
    halves = jax.lax.bitcast_convert_type(spectrum.scale, jnp.uint16)
    return parts.push(message, (spectrum.steps, halves))

  def pop(message: rans.Message) -> tuple[rans.Message, Spectrum]:
    message, (steps, halves) = parts.pop(message)
    scale = jax.lax.bitcast_convert_type(halves, jnp.float32)
    return message, Spectrum(scale, steps)

  return codecs.Codec(push, pop)


def rotation(
  patterns: jax.Array, n: int, spacing: Spacing
) -> tuple[jax.Array, Spectrum]:
  """The rotation that numbers stand for.

  Args:
    patterns: uint16 `[S]`.
    n: dimensions.
    spacing: `FLOAT16` or `EVEN`.

  Returns:
    Q, float32 `[n, n]`, and the spectrum to push back.
  """
  values = spacing.value(_ordinal(patterns))
  if n:
    # A few stray numbers far from all others would be all that the matrix is about.
    # They are clipped, and cost a full correction each.
    limit = 4 * jnp.quantile(jnp.abs(values), 0.9)
    values = jnp.clip(values, -limit, limit)
  eigenvalues, q = jnp.linalg.eigh(_symmetric(values, n))
  scale = jnp.abs(eigenvalues).max(initial=jnp.finfo(jnp.float32).tiny)
  steps = jnp.round(32767.5 + 32767.5 * (eigenvalues / scale)).astype(jnp.uint16)
  return q, Spectrum(scale, steps)


def correct(
  recovered: jax.Array,
  spectrum: Spectrum,
  patterns: jax.Array,
  spacing: Spacing,
  threshold: float | None = None,
) -> correction_lib.Correction:
  """The correction with which `recover` gets the numbers back.

  Args:
    recovered: Q_hat, float32 `[n, n]`.
    spectrum: as `rotation` returned it.
    patterns: uint16 `[S]`.
    spacing: as for `rotation`.
    threshold: the greatest error to leave in; None for none at all.

  Returns:
    The correction, grouped by rows.
  """
  n = recovered.shape[0]
  ordinals = _ordinal(patterns)
  matrix = _rebuild(recovered, spectrum)
  estimates = _triangle(matrix)
  row, column = _places(n)
  if threshold is not None:
    # Not a number is not within the threshold either.
    left = jnp.abs(estimates - spacing.value(ordinals)) <= threshold
    level = jnp.where(left, 0, correction_lib.LEVELS - 1)
    base = jnp.zeros(n, jnp.int32)
    return correction_lib.with_levels(ordinals, level, base, row)
  # What float32 linear algebra may differ by, in proportion to the norms of the rows
  # that a rotation mixes.
  norm = jnp.sqrt(jnp.square(matrix).mean(axis=1))
  reach = (norm[row] + norm[column]) * 2.0**-15
  position = spacing.position(estimates)
  wobble = jnp.maximum(
    spacing.position(estimates + reach) - position,
    position - spacing.position(estimates - reach),
  )
  return correction_lib.correct(position, ordinals, wobble + 1 / 8, row, n)


def recover(
  recovered: jax.Array,
  spectrum: Spectrum,
  correction: correction_lib.Correction,
  spacing: Spacing,
) -> jax.Array:
  """The numbers that a rotation was sampled with.

  Args:
    recovered: Q_hat, float32 `[n, n]`.
    spectrum: as `rotation` returned it.
    correction: from `correct`.
    spacing: as for `rotation`.

  Returns:
    uint16 `[S]`.
  """
  row, _ = _places(recovered.shape[0])
  position = spacing.position(_triangle(_rebuild(recovered, spectrum)))
  level = correction_lib.levels(correction, row)
  return _pattern(correction_lib.nearest(position, level, correction.residue))


def correction_codec(
  n: int, frequencies: jax.Array, batch: tuple[int, ...] = ()
) -> codecs.Codec:
  """The codec of corrections; frequencies are those of `correction.fit`."""
  return codecs.deferred(
    lambda: correction_lib.codec(_places(n)[0], batch, n, frequencies)
  )


def _raw(shape: tuple[int, ...]) -> codecs.Codec:
  """The codec of uint16 arrays whose entries are uniform."""
  parts = codecs.deferred(lambda: codecs.uniform(jnp.full(shape, 1 << 16)))

  def pop(message: rans.Message) -> tuple[rans.Message, jax.Array]:
    message, symbols = parts.pop(message)
    return message, symbols.astype(jnp.uint16)

  return codecs.Codec(parts.push, pop)


def _rebuild(q: jax.Array, spectrum: Spectrum) -> jax.Array:
  steps = spectrum.steps.astype(jnp.float32)
  eigenvalues = spectrum.scale * ((steps - 32767.5) / 32767.5)
  return _matmul(q * eigenvalues, q.T)


def _ordinal(patterns: jax.Array) -> jax.Array:
  """The places of bit patterns in the order of their float16 numbers."""
  return jnp.where(patterns >> 15 == 1, ~patterns, patterns | jnp.uint16(0x8000))


def _pattern(ordinals: jax.Array) -> jax.Array:
  """The inverse of `_ordinal`."""
  return jnp.where(ordinals >> 15 == 1, ordinals & jnp.uint16(0x7FFF), ~ordinals)


def _places(n: int) -> tuple[jax.Array, jax.Array]:
  """Row and column of each number: int32 `[S]`.

  Rows n - 1 - r and r together have n + 1 numbers, so the triangle folds to a
  rectangle.
  """
  pair, offset = jnp.divmod(jnp.arange(num_numbers(n)), n + 1)
  second = offset >= n - pair
  row = jnp.where(second, pair, n - 1 - pair)
  return row, jnp.where(second, offset - (n - pair), offset)


def _triangle(matrix: jax.Array) -> jax.Array:
  """The lower triangle: `[n, n]` to `[S]`."""
  row, column = _places(matrix.shape[0])
  return matrix.at[row, column].get(mode='promise_in_bounds')


def _symmetric(values: jax.Array, n: int) -> jax.Array:
  """The symmetric matrix with this lower triangle: `[S]` to `[n, n]`."""
  i, j = jnp.arange(n)[:, None], jnp.arange(n)[None]
  row, column = jnp.maximum(i, j), jnp.minimum(i, j)
  second = row < n // 2
  index = jnp.where(second, row * (n + 1) + n - row, (n - 1 - row) * (n + 1)) + column
  return values.at[index].get(mode='promise_in_bounds')


def _float16_value(ordinals: jax.Array) -> jax.Array:
  offset = ordinals.astype(jnp.int32) - 32768
  magnitude = jnp.where(offset < 0, -1 - offset, offset)
  exponent = jnp.maximum(magnitude >> 10, 1)
  mantissa = magnitude - ((exponent - 1) << 10)
  value = jnp.ldexp(mantissa.astype(jnp.float32), exponent - 25)
  return jnp.where(offset < 0, -value, value)


def _float16_position(values: jax.Array) -> jax.Array:
  # From far below the least number, which stands for 0, to the greatest.
  magnitude = jnp.clip(jnp.abs(values), 2.0**-40, 131008.0)
  _, exponent = jnp.frexp(magnitude)
  exponent = jnp.maximum(exponent + 14, 1)
  mantissa = jnp.ldexp(magnitude, 25 - exponent)
  position = mantissa + ((exponent - 1) << 10).astype(jnp.float32)
  return jnp.where(values < 0, 32767 - position, 32768 + position)


def _even_value(ordinals: jax.Array) -> jax.Array:
  return (ordinals.astype(jnp.float32) - 32767.5) / 32768


def _even_position(values: jax.Array) -> jax.Array:
  return jnp.clip(values * 32768 + 32767.5, 0, 65535)


# float16, but the patterns that it has for infinity and NaN continue its scale up to
# 131008. For messages that hold float16 or bfloat16 weights, pushed as they are.
FLOAT16 = Spacing(_float16_value, _float16_position)

# From -1 to 1 in even steps. For messages that hold uniform bits.
EVEN = Spacing(_even_value, _even_position)

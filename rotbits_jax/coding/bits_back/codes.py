"""Two codes of rotations behind one interface.

To sample a rotation is to pop integers from a message and to compute the rotation from
them. Later the integers are recovered from the rotation and pushed back. They are the
latent of bits-back coding. A frame is a matrix of k orthonormal columns; see `haar`.

Shape letters: `[n, k]` the shape of the frame, S integers of a frame.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding.bits_back import correction as correction_lib
from rotbits_jax.coding.bits_back import eigen
from rotbits_jax.coding.bits_back import haar

_MAX_LANES = 1024


class RotationCode(NamedTuple):
  """Functions that sample a frame from a message and push its integers back."""

  # message -> rest, latent: integers uint16 [S] and their spectrum, frame [n, k]
  sample: Callable[[rans.Message], tuple[rans.Message, Any, jax.Array]]
  # recovered frame, latent, the same frame as another machine recovers it -> correction
  correct: Callable[[jax.Array, Any, jax.Array], Any]
  # message, recovered frame, correction -> message with the integers on top, integers
  restore: Callable[[rans.Message, jax.Array, Any], tuple[rans.Message, jax.Array]]
  pack: Callable[[Any], np.ndarray]  # correction -> uint16 words: tables, a message
  unpack: Callable[[np.ndarray], Any]  # the inverse; a ValueError for other words
  num_integers: int  # S

  def max_rows(self, lanes: int) -> int:
    """Returns the words that a lane of the message must hold for `sample`.

    An integer takes at most 24 bits: 10 low bits and a bin of at most 14, or 16 bits.
    Two words are added, because the lowest word cannot be popped and the division
    rounds down.
    """
    return 3 * -(-self.num_integers // lanes) // 2 + 2


@functools.lru_cache
def haar_code(n: int, k: int) -> RotationCode:
  """Returns the code of frames under the Haar measure; see `haar`."""
  return _code(
    haar.codec(n, k),
    draw=lambda cells: ((cells, ()), haar.rotation(cells, n, k)),
    correct=lambda recovered, latent, other: haar.correct(recovered, latent[0], other),
    recover=haar.recover,
    correction_codec=functools.partial(haar.correction_codec, n, k),
    fit=haar.fit,
    num_integers=haar.num_cells(n, k),
    num_tables=3,
  )


@functools.lru_cache
def eigen_code(n: int, even: bool, threshold: float | None) -> RotationCode:
  """Returns the published code of rotations of n dimensions; see `eigen`.

  The spacing of the numbers is `EVEN` or `FLOAT16`; the threshold is that of
  `eigen.correct`. The eigenvalues are stored with the correction and not on the
  message, because the next rotation would be sampled from them.
  """
  spacing = eigen.EVEN if even else eigen.FLOAT16

  def draw(patterns: jax.Array) -> tuple[Any, jax.Array]:
    frame, spectrum = eigen.rotation(patterns, n, spacing)
    return (patterns, spectrum), frame

  def correct(recovered: jax.Array, latent: Any, other: jax.Array) -> Any:
    patterns, spectrum = latent
    correction = eigen.correct(recovered, spectrum, patterns, spacing, threshold, other)
    return spectrum, correction

  return _code(
    eigen.codec(n),
    draw=draw,
    correct=correct,
    recover=lambda recovered, both: eigen.recover(recovered, both[0], both[1], spacing),
    correction_codec=lambda frequencies: codecs.serial(
      eigen.spectrum_codec(n), eigen.correction_codec(n, frequencies)
    ),
    fit=lambda both: correction_lib.fit(both[1]),
    num_integers=eigen.num_numbers(n),
    num_tables=2,
  )


def _code(
  codec: codecs.Codec,
  *,
  draw: Callable[[jax.Array], tuple[Any, jax.Array]],
  correct: Callable[..., Any],
  recover: Callable[[jax.Array, Any], jax.Array],
  correction_codec: Callable[[jax.Array], codecs.Codec],
  fit: Callable[[Any], np.ndarray],
  num_integers: int,
  num_tables: int,
) -> RotationCode:
  """Makes a code of the codec of its integers, and of functions of floats."""
  lanes = 1 << min(max(num_integers >> 12, 1), _MAX_LANES).bit_length() - 1
  # An integer has a residue of at most 16 bits and two levels of at most 14 bits each.
  # The rest of the room is for signs.
  capacity = 4 * -(-num_integers // lanes) + 16

  def sample(message: rans.Message) -> tuple[rans.Message, Any, jax.Array]:
    message, integers = codec.pop(message)
    return message, *draw(integers)

  def restore(
    message: rans.Message, recovered: jax.Array, correction: Any
  ) -> tuple[rans.Message, jax.Array]:
    integers = recover(recovered, correction)
    return codec.push(message, integers), integers

  push = jax.jit(
    lambda message, table, correction: correction_codec(table).push(message, correction)
  )
  pop = jax.jit(lambda message, table: correction_codec(table).pop(message))

  def pack(correction: Any) -> np.ndarray:
    frequencies = fit(correction)
    data = tables.to_bytes(frequencies)
    head = np.frombuffer(data + b'\0' * (len(data) % 2), np.uint16)
    message = push(rans.empty(lanes, capacity), jnp.asarray(frequencies), correction)
    return np.concatenate([[np.uint16(len(data))], head, rans.to_words(message)])

  def unpack(words: np.ndarray) -> Any:
    if not words.size:
      raise ValueError('a correction is cut short')
    nbytes = int(words[0])
    start = 1 + -(-nbytes // 2)
    data = words[1:start].tobytes()[:nbytes]
    frequencies = tables.from_bytes(data, num_tables, correction_lib.LEVELS)
    message = rans.from_words(words[start:], lanes, capacity)
    message, correction = pop(message, jnp.asarray(frequencies))
    rans.check_empty(message)
    return correction

  return RotationCode(
    sample=jax.jit(sample),
    correct=jax.jit(correct),
    restore=jax.jit(restore),
    pack=pack,
    unpack=unpack,
    num_integers=num_integers,
  )

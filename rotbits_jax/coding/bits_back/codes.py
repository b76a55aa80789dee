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

_jit = functools.partial(jax.jit, static_argnums=0)


class RotationCode(NamedTuple):
  """Samples a frame from a message, and pushes its integers back."""

  num_integers: int  # S
  codec: codecs.Codec  # of the integers, uint16 [S]
  # integers -> latent: the integers and their spectrum; frame [n, k]
  draw: Callable[[jax.Array], tuple[Any, jax.Array]]
  # recovered frame, latent, the same frame as another machine recovers it -> correction
  correct: Callable[[jax.Array, Any, jax.Array], Any]
  recover: Callable[[jax.Array, Any], jax.Array]  # frame, correction -> integers
  fit: Callable[[Any], np.ndarray]  # correction -> frequency tables
  correction_codec: Callable[[jax.Array], codecs.Codec]  # of corrections, from tables
  num_tables: int

  def max_rows(self, lanes: int) -> int:
    """Returns the words that a lane of the message must hold for `sample`.

    An integer takes at most 24 bits: 10 low bits and a bin of at most 14, or 16 bits.
    Two words are added, because the lowest word cannot be popped and the division
    rounds down.
    """
    return 3 * -(-self.num_integers // lanes) // 2 + 2

  @_jit
  def sample(self, message: rans.Message) -> tuple[rans.Message, Any, jax.Array]:
    """Pops integers; returns the rest of the message, the latent and the frame."""
    message, integers = self.codec.pop(message)
    return message, *self.draw(integers)

  @_jit
  def restore(
    self, message: rans.Message, recovered: jax.Array, correction: Any
  ) -> tuple[rans.Message, jax.Array]:
    """Recovers the integers; returns the message with them on top, and them."""
    integers = self.recover(recovered, correction)
    return self.codec.push(message, integers), integers

  def pack(self, correction: Any) -> np.ndarray:
    """Returns a correction as words, uint16: its tables and a message."""
    frequencies = self.fit(correction)
    data = tables.to_bytes(frequencies)
    head = np.frombuffer(data + b'\0' * (len(data) % 2), np.uint16)
    message = self._push(rans.empty(*self._size), jnp.asarray(frequencies), correction)
    return np.concatenate([[np.uint16(len(data))], head, rans.to_words(message)])

  def unpack(self, words: np.ndarray) -> Any:
    """Returns the correction of words, inverse to `pack`; a ValueError for others."""
    if not words.size:
      raise ValueError('a correction is cut short')
    nbytes = int(words[0])
    start = 1 + -(-nbytes // 2)
    data = words[1:start].tobytes()[:nbytes]
    frequencies = tables.from_bytes(data, self.num_tables, correction_lib.LEVELS)
    message = rans.from_words(words[start:], *self._size)
    message, correction = self._pop(message, jnp.asarray(frequencies))
    rans.check_empty(message)
    return correction

  @property
  def _size(self) -> tuple[int, int]:
    """The lanes and the capacity of the message of a correction."""
    lanes = 1 << min(max(self.num_integers >> 12, 1), _MAX_LANES).bit_length() - 1
    # An integer has a residue of at most 16 bits and two levels of at most 14 bits
    # each. The rest of the room is for signs.
    return lanes, 4 * -(-self.num_integers // lanes) + 16

  @_jit
  def _push(self, message: rans.Message, table: jax.Array, x: Any) -> rans.Message:
    """Pushes a correction."""
    return self.correction_codec(table).push(message, x)

  @_jit
  def _pop(self, message: rans.Message, table: jax.Array) -> tuple[rans.Message, Any]:
    """Pops a correction."""
    return self.correction_codec(table).pop(message)


@functools.lru_cache
def haar_code(n: int, k: int) -> RotationCode:
  """Returns the code of frames under the Haar measure; see `haar`."""
  return RotationCode(
    haar.num_cells(n, k),
    haar.codec(n, k),
    draw=lambda cells: ((cells, ()), haar.rotation(cells, n, k)),
    correct=jax.jit(lambda recovered, latent, x: haar.correct(recovered, latent[0], x)),
    recover=haar.recover,
    fit=haar.fit,
    correction_codec=functools.partial(haar.correction_codec, n, k),
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

  @jax.jit
  def correct(recovered: jax.Array, latent: Any, other: jax.Array) -> Any:
    patterns, spectrum = latent
    return spectrum, eigen.correct(
      recovered, spectrum, patterns, spacing, threshold, other
    )

  return RotationCode(
    n * (n + 1) // 2,
    eigen.codec(n),
    draw,
    correct,
    recover=lambda recovered, both: eigen.recover(recovered, both[0], both[1], spacing),
    fit=lambda both: correction_lib.fit(both[1]),
    correction_codec=lambda frequencies: codecs.serial(
      eigen.spectrum_codec(n), eigen.correction_codec(n, frequencies)
    ),
    num_tables=2,
  )

"""Two codes of rotations behind one interface.

To sample a rotation is to pop integers from a message and to compute the rotation from
them. Later the integers are recovered from the rotation and pushed back.

Shape letters: `[n, k]` the shape of the frame, S integers of a frame.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.coding.bits_back import eigen
from rotbits_jax.coding.bits_back import haar

_jit = functools.partial(jax.jit, static_argnums=0)


class RotationCode(NamedTuple):
  """Samples a frame from a message, and pushes its integers back."""

  num_integers: int  # S
  codec: Callable[[], codecs.Codec]  # makes that of the integers, uint16 [S]
  # integers -> frame [n, k]; its spectrum, or None
  rotation: Callable[[jax.Array], tuple[jax.Array, Any]]
  # recovered frame, that of another machine, integers, spectrum -> correction
  correct: Callable[[jax.Array, jax.Array, jax.Array, Any], Any]
  recover: Callable[[jax.Array, Any], jax.Array]  # frame, correction -> integers
  correction_codec: Callable[[], codecs.Codec]  # makes that of corrections

  def max_rows(self, lanes: int) -> int:
    """Returns the words that a lane of the message must hold for `sample`.

    An integer takes at most 24 bits: 10 low bits and a bin of at most 14, or 16 bits.
    Two words are added, because the lowest word cannot be popped and the division
    rounds down.
    """
    return 3 * -(-self.num_integers // lanes) // 2 + 2

  @_jit
  def sample(
    self, message: rans.Message
  ) -> tuple[rans.Message, jax.Array, jax.Array, Any]:
    """Pops integers; returns the message, the integers, the frame and the spectrum."""
    message, integers = self.codec().pop(message)
    return message, integers, *self.rotation(integers)

  @_jit
  def restore(
    self, message: rans.Message, recovered: jax.Array, correction: Any
  ) -> tuple[rans.Message, jax.Array]:
    """Recovers the integers; returns the message with them pushed, and the integers."""
    integers = self.recover(recovered, correction)
    return self.codec().push(message, integers), integers

  def pack(self, correction: Any) -> np.ndarray:
    """Returns a correction as the words of a message, uint16."""
    return rans.to_words(self._push(rans.empty(self._lanes), correction))

  def unpack(self, words: np.ndarray) -> Any:
    """Returns the correction of words, inverse to `pack`; a ValueError for others."""
    # An integer has a residue of at most 16 bits and an extra level of at most 14. The
    # rest of the room is for base levels and signs.
    room = 4 * -(-self.num_integers // self._lanes) + 16
    message, correction = self._pop(rans.from_words(words, self._lanes, room))
    if rans.content_bits(rans.check(message)):
      raise ValueError('a correction is too long')
    return correction

  @property
  def _lanes(self) -> int:
    """The lanes of the message of a correction."""
    return 1 << min(max(self.num_integers >> 12, 1), 1024).bit_length() - 1

  @_jit
  def _push(self, message: rans.Message, correction: Any) -> rans.Message:
    """Pushes a correction."""
    return self.correction_codec().push(message, correction)

  @_jit
  def _pop(self, message: rans.Message) -> tuple[rans.Message, Any]:
    """Pops a correction."""
    return self.correction_codec().pop(message)


@functools.lru_cache
def haar_code(n: int, k: int) -> RotationCode:
  """Returns the code of frames under the Haar measure; see `haar`."""
  return RotationCode(
    haar.num_cells(n, k),
    functools.partial(haar.codec, n, k),
    lambda cells: (haar.rotation(cells, n, k), None),
    jax.jit(lambda recovered, other, cells, _: haar.correct(recovered, other, cells)),
    haar.recover,
    functools.partial(haar.correction_codec, n, k),
  )


@functools.lru_cache
def eigen_code(n: int, threshold: float | None) -> RotationCode:
  """Returns the published code of rotations of n dimensions; see `eigen`."""
  size = n * (n + 1) // 2
  return RotationCode(
    size,
    functools.partial(eigen.codec, size),
    functools.partial(eigen.rotation, n),
    jax.jit(functools.partial(eigen.correct, threshold=threshold)),
    eigen.recover,
    functools.partial(eigen.correction_codec, n, threshold),
  )

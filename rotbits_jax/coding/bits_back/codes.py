"""Two codes of rotations behind one interface.

To sample a rotation is to pop integers from a message and to compute the rotation from
them. Later the integers are recovered from the rotation and pushed back.

Shape letters: `[n, k]` the shape of the frame, S integers of a frame.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.coding.bits_back import correction as correction_lib
from rotbits_jax.coding.bits_back import eigen
from rotbits_jax.coding.bits_back import haar

_jit = functools.partial(jax.jit, static_argnums=0)


class RotationCode(NamedTuple):
  """Samples a frame from a message, and pushes its integers back."""

  num_integers: int  # S
  codec: Callable[[], codecs.Codec]  # makes that of the integers, uint16 [S]
  rotation: Callable[[jax.Array], jax.Array]  # integers -> frame [n, k]
  # recovered frame, that of another machine, integers -> correction
  correct: Callable[[jax.Array, jax.Array, jax.Array], correction_lib.Correction]
  # frame, correction -> integers
  recover: Callable[[jax.Array, correction_lib.Correction], jax.Array]
  groups: Callable[[], jax.Array]  # the group of each integer, see `correction`

  def max_rows(self, lanes: int) -> int:
    """Returns the words that a lane of the message must hold for `sample`.

    An integer takes at most 24 bits: 10 low bits and a bin of at most 14, or 16 bits.
    Two words are added, because the lowest word cannot be popped and the division
    rounds down.
    """
    return 3 * -(-self.num_integers // lanes) // 2 + 2

  @_jit
  def sample(self, message: rans.Message) -> tuple[rans.Message, jax.Array, jax.Array]:
    """Pops integers; returns the message, the integers and their frame."""
    message, integers = self.codec().pop(message)
    return message, integers, self.rotation(integers)

  @_jit
  def restore(
    self,
    message: rans.Message,
    recovered: jax.Array,
    correction: correction_lib.Correction,
  ) -> tuple[rans.Message, jax.Array]:
    """Recovers the integers; returns the message with them pushed, and the integers."""
    integers = self.recover(recovered, correction)
    return self.codec().push(message, integers), integers

  @property
  def correction(self) -> correction_lib.Correction:
    """The shapes and dtypes of a correction."""
    integers = jax.ShapeDtypeStruct((self.num_integers,), np.uint16)
    frame = jax.eval_shape(self.rotation, integers)
    return jax.eval_shape(self.correct, frame, frame, integers)


@functools.lru_cache
def haar_code(n: int, k: int) -> RotationCode:
  """Returns the code of frames under the Haar measure; see `haar`."""
  return RotationCode(
    haar.num_cells(n, k),
    functools.partial(haar.codec, n, k),
    functools.partial(haar.rotation, n=n, k=k),
    jax.jit(haar.correct),
    haar.recover,
    lambda: haar.places(n, k)[1],
  )


@functools.lru_cache
def eigen_code(n: int, threshold: float | None) -> RotationCode:
  """Returns the published code of rotations of n dimensions; see `eigen`."""
  size = n * (n + 1) // 2
  return RotationCode(
    size,
    lambda: codecs.uniform(jnp.full(size, 16, jnp.uint32)),
    functools.partial(eigen.rotation, n=n),
    jax.jit(functools.partial(eigen.correct, threshold=threshold)),
    eigen.recover,
    lambda: eigen.places(n)[0],
  )

"""Two codes of rotations behind one interface.

To sample a rotation is to pop integers from a message and to compute the rotation from
them. Later the integers are recovered from the rotation and pushed back. They are the
latent of bits-back coding. A frame is a matrix of k orthonormal columns; see `haar`.

Shape letters: `[n, k]` the shape of the frame, S integers of a frame, R frequency
tables of a correction.
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
  """Functions that sample a frame from a message and push its integers back.

  Attributes:
    sample: takes a message; returns the message without the latent integers, the latent
      integers, and the frame `[n, k]`.
    correct: takes the recovered frame, the latent integers, the frame, and the
      recovered frame as another machine may compute it; returns the correction with
      which `restore` finds the integers on both.
    restore: takes a message, the recovered frame and the correction; returns the
      message with the integers on top, and the integers.
    pack: takes a correction; returns uint16 words: the length of its frequency tables
      in bytes, the tables, and the words of a message.
    unpack: takes words; returns the correction. Raises a ValueError if the words do not
      hold a correction.
    num_integers: S.
  """

  sample: Callable[..., Any]
  correct: Callable[..., Any]
  restore: Callable[..., Any]
  pack: Callable[[Any], np.ndarray]
  unpack: Callable[[np.ndarray], Any]
  num_integers: int

  def max_rows(self, lanes: int) -> int:
    """Returns the words that a lane of the message must hold for `sample`.

    An integer takes at most 24 bits: either 10 low bits and a bin of at most 14 bits,
    or 16 bits. Two words are added, because the lowest word cannot be popped and the
    division rounds down.
    """
    return 3 * -(-self.num_integers // lanes) // 2 + 2


@functools.lru_cache
def haar_code(n: int, k: int) -> RotationCode:
  """Returns the code of frames under the Haar measure; see `haar`."""
  codec = haar.codec(n, k)

  def sample(message: rans.Message) -> tuple[rans.Message, Any, jax.Array]:
    message, cells = codec.pop(message)
    return message, cells, haar.rotation(cells, n, k)

  def restore(
    message: rans.Message, recovered: jax.Array, correction: Any
  ) -> tuple[rans.Message, Any]:
    cells = haar.recover(recovered, correction)
    return codec.push(message, cells), cells

  size = haar.num_cells(n, k)
  codec_of = functools.partial(haar.correction_codec, n, k)
  pack, unpack = _packing(codec_of, haar.fit, size, num_tables=3)
  return RotationCode(
    sample=jax.jit(sample),
    correct=jax.jit(haar.correct),
    restore=jax.jit(restore),
    pack=pack,
    unpack=unpack,
    num_integers=size,
  )


@functools.lru_cache
def eigen_code(n: int, even: bool, threshold: float | None) -> RotationCode:
  """Returns the published code of rotations; see `eigen`.

  The eigenvalues are stored with the correction and not on the message. On the message,
  the next rotation would be sampled from them, and a threshold would leave errors in
  them.

  Args:
    n: dimensions.
    even: whether the spacing of the numbers is `EVEN`; otherwise it is `FLOAT16`.
    threshold: as for `eigen.correct`.
  """
  spacing = eigen.EVEN if even else eigen.FLOAT16
  codec, spectra = eigen.codec(n), eigen.spectrum_codec(n)

  def sample(message: rans.Message) -> tuple[rans.Message, Any, jax.Array]:
    message, patterns = codec.pop(message)
    frame, spectrum = eigen.rotation(patterns, n, spacing)
    return message, (patterns, spectrum), frame

  def correct(
    recovered: jax.Array, latent: Any, frame: jax.Array, other: jax.Array
  ) -> Any:
    del frame
    patterns, spectrum = latent
    correction = eigen.correct(recovered, spectrum, patterns, spacing, threshold, other)
    return spectrum, correction

  def restore(
    message: rans.Message, recovered: jax.Array, correction: Any
  ) -> tuple[rans.Message, Any]:
    spectrum, own = correction
    patterns = eigen.recover(recovered, spectrum, own, spacing)
    return codec.push(message, patterns), (patterns, spectrum)

  def both(frequencies: jax.Array) -> codecs.Codec:
    return codecs.serial(spectra, eigen.correction_codec(n, frequencies))

  size = eigen.num_numbers(n)
  fit = lambda correction: correction_lib.fit(correction[1])
  pack, unpack = _packing(both, fit, size, num_tables=2)
  return RotationCode(
    sample=jax.jit(sample),
    correct=jax.jit(correct),
    restore=jax.jit(restore),
    pack=pack,
    unpack=unpack,
    num_integers=size,
  )


def _packing(
  codec: Callable[..., codecs.Codec],
  fit: Callable[[Any], np.ndarray],
  size: int,
  num_tables: int,
) -> tuple[Callable[[Any], np.ndarray], Callable[[np.ndarray], Any]]:
  """Returns `RotationCode.pack` and `unpack`. A correction is a message of its own."""
  lanes = 1 << min(max(size >> 12, 1), _MAX_LANES).bit_length() - 1
  # An integer has a residue of at most 16 bits and two levels of at most 14 bits each.
  # The rest of the room is for signs.
  capacity = 4 * -(-size // lanes) + 16
  push = jax.jit(
    lambda message, table, correction: codec(frequencies=table).push(
      message, correction
    )
  )
  pop = jax.jit(lambda message, table: codec(frequencies=table).pop(message))

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

  return pack, unpack

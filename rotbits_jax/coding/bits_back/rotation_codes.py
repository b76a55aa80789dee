"""How a rotation is sampled from a message and given back: two codes, one interface.

Shape letters: `[n, k]` the frame, R frequency tables of a correction.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.coding.bits_back import correction as correction_lib
from rotbits_jax.coding.bits_back import haar
from rotbits_jax.coding.bits_back import symmetric_eig


class RotationCode(NamedTuple):
  """How a frame of k orthonormal vectors is sampled from a message and given back."""

  sample: Callable[..., Any]  # message -> message, latent, frame [n, k]
  correct: Callable[..., Any]  # recovered frame, latent -> correction
  restore: Callable[..., Any]  # message, recovered frame, correction -> message, latent
  fit: Callable[..., np.ndarray]  # correction -> tables [R, 17]
  correction_codec: Callable[..., codecs.Codec]  # tables -> codec
  num_tables: int  # R


@functools.lru_cache
def haar_code(n: int, k: int) -> RotationCode:
  """Exactly uniform rotations; see `coding.haar`."""
  codec = haar.codec(n, k)

  def sample(message: rans.Message) -> tuple[rans.Message, Any, jax.Array]:
    message, cells = codec.pop(message)
    return message, cells, haar.rotation(cells, n, k)

  def restore(
    message: rans.Message, recovered: jax.Array, correction: Any
  ) -> tuple[rans.Message, Any]:
    cells = haar.recover(recovered, correction)
    return codec.push(message, cells), cells

  return RotationCode(
    sample=jax.jit(sample),
    correct=jax.jit(haar.correct),
    restore=jax.jit(restore),
    fit=haar.fit,
    correction_codec=functools.partial(haar.correction_codec, n, k),
    num_tables=3,
  )


@functools.lru_cache
def symmetric_eig_code(n: int, even: bool, threshold: float | None) -> RotationCode:
  """Eigenvectors of a matrix of numbers, as published; see `coding.symmetric_eig`."""
  spacing = symmetric_eig.EVEN if even else symmetric_eig.FLOAT16
  codec, spectra = symmetric_eig.codec(n), symmetric_eig.spectrum_codec(n)

  def sample(message: rans.Message) -> tuple[rans.Message, Any, jax.Array]:
    message, patterns = codec.pop(message)
    frame, spectrum = symmetric_eig.rotation(patterns, n, spacing)
    return spectra.push(message, spectrum), (patterns, spectrum), frame

  def correct(recovered: jax.Array, latent: Any) -> Any:
    patterns, spectrum = latent
    return symmetric_eig.correct(recovered, spectrum, patterns, spacing, threshold)

  def restore(
    message: rans.Message, recovered: jax.Array, correction: Any
  ) -> tuple[rans.Message, Any]:
    message, spectrum = spectra.pop(message)
    patterns = symmetric_eig.recover(recovered, spectrum, correction, spacing)
    return codec.push(message, patterns), (patterns, spectrum)

  return RotationCode(
    sample=jax.jit(sample),
    correct=jax.jit(correct),
    restore=jax.jit(restore),
    fit=correction_lib.fit,
    correction_codec=functools.partial(symmetric_eig.correction_codec, n),
    num_tables=2,
  )

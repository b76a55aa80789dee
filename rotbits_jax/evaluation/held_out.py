"""The loss on a part of a text that a calibration keeps apart, as files record it."""

import hashlib

import jax
import msgspec
import numpy as np

from rotbits_jax import models
from rotbits_jax.evaluation import perplexity
from rotbits_jax.system import schema


class Measured(schema.Object, kw_only=True):
  """The loss of a rounded model on tokens that were kept apart."""

  kl: float  # mean over the predictions of these tokens, see `evaluation.Evaluation`
  ear: float  # the same
  tokens: schema.Size  # how many were kept apart
  text_tokens: schema.Size  # how many the text has
  text_sha256: str  # of these, as little-endian int32
  seed: schema.Integer  # chose the part, see `split`

  @classmethod
  def of(
    cls, kl: float, ear: float, text: np.ndarray, apart: list[np.ndarray], seed: int
  ) -> 'Measured':
    """Makes the record of the loss on some windows of a text."""
    count = sum(window.size for window in apart)
    sizes = {'tokens': count, 'text_tokens': len(text)}
    return cls(kl=kl, ear=ear, text_sha256=_digest(text), seed=seed, **sizes)

  def again(
    self, model: models.Model, reference: models.Model, text: np.ndarray
  ) -> 'Measured':
    """Measures a decoded model in the dtypes of the reference, on the same text.

    The leaves of the model are arrays. A ValueError says that the text is another one.
    """
    text = text[: self.text_tokens]
    if _digest(text) != self.text_sha256:
      raise ValueError('the text is not the one on which the loss was measured')
    _, apart = split(text, reference.config, seed=self.seed)
    rounded = lambda *pair: jax.tree.map(lambda x, y: x.astype(y.dtype), *pair)
    layers = [*map(rounded, model.layers(), reference.layers())]
    outer = rounded(model.outer(), reference.outer())
    result = perplexity.evaluate(
      models.from_layers(model.config, outer, layers),
      np.concatenate(apart, axis=1)[0],
      reference=reference,
      window=apart[0].size,
    )
    return msgspec.structs.replace(self, kl=result.kl, ear=result.ear)

  def __str__(self) -> str:
    loss = f'KL {self.kl:.2g} nats and EAR {self.ear:.2%}'
    return f'{loss} on {self.tokens:,} tokens kept apart'


def split(
  tokens: np.ndarray, config: models.ModelConfig, *, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Cuts a text `[N]` into windows `[1, T]`; returns those to calibrate on, and others.

  The others, a quarter, are chosen at random.
  """
  length = min(config.max_positions, perplexity.DEFAULT_WINDOW, len(tokens) // 4)
  windows = whole_windows(tokens, config, length)
  order = np.random.default_rng(seed).permutation(len(windows)).tolist()
  apart = set(order[: len(windows) // 4])
  of = lambda is_apart: [x for i, x in enumerate(windows) if (i in apart) == is_apart]
  return of(False), of(True)


def whole_windows(
  tokens: np.ndarray, config: models.ModelConfig, window: int | None = None
) -> list[np.ndarray]:
  """Cuts a text into windows without padding, which is no input of interest."""
  cut = perplexity.windows(tokens, config, window=window)
  return [window for window, length in cut if length == window.size]


def _digest(tokens: np.ndarray) -> str:
  """Returns the SHA-256 of tokens."""
  return hashlib.sha256(np.asarray(tokens, '<i4').tobytes()).hexdigest()

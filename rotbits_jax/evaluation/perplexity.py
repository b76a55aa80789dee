"""Perplexity of a model, and how far its predictions are from another model's."""

from collections.abc import Iterator
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from rotbits_jax import models

DEFAULT_WINDOW = 1024


class Evaluation(NamedTuple):
  """What `evaluate` measured.

  Attributes:
    perplexity: `exp` of the mean negative log-likelihood of a token.
    tokens: how many tokens were predicted.
    kl: mean of KL(reference || model) over these, in nats; None if not asked for.
    kl_rerounded: the same for KL(reference || rerounded).
  """

  perplexity: float
  tokens: int
  kl: float | None
  kl_rerounded: float | None


def evaluate(
  model: models.SlicedModel,
  tokens: np.ndarray,
  *,
  reference: models.SlicedModel | None = None,
  rerounded: models.SlicedModel | None = None,
  max_tokens: int | None = None,
  window: int | None = None,
  progress: bool = False,
) -> Evaluation:
  """Perplexity and KL divergence of next-token predictions.

  The tokens are cut into windows that do not overlap; each window predicts all of
  its tokens but the first. A shorter last window counts if it predicts a token.

  Args:
    model: the model to measure.
    tokens: `[N]` token ids.
    reference: a model of the same vocabulary to compare predictions with.
    rerounded: the reference in other coordinates, rounded to the same dtype: the
      divergence that rounding alone makes.
    max_tokens: how many of the tokens to use; None for all.
    window: tokens in a window; None for what the model was trained for, at most 1024.
    progress: whether to show a bar on stderr, if that is a terminal.

  Returns:
    An `Evaluation`.

  Raises:
    ValueError: if there are fewer than two tokens, if one is outside the vocabulary,
      or if the models' vocabularies differ.
  """
  if rerounded is not None and reference is None:
    raise ValueError('rerounded is compared with the reference, which is missing')
  vocab_size = model.config.vocab_size
  for name, other in (('reference', reference), ('rerounded model', rerounded)):
    if other is not None and other.config.vocab_size != vocab_size:
      raise ValueError(
        f'the {name} must have the vocabulary of {vocab_size} that the model has, '
        f'got {other.config.vocab_size}'
      )
  if window is None:
    window = min(model.config.max_positions, DEFAULT_WINDOW)
  tokens = _checked(tokens, max_tokens, window, vocab_size)

  # Once to the device, and without the buffers, which may be of any dtype.
  compared = jax.device_put(
    [
      None if m is None else dataclasses.replace(m, buffers={})
      for m in (model, reference, rerounded)
    ]
  )
  totals, count = np.zeros(3), 0
  windows = list(_windows(tokens, min(window, len(tokens))))
  for padded, length in tqdm.tqdm(
    windows, desc='evaluating', unit='window', disable=None if progress else True
  ):
    measured = np.asarray(_measure(*compared, padded), np.float64)
    totals += measured[:, : length - 1].sum(axis=1)
    count += length - 1
  nll, kl, kl_rerounded = (float(total) for total in totals / count)
  return Evaluation(
    perplexity=float(np.exp(nll)),
    tokens=count,
    kl=None if reference is None else kl,
    kl_rerounded=None if rerounded is None else kl_rerounded,
  )


def _checked(
  tokens: np.ndarray, max_tokens: int | None, window: int, vocab_size: int
) -> np.ndarray:
  tokens = np.asarray(tokens)
  if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
    raise ValueError(
      f'tokens must be [N] integers, got {tokens.shape=} {tokens.dtype=}'
    )
  if window < 2:
    raise ValueError(f'a window must have at least 2 tokens, got {window=}')
  if max_tokens is not None:
    tokens = tokens[: max(max_tokens, 0)]
  if len(tokens) < 2:
    raise ValueError(f'at least 2 tokens are needed, got {len(tokens)}')
  outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
  if outside.size:
    raise ValueError(
      f"token {outside[0]} is outside the model's vocabulary of {vocab_size}"
    )
  return tokens.astype(np.int32)


def _windows(tokens: np.ndarray, window: int) -> Iterator[tuple[np.ndarray, int]]:
  """Yields `[1, window]` tokens, padded at the end, and how many are not padding."""
  for start in range(0, len(tokens) - 1, window):
    piece = tokens[start : start + window]
    yield np.pad(piece, (0, window - len(piece)))[None], len(piece)


@jax.jit
def _measure(
  model: models.SlicedModel,
  reference: models.SlicedModel | None,
  rerounded: models.SlicedModel | None,
  tokens: jax.Array,
) -> jax.Array:
  """`[3, T - 1]`: the loss and the two divergences at each position of `[1, T]`."""

  def predictions(m: models.SlicedModel) -> jax.Array:
    return models.logits(m, tokens)[0, :-1]

  def divergence(m: models.SlicedModel | None) -> jax.Array:
    if m is None or reference is None:
      return jnp.zeros_like(nll)
    return kl_divergence(predictions(reference), predictions(m))

  nll = optax.softmax_cross_entropy_with_integer_labels(
    predictions(model), tokens[0, 1:]
  )
  return jnp.stack([nll, divergence(model), divergence(rerounded)])


def kl_divergence(reference: jax.Array, model: jax.Array) -> jax.Array:
  """KL(reference || model) of `[..., V]` logits, `[...]` in nats.

  With `r = log q - log p` it is the sum of `p (e^r - 1 - r)`: `q - p` sums to zero,
  and no term is negative, so that float32 keeps divergences of 1e-9 apart.
  """
  log_p, log_q = jax.nn.log_softmax(reference), jax.nn.log_softmax(model)
  p, ratio = jnp.exp(log_p), log_q - log_p
  excess = jnp.where(ratio < 1, p * jnp.expm1(ratio), jnp.exp(log_q) - p)
  return jnp.sum(excess - p * ratio, axis=-1)

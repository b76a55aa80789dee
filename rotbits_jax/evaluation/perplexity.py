"""Perplexity of a model, and how far its predictions are from another model's."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax.models import transformer
from rotbits_jax.system.progress import Progress

DEFAULT_WINDOW = 1024

_TOKENS = 64  # whose predictions are compared at once


class Evaluation(NamedTuple):
  """The result of `evaluate`; what needs a reference is None without one."""

  perplexity: float  # exp of the mean negative log-likelihood of a token
  tokens: int  # number of predicted tokens
  kl: float | None  # mean of KL(reference || model) over these, in nats
  kl_rerounded: float | None  # mean of KL(reference || rerounded)
  ear: float | None  # mean of the expected agreement rate, see `agreement`


def evaluate(
  model: models.Model,
  tokens: np.ndarray,
  *,
  reference: models.Model | None = None,
  rerounded: models.Model | None = None,
  max_tokens: int | None = None,
  window: int | None = None,
  progress: bool = False,
) -> Evaluation:
  """Measures the perplexity, KL divergence and agreement of next-token predictions.

  The tokens are cut into windows that do not overlap. In each window the model predicts
  every token but the first.

  >>> path = rotbits_jax.checkpoints.example('llama-tiny-dense')
  >>> model = rotbits_jax.load_checkpoint(path).model
  >>> evaluate(model, np.arange(33) % 7).tokens
  32

  Args:
    tokens: `[N]` token ids.
    reference: a model with the same vocabulary, whose predictions are compared.
    rerounded: the reference in other coordinates, rounded to the same dtype.
    max_tokens: number of tokens to use; None for all.
    window: number of tokens in a window; None for the longest sequence that the model
      was trained for, but at most 1024.
  """
  if rerounded is not None and reference is None:
    raise ValueError('a rerounded model needs a reference to be compared with')
  compared = [x for x in (model, reference, rerounded) if x is not None]
  vocabularies = {x.config.vocab_size for x in compared}
  if len(vocabularies) > 1:
    raise ValueError(f'predictions need the same vocabulary, got sizes {vocabularies}')
  cut = windows(np.asarray(tokens)[:max_tokens], model.config, window=window)
  # Buffers are left out, because JAX does not support every dtype that they may have.
  on_device = [jax.device_put(dataclasses.replace(x, buffers={})) for x in compared]
  totals: Any = 0.0
  tracked = Progress('evaluate', len(cut), 'window', show=progress, units=cut)
  for padded, length in tracked:
    logits = [_predictions(x, padded) for x in on_device]
    measured = np.asarray(_measure(logits, padded), np.float64)
    totals += measured[:, : length - 1].sum(axis=1)
  count = sum(length - 1 for _, length in cut)
  loss, *others = (totals / count).tolist()
  kl, ear, kl_rerounded = (*others, None, None, None)[:3]
  return Evaluation(float(np.exp(loss)), count, kl, kl_rerounded, ear)


def windows(
  tokens: np.ndarray, config: models.ModelConfig, *, window: int | None = None
) -> list[tuple[np.ndarray, int]]:
  """Cuts tokens into windows, int32 `[1, window]`, see `evaluate`.

  Each has the number of its tokens that are not padding, which the last may have.
  """
  if window is None:
    window = min(config.max_positions, DEFAULT_WINDOW)
  tokens = config.checked_tokens(tokens, '[N]')
  if window < 2:
    raise ValueError(f'a window must have at least 2 tokens, got {window=}')
  if len(tokens) < 2:
    raise ValueError(f'at least 2 tokens are needed, got {len(tokens)}')
  window = min(window, len(tokens))
  pieces = [tokens[i : i + window] for i in range(0, len(tokens) - 1, window)]
  # The padding is a token of the text, because those that no text has may be NaN.
  return [(np.pad(x, (0, window - len(x)), 'edge')[None], len(x)) for x in pieces]


@jax.jit
def _predictions(model: models.Model, tokens: jax.Array) -> jax.Array:
  """Returns the logits `[T - 1, V]` for all tokens `[1, T]` but the first."""
  return models.logits(model, tokens)[0, :-1]


@jax.jit
def _measure(logits: list[jax.Array], tokens: jax.Array) -> jax.Array:
  """Returns loss, KL, EAR and KL of the third model, if there is one: `[K, T - 1]`."""

  def of_token(i: jax.Array) -> jax.Array:
    model, *others = (x[i] for x in logits)
    measures = [-jax.nn.log_softmax(model)[tokens[0, i + 1]]]
    for reference in others[:1]:
      measures += [kl_divergence(reference, model), agreement(reference, model)]
      measures += [kl_divergence(reference, x) for x in others[1:]]
    return jnp.stack(measures)

  # A few tokens at a time, because each has several arrays as long as the vocabulary.
  return jax.lax.map(of_token, jnp.arange(len(logits[0])), batch_size=_TOKENS).T


def differences(
  config: models.ModelConfig,
  windows: Sequence[np.ndarray],  # tokens [1, T]
  model: tuple[models.Params, Sequence[jax.Array]],
  reference: tuple[models.Params, Sequence[jax.Array]],
) -> tuple[float, float]:
  """Returns the means of KL(reference || model) and of EAR over windows of a text.

  A model is its parameters outside the layers, and the residual stream `[1, T, d]` of
  each window after the last layer, see `transformer.streams`.
  """
  measured = []
  for i, tokens in enumerate(windows):
    logits = [_unembedded(outer, config, xs[i]) for outer, xs in (model, reference)]
    measured.append(np.asarray(_measure(logits, tokens), np.float64)[1:])
  kl, ear = np.concatenate(measured, axis=1).mean(axis=1).tolist()
  return kl, ear


@functools.partial(jax.jit, static_argnums=1)
def _unembedded(
  outer: models.Params, config: models.ModelConfig, x: jax.Array
) -> jax.Array:
  """Returns the logits `[T - 1, V]` of a residual stream `[1, T, d]`."""
  with jax.default_matmul_precision('highest'):
    return transformer.unembed(outer, config, x)[1][0, :-1]


def kl_divergence(reference: jax.Array, model: jax.Array) -> jax.Array:
  """Returns KL(reference || model) in nats, `[...]`, given logits `[..., V]`.

  With probabilities p, q and `r = log q - log p`, it is the sum of `p (e^r - 1 - r)`,
  because `q - p` sums to zero. No term is negative, so float32 resolves 1e-9.

  >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
  >>> round(float(kl_divergence(logits[0], logits[1])), 4)  # log(2 / sqrt(3))
  0.1438
  """
  log_p, log_q = jax.nn.log_softmax(reference), jax.nn.log_softmax(model)
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  ratio = jnp.where(p == 0, 0, log_q - log_p)  # logits may be -inf
  excess = jnp.where(ratio < 1, p * jnp.expm1(ratio), q - p)
  return jnp.sum(jnp.where(p == 0, q, excess - p * ratio), axis=-1)


def agreement(reference: jax.Array, model: jax.Array) -> jax.Array:
  """Returns the expected agreement rate (EAR), `[...]`, given logits `[..., V]`.

  This is the sum over the vocabulary of `min(p, q)` of the probabilities: 1 minus their
  total variation distance. Speculative decoding, which drafts with one model for the
  other, accepts a token that often. 1 - EAR is at most `sqrt(KL / 2)` (Pinsker).

  >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]))
  >>> round(float(agreement(logits[0], logits[1])), 6)
  0.75

  References:
    Leviathan et al., arXiv 2211.17192, definition 3.2 and theorem 3.5.
  """
  p, q = jax.nn.softmax(reference), jax.nn.softmax(model)
  return 1 - jnp.abs(p - q).sum(axis=-1) / 2

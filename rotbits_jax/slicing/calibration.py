r"""Calibration: which directions of the residual stream carry what a text needs.

The activations X_s of segment s are those of the model as it has been sliced so far,
in the dense model's coordinates:

    X_{s+1} = X_s P_s + sublayer_s(RMSN(X_s P_s)),    P_s = V_s V_s^T

where the columns of V_s `[D, d]` are the leading eigenvectors of `X_s^T X_s`, and
sublayer_s is the fused model's. A sliced model computes the same with `X_s V_s`, so
nothing need be rotated to calibrate, and all layers have the same shapes.

The Gram matrices are summed and diagonalised in float64. SliceGPT adds 1% of the mean
to the diagonal before, which changes no eigenvector.

Shape letters: S sequences, T tokens of each, D hidden size, d width of a segment.

Reference: SliceGPT, arXiv 2401.15024, section 3.3.
"""

from collections.abc import Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax.models import transformer

_SUBLAYERS: Mapping[str, Any] = {
  'attention': transformer.Attention,
  'mlp': transformer.Mlp,
}


class Basis(NamedTuple):
  """Principal components of a segment: together the columns are an orthogonal matrix.

  Attributes:
    kept: float64 `[D, d]`, V_s.
    cut: float64 `[D, D - d]`, what slicing cuts off: P_s = I - cut cut^T.
  """

  kept: np.ndarray
  cut: np.ndarray


def sample_sequences(
  tokens: np.ndarray, *, sequences: int, length: int, seed: int
) -> np.ndarray:
  """Draws sequences from a text: one at a random place in each of S equal parts.

  Args:
    tokens: `[N]` token ids of the text.
    sequences: S, how many to draw; as many as the text has room for, if that is fewer.
    length: T, tokens in each; N if the text has fewer.
    seed: of the draw.

  Returns:
    `[S, T]`: sequences that do not overlap, in the text's order.

  Raises:
    ValueError: if there are no tokens, or a setting is not positive.
  """
  if sequences < 1 or length < 1 or len(tokens) < 1:
    raise ValueError(
      f'at least 1 sequence of at least 1 token is needed, got {sequences=} '
      f'{length=} of {len(tokens)} tokens'
    )
  length = min(length, len(tokens))
  count = min(sequences, len(tokens) // length)
  part = len(tokens) // count
  offsets = np.random.default_rng(seed).integers(part - length + 1, size=count)
  starts = np.arange(count) * part + offsets
  return tokens[starts[:, None] + np.arange(length)]


def embed(
  embeddings: models.Params, tokens: np.ndarray, config: models.ModelConfig
) -> np.ndarray:
  """The activations of the first segment.

  Args:
    embeddings: of the fused model.
    tokens: `[S, T]`.
    config: of the fused model.

  Returns:
    X_0, float32 `[S, T, D]`.
  """
  params = _device_float32(embeddings)
  activations = np.empty((*tokens.shape, config.hidden_size), np.float32)
  for i, sequence in enumerate(tokens):
    activations[i] = _embed(params, sequence, config=config)
  return activations


def advance(
  activations: np.ndarray,
  sublayers: models.Params,
  basis: Basis,
  config: models.ModelConfig,
) -> None:
  """Activations of the next segment, in place of those of this one.

  Args:
    activations: X_s, float32 `[S, T, D]`; overwritten by X_{s+1}.
    sublayers: parameters of the fused sublayers between the two, by name.
    basis: of segment s.
    config: of the fused model.
  """
  params, cut = _device_float32((sublayers, basis.cut))
  for i, sequence in enumerate(activations):
    activations[i] = _advance(params, cut, sequence, config=config)


def principal_components(activations: np.ndarray, width: int) -> Basis:
  """Splits a segment's space by how much of the activations is in it.

  Args:
    activations: float32 `[S, T, D]`.
    width: d, how many components to keep.

  Returns:
    The components, the largest first.

  Raises:
    ValueError: if the activations are not finite.
  """
  hidden = activations.shape[-1]
  gram = np.zeros((hidden, hidden))
  for sequence in activations:
    x = sequence.astype(np.float64)
    gram += x.T @ x
  if not np.isfinite(gram).all():
    raise ValueError('the activations on the calibration text are not finite')
  _, vectors = np.linalg.eigh(gram)  # values ascend
  return Basis(vectors[:, hidden - width :][:, ::-1], vectors[:, : hidden - width])


@functools.partial(jax.jit, static_argnames='config')
def _embed(
  params: models.Params, tokens: jax.Array, *, config: models.ModelConfig
) -> jax.Array:
  """`[T, D]` of `[T]`."""
  return transformer.Embedding(config).apply({'params': params}, tokens[None], {})[0]


@functools.partial(jax.jit, static_argnames='config')
def _advance(
  params: models.Params, cut: jax.Array, x: jax.Array, *, config: models.ModelConfig
) -> jax.Array:
  """`[T, D]` of `[T, D]`."""
  with jax.default_matmul_precision('highest'):
    x = x - (x @ cut) @ cut.T
    normed = transformer.rmsn(x, hidden_size=config.hidden_size, eps=config.norm_eps)
    written = [
      _SUBLAYERS[name](config, config.hidden_size).apply({'params': p}, normed[None])[0]
      for name, p in params.items()
    ]
    return x + sum(written)


def _device_float32(tree: Any) -> Any:
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

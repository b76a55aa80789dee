r"""Calibration: finds the principal directions of each residual segment on a text.

The activations X_s of segment s (see `models.config`) are computed with the segments
before it already sliced, in the coordinates of the dense model:

    X_{s+1} = X_s P_s + sublayer_s(RMSN(X_s P_s)),    P_s = V_s V_s^T

Here the columns of V_s `[D, d]` are the leading eigenvectors of `X_s^T X_s`, and
sublayer_s is a sublayer of the model with fused norms. A sliced model computes the same
with `X_s V_s`. So calibration needs no rotated parameters, and all layers have the same
shapes.

Gram matrices are float64. SliceGPT's damping of the diagonal changes no eigenvector.

Shape letters: S sequences of T tokens, D hidden size, d width of a segment.

Reference: SliceGPT, arXiv 2401.15024, section 3.3.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax.models import transformer


class PrincipalComponents(NamedTuple):
  """The principal components of a segment; all columns form an orthogonal matrix."""

  kept: np.ndarray  # float64 [D, d]: V_s, the components that slicing keeps
  cut: np.ndarray  # float64 [D, D - d]: the others; P_s is I - cut cut^T


def sample_sequences(
  tokens: np.ndarray,  # [N] token ids of the text
  *,
  sequences: int,  # S, which is smaller if the text has no room for them
  length: int,  # T, which is smaller if the text has fewer tokens
  seed: int,
) -> np.ndarray:
  """Draws sequences `[S, T]`: one at a random place in each of S equal parts."""
  if sequences < 1 or length < 1 or len(tokens) < 1:
    raise ValueError(
      f'calibration needs a sequence of at least 1 token, got {sequences=} and '
      f'{length=} from {len(tokens)} tokens'
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
  """Returns X_0, the activations of the first segment.

  Args:
    embeddings: those of the fused model.
    tokens: integers `[S, T]`.
    config: the config of the fused model.

  Returns:
    X_0, float32 `[S, T, D]`.
  """
  params = {'embed': _device_float32(embeddings)}
  activations = np.empty((*tokens.shape, config.hidden_size), np.float32)
  for i, sequence in enumerate(tokens):
    activations[i : i + 1] = _embed(params, config, sequence[None])
  return activations


def advance(
  activations: np.ndarray,
  sublayers: models.Params,
  basis: PrincipalComponents,
  config: models.ModelConfig,
) -> None:
  """Replaces the activations of a segment by those of the next segment.

  Args:
    activations: X_s, float32 `[S, T, D]`; overwritten by X_{s+1}.
    sublayers: the fused sublayers between the two segments, by name.
    basis: the components of segment s.
    config: the config of the fused model.
  """
  params, cut = _device_float32((sublayers, basis.cut))
  for i, sequence in enumerate(activations):
    activations[i] = _advance(params, cut, sequence, config=config)


def principal_components(activations: np.ndarray, width: int) -> PrincipalComponents:
  """Returns the components of activations `[S, T, D]`, the largest kept one first."""
  hidden = activations.shape[-1]
  gram = np.zeros((hidden, hidden))
  for sequence in activations:
    x = sequence.astype(np.float64)
    gram += x.T @ x
  if not np.isfinite(gram).all():
    raise ValueError('the activations on the calibration text are not finite')
  _, vectors = np.linalg.eigh(gram)  # eigenvalues ascend
  return PrincipalComponents(
    vectors[:, hidden - width :][:, ::-1], vectors[:, : hidden - width]
  )


_embed = jax.jit(transformer.embed, static_argnums=1)


@functools.partial(jax.jit, static_argnames='config')
def _advance(
  params: models.Params, cut: jax.Array, x: jax.Array, *, config: models.ModelConfig
) -> jax.Array:
  """Computes the activations `[T, D]` of the next segment for one sequence."""
  with jax.default_matmul_precision('highest'):
    x = x - (x @ cut) @ cut.T
    normed = transformer.norm(None, config, x)[None]
    if 'attention' in params:
      x = x + transformer.attention(params['attention'], config, normed).x[0]
    if 'mlp' in params:
      x = x + transformer.mlp(params['mlp'], config, normed).x[0]
    return x


def _device_float32(tree: Any) -> Any:
  """Puts the arrays of a tree on the device, as float32."""
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

"""Least squares, float64 on the host: the T of `embed = head^T @ T`, and bases.

Shape letters: V tokens, D width of the head's input or hidden size, d width.
"""

import numpy as np

from rotbits_jax.structured import tied

_SAME = 0.9  # how far squares of singular values may be from 1


def normal_equations(
  table: np.ndarray, head: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the normal equations `gram @ T = moments` of tokens with weights `[V]`.

  gram = head @ W @ head^T `[D, D]` and moments = head @ W @ embed `[D, d]`, float64,
  with W the diagonal of squared weights.
  """
  gram = np.zeros((len(head), len(head)))
  moments = np.zeros((len(head), table.shape[1]))
  for block in tied.token_blocks(head):
    columns = head[:, block].astype(np.float64) * weights[block]
    gram += columns @ columns.T
    moments += columns @ (table[block].astype(np.float64) * weights[block, None])
  return gram, moments


def solution(gram: np.ndarray, moments: np.ndarray, steps: int = 2) -> np.ndarray:
  """Returns T, float64 `[D, d]`, nearly zero in the null space of a singular `gram`."""
  diagonal = np.diag(gram)
  scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1))[:, None]
  # The added diagonal makes the matrix regular in float64. The second step removes the
  # bias that it causes.
  regular = gram * scale * scale.T + 1e-10 * np.eye(len(gram))
  solved = np.zeros_like(moments)
  for _ in range(steps):
    solved += scale * np.linalg.solve(regular, scale * (moments - gram @ solved))
  return solved


def row_weights(norms: np.ndarray) -> np.ndarray:
  """Returns the weights of rows with these norms, `[V]`: their inverses.

  Norms below the median of the nonzero norms count as the median.
  """
  used = norms[norms > 0]
  return 1 / np.maximum(norms, np.median(used) if used.size else 1)


def orthonormal(matrix: np.ndarray) -> np.ndarray | None:
  """Returns the nearest matrix with orthonormal columns; None if none is near."""
  squares, vectors = np.linalg.eigh(matrix.T @ matrix)
  if not np.abs(squares - 1).max() <= _SAME:
    return None
  return matrix @ ((vectors / np.sqrt(squares)) @ vectors.T)

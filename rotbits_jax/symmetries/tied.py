r"""The map from the head to an embedding that slicing separated from it.

In a tied model, the head is the transposed embedding. Slicing makes two matrices of it,
because the first and the last segment of the residual stream get coordinates of their
own; `models.config` defines segments. If the last segment keeps all D dimensions, the
embedding remains a linear image of the head,

    embed = head^T @ T,    T [D, d],

up to the rounding of both matrices. T is found by least squares, in float64 and on the
host, because the normal equations square the condition number. The rounding error of a
token's row is proportional to the norm of the row. Therefore the rows are weighted by
the inverse of their norm. The weights also limit the influence of the few tokens that
do not fit.

Shape letters are those of `models.config`. In this file D is the width of the last
segment, and d is the width of the first. All arrays are NumPy arrays.
"""

from typing import NamedTuple

import chex
import numpy as np

from rotbits_jax.structured import tied


class Equations(NamedTuple):
  """Normal equations `gram @ T = moments`, with W the diagonal of squared weights."""

  gram: np.ndarray  # head @ W @ head^T, float64 [D, D]
  moments: np.ndarray  # head @ W @ embed, float64 [D, d]


def equations(
  table: np.ndarray,  # the embedding, [V, d]
  head: np.ndarray,  # [D, V]
  weights: np.ndarray,  # of the rows of the tokens, [V]
) -> Equations:
  """Returns the normal equations of some tokens."""
  chex.assert_shape([head, weights], [(None, len(table)), (len(table),)])
  gram = np.zeros((len(head), len(head)))
  moments = np.zeros((len(head), table.shape[1]))
  for block in tied.token_blocks(head):
    columns = head[:, block].astype(np.float64) * weights[block]
    gram += columns @ columns.T
    moments += columns @ (table[block].astype(np.float64) * weights[block, None])
  return Equations(gram, moments)


def least_squares(equations: Equations) -> np.ndarray:
  """Returns T, float64 `[D, d]`, nearly zero in the null space of a singular `gram`."""
  gram, moments = equations
  diagonal = np.diag(gram)
  scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1))[:, None]
  # The added diagonal makes the matrix regular in float64. One step of refinement
  # removes the bias that it causes.
  regular = gram * scale * scale.T + 1e-10 * np.eye(len(gram))
  first = scale * np.linalg.solve(regular, scale * moments)
  left = moments - gram @ first
  return first + scale * np.linalg.solve(regular, scale * left)


def row_norms(table: np.ndarray) -> np.ndarray:
  """Returns the norms of the rows of an embedding, float64 `[V]`."""
  blocks = (table[block] for block in tied.token_blocks(table.T))
  return np.concatenate([np.linalg.norm(x.astype(np.float64), axis=1) for x in blocks])


def deviations(table: np.ndarray, head: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """Returns the norms of the rows of `table - head^T @ matrix`, float64 `[V]`."""
  chex.assert_shape(matrix, (len(head), table.shape[1]))
  off = []
  for block in tied.token_blocks(head):
    predicted = head[:, block].astype(np.float64).T @ matrix.astype(np.float64)
    off.append(np.linalg.norm(table[block].astype(np.float64) - predicted, axis=1))
  return np.concatenate(off)


def row_weights(norms: np.ndarray) -> np.ndarray:
  """Returns the weights of rows with these norms, `[V]`: their inverses.

  Norms below the median of the nonzero norms count as the median.
  """
  used = norms[norms > 0]
  return 1 / np.maximum(norms, np.median(used) if used.size else 1)

"""Stores an embedding in terms of the head that slicing separated from it.

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

A fit to a sample of the tokens comes first, because it shows at little cost whether the
embedding was ever tied.

Shape letters: an embedding is `[V, d]`, and a head is `[D, V]`, for V tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured
from rotbits_jax.coding import coder
from rotbits_jax.passes.transform import Context
from rotbits_jax.passes.transform import Note
from rotbits_jax.passes.transform import Noted
from rotbits_jax.passes.transform import Params
from rotbits_jax.passes.transform import Transform
from rotbits_jax.passes.transform import note
from rotbits_jax.relative import measure
from rotbits_jax.structured import tied

# An embedding with a greater relative error was never tied. The relative error of an
# unrelated embedding is about 1.
_UNTIED = 0.1

# The greatest relative error of `head^T @ T`, rounded, in the Frobenius norm, as a
# multiple of the roundoff; a single token may have four times as much. In SliceGPT's
# own files, it is 0.6 to 1, and up to 1.6 for a token.
_MOST_ERROR = 1.5

_EXACT_DTYPES = np.dtype(np.float16), np.dtype(jnp.bfloat16)
_TINY = float(np.finfo(np.float32).tiny)
_MOST_INTEGER = (1 << 23) - 1  # of a rounded T

_EMBED, _HEAD = 'embed/tokens', 'head/kernel'


def retie_embedding() -> Transform:
  """Makes the transform that stores T in place of the embedding.

  Its note gives the error of the embedding and of the worst token; the `misfit` is the
  error that an embedding would have that is not stored so.
  """
  return Transform('tied embedding', outer=_retie_embedding, takes='float32')


def retie_exactly() -> Transform:
  """Makes the transform that stores T and the residuals of the embedding.

  No bit is lost. It changes embeddings in float16 and bfloat16 only, and only if that
  takes fewer bits. Its note counts the exceptions, see `structured.difference`.
  """
  return Transform('exactly tied embedding', outer=_retie_exactly, takes='stored')


def _retie_embedding(context: Context, state: Any, params: Params) -> Noted:
  """Stores T, rounded, if the embedding then has a small error."""
  dtype, unit = context.dtype_of(_EMBED), context.roundoff
  matrices, notes = _table_and_head(params, context.dtype_of(_HEAD))
  if matrices is None:
    return params, notes
  table, head = matrices
  misfit = _error_of_unseen_tokens(table, head)
  if misfit > _UNTIED:
    return params, [note(_EMBED, table, misfit=misfit)]
  norms = row_norms(table)
  matrix = least_squares(normal_equations(table, head, row_weights(norms)))
  rounded = structured.astype(matrix, dtype)
  if not np.isfinite(rounded).all():
    return params, [note(_EMBED, table, obstacle='T would be too large')]
  off = deviations(table, head, rounded)
  error = float(np.linalg.norm(off)) / max(float(np.linalg.norm(norms)), _TINY)
  # Rounding errors do not get smaller below the least normal number.
  least = float(jnp.finfo(dtype).smallest_normal) * np.sqrt(table.shape[1])
  worst = float(np.max(off / np.maximum(norms, least)))
  if error > _MOST_ERROR * unit or worst > 4 * _MOST_ERROR * unit:
    return params, [note(_EMBED, table, misfit=error, worst=worst)]
  params[_EMBED] = structured.Tied(matrix.astype(table.dtype), len(table))
  return params, [note(_EMBED, params[_EMBED], error=error, worst=worst)]


def _retie_exactly(context: Context, state: Any, params: Params) -> Noted:
  """Stores T in integers, and the differences, if that takes fewer bits."""
  matrices, notes = _table_and_head(params, None)
  if matrices is None:
    return params, notes
  table, head = matrices
  if table.dtype not in _EXACT_DTYPES:
    return params, []
  if _error_of_unseen_tokens(table, head) <= _UNTIED:
    exact = _exact_leaf(table, head)
    if exact.estimate() < coder.estimate([table]):
      leaf = params[_EMBED] = exact.leaf
      count = 0 if leaf.exceptions is None else leaf.exceptions.size
      return params, [note(_EMBED, leaf, exceptions=count)]
  return params, [note(_EMBED, table)]


def _table_and_head(
  params: Params, dtype: np.dtype | None
) -> tuple[tuple[np.ndarray, np.ndarray] | None, list[Note]]:
  """Returns the embedding and the head, finite; None and notes if T is of no use.

  The head is rounded to the dtype if there is one; else it must be stored as an array.
  """
  table, kernel = params[_EMBED], params.get(_HEAD)
  if not structured.is_plain(table) or kernel is None or kernel.shape[0] >= len(table):
    return None, []
  if dtype is not None:
    kernel = structured.materialize(structured.astype(kernel, dtype))
  elif not structured.is_plain(kernel):
    return None, []
  matrices = np.asarray(table), np.asarray(kernel)
  with np.errstate(invalid='ignore'):  # a signalling NaN would cause a warning
    for path, array in zip((_EMBED, _HEAD), matrices, strict=True):
      if not np.isfinite(array).all():
        obstacle = f'{path} has weights that are not finite'
        return None, [note(_EMBED, table, obstacle=obstacle)]
  return matrices, []


def is_tied(table: np.ndarray, head: np.ndarray) -> bool:
  """Returns whether an embedding `[V, d]` is about `head^T` `[V, D]` times a matrix."""
  is_long = len(table) > 4 * len(head)
  return is_long and _error_of_unseen_tokens(table, head) <= _UNTIED


def _error_of_unseen_tokens(table: np.ndarray, head: np.ndarray) -> float:
  """Returns the median relative error of some tokens with the T of other tokens.

  Only some columns of the embedding are compared. The result is 0 if fewer than 4D
  tokens have a row that is not zero, because a fit to so few tokens shows nothing.
  """
  rank = len(head)
  few = table[:, :: -(-table.shape[1] // 16)]
  norms = row_norms(few)
  used = np.flatnonzero(norms)
  if used.size < 4 * rank:
    return 0.0
  chosen = np.random.default_rng(0).permutation(used)[: 3 * rank]
  seen, unseen = np.sort(chosen[: 2 * rank]), np.sort(chosen[2 * rank :])
  weights = row_weights(norms)
  matrix = least_squares(normal_equations(few[seen], head[:, seen], weights[seen]))
  off = deviations(few[unseen], head[:, unseen], matrix)
  return float(np.median(off * weights[unseen]))


def _exact_leaf(table: np.ndarray, head: np.ndarray) -> measure.Measured:
  """Makes the leaf; chooses how finely T is rounded."""
  rank, tokens = head.shape
  weights = row_weights(row_norms(table))
  equations = normal_equations(table, head, weights)
  matrix = least_squares(equations)
  errors = deviations(table, head, matrix) * weights
  unit = float(jnp.finfo(table.dtype).eps) / 2
  odd = errors > 8 * max(float(np.median(errors)), unit)
  if odd.any():
    # Tokens that do not fit, for example because they were added later, become
    # exceptions. They must not influence T.
    others = normal_equations(table[odd], head[:, odd], weights[odd])
    equations = jax.tree.map(np.subtract, equations, others)
    matrix = least_squares(equations)
    errors = deviations(table, head, matrix) * weights
  # Rounding row k of T to multiples of s_k adds sum_k mean_i(head[k, i]^2) s_k^2 / 12
  # to the variance v of the deviations. It is best if all terms of this sum are equal.
  # The best sum is v D / (V - D), because finer steps then cost as many bits in the
  # D d integers as they save in the V d residuals.
  variance = (np.mean(errors[~odd] ** 2) + unit**2 / 12) / table.shape[1]
  squares = np.maximum(np.diag(equations.gram) / tokens, 0)
  squares = np.where(squares > 0, squares, 1)
  exponents = np.rint(0.5 * np.log2(squares * (tokens - rank) / (12 * variance)))
  integers = np.rint(np.ldexp(matrix, exponents.astype(np.int32)[:, None]))
  integers = np.clip(integers, -_MOST_INTEGER, _MOST_INTEGER).astype(np.int32)
  return measure.beside_head(table, head, integers, exponents.astype(np.int32))


# ---- least squares -----------------------------------------------------------------


class Equations(NamedTuple):
  """Normal equations `gram @ T = moments`, with W the diagonal of squared weights."""

  gram: np.ndarray  # head @ W @ head^T, float64 [D, D]
  moments: np.ndarray  # head @ W @ embed, float64 [D, d]


def normal_equations(
  table: np.ndarray,  # the embedding, [V, d]
  head: np.ndarray,  # [D, V]
  weights: np.ndarray,  # of the rows of the tokens, [V]
) -> Equations:
  """Returns the normal equations of some tokens."""
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

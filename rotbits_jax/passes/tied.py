"""Stores an embedding in terms of the head, see `symmetries.tied`.

A fit to a sample of the tokens comes first, because it shows at little cost whether the
embedding was ever tied. Shape letters are those of `symmetries.tied`.
"""

from typing import Any

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
from rotbits_jax.symmetries import tied

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
  dtype, unit = context.holder(_EMBED), context.roundoff
  matrices, notes = _table_and_head(params, context.holder(_HEAD))
  if matrices is None:
    return params, notes
  table, head = matrices
  misfit = _error_of_unseen_tokens(table, head)
  if misfit > _UNTIED:
    return params, [note(_EMBED, table, misfit=misfit)]
  norms = tied.row_norms(table)
  matrix = tied.least_squares(tied.equations(table, head, tied.row_weights(norms)))
  rounded = structured.astype(matrix, dtype)
  if not np.isfinite(rounded).all():
    return params, [note(_EMBED, table, obstacle='T would be too large')]
  off = tied.deviations(table, head, rounded)
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
  norms = tied.row_norms(few)
  used = np.flatnonzero(norms)
  if used.size < 4 * rank:
    return 0.0
  chosen = np.random.default_rng(0).permutation(used)[: 3 * rank]
  seen, unseen = np.sort(chosen[: 2 * rank]), np.sort(chosen[2 * rank :])
  weights = tied.row_weights(norms)
  equations = tied.equations(few[seen], head[:, seen], weights[seen])
  matrix = tied.least_squares(equations)
  off = tied.deviations(few[unseen], head[:, unseen], matrix)
  return float(np.median(off * weights[unseen]))


def _exact_leaf(table: np.ndarray, head: np.ndarray) -> measure.Measured:
  """Makes the leaf; chooses how finely T is rounded."""
  rank, tokens = head.shape
  weights = tied.row_weights(tied.row_norms(table))
  equations = tied.equations(table, head, weights)
  matrix = tied.least_squares(equations)
  errors = tied.deviations(table, head, matrix) * weights
  unit = float(jnp.finfo(table.dtype).eps) / 2
  odd = errors > 8 * max(float(np.median(errors)), unit)
  if odd.any():
    # Tokens that do not fit, for example because they were added later, become
    # exceptions. They must not influence T.
    others = tied.equations(table[odd], head[:, odd], weights[odd])
    equations = jax.tree.map(np.subtract, equations, others)
    matrix = tied.least_squares(equations)
    errors = tied.deviations(table, head, matrix) * weights
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

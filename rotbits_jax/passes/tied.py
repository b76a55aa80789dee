"""Stores an embedding in terms of the head, see `symmetries.tied`.

A fit to a sample of the tokens comes first, because it shows at little cost whether the
embedding was ever tied. Shape letters are those of `symmetries.tied`.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured
from rotbits_jax.coding import coder
from rotbits_jax.passes import transform
from rotbits_jax.relative import measure
from rotbits_jax.symmetries import tied

# An embedding with a greater relative error was never tied. The relative error of an
# unrelated embedding is about 1.
_UNTIED = 0.1

_EXACT_DTYPES = np.dtype(np.float16), np.dtype(jnp.bfloat16)

_EMBED, _HEAD = 'embed/tokens', 'head/kernel'


def retie_embedding(*, tolerance: float = 1.5) -> transform.Transform:
  """Makes the transform that stores T in place of the embedding.

  Args:
    tolerance: the greatest relative error of `head^T @ T` in the Frobenius norm, as a
      multiple of `Context.roundoff`. Head and T are rounded to their dtypes first.
      The relative error of a single token may be four times as large. In SliceGPT's own
      files, embeddings have an error of 0.6 to 1, and tokens an error of up to 1.6.

  Returns:
    A transform. Its note says whether the embedding is stored as T, and gives the error
    of the embedding and of the worst token. For an embedding that is not stored so, the
    `misfit` is the error that it would have.
  """
  outer = functools.partial(_retie_embedding, tolerance=tolerance)
  return transform.Transform('tied embedding', outer=outer, takes='float32')


def retie_exactly() -> transform.Transform:
  """Makes the transform that stores T and the residuals of the embedding.

  No bit is lost. The transform takes the numbers as they are stored. It changes
  embeddings in float16 and bfloat16 only, and only if that takes fewer bits.

  Returns:
    A transform. Its note says whether the embedding is stored as T and residuals, and
    how many entries are exceptions, see `structured.difference`.
  """
  return transform.Transform(
    'exactly tied embedding', outer=_retie_exactly, takes='stored'
  )


def _retie_embedding(
  context: transform.Context, state: Any, params: transform.Params, *, tolerance: float
) -> tuple[transform.Params, list[transform.Note]]:
  dtype, unit = context.holder(_EMBED), context.roundoff
  found = _table_and_head(params, context.holder(_HEAD))
  if not isinstance(found, tuple):
    return params, found
  table, head = found
  misfit = _error_of_unseen_tokens(table, head)
  if misfit > _UNTIED:
    return params, [transform.note(_EMBED, table, misfit=misfit)]
  norms = tied.row_norms(table)
  matrix = tied.least_squares(tied.equations(table, head, tied.row_weights(norms)))
  rounded = structured.astype(matrix, dtype)
  if not np.isfinite(rounded).all():
    return params, [transform.note(_EMBED, table, obstacle='T would be too large')]
  off = tied.deviations(table, head, rounded)
  error = float(np.linalg.norm(off)) / max(float(np.linalg.norm(norms)), _TINY)
  # Rounding errors do not get smaller below the least normal number.
  least = float(jnp.finfo(dtype).smallest_normal) * np.sqrt(table.shape[1])
  worst = float(np.max(off / np.maximum(norms, least)))
  if error > tolerance * unit or worst > 4 * tolerance * unit:
    return params, [transform.note(_EMBED, table, misfit=error, worst=worst)]
  params[_EMBED] = structured.Tied(matrix.astype(table.dtype), len(table))
  return params, [transform.note(_EMBED, params[_EMBED], error=error, worst=worst)]


def _retie_exactly(
  context: transform.Context, state: Any, params: transform.Params
) -> tuple[transform.Params, list[transform.Note]]:
  found = _table_and_head(params, None)
  if not isinstance(found, tuple):
    return params, found
  table, head = found
  if table.dtype not in _EXACT_DTYPES:
    return params, []
  if _error_of_unseen_tokens(table, head) <= _UNTIED:
    exact = _exact_leaf(table, head)
    if exact.estimate() < coder.estimate([table]):
      leaf = params[_EMBED] = exact.leaf
      count = 0 if leaf.exceptions is None else leaf.exceptions.size
      return params, [transform.note(_EMBED, leaf, exceptions=count)]
  return params, [transform.note(_EMBED, table)]


def _table_and_head(
  params: transform.Params, dtype: np.dtype | None
) -> tuple[np.ndarray, np.ndarray] | list[transform.Note]:
  """Returns the embedding and the head, if T can be found and is smaller.

  Args:
    params: the parameters outside the layers.
    dtype: the dtype to which the head will be rounded; None if the head must be an
      array that is not rounded.

  Returns:
    The embedding `[V, d]` and the head `[D, V]`, both floating-point and finite. If
    there are no such matrices, or if D is not below V, notes that say why.
  """
  table, kernel = params[_EMBED], params.get(_HEAD)
  if not structured.is_plain(table) or kernel is None or kernel.shape[0] >= len(table):
    return []
  if dtype is not None:
    kernel = structured.materialize(structured.astype(kernel, dtype))
  elif not structured.is_plain(kernel):
    return []
  arrays = np.asarray(table), np.asarray(kernel)
  with np.errstate(invalid='ignore'):  # a signalling NaN would cause a warning
    for path, array in zip((_EMBED, _HEAD), arrays, strict=True):
      if not np.isfinite(array).all():
        obstacle = f'{path} has weights that are not finite'
        return [transform.note(_EMBED, table, obstacle=obstacle)]
  return arrays


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
  scales = tied.row_weights(tied.row_norms(table))
  equations = tied.equations(table, head, scales)
  matrix = tied.least_squares(equations)
  errors = tied.deviations(table, head, matrix) * scales
  unit = float(jnp.finfo(table.dtype).eps) / 2
  odd = errors > 8 * max(float(np.median(errors)), unit)
  if odd.any():
    # Tokens that do not fit, for example because they were added later, become
    # exceptions. They must not influence T.
    others = tied.equations(table[odd], head[:, odd], scales[odd])
    equations = equations.without(others)
    matrix = tied.least_squares(equations)
    errors = tied.deviations(table, head, matrix) * scales
  # Rounding row k of T to multiples of s_k adds sum_k mean_i(head[k, i]^2) s_k^2 / 12
  # to the variance v of the deviations. It is best if all terms of this sum are equal.
  # The best sum is v D / (V - D), because finer steps then cost as many bits in the
  # D d integers as they save in the V d residuals.
  variance = (np.mean(errors[~odd] ** 2) + unit**2 / 12) / table.shape[1]
  squares = np.maximum(np.diag(equations.gram) / tokens, 0)
  squares = np.where(squares > 0, squares, 1)
  exponents = np.rint(0.5 * np.log2(squares * (tokens - rank) / (12 * variance)))
  integers = np.rint(np.ldexp(matrix, exponents.astype(np.int32)[:, None]))
  limit = (1 << 23) - 1
  integers = np.clip(integers, -limit, limit).astype(np.int32)
  return measure.beside_head(table, head, integers, exponents.astype(np.int32))


_TINY = float(np.finfo(np.float32).tiny)

r"""Storing an embedding in terms of the head, where slicing separated the two.

In a tied model, the head is the transposed embedding. Slicing makes two matrices of it,
because the first and the last segment of the residual stream get coordinates of their
own; `models.config` defines segments. If the last segment keeps all D dimensions, the
embedding remains a linear image of the head,

    embed = head^T @ T,    T [D, d],

up to the rounding of both matrices. T is small, so it is stored in place of the
embedding.

T is found by least squares, in float64 on the host. A fit to a sample of the tokens
comes first, because it shows at little cost whether the embedding was ever tied. The
rounding error of a token's row is proportional to the norm of the row. Therefore the
rows are weighted by the inverse of their norm. The weights also limit the influence of
the few tokens that do not fit.

Shape letters are those of `models.config`. In this file D is the width of the last
segment, and d is the width of the first.
"""

import functools
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.structured import tied
from rotbits_jax.symmetries import transform

# An embedding with a greater relative error was never tied. The relative error of an
# unrelated embedding is about 1.
_UNTIED = 0.1
# Size of the sample of tokens that decides how finely T is rounded to integers.
_SAMPLE = 4096


def retie_embedding(*, tolerance: float = 1.5) -> transform.Transform:
  """Makes the transform that stores T in place of the embedding.

  Args:
    tolerance: the greatest relative error of `head^T @ T` in the Frobenius norm, as a
      multiple of `Context.roundoff`. Head and T are rounded to `Context.dtype` first.
      The relative error of a single token may be four times as large. In SliceGPT's own
      files, embeddings have an error of 0.6 to 1, and tokens an error of up to 1.6.

  Returns:
    A transform. Its note says whether the embedding is stored as T, and gives the error
    of the embedding and of the worst token.
  """
  return transform.make(
    'tied embedding', outer=functools.partial(_retie_embedding, tolerance=tolerance)
  )


def retie_exactly() -> transform.Transform:
  """Makes the transform that stores T and the residuals of the embedding.

  No bit is lost. The transform needs the numbers as they are stored, so `rewrite` must
  get no rounding. It changes embeddings in float16 and bfloat16 only, and only if
  that takes fewer bits.

  Returns:
    A transform. Its note says whether the embedding is stored as T and residuals, and
    how many entries are exceptions, see `structured.TiedExactly`.
  """
  return transform.make('exactly tied embedding', outer=_retie_exactly)


def least_squares(gram: np.ndarray, moments: np.ndarray) -> np.ndarray:
  """Solves the normal equations `gram @ X = moments` for X.

  Args:
    gram: float64 `[D, D]`, symmetric and positive semidefinite.
    moments: float64 `[D, d]`.

  Returns:
    X, float64 `[D, d]`. If `gram` is singular, X is nearly zero in its null space.
  """
  diagonal = np.diag(gram)
  units = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1))[:, None]
  # The added diagonal makes the matrix regular in float64. One step of refinement
  # removes the bias that it causes.
  regular = gram * units * units.T + 1e-10 * np.eye(len(gram))
  first = units * np.linalg.solve(regular, units * moments)
  rest = moments - gram @ first
  return first + units * np.linalg.solve(regular, units * rest)


def _retie_embedding(
  context: transform.Context, state: Any, outer: models.Params, *, tolerance: float
) -> tuple[models.Params, list[transform.Note]]:
  dtype, unit = context.dtype, context.roundoff
  found = _table_and_head(outer, dtype)
  if found is None:
    return outer, []
  table, head = found
  error = _error_of_unseen_tokens(table, head)
  if error > _UNTIED:
    return _with_embedding(outer, table, error)
  norms = _row_norms(table)
  matrix = least_squares(*_normal_equations(table, head, _weights(norms)))
  rounded = structured.astype(matrix, dtype)
  if not np.isfinite(rounded).all():
    return _with_embedding(outer, table, error)
  off = _deviations(table, head, rounded)
  error = float(np.linalg.norm(off)) / max(float(np.linalg.norm(norms)), _TINY)
  # Rounding errors do not get smaller below the least normal number.
  least = float(jnp.finfo(dtype).smallest_normal) * np.sqrt(table.shape[1])
  worst = float(np.max(off / np.maximum(norms, least)))
  fits = error <= tolerance * unit and worst <= 4 * tolerance * unit
  leaf = structured.Tied(matrix.astype(table.dtype), len(table)) if fits else table
  outer, (note,) = _with_embedding(outer, leaf, error)
  return outer, [note | {'worst': transform.three_digits(worst)}]


def _retie_exactly(
  context: transform.Context, state: Any, outer: models.Params
) -> tuple[models.Params, list[transform.Note]]:
  found = _table_and_head(outer, None)
  if found is None or found[0].dtype not in (np.float16, ml_dtypes.bfloat16):
    return outer, []
  table, head = found
  if _error_of_unseen_tokens(table, head) > _UNTIED:
    return _with_embedding(outer, table, 0.0)
  leaf = _exact_leaf(table, head)
  if _coded_bits(leaf, len(table)) >= _float_bits(table):
    return _with_embedding(outer, table, 0.0)
  outer, (note,) = _with_embedding(outer, leaf, 0.0)
  return outer, [note | {'exceptions': leaf.exceptions.size}]


def _table_and_head(
  outer: models.Params, dtype: np.dtype | None
) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns the embedding and the head, if T can be found and is smaller.

  Args:
    outer: the parameters outside the layers.
    dtype: the dtype to which the head will be rounded; None if the head must be an
      array that stays as it is.

  Returns:
    The embedding `[V, d]` and the head `[D, V]`, both floating-point and finite; None
    if there are no such matrices, or if D is not below V.
  """
  table, head = outer['embed']['tokens'], outer.get('head')
  if head is None or structured.is_structured(table):
    return None
  kernel = head['kernel']
  if dtype is not None:
    kernel = structured.materialize(structured.astype(kernel, dtype))
  elif structured.is_structured(kernel):
    return None
  table, kernel = np.asarray(table), np.asarray(kernel)
  if len(kernel) >= len(table):
    return None
  with np.errstate(invalid='ignore'):  # a signalling NaN would cause a warning
    for array in (table, kernel):
      if not jnp.issubdtype(array.dtype, jnp.floating) or not np.isfinite(array).all():
        return None
  return table, kernel


def _with_embedding(
  outer: models.Params, leaf: Any, error: float
) -> tuple[models.Params, list[transform.Note]]:
  note = transform.note('embed/tokens', leaf, error=error)
  return outer | {'embed': outer['embed'] | {'tokens': leaf}}, [note]


def _error_of_unseen_tokens(table: np.ndarray, head: np.ndarray) -> float:
  """Returns the median relative error of some tokens with the T of other tokens.

  Only some columns of the embedding are compared. The result is 0 if fewer than 4D
  tokens have a row that is not zero, because a fit to so few tokens shows nothing.
  """
  rank = len(head)
  few = table[:, :: -(-table.shape[1] // 16)]
  norms = _row_norms(few)
  used = np.flatnonzero(norms)
  if used.size < 4 * rank:
    return 0.0
  chosen = np.random.default_rng(0).permutation(used)[: 3 * rank]
  seen, unseen = np.sort(chosen[: 2 * rank]), np.sort(chosen[2 * rank :])
  weights = _weights(norms)
  equations = _normal_equations(few[seen], head[:, seen], weights[seen])
  off = _deviations(few[unseen], head[:, unseen], least_squares(*equations))
  return float(np.median(off * weights[unseen]))


def _normal_equations(
  table: np.ndarray, head: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the arguments of `least_squares`.

  Args:
    table: `[V, d]`.
    head: `[D, V]`.
    weights: `[V]`, the weights of the tokens' rows.

  Returns:
    `head @ W @ head^T` and `head @ W @ table`. W is the diagonal matrix of the squared
    weights.
  """
  gram = np.zeros((len(head), len(head)))
  moments = np.zeros((len(head), table.shape[1]))
  for block in tied.token_blocks(head):
    columns = head[:, block].astype(np.float64) * weights[block]
    gram += columns @ columns.T
    moments += columns @ (table[block].astype(np.float64) * weights[block, None])
  return gram, moments


def _row_norms(table: np.ndarray) -> np.ndarray:
  norms = np.zeros(len(table))
  for block in tied.token_blocks(table.T):
    norms[block] = np.linalg.norm(table[block].astype(np.float64), axis=1)
  return norms


def _weights(norms: np.ndarray) -> np.ndarray:
  """Returns the weights of rows with these norms, `[V]`.

  A weight is the inverse of the row's norm. Norms below the median of the nonzero norms
  count as the median, so that no weight is very large.
  """
  used = norms[norms > 0]
  return 1 / np.maximum(norms, np.median(used) if used.size else 1)


def _deviations(table: np.ndarray, head: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """Returns the norms of the rows of `table - head^T @ matrix`."""
  off = np.zeros(len(table))
  matrix = matrix.astype(np.float64)
  for block in tied.token_blocks(head):
    product = head[:, block].astype(np.float64).T @ matrix
    off[block] = np.linalg.norm(table[block].astype(np.float64) - product, axis=1)
  return off


def _exact_leaf(table: np.ndarray, head: np.ndarray) -> structured.TiedExactly:
  """Makes the leaf and chooses how finely T is rounded, so that the bits are fewest."""
  rank, tokens = head.shape
  weights = _weights(_row_norms(table))
  gram, moments = _normal_equations(table, head, weights)
  matrix = least_squares(gram, moments)
  errors = _deviations(table, head, matrix) * weights
  unit = float(jnp.finfo(table.dtype).eps) / 2
  odd = errors > 8 * max(float(np.median(errors)), unit)
  if odd.any():
    # Tokens that do not fit, for example because they were added later, become
    # exceptions. They must not influence T.
    others = _normal_equations(table[odd], head[:, odd], weights[odd])
    gram, moments = gram - others[0], moments - others[1]
    matrix = least_squares(gram, moments)
    errors = _deviations(table, head, matrix) * weights
  # Rounding row k of T to multiples of s_k adds sum_k mean_i(head[k, i]^2) s_k^2 / 12
  # to the variance v of the deviations. It is best if all terms of this sum are equal.
  # The best sum is v D / (V - D), because finer steps then cost as many bits in the
  # D d integers as they save in the V d residuals.
  variance = (np.mean(errors[~odd] ** 2) + unit**2 / 12) / table.shape[1]
  squares = np.maximum(np.diag(gram) / tokens, 0)
  squares = np.where(squares > 0, squares, 1)
  levels = 0.5 * np.log2(squares * (tokens - rank) / (12 * variance))
  sample = np.sort(np.random.default_rng(0).permutation(tokens)[:_SAMPLE])
  few = table[sample], head[:, sample]

  def with_map(
    table: np.ndarray, head: np.ndarray, exponents: np.ndarray
  ) -> structured.TiedExactly:
    integers = np.rint(np.ldexp(matrix, exponents[:, None]))
    limit = (1 << 23) - 1
    integers = np.clip(integers, -limit, limit).astype(np.int32)
    return structured.TiedExactly.from_table(table, head, integers, exponents)

  steps = [np.rint(levels + more).astype(np.int32) for more in (-1, 0, 1)]
  best = min(steps, key=lambda e: _coded_bits(with_map(*few, e), tokens))
  return with_map(table, head, best)


def _coded_bits(leaf: structured.TiedExactly, tokens: int) -> float:
  """Estimates how many bits a leaf takes once it is coded.

  Args:
    leaf: the leaf, which may be for a sample of the tokens only.
    tokens: the number of all tokens; the bits of residuals and exceptions are scaled up
      to it.
  """
  _, arrays = leaf.stored()
  high = arrays['map'] >> 8
  bits = sum(_entropy(x.view(np.uint8)) for x in leaf.residuals)
  bits = (bits + 16 * leaf.exceptions.size) * tokens / leaf.tokens
  bits += _entropy(high.view(np.uint16) & 0xFF) + 8 * high.size
  return bits + (_entropy(arrays['low']) if 'low' in arrays else 0)


def _float_bits(table: np.ndarray) -> float:
  """Estimates how many bits 16-bit floats take once they are coded.

  The coder models the exponent and the top 3 bits of the mantissa. The sign and the
  other bits are stored as they are.
  """
  low = max(jnp.finfo(table.dtype).nmant - 3, 0)
  bits = np.ascontiguousarray(table).view(np.uint16)
  return _entropy((bits & 0x7FFF) >> low) + (1 + low) * table.size


def _entropy(symbols: np.ndarray) -> float:
  """Returns the entropy of all symbols together, in bits.

  It includes 8 bits for each different symbol, for the decoder's frequency table.
  """
  counts = np.bincount(symbols.reshape(-1))
  counts = counts[counts > 0]
  return float(counts @ np.log2(counts.sum() / counts)) + 8 * counts.size


_TINY = float(np.finfo(np.float32).tiny)

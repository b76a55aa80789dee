"""Stores an embedding in terms of the head that slicing separated from it.

Up to rounding, the embedding `[V, d]` of V tokens is head^T @ T with a T `[D, d]`, see
the page on the mathematics. T is found by least squares, in float64 and on the host,
because the normal equations square the condition number. The rounding error of a
token's row is proportional to the norm of the row, so rows are weighted by the inverse
of their norm. This also limits the influence of the few tokens that do not fit. A fit
to a sample of the tokens shows first whether the embedding was ever tied.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured
from rotbits_jax.coding import coder
from rotbits_jax.passes import transform as transform_lib
from rotbits_jax.passes.transform import Context
from rotbits_jax.relative import measure
from rotbits_jax.structured import tied
from rotbits_jax.symmetries.least_squares import normal_equations
from rotbits_jax.symmetries.least_squares import row_weights
from rotbits_jax.symmetries.least_squares import solution

_UNTIED = 0.2  # relative error of an embedding that was never tied; usually about 2

# The greatest relative error of `head^T @ T`, rounded, in the Frobenius norm, as a
# multiple of the roundoff; a single token may have four times as much. In SliceGPT's
# own files, it is 0.6 to 1, and up to 1.6 for a token.
_MOST_ERROR = 1.5

_EMBED, _HEAD = 'embed/tokens', 'head/kernel'


def retie_embedding() -> transform_lib.Transform:
  """Makes the transform that stores T in place of the embedding.

  Its note gives the error of the embedding and of the worst token, or the `misfit`: the
  error that an embedding would have that is not stored so.
  """
  outer = functools.partial(_retie, _rounded_leaf)
  return transform_lib.Transform('tied embedding', outer=outer)


def retie_exactly() -> transform_lib.Transform:
  """Makes the transform that stores T and residuals, if they take fewer bits; exact."""
  outer = functools.partial(_retie, _exact_leaf)
  return transform_lib.Transform('exactly tied embedding', outer=outer)


@np.errstate(over='ignore', invalid='ignore')  # of weights that are not finite
def _retie(
  make: Callable[[np.ndarray, np.ndarray, Context], tuple[Any, dict[str, Any]]],
  context: Context,
  state: Any,
  params: transform_lib.Params,
) -> transform_lib.Noted:
  """Puts a leaf in the place of the embedding, if the function makes one."""
  table, kernel = params[_EMBED], params.get(_HEAD)
  is_exact = getattr(kernel, 'is_exact', True)
  if not structured.is_plain(table) or kernel is None or not is_exact:
    return params, {}
  kernel = structured.astype(kernel, context.dtype_of(_HEAD))
  table, head = np.asarray(table), np.asarray(structured.materialize(kernel))
  if len(head) >= len(table):
    return params, {}
  note: transform_lib.Note = {'misfit': _error_of_unseen_tokens(table, head)}
  if note['misfit'] <= _UNTIED:  # false if it is NaN
    leaf, note = make(table, head, context)
    params[_EMBED] = params[_EMBED] if leaf is None else leaf
  return params, {_EMBED: note}


def _error_of_unseen_tokens(table: np.ndarray, head: np.ndarray) -> float:
  """Returns the median relative error of some tokens with the T of others, or 0."""
  rank, count = len(head), len(head) * 5 // 4  # more tokens take as much more time
  few = table[:, :: -(-table.shape[1] // 16)]
  norms = row_norms(few)
  used = np.flatnonzero(norms)
  if used.size < 4 * rank:
    return 0.0
  chosen = np.random.default_rng(0).permutation(used)[: 2 * rank]
  seen, unseen = np.sort(chosen[:count]), np.sort(chosen[count:])
  weights = row_weights(norms)
  terms = normal_equations(few[seen], head[:, seen], weights[seen])
  matrix = solution(*terms, steps=1)
  off = deviations(few[unseen], head[:, unseen], matrix)
  return float(np.median(off * weights[unseen]))


def _rounded_leaf(
  table: np.ndarray, head: np.ndarray, context: Context
) -> tuple[structured.Tied | None, dict[str, Any]]:
  """Returns T, if it makes a small error when it is rounded; and the errors."""
  norms = row_norms(table)
  matrix = solution(*normal_equations(table, head, row_weights(norms)))
  dtype = context.dtype_of(_EMBED)
  off = deviations(table, head, structured.astype(matrix, dtype))
  # Rounding errors do not get smaller below the least normal number.
  least = float(jnp.finfo(dtype).smallest_normal) * np.sqrt(table.shape[1])
  worst = float(np.max(off / np.maximum(norms, least)))
  error = float(np.linalg.norm(off) / max(np.linalg.norm(norms), least))
  most = _MOST_ERROR * context.roundoff
  if error <= most and worst <= 4 * most:  # false if one is NaN
    leaf = structured.Tied(matrix.astype(table.dtype), len(table))
    return leaf, {'error': error, 'worst': worst}
  return None, {'misfit': error, 'worst': worst}


def _exact_leaf(
  table: np.ndarray, head: np.ndarray, context: Context
) -> tuple[Any, dict[str, Any]]:
  """Returns a leaf of T in integers and the differences, if it takes fewer bits."""
  is_finite = np.isfinite(table).all() and np.isfinite(head).all()
  if table.dtype not in (np.float16, jnp.bfloat16) or not is_finite:
    return None, {}
  rank, tokens = head.shape
  weights, unit = row_weights(row_norms(table)), float(jnp.finfo(table.dtype).eps) / 2
  gram, moments = normal_equations(table, head, weights)
  matrix = solution(gram, moments)
  errors = deviations(table, head, matrix) * weights
  odd = errors > 8 * max(float(np.median(errors)), unit)
  if odd.any():
    # Tokens that do not fit, for example because they were added later, become
    # exceptions. They must not influence T.
    odd_gram, odd_moments = normal_equations(table[odd], head[:, odd], weights[odd])
    gram, moments = gram - odd_gram, moments - odd_moments
    matrix = solution(gram, moments)
    errors = deviations(table, head, matrix) * weights
  # Rounding T to multiples of s adds sum_k mean_i(head[k, i]^2) s^2 / 12 to the
  # variance v of the deviations. The best sum is v D / (V - D), because finer steps
  # then cost as many bits in the D d integers as they save in the V d residuals.
  variance = (np.mean(errors[~odd] ** 2) + unit**2 / 12) / table.shape[1]
  square = np.trace(gram) / tokens or 1
  scale = np.log2(square * (tokens - rank) / (12 * variance * rank)) / 2
  most = 15 - math.frexp(1.0001 * np.abs(matrix).max(initial=0))[1]  # for int16
  scale = int(np.clip(np.rint(scale), -64, min(most, 64)))
  integers = np.rint(np.ldexp(matrix, scale)).astype(np.int16)
  exact = measure.beside_head(table, head, integers, scale)
  if exact.estimate() >= coder.estimate([table]):
    return None, {}
  return exact.leaf, {}


# ---- rows of an embedding ------------------------------------------------------------


def deviations(table: np.ndarray, head: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """Returns the norms of the rows of `table - head^T @ matrix`, float64 `[V]`."""
  off = []
  for block in tied.token_blocks(head):
    predicted = head[:, block].astype(np.float64).T @ matrix.astype(np.float64)
    off.append(np.linalg.norm(table[block].astype(np.float64) - predicted, axis=1))
  return np.concatenate(off)


def row_norms(table: np.ndarray) -> np.ndarray:
  """Returns the norms of the rows of an embedding, float64 `[V]`."""
  blocks = (table[block] for block in tied.token_blocks(table.T))
  return np.concatenate([np.linalg.norm(x.astype(np.float64), axis=1) for x in blocks])

r"""Canonical forms of a matrix under rotations from the left.

A canonicaliser splits a matrix W into a rotation Q and a canonical matrix W_ref, the
reference:

    W = Q W_ref,    Q orthogonal,    with canonicalise(R W) = (W_ref, R Q)

for every orthogonal R, as far as W determines Q. Bits-back coding uses it as follows.
The encoder chooses a rotation R and stores W' = R W_ref, rounded. The decoder
canonicalises W' and obtains R as the rotation, up to an error that is due to rounding.
Let e be the relative rounding error of W', and s_i the singular values. The error of
the rotation depends on the canonicaliser:

    svd             e / (s_i - s_j): singular vectors mix if their values are close
    qr              e times the condition number of the leading columns
    polar_shortcut  e / (s_i + s_j)

W does not determine Q if singular values are equal (for `svd`) or if the leading block
has no full rank (for the others). The result is then still orthogonal and finite, but
rounding can change it by any amount. The encoder notices this, because it simulates the
decoder.

Shapes: W and W_ref are `[n, m]`, Q is `[n, n]`, all float32. Use `vmap` for stacks.

Reference: N. J. Higham, Functions of Matrices, SIAM 2008, chapter 8.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rotbits_jax.symmetries import products

Canonicaliser = Callable[[jax.Array], tuple[jax.Array, jax.Array]]

_matmul = products.matmul


def svd(w: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Canonicalises by the singular value decomposition `W = U S V^T`, with `Q = U`.

  The rows of `W_ref = S V^T` are orthogonal, and their norms descend. Signs are chosen
  so that no row of W_ref has a negative sum. If a sum is near 0, rounding may change
  the sign; a correction of the rotation stores such signs (`haar.Correction.flips`).
  """
  w = w.astype(jnp.float32)
  n, m = w.shape
  q, _, _ = jnp.linalg.svd(w, full_matrices=m < n)
  reference = _matmul(q.T, w)
  signs = jnp.where(reference.sum(axis=1) < 0, jnp.float32(-1), jnp.float32(1))
  return reference * signs[:, None], q * signs


def qr(w: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Canonicalises by a QR factorisation of the leading n columns.

  These columns of W_ref are upper triangular, and their diagonal is not negative.
  """
  w = w.astype(jnp.float32)
  n, m = w.shape
  q, r = jnp.linalg.qr(w[:, :n], mode='complete')
  diagonal = jnp.pad(jnp.diagonal(r), (0, n - min(n, m)))
  q = q * jnp.where(diagonal < 0, jnp.float32(-1), jnp.float32(1))
  return _matmul(q.T, w), q


class Polar(NamedTuple):
  """The left polar decomposition M = [P 0] O of a matrix, with P = U diag(values) U^T.

  Attributes:
    u: U, float32 `[d, d]`, orthogonal.
    values: the singular values of M, float32 `[d]`, descending.
    rotation: O, float32 `[e, e]`, orthogonal.
  """

  u: jax.Array
  values: jax.Array
  rotation: jax.Array


def polar(matrix: jax.Array) -> Polar:
  """Returns the left polar decomposition of a matrix M `[d, e]`, d <= e, in float32.

  The eigenvectors of M M^T rotate M into rows that are nearly orthogonal. These rows
  are divided by their norms and made orthogonal. The result is nearly O, in the
  coordinates of the eigenvectors. With this O, M O^T is not yet symmetric, because a
  small rotation is missing. Its generator W solves

      M O^T - O M^T = P W + W P      in the eigenbasis of P,

  and one Newton step applies it. The errors are smaller than those of a singular value
  decomposition in float32, even if a singular value is near 0, and most of the work is
  matrix products. If M has no full rank in float32, a singular value decomposition is
  used instead.
  """
  d, e = matrix.shape
  matrix = matrix.astype(jnp.float32)
  _, u = jnp.linalg.eigh(_matmul(matrix, matrix.T))
  rows = _matmul(u.T, matrix)  # U^T P O
  norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
  start = rows / jnp.where(norms > 0, norms, 1)
  nearly = jnp.max(jnp.abs(_matmul(start, start.T) - jnp.eye(d))) < _NEARLY

  def refined() -> tuple[jax.Array, jax.Array, jax.Array]:
    frame = start
    for _ in range(3):
      frame = orthogonalized(frame)
    symmetric = _matmul(rows, frame.T)
    values = jnp.diagonal(symmetric)
    sums = values[:, None] + values
    off = symmetric - symmetric.T
    # A large quotient is noise, divided by two values that are both near 0.
    step = jnp.where(jnp.abs(off) < sums / 8, off / jnp.where(sums > 0, sums, 1), 0)
    frame = orthogonalized(frame + _matmul(step, frame))
    frame = _matmul(u, frame)  # the first d rows of O
    symmetric = _matmul(matrix, frame.T)
    values, vectors = jnp.linalg.eigh((symmetric + symmetric.T) / 2)
    return vectors[:, ::-1], values[::-1], frame

  def decomposed() -> tuple[jax.Array, jax.Array, jax.Array]:
    vectors, values, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return vectors, values, _matmul(vectors, vt)

  vectors, values, frame = jax.lax.cond(nearly, refined, decomposed)
  if e > d:
    q, _ = jnp.linalg.qr(frame.T, mode='complete')
    frame = jnp.concatenate([frame, q[:, d:].T])
  return Polar(vectors, values, frame)


# The iteration that makes rows orthogonal converges if their inner products differ from
# those of orthonormal rows by less than this.
_NEARLY = 0.3


def orthogonalized(frame: jax.Array) -> jax.Array:
  """Makes one Newton-Schulz step towards orthonormal rows, float32 `[d, e]`."""
  return 1.5 * frame - 0.5 * _matmul(_matmul(frame, frame.T), frame)


def polar_shortcut(w: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Canonicalises by a polar decomposition of the leading n columns.

  These columns of W_ref are symmetric and positive semidefinite. In practice they are a
  shortcut. Q is the polar factor, which is the rotation nearest to the columns and has
  no free signs. If there are fewer than n columns, zeros take the place of the others.
  """
  w = w.astype(jnp.float32)
  n, m = w.shape
  block = jnp.pad(w[:, :n], ((0, 0), (0, max(n - m, 0))))
  # One more step halves the rounding errors of the decomposition.
  q = reorthogonalize(polar(block).rotation)
  return _matmul(q.T, w), q


def reorthogonalize(q: jax.Array) -> jax.Array:
  """Makes one Newton-Schulz step, which restores orthogonality that rounding lost.

  Args:
    q: float32 `[..., n, n]`, orthogonal up to rounding errors.

  Returns:
    A matrix that is closer to orthogonal, `[..., n, n]`.
  """
  gram = _matmul(jnp.matrix_transpose(q), q)
  return 1.5 * q - 0.5 * _matmul(q, gram)


CANONICALISERS: dict[str, Canonicaliser] = {
  'svd': svd,
  'qr': qr,
  'polar_shortcut': polar_shortcut,
}

r"""Canonical forms of a matrix under rotations from the left.

A canonicaliser takes W to a reference and a rotation,

    W = Q W_ref,    Q orthogonal,    with canonicalise(R W) = (W_ref, R Q)

for every orthogonal R, as far as W determines Q. The encoder stores W' = R W_ref,
rounded, for a rotation R of its choice; the decoder finds R, nearly, as the rotation
part of W'. How nearly depends on the canonicaliser: with noise of relative size e in
W', and s_i the singular values,

    svd             Q is off by e / (s_i - s_j): vectors mix where values are close;
    qr              by e times the condition of the leading columns;
    polar_shortcut  by e / (s_i + s_j).

Where W does not determine Q (equal singular values for `svd`, a leading block without
full rank for the others) a result is still orthogonal and finite, but noise turns it.
The encoder sees that when it simulates the decoder.

Shapes: W `[n, m]`, W_ref `[n, m]`, Q `[n, n]`; float32. `vmap` them over stacks.

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
  """`W = U S V^T`: `W_ref = S V^T` has orthogonal rows of falling norm, `Q = U`.

  Signs: each row of W_ref has a sum that is not negative. Noise may turn a sign
  whose sum is near 0; a correction of the rotation sends such signs
  (`haar.Correction.flips`).
  """
  w = w.astype(jnp.float32)
  n, m = w.shape
  q, _, _ = jnp.linalg.svd(w, full_matrices=m < n)
  reference = _matmul(q.T, w)
  signs = jnp.where(reference.sum(axis=1) < 0, jnp.float32(-1), jnp.float32(1))
  return reference * signs[:, None], q * signs


def qr(w: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`W_ref` is upper triangular in its leading n columns, as in a QR factorisation.

  Signs: the diagonal of W_ref is not negative.
  """
  w = w.astype(jnp.float32)
  n, m = w.shape
  q, r = jnp.linalg.qr(w[:, :n], mode='complete')
  diagonal = jnp.pad(jnp.diagonal(r), (0, n - min(n, m)))
  q = q * jnp.where(diagonal < 0, jnp.float32(-1), jnp.float32(1))
  return _matmul(q.T, w), q


class Polar(NamedTuple):
  """M = [P 0] O with P = U diag(values) U^T."""

  u: jax.Array  # float32 [d, d], orthogonal
  values: jax.Array  # float32 [d], descending
  rotation: jax.Array  # float32 [e, e], O


def polar(matrix: jax.Array) -> Polar:
  """Left polar decomposition of a matrix `[d, e]`, d <= e, in float32.

  The eigenvectors of M M^T turn M into rows that are nearly orthogonal. Divided by
  their norms and made orthogonal they are nearly O in the eigenvectors' coordinates. A
  Newton step takes off the rotation W that is left, by which M O^T is not symmetric
  yet:

      M O^T - O M^T = P W + W P      solved in the eigenbasis of P.

  The errors are below those of a singular value decomposition in float32, also where a
  singular value is near 0, and matrix products do most of the work. Where M has no full
  rank in float32, the singular value decomposition does it.
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
    # Where the quotient is large, it is noise over values that are both near 0.
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


# How far products of rows may be from those of orthonormal ones, for the iteration that
# makes them orthogonal to converge.
_NEARLY = 0.3


def orthogonalized(frame: jax.Array) -> jax.Array:
  """One Newton-Schulz step towards orthonormal rows: float32 `[d, e]`."""
  return 1.5 * frame - 0.5 * _matmul(_matmul(frame, frame.T), frame)


def polar_shortcut(w: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`W_ref` is symmetric and positive semidefinite in its leading n columns.

  They are a shortcut's, in practice: Q is the polar factor, the rotation nearest to
  them. No sign is left open. If there are fewer than n, zeros stand for the rest.
  """
  w = w.astype(jnp.float32)
  n, m = w.shape
  block = jnp.pad(w[:, :n], ((0, 0), (0, max(n - m, 0))))
  # One step more halves the rounding errors of the decomposition.
  q = reorthogonalize(polar(block).rotation)
  return _matmul(q.T, w), q


def reorthogonalize(q: jax.Array) -> jax.Array:
  """One Newton-Schulz step, which takes back orthogonality lost to rounding.

  Args:
    q: float32 `[..., n, n]`, orthogonal but for rounding errors.

  Returns:
    The same, nearer to orthogonal.
  """
  gram = _matmul(jnp.matrix_transpose(q), q)
  return 1.5 * q - 0.5 * _matmul(q, gram)


CANONICALISERS: dict[str, Canonicaliser] = {
  'svd': svd,
  'qr': qr,
  'polar_shortcut': polar_shortcut,
}

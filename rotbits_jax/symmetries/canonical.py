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
import functools

import jax
import jax.numpy as jnp

Canonicaliser = Callable[[jax.Array], tuple[jax.Array, jax.Array]]

_matmul = functools.partial(jnp.matmul, precision='highest')


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


def polar_shortcut(w: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`W_ref` is symmetric and positive semidefinite in its leading n columns.

  They are a shortcut's, in practice: Q is the polar factor, the rotation nearest to
  them. No sign is left open. If there are fewer than n, zeros stand for the rest.
  """
  w = w.astype(jnp.float32)
  n, m = w.shape
  block = jnp.pad(w[:, :n], ((0, 0), (0, max(n - m, 0))))
  u, _, vt = jnp.linalg.svd(block)
  q = _matmul(u, vt)
  q = reorthogonalize(q)  # halves the rounding errors of the SVD
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

r"""Canonical forms of a matrix under rotations from the left.

A canonicalizer splits a matrix W into a rotation Q and a canonical matrix W_ref, the
reference:

    W = Q W_ref,    Q orthogonal,    with canonicalize(R W) = (W_ref, R Q)

for every orthogonal R, as far as W determines Q. Let e be the relative rounding error
of W, and s_i the singular values. The error of the rotation is about

    svd    e / (s_i - s_j): singular vectors mix if their values are close
    qr     e times the condition number of the leading columns
    polar  e / (s_i + s_j)

W does not determine Q if singular values are equal (for `svd`) or if the leading block
has no full rank (for the others). The result is then still orthogonal and finite.

Shapes: W and W_ref are `[n, m]`, Q is `[n, n]`, all float32. Use `vmap` for stacks.

Reference: N. J. Higham, Functions of Matrices, SIAM 2008, chapter 8.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rotbits_jax.symmetries import products

_matmul = products.matmul

_LEAST = 0.03  # root of an eigenvalue that is accurate enough, see `quick_polar`
_MOST_SKEW = 1e-4  # products of unit vectors that count as orthogonal


def svd(w: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Canonicalizes by the singular value decomposition `W = U S V^T`, with `Q = U`.

  The rows of `W_ref = S V^T` are orthogonal, and their norms descend. Signs are chosen
  so that no row of W_ref has a negative sum; corrections of `bits_back.haar` have
  those that rounding changes. Returns W_ref and Q.

  >>> w = jnp.array([[0.0, 3.0], [1.0, 0.0]])
  >>> quarter = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
  >>> bool(jnp.allclose(svd(w)[0], svd(quarter @ w)[0], atol=1e-6))
  True
  """
  w = _matrix(w, 'w')
  n, m = w.shape
  q, _, _ = jnp.linalg.svd(w, full_matrices=m < n)
  reference = _matmul(q.T, w)
  is_negative = reference.sum(axis=1) < 0
  signs = jnp.where(is_negative, jnp.float32(-1), jnp.float32(1))
  return reference * signs[:, None], q * signs


def qr(w: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Canonicalizes by a QR factorisation of the leading n columns.

  These columns of W_ref are upper triangular, and their diagonal is not negative.
  Returns W_ref and Q.

  >>> reference, rotation = qr(jnp.array([[0.0, 1.0], [2.0, 3.0]]))
  >>> np.rint(reference).tolist(), np.rint(rotation @ reference).tolist()
  ([[2.0, 3.0], [0.0, 1.0]], [[0.0, 1.0], [2.0, 3.0]])
  """
  w = _matrix(w, 'w')
  n, m = w.shape
  q, r = jnp.linalg.qr(w[:, :n], mode='complete')
  diagonal = jnp.pad(jnp.diagonal(r), (0, n - min(n, m)))
  q = q * jnp.where(diagonal < 0, jnp.float32(-1), jnp.float32(1))
  return _matmul(q.T, w), q


def _matrix(array: jax.Array, name: str) -> jax.Array:
  """Returns a matrix in float32; a ValueError for an array of another rank."""
  matrix = jnp.asarray(array)
  if matrix.ndim != 2:
    raise ValueError(f'{name} must be a matrix, got {name}.shape={matrix.shape}')
  return matrix.astype(jnp.float32)


class Polar(NamedTuple):
  """The left polar decomposition M = [P 0] O, with P = U diag(values) U^T.

  `jax.scipy.linalg.polar(M, side='left')` also has M = P O_d, with a factor O_d of d
  rows. Here O is a whole rotation, of which these are the first rows, because it turns
  all e coordinates of a wider segment. P comes as its eigenvectors and eigenvalues,
  because a shortcut is a function of these, and no iteration stops early.
  """

  u: jax.Array  # U, float32 [d, d], orthogonal
  values: jax.Array  # the singular values of M, float32 [d], descending
  rotation: jax.Array  # O, float32 [e, e], orthogonal


def polar(matrix: jax.Array) -> Polar:
  """Returns the left polar decomposition of a matrix M `[d, e]`, d <= e, in float32.

  With the singular value decomposition M = U S V^T, it is P = U S U^T, and O begins
  with the rows of U V^T.

  >>> found = polar(jnp.array([[0.0, 2.0], [1.0, 0.0]]))
  >>> np.rint(found.values).tolist()
  [2.0, 1.0]
  >>> np.rint((found.u * found.values) @ found.u.T @ found.rotation).tolist()
  [[0.0, 2.0], [1.0, 0.0]]

  Raises:
    ValueError: if the matrix has another rank, or more rows than columns.
  """
  u, values, vt = jnp.linalg.svd(_wide(matrix), full_matrices=False)
  return Polar(u, values, _completed(_matmul(u, vt)))


def quick_polar(matrix: jax.Array) -> Polar:
  """Returns the left polar decomposition in half the time of `polar`.

  The eigenvectors of `M M^T` are those of P, but they square the condition of M. So a
  small SVD decomposes what M does to the last sixteenth of them. For blocks of
  orthogonal matrices that is enough; `polar` decomposes others. (`vmap` computes both.)

  Raises:
    ValueError: if the matrix has another rank, or more rows than columns.
  """
  matrix = _wide(matrix)
  d = len(matrix)
  few = -(-d // 16)
  squares, u = jnp.linalg.eigh(_matmul(matrix, matrix.T))
  many = u[:, few:][:, ::-1]
  last = u[:, :few]
  values = jnp.sqrt(jnp.maximum(squares[few:][::-1], jnp.finfo(jnp.float32).tiny))
  rows = _matmul(many.T, matrix) / values[:, None]
  remainder = _matmul(last.T, matrix)
  for _ in range(2):  # the first time leaves rounding errors
    remainder = remainder - _matmul(_matmul(remainder, rows.T), rows)
  mixing, least, ends = jnp.linalg.svd(remainder, full_matrices=False)
  u = jnp.concatenate([many, _matmul(last, mixing)], axis=1)
  rotation = _completed(_matmul(u, jnp.concatenate([rows, ends])))
  quick = Polar(u, jnp.concatenate([values, least]), rotation)
  if few == d:
    return quick
  # Where M has no remainder, the ends are any rows, maybe not orthogonal to others.
  skew = jnp.max(jnp.abs(_matmul(ends, rows.T)))
  relative = values[-1] / jnp.maximum(values[0], 1)
  is_accurate = (skew < _MOST_SKEW) & (relative > _LEAST)  # not if one is NaN
  return jax.lax.cond(is_accurate, lambda: quick, lambda: polar(matrix))


def _wide(matrix: jax.Array) -> jax.Array:
  """Returns a matrix in float32; a ValueError if it has more rows than columns."""
  matrix = _matrix(matrix, 'matrix')
  if matrix.shape[0] > matrix.shape[1]:
    raise ValueError(f'the matrix must be [d, e] with d <= e, got {matrix.shape=}')
  return matrix


def _completed(rows: jax.Array) -> jax.Array:
  """Returns an orthogonal matrix `[e, e]`, given its first rows `[d, e]`."""
  d, e = rows.shape
  if e == d:
    return rows
  q, _ = jnp.linalg.qr(rows.T, mode='complete')
  return jnp.concatenate([rows, q[:, d:].T])


def reorthogonalize(q: jax.Array) -> jax.Array:
  """Makes one Newton-Schulz step, which restores the orthogonality of Q `[n, n]`.

  Q' = 3/2 Q - 1/2 Q Q^T Q
  """
  if q.ndim != 2 or q.shape[0] != q.shape[1]:
    raise ValueError(f'a rotation must be [n, n], got {q.shape=}')
  return 1.5 * q - 0.5 * _matmul(q, _matmul(q.T, q))

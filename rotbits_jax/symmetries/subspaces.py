"""Bases of subspaces, float64 on the host: the nearest orthonormal one, and a leaf.

A subspace has one basis whose rows J are a symmetric matrix M without negative
eigenvalues, see `structured.subspaces`. Shape letters: D hidden size, d width.
"""

import math

import numpy as np

from rotbits_jax.structured import subspaces

_SAME = 0.9  # how far squares of singular values may be from 1


def orthonormal(matrix: np.ndarray) -> np.ndarray | None:
  """Returns the nearest matrix with orthonormal columns; None if none is near."""
  squares, vectors = np.linalg.eigh(matrix.T @ matrix)
  if not np.abs(squares - 1).max() <= _SAME:
    return None
  return matrix @ ((vectors / np.sqrt(squares)) @ vectors.T)


def leaf_of(
  basis: np.ndarray, roundoff: float, *, keeps_basis: bool
) -> subspaces.Basis:
  """Returns the leaf of a basis `[D, d]`, or of its subspace if that is not too narrow.

  Its error is a small part of the roundoff. The rows J are chosen so that M is not
  singular: the error of A, and its entries, are smaller then.
  """
  from scipy import linalg  # slow to import

  hidden, width = basis.shape
  if keeps_basis or subspaces.is_narrow(basis.shape):
    return subspaces.Basis.of(basis, roundoff / 4.7 / math.sqrt(hidden))
  order = linalg.qr(basis.T, mode='r', pivoting=True)[1]
  rows = np.zeros(hidden, bool)
  rows[order[:width]] = True
  # The polar factor of these rows; `eigh` is several times faster than an SVD.
  squares, vectors = np.linalg.eigh(basis[rows] @ basis[rows].T)
  sizes = np.sqrt(np.maximum(squares, 1e-12))
  upper = (vectors * sizes) @ vectors.T
  lower = basis[~rows] @ basis[rows].T @ ((vectors / sizes) @ vectors.T)
  tangent = np.linalg.solve(np.eye(width) + upper, lower.T).T
  # Errors grow relative to tensors, whose vectors lie beside the subspace, too.
  share = math.sqrt(12 / max(hidden - width, 1) * width / hidden) / 6.75
  return subspaces.Basis.of(tangent, roundoff * share, rows)

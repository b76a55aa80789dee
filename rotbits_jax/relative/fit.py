"""Finds the subspaces of a sliced model beside its base, by least squares in float64.

The page on the mathematics has the equations; shape letters are those of `products`.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np

from rotbits_jax.passes import tied
from rotbits_jax.relative import products
from rotbits_jax.structured import subspaces

_SAMPLE = 1 << 9  # vectors of a tensor by which its error is measured
_MOST_ERROR = 2  # roundoffs; SliceGPT's tensors have errors of up to 1
_SAME = 0.9  # how far squares of singular values may be from 1

Tensor = tuple[products.Product, list[np.ndarray], np.ndarray]
"""A product that reads or writes a segment, its tensors of the base, and the result."""


class Fit(NamedTuple):
  """The basis of a segment, and the greatest relative error of tensors made with it."""

  basis: np.ndarray | None  # float64 [D, d]; None if none is near a solution
  error: float


def fit(tensors: Sequence[Tensor], shape: tuple[int, int], roundoff: float) -> Fit:
  """Finds the basis of a segment, of some shape, from tensors that read or write it.

  Vectors with numbers that are not finite are left out. So is a tensor that was
  changed after slicing, if the others fit much better without it. The roundoff is that
  of the tensors.
  """
  gram, moments = np.zeros((shape[0], shape[0])), np.zeros(shape)
  samples: list[list[np.ndarray]] = []
  for product, dense, target in tensors:
    target, some = np.atleast_2d(target.T if product.kind == 'reads' else target), []
    for block, rows in product.vectors(dense, target.dtype):
      wanted = target[block].astype(np.float64)
      is_finite = np.isfinite(rows).all(axis=1) & np.isfinite(wanted).all(axis=1)
      rows, wanted = rows[is_finite], wanted[is_finite]
      weights = tied.row_weights(np.linalg.norm(wanted, axis=1))
      terms = tied.normal_equations(wanted, rows.T, weights)
      gram += terms[0]
      moments += terms[1]
      few = slice(None, None, max(len(rows) // _SAMPLE, 1))
      some.append((rows[few] * weights[few, None], wanted[few] * weights[few, None]))
    samples.append([np.concatenate(x) for x in zip(*some, strict=True)])
  solution = tied.least_squares(gram, moments)
  basis = orthonormal(solution)
  nearest, norm = solution if basis is None else basis, np.linalg.norm
  errors = [float(norm(x @ nearest - y) / (norm(y) or 1)) for x, y in samples]
  error = max(errors, default=math.inf)
  if error > _MOST_ERROR * roundoff and len(tensors) > 1:
    worst = int(np.argmax(errors))
    others = fit([*tensors[:worst], *tensors[worst + 1 :]], shape, roundoff)
    if others.basis is not None and others.error <= _MOST_ERROR * roundoff:
      return others
  return Fit(basis, error)


def orthonormal(matrix: np.ndarray) -> np.ndarray | None:
  """Returns the nearest matrix with orthonormal columns; None if none is near."""
  squares, vectors = np.linalg.eigh(matrix.T @ matrix)
  if not np.abs(squares - 1).max() <= _SAME:
    return None
  return matrix @ ((vectors / np.sqrt(squares)) @ vectors.T)


def as_basis(basis: np.ndarray, roundoff: float) -> subspaces.Basis:
  """Returns the leaf of a basis, whose error is a small part of the roundoff."""
  return subspaces.Basis.of(basis, roundoff / 4.7 / math.sqrt(len(basis)))


def as_subspace(basis: np.ndarray, roundoff: float) -> subspaces.Basis:
  """Returns the leaf of a subspace, or of the basis if it is too narrow.

  The rows J are chosen so that the matrix M is not singular: the error of A, and its
  numbers, are smaller then.
  """
  from scipy import linalg  # slow to import

  hidden, width = basis.shape
  if subspaces.is_narrow(basis.shape):
    return as_basis(basis, roundoff)
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

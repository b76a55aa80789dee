"""Finds the subspaces of a sliced model beside its base, see `products`.

The tensors that read or write segment s are products with its basis V_s. So V_s is a
least-squares solution, for which the kernels of two sublayers are enough, and the
rounding errors of all numbers of these average. The rows are weighted by the inverse of
their norms, as in `passes.tied`. The nearest matrix with orthonormal columns is
taken then.

Shape letters are those of `products`. Everything is computed in float64.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax.relative import products
from rotbits_jax.structured import subspaces

_SAMPLE = 1 << 9  # vectors of a tensor by which its error is measured
_MOST_ERROR = 2  # roundoffs; SliceGPT's tensors have errors of up to 1
_SMALL = 0.3  # share of the median norm of rows that smaller rows count as


class Pair(NamedTuple):
  """A tensor of the sliced model, and the tensors of the base that make it."""

  product: products.Product  # that reads or writes the segment
  dense: list[np.ndarray]
  target: np.ndarray


class FoundBasis(NamedTuple):
  """The basis of a segment."""

  basis: np.ndarray | None  # float64 [D, d]; None if none is near a solution
  error: float  # the relative error of tensors made with it
  growth: float  # of errors relative to a tensor, whose vectors lie beside the subspace

  def as_basis(self, roundoff: float) -> subspaces.Basis:
    """Returns the leaf of the basis, whose error is a small part of the roundoff."""
    assert self.basis is not None
    step = _step(roundoff / 4 / math.sqrt(len(self.basis)))
    return subspaces.Basis.of(self.basis, step)

  def as_subspace(self, roundoff: float) -> subspaces.Basis:
    """Returns the leaf of the subspace, or of the basis if it is too narrow.

    The rows J are chosen so that the matrix M is not singular: the error of A, and its
    numbers, are smaller then.
    """
    from scipy import linalg  # slow to import

    assert self.basis is not None
    if subspaces.is_narrow(self.basis.shape):
      return self.as_basis(roundoff)
    hidden, width = self.basis.shape
    order = linalg.qr(self.basis.T, mode='r', pivoting=True)[1]
    rows = np.zeros(hidden, bool)
    rows[order[:width]] = True
    # The polar factor of these rows; `eigh` is several times faster than an SVD.
    squares, vectors = np.linalg.eigh(self.basis[rows] @ self.basis[rows].T)
    sizes = np.sqrt(np.maximum(squares, 1e-12))
    upper = (vectors * sizes) @ vectors.T
    lower = self.basis[~rows] @ self.basis[rows].T @ ((vectors / sizes) @ vectors.T)
    tangent = np.linalg.solve(np.eye(width) + upper, lower.T).T
    share = math.sqrt(12 / max(hidden - width, 1)) / (6 * self.growth)
    return subspaces.Basis.of(tangent, _step(roundoff * share), rows)


def fit(pairs: list[Pair], shape: tuple[int, ...], roundoff: float) -> FoundBasis:
  """Finds the basis of a segment, of some shape, from tensors that read or write it.

  A tensor that was changed after slicing is left out, if the others fit much better
  without it. The roundoff is that of the tensors.
  """
  gram, moments = np.zeros((shape[0], shape[0])), np.zeros(shape)
  used, samples = list[Pair](), list[tuple[np.ndarray, np.ndarray]]()
  for pair in pairs:
    terms = _equations(pair, shape)
    if all(np.isfinite(x).all() for x in terms[:2]):
      gram += terms[0]
      moments += terms[1]
      used.append(pair)
      samples.append(terms[2])

  def solve() -> tuple[np.ndarray | None, list[float]]:
    least = 1e-10 * np.trace(gram) / len(gram) + 1e-300
    solution = np.linalg.solve(gram + least * np.eye(len(gram)), moments)
    basis = orthonormal(solution)
    nearest = solution if basis is None else basis
    return basis, [_relative_error(*sample, nearest) for sample in samples]

  first = basis, errors = solve()
  while len(used) > 1 and not max(errors) <= _MOST_ERROR * roundoff:
    worst = int(np.argmax(errors))
    terms = _equations(used.pop(worst), shape)
    gram -= terms[0]
    moments -= terms[1]
    del samples[worst]
    basis, errors = solve()
  if basis is None or not max(errors) <= _MOST_ERROR * roundoff:
    basis, errors = first
  norms = [[float(np.linalg.norm(x)) for x in sample] for sample in samples]
  growth = max((whole / sliced for whole, sliced in norms if sliced), default=1.0)
  return FoundBasis(basis, max(errors, default=math.inf), growth)


def _equations(pair: Pair, shape: tuple[int, ...]) -> tuple[Any, ...]:
  """Returns the normal equations of weighted ones, `rows @ V = wanted`; some of these.

  They are not finite where a number is not.
  """
  target = pair.target.T if pair.product.kind == 'reads' else pair.target
  target = np.atleast_2d(target)
  gram, moments, some = np.zeros((shape[0], shape[0])), np.zeros(shape), []
  with np.errstate(invalid='ignore', over='ignore'):
    for block, rows in pair.product.vectors(pair.dense, target.dtype):
      wanted = target[block].astype(np.float64)
      norms = np.linalg.norm(wanted, axis=1)
      weights = 1 / np.maximum(norms, _SMALL * (np.median(norms) or 1))[:, None]
      rows, wanted = rows * weights, wanted * weights
      gram += rows.T @ rows
      moments += rows.T @ wanted
      step = max(len(rows) // _SAMPLE, 1)
      some.append((rows[::step], wanted[::step]))
  rows, wanted = map(np.concatenate, zip(*some, strict=True))
  return gram, moments, (rows, wanted)


def _relative_error(
  rows: np.ndarray, wanted: np.ndarray, solution: np.ndarray
) -> float:
  """Returns the relative error of some equations."""
  norm = np.linalg.norm
  return float(norm(rows @ solution - wanted) / max(norm(wanted), 1e-300))


def orthonormal(matrix: np.ndarray) -> np.ndarray | None:
  """Returns the nearest matrix with orthonormal columns; None if none is near."""
  gram = matrix.T @ matrix
  if not np.isfinite(gram).all():
    return None
  squares, vectors = np.linalg.eigh(gram)
  if np.abs(squares - 1).max() > 0.9:
    return None
  return matrix @ ((vectors / np.sqrt(squares)) @ vectors.T)


def _step(size: float) -> int:
  """Returns a step below a size, in units of 2^-25: 4, 5, 6 or 7 times a power of 2."""
  units = max(int(size * 2.0**subspaces.UNIT), 1)
  shift = max(units.bit_length() - 3, 0)
  return min(units >> shift << shift, 1 << subspaces.UNIT)

r"""Finds the subspaces of a sliced model beside its base, see `products`.

The tensors that read or write segment s are products with its basis V_s. So V_s is a
least-squares solution, for which the kernels of two sublayers are enough, and the
rounding errors of all numbers of these average. The rows are weighted by the inverse of
their norms, as in `passes.tied`. The nearest matrix with orthonormal columns is
taken then.

Shape letters are those of `products`. Everything is computed in float64.
"""

from collections.abc import Iterator
import math
from typing import NamedTuple

import numpy as np

from rotbits_jax.relative import products
from rotbits_jax.relative import rounding_errors
from rotbits_jax.structured import subspaces

# The errors of shortcuts add up along the residual stream. SliceGPT multiplies rounded
# bases, and such a product has errors of 0.8 roundoffs; one that was rounded once, 0.6.
_SHORTCUT = 0.7
_SAMPLE = 1 << 9  # vectors of a tensor by which its error is measured
_MOST_ERROR = 2  # roundoffs; SliceGPT's tensors have errors of up to 1
_SMALL = 0.3  # share of the median norm of rows that smaller rows count as


class Pair(NamedTuple):
  """A tensor of the sliced model, and the tensors of the base that make it."""

  form: products.Form
  arrays: list[np.ndarray]
  target: np.ndarray

  def equations(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields blocks of weighted equations `rows @ V = wanted`."""
    is_read = self.form.kind == 'reads'
    target = self.target.T if is_read else np.atleast_2d(self.target)
    for block, rows in self.form.vectors(self.arrays, self.target.dtype):
      wanted = target[block].astype(np.float64)
      norms = np.linalg.norm(wanted, axis=1)
      weights = 1 / np.maximum(norms, _SMALL * (np.median(norms) or 1))[:, None]
      yield rows * weights, wanted * weights

  def is_rounded(self, product: np.ndarray, roundoff: float) -> bool:
    """Returns whether the tensor differs from a product by rounding errors only."""
    kind, target = self.form.kind, self.target
    if kind == 'shortcut':
      return rounding_errors.explain(target, product, _SHORTCUT * roundoff)
    # Products are made of integers, whose errors are greater than those of float32
    # where D is large and some numbers are far larger than others.
    hidden = self.arrays[0].shape[-1] if kind == 'writes' else self.arrays[1].size
    limit = max(roundoff, 2.0 ** (3 - products.integer_bits(hidden)))
    if kind == 'bias':
      return rounding_errors.explain(target, product, limit)
    vectors = self.form.vectors(self.arrays, target.dtype)
    norms = np.concatenate([np.linalg.norm(rows, axis=1) for _, rows in vectors])
    if kind == 'reads':
      target, product = target.T, product.T
    return rounding_errors.explain(target, product, limit, norms)


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
    """Returns the leaf of the subspace.

    The rows J are chosen so that the matrix M is not singular: the error of A, and its
    numbers, are smaller then.
    """
    from scipy import linalg  # slow to import

    assert self.basis is not None
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
  pairs, samples = list(pairs), []
  gram, moments = np.zeros((shape[0], shape[0])), np.zeros(shape)

  def add(pair: Pair, sign: int) -> list[np.ndarray]:
    """Adds the normal equations of a pair, or subtracts them; returns some of them."""
    few = []
    for rows, wanted in pair.equations():
      gram[...] += sign * (rows.T @ rows)
      moments[...] += sign * (rows.T @ wanted)
      step = max(len(rows) // _SAMPLE, 1)
      few.append((rows[::step], wanted[::step]))
    return [np.concatenate(x) for x in zip(*few, strict=True)]

  for pair in pairs:
    samples.append(add(pair, 1))
  best = basis, errors = _solve(gram, moments, samples)
  while len(samples) > 1 and not max(errors) <= _MOST_ERROR * roundoff:
    worst = int(np.argmax(errors))
    add(pairs.pop(worst), -1)
    del samples[worst]
    basis, errors = _solve(gram, moments, samples)
    if basis is not None and max(errors) <= _MOST_ERROR * roundoff:
      best = basis, errors
  basis, errors = best
  norms = [[float(np.linalg.norm(x)) for x in sample] for sample in samples]
  growth = max((whole / sliced for whole, sliced in norms if sliced), default=1.0)
  return FoundBasis(basis, max(errors, default=math.inf), growth)


def _solve(
  gram: np.ndarray, moments: np.ndarray, samples: list[list[np.ndarray]]
) -> tuple[np.ndarray | None, list[float]]:
  """Returns the basis, see `FoundBasis`, and the relative error of each tensor."""
  least = 1e-10 * np.trace(gram) / len(gram) + 1e-300
  solution = np.linalg.solve(gram + least * np.eye(len(gram)), moments)
  basis = orthonormal(solution)
  used = solution if basis is None else basis
  errors = [
    float(np.linalg.norm(rows @ used - wanted) / max(np.linalg.norm(wanted), 1e-300))
    for rows, wanted in samples
  ]
  return basis, errors


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

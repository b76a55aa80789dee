r"""Finds the subspaces of a sliced model beside its base, see `structured.subspaces`.

The tensors that read or write segment s are products with its basis V_s. So V_s is a
least-squares solution, for which the kernels of two sublayers are enough, and the
rounding errors of all numbers of these average. The rows are weighted by the inverse of
their norms, as in `symmetries.tied`. The nearest matrix with orthonormal columns is
taken then.

Shape letters are those of `structured.subspaces`. Everything is computed in float64.
"""

from collections.abc import Iterator
import math
from typing import NamedTuple

import numpy as np

from rotbits_jax.relative import rounding_errors
from rotbits_jax.structured import subspaces

# The errors of shortcuts add up along the residual stream. SliceGPT multiplies rounded
# bases, and such a product has errors of 0.8 roundoffs; one that was rounded once, 0.6.
_SHORTCUT = 0.7
_SAMPLE = 1 << 9  # vectors of a tensor by which its error is measured
_MOST_ERROR = 2  # roundoffs; SliceGPT's tensors have errors of up to 1
_SMALL = 0.3  # share of the median norm of rows that smaller rows count as


class Pair(NamedTuple):
  """A tensor of the sliced model, and the tensors of the base that make it.

  Attributes:
    way: how it is made.
    arrays: the tensors of the base.
    target: the tensor.
  """

  way: subspaces.Way
  arrays: list[np.ndarray]
  target: np.ndarray

  def equations(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields blocks of weighted equations `rows @ V = wanted`."""
    target = self.target.T if self.way.kind == 'reads' else np.atleast_2d(self.target)
    for block in subspaces.blocks(self.way, self.arrays):
      rows = subspaces.fused(self.way, self.arrays, self.target.dtype, block)
      wanted = target[block].astype(np.float64)
      norms = np.linalg.norm(wanted, axis=1)
      weights = 1 / np.maximum(norms, _SMALL * (np.median(norms) or 1))[:, None]
      yield rows * weights, wanted * weights

  def sample(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns some equations of each block."""
    few = ((x[:: max(len(x) // _SAMPLE, 1)] for x in y) for y in self.equations())
    rows, wanted = zip(*few, strict=True)
    return np.concatenate(rows), np.concatenate(wanted)

  def is_rounded(self, made: np.ndarray, roundoff: float) -> bool:
    """Returns whether the tensor differs from a product by rounding errors only.

    Args:
      made: the product.
      roundoff: unit roundoff of the tensor.
    """
    if self.way.kind == 'shortcut':
      return rounding_errors.explain(self.target, made, _SHORTCUT * roundoff)
    # Products are made of integers, whose errors are greater than those of float32
    # where D is large and some numbers are far larger than others.
    hidden = np.atleast_2d(self.arrays[0]).shape[-1]
    if self.way.kind != 'writes':
      hidden = self.arrays[1].size
    limit = max(roundoff, 2.0 ** (3 - subspaces.integer_bits(hidden)))
    if self.way.kind == 'bias':
      return rounding_errors.explain(self.target, made, limit)
    norms = [
      np.linalg.norm(
        subspaces.fused(self.way, self.arrays, self.target.dtype, x), axis=1
      )
      for x in subspaces.blocks(self.way, self.arrays)
    ]
    target = self.target
    if self.way.kind == 'reads':
      target, made = target.T, made.T
    return rounding_errors.explain(target, made, limit, np.concatenate(norms))


class FoundBasis(NamedTuple):
  """The basis of a segment.

  Attributes:
    basis: float64 `[D, d]`; None if no matrix with orthonormal columns is near a
      solution.
    error: the relative error of tensors made with it.
    growth: by how much errors of the basis are greater, relative to a tensor, because
      its vectors lie beside the subspace.
  """

  basis: np.ndarray | None
  error: float
  growth: float

  def as_basis(self, roundoff: float) -> subspaces.Basis:
    """Returns the leaf of the basis, whose error is a small part of the roundoff."""
    assert self.basis is not None
    step = _step(roundoff / 4 / math.sqrt(len(self.basis)))
    numbers = np.rint(self.basis * (2.0**subspaces.UNIT / step)).astype(np.int32)
    return subspaces.Basis(numbers, step)

  def as_subspace(self, roundoff: float) -> subspaces.Subspace:
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
    squares, turn = np.linalg.eigh(self.basis[rows] @ self.basis[rows].T)
    sizes = np.sqrt(np.maximum(squares, 1e-12))
    upper = (turn * sizes) @ turn.T
    lower = self.basis[~rows] @ self.basis[rows].T @ ((turn / sizes) @ turn.T)
    tangent = np.linalg.solve(np.eye(width) + upper, lower.T).T
    share = math.sqrt(12 / max(hidden - width, 1)) / (6 * self.growth)
    return subspaces.Subspace.of(tangent, rows, _step(roundoff * share))


def fit(pairs: list[Pair], shape: tuple[int, ...], roundoff: float) -> FoundBasis:
  """Finds the basis of a segment from the tensors that read or write it.

  A tensor that was changed after slicing is left out, if the others fit much better
  without it.

  Args:
    pairs: the tensors.
    shape: of the basis.
    roundoff: unit roundoff of the tensors.
  """
  pairs, samples = list(pairs), [pair.sample() for pair in pairs]
  gram, moments = np.zeros((shape[0], shape[0])), np.zeros(shape)
  for pair in pairs:
    _add(gram, moments, pair, 1)
  best = basis, errors = _solve(gram, moments, samples)
  while len(samples) > 1 and not max(errors) <= _MOST_ERROR * roundoff:
    worst = int(np.argmax(errors))
    _add(gram, moments, pairs.pop(worst), -1)
    del samples[worst]
    basis, errors = _solve(gram, moments, samples)
    if basis is not None and max(errors) <= _MOST_ERROR * roundoff:
      best = basis, errors
  basis, errors = best
  norms = [[float(np.linalg.norm(x)) for x in sample] for sample in samples]
  growth = max((whole / sliced for whole, sliced in norms if sliced), default=1.0)
  return FoundBasis(basis, max(errors, default=math.inf), growth)


def _add(gram: np.ndarray, moments: np.ndarray, pair: Pair, sign: int) -> None:
  """Adds the normal equations of a tensor, or subtracts them."""
  for rows, wanted in pair.equations():
    gram += sign * (rows.T @ rows)
    moments += sign * (rows.T @ wanted)


def _solve(
  gram: np.ndarray, moments: np.ndarray, samples: list[tuple[np.ndarray, np.ndarray]]
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
  squares, turn = np.linalg.eigh(gram)
  if np.abs(squares - 1).max() > 0.9:
    return None
  return matrix @ ((turn / np.sqrt(squares)) @ turn.T)


def _step(size: float) -> int:
  """Returns a step below a size, in units of 2^-25: 4, 5, 6 or 7 times a power of 2."""
  units = max(int(size * 2.0**subspaces.UNIT), 1)
  shift = max(units.bit_length() - 3, 0)
  return min(units >> shift << shift, 1 << subspaces.UNIT)

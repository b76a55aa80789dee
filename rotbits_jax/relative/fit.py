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

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.structured import subspaces

_ROOTS = 8  # steps of the Newton-Schulz iteration, which is quadratic
# The errors of shortcuts add up along the residual stream. SliceGPT multiplies rounded
# bases, and such a product has errors of 0.8 roundoffs; one that was rounded once, 0.6.
_SHORTCUT = 0.7
_SAMPLE = 1 << 9  # vectors of a tensor by which its error is measured
_MOST_ERROR = 2  # roundoffs; SliceGPT's tensors have errors of up to 1
_SMALL = 0.3  # share of the median norm of rows that smaller rows count as


class Ingredients(NamedTuple):
  """The parts of which a tensor of a sliced model is made.

  Attributes:
    way: how it is made.
    paths: of tensors of the base, in the order of `structured.subspaces.tensor`.
    segments: the segments of the model whose bases are needed.
  """

  way: subspaces.Way
  paths: tuple[str, ...]
  segments: tuple[int, ...]


def ingredients(
  dense: models.ModelConfig, sliced: models.ModelConfig
) -> dict[str, Ingredients]:
  """Returns the ingredients of the parameters of a sliced model, by path.

  A parameter that slicing does not change is not there.

  Args:
    dense: config of the base.
    sliced: config of the sliced model.
  """
  layer, outer = models.layout.layer_axes(sliced), models.layout.outer_axes(sliced)
  step, found = sliced.segments_per_layer, {}
  has_mean = dense.norm == 'layernorm'
  known = {*models.layout.layer_axes(dense), *models.layout.outer_axes(dense)}

  def add(
    name: str, axes: models.layout.Axes, path: str, norm: str, first: int, last: int
  ) -> None:
    segment = lambda axis: first + axis if axis >= 0 else last
    own, head = axes[path], path.startswith('head/')
    kernel = f'{path.rpartition("/")[0]}/kernel'
    source = 'embed/tokens' if head and dense.tied_head else f'{name}{kernel}'
    tied = head and dense.tied_head
    if '_shortcut' in path:
      made = Ingredients(
        subspaces.Way('shortcut'), (), (segment(own[0]), segment(own[1]))
      )
    elif isinstance(own[-1], int):
      way = subspaces.Way('writes', centred=has_mean)
      made = Ingredients(way, (f'{name}{path}',), (segment(own[-1]),))
    elif isinstance(own[0], int):
      way = subspaces.Way('reads', transposed=tied)
      made = Ingredients(way, (source, f'{norm}/scale'), (segment(own[0]),))
    elif has_mean and isinstance(axes.get(kernel, ('',))[0], int):
      way = subspaces.Way('bias', transposed=tied)
      bias = (f'{name}{path}',) if path in known else ()
      made = Ingredients(way, (source, f'{norm}/bias', *bias), ())
    else:
      return
    found[f'{name}{path}'] = made

  for i in range(sliced.num_layers):
    name = models.names.prefix(i)
    for path in layer:
      norm = models.layout.norm_of(dense, path.partition('/')[0])
      add(name, layer, path, f'{name}{norm}', i * step, (i + 1) * step)
  for path in outer:
    add('', outer, path, 'final_norm', 0, sliced.num_layers * step)
  return found


class Pair(NamedTuple):
  """A tensor of the sliced model that is a product with one basis.

  Attributes:
    way: how it is made.
    arrays: the tensors of the base.
    target: the tensor.
  """

  way: subspaces.Way
  arrays: list[np.ndarray]
  target: np.ndarray


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


def fit(
  pairs: list[Pair], shape: tuple[int, ...], *, rounded: bool, roundoff: float
) -> FoundBasis:
  """Finds the basis of a segment from the tensors that read or write it.

  A tensor that was changed after slicing is left out, if the others fit much better
  without it.

  Args:
    pairs: the tensors.
    shape: of the basis.
    rounded: see `structured.subspaces.Way`.
    roundoff: unit roundoff of the tensors.
  """
  pairs = [x._replace(way=x.way._replace(rounded=rounded)) for x in pairs]
  samples = [_sample(pair) for pair in pairs]
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
  norms = [[float(np.linalg.norm(x)) for x in pair] for pair in samples]
  growth = max((whole / own for whole, own in norms if own), default=1.0)
  return FoundBasis(basis, max(errors, default=math.inf), growth)


def _sample(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
  """Returns some equations `rows @ V = wanted` of a tensor."""
  rows, wanted = [], []
  for block, own in _blocks(pair):
    some = slice(None, None, max(_count(pair) // _SAMPLE, 1))
    rows.append(block[some])
    wanted.append(own[some])
  return np.concatenate(rows), np.concatenate(wanted)


def _count(pair: Pair) -> int:
  if pair.way.kind == 'reads':
    return pair.target.shape[-1]
  return len(np.atleast_2d(pair.target))


def _blocks(pair: Pair) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the equations of a tensor, weighted, in blocks."""
  way, target = pair.way, pair.target
  whole = target.T if way.kind == 'reads' else np.atleast_2d(target)
  for block in subspaces.blocks(way, pair.arrays):
    rows = subspaces.fused(way, pair.arrays, target.dtype, block)
    wanted = whole[block].astype(np.float64)
    norms = np.linalg.norm(wanted, axis=1)
    weights = 1 / np.maximum(norms, _SMALL * (np.median(norms) or 1))[:, None]
    yield rows * weights, wanted * weights


def error_limit(way: subspaces.Way, hidden: int, roundoff: float) -> float:
  """Returns the greatest relative error that is rounding, see `rounding_errors`.

  Args:
    way: how the tensor is made.
    hidden: D.
    roundoff: unit roundoff of the tensor.
  """
  if way.kind == 'shortcut':
    return _SHORTCUT * roundoff
  # Products are made of integers, whose errors are greater than those of float32 where
  # D is large and some numbers are far larger than others.
  return max(roundoff, 2.0 ** (3 - subspaces.integer_bits(hidden)))


def vector_norms(
  way: subspaces.Way, arrays: list[np.ndarray], dtype: np.dtype
) -> np.ndarray | None:
  """Returns the norms of the vectors of the base that a tensor is made of.

  Args:
    way: how it is made.
    arrays: the tensors of the base.
    dtype: dtype of the tensor.

  Returns:
    Float64 `[n]`; None for shortcuts and biases, which are made of no vectors.
  """
  if way.kind not in ('reads', 'writes'):
    return None
  found = [
    np.linalg.norm(subspaces.fused(way, arrays, dtype, block), axis=1)
    for block in subspaces.blocks(way, arrays)
  ]
  return np.concatenate(found)


def _add(gram: np.ndarray, moments: np.ndarray, pair: Pair, sign: int) -> None:
  """Adds the normal equations of a tensor, or subtracts them."""
  for rows, wanted in _blocks(pair):
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
  identity = np.eye(matrix.shape[1])
  off = matrix.T @ matrix - identity
  if not np.isfinite(off).all() or np.abs(np.linalg.eigvalsh(off)).max() > 0.9:
    return None
  for _ in range(_ROOTS):
    matrix = matrix - matrix @ (off / 2)
    off = matrix.T @ matrix - identity
  return matrix


def as_basis(basis: np.ndarray, roundoff: float) -> structured.Basis:
  """Returns the leaf of a basis.

  Args:
    basis: float64 `[D, d]`.
    roundoff: unit roundoff of the sliced model's tensors. The error of the leaf is a
      small part of that.
  """
  step = _step(roundoff / 4 / math.sqrt(len(basis)))
  numbers = np.rint(basis * (2.0**subspaces.UNIT / step)).astype(np.int32)
  return structured.Basis(numbers, step)


def as_subspace(
  basis: np.ndarray, roundoff: float, growth: float = 1.0
) -> structured.Subspace:
  """Returns the leaf of the subspace of a basis; see `as_basis` and `FoundBasis`.

  The rows J are chosen so that the matrix M is not singular: the error of A, and its
  numbers, are smaller then.
  """
  from scipy import linalg  # slow to import

  hidden, width = basis.shape
  order = linalg.qr(basis.T, mode='r', pivoting=True)[1]
  rows = np.zeros(hidden, bool)
  rows[order[:width]] = True
  # The polar factor of these rows; `eigh` is several times faster than an SVD.
  squares, turn = np.linalg.eigh(basis[rows] @ basis[rows].T)
  sizes = np.sqrt(np.maximum(squares, 1e-12))
  upper = (turn * sizes) @ turn.T
  lower = basis[~rows] @ basis[rows].T @ ((turn / sizes) @ turn.T)
  tangent = np.linalg.solve(np.eye(width) + upper, lower.T).T
  step = _step(roundoff * math.sqrt(12 / max(hidden - width, 1)) / (6 * growth))
  return structured.Subspace.of(tangent, rows, step)


def _step(size: float) -> int:
  """Returns a step below a size, in units of 2^-25: 4, 5, 6 or 7 times a power of 2."""
  units = max(int(size * 2.0**subspaces.UNIT), 1)
  shift = max(units.bit_length() - 3, 0)
  return min(units >> shift << shift, 1 << subspaces.UNIT)


def turn(basis: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Returns the rotation R, float64 `[d, d]`, for which `basis @ R` is near another.

  The two have the same subspace, up to rounding.
  """
  found = orthonormal(basis.T @ other)
  assert found is not None
  return found

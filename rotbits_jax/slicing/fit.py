"""Finds the subspaces of a sliced model, given its base, by least squares in float64.

The page on the mathematics has the equations. Shape letters: D hidden size, d width of
a segment, n vectors of a tensor.
"""

from collections.abc import Callable, Iterator, Sequence
import math
from typing import NamedTuple

import numpy as np

from rotbits_jax.symmetries import least_squares

_SAMPLE = 1 << 9  # vectors of a tensor by which its error is measured
_MOST_ERROR = 2  # roundoffs; SliceGPT's tensors have errors of up to 1

Equations = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
"""Yields blocks of a tensor: X `[n, D]` and Y `[n, d]`, of which Y = X V is true."""


class Fit(NamedTuple):
  """The basis of a segment, and the greatest relative error of tensors made with it."""

  basis: np.ndarray | None  # float64 [D, d]; None if none is near a solution
  error: float


def fit(tensors: Sequence[Equations], shape: tuple[int, int], roundoff: float) -> Fit:
  """Finds the basis V of a segment, `[D, d]`, from tensors that read or write it.

  Vectors with numbers that are not finite are left out. So is a tensor that was
  changed after slicing, if the others fit much better without it. The roundoff is that
  of the tensors.
  """
  gram, moments = np.zeros((shape[0], shape[0])), np.zeros(shape)
  samples: list[list[np.ndarray]] = []
  for equations in tensors:
    some = []
    for rows, wanted in equations():
      is_finite = np.isfinite(rows).all(axis=1) & np.isfinite(wanted).all(axis=1)
      rows, wanted = rows[is_finite], wanted[is_finite]
      weights = least_squares.row_weights(np.linalg.norm(wanted, axis=1))
      terms = least_squares.normal_equations(wanted, rows.T, weights)
      gram += terms[0]
      moments += terms[1]
      few = slice(None, None, max(len(rows) // _SAMPLE, 1))
      some.append((rows[few] * weights[few, None], wanted[few] * weights[few, None]))
    samples.append([np.concatenate(x) for x in zip(*some, strict=True)])
  solution = least_squares.solution(gram, moments)
  basis = least_squares.orthonormal(solution)
  nearest, norm = solution if basis is None else basis, np.linalg.norm
  errors = [float(norm(x @ nearest - y) / (norm(y) or 1)) for x, y in samples]
  error = max(errors, default=math.inf)
  if error > _MOST_ERROR * roundoff and len(tensors) > 1:
    worst = int(np.argmax(errors))
    others = fit([*tensors[:worst], *tensors[worst + 1 :]], shape, roundoff)
    if others.basis is not None and others.error <= _MOST_ERROR * roundoff:
      return others
  return Fit(basis, error)

r"""Leaves for bases of the subspaces of a sliced model, in files only.

A basis V `[D, d]`, see `relative.products`, is stored as multiples of a step; or, if
the subspace alone matters, as d (D - d) numbers. Then the basis is the one of which d
rows J are a symmetric matrix M with eigenvalues of at least 0. With the other rows S,
it is a Cayley transform of a matrix A `[D - d, d]` with singular values of at most 1:

      S = 2 (I + A A^T)^-1 A,    M = I - A^T S

Products, and the steps of Newton's iteration for the inverse, are sums of integers,
see `exact`. What does not fit raises a ValueError.

Shape letters: D hidden size, d width of a segment.
"""

import dataclasses
import math
from typing import Annotated, Any, ClassVar

import numpy as np

from rotbits_jax.structured import base
from rotbits_jax.structured import exact
from rotbits_jax.structured import fields
from rotbits_jax.system import schema

UNIT = 25
"""The numbers of bases are multiples of 2^-UNIT."""

_ONE = 1 << UNIT
_LEAST_BOUND = 1 << 10  # of the rows S, whatever the width
_NEWTON = 5  # steps, after which 3^-32 of the first error is left


@base.register
@dataclasses.dataclass(frozen=True)
class Basis(base.Structured):
  """A basis, whose array is int32 in units of 2^-25; see the module."""

  type_name: ClassVar[str] = 'basis'
  is_exact: ClassVar[bool] = True
  is_in_files: ClassVar[bool] = True

  numbers: Annotated[Any, fields.Array('ad', np.int32)]  # A if there is a mask
  step: Annotated[int, schema.between(1, _ONE)] = fields.static()  # in the same units
  # A bit for each of D rows, low bits first: whether the row is in J.
  mask: Annotated[Any, fields.Array('m', np.uint8, optional=True)] = None

  @classmethod
  def of(
    cls, matrix: np.ndarray, step: float, rows: np.ndarray | None = None
  ) -> 'Basis':
    """Makes the leaf of a basis; or of A and of bools `[D]`: whether a row is in J."""
    unit = int(np.clip(step * _ONE, 1, _ONE))
    mask = None if rows is None else np.packbits(rows, bitorder='little')
    return cls(_int32(np.rint(matrix * (_ONE / unit))), unit, mask)

  @classmethod
  def near(cls, basis: np.ndarray, roundoff: float, *, keeps_basis: bool) -> 'Basis':
    """Makes the leaf of a basis `[D, d]`, or of its subspace if that is not too narrow.

    Its error is a small part of the roundoff. The rows J are chosen so that M is not
    singular: the error of A, and its entries, are smaller then.
    """
    from scipy import linalg  # slow to import

    hidden, width = basis.shape
    if keeps_basis or is_narrow(basis.shape):
      return cls.of(basis, roundoff / 4.7 / math.sqrt(hidden))
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
    return cls.of(tangent, roundoff * share, rows)

  @property
  def shape(self) -> tuple[int, ...]:
    rows, width = self.numbers.shape
    return rows + (0 if self.mask is None else width), width

  def materialize(self, *needed: Any) -> np.ndarray:
    tangent = self.numbers.astype(np.float64) * self.step
    if self.mask is None:
      return _int32(tangent)
    others, width = tangent.shape
    identity = _ONE * np.eye(others)
    matrix = identity + _scaled(exact.product(tangent, tangent.T))
    inverse = np.rint(identity * (2 / 3))  # eigenvalues of the matrix are from 1 to 2
    for _ in range(_NEWTON):
      error = 2 * identity - _scaled(exact.product(matrix, inverse))
      inverse = _scaled(exact.product(inverse, error))
    lower = 2 * _scaled(exact.product(inverse, tangent))
    upper = _ONE * np.eye(width) - _scaled(exact.product(tangent.T, lower))
    basis = np.empty(self.shape, np.int32)
    is_upper = self._is_upper()
    basis[is_upper], basis[~is_upper] = _int32(upper), _int32(lower)
    return basis

  def _is_upper(self) -> np.ndarray:
    """Returns whether rows are in J."""
    bits = np.unpackbits(self.mask, count=self.shape[0], bitorder='little')
    return bits.astype(bool)

  def check(self) -> None:
    size, width = self.shape
    if self.mask is not None and (
      is_narrow(self.shape)
      or self.mask.size != -(-size // 8)
      or self._is_upper().sum() != width
    ):
      raise ValueError(f'a subspace of {self.shape} must have {width} rows of M')


def is_narrow(shape: tuple[int, ...]) -> bool:
  """Returns whether a basis `[D, d]` is stored by its numbers only.

  A subspace takes the inverse of a matrix `[D - d, D - d]`, which few numbers of a
  hostile file could make huge.
  """
  size, width = shape
  return size - width > max(16 * width, _LEAST_BOUND)


def _scaled(product: np.ndarray) -> np.ndarray:
  """Returns a product of two matrices in units of 2^-UNIT in these units again."""
  return np.rint(product / _ONE)


def _int32(numbers: np.ndarray) -> np.ndarray:
  """Returns integers as int32."""
  if not np.abs(numbers).max(initial=0) < 2.0**31:
    raise ValueError('the numbers of a basis are too large')
  return numbers.astype(np.int32)

"""Leaves for matrices of low rank, stored as two factors.

Shape letters of this file: a matrix `[m, n]` of rank r is the product of U `[m, r]` and
V `[r, n]`. The smaller of m and n is s, and the larger is l.
"""

import abc
import dataclasses
from typing import Annotated, Any, ClassVar

from flax import struct
import jax
import jax.numpy as jnp

from rotbits_jax.structured import base
from rotbits_jax.structured import fields
from rotbits_jax.structured.uniform import exponents
from rotbits_jax.structured.uniform import line_factors

_product = lambda a, b: jnp.matmul(a, b, precision='highest')


@struct.dataclass(kw_only=True)
class FactorPair(base.Structured):
  """A matrix `[..., m, n]` of rank r that is stored as two factors.

  Leaves of different ranks can be stacked, because padding does not change the product.
  """

  ranks: tuple[tuple[int, ...], ...] | None = fields.of_stacks()

  has_factors: ClassVar[bool] = True

  @property
  def rank(self) -> int:
    """The rank r, in a stack the greatest."""
    return int(jax.eval_shape(self.factors)[0].shape[-1])

  @abc.abstractmethod
  def factors(self) -> tuple[jax.Array, jax.Array]:
    """Returns U `[..., m, r]` and V `[..., r, n]` in float32, not rounded."""

  def pair(self) -> 'LowRank':
    u, v = (x.astype(self.dtype) for x in self.factors())
    ranks = None if self.ranks is None else tuple(x[:1] for x in self.ranks)
    return LowRank(u, v, ranks=ranks)

  def materialize(self, *needed: Any) -> jax.Array:
    return _product(*self.factors()).astype(self.dtype)

  def apply(self, x: jax.Array) -> jax.Array:
    m, n = self.shape[-2:]
    if self.rank * (m + n) >= m * n:
      return super().apply(x)
    u, v = (factor.astype(x.dtype) for factor in self.factors())
    return _product(_product(x, u), v)


@base.register
@struct.dataclass
class LowRank(FactorPair):
  """The product `u @ v`, both factors stored unchanged."""

  type_name: ClassVar[str] = 'low_rank'

  u: Annotated[Any, fields.Array('mr', first='r')]
  v: Annotated[Any, fields.Array('rn', first='r')]

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.u.shape[:-1], self.v.shape[-1])

  @property
  def T(self) -> 'LowRank':  # noqa: N802
    return dataclasses.replace(
      self, u=self.v.swapaxes(-1, -2), v=self.u.swapaxes(-1, -2)
    )

  def factors(self) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(self.u, jnp.float32), jnp.asarray(self.v, jnp.float32)

  def pair(self) -> 'LowRank':
    return self


@base.register
@struct.dataclass
class ReducedLowRank(FactorPair):
  """A pair of factors in a basis that stores r^2 numbers fewer.

  `U V` equals `(U A)(A^-1 V)` for every invertible A `[r, r]`, so only the column space
  of U matters. The leaf uses this basis of the column space:

      [      B      ]
      [I - B^T B / 4]        B `[s - r, r]`

  Every subspace has such a B, as `structured.heads` explains. Rounding the basis does
  no more harm than rounding U, because the singular values of B are at most 2 and the
  condition number of the basis is at most 2. If m > n, V^T has this basis instead of U.

  Rows of U are small where inputs are large, if the inputs were whitened. One step for
  all rows would be too coarse for these. So the lines of the matrix have factors, and
  the basis and the other factor are those of the matrix divided by them. A gauge mixes
  columns of U and rows of V only, so that its lines keep their sizes.

  Attributes:
    below: B, `[..., s - r, r]`. In a stack, the rows after those of a layer and the
      columns before them are zero.
    other: the other factor, `[..., r, l]`: A^-1 V or, if m > n, A^-1 U^T.
    size: s.
    transposed: whether m > n.
    basis_exponents: int8 `[..., s]`, the exponents of the factors of the basis's rows,
      see `line_factors`; None if they are 1.
    other_exponents: int8 `[..., l]`, those of the other factor's columns, likewise.
  """

  type_name: ClassVar[str] = 'reduced_low_rank'

  below: Annotated[Any, fields.Array('br', first='r', last='b')]
  other: Annotated[Any, fields.Array('rl', first='r')]
  size: fields.Length = fields.static()
  transposed: bool = fields.static()
  basis_exponents: Annotated[Any, exponents('s')] = None
  other_exponents: Annotated[Any, exponents('l')] = None

  @property
  def shape(self) -> tuple[int, ...]:
    sides = (self.size, self.other.shape[-1])
    return (*self.other.shape[:-2], *(sides[::-1] if self.transposed else sides))

  def factors(self) -> tuple[jax.Array, jax.Array]:
    below = jnp.asarray(self.below, jnp.float32)
    other = jnp.asarray(self.other, jnp.float32)
    rows, rank = below.shape[-2:]
    gram = _product(jnp.matrix_transpose(below), below)
    square = jnp.eye(rank, dtype=jnp.float32) - gram / 4
    # The two parts overlap only in padding.
    spare = [(0, 0)] * (below.ndim - 2)
    last = jnp.pad(square, [*spare, (self.size - rank, 0), (0, 0)])
    first = jnp.pad(below, [*spare, (0, self.size - rows), (0, 0)])
    basis = (first + last) * self._lines()[0][..., None]
    other = other * self._lines()[1][..., None, :]
    if self.transposed:
      return jnp.matrix_transpose(other), jnp.matrix_transpose(basis)
    return basis, other

  def _lines(self) -> tuple[jax.Array, jax.Array]:
    """Returns the factors of the basis's rows and of the other factor's columns."""
    if self.basis_exponents is None:
      return jnp.ones(self.size), jnp.ones(self.other.shape[-1])
    return line_factors(self.basis_exponents), line_factors(self.other_exponents)

  def without_lines(self) -> 'ReducedLowRank':
    """Returns the leaf of the matrix divided by the factors of its lines."""
    return dataclasses.replace(self, basis_exponents=None, other_exponents=None)

  def divided(self, u: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the U and V of another pair divided by the factors of the lines."""
    rows, columns = self._lines()[:: -1 if self.transposed else 1]
    return u / rows[..., None], v / columns[..., None, :]

  def stack_key(self) -> tuple[str, ...]:
    return () if self.basis_exponents is None else ('lines',)

  def check(self) -> None:
    rows, rank = self.below.shape
    basis, other = self.basis_exponents, self.other_exponents
    has_lines = basis is not None and other is not None and basis.size == self.size
    has_none = basis is None and other is None
    fits = self.size == rows + rank <= self.other.shape[1]
    if not fits or not (has_lines or has_none):
      raise ValueError(
        f'low-rank factors of size {self.size} cannot be {self.below.shape=} and '
        f'{self.other.shape=}'
      )

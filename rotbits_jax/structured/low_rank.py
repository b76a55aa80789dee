"""Leaves for matrices of low rank, stored as two factors.

Shape letters of this file: a matrix `[m, n]` of rank r is the product of U `[m, r]` and
V `[r, n]`. The smaller of m and n is s, and the larger is l.
"""

import abc
from collections.abc import Mapping, Sequence
import dataclasses
from typing import Annotated, Any, ClassVar, Self

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import register
from rotbits_jax.structured.fields import Array
from rotbits_jax.structured.fields import Length
from rotbits_jax.structured.fields import Matrix
from rotbits_jax.structured.fields import Settings
from rotbits_jax.structured.fields import of_stacks
from rotbits_jax.structured.fields import static
from rotbits_jax.structured.uniform import MOST_EXPONENT
from rotbits_jax.structured.uniform import line_factors

_product = lambda a, b: jnp.matmul(a, b, precision='highest')


@struct.dataclass(kw_only=True)
class FactorPair(Structured):
  """A matrix `[..., m, n]` of rank r that is stored as two factors.

  Leaves of different ranks can be stacked. Their factors are padded to the greatest
  rank in a way that does not change the product.

  Attributes:
    ranks: the rank of each layer, if the leaf is stacked and its layers differ in rank;
      else None.
  """

  ranks: tuple[int, ...] | None = of_stacks()

  has_factors: ClassVar[bool] = True

  _columns: ClassVar[str]  # field of the factor with r columns
  _rows: ClassVar[str]  # and of that with r rows

  @abc.abstractmethod
  def factors(self) -> tuple[jax.Array, jax.Array]:
    """Returns U `[..., m, r]` and V `[..., r, n]` in float32, not rounded."""

  def _padded(self, rank: int) -> Self:
    """Returns an unstacked leaf with the same product and a higher rank."""
    columns, rows = getattr(self, self._columns), getattr(self, self._rows)
    zeros = (rank - self.rank, 0)
    wider, longer = _pad(columns, ((0, 0), zeros)), _pad(rows, (zeros, (0, 0)))
    return dataclasses.replace(self, **{self._columns: wider, self._rows: longer})

  def _cut(self, rank: int) -> Self:
    """Removes the padding from an unstacked leaf: the inverse of `_padded`."""
    columns, rows = getattr(self, self._columns), getattr(self, self._rows)
    first = self.rank - rank
    parts = {self._columns: columns[:, first:], self._rows: rows[first:]}
    return dataclasses.replace(self, **parts)

  @property
  def rank(self) -> int:
    return int(getattr(self, self._rows).shape[-2])

  @classmethod
  def stored_rank(
    cls, settings: Settings, shapes: Mapping[str, tuple[int, ...]]
  ) -> int:
    return shapes[cls._rows][0]

  def pair(self) -> 'LowRank':
    u, v = (x.astype(self.dtype) for x in self.factors())
    return LowRank(u, v, ranks=self.ranks)

  def materialize(self, *needed: Any) -> jax.Array:
    return _product(*self.factors()).astype(self.dtype)

  def apply(self, x: jax.Array) -> jax.Array:
    m, n = self.shape[-2:]
    if self.rank * (m + n) >= m * n:
      return super().apply(x)
    u, v = (factor.astype(x.dtype) for factor in self.factors())
    return _product(_product(x, u), v)

  def layer(self, index: int) -> Self:
    leaf = super().layer(index)
    if self.ranks is None:
      return leaf
    return dataclasses.replace(leaf, ranks=None)._cut(self.ranks[index])

  def check_layer(self, index: int) -> None:
    if self.ranks is not None and (
      _nonzeros(super().layer(index)) != _nonzeros(self.layer(index))
    ):
      raise ValueError(
        f'low-rank factors of rank {self.ranks[index]} in a stack of rank {self.rank} '
        'are not zero where they are padded: materialize them before they are trained'
      )

  @classmethod
  def stack(cls, leaves: list[Self], ranks: Sequence[int] | None = None) -> Self:
    found = tuple(ranks or (leaf.rank for leaf in leaves))
    stacked = super().stack([leaf._padded(max(found)) for leaf in leaves])
    return dataclasses.replace(stacked, ranks=found if len(set(found)) > 1 else None)


@register
@struct.dataclass
class LowRank(FactorPair):
  """The product `u @ v`, both factors stored unchanged.

  Attributes:
    u: U, `[..., m, r]`.
    v: V, `[..., r, n]`.
  """

  type_name: ClassVar[str] = 'low_rank'
  _columns: ClassVar[str] = 'u'
  _rows: ClassVar[str] = 'v'

  u: Matrix
  v: Matrix

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.u.shape[:-1], self.v.shape[-1])

  @property
  def dtype(self) -> Any:
    return self.u.dtype

  @property
  def T(self) -> 'LowRank':  # noqa: N802
    u, v = (x.swapaxes(-1, -2) for x in (self.v, self.u))
    return dataclasses.replace(self, u=u, v=v)

  def factors(self) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(self.u, jnp.float32), jnp.asarray(self.v, jnp.float32)

  def pair(self) -> 'LowRank':
    return self

  def check(self) -> None:
    if self.u.shape[1] != len(self.v):
      raise ValueError(
        f'the factors must be [m, r] and [r, n], got {self.u.shape=} and '
        f'{self.v.shape=}'
      )


_Exponents = Annotated[Any, Array(1, np.int8, optional=True)]


@register
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
    below: B, `[..., s - r, r]`. A stack of leaves with several ranks has as many rows
      as its leaf of least rank, and as many columns as its leaf of greatest rank. In
      each layer, the rows after its own and the columns before its own are zero.
    other: the other factor, `[..., r, l]`: A^-1 V or, if m > n, A^-1 U^T.
    size: s.
    transposed: whether m > n.
    basis_exponents: int8 `[..., s]`, the exponents of the factors of the basis's rows,
      see `line_factors`; None if they are 1.
    other_exponents: int8 `[..., l]`, those of the other factor's columns, likewise.
  """

  type_name: ClassVar[str] = 'reduced_low_rank'
  _columns: ClassVar[str] = 'below'
  _rows: ClassVar[str] = 'other'

  below: Matrix
  other: Matrix
  size: Length = static()
  transposed: bool = static()
  basis_exponents: _Exponents = None
  other_exponents: _Exponents = None

  @property
  def shape(self) -> tuple[int, ...]:
    sides = (self.size, self.other.shape[-1])
    return (*self.other.shape[:-2], *(sides[::-1] if self.transposed else sides))

  @property
  def dtype(self) -> Any:
    return self.other.dtype

  def factors(self) -> tuple[jax.Array, jax.Array]:
    below = jnp.asarray(self.below, jnp.float32)
    other = jnp.asarray(self.other, jnp.float32)
    gram = _product(jnp.matrix_transpose(below), below)
    square = jnp.eye(self.rank, dtype=jnp.float32) - gram / 4
    # The two parts overlap only in padding.
    spare = [(0, 0)] * (below.ndim - 2)
    last = jnp.pad(square, [*spare, (self.size - self.rank, 0), (0, 0)])
    first = jnp.pad(below, [*spare, (0, self.size - below.shape[-2]), (0, 0)])
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
    lines = () if self.basis_exponents is None else ('lines',)
    return (*super().stack_key(), *lines)

  def _cut(self, rank: int) -> 'ReducedLowRank':
    leaf = super()._cut(rank)
    return dataclasses.replace(leaf, below=leaf.below[: self.size - rank])

  @classmethod
  def stack(
    cls, leaves: list['ReducedLowRank'], ranks: Sequence[int] | None = None
  ) -> 'ReducedLowRank':
    rows = leaves[0].size - min(ranks or (leaf.rank for leaf in leaves))
    pad = lambda x: _pad(x, ((0, rows - len(x)), (0, 0)))
    padded = [dataclasses.replace(leaf, below=pad(leaf.below)) for leaf in leaves]
    return super().stack(padded, ranks)

  def check(self) -> None:
    rows, rank = self.below.shape
    if rank != len(self.other) or not self.size == rows + rank <= self.other.shape[1]:
      raise ValueError(
        f'low-rank factors of size {self.size} cannot be {self.below.shape=} and '
        f'{self.other.shape=}'
      )
    found = [x for x in (self.basis_exponents, self.other_exponents) if x is not None]
    lengths = self.size, self.other.shape[1]
    if found and tuple(map(len, found)) != lengths:
      raise ValueError(f'the exponents of lines must be {lengths}')
    if any(np.abs(x.astype(np.int16)).max(initial=0) > MOST_EXPONENT for x in found):
      raise ValueError(f'exponents of lines must be at most {MOST_EXPONENT}')


def _nonzeros(leaf: FactorPair) -> int:
  """Counts the numbers of a leaf that are not zero."""
  of = lambda x: (np if isinstance(x, np.ndarray) else jnp).count_nonzero(x)
  return sum(int(of(x)) for x in jax.tree.leaves(leaf))


def _pad(matrix: Any, widths: tuple[tuple[int, int], tuple[int, int]]) -> Any:
  return (np if isinstance(matrix, np.ndarray) else jnp).pad(matrix, widths)

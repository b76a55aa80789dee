"""Leaves for matrices of low rank, stored as two factors.

Shape letters of this file: a matrix `[m, n]` of rank r is the product of U `[m, r]` and
V `[r, n]`. The smaller of m and n is s, and the larger is l.
"""

import abc
import dataclasses
from typing import Any, ClassVar, Self

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured.base import Arrays
from rotbits_jax.structured.base import Settings
from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import register
from rotbits_jax.structured.stored import Stored


@struct.dataclass(kw_only=True)
class FactorPair(Structured):
  """A matrix `[..., m, n]` of rank r that is stored as two factors.

  Leaves of different ranks can be stacked. Their factors are padded to the greatest
  rank in a way that does not change the product.

  Attributes:
    names: key of `checkpoints.FACTORS`; this row names the factors in a checkpoint.
    ranks: the rank of each layer, if the leaf is stacked and its layers differ in rank;
      else None.
  """

  names: str = struct.field(pytree_node=False, default='factors')
  ranks: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)

  @property
  @abc.abstractmethod
  def rank(self) -> int:
    """The rank r; the greatest rank of a stacked leaf."""

  @property
  @abc.abstractmethod
  def T(self) -> 'FactorPair':  # noqa: N802
    """The transposed matrix."""

  @abc.abstractmethod
  def factors(self) -> tuple[jax.Array, jax.Array]:
    """Returns U `[..., m, r]` and V `[..., r, n]` in float32, not rounded."""

  @abc.abstractmethod
  def apply(self, x: jax.Array) -> jax.Array:
    """Returns `x @ materialize()`, `[..., m]` to `[..., n]`, without materializing."""

  @classmethod
  @abc.abstractmethod
  def stored_rank(cls, shapes: dict[str, tuple[int, ...]]) -> int:
    """Returns the rank of an unstacked leaf from the shapes of its stored arrays."""

  @abc.abstractmethod
  def _padded(self, rank: int) -> Self:
    """Returns an unstacked leaf with the same product and a higher rank."""

  @abc.abstractmethod
  def _cut(self, rank: int) -> Self:
    """Removes the padding from an unstacked leaf: the inverse of `_padded`."""

  @classmethod
  def stored_factored(cls, settings: Any, shapes: Any) -> Any:
    return cls.stored_rank(shapes), settings['names']

  @property
  def factored(self) -> Any:
    return self.rank, self.names

  def stack_key(self) -> tuple[str, ...]:
    return (self.names,)

  def plain(self) -> 'LowRank':
    """Returns the pair as a `LowRank` leaf; both factors are rounded to its dtype."""
    u, v = (x.astype(self.dtype) for x in self.factors())
    return LowRank(u, v, names=self.names, ranks=self.ranks)

  @property
  def is_thin(self) -> bool:
    """Whether `apply` takes fewer multiplications than the materialized matrix."""
    m, n = self.shape[-2:]
    return self.rank * (m + n) < m * n

  def materialize(self) -> jax.Array:
    u, v = self.factors()
    return jnp.matmul(u, v, precision='highest').astype(self.dtype)

  def layer(self, index: int) -> Self:
    leaf = super().layer(index)
    if self.ranks is None:
      return leaf
    return dataclasses.replace(leaf, ranks=None)._cut(self.ranks[index])

  @classmethod
  def stack(cls, leaves: list[Self]) -> Self:
    ranks = tuple(leaf.rank for leaf in leaves)
    stacked = super().stack([leaf._padded(max(ranks)) for leaf in leaves])
    return dataclasses.replace(stacked, ranks=ranks if len(set(ranks)) > 1 else None)


@register
@struct.dataclass
class LowRank(FactorPair):
  """The product `u @ v`, both factors stored unchanged.

  Attributes:
    u: U, `[..., m, r]`.
    v: V, `[..., r, n]`.
  """

  kind: ClassVar[str] = 'low_rank'

  u: Any
  v: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.u.shape[:-1], self.v.shape[-1])

  @property
  def dtype(self) -> Any:
    return self.u.dtype

  @property
  def rank(self) -> int:
    return self.u.shape[-1]

  @property
  def T(self) -> 'LowRank':  # noqa: N802
    u, v = (x.swapaxes(-1, -2) for x in (self.v, self.u))
    return dataclasses.replace(self, u=u, v=v)

  def factors(self) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(self.u, jnp.float32), jnp.asarray(self.v, jnp.float32)

  def apply(self, x: jax.Array) -> jax.Array:
    for factor in (self.u, self.v):
      x = jnp.matmul(x, jnp.asarray(factor, x.dtype), precision='highest')
    return x

  def _padded(self, rank: int) -> 'LowRank':
    zeros = (rank - self.rank, 0)
    u = _pad(self.u, ((0, 0), zeros))
    return dataclasses.replace(self, u=u, v=_pad(self.v, (zeros, (0, 0))))

  def _cut(self, rank: int) -> 'LowRank':
    first = self.rank - rank
    return dataclasses.replace(self, u=self.u[:, first:], v=self.v[first:])

  @classmethod
  def stored_rank(cls, shapes: dict[str, tuple[int, ...]]) -> int:
    return shapes['u'][-1]

  def stored(self) -> tuple[Settings, Arrays]:
    return {'names': self.names}, {'u': np.asarray(self.u), 'v': np.asarray(self.v)}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'LowRank':
    given = Stored(settings, arrays)
    u, v, names = given.array('u', 2), given.array('v', 2), given.text('names')
    given.finish()
    if u.shape[1] != v.shape[0]:
      raise ValueError(
        f'the factors must be [m, r] and [r, n], got {u.shape=} and {v.shape=}'
      )
    return cls(u, v, names=names)


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

  Attributes:
    below: B, `[..., s - r, r]`. A stack of leaves with several ranks has as many rows
      as its leaf of least rank, and as many columns as its leaf of greatest rank. In
      each layer, the rows after its own and the columns before its own are zero.
    other: the other factor, `[..., r, l]`: A^-1 V or, if m > n, A^-1 U^T.
    size: s.
    transposed: whether m > n.
  """

  kind: ClassVar[str] = 'reduced_low_rank'

  below: Any
  other: Any
  size: int = struct.field(pytree_node=False)
  transposed: bool = struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    sides = (self.size, self.other.shape[-1])
    return (*self.other.shape[:-2], *(sides[::-1] if self.transposed else sides))

  @property
  def dtype(self) -> Any:
    return self.other.dtype

  @property
  def rank(self) -> int:
    return self.other.shape[-2]

  @property
  def T(self) -> 'ReducedLowRank':  # noqa: N802
    return dataclasses.replace(self, transposed=not self.transposed)

  def factors(self) -> tuple[jax.Array, jax.Array]:
    below = jnp.asarray(self.below, jnp.float32)
    other = jnp.asarray(self.other, jnp.float32)
    gram = jnp.matmul(jnp.matrix_transpose(below), below, precision='highest')
    square = jnp.eye(self.rank, dtype=jnp.float32) - gram / 4
    basis = self._joined(below, square, axis=-2)
    if self.transposed:
      return jnp.matrix_transpose(other), jnp.matrix_transpose(basis)
    return basis, other

  def apply(self, x: jax.Array) -> jax.Array:
    matmul = lambda a, b: jnp.matmul(a, b, precision='highest')
    below = jnp.asarray(self.below, x.dtype)
    other = jnp.asarray(self.other, x.dtype)
    if self.transposed:
      x = matmul(x, other.T)
      above = matmul(x, below.T)
      return self._joined(above, x - matmul(above, below) / 4, axis=-1)
    last = x[..., self.size - self.rank :]
    above = x[..., : below.shape[0]] - matmul(last, below.T) / 4
    return matmul(last + matmul(above, below), other)

  def _joined(self, first: jax.Array, last: jax.Array, axis: int) -> jax.Array:
    """Joins two parts along an axis of size s. They overlap only in padding."""
    return _among_zeros(first, self.size, axis=axis, last=False) + _among_zeros(
      last, self.size, axis=axis, last=True
    )

  def _padded(self, rank: int) -> 'ReducedLowRank':
    zeros = (rank - self.rank, 0)
    below = _pad(self.below, ((0, 0), zeros))
    return dataclasses.replace(
      self, below=below, other=_pad(self.other, (zeros, (0, 0)))
    )

  def _cut(self, rank: int) -> 'ReducedLowRank':
    first = self.rank - rank
    below = self.below[: self.size - rank, first:]
    return dataclasses.replace(self, below=below, other=self.other[first:])

  @classmethod
  def stack(cls, leaves: list['ReducedLowRank']) -> 'ReducedLowRank':
    rows = max(leaf.below.shape[0] for leaf in leaves)
    return super().stack(
      [
        dataclasses.replace(
          leaf, below=_pad(leaf.below, ((0, rows - leaf.below.shape[0]), (0, 0)))
        )
        for leaf in leaves
      ]
    )

  @classmethod
  def stored_rank(cls, shapes: dict[str, tuple[int, ...]]) -> int:
    return shapes['below'][-1]

  def stored(self) -> tuple[Settings, Arrays]:
    settings = {'transposed': self.transposed, 'names': self.names}
    return settings, {'below': np.asarray(self.below), 'other': np.asarray(self.other)}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'ReducedLowRank':
    given = Stored(settings, arrays)
    below, other = given.array('below', 2), given.array('other', 2)
    transposed, names = given.flag('transposed'), given.text('names')
    given.finish()
    if below.shape[1] != other.shape[0]:
      raise ValueError(f'low-rank factors cannot be {below.shape=} and {other.shape=}')
    size = sum(below.shape)
    if size > other.shape[1]:
      raise ValueError(f'the shorter side cannot have {size} rows, got {other.shape=}')
    return cls(below, other, size, transposed, names=names)


def _pad(matrix: Any, widths: tuple[tuple[int, int], tuple[int, int]]) -> Any:
  return (np if isinstance(matrix, np.ndarray) else jnp).pad(matrix, widths)


def _among_zeros(array: jax.Array, size: int, *, axis: int, last: bool) -> jax.Array:
  """Pads an axis with zeros to a size, before the array if `last`, else after it."""
  spare = size - array.shape[axis]
  widths = [(0, 0)] * array.ndim
  widths[axis] = (spare, 0) if last else (0, spare)
  return jnp.pad(array, widths)

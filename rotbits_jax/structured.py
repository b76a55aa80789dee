"""Structured leaves: parameters that store fewer numbers than they have entries.

A structured leaf stands in a PyTree where an array stood. It is a small
`flax.struct` dataclass whose arrays are ordinary PyTree leaves, so `jit`, `vmap`
and `scan` pass through it. It knows the array it stands for (`materialize`), the
numbers it stores (`stored`), and how to get itself back from them
(`from_stored`); coding, accounting and the forward passes need no more.

A leaf may be stacked: its arrays then have a leading layer axis `[N, ...]`.
"""

import abc
import dataclasses
from typing import Any, ClassVar, Self

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

Settings = dict[str, Any]  # JSON values
Arrays = dict[str, np.ndarray]


class Structured(abc.ABC):
  """What every structured leaf can do."""

  kind: ClassVar[str]

  @property
  @abc.abstractmethod
  def shape(self) -> tuple[int, ...]:
    """Shape of the array that the leaf stands for."""

  @property
  @abc.abstractmethod
  def dtype(self) -> Any:
    """Dtype of that array."""

  @abc.abstractmethod
  def materialize(self) -> jax.Array:
    """The array that the leaf stands for."""

  @abc.abstractmethod
  def layer(self, index: int) -> Self:
    """One layer of a stacked leaf."""

  @classmethod
  @abc.abstractmethod
  def stack(cls, leaves: list[Self]) -> Self:
    """The inverse of `layer`, for leaves of one kind, shape and dtype."""

  @abc.abstractmethod
  def stored(self) -> tuple[Settings, Arrays]:
    """What the file keeps of an unstacked leaf: settings and arrays."""

  @classmethod
  @abc.abstractmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> Self:
    """The inverse of `stored`."""


KINDS: dict[str, type[Structured]] = {}


def register(cls: type[Any]) -> type[Any]:
  """Class decorator: makes a kind of leaf known to the file format."""
  if cls.kind in KINDS:
    raise ValueError(f'a structured leaf of kind {cls.kind!r} exists already')
  KINDS[cls.kind] = cls
  return cls


def is_structured(leaf: Any) -> bool:
  return isinstance(leaf, Structured)


def materialize(tree: Any) -> Any:
  """The PyTree with every structured leaf replaced by the array it stands for."""
  return jax.tree.map(
    lambda x: x.materialize() if is_structured(x) else x, tree, is_leaf=is_structured
  )


def count_numbers(tree: Any) -> int:
  """How many numbers a PyTree of unstacked leaves stores."""
  return sum(a.size for a in _stored_arrays(tree))


def count_bytes(tree: Any) -> int:
  """How many bytes those numbers take, uncoded."""
  return sum(a.nbytes for a in _stored_arrays(tree))


def _stored_arrays(tree: Any) -> list[Any]:
  arrays: list[Any] = []
  for leaf in jax.tree.leaves(tree, is_leaf=is_structured):
    arrays.extend(leaf.stored()[1].values() if is_structured(leaf) else [leaf])
  return arrays


@register
@struct.dataclass
class IdentityMinusGram(Structured):
  """`[I - B B^T + C C^T, 0]`, an orthogonal shortcut less what slicing cut off.

  A block of an orthogonal matrix, brought to symmetric form by the residual gauge,
  is the identity but for a few singular values below 1 (`B`). `C` is for singular
  values above 1, which only a fine-tuned shortcut has. Both are lower trapezoidal:
  `B[i, j] = 0` for `j > i`, since a rotation of B's columns changes nothing.

  Attributes:
    b: `[..., d, k]`.
    c: `[..., d, j]`.
    columns: width of the matrix; the columns beyond d are zero.
    ranks: for a stacked leaf, each layer's own `(k, j)`; columns beyond them are
      zero. None for an unstacked leaf.
  """

  kind: ClassVar[str] = 'identity_minus_gram'

  b: Any
  c: Any
  columns: int = struct.field(pytree_node=False)
  ranks: tuple[tuple[int, int], ...] | None = struct.field(
    pytree_node=False, default=None
  )

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.b.shape[:-1], self.columns)

  @property
  def dtype(self) -> Any:
    return self.b.dtype

  def materialize(self) -> jax.Array:
    b, c = jnp.asarray(self.b, jnp.float32), jnp.asarray(self.c, jnp.float32)
    gram = lambda x: jnp.matmul(x, jnp.matrix_transpose(x), precision='highest')
    matrix = jnp.eye(b.shape[-2], dtype=jnp.float32) - gram(b) + gram(c)
    return _pad_columns(matrix, self.columns).astype(self.dtype)

  def apply(self, x: jax.Array) -> jax.Array:
    """`x @ materialize()` without materializing: `[..., d]` to `[..., columns]`."""
    y = x
    for factor, sign in ((self.b, -1), (self.c, 1)):
      if factor.shape[-1]:
        factor = jnp.asarray(factor, x.dtype)
        coordinates = jnp.matmul(x, factor, precision='highest')
        y = y + sign * jnp.matmul(coordinates, factor.T, precision='highest')
    return _pad_columns(y, self.columns)

  def layer(self, index: int) -> 'IdentityMinusGram':
    if self.ranks is None:
      raise ValueError('the leaf is not stacked')
    k, j = self.ranks[index]
    return dataclasses.replace(
      self, b=self.b[index, :, :k], c=self.c[index, :, :j], ranks=None
    )

  @classmethod
  def stack(cls, leaves: list['IdentityMinusGram']) -> 'IdentityMinusGram':
    def padded(factors: list[Any]) -> Any:
      width = max(f.shape[-1] for f in factors)
      xp = np if isinstance(factors[0], np.ndarray) else jnp
      return xp.stack([xp.pad(f, ((0, 0), (0, width - f.shape[-1]))) for f in factors])

    return cls(
      b=padded([leaf.b for leaf in leaves]),
      c=padded([leaf.c for leaf in leaves]),
      columns=leaves[0].columns,
      ranks=tuple((x.b.shape[-1], x.c.shape[-1]) for x in leaves),
    )

  def stored(self) -> tuple[Settings, Arrays]:
    settings = {
      'columns': self.columns,
      'b': list(self.b.shape),
      'c': list(self.c.shape),
    }
    return settings, {'b': pack_lower(self.b), 'c': pack_lower(self.c)}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'IdentityMinusGram':
    return cls(
      b=unpack_lower(arrays['b'], settings['b']),
      c=unpack_lower(arrays['c'], settings['c']),
      columns=settings['columns'],
    )


@register
@struct.dataclass
class SymmetricTriangle(Structured):
  """`[P, 0]` with P symmetric, kept as its lower triangle.

  Attributes:
    lower: `[..., d, d]`, zero above the diagonal.
    columns: width of the matrix; the columns beyond d are zero.
  """

  kind: ClassVar[str] = 'symmetric_triangle'

  lower: Any
  columns: int = struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.lower.shape[:-1], self.columns)

  @property
  def dtype(self) -> Any:
    return self.lower.dtype

  def materialize(self) -> jax.Array:
    lower = jnp.asarray(self.lower)
    symmetric = lower + jnp.matrix_transpose(jnp.tril(lower, -1))
    return _pad_columns(symmetric, self.columns)

  def layer(self, index: int) -> 'SymmetricTriangle':
    return dataclasses.replace(self, lower=self.lower[index])

  @classmethod
  def stack(cls, leaves: list['SymmetricTriangle']) -> 'SymmetricTriangle':
    return jax.tree.map(lambda *x: jnp.stack(x), *leaves)

  def stored(self) -> tuple[Settings, Arrays]:
    settings = {'columns': self.columns, 'lower': list(self.lower.shape)}
    return settings, {'lower': pack_lower(self.lower)}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'SymmetricTriangle':
    return cls(unpack_lower(arrays['lower'], settings['lower']), settings['columns'])


@register
@struct.dataclass
class Trapezoidal(Structured):
  """A matrix whose entries above the diagonal are zero.

  Attributes:
    lower: `[..., rows, columns]`.
  """

  kind: ClassVar[str] = 'trapezoidal'

  lower: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.lower.shape

  @property
  def dtype(self) -> Any:
    return self.lower.dtype

  def materialize(self) -> jax.Array:
    return jnp.asarray(self.lower)

  def layer(self, index: int) -> 'Trapezoidal':
    return dataclasses.replace(self, lower=self.lower[index])

  @classmethod
  def stack(cls, leaves: list['Trapezoidal']) -> 'Trapezoidal':
    return jax.tree.map(lambda *x: jnp.stack(x), *leaves)

  def stored(self) -> tuple[Settings, Arrays]:
    return {'lower': list(self.lower.shape)}, {'lower': pack_lower(self.lower)}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'Trapezoidal':
    return cls(unpack_lower(arrays['lower'], settings['lower']))


def pack_lower(matrix: Any) -> np.ndarray:
  """The entries on and below the diagonal of `[rows, columns]`, row by row."""
  matrix = np.asarray(matrix)
  return matrix[np.tril(np.ones(matrix.shape, bool))]


def unpack_lower(values: np.ndarray, shape: Any) -> np.ndarray:
  """The inverse of `pack_lower`.

  Raises:
    ValueError: if there are not as many values as a trapezoid of that shape has.
  """
  mask = np.tril(np.ones(tuple(shape), bool))
  if values.shape != (mask.sum(),):
    raise ValueError(
      f'a {tuple(shape)} trapezoid holds {mask.sum()} numbers, got {values.shape=}'
    )
  matrix = np.zeros(mask.shape, values.dtype)
  matrix[mask] = values
  return matrix


def _pad_columns(matrix: jax.Array, columns: int) -> jax.Array:
  widths = [(0, 0)] * (matrix.ndim - 1) + [(0, columns - matrix.shape[-1])]
  return jnp.pad(matrix, widths)

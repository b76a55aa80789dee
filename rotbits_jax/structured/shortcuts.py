"""Leaves for the shortcuts of a sliced model.

In a sliced model, every segment of the residual stream has coordinates of its own;
`models.config` defines segments. A shortcut is the matrix that takes the residual
stream from one segment to the next, past a sublayer. `symmetries.residual` chooses the
coordinates so that the shortcuts become symmetric, with zeros in the further columns if
the next segment is wider.
"""

import dataclasses
from typing import Any, ClassVar

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured.base import Arrays
from rotbits_jax.structured.base import Settings
from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import register
from rotbits_jax.structured.stored import Stored
from rotbits_jax.structured.triangles import lower_size
from rotbits_jax.structured.triangles import pack_lower
from rotbits_jax.structured.triangles import unpack_lower
from rotbits_jax.system import host


@register
@struct.dataclass
class IdentityMinusGram(Structured):
  """The symmetric shortcut `[I - B B^T + C C^T, 0]`.

  SliceGPT's shortcut is a block of an orthogonal matrix. Such a block has many singular
  values of 1, and in symmetric form it is the identity minus `B B^T`. B has a column
  for each singular value below 1. C has a column for each singular value above 1, which
  only a fine-tuned shortcut has. Rotating the columns of B or C changes nothing.
  Therefore both are rotated to lower trapezoidal form: `B[i, j] = 0` for `j > i`.

  Attributes:
    b: B, `[..., d, k]`.
    c: C, `[..., d, j]`.
    columns: width of the shortcut; the columns from d on are zero.
    ranks: the `(k, j)` of each layer, if the leaf is stacked; columns beyond them are
      zero. A stacked B or C has at least one column, because Orbax cannot save arrays
      without entries. None for an unstacked leaf.
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

  @property
  def is_thin(self) -> bool:
    """Whether `apply` takes fewer multiplications than the materialized matrix."""
    return _is_thin(self._widths(), self.columns)

  def materialize(self) -> jax.Array:
    b, c = jnp.asarray(self.b, jnp.float32), jnp.asarray(self.c, jnp.float32)
    gram = lambda x: jnp.matmul(x, jnp.matrix_transpose(x), precision='highest')
    matrix = jnp.eye(b.shape[-2], dtype=jnp.float32) - gram(b) + gram(c)
    return _pad_columns(matrix, self.columns).astype(self.dtype)

  def apply(self, x: jax.Array) -> jax.Array:
    """Returns `x @ materialize()` without materializing.

    Args:
      x: `[..., d]`.

    Returns:
      `[..., columns]`.
    """
    y = x
    factors = ((self.b, -1), (self.c, 1))
    for (factor, sign), width in zip(factors, self._widths(), strict=True):
      if width:
        factor = jnp.asarray(factor, x.dtype)
        coordinates = jnp.matmul(x, factor, precision='highest')
        y = y + sign * jnp.matmul(coordinates, factor.T, precision='highest')
    return _pad_columns(y, self.columns)

  def _widths(self) -> tuple[int, int]:
    """Returns the columns of B and of C that are not zero in some layer."""
    if self.ranks is None:
      return self.b.shape[-1], self.c.shape[-1]
    return max(k for k, _ in self.ranks), max(j for _, j in self.ranks)

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
      (rows, _), width = factors[0].shape, max(1, *(f.shape[-1] for f in factors))
      if not isinstance(factors[0], np.ndarray):
        pad = lambda f: jnp.pad(f, ((0, 0), (0, width - f.shape[-1])))
        return jnp.stack([pad(f) for f in factors])
      stack = host.empty((len(factors), rows, width), factors[0].dtype)
      for out, factor in zip(stack, factors, strict=True):
        out[:, : factor.shape[-1]], out[:, factor.shape[-1] :] = factor, 0
      return stack

    return cls(
      b=padded([leaf.b for leaf in leaves]),
      c=padded([leaf.c for leaf in leaves]),
      columns=leaves[0].columns,
      ranks=tuple((x.b.shape[-1], x.c.shape[-1]) for x in leaves),
    )

  def stored_sizes(self) -> list[tuple[np.dtype, int]]:
    return [(np.dtype(x.dtype), lower_size(x.shape)) for x in (self.b, self.c)]

  def stored(self) -> tuple[Settings, Arrays]:
    settings = {
      'columns': self.columns,
      'b': list(self.b.shape),
      'c': list(self.c.shape),
    }
    return settings, {'b': pack_lower(self.b), 'c': pack_lower(self.c)}

  @classmethod
  def stored_ranks(cls, settings: Settings) -> tuple[int, int] | None:
    """Returns the columns of B and of C of a stored leaf; None if it is not thin.

    Raises:
      ValueError: if the settings are not those of a leaf.
    """
    given = Stored(settings, {})
    ranks = given.sizes('b', 2)[1], given.sizes('c', 2)[1]
    return ranks if _is_thin(ranks, given.size('columns')) else None

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'IdentityMinusGram':
    given = Stored(settings, arrays)
    b_shape, c_shape = given.sizes('b', 2), given.sizes('c', 2)
    if b_shape[0] != c_shape[0]:
      raise ValueError(
        f'B and C must have equally many rows, got {b_shape} and {c_shape}'
      )
    columns = given.size('columns', b_shape[0])
    b, c = given.array('b', 1), given.array('c', 1)
    given.finish()
    return cls(unpack_lower(b, b_shape), unpack_lower(c, c_shape), columns)


@register
@struct.dataclass
class SymmetricTriangle(Structured):
  """The shortcut `[P, 0]` with a symmetric P, stored as the lower triangle of P.

  Attributes:
    lower: the lower triangle, `[..., d, d]`, with zeros above the diagonal.
    columns: width of the shortcut; the columns from d on are zero.
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

  def stored_sizes(self) -> list[tuple[np.dtype, int]]:
    return [(np.dtype(self.dtype), lower_size(self.lower.shape))]

  def stored(self) -> tuple[Settings, Arrays]:
    settings = {'columns': self.columns, 'lower': list(self.lower.shape)}
    return settings, {'lower': pack_lower(self.lower)}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'SymmetricTriangle':
    given = Stored(settings, arrays)
    shape = given.sizes('lower', 2)
    columns, values = given.size('columns', shape[0]), given.array('lower', 1)
    given.finish()
    if shape[0] != shape[1]:
      raise ValueError(f'no symmetric matrix has the triangle of a {shape} matrix')
    return cls(unpack_lower(values, shape), columns)


def _is_thin(ranks: tuple[int, int], columns: int) -> bool:
  return 2 * sum(ranks) < columns


def _pad_columns(matrix: jax.Array, columns: int) -> jax.Array:
  widths = [(0, 0)] * (matrix.ndim - 1) + [(0, columns - matrix.shape[-1])]
  return jnp.pad(matrix, widths)

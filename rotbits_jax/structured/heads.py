r"""Leaves for the kernels of attention heads, stored in a basis with known entries.

A head multiplies two kernels, for example the value and the output projection. If the
first is multiplied by an invertible matrix and the second by its inverse, the product
stays the same. Therefore only the column space of a head's matrix `[n, h]` matters, and
any basis of this space can take the place of the matrix. These leaves use the basis

    [I - B^T B / 4]        B `[n - h, h]`,
    [      B      ]

and store B only, which saves h^2 numbers for each head.

Every subspace has such a basis. The singular values of B are `2 tan(t / 2)`, where t
are the angles between the subspace and the first h coordinates. They are at most 2, and
the condition number of the basis is at most 2. With an identity in place of
`I - B^T B / 4`, the singular values would be `tan(t)`, which has no bound.

Shape letters are those of `models.config`. G = H / K query heads share a key-value
head; they form a group.

Reference:
  Jauch, Hoff and Dunson, Random orthogonal matrices and the Cayley transform, arXiv
  1810.02881, section 3.2: the Grassmann manifold as matrices with a symmetric positive
  definite top block. The basis here is theirs times (I + B^T B / 4), because then no
  inverse is needed.
"""

from typing import Any, ClassVar

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured.base import Arrays
from rotbits_jax.structured.base import Settings
from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import nonempty
from rotbits_jax.structured.base import or_empty
from rotbits_jax.structured.base import register
from rotbits_jax.structured.stored import Stored


@register
@struct.dataclass
class HeadColumns(Structured):
  """A key kernel `[d, K h]`. The last m columns of each head are a basis as above.

  RoPE rotates the first h - m columns of a key head. They are stored unchanged.

  Attributes:
    turned: `[..., d, K (h - m)]`, the columns that are stored unchanged; None if there
      are none.
    rest: `[..., d - m, K m]`, the matrices B side by side.
    heads: K.
  """

  kind: ClassVar[str] = 'head_columns'
  config_fields: ClassVar = {'heads': 'num_kv_heads'}

  turned: Any
  rest: Any
  heads: int = struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    *stack, rows, columns = self.rest.shape
    turned = 0 if self.turned is None else self.turned.shape[-1]
    return (*stack, rows + columns // self.heads, turned + columns)

  @property
  def dtype(self) -> Any:
    return self.rest.dtype

  def materialize(self) -> jax.Array:
    turned, rest = (_split(x, self.heads) for x in (self._turned(), self.rest))
    gram = jnp.einsum('...nki,...nkj->...ikj', rest, rest, precision='highest')
    top = jnp.eye(rest.shape[-1], dtype=jnp.float32)[:, None] - gram / 4
    basis = jnp.concatenate([top, rest], axis=-3)
    heads = jnp.concatenate([turned, basis], axis=-1)
    return heads.reshape(self.shape).astype(self.dtype)

  def stored(self) -> tuple[Settings, Arrays]:
    arrays = {'turned': np.asarray(self._turned()), 'rest': np.asarray(self.rest)}
    return {'heads': self.heads}, arrays

  def _turned(self) -> Any:
    return or_empty(self.turned, (*self.shape[:-1], 0), self.dtype)

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'HeadColumns':
    given = Stored(settings, arrays)
    heads = given.size('heads')
    turned, rest = given.array('turned', 2), given.array('rest', 2)
    given.finish()
    whole = heads > 0 and not turned.shape[1] % heads and not rest.shape[1] % heads
    if not whole or turned.shape[0] != rest.shape[0] + rest.shape[1] // heads:
      raise ValueError(
        f'a kernel of {heads} heads cannot have {turned.shape=} and {rest.shape=}'
      )
    return cls(nonempty(turned), rest, heads)


@register
@struct.dataclass
class HeadPlanes(Structured):
  """A query kernel `[d, H h]` whose planes have a known first row.

  RoPE rotates the first r columns of a head as r/2 planes: columns i and i + r/2 are
  the real and the imaginary part of one complex column. RoPE permits no basis change of
  such a plane but a complex factor. For each plane, the complex columns of the G heads
  of a group, one below the other, have the form `[1 - |b|^2 / 4; b]`. Therefore the
  first entry of the first head follows from the other entries. The columns that RoPE
  does not rotate are stored unchanged.

  Attributes:
    below: `[..., d - 1, H h]`, all rows except the first.
    top: `[..., K, G h - r]`, the numbers of the first row that do not follow from
      others; None if all follow.
    groups: K.
    head_dim: h.
  """

  kind: ClassVar[str] = 'head_planes'
  config_fields: ClassVar = {'head_dim': 'head_dim'}

  below: Any
  top: Any
  groups: int = struct.field(pytree_node=False)
  head_dim: int = struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    *stack, rows, columns = self.below.shape
    return (*stack, rows + 1, columns)

  @property
  def dtype(self) -> Any:
    return self.below.dtype

  def materialize(self) -> jax.Array:
    *stack, rows, columns = self.shape
    groups = self.groups
    below = jnp.asarray(self.below, jnp.float32)
    top = jnp.asarray(self._top(), jnp.float32)
    rotary = columns // groups - top.shape[-1]
    top = jnp.concatenate([jnp.zeros((*stack, groups, rotary)), top], axis=-1)
    heads = jnp.concatenate([top.reshape(*stack, 1, columns), below], axis=-2)
    heads = heads.reshape(*stack, rows, groups, -1, self.head_dim)
    squares = jnp.sum(jnp.square(heads[..., :rotary]), axis=(-4, -2))  # [..., K, r]
    real, imaginary = jnp.split(squares, 2, axis=-1)
    first = 1 - (real + imaginary) / 4
    heads = heads.at[..., 0, :, 0, : rotary // 2].set(first)
    return heads.reshape(self.shape).astype(self.dtype)

  def stored(self) -> tuple[Settings, Arrays]:
    arrays = {'below': np.asarray(self.below), 'top': np.asarray(self._top())}
    return {'head_dim': self.head_dim}, arrays

  def _top(self) -> Any:
    return or_empty(self.top, (*self.below.shape[:-2], self.groups, 0), self.dtype)

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'HeadPlanes':
    given = Stored(settings, arrays)
    h, below, top = (
      given.size('head_dim'),
      given.array('below', 2),
      given.array('top', 2),
    )
    given.finish()
    groups, known = top.shape
    whole = h > 0 and groups > 0 and not below.shape[1] % (groups * h)
    rotary = below.shape[1] // groups - known if whole else 0
    if not 0 < rotary <= h or rotary % 2:
      raise ValueError(
        f'a kernel with head_dim {h} cannot have {below.shape=} and {top.shape=}'
      )
    return cls(below, nonempty(top), groups, h)


@register
@struct.dataclass
class HeadRows(Structured):
  """An output kernel `[H h, d]`, whose heads are row blocks.

  The G heads of a group share one basis change. Side by side, they form the matrix
  `[I - B^T B / 4, B^T]`, `[h, G d]`. The first h columns of the first head follow from
  the other numbers and are not stored.

  Attributes:
    first: `[..., K h, d - h]`, the other columns of the first head of each group.
    others: `[..., K (G - 1) h, d]`, the other heads; None if G is 1.
    groups: K.
  """

  kind: ClassVar[str] = 'head_rows'
  config_fields: ClassVar = {'groups': 'num_kv_heads'}

  first: Any
  others: Any
  groups: int = struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    *stack, rows, columns = self.first.shape
    others = 0 if self.others is None else self.others.shape[-2]
    return (*stack, rows + others, columns + rows // self.groups)

  @property
  def dtype(self) -> Any:
    return self.first.dtype

  def materialize(self) -> jax.Array:
    *stack, _, width = self.shape
    h = width - self.first.shape[-1]
    first = jnp.asarray(self.first, jnp.float32)
    first = first.reshape(*stack, self.groups, 1, h, width - h)
    others = jnp.asarray(self._others(), jnp.float32)
    more = others.shape[-2] // (self.groups * h)
    others = others.reshape(*stack, self.groups, more, h, width)
    gram = sum(
      jnp.einsum('...gin,...gjn->...ij', x, x, precision='highest')
      for x in (first, others)
    )
    top = (jnp.eye(h, dtype=jnp.float32) - gram / 4)[..., None, :, :]
    first = jnp.concatenate([top, first], axis=-1)
    heads = jnp.concatenate([first, others], axis=-3)
    return heads.reshape(self.shape).astype(self.dtype)

  def stored(self) -> tuple[Settings, Arrays]:
    arrays = {'first': np.asarray(self.first), 'others': np.asarray(self._others())}
    return {'groups': self.groups}, arrays

  def _others(self) -> Any:
    stack, width = self.first.shape[:-2], self.shape[-1]
    return or_empty(self.others, (*stack, 0, width), self.dtype)

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'HeadRows':
    given = Stored(settings, arrays)
    groups = given.size('groups')
    first, others = given.array('first', 2), given.array('others', 2)
    given.finish()
    h = others.shape[1] - first.shape[1]
    if (
      h < 1 or not 0 < first.shape[0] == groups * h or others.shape[0] % first.shape[0]
    ):
      raise ValueError(
        f'a kernel of {groups} groups of heads cannot have {first.shape=} and '
        f'{others.shape=}'
      )
    return cls(first, nonempty(others), groups)


def _split(columns: Any, heads: int) -> jax.Array:
  """Reshapes `[..., n, K c]` to float32 `[..., n, K, c]`."""
  *stack, n, width = columns.shape
  columns = jnp.asarray(columns, jnp.float32)
  return columns.reshape(*stack, n, heads, width // heads)

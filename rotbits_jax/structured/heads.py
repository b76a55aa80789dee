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

from typing import Annotated, Any, ClassVar

from flax import struct
import jax
import jax.numpy as jnp

from rotbits_jax.structured import base
from rotbits_jax.structured import fields


@base.register
@struct.dataclass
class HeadColumns(base.Structured):
  """A key kernel `[d, K h]`. The last m columns of each head are a basis as above.

  RoPE rotates the first h - m columns of a key head. They are stored unchanged.

  Attributes:
    rotary: `[..., d, K (h - m)]`, the columns that are stored unchanged; None if there
      are none.
    below: `[..., d - m, K m]`, the matrices B side by side.
    heads: K.
  """

  type_name: ClassVar[str] = 'head_columns'
  config_fields: ClassVar = {'heads': 'num_kv_heads'}

  rotary: Annotated[Any, fields.Array('dq', optional=True)]
  below: Annotated[Any, fields.Array('bk')]
  heads: fields.Length = fields.static()

  @property
  def shape(self) -> tuple[int, ...]:
    *stack, rows, columns = self.below.shape
    rotary = 0 if self.rotary is None else self.rotary.shape[-1]
    return (*stack, rows + columns // self.heads, rotary + columns)

  def materialize(self, *needed: Any) -> jax.Array:
    split = lambda x: jnp.asarray(x, jnp.float32).reshape(
      *x.shape[:-1], self.heads, x.shape[-1] // self.heads
    )
    below = split(self.below)
    gram = jnp.einsum('...nki,...nkj->...ikj', below, below, precision='highest')
    top = jnp.eye(below.shape[-1], dtype=jnp.float32)[:, None] - gram / 4
    heads = jnp.concatenate([top, below], axis=-3)
    if self.rotary is not None:
      heads = jnp.concatenate([split(self.rotary), heads], axis=-1)
    return heads.reshape(self.shape).astype(self.dtype)

  def check(self) -> None:
    heads, (rows, columns) = self.heads, self.below.shape
    if not 0 < heads <= columns or columns % heads:
      raise ValueError(f'{columns} columns are not those of {heads} heads')
    if self.rotary is not None:
      length, rotary = self.rotary.shape
      if length != rows + columns // heads or rotary % heads:
        raise ValueError(f'{heads} heads cannot have {self.rotary.shape=}')


@base.register
@struct.dataclass
class HeadRows(base.Structured):
  """An output kernel `[H h, d]`, whose heads are row blocks.

  The G heads of a group share one basis change. Side by side, they form the matrix
  `[I - B^T B / 4, B^T]`, `[h, G d]`. The first h columns of the first head follow from
  the other numbers and are not stored.

  Attributes:
    first: `[..., K h, d - h]`, the other columns of the first head of each group.
    others: `[..., K (G - 1) h, d]`, the other heads; None if G is 1.
    groups: K.
    head_dim: h.
  """

  type_name: ClassVar[str] = 'head_rows'
  config_fields: ClassVar = {'groups': 'num_kv_heads', 'head_dim': 'head_dim'}

  first: Annotated[Any, fields.Array('fc')]
  others: Annotated[Any, fields.Array('od', optional=True)]
  groups: fields.Length = fields.static()
  head_dim: fields.Length = fields.static()

  @property
  def shape(self) -> tuple[int, ...]:
    *stack, rows, columns = self.first.shape
    others = 0 if self.others is None else self.others.shape[-2]
    return (*stack, rows + others, columns + self.head_dim)

  def materialize(self, *needed: Any) -> jax.Array:
    *stack, _, width = self.shape
    h, groups = self.head_dim, (*stack, self.groups)
    first = jnp.asarray(self.first, jnp.float32).reshape(*groups, 1, h, width - h)
    gram = jnp.einsum('...gin,...gjn->...ij', first, first, precision='highest')
    if self.others is not None:
      others = jnp.asarray(self.others, jnp.float32).reshape(*groups, -1, h, width)
      gram += jnp.einsum('...gin,...gjn->...ij', others, others, precision='highest')
    top = (jnp.eye(h, dtype=jnp.float32) - gram / 4)[..., None, :, :]
    heads = jnp.concatenate([top, first], axis=-1)
    if self.others is not None:
      heads = jnp.concatenate([heads, others], axis=-3)
    return heads.reshape(self.shape).astype(self.dtype)

  def check(self) -> None:
    rows, columns = self.groups * self.head_dim, self.first.shape[1] + self.head_dim
    others = (0, columns) if self.others is None else self.others.shape
    if not 0 < rows == len(self.first) or others[0] % rows or others[1] != columns:
      raise ValueError(
        f'{self.groups} groups of heads of {self.head_dim} cannot have '
        f'{self.first.shape=} and {others=}'
      )

r"""The leaf for a kernel of attention heads, stored in a basis with known entries.

A head multiplies two kernels, for example the value and the output projection. If the
first is multiplied by an invertible matrix and the second by its inverse, the product
stays the same. Therefore only the column space of a head's matrix `[n, m]` matters, and
any basis of this space can take the place of the matrix. This leaf uses the basis

    [I - B^T B / 4]        B `[n - m, m]`,
    [      B      ]

and stores B only, which saves m^2 elements per head.

Every subspace has such a basis. The singular values of B are `2 tan(t / 2)`, where t
are the angles between the subspace and the first m coordinates. They are at most 2, and
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

import dataclasses
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from rotbits_jax.structured import base
from rotbits_jax.structured import fields


@base.register
@dataclasses.dataclass(frozen=True)
class HeadBases(base.Structured):
  """A key kernel `[d, K h]` or an output kernel `[K G h, d]`, a basis for each of K.

  Columns of a key head that RoPE rotates are stored unchanged; the other m are a basis
  of n = d rows. In an output kernel, the G heads of a group share one basis change. So
  their transposes, one below the other, are a basis of n = G d rows and m = h columns.

  Attributes:
    below: the matrices B side by side, `[..., n - m, K m]`.
    rotary: `[..., d, K (h - m)]`, the columns that are stored unchanged; None if there
      are none.
    heads: K.
    group: G of an output kernel; 0 for a key kernel.
  """

  type_name: ClassVar[str] = 'head_bases'

  below: Annotated[Any, fields.Array('bk')]
  rotary: Annotated[Any, fields.Array('dq', optional=True)]
  heads: fields.Length = fields.static()
  group: fields.Length = fields.static(default=0)

  @property
  def shape(self) -> tuple[int, ...]:
    *stack, below, columns = self.below.shape
    rows = below + columns // self.heads
    if self.group:
      return (*stack, columns * self.group, rows // self.group)
    rotary = 0 if self.rotary is None else self.rotary.shape[-1]
    return (*stack, rows, columns + rotary)

  def materialize(self, *needed: Any) -> jax.Array:
    def of_heads(columns: Any) -> jax.Array:
      """Returns the matrices of the heads, `[..., K, rows, columns]`."""
      x = jnp.asarray(columns, jnp.float32)
      x = x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
      return jnp.moveaxis(x, -2, -3)

    below = of_heads(self.below)
    gram = jnp.matmul(jnp.matrix_transpose(below), below, precision='highest')
    top = jnp.eye(below.shape[-1], dtype=jnp.float32) - gram / 4
    heads = jnp.concatenate([top, below], axis=-2)
    if self.rotary is not None:
      heads = jnp.concatenate([of_heads(self.rotary), heads], axis=-1)
    if self.group:  # [..., K, G d, h] to [..., K, G, h, d]
      *axes, rows, columns = heads.shape
      heads = heads.reshape(*axes, self.group, rows // self.group, columns)
      heads = jnp.matrix_transpose(heads)
    else:
      heads = jnp.moveaxis(heads, -3, -2)
    return heads.reshape(self.shape).astype(self.dtype)

  def stack_key(self) -> tuple[str, ...]:
    return str(self.heads), str(self.group)

  def check(self) -> None:
    heads, (rows, columns) = self.heads, self.below.shape
    fits = 0 < heads <= columns and columns % heads == 0
    if fits and self.rotary is not None:
      length, rotary = self.rotary.shape
      fits = length == rows + columns // heads and rotary % heads == 0 == self.group
    elif fits and self.group:
      fits = (rows + columns // heads) % self.group == 0
    if not fits:
      text = f'in groups of {self.group} cannot have {self.below.shape=}'
      raise ValueError(f'{heads} heads {text}')

"""The leaf for a matrix of low rank, stored as two factors.

Shape letters of this file: a matrix `[m, n]` of rank r is the product of U `[m, r]` and
V `[r, n]`.
"""

from typing import Annotated, Any, ClassVar, Literal

from flax import struct
import jax
import jax.numpy as jnp

from rotbits_jax.structured import base
from rotbits_jax.structured import fields
from rotbits_jax.structured import heads

_product = lambda a, b: jnp.matmul(a, b, precision='highest')


@base.register
@struct.dataclass
class LowRank(base.Structured):
  """The product `U V`, of which one factor may be stored without r^2 numbers.

  `U V` equals `(U A)(A^-1 V)` for every invertible A `[r, r]`, so only the column space
  of U matters. A shortened U is the basis of this space that `structured.heads` has,
  and stored as B. Rounding the basis does no more harm than rounding U. If V is shorter
  than U, V^T may have this basis instead.

  Attributes:
    u: `[..., m, r]`; B `[..., m - r, r]` if it is shortened.
    v: `[..., r, n]`; `B^T` `[..., r, n - r]` if it is shortened.
    shortened: name of the factor that is; '' if none is.
  """

  type_name: ClassVar[str] = 'low_rank'

  u: Annotated[Any, fields.Array('mr')]
  v: Annotated[Any, fields.Array('rn')]
  shortened: Literal['', 'u', 'v'] = fields.static(default='')

  @property
  def rank(self) -> int:
    return int(self.u.shape[-1])

  @property
  def shape(self) -> tuple[int, ...]:
    rows, columns = (self.rank if self.shortened == x else 0 for x in 'uv')
    return (*self.u.shape[:-2], self.u.shape[-2] + rows, self.v.shape[-1] + columns)

  def factors(self) -> tuple[jax.Array, jax.Array]:
    """Returns U `[..., m, r]` and V `[..., r, n]` in float32, not rounded."""
    u, v = jnp.asarray(self.u, jnp.float32), jnp.asarray(self.v, jnp.float32)
    if self.shortened == 'u':
      u = heads.basis_of(u)
    if self.shortened == 'v':
      v = jnp.matrix_transpose(heads.basis_of(jnp.matrix_transpose(v)))
    return u, v

  def materialize(self, *needed: Any) -> jax.Array:
    return _product(*self.factors()).astype(self.dtype)

  def apply(self, x: jax.Array) -> jax.Array:
    m, n = self.shape[-2:]
    if self.rank * (m + n) >= m * n:
      return super().apply(x)
    u, v = (factor.astype(x.dtype) for factor in self.factors())
    return _product(_product(x, u), v)

  def stack_key(self) -> tuple[str, ...]:
    return str(self.rank), self.shortened

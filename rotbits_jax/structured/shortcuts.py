"""Leaves for matrices with triangles of zeros, among them the shortcuts of a model.

In a sliced model, every segment of the residual stream has coordinates of its own;
`models.config` defines segments. A shortcut is the matrix that takes the residual
stream from one segment to the next, past a sublayer. `passes.residual` chooses the
coordinates so that the shortcuts become symmetric, with zeros in the further columns if
the next segment is wider.
"""

from collections.abc import Callable
import dataclasses
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured import base
from rotbits_jax.structured import fields


@base.register
@dataclasses.dataclass(frozen=True)
class IdentityMinusGram(base.Structured):
  """The symmetric shortcut `[I - B B^T + C C^T, 0]`.

  SliceGPT's shortcut is a block of an orthogonal matrix. Such a block has many singular
  values of 1, and in symmetric form it is the identity minus `B B^T`. B has a column
  for each singular value below 1. C has a column for each singular value above 1, which
  only a fine-tuned shortcut has. Rotating the columns of B or C changes nothing.
  Therefore both are rotated to lower trapezoidal form: `B[i, j] = 0` for `j > i`.

  >>> leaf = IdentityMinusGram(jnp.array([[0.6], [0.8]]), jnp.zeros((2, 0)), 2)
  >>> np.round(np.float64(leaf.materialize()), 2).tolist()
  [[0.64, -0.48], [-0.48, 0.36]]

  Attributes:
    b: B, `[..., d, k]`.
    c: C, `[..., d, j]`.
    columns: width of the shortcut; the columns from d on are zero.

  Layers of a stack may differ in k and j. Columns of zeros fill B and C there, and
  `layer` removes them.
  """

  type_name: ClassVar[str] = 'identity_minus_gram'

  b: Annotated[Any, fields.Array('dk', lower=True)]
  c: Annotated[Any, fields.Array('dj', lower=True)]
  columns: fields.Length = fields.static()

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.b.shape[:-1], self.columns)

  @property
  def rank(self) -> int:
    """An upper bound of the rank of the difference from the identity."""
    return sum(self._ranks)

  @property
  def _ranks(self) -> tuple[int, int]:
    return self.b.shape[-1], self.c.shape[-1]

  def materialize(self, *needed: Any) -> jax.Array:
    b, c = jnp.asarray(self.b, jnp.float32), jnp.asarray(self.c, jnp.float32)
    gram = lambda x: jnp.matmul(x, jnp.matrix_transpose(x), precision='highest')
    matrix = jnp.eye(b.shape[-2], dtype=jnp.float32) - gram(b) + gram(c)
    return _pad_columns(matrix, self.columns).astype(self.dtype)

  def apply(self, x: jax.Array) -> jax.Array:
    if 2 * self.rank >= self.columns:
      return super().apply(x)
    y = x
    for factor, sign in ((self.b, -1), (self.c, 1)):
      factor = jnp.asarray(factor, x.dtype)
      coordinates = jnp.matmul(x, factor, precision='highest')
      y = y + sign * jnp.matmul(coordinates, factor.T, precision='highest')
    return _pad_columns(y, self.columns)

  def layer(self, index: int) -> 'IdentityMinusGram':
    factors = self.b[index], self.c[index]
    if not isinstance(factors[0], jax.core.Tracer):
      size = lambda x: np.trim_zeros(np.any(x, axis=0), 'b').size
      factors = tuple(x[:, : size(x)] for x in factors)
    return dataclasses.replace(self, b=factors[0], c=factors[1])

  @classmethod
  def stack(cls, leaves: list['IdentityMinusGram']) -> 'IdentityMinusGram':
    # Orbax cannot save arrays without elements.
    k, j = (max(1, *x) for x in zip(*(leaf._ranks for leaf in leaves), strict=True))
    padded = lambda leaf: dataclasses.replace(
      leaf, b=_pad_columns(leaf.b, k), c=_pad_columns(leaf.c, j)
    )
    return super().stack(list(map(padded, leaves)))

  def check(self) -> None:
    # A rank is no part of the shape of a leaf, which tells how much memory it takes.
    if not max(self._ranks) <= len(self.b) <= self.columns:
      raise ValueError(f'{self.columns} columns do not fit {self.b.shape=}')


@base.register
@dataclasses.dataclass(frozen=True)
class TrapezoidalRows(base.Structured):
  """A kernel whose last n rows are upper triangular in their pivot columns.

  They are zero below a diagonal if the pivots come before the other columns. Without
  pivots, these are the first n columns.
  """

  type_name: ClassVar[str] = 'trapezoidal_rows'
  is_exact: ClassVar[bool] = True

  full: Annotated[Any, fields.Array('mc', optional=True)]  # the other rows
  # The last rows, transposed; pivots come first.
  lower: Annotated[Any, fields.Array('cn', lower=True)]
  pivots: Annotated[Any, fields.Array('c', np.uint8, optional=True, most=1)] = None

  @classmethod
  def of(cls, kernel: Any, rows: int, pivots: Any = None) -> 'TrapezoidalRows':
    """Makes the leaf of an unstacked kernel from the number n of its last rows."""
    first = len(kernel) - rows
    lower = kernel[first:].T
    lower = lower if pivots is None else lower[cls.order(pivots)]
    return cls(kernel[:first] if first else None, lower, pivots)

  @staticmethod
  def order(pivots: Any) -> jax.Array:
    """Returns the columns `[..., c]`, pivots first, given 1 for each pivot."""
    return jnp.argsort(1 - jnp.asarray(pivots), axis=-1, stable=True)

  def rounded(self, function: Callable[[Any], Any]) -> 'TrapezoidalRows':
    return self.of(function(self.materialize()), self.lower.shape[1], self.pivots)

  @property
  def shape(self) -> tuple[int, ...]:
    *stack, columns, rows = self.lower.shape
    return (*stack, rows + self._full, columns)

  @property
  def _full(self) -> int:
    return 0 if self.full is None else int(self.full.shape[-2])

  def materialize(self, *needed: Any) -> jax.Array:
    upper = jnp.matrix_transpose(jnp.asarray(self.lower))
    if self.pivots is not None:
      places = jnp.argsort(self.order(self.pivots), axis=-1)[..., None, :]
      upper = jnp.take_along_axis(upper, places, axis=-1)
    return upper if self.full is None else jnp.concatenate([self.full, upper], axis=-2)

  def stack_key(self) -> tuple[str, ...]:
    # Layers of one shape may differ in these.
    return str(self._full), *([] if self.pivots is None else ['pivots'])


def _pad_columns(matrix: Any, columns: int) -> Any:
  widths = [(0, 0)] * (matrix.ndim - 1) + [(0, columns - matrix.shape[-1])]
  return (np if isinstance(matrix, np.ndarray) else jnp).pad(matrix, widths)

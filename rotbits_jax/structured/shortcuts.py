"""Leaves for matrices with triangles of zeros, among them the shortcuts of a model.

In a sliced model, every segment of the residual stream has coordinates of its own;
`models.config` defines segments. A shortcut is the matrix that takes the residual
stream from one segment to the next, past a sublayer. `passes.residual` chooses the
coordinates so that the shortcuts become symmetric, with zeros in the further columns if
the next segment is wider.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Annotated, Any, ClassVar, Self

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured.base import Origin
from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import register
from rotbits_jax.structured.fields import Array
from rotbits_jax.structured.fields import Arrays
from rotbits_jax.structured.fields import Length
from rotbits_jax.structured.fields import Lower
from rotbits_jax.structured.fields import Settings
from rotbits_jax.structured.fields import of_stacks
from rotbits_jax.structured.fields import static
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

  In a stack, the columns that a layer does not need are zero and come last.

  >>> leaf = IdentityMinusGram(jnp.array([[0.6], [0.8]]), jnp.zeros((2, 0)), 2)
  >>> np.round(np.float64(leaf.materialize()), 2).tolist()
  [[0.64, -0.48], [-0.48, 0.36]]

  Attributes:
    b: B, `[..., d, k]`.
    c: C, `[..., d, j]`.
    columns: width of the shortcut; the columns from d on are zero.
    ranks: the `(k, j)` of each layer, if the leaf is a stack of leaves. None for an
      unstacked leaf, and for a stack that was computed as one: there `layer` looks for
      the columns of zeros. A stack has at least one column in B and C, because Orbax
      cannot save arrays without elements.
  """

  type_name: ClassVar[str] = 'identity_minus_gram'

  b: Lower
  c: Lower
  columns: Length = static()
  ranks: tuple[tuple[int, int], ...] | None = of_stacks()

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> Self:
    # Before they are joined: the columns are no part of the leaf's shape.
    for name in ('b', 'c'):
      below, corner = arrays.get(name), arrays.get(f'{name}_corner')
      if below is None or corner is None or below.ndim != 2:
        continue  # which is refused below
      if corner.size != below.shape[1] * (below.shape[1] + 1) // 2:
        raise ValueError('B and C have at most as many columns as rows')
    return super().from_stored(settings, arrays)

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.b.shape[:-1], self.columns)

  @property
  def dtype(self) -> Any:
    return self.b.dtype

  @property
  def rank(self) -> int:
    """An upper bound of the rank of the difference from the identity."""
    return sum(self._widths())

  @property
  def is_thin(self) -> bool:
    """Whether `apply` takes fewer multiplications than the materialized matrix."""
    return is_thin(self._widths(), self.columns)

  def materialize(self, *needed: Any) -> jax.Array:
    b, c = jnp.asarray(self.b, jnp.float32), jnp.asarray(self.c, jnp.float32)
    gram = lambda x: jnp.matmul(x, jnp.matrix_transpose(x), precision='highest')
    matrix = jnp.eye(b.shape[-2], dtype=jnp.float32) - gram(b) + gram(c)
    return _pad_columns(matrix, self.columns).astype(self.dtype)

  def apply(self, x: jax.Array) -> jax.Array:
    if not self.is_thin:
      return super().apply(x)
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
    if self.b.ndim < 3:
      raise ValueError('the leaf is not stacked')
    b, c = self.b[index], self.c[index]
    if self.ranks is not None:
      k, j = self.ranks[index]
    elif isinstance(b, jax.core.Tracer):
      return dataclasses.replace(self, b=b, c=c)
    else:
      k, j = (np.trim_zeros(np.any(x, axis=0), 'b').size for x in (b, c))
    return dataclasses.replace(self, b=b[:, :k], c=c[:, :j], ranks=None)

  @classmethod
  def stack(
    cls,
    leaves: list['IdentityMinusGram'],
    ranks: Sequence[tuple[int, int]] | None = None,
  ) -> 'IdentityMinusGram':
    found = tuple(ranks or ((x.b.shape[-1], x.c.shape[-1]) for x in leaves))

    def padded(factors: list[Any], width: int) -> Any:
      rows = factors[0].shape[0]
      if not isinstance(factors[0], np.ndarray):
        pad = lambda f: jnp.pad(f, ((0, 0), (0, width - f.shape[-1])))
        return jnp.stack([pad(f) for f in factors])
      dtype = jnp.result_type(*factors)  # those of C with few columns may differ
      stack = host.empty((len(factors), rows, width), dtype)
      for out, factor in zip(stack, factors, strict=True):
        out[:, : factor.shape[-1]], out[:, factor.shape[-1] :] = factor, 0
      return stack

    return cls(
      b=padded([leaf.b for leaf in leaves], max(1, *(k for k, _ in found))),
      c=padded([leaf.c for leaf in leaves], max(1, *(j for _, j in found))),
      columns=leaves[0].columns,
      ranks=found,
    )

  @classmethod
  def stored_rank(
    cls, settings: Settings, shapes: Mapping[str, tuple[int, ...]]
  ) -> tuple[int, int]:
    return shapes['b'][1], shapes['c'][1]

  def check(self) -> None:
    if len(self.b) != len(self.c) or self.columns < len(self.b):
      raise ValueError(
        'B and C must have equally many rows, and at most `columns`, '
        f'got {self.b.shape=}, {self.c.shape=} and {self.columns=}'
      )


@register
@struct.dataclass
class TrapezoidalRows(Structured):
  """A kernel whose last n rows are zero below their diagonal, which begins at the left.

  Attributes:
    full: the other rows, `[..., m, columns]`; None if there are none.
    lower: the transposed last rows, `[..., columns, n]`.
  """

  type_name: ClassVar[str] = 'trapezoidal_rows'
  origin: ClassVar[Origin] = Origin.COPIED

  full: Annotated[Any, Array(2, optional=True)]
  lower: Lower

  @classmethod
  def of(cls, kernel: Any, rows: int) -> 'TrapezoidalRows':
    """Makes the leaf of an unstacked kernel from the number n of its last rows."""
    first = len(kernel) - rows
    return cls(kernel[:first] if first else None, kernel[first:].T)

  def rounded(self, function: Callable[[Any], Any]) -> 'TrapezoidalRows':
    return self.of(function(self.materialize()), self.lower.shape[1])

  @property
  def shape(self) -> tuple[int, ...]:
    *stack, columns, rows = self.lower.shape
    return (*stack, rows + self._full, columns)

  @property
  def _full(self) -> int:
    return 0 if self.full is None else int(self.full.shape[-2])

  @property
  def dtype(self) -> Any:
    return self.lower.dtype

  def materialize(self, *needed: Any) -> jax.Array:
    upper = jnp.matrix_transpose(jnp.asarray(self.lower))
    return upper if self.full is None else jnp.concatenate([self.full, upper], axis=-2)

  def apply(self, x: jax.Array) -> jax.Array:
    product = lambda x, y: jnp.matmul(x, jnp.asarray(y, x.dtype), precision='highest')
    y = product(x[..., self._full :], jnp.matrix_transpose(self.lower))
    return y if self.full is None else y + product(x[..., : self._full], self.full)

  def stack_key(self) -> tuple[str, ...]:
    return (str(self._full),)  # layers of one shape may differ in it

  def check(self) -> None:
    if self.full is not None and self.full.shape[1] != len(self.lower):
      raise ValueError(
        f'the rows must be equally long, got {self.full.shape=}, {self.lower.shape=}'
      )


def is_thin(ranks: tuple[int, int], columns: int) -> bool:
  """Returns `IdentityMinusGram.is_thin` for a leaf with so many columns in B and C."""
  return 2 * sum(ranks) < columns


def _pad_columns(matrix: jax.Array, columns: int) -> jax.Array:
  widths = [(0, 0)] * (matrix.ndim - 1) + [(0, columns - matrix.shape[-1])]
  return jnp.pad(matrix, widths)

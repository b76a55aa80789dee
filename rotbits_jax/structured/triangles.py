"""Matrices with a triangle of zeros, and how a triangle is packed."""

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

_SMALL = 1 << 24  # numbers of a matrix that may be all zeros


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

  def stored_sizes(self) -> list[tuple[np.dtype, int]]:
    return [(np.dtype(self.dtype), lower_size(self.shape))]

  def stored(self) -> tuple[Settings, Arrays]:
    return {'lower': list(self.lower.shape)}, {'lower': pack_lower(self.lower)}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'Trapezoidal':
    given = Stored(settings, arrays)
    lower = unpack_lower(given.array('lower', 1), given.sizes('lower', 2))
    given.finish()
    return cls(lower)


@register
@struct.dataclass
class RowTrapezoids(Structured):
  """A matrix of full rows, then of row blocks that are zero below their own diagonal.

  Attributes:
    upper: `[..., full + sum(blocks), columns]`.
    blocks: how many rows each block has.
    full: how many rows before the blocks may have no zeros.
  """

  kind: ClassVar[str] = 'row_trapezoids'

  upper: Any
  blocks: tuple[int, ...] = struct.field(pytree_node=False)
  full: int = struct.field(pytree_node=False, default=0)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.upper.shape

  @property
  def dtype(self) -> Any:
    return self.upper.dtype

  def materialize(self) -> jax.Array:
    return jnp.asarray(self.upper)

  def stored_sizes(self) -> list[tuple[np.dtype, int]]:
    columns = self.shape[-1]
    rows = [lower_size((columns, rows)) for rows in self.blocks]
    return [(np.dtype(self.dtype), self.full * columns + sum(rows))]

  def stored(self) -> tuple[Settings, Arrays]:
    upper = np.asarray(self.upper)
    columns = upper.shape[1]
    settings = {'blocks': list(self.blocks), 'full': self.full, 'columns': columns}
    mask = _upper_mask(self.blocks, self.full, columns)
    return settings, {'upper': upper[mask]}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'RowTrapezoids':
    given = Stored(settings, arrays)
    blocks, full = given.sizes('blocks'), given.size('full')
    columns, values = given.size('columns'), given.array('upper', 1)
    given.finish()
    size = full * columns + sum(lower_size((columns, rows)) for rows in blocks)
    if values.size != size:
      raise ValueError(f'{size} numbers are expected, got {values.size}')
    _check_zeros((full + sum(blocks)) * columns, size)
    return cls(unpack(values, _upper_mask(blocks, full, columns)), blocks, full)


def _upper_mask(blocks: tuple[int, ...], full: int, columns: int) -> np.ndarray:
  ones = lambda rows: np.ones((rows, columns), bool)
  return np.concatenate([ones(full), *(np.triu(ones(rows)) for rows in blocks)])


def pack_lower(matrix: Any) -> np.ndarray:
  """The entries on and below the diagonal of `[rows, columns]`, row by row."""
  matrix = np.asarray(matrix)
  return matrix[np.tril(np.ones(matrix.shape, bool))]


def lower_size(shape: tuple[int, ...]) -> int:
  """How many entries `[rows, columns]` has on and below the diagonal."""
  rows, columns = shape[-2:]
  corner = min(rows, columns)
  return corner * (corner + 1) // 2 + (rows - corner) * columns


def unpack_lower(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """The inverse of `pack_lower`, see `unpack`.

  Raises:
    ValueError: if another number of values belongs to the shape, or they are a small
      part of a large matrix.
  """
  rows, columns = shape
  if values.shape != (lower_size((rows, columns)),):
    raise ValueError(
      f'a {rows} x {columns} trapezoid has {lower_size((rows, columns))} numbers, '
      f'got {values.shape=}'
    )
  _check_zeros(rows * columns, values.size)
  return unpack(values, np.tril(np.ones(shape, bool)))


def _check_zeros(size: int, stored: int) -> None:
  """Refuses a large matrix of which far more than half is zeros.

  Its shape is a stranger's, and a few numbers must not ask for much memory.
  """
  if size > 2 * stored + _SMALL:
    raise ValueError(f'{stored} numbers are too few for a matrix of {size}')


def unpack(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """A matrix with values, row by row, where a mask is true, and zeros elsewhere.

  Args:
    values: `[n]`.
    mask: bool, of any shape.

  Returns:
    An array of the mask's shape.

  Raises:
    ValueError: if the mask is not true n times.
  """
  if values.shape != (mask.sum(),):
    raise ValueError(
      f'a {mask.shape} matrix of this form holds {mask.sum()} numbers, '
      f'got {values.shape=}'
    )
  matrix = np.zeros(mask.shape, values.dtype)
  matrix[mask] = values
  return matrix

"""Leaves for matrices with triangles of zeros, and functions that pack a triangle.

To pack a matrix is to keep only the entries where it may be nonzero, row by row.
"""

from typing import Any, ClassVar

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured.base import Arrays
from rotbits_jax.structured.base import Settings
from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import register


@register
@struct.dataclass
class Trapezoidal(Structured):
  """A matrix whose entries above the diagonal are zero.

  Attributes:
    lower: the matrix, `[..., rows, columns]`.
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
    return cls(unpack_lower(arrays['lower'], settings['lower']))


@register
@struct.dataclass
class RowTrapezoids(Structured):
  """A matrix of full rows, followed by row blocks that are zero below their diagonal.

  The diagonal of a block begins at the first entry of the block.

  Attributes:
    upper: the matrix, `[..., full + sum(blocks), columns]`.
    blocks: number of rows of each block.
    full: number of full rows before the blocks.
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
    settings = {
      'blocks': list(self.blocks),
      'full': self.full,
      'columns': upper.shape[1],
    }
    return settings, {'upper': upper[_upper_mask(**settings)]}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'RowTrapezoids':
    blocks, full, columns = settings['blocks'], settings['full'], settings['columns']
    check_sizes(full, columns, *blocks)
    size = full * columns + sum(lower_size((columns, rows)) for rows in blocks)
    if arrays['upper'].shape != (size,):
      raise ValueError(f'{size} numbers are expected, got {arrays["upper"].shape}')
    upper = unpack(arrays['upper'], _upper_mask(**settings))
    return cls(upper, tuple(blocks), full)


def _upper_mask(blocks: list[int], full: int, columns: int) -> np.ndarray:
  ones = lambda rows: np.ones((rows, columns), bool)
  return np.concatenate([ones(full), *(np.triu(ones(rows)) for rows in blocks)])


def pack_lower(matrix: Any) -> np.ndarray:
  """Returns the entries on and below the diagonal of `[rows, columns]`, row by row."""
  matrix = np.asarray(matrix)
  return matrix[np.tril(np.ones(matrix.shape, bool))]


def lower_size(shape: tuple[int, ...]) -> int:
  """Returns how many entries `[rows, columns]` has on and below the diagonal."""
  rows, columns = shape[-2:]
  corner = min(rows, columns)
  return corner * (corner + 1) // 2 + (rows - corner) * columns


def check_sizes(*sizes: Any) -> None:
  """Checks that all sizes can be lengths of an axis.

  Raises:
    ValueError: if a size is not an integer from 0 to 2^31 - 1.
  """
  for size in sizes:
    if type(size) is not int or not 0 <= size < 1 << 31:
      raise ValueError(f'the length of an axis cannot be {size!r}')


def unpack_lower(values: np.ndarray, shape: Any) -> np.ndarray:
  """Makes a lower trapezoidal matrix of a shape: the inverse of `pack_lower`.

  Raises:
    ValueError: if the shape is not valid, or if the number of values does not fit it.
  """
  rows, columns = shape
  check_sizes(rows, columns)
  if values.shape != (lower_size((rows, columns)),):
    raise ValueError(
      f'a {rows} x {columns} trapezoid has {lower_size((rows, columns))} numbers, '
      f'got {values.shape=}'
    )
  return unpack(values, np.tril(np.ones(tuple(shape), bool)))


def unpack(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Puts values, row by row, where a mask is true, and zeros elsewhere.

  Args:
    values: `[n]`.
    mask: bool, of any shape.

  Returns:
    An array of the mask's shape and the values' dtype.

  Raises:
    ValueError: if the mask does not have n true entries.
  """
  if values.shape != (mask.sum(),):
    raise ValueError(
      f'a matrix {mask.shape} of this kind has {mask.sum()} numbers, '
      f'got {values.shape=}'
    )
  matrix = np.zeros(mask.shape, values.dtype)
  matrix[mask] = values
  return matrix

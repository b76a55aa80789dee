"""Leaves for matrices with triangles of zeros, and functions that pack a triangle.

To pack a matrix is to keep only the entries where it may be nonzero, row by row.
"""

import itertools
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
from rotbits_jax.system import host

_SMALL = 1 << 24  # numbers of a matrix that may be all zeros


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
    given = Stored(settings, arrays)
    lower = unpack_lower(given.array('lower', 1), given.sizes('lower', 2))
    given.finish()
    return cls(lower)


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

  def stack_key(self) -> tuple[str, ...]:
    # Layers of one shape differ in their blocks where segments vary in width.
    return tuple(map(str, (*self.blocks, self.full)))

  def stored_sizes(self) -> list[tuple[np.dtype, int]]:
    columns = self.shape[-1]
    rows = [lower_size((columns, rows)) for rows in self.blocks]
    return [(np.dtype(self.dtype), self.full * columns + sum(rows))]

  def stored(self) -> tuple[Settings, Arrays]:
    upper = np.asarray(self.upper)
    columns = upper.shape[1]
    stops = itertools.accumulate(self.blocks, initial=self.full)
    parts = [
      upper[start : start + rows][_upper_mask(rows, columns)]
      for start, rows in zip(stops, self.blocks, strict=False)
    ]
    settings = {'blocks': list(self.blocks), 'full': self.full, 'columns': columns}
    return settings, {'upper': np.concatenate([upper[: self.full].reshape(-1), *parts])}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'RowTrapezoids':
    given = Stored(settings, arrays)
    blocks, full = given.sizes('blocks'), given.size('full')
    columns, values = given.size('columns'), given.array('upper', 1)
    given.finish()
    if not columns or not all(blocks):
      raise ValueError(f'blocks need rows and columns, got {columns=}')
    size = full * columns + sum(lower_size((columns, rows)) for rows in blocks)
    if values.size != size:
      raise ValueError(f'{size} numbers are expected, got {values.size}')
    _check_zeros((full + sum(blocks)) * columns, size)
    position = full * columns
    upper = host.empty((full + sum(blocks), columns), values.dtype)
    upper[:full] = values[:position].reshape(full, columns)
    upper[full:] = 0
    for start, rows in zip(
      itertools.accumulate(blocks, initial=full), blocks, strict=False
    ):
      count = lower_size((columns, rows))
      own = values[position : position + count]
      upper[start : start + rows][_upper_mask(rows, columns)] = own
      position += count
    return cls(upper, blocks, full)


def _upper_mask(rows: int, columns: int) -> np.ndarray:
  """Returns a mask of the entries that are not below the diagonal."""
  return ~np.tri(rows, columns, -1, dtype=np.bool)


def pack_lower(matrix: Any) -> np.ndarray:
  """Returns the entries on and below the diagonal of `[rows, columns]`, row by row."""
  matrix = np.asarray(matrix)
  return matrix[np.tri(*matrix.shape, dtype=np.bool)]


def lower_size(shape: tuple[int, ...]) -> int:
  """Returns how many entries `[rows, columns]` has on and below the diagonal."""
  rows, columns = shape[-2:]
  corner = min(rows, columns)
  return corner * (corner + 1) // 2 + (rows - corner) * columns


def unpack_lower(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Makes a lower trapezoidal matrix of a shape: the inverse of `pack_lower`.

  Raises:
    ValueError: if the number of values does not fit the shape, or if they are a small
      part of a large matrix.
  """
  rows, columns = shape
  if values.shape != (lower_size((rows, columns)),):
    raise ValueError(
      f'a {rows} x {columns} trapezoid has {lower_size((rows, columns))} numbers, '
      f'got {values.shape=}'
    )
  _check_zeros(rows * columns, values.size)
  corner = min(rows, columns)
  inner = corner * (corner + 1) // 2
  matrix = np.zeros((rows, columns), values.dtype)
  matrix[:corner, :corner][np.tri(corner, dtype=np.bool)] = values[:inner]
  matrix[corner:] = values[inner:].reshape(rows - corner, columns)
  return matrix


def _check_zeros(size: int, stored: int) -> None:
  """Refuses a large matrix of which far more than half is zeros.

  Its shape may come from a stranger, and a few numbers must not ask for much memory.
  """
  if size > 2 * stored + _SMALL:
    raise ValueError(f'{stored} numbers are too few for a matrix of {size}')

"""Matrices with a triangle of zeros, and how a triangle is packed."""

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
    return cls(unpack_lower(arrays['lower'], settings['lower']))


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
    stops = itertools.accumulate(self.blocks, initial=self.full)
    parts = [
      upper[start : start + rows][_upper_mask(rows, columns)]
      for start, rows in zip(stops, self.blocks, strict=False)
    ]
    settings = {'blocks': list(self.blocks), 'full': self.full, 'columns': columns}
    return settings, {'upper': np.concatenate([upper[: self.full].reshape(-1), *parts])}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'RowTrapezoids':
    blocks, full, columns = settings['blocks'], settings['full'], settings['columns']
    check_sizes(full, columns, *blocks)
    size = full * columns + sum(lower_size((columns, rows)) for rows in blocks)
    if arrays['upper'].shape != (size,):
      raise ValueError(f'{size} numbers are expected, got {arrays["upper"].shape}')
    values, position = arrays['upper'], full * columns
    upper = np.zeros((full + sum(blocks), columns), values.dtype)
    upper[:full] = values[:position].reshape(full, columns)
    for start, rows in zip(
      itertools.accumulate(blocks, initial=full), blocks, strict=False
    ):
      count = lower_size((columns, rows))
      own = values[position : position + count]
      upper[start : start + rows][_upper_mask(rows, columns)] = own
      position += count
    return cls(upper, tuple(blocks), full)


def _upper_mask(rows: int, columns: int) -> np.ndarray:
  """Where a matrix may have entries that are not below its diagonal."""
  return ~np.tri(rows, columns, -1, dtype=bool)


def pack_lower(matrix: Any) -> np.ndarray:
  """The entries on and below the diagonal of `[rows, columns]`, row by row."""
  matrix = np.asarray(matrix)
  return matrix[np.tri(*matrix.shape, dtype=bool)]


def lower_size(shape: tuple[int, ...]) -> int:
  """How many entries `[rows, columns]` has on and below the diagonal."""
  rows, columns = shape[-2:]
  corner = min(rows, columns)
  return corner * (corner + 1) // 2 + (rows - corner) * columns


def check_sizes(*sizes: Any) -> None:
  """Refuses what cannot be the length of an axis.

  Raises:
    ValueError: if one is not an integer from 0 to 2^31 - 1.
  """
  for size in sizes:
    if type(size) is not int or not 0 <= size < 1 << 31:
      raise ValueError(f'{size!r} is not the length of an axis')


def unpack_lower(values: np.ndarray, shape: Any) -> np.ndarray:
  """The inverse of `pack_lower`: zeros above the diagonal.

  Raises:
    ValueError: if the shape is none, or another number of values belongs to it.
  """
  rows, columns = shape
  check_sizes(rows, columns)
  if values.shape != (lower_size((rows, columns)),):
    raise ValueError(
      f'a {rows} x {columns} trapezoid has {lower_size((rows, columns))} numbers, '
      f'got {values.shape=}'
    )
  corner = min(rows, columns)
  inner = corner * (corner + 1) // 2
  matrix = np.zeros((rows, columns), values.dtype)
  matrix[:corner][np.tri(corner, columns, dtype=bool)] = values[:inner]
  matrix[corner:] = values[inner:].reshape(rows - corner, columns)
  return matrix

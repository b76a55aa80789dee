"""The base class of leaves that take the place of plain arrays in a file only.

A packed leaf stands for an array bit for bit. The writer packs an array if that saves
bytes, see `file.packing`, and the reader replaces the leaf by the array. Every packed
leaf stores at least one bit for each number, so that the sizes of its stored arrays
bound the size of the array.

Shape letters: an array is taken as a matrix of R rows and C columns; R is the product
of all axes but the last, and C is the last axis. This matrix or its transpose has L
lines of N numbers each.
"""

import abc
import math
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.fields import Settings
from rotbits_jax.structured.stored import MOST
from rotbits_jax.structured.stored import Stored
from rotbits_jax.system import host

PACKED_DTYPES = {
  np.dtype(d).name: np.dtype(d) for d in (np.float16, ml_dtypes.bfloat16, np.float32)
}
"""The dtypes of arrays that can be packed, by name."""

_MOST_AXES = 8

CHUNK = 1 << 18
"""About how many numbers are expanded together, so that they fit the CPU's cache."""


@struct.dataclass
class Packed(Structured):
  """A leaf that stands for a plain array bit for bit. It is never stacked.

  Attributes:
    sizes: shape of the array.
    transposed: whether lines are columns of the matrix `[R, C]`; otherwise they are its
      rows.
  """

  sizes: tuple[int, ...] = struct.field(pytree_node=False)
  transposed: bool = struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.sizes

  @abc.abstractmethod
  def array(self) -> np.ndarray:
    """Returns the array that the leaf stands for.

    Raises:
      ValueError: if the numbers of the leaf contradict each other.
    """

  def materialize(self) -> jax.Array:
    return jnp.asarray(self.array())

  def _settings(self) -> Settings:
    return {'shape': list(self.sizes), 'transposed': self.transposed}

  def _empty(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns a new array, and its lines as a view of it."""
    array = host.empty(self.shape, self.dtype)
    return array, lines_of(array, self.transposed)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
  """Returns R and C of an array."""
  return math.prod(shape[:-1]), math.prod(shape[-1:])


def lines_of(array: np.ndarray, transposed: bool) -> np.ndarray:
  """Returns the lines of an array, `[L, N]`, as a view if its strides allow that."""
  matrix = array.reshape(matrix_shape(array.shape))
  return matrix.T if transposed else matrix


class Form(NamedTuple):
  """What the settings of every packed leaf say.

  Attributes:
    sizes: shape of the array.
    transposed: see `Packed`.
    lines: L and N.
  """

  sizes: tuple[int, ...]
  transposed: bool
  lines: tuple[int, int]


def is_packable(shape: tuple[int, ...]) -> bool:
  """Returns whether a packed leaf can stand for an array of this shape."""
  return (
    len(shape) <= _MOST_AXES and math.prod(shape) > 0 and max(shape, default=1) <= MOST
  )


def take_form(given: Stored) -> Form:
  """Takes the settings of every packed leaf.

  Raises:
    ValueError: if they are not an orientation and a shape that can be packed.
  """
  sizes, transposed = given.sizes('shape'), given.flag('transposed')
  if not is_packable(sizes):
    raise ValueError(f'no packed array has {len(sizes)} axes of {sizes!r:.100}')
  rows, columns = matrix_shape(sizes)
  return Form(sizes, transposed, (columns, rows) if transposed else (rows, columns))


def bits(array: np.ndarray) -> np.ndarray:
  """Returns the bit patterns of numbers: unsigned integers of the same shape."""
  return array.view(f'u{array.dtype.itemsize}')


def float_dtype(name: Any) -> np.dtype:
  """Returns the dtype of a packed array from its name in a file.

  Raises:
    ValueError: if arrays of this dtype are not packed.
  """
  if name not in PACKED_DTYPES:
    raise ValueError(f'arrays of the dtype {name!r:.40} are not packed')
  return PACKED_DTYPES[name]

"""Entries of the manifest: the array of a base relative to which a leaf is stored."""

from typing import Annotated

import ml_dtypes
import numpy as np

from rotbits_jax.coding import specs
from rotbits_jax.system import checksums
from rotbits_jax.system import schema

_STORED_AS = {'int2': 'int8', 'int4': 'int8'} | {
  name: 'uint8'
  for name in dir(ml_dtypes)
  if name.startswith(('uint2', 'uint4', 'float4_', 'float6_', 'float8_'))
}


def stored_dtype(dtype: str) -> str:
  """Returns the dtype of the array that stores a plain array.

  The coder models no floats of 8 bits or fewer and no integers of 4. It gets their bit
  patterns as NumPy keeps them, one a byte.
  """
  return _STORED_AS.get(dtype, dtype)


Dtype = Annotated[str, schema.one_of([*specs.DTYPES, *_STORED_AS])]


class BaseArray(schema.Row):
  """An array of another model or PyTree that a leaf needs, see `base`."""

  path: schema.Path  # there
  shape: specs.Shape
  dtype: Dtype
  crc32: schema.Crc32  # of its bytes in C order

  def __post_init__(self) -> None:
    specs.check_shape(self.shape)

  @classmethod
  def of(cls, path: str, array: np.ndarray, crc32: int | None = None) -> 'BaseArray':
    """Returns the entry of an array, whose checksum may be known."""
    crc32 = checksums.of_array(array) if crc32 is None else crc32
    return cls(path=path, shape=array.shape, dtype=array.dtype.name, crc32=crc32)


def is_too_short(size: int, base_size: int, nbytes: int) -> bool:
  """Returns whether so few bytes cannot stand for an array, which is allocated first.

  The base gives some of its elements.
  """
  return size - base_size > 8 * nbytes

"""Specs: what a decoder must know of a stream. They are stored as JSON.

The JSON is untrusted input; `system.schema` reads it, and anything that is not a spec
raises a ValueError. The memory for the arrays of a valid spec is bounded: for an array
that is stored as it is by the length of the stream, for a coded array by the list of
its blocks, and for frequency tables by the coded elements.
"""

from collections.abc import Sequence
import functools
import math
from typing import Annotated, Any

import ml_dtypes
import msgspec
import numpy as np

from rotbits_jax.coding import blocks
from rotbits_jax.coding import layouts
from rotbits_jax.system import schema

DTYPES = {
  np.dtype(d).name: np.dtype(d)
  for d in (
    *(ml_dtypes.bfloat16, np.float16, np.float32, np.float64, np.bool_),
    *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    *(np.int8, np.int16, np.int32, np.int64),
    *(np.uint8, np.uint16, np.uint32, np.uint64),
  )
}
"""The dtypes that can be stored, by name."""


def is_of_bytes(dtype: np.dtype) -> bool:
  """Returns whether arrays are coded as their bytes: unsigned integers, and 64 bits."""
  return dtype.itemsize == 8 or dtype.kind == 'u'


_MOST_ELEMENTS = 1 << 48  # of an array

# The tables of a group take up to 5 MiB, but hardly any bytes in the stream.
_MAX_GROUPS = 16  # of few elements
_ELEMENTS_PER_GROUP = 1 << 17


Shape = Annotated[tuple[schema.Size, ...], msgspec.Meta(max_length=32)]
"""The shape of an array, see `check_shape`."""


def check_shape(shape: tuple[int, ...]) -> None:
  """Raises a ValueError if no array can have this shape."""
  # NumPy multiplies the lengths of the other axes, even if one of them is 0.
  if math.prod(n for n in shape if n) > _MOST_ELEMENTS:
    raise ValueError(f'an array of shape {shape!r:.100} is too large')


class ArraySpec(schema.Row):
  """An array of a stream.

  An array is one part, unless it is stored without its zeros. Then its parts are those
  of `structured.masks`, two or three.
  """

  dtype: Annotated[str, schema.one_of(DTYPES)]  # name of the dtype, one of `DTYPES`
  shape: Shape
  crc32: schema.Crc32  # CRC-32 of the bytes of the array in C order
  # For each part, the index of its group; None if the part is stored as it is.
  groups: tuple[schema.Size | None, ...]
  nonzeros: schema.Size | None  # number of elements of an array stored without zeros

  def __post_init__(self) -> None:
    check_shape(self.shape)
    if self.nonzeros is not None and self.nonzeros > self.size:
      raise ValueError(f'{self.size} elements cannot have {self.nonzeros=}')
    if len(self.groups) not in ((1,) if self.nonzeros is None else (2, 3)):
      raise ValueError(f'an array cannot have {len(self.groups)} parts')
    for group, (dtype, shape) in zip(self.groups, self.parts, strict=True):
      if group is not None and (not math.prod(shape) or dtype.itemsize > 4):
        raise ValueError(f'a part of {dtype} {list(shape)} cannot be coded')

  @property
  def numpy_dtype(self) -> np.dtype:
    return DTYPES[self.dtype]

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * self.numpy_dtype.itemsize

  @property
  def parts(self) -> list[tuple[np.dtype, tuple[int, ...]]]:
    """The dtype and the shape of each part."""
    uint8, dtype, shape = np.dtype(np.uint8), self.numpy_dtype, self.shape
    if self.nonzeros is not None:
      mask = math.prod(shape[:-1]), -(-math.prod(shape[-1:]) // 8)
      signs = -(-(self.size - self.nonzeros) // 8)
      several = (uint8, mask), (dtype, (self.nonzeros,)), (uint8, (signs,))
      return [*several[: len(self.groups)]]
    if is_of_bytes(dtype):
      return [(uint8, (self.size, dtype.itemsize))]
    return [(dtype, shape)]


_LAYOUTS: dict[str, Any] = {
  **dict.fromkeys(('floats', 'raised', 'codes'), layouts.Pairs),
  **dict.fromkeys(('singles', 'positive'), layouts.Singles),
  **dict.fromkeys(('integers', 'known'), layouts.Differences),
  'bytes': layouts.Bytes,
}


class GroupSpec(schema.Row):
  """A group: parts of one layout. Its units lie in blocks, see `blocks.divide`."""

  # The type of the layout; 'known' are numbers near those that both sides know.
  type_name: Annotated[str, schema.one_of(_LAYOUTS)]
  raw_bits: schema.Size  # that of the layout
  contexts: schema.Size  # number of bytes of the contexts in the stream
  blocks: tuple[schema.Size, ...]  # number of bytes of each block

  def layout(self, dtype: np.dtype) -> layouts.Layout:
    """Returns the layout of the group, whose parts have this dtype."""
    layout = _LAYOUTS[self.type_name](dtype, self.raw_bits, self.type_name)
    if not layout.is_valid():
      raise ValueError(f'parts of {dtype} have no layout {self!r:.100}')
    return layout


class StreamSpec(schema.Object):
  """A record of arrays that decodes on its own."""

  arrays: tuple[ArraySpec, ...]
  groups: tuple[GroupSpec, ...]  # the groups of coded parts

  def __post_init__(self) -> None:
    coded, known = 0, [group.type_name == 'known' for group in self.groups]
    if known != sorted(known):
      raise ValueError('groups relative to known numbers must be the last ones')
    *members, _ = self.members([array.parts for array in self.arrays])
    for group, is_known, of_group in zip(self.groups, known, members, strict=True):
      arrays, parts = zip(*of_group, strict=True) if of_group else ((), ())
      if len({dtype for dtype, _ in parts}) != 1:
        raise ValueError('a group must have parts of one dtype')
      if is_known and any(len(self.arrays[i].groups) > 1 for i in arrays):
        raise ValueError('a part cannot be coded relative to known numbers')
      layout, sizes = group.layout(parts[0][0]), [math.prod(x) for _, x in parts]
      units = sum(-(-size // layout.size) for size in sizes)
      if not units or len(group.blocks) != -(-units // blocks.capacity(layout)):
        raise ValueError(f'{len(group.blocks)} blocks for {units} units')
      if min(group.blocks) < blocks.LEAST_BYTES:
        raise ValueError(f'a block cannot have {min(group.blocks)} bytes')
      coded += sum(sizes)
    if len(self.groups) > _MAX_GROUPS + coded // _ELEMENTS_PER_GROUP:
      raise ValueError(f'{len(self.groups)} groups are too many for {coded} elements')

  def members(self, parts: Sequence[Sequence[Any]]) -> list[list[tuple[int, Any]]]:
    """Returns the parts of each group, given those of each array; others are last.

    Each is with the index of its array.
    """
    members: list[list[Any]] = [[] for _ in range(len(self.groups) + 1)]
    for i, (array, several) in enumerate(zip(self.arrays, parts, strict=True)):
      for group, part in zip(array.groups, several, strict=True):
        if group is not None and group >= len(self.groups):
          raise ValueError(f'a part of group {group} of {len(self.groups)}')
        members[-1 if group is None else group].append((i, part))
    return members

  @functools.cached_property
  def sizes(self) -> list[int]:
    """The bytes of parts in no group; of contexts and of each block, group by group."""
    plain = self.members([array.parts for array in self.arrays])[-1]
    sizes = [math.prod(shape) * dtype.itemsize for _, (dtype, shape) in plain]
    return sizes + [x for group in self.groups for x in (group.contexts, *group.blocks)]

  @property
  def nbytes(self) -> int:
    """Length of the stream in bytes."""
    return sum(self.sizes)

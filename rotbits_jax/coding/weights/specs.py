"""Specs: describe a stream, so that it can be read. They are stored as JSON.

The JSON is untrusted input; `system.schema` reads it. The memory for the arrays of a
valid spec is bounded: for an array that is stored as it is by the length of the stream,
for a coded array by the list of its blocks, and for frequency tables by the coded
elements.
"""

from collections.abc import Callable, Collection
import dataclasses
import math
from typing import Annotated, Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from rotbits_jax.coding.weights import blocks
from rotbits_jax.coding.weights import forms
from rotbits_jax.coding.weights import layouts
from rotbits_jax.system import schema

DTYPES = {
  np.dtype(d).name: np.dtype(d)
  for d in (
    *(ml_dtypes.bfloat16, np.float16, np.float32, np.float64, np.bool_),
    *(np.int8, np.int16, np.int32, np.int64),
    *(np.uint8, np.uint16, np.uint32, np.uint64),
  )
}
"""The dtypes that can be stored, by name."""

_MAX_AXES = 32
_MAX_SIZE = 1 << 48  # elements of an array
_MOST_DIVIDED = 4  # a block has at least so small a part of `blocks.CAPACITY`
_MAX_GROUPS = 16  # of few elements
_ELEMENTS_PER_GROUP = 1 << 17


def most_groups(elements: int) -> int:
  """Returns how many groups a record with this many coded elements may have.

  The tables of a group take up to 12 MiB, but hardly any bytes in the stream.
  """
  return _MAX_GROUPS + elements // _ELEMENTS_PER_GROUP


def _one_of(known: Collection[str]) -> Callable[[Any], str | None]:
  return lambda name: None if name in known else f'must be one of {", ".join(known)}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraySpec:
  """An array of a stream.

  Attributes:
    dtype: name of the dtype, one of `DTYPES`.
    shape: shape of the array.
    crc32: CRC-32 of the bytes of the array in C order.
    groups: for each part of the array, the index of its group; None if the part is
      stored as it is. An array without a form has one part, which is the array. An
      array of elements of 64 bits without another form may have two, which are halves.
    uniform: the form of multiples of a unit, or None.
    codebook: the form of few distinct values, or None.
  """

  as_list: ClassVar[bool] = True

  dtype: Annotated[str, _one_of(DTYPES)]
  shape: tuple[schema.Size, ...]
  crc32: schema.Crc32
  groups: tuple[schema.Size | None, ...]
  uniform: forms.Uniform | None
  codebook: forms.Codebook | None

  def __post_init__(self) -> None:
    sizes = [size for size in self.shape if size]
    if len(self.shape) > _MAX_AXES or math.prod(sizes) > _MAX_SIZE:
      raise ValueError(f'an array of shape {self.shape!r:.100} is too large')
    if self.uniform and (self.codebook or self.numpy_dtype not in layouts.FORMATS):
      raise ValueError(f'an array of {self.dtype} cannot be uniform')
    if self.codebook and not self.size:
      raise ValueError('an array without elements has no codebook')
    if self.codebook:
      values = math.prod(self.parts[1][1])
      if max(values, self.codebook.others) > self.size:
        raise ValueError('a codebook has more values than the array has elements')
    if len(self.groups) != len(self.parts):
      raise ValueError(f'{len(self.parts)} parts in {len(self.groups)} groups')
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
  def form(self) -> forms.Form | None:
    are_halves = len(self.groups) == 2 and self.numpy_dtype.itemsize == 8
    return self.uniform or self.codebook or (forms.Halves() if are_halves else None)

  @property
  def parts(self) -> forms.Parts:
    """The dtype and the shape of each part."""
    if self.form is None:
      return [(self.numpy_dtype, self.shape)]
    return self.form.parts(self.numpy_dtype, self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupSpec:
  """A group: parts of one layout. Their elements, part after part, lie in blocks.

  Attributes:
    type_name: type of the layout, one of `layouts.TYPES`.
    raw_bits: number of raw bits of an element.
    min_exponent: the minimum exponent; 1 for integers.
    contexts: number of bytes of the contexts in the stream.
    lanes: number of lanes of each block.
    elements: how many elements each block has. The last block has fewer.
    blocks: number of bytes of the coded symbols of each block.
  """

  as_list: ClassVar[bool] = True

  type_name: Annotated[str, _one_of(layouts.TYPES)]
  raw_bits: schema.Size
  min_exponent: schema.Size
  contexts: schema.Size
  lanes: Annotated[int, schema.between(1, blocks.LANES)]
  elements: Annotated[int, schema.between(1, blocks.CAPACITY)]
  blocks: tuple[schema.Size, ...]

  def __post_init__(self) -> None:
    if -(-self.elements // self.lanes) > blocks.STEPS:
      raise ValueError(f'{self.elements} elements in {self.lanes} lanes are too many')

  def layout(self, dtype: np.dtype) -> layouts.Layout:
    """Returns the layout of the group, whose parts have this dtype.

    Raises:
      ValueError: if there is no such layout.
    """
    layout = layouts.TYPES[self.type_name](dtype, self.raw_bits, self.min_exponent)
    if not layout.is_valid():
      raise ValueError(
        f'{dtype} has no layout {self.type_name!r} of {self.raw_bits} raw bits and '
        f'the minimum exponent {self.min_exponent}'
      )
    return layout


class Member(NamedTuple):
  """A part of an array."""

  array: int  # index of the array
  part: int  # index of the part in its array
  dtype: np.dtype
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamSpec:
  """A record of arrays that decodes on its own.

  Attributes:
    arrays: the arrays.
    groups: the groups of coded parts.
  """

  arrays: tuple[ArraySpec, ...]
  groups: tuple[GroupSpec, ...]

  def __post_init__(self) -> None:
    coded = 0
    for group, own in zip(self.groups, self.members()[:-1], strict=True):
      if len({member.dtype for member in own}) != 1:
        raise ValueError('a group must have parts of one dtype')
      group.layout(own[0].dtype)
      total = sum(member.size for member in own)
      least = min(blocks.CAPACITY // _MOST_DIVIDED, total)
      is_block = least <= group.elements <= total
      if not is_block or len(group.blocks) != -(-total // group.elements):
        raise ValueError(f'{len(group.blocks)} blocks for {total} elements')
      coded += total
    if len(self.groups) > most_groups(coded):
      raise ValueError(f'{len(self.groups)} groups are too many for {coded} elements')

  def members(self) -> list[list[Member]]:
    """Returns the parts of each group, and last those that are stored as they are."""
    found: list[list[Member]] = [[] for _ in range(len(self.groups) + 1)]
    for i, array in enumerate(self.arrays):
      pairs = zip(array.groups, array.parts, strict=True)
      for j, (group, (dtype, shape)) in enumerate(pairs):
        if group is not None and group >= len(self.groups):
          raise ValueError(f'a part of group {group} of {len(self.groups)}')
        found[-1 if group is None else group].append(Member(i, j, dtype, shape))
    return found

  def sizes(self) -> list[int]:
    """Returns the lengths in bytes of the pieces of the stream.

    They are the contexts of each group, the words and the planes of each block, and the
    parts that are stored as they are.
    """
    *coded, whole = self.members()
    found = [group.contexts for group in self.groups]
    for group, own in zip(self.groups, coded, strict=True):
      layout = group.layout(own[0].dtype)
      total = sum(member.size for member in own)
      for i, nbytes in enumerate(group.blocks):
        count = min(group.elements, total - i * group.elements)
        found += [nbytes, blocks.planes_size(count, layout)]
    return found + [x.size * x.dtype.itemsize for x in whole]

  @property
  def nbytes(self) -> int:
    """Length of the stream in bytes."""
    return sum(self.sizes())

  def grid(self, array: ArraySpec) -> forms.Uniform | None:
    """Returns the form of an array of multiples of a unit; None for other arrays."""
    return array.uniform

"""The entries of leaves in the manifest: how a parameter is stored, and its needs.

A leaf is an array or a structured leaf, see `structured`. It is stored as one or more
arrays of its record, see `manifest`. What does not fit raises a ValueError.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.relative import entries
from rotbits_jax.system import schema

UNTRUSTED = ArithmeticError, AttributeError, LookupError, TypeError
"""The errors, besides ValueError, of a leaf whose settings and arrays do not fit."""

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
  """A stored parameter.

  Attributes:
    path: path of the parameter in the model.
    shape: shape of the array that the leaf stands for.
    dtype: dtype of that array.
    type_name: type of the structured leaf; empty for an array.
    stack_key: see `structured.Structured.stack_key`.
    settings: settings of the structured leaf.
    arrays: names of the arrays as which the leaf is stored; one empty name for an
      array.
    needs: paths of the parameters that are needed to compute the array.
    base: the array of a base that is needed to compute the array; None for none.
    product: a product that is needed in its place; None for none.
    crc32: CRC-32 of the materialized array, for leaves that the reader replaces by it;
      else None.
  """

  path: schema.Path
  shape: entries.Shape
  dtype: entries.Dtype
  type_name: str = ''
  stack_key: tuple[str, ...] = ()
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  arrays: tuple[str, ...] = ('',)
  needs: tuple[schema.Path, ...] = ()
  base: entries.BaseArray | None = None
  product: entries.Product | None = None
  crc32: schema.Crc32 | None = None

  def __post_init__(self) -> None:
    if len(set(self.arrays)) != len(self.arrays):
      raise ValueError(f'{self.path}: the names of the arrays must differ')
    known = [x for x in (self.base, self.product, self.needs) if x]
    cls = self.leaf_class
    if not self.type_name:
      others = self.stack_key, self.settings, self.arrays, self.crc32
      if known or others != ((), {}, ('',), None):
        raise ValueError(f'{self.path}: an array has fields of a structured leaf')
    elif cls is not None:
      is_known = cls.origin is structured.Origin.KNOWN
      if cls.origin.is_in_files != (self.crc32 is not None):
        raise ValueError(f'{self.path}: leaves of its type have a checksum, or none')
      if len(known) != 1 if is_known else self.base or self.product:
        raise ValueError(f'{self.path}: leaves of its type need a base, or need none')
    is_of_layer = models.names.layer_index(self.path) is not None
    if self.needs and self.crc32 is None and is_of_layer:
      raise ValueError(f'{self.path}: a leaf of a stack cannot need other parameters')

  @property
  def leaf_class(self) -> type[structured.Structured] | None:
    """The class of the structured leaf; None for an array, or if it is unknown."""
    return structured.TYPES.get(self.type_name)

  def make(self, arrays: Sequence[np.ndarray]) -> structured.Structured:
    """Makes the structured leaf from the arrays as which it is stored."""
    cls = structured.TYPES[self.type_name]
    try:
      named = dict(zip(self.arrays, arrays, strict=True))
      leaf = cls.from_stored(self.settings, named)
      key = structured.stack_key(leaf)
    except UNTRUSTED as error:
      raise ValueError(str(error)) from error
    if (*key, leaf.needs) != (
      *(self.type_name, self.shape, self.dtype, self.stack_key),
      self.needs,
    ):
      raise ValueError('the leaf differs from the manifest')
    if cls.origin is structured.Origin.KNOWN and not self.needs:
      leaf.check_needed(self.shape if self.base is None else self.base.shape)
    return leaf

  def rank(self, shapes: Sequence[Shape]) -> Any:
    """Returns the rank of the leaf, see `Structured.stored_rank`; None for most.

    Args:
      shapes: shapes of the arrays as which the leaf is stored.
    """
    if (cls := self.leaf_class) is None:
      return None
    try:
      named = dict(zip(self.arrays, shapes, strict=True))
      return cls.stored_rank(self.settings, named)
    except UNTRUSTED as error:
      raise ValueError(f'{self.path}: expected a leaf with two factors') from error

  @property
  def has_classes(self) -> bool:
    """Whether the leaf has differences whose classes the reader computes."""
    has_scales = {'differences', 'column_scales'} <= set(self.arrays)
    return self.leaf_class is structured.Difference and has_scales

  @property
  def is_multiples(self) -> bool:
    """Whether the leaf is an array of integers times one step."""
    multiples = structured.UniformlyQuantized.type_name
    return self.type_name == multiples and 'row_exponents' not in self.arrays

  def is_expanded(self, integers: bool = False) -> bool:
    """Returns whether the reader puts the array in the place of the structured leaf.

    Args:
      integers: whether multiples of one step stay integers.
    """
    return self.crc32 is not None or (self.is_multiples and not integers)

  def is_array(self, integers: bool = False) -> bool:
    """Returns whether the parameter is an array for those who read the file."""
    return not self.type_name or self.is_expanded(integers)

  @property
  def base_size(self) -> int:
    """The number of elements that the base and bases of subspaces give."""
    if self.product is not None and self.product.kind == 'shortcut':
      return self.size  # the bases have more
    return sum(math.prod(x.shape) for x in self.base_arrays)

  @property
  def base_arrays(self) -> tuple[entries.BaseArray, ...]:
    """The arrays of a base that are needed."""
    if self.product is not None:
      return self.product.arrays
    return () if self.base is None else (self.base,)

  @property
  def size(self) -> int:
    """The number of elements of the array that the leaf stands for."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """The bytes of that array."""
    return self.size * np.dtype(entries.stored_dtype(self.dtype)).itemsize


def check_array(path: str, shape: Shape, dtype: np.dtype) -> None:
  """Checks that an array of this path, shape and dtype can be stored."""
  entry = Leaf(path=path, shape=shape, dtype=dtype.name)
  try:
    schema.load(Leaf, schema.dump(entry), path)
  except ValueError as error:
    raise ValueError(f'it cannot be stored: {error}') from error

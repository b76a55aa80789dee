"""The leaf for an array with many zeros, in a file. Shape letters are in `packed`."""

from typing import Any, ClassVar

from flax import struct
import numpy as np

from rotbits_jax.structured import packed
from rotbits_jax.structured.base import register
from rotbits_jax.structured.fields import Arrays
from rotbits_jax.structured.fields import Settings
from rotbits_jax.structured.stored import Stored


@register
@struct.dataclass
class Sparse(packed.Packed):
  """An array with many zeros: the pattern of zeros, and the other numbers.

  The number -0 is not a zero here. The pattern is packed along lines, so that a byte
  holds whole groups of a pattern such as two nonzero numbers in every four. The nonzero
  numbers are stored as rows of equal length, because the coder sorts rows by scale.

  Attributes:
    across: whether the nonzero numbers are in the order of `lines.T`; otherwise they
      are in the order of the lines.
    mask: uint8 `[L, ceil(N / 8)]`. Bit 7 - i of byte j of a line is 1 if number 8 j + i
      is not zero. Bits after the last number are 0.
    values: the nonzero numbers, `[n, WIDTH]`.
    tail: the last nonzero numbers, `[m]`, where m < WIDTH.
  """

  type_name: ClassVar[str] = 'sparse'
  WIDTH: ClassVar[int] = 128

  across: bool = struct.field(pytree_node=False)
  mask: Any
  values: Any
  tail: Any

  @classmethod
  def from_array(cls, array: np.ndarray, *, transposed: bool, across: bool) -> 'Sparse':
    """Makes the leaf of an array of a dtype in `packed.PACKED_DTYPES`."""
    lines = packed.lines_of(packed.bits(array), transposed)
    mask = np.packbits(lines != 0, axis=1)
    ordered = np.ascontiguousarray(lines.T if across else lines).reshape(-1)
    values = ordered[ordered != 0].view(array.dtype)
    whole = values.size - values.size % cls.WIDTH
    return cls(
      sizes=array.shape,
      transposed=transposed,
      across=across,
      mask=mask,
      values=values[:whole].reshape(-1, cls.WIDTH),
      tail=values[whole:],
    )

  @property
  def dtype(self) -> Any:
    return self.values.dtype

  def array(self) -> np.ndarray:
    array, lines = self._empty()
    mask = np.unpackbits(self.mask, axis=1, count=lines.shape[1]).view(np.bool)
    values = np.concatenate([self.values.reshape(-1), self.tail])
    if np.count_nonzero(mask) != values.size:
      raise ValueError(f'the pattern of zeros does not fit {values.size} numbers')
    array[...] = 0
    # Indexing by a mask takes numbers in the order of the lines.
    ordered, mask = (lines.T, mask.T) if self.across else (lines, mask)
    ordered[mask] = values
    return array

  def stored(self) -> tuple[Settings, Arrays]:
    settings = self._settings() | {'across': self.across}
    return settings, {'mask': self.mask, 'values': self.values, 'tail': self.tail}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'Sparse':
    given = Stored(settings, arrays)
    form, across = packed.take_form(given), given.flag('across')
    count, length = form.lines
    mask = given.array_of('mask', (count, -(-length // 8)), np.uint8)
    values = given.array('values', 2)
    packed.float_dtype(values.dtype.name)
    tail = given.array('tail', 1, values.dtype)
    given.finish()
    if values.shape[1] != cls.WIDTH or tail.size >= cls.WIDTH:
      raise ValueError(f'no sparse leaf has {values.shape=} and {tail.shape=}')
    return cls(form.sizes, form.transposed, across, mask, values, tail)

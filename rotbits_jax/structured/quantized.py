"""The leaf for an array that a checkpoint stores as quantised codes, in a file only.

Shape letters: a matrix has R rows of C elements. A block is B elements of a row that
follow each other, and a super-block is several blocks.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, ClassVar

from flax import struct
import ml_dtypes
import numpy as np

from rotbits_jax.structured.base import Arrays
from rotbits_jax.structured.base import Settings
from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import register
from rotbits_jax.structured.stored import Stored
from rotbits_jax.system import host

_DTYPES = {
  np.dtype(d).name: np.dtype(d) for d in (np.float16, ml_dtypes.bfloat16, np.float32)
}
_CHUNK = 1 << 18  # elements that are expanded together, because they fit a cache


@register
@struct.dataclass
class Quantized(Structured):
  """An array of codes with a scale, and perhaps an offset, for each block.

      element = scale * code + offset
      scale   = scales, or scales * scale_units of the super-block
      offset  = offsets, or offsets * offset_units of the super-block

  NumPy computes this on the host, in float32, one operation after the other, and rounds
  the result to the dtype; so the array has the same bits everywhere. The reader of a
  file puts the array in the place of the leaf. A leaf is never stacked.

  Attributes:
    codes: int8 or uint8 `[R, C]`.
    scales: float16 `[R, C/B]`; int8 or uint8 if there are units.
    offsets: like `scales`; None for no offsets.
    scale_units: float16 `[R, n]` for n super-blocks of a row, or None.
    offset_units: float16 `[R, n]`, or None.
    name: name of the dtype of the array.
    transposed: whether the array is the transposed matrix, `[C, R]`.
  """

  kind: ClassVar[str] = 'quantized'
  expands_on_reading: ClassVar[bool] = True

  codes: Any
  scales: Any
  offsets: Any
  scale_units: Any
  offset_units: Any
  name: str = struct.field(pytree_node=False)
  transposed: bool = struct.field(pytree_node=False, default=False)

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.codes.shape[::-1] if self.transposed else self.codes.shape)

  @property
  def dtype(self) -> Any:
    return _DTYPES[self.name]

  @property
  def T(self) -> 'Quantized':  # noqa: N802
    return dataclasses.replace(self, transposed=not self.transposed)

  def materialize(self) -> Any:
    """Returns the array: NumPy, because XLA may fuse a product with a sum."""
    rows, columns = self.codes.shape
    matrix = host.empty((rows, columns), self.dtype)
    step = max(_CHUNK // max(columns, 1), 1)
    with np.errstate(all='ignore'):
      for start in range(0, rows, step):
        part = slice(start, start + step)
        scale = _blocks(self.scales, self.scale_units, part)
        codes = self.codes[part].reshape(*scale.shape, -1).astype(np.float32)
        codes *= scale[..., None]
        if self.offsets is not None:
          codes += _blocks(self.offsets, self.offset_units, part)[..., None]
        matrix[part] = codes.reshape(-1, columns)
    return matrix.T if self.transposed else matrix

  def largest(self) -> float:
    """Returns a bound of the magnitude of the elements; NaN or infinite if unknown."""
    with np.errstate(all='ignore'):
      scale = _blocks(self.scales, self.scale_units, slice(None))
      bound = 255 * float(np.abs(scale).max())
      if self.offsets is not None:
        offset = _blocks(self.offsets, self.offset_units, slice(None))
        bound += float(np.abs(offset).max())
    return bound

  def map_numbers(self, function: Callable[[Any], Any]) -> 'Quantized':
    """Returns the leaf itself, whose codes no function may change."""
    return self

  def astype(self, dtype: Any) -> 'Quantized':
    return dataclasses.replace(self, name=np.dtype(dtype).name)

  def take_rows(self, order: np.ndarray) -> 'Quantized':
    """Returns the leaf of the rows of the matrix in another order."""
    fields = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
    arrays = {k: x[order] for k, x in fields.items() if isinstance(x, np.ndarray)}
    return dataclasses.replace(self, **arrays)

  def stored(self) -> tuple[Settings, Arrays]:
    arrays = {name: getattr(self, name) for name in _ARRAYS}
    settings = {'dtype': self.name, 'transposed': self.transposed}
    return settings, {name: x for name, x in arrays.items() if x is not None}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'Quantized':
    given = Stored(settings, arrays)
    name, transposed = given.text('dtype'), given.flag('transposed')
    found = {x: given.array(x, 2) if x in given else None for x in _ARRAYS}
    given.finish()
    if name not in _DTYPES or found['codes'] is None or found['scales'] is None:
      raise ValueError(f'codes, scales and a dtype are needed, got {name!r:.40}')
    leaf = cls(**found, name=name, transposed=transposed)
    leaf.check()
    return leaf

  def check(self) -> None:
    """Checks how the arrays fit together.

    Raises:
      ValueError: if they do not.
    """
    rows, columns = self.codes.shape
    if self.codes.dtype not in _INTEGERS or not self.codes.size:
      raise ValueError(f'codes must be integers of 8 bits, got {self.codes.dtype}')
    for values, units in (
      (self.scales, self.scale_units),
      (self.offsets, self.offset_units),
    ):
      if values is None:
        if units is not None:
          raise ValueError('there are units without offsets')
        continue
      expected = _INTEGERS if units is not None else (np.dtype(np.float16),)
      if values.dtype not in expected or values.shape != self.scales.shape:
        raise ValueError(f'blocks cannot have {values.dtype} {values.shape}')
      parts = columns
      for array in (values, units):
        if array is None:
          continue
        if array.shape[0] != rows or not array.shape[1] or parts % array.shape[1]:
          raise ValueError(f'{self.codes.shape} codes cannot have {array.shape} blocks')
        parts = array.shape[1]
      if units is not None and units.dtype != np.float16:
        raise ValueError(f'units must be float16, got {units.dtype}')


_ARRAYS = ('codes', 'scales', 'offsets', 'scale_units', 'offset_units')
_INTEGERS = (np.dtype(np.int8), np.dtype(np.uint8))


def _blocks(values: np.ndarray, units: np.ndarray | None, rows: slice) -> np.ndarray:
  """Returns the scales or the offsets of the blocks of some rows, in float32."""
  found: np.ndarray = values[rows].astype(np.float32)
  if units is None:
    return found
  wide = units[rows].astype(np.float32)[..., None]
  return (wide * found.reshape(*wide.shape[:2], -1)).reshape(found.shape)

"""The leaf for an array that a checkpoint stores as quantised codes, in a file only.

Shape letters: a matrix has R rows of C elements. A block is B elements of a row that
follow each other, and a super-block is several blocks.
"""

from collections.abc import Callable
import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from flax import struct
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured.base import Origin
from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import register
from rotbits_jax.structured.fields import Array
from rotbits_jax.structured.fields import static
from rotbits_jax.system import host

_INTEGERS = (np.dtype(np.int8), np.dtype(np.uint8))
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

  type_name: ClassVar[str] = 'quantized'
  origin: ClassVar[Origin] = Origin.FILE

  codes: Annotated[Any, Array(2)]
  scales: Annotated[Any, Array(2)]
  offsets: Annotated[Any, Array(2, optional=True)]
  scale_units: Annotated[Any, Array(2, np.float16, optional=True)]
  offset_units: Annotated[Any, Array(2, np.float16, optional=True)]
  name: Literal['float16', 'bfloat16', 'float32'] = static()
  transposed: bool = static(default=False)

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.codes.shape[::-1] if self.transposed else self.codes.shape)

  @property
  def dtype(self) -> Any:
    return np.dtype(jnp.dtype(self.name))

  @property
  def T(self) -> 'Quantized':  # noqa: N802
    return dataclasses.replace(self, transposed=not self.transposed)

  def materialize(self, *needed: Any) -> Any:
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

  def map_arrays(self, function: Callable[[Any], Any]) -> 'Quantized':
    """Returns the leaf itself, whose codes no function may change."""
    return self

  def astype(self, dtype: Any) -> 'Quantized':
    return dataclasses.replace(self, name=np.dtype(jnp.dtype(dtype)).name)

  def take_rows(self, order: np.ndarray) -> 'Quantized':
    """Returns the leaf of the rows of the matrix in another order."""
    fields = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
    arrays = {k: x[order] for k, x in fields.items() if isinstance(x, np.ndarray)}
    return dataclasses.replace(self, **arrays)

  def check(self) -> None:
    (rows, columns), blocks = self.codes.shape, self.scales.shape
    if self.codes.dtype not in _INTEGERS or not self.codes.size:
      raise ValueError(f'codes must be integers of 8 bits, got {self.codes.dtype}')
    pairs = [(self.scales, self.scale_units)]
    if self.offsets is not None:
      pairs.append((self.offsets, self.offset_units))
    elif self.offset_units is not None:
      raise ValueError('there are units without offsets')
    for values, units in pairs:
      expected = (np.dtype(np.float16),) if units is None else _INTEGERS
      if values.dtype not in expected or values.shape != blocks:
        raise ValueError(f'blocks cannot have {values.dtype} {values.shape}')
      parts = columns
      for array in (values,) if units is None else (values, units):
        if array.shape[0] != rows or not array.shape[1] or parts % array.shape[1]:
          raise ValueError(f'{self.codes.shape} codes cannot have {array.shape} blocks')
        parts = array.shape[1]


def _blocks(values: np.ndarray, units: np.ndarray | None, rows: slice) -> np.ndarray:
  """Returns the scales or the offsets of the blocks of some rows, in float32."""
  found: np.ndarray = values[rows].astype(np.float32)
  if units is None:
    return found
  wide = units[rows].astype(np.float32)[..., None]
  return (wide * found.reshape(*wide.shape[:2], -1)).reshape(found.shape)

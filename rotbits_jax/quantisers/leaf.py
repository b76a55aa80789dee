"""The leaf for an array that was quantised in blocks and dequantised, in files only.

Shape letters: the array is taken as a matrix of R rows and C columns, its last axis.
Blocks have r rows and c columns; those at the end may be cut.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
from typing import Annotated, Any, ClassVar, Literal

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax.quantisers import grids
from rotbits_jax.structured import base
from rotbits_jax.structured import fields
from rotbits_jax.system import host
from rotbits_jax.system import schema

_CHUNK = 1 << 16  # elements that are taken together, so that they fit the cache
LEAST = 2.0**-125  # scale, so that half of it is normal
_E4M3 = grids.GRIDS['float8_e4m3fn'].magnitudes


@base.register
@dataclasses.dataclass(frozen=True)
class BlockQuantized(base.Structured):
  """An array whose elements are numbers of a grid times the scale of their block.

  The product is rounded to float32 and then to the dtype. An int8 counts units of the
  grid; of grids of 4 bits, -16 is -0. A scale is the float32 with the bits
  `scales << shift`; with a factor, it is the factor times the float8_e4m3fn with the
  bits `scales`. The minimum of the block, if there is one, is added to the float32
  product, and the sum is rounded, too. Exceptions replace a few elements.
  """

  type_name: ClassVar[str] = 'block_quantized'
  is_exact: ClassVar[bool] = True
  is_in_files: ClassVar[bool] = True

  numbers: Annotated[Any, fields.Array(None)]  # int8 or bfloat16, of the array's shape
  scales: Annotated[Any, fields.Array('mn')]  # unsigned integers [R / r, C / c]
  grid: grids.Name = fields.static()
  name: Literal['float16', 'bfloat16', 'float32'] = fields.static()  # of the dtype
  block: tuple[fields.Length, ...] = fields.static()  # r and c
  shift: Annotated[int, schema.between(0, 23)] = fields.static(default=0)
  factor: Annotated[Any, fields.Array('', np.float32, optional=True)] = None
  minima: Annotated[Any, fields.Array('mn', np.float32, optional=True)] = None
  # How many elements are before each exception, from the one before it on.
  gaps: Annotated[Any, fields.Array('e', np.uint32, optional=True)] = None
  exceptions: Annotated[Any, fields.Array('e', optional=True)] = None

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.numbers.shape)

  @property
  def dtype(self) -> Any:
    return np.dtype(jnp.dtype(self.name))

  def materialize(self, *needed: Any) -> np.ndarray:
    array = host.empty(self.shape, self.dtype)
    self.write(array)
    return array

  def write(self, out: np.ndarray) -> None:
    """Writes the array, on the host; the numbers may be in the last bytes of `out`."""
    numbers, matrix = (x.reshape(-1, self.shape[-1]) for x in (self.numbers, out))
    unit = grids.GRIDS[self.grid].unit
    scales = self.float_scales * np.float32(unit or 1)
    with np.errstate(over='ignore'):
      for rows in chunks(matrix):
        products = numbers[rows].astype(np.float32)
        if unit and (is_zero := numbers[rows] == grids.NEGATIVE_ZERO).any():
          products *= ~is_zero  # the product of a negative number and 0 is -0
        products *= of_elements(scales, rows, self.block, matrix.shape)
        if self.minima is not None:
          products += of_elements(self.minima, rows, self.block, matrix.shape)
        matrix[rows] = products
    if self.gaps is not None:
      out.reshape(-1)[self._places()] = self.exceptions

  @functools.cached_property
  def float_scales(self) -> np.ndarray:
    """The scales, float32."""
    if self.factor is None:
      return (self.scales.astype(np.uint32) << np.uint32(self.shift)).view(np.float32)
    return _E4M3[self.scales] * self.factor

  def _places(self) -> np.ndarray:
    """Returns the places of the exceptions."""
    return np.cumsum(self.gaps, dtype=np.int64) + np.arange(self.gaps.size)

  def check(self) -> None:
    numbers, scales, shape = self.numbers, self.scales, self.shape
    fits = len(shape) > 1 and numbers.size > 0 and len(self.block) == 2
    fits = fits and scales.dtype in (np.uint8, np.uint16, np.uint32)
    if fits := fits and 0 not in self.block:
      matrix = math.prod(shape[:-1]), shape[-1]
      blocks = tuple(-(-n // m) for n, m in zip(matrix, self.block, strict=True))
      fits = blocks == scales.shape and (self.gaps is None) == (self.exceptions is None)
    if fits and self.gaps is not None:
      fits = self.exceptions.dtype == self.dtype and self._places()[-1] < numbers.size
    if fits and self.factor is not None:
      fits = scales.max() < len(_E4M3)
    if fits:
      with np.errstate(over='ignore', invalid='ignore'):
        floats = self.float_scales
      fits = floats.min() >= LEAST and floats.max() < np.inf  # false if one is NaN
    if fits and self.minima is not None:
      fits = bool(np.isfinite(self.minima).all())
    grid = grids.GRIDS[self.grid]
    if fits and numbers.dtype == np.int8:
      is_small = grid.unit and numbers.min() >= -16 and numbers.max() <= 15
      fits = is_small or self.grid == 'int8'
    elif fits := fits and numbers.dtype == ml_dtypes.bfloat16 and not grid.unit:
      # The greatest bits of positive numbers, and those of negative ones.
      bits = max(int(numbers.view(x).max()) & 0x7FFF for x in (np.int16, np.uint16))
      most = grid.magnitudes[-1:].astype(ml_dtypes.bfloat16)
      fits = bits <= int(most.view(np.int16)[0])
    if not fits:
      raise ValueError(f'what is stored of {self.name} {shape} does not fit together')


def chunks(matrix: np.ndarray) -> list[slice]:
  """Returns runs of rows that fit the cache."""
  step = max(_CHUNK // matrix.shape[1], 1)
  return [slice(start, start + step) for start in range(0, len(matrix), step)]


def of_elements(
  scales: np.ndarray, rows: slice, block: tuple[int, ...], shape: tuple[int, ...]
) -> np.ndarray:
  """Returns the scales of the elements of rows, or one for all columns."""
  some = scales[np.arange(shape[0])[rows] // block[0]]
  if 1 < block[1] < shape[1]:
    some = some.repeat(block[1], axis=1)[:, : shape[1]]
  return some


def form(
  settings: Mapping[str, Any], shape: tuple[int, ...], names: Sequence[str]
) -> str:
  """Returns in words how an array was quantised, as in 'int4, groups of 128'.

  It takes the settings in the manifest, the shape of the array and `names` of arrays.
  """
  name: Any = grids.Name
  grid = schema.load(name, settings.get('grid'), 'grid')
  rows, columns = schema.load(tuple[int, int], settings.get('block'), 'block')
  height, width = shape[-2:]
  if rows >= height:
    blocks = 'a scale a tensor' if columns == width else 'columns'
  elif columns == width:
    blocks = 'rows'
  elif 1 in (rows, columns):
    blocks = f'groups of {rows * columns}'
  else:
    blocks = f'blocks of {rows} x {columns}'
  return f'{grid}, {blocks}' + (', with minima' if 'minima' in names else '')

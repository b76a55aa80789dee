"""The leaf for an array that was quantised in blocks and dequantised, in files only.

Shape letters: the array is taken as a matrix of R rows and C columns, its last axis.
Blocks have r rows and c columns; those at the end may be cut.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import blocks
from rotbits_jax.quantisers import grids
from rotbits_jax.structured import base
from rotbits_jax.structured import fields
from rotbits_jax.system import checksums as checksums_lib
from rotbits_jax.system import host
from rotbits_jax.system import native
from rotbits_jax.system import schema

CHUNK = 1 << 17  # elements that are taken together, so that they fit the cache
LEAST = 2.0**-125  # scale, so that half of it is normal
_LEAST_SIZE = 1 << 20  # elements for which XLA is worth the time to compile
_LARGEST = 1 << 21  # elements of a call of it
_WIDTH = 32  # elements of a row in XLA, which has one or two scales
_LEAST_OF_XLA = 2.0**-80  # scale, so that products and sums are normal

_Base = Annotated[int, schema.between(0, (1 << 32) - 1)]
_Shift = Annotated[int, schema.between(0, 23)]


@base.register
@dataclasses.dataclass(frozen=True)
class BlockQuantized(base.Structured):
  """An array whose elements are numbers of a grid times the scale of their block.

  The product is rounded to float32 and then to the dtype. An int8 counts units of the
  grid, with -0 as a ones' complement. Scales and minima are codes of float32, see
  `decoded`; with a factor, scales are multiplied by it. The minimum of the block, if
  there is one, is added to the float32 product, and the sum is rounded, too. Exceptions
  replace a few elements.
  """

  type_name: ClassVar[str] = 'block_quantized'
  is_exact: ClassVar[bool] = True
  is_in_files: ClassVar[bool] = True

  numbers: Annotated[Any, fields.Array(None)]  # of the array's shape, see `grids`
  scales: Annotated[Any, fields.Array('mn')]  # codes, unsigned [R / r, C / c]
  grid: grids.Name = fields.static()
  name: Literal['float16', 'bfloat16', 'float32'] = fields.static()  # of the dtype
  block: tuple[fields.Length, ...] = fields.static()  # r and c
  scale_form: tuple[_Base, _Shift] = fields.static(default=(0, 0))
  minimum_form: tuple[_Base, _Shift] = fields.static(default=(0, 0))
  ones_complement: bool = fields.static(default=False)  # of numbers, so -1 is -0
  factor: Annotated[Any, fields.Array('', np.float32, optional=True)] = None
  minima: Annotated[Any, fields.Array('mn', optional=True)] = None  # codes, unsigned
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

  @np.errstate(over='ignore')
  def write(self, out: np.ndarray, some: slice = slice(None)) -> int:
    """Writes elements of the array, on the host, and returns the CRC-32 of their bytes.

    A ValueError says that one of their numbers is not of the grid; others may be any.
    """
    on_xla, height, operands = self._operands
    (rows, width), numbers = operands[0].shape, self.numbers.reshape(-1)
    layout, flat = (self.grid, self.dtype, self.ones_complement), out.reshape(-1)
    if not grids.holds(self.grid, numbers[some]):
      raise ValueError(f'numbers of {self.name} {self.shape} are not {self.grid}')
    start, end, _ = some.indices(numbers.size)
    while start < end:
      row = start // width
      stop = min((row + height) * width, end)
      first = min(row, rows - height) if on_xla else row
      part, parts = flat[start:stop], [x[first : first + height] for x in operands]
      if on_xla:
        arrays = [((height, width), f'u{out.itemsize}')]
        bounds = np.array([row - first, -(-stop // width) - first], np.int32)
        _, (bits,) = blocks.run(_on_xla, arrays, layout, bounds, *parts)
        products = bits.view(self.dtype)
      else:
        products = _products(layout, *parts)
      part[...] = products.reshape(-1)[start - first * width :][: part.size]
      if self.gaps is not None:
        few = slice(*np.searchsorted(self._places, [start, stop]))
        part[self._places[few] - start] = self.exceptions[few]
      start = stop
    return checksums_lib.of_array(flat[some])

  @functools.cached_property
  def _operands(self) -> tuple[bool, int, list[np.ndarray]]:
    """Whether XLA multiplies; how many rows at once; numbers, scales and minima."""
    floats, columns, size = [self.float_scales], self.shape[-1], self.numbers.size
    if self.minima is not None:
      floats.append(decoded(self.minima, self.minimum_form))
    # XLA takes subnormal numbers for 0, and time to compile.
    least = floats[0].min()
    for x in floats[1:]:
      least = np.abs(x).min(where=x != 0, initial=least)
    is_even = self.block[1] % (_WIDTH // 2) == columns % _WIDTH == 0
    on_xla = is_even and size >= _LEAST_SIZE and least >= _LEAST_OF_XLA
    on_xla = on_xla and self.dtype != np.float16
    width = _WIDTH if on_xla else columns
    height = (min(1 << size.bit_length() - 1, _LARGEST) if on_xla else CHUNK) // width
    run, rows = math.gcd(self.block[1], width), size // columns
    block, shape = (self.block[0], self.block[1] // run), (rows, columns // run)
    operands = [self.numbers.reshape(-1, width).view(np.uint8)]
    for x in floats:
      runs = np.broadcast_to(of_elements(x, slice(0, rows), block, shape), shape)
      operands.append(runs.reshape(-1, width // run))
    return on_xla, max(height, 1), operands

  @functools.cached_property
  def float_scales(self) -> np.ndarray:
    """The scales, float32."""
    floats = decoded(self.scales, self.scale_form)
    return floats if self.factor is None else floats * self.factor

  @functools.cached_property
  def _places(self) -> np.ndarray:
    """The places of the exceptions."""
    return np.cumsum(self.gaps, dtype=np.int64) + np.arange(self.gaps.size)

  def check(self) -> None:
    numbers, scales, shape = self.numbers, self.scales, self.shape
    fits = len(shape) > 1 and numbers.size > 0 and len(self.block) == 2
    codes = [scales] if self.minima is None else [scales, self.minima]
    fits = fits and all(x.dtype in (np.uint8, np.uint16, np.uint32) for x in codes)
    if fits := fits and 0 not in self.block:
      matrix = math.prod(shape[:-1]), shape[-1]
      blocks = tuple(-(-n // m) for n, m in zip(matrix, self.block, strict=True))
      fits = blocks == scales.shape and (self.gaps is None) == (self.exceptions is None)
    if fits and self.gaps is not None:
      fits = self.exceptions.dtype == self.dtype and self._places[-1] < numbers.size
    if fits:
      with np.errstate(over='ignore', invalid='ignore'):
        floats = self.float_scales
      fits = floats.min() >= LEAST and floats.max() < np.inf  # false if one is NaN
    if fits and self.minima is not None:
      fits = bool(np.isfinite(decoded(self.minima, self.minimum_form)).all())
    if not fits:
      raise ValueError(f'what is stored of {self.name} {shape} does not fit together')


def _products(
  layout: Any, numbers: Any, scales: Any, minima: Any = None, *, no_bits: Any = None
) -> Any:
  """Returns numbers `[n, w]` times scales plus minima, of runs of equal length in w.

  Numbers are uint8. XLA gets `no_bits`, which is 0, and returns bits of the dtype.
  """
  grid, dtype, ones_complement = layout
  xp, unit = np if no_bits is None else jnp, grids.GRIDS[grid].unit
  width = numbers.shape[1]
  whole = lambda x: x if x.shape[1] == 1 else xp.repeat(x, width // x.shape[1], axis=1)
  products = grids.floats(grid, numbers)
  if ones_complement:
    products = xp.copysign(products + (products < 0), products)
  if unit is not None:
    scales = scales * np.float32(unit)
  products *= whole(scales)
  if minima is not None:
    if no_bits is not None:  # XLA would make one operation of two and round once
      products = (products.view(np.uint32) ^ no_bits).view(np.float32)
    products += whole(minima)
  if no_bits is None:
    return products
  bits = products.view(np.uint32)  # XLA rounds slowly, also NaN, and none is NaN
  rounded = (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
  return bits if dtype == np.float32 else rounded


@blocks.compiled
def _on_xla(out: Any, bounds: Any, *operands: Any, layout: Any) -> Any:
  """Writes products into rows of an array, for `blocks.run`.

  XLA runs programs of few operations, a loop counts once, in the thread that calls it.
  """

  def loop(out: Any, bounds: Any, *operands: Any) -> Any:
    def step(i: Any, out: Any) -> Any:
      row = [jax.lax.dynamic_slice_in_dim(x, i, 1) for x in operands]
      bits = _products(layout, *row, no_bits=(bounds[0] >> 31).view(np.uint32))
      return jax.lax.dynamic_update_slice_in_dim(out, bits, i, 0)

    return jax.lax.fori_loop(bounds[0], bounds[1], step, out)

  return (), (native.loop(loop)(*out, bounds, *operands),)


def decoded(codes: np.ndarray, form: tuple[int, int]) -> np.ndarray:
  """Returns the float32 of codes, given the number of code 0 and a shift.

  A number is the bits of a float without as many low ones as the shift.
  """
  base, shift = map(np.uint32, form)
  return (codes.astype(np.uint32) + base << shift).view(np.float32)


def encoded(floats: np.ndarray, shift: int) -> tuple[np.ndarray, tuple[int, int]]:
  """Returns codes of float32 whose low bits are 0, and their form: see `decoded`."""
  numbers: Any = floats.view(np.uint32) >> np.uint32(shift)
  codes = numbers - numbers.min()
  form = int(numbers.min()), shift
  return codes.astype(np.min_scalar_type(int(codes.max()))), form


def of_elements(
  scales: np.ndarray, rows: slice, block: tuple[int, ...], shape: tuple[int, ...]
) -> np.ndarray:
  """Returns the scales of the elements of rows, or one for all columns."""
  some = scales[rows]
  if block[0] > 1:
    some = scales[np.arange(rows.start, min(rows.stop, shape[0])) // block[0]]
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
  if columns == width:
    blocks = 'a scale a tensor' if rows >= height else 'rows'
  elif columns == 1 and rows >= height:
    blocks = 'columns'
  elif 1 in (rows, columns, height):
    blocks = f'groups of {min(rows, height) * columns}'
  else:
    blocks = f'blocks of {rows} x {columns}'
  return f'{grid}, {blocks}' + (', with minima' if 'minima' in names else '')

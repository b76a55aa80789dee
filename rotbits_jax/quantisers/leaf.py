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
import ml_dtypes
import numpy as np

from rotbits_jax.coding import blocks
from rotbits_jax.coding import pool
from rotbits_jax.quantisers import grids
from rotbits_jax.structured import base
from rotbits_jax.structured import fields
from rotbits_jax.system import host
from rotbits_jax.system import schema

CHUNK = 1 << 17  # elements that are taken together, so that they fit the cache
LEAST = 2.0**-125  # scale, so that half of it is normal
_PRODUCTS = 1 << 20  # elements of a call of XLA, which takes time of its own
_WIDTH = 32  # elements of a row of such a call, which has one or two scales
_LEAST_OF_XLA = 2.0**-80  # scale, so that products and sums are normal
_MOST_BITS = (1 << 31) - 1  # of a float32 without its sign

_Base = Annotated[int, schema.between(-_MOST_BITS, _MOST_BITS)]
_Shift = Annotated[int, schema.between(0, 23)]


@base.register
@dataclasses.dataclass(frozen=True)
class BlockQuantized(base.Structured):
  """An array whose elements are numbers of a grid times the scale of their block.

  The product is rounded to float32 and then to the dtype. An int8 counts units of the
  grid; of grids of 4 bits, -16 is -0. Scales and minima are codes of float32, see
  `decoded`; with a factor, scales are multiplied by it. The minimum of the block, if
  there is one, is added to the float32 product, and the sum is rounded, too. Exceptions
  replace a few elements.
  """

  type_name: ClassVar[str] = 'block_quantized'
  is_exact: ClassVar[bool] = True
  is_in_files: ClassVar[bool] = True

  numbers: Annotated[Any, fields.Array(None)]  # int8 or bfloat16, of the array's shape
  scales: Annotated[Any, fields.Array('mn')]  # codes, unsigned [R / r, C / c]
  grid: grids.Name = fields.static()
  name: Literal['float16', 'bfloat16', 'float32'] = fields.static()  # of the dtype
  block: tuple[fields.Length, ...] = fields.static()  # r and c
  scale_form: tuple[_Base, _Shift] = fields.static(default=(0, 0))
  minimum_form: tuple[_Base, _Shift] = fields.static(default=(0, 0))
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

  def write(self, out: np.ndarray) -> None:
    """Writes the array, on the host; the numbers may be in the last bytes of `out`."""
    unit = grids.GRIDS[self.grid].unit
    scales = self.float_scales if unit in (None, 1) else self.float_scales * unit
    minima = np.full_like(scales, -0.0) if self.minima is None else self.float_minima
    zero = np.float32(grids.NEGATIVE_ZERO if unit else np.nan)
    if self._suits_xla(scales, minima):
      self._write_by_xla(out, scales, minima, zero)
    else:
      numbers, matrix = (x.reshape(-1, self.shape[-1]) for x in (self.numbers, out))
      for rows in chunks(matrix):
        products = numbers[rows].astype(np.float32)
        if unit and (is_zero := products == zero).any():
          products *= ~is_zero  # the product of a negative number and 0 is -0
        with np.errstate(over='ignore'):
          products *= of_elements(scales, rows, self.block, matrix.shape)
          if self.minima is not None:
            products += of_elements(minima, rows, self.block, matrix.shape)
          matrix[rows] = products
    if self.gaps is not None:
      out.reshape(-1)[self._places()] = self.exceptions

  def _suits_xla(self, scales: np.ndarray, minima: np.ndarray) -> bool:
    """Returns whether XLA, which takes subnormal numbers for 0, makes the same bits."""
    is_large = self.numbers.size >= _PRODUCTS and self.dtype != np.float16
    is_even = self.block[1] % (_WIDTH // 2) == self.shape[-1] % _WIDTH == 0
    least = np.abs(minima).min(where=minima != 0, initial=scales.min())
    return is_large and is_even and least >= _LEAST_OF_XLA

  def _write_by_xla(self, out: np.ndarray, *operands: Any) -> None:
    """Writes the array, given scales and minima of blocks, and the number for -0."""
    *of_blocks, zero = operands
    run = math.gcd(self.block[1], _WIDTH)
    matrix = math.prod(self.shape[:-1]), self.shape[-1] // run
    block, rows = (self.block[0], self.block[1] // run), slice(0, matrix[0])
    several = [self.numbers.reshape(-1, _WIDTH)]
    for floats in of_blocks:
      runs = np.broadcast_to(of_elements(floats, rows, block, matrix), matrix)
      several.append(runs.reshape(-1, _WIDTH // run))
    elements, step = out.reshape(-1, _WIDTH), _PRODUCTS // _WIDTH

    def write(start: int) -> None:
      parts = [x[start : start + step] for x in several]
      if len(parts[0]) < step:
        parts = [np.resize(x, (step, x.shape[1])) for x in parts]
      products = np.asarray(_products(*parts, zero, np.uint32(0), dtype=out.dtype))
      elements[start : start + step] = products[: len(elements) - start]

    starts = [*range(0, len(elements), step)]
    while starts:  # side by side those whose elements replace no numbers of the others
      count = max((len(starts) - 1) // 2, 1)
      pool.each(write, starts[:count])
      del starts[:count]

  @functools.cached_property
  def float_scales(self) -> np.ndarray:
    """The scales, float32."""
    floats = decoded(self.scales, self.scale_form)
    return floats if self.factor is None else floats * self.factor

  @functools.cached_property
  def float_minima(self) -> np.ndarray:
    """The minima, float32."""
    return decoded(self.minima, self.minimum_form)

  def _places(self) -> np.ndarray:
    """Returns the places of the exceptions."""
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
      fits = self.exceptions.dtype == self.dtype and self._places()[-1] < numbers.size
    if fits:
      with np.errstate(over='ignore', invalid='ignore'):
        floats = self.float_scales
      fits = floats.min() >= LEAST and floats.max() < np.inf  # false if one is NaN
    if fits and self.minima is not None:
      fits = bool(np.isfinite(self.float_minima).all())
    grid = grids.GRIDS[self.grid]
    if fits and numbers.dtype == np.int8:
      is_small = grid.unit and numbers.min() >= -16 and numbers.max() <= 15
      fits = is_small or self.grid == 'int8'
    elif fits := fits and numbers.dtype == ml_dtypes.bfloat16 and not grid.unit:
      bits_of_rows = numbers.view(np.uint16).reshape(matrix)
      bits = max(int((bits_of_rows[x] & 0x7FFF).max()) for x in chunks(bits_of_rows))
      most = grid.magnitudes[-1:].astype(ml_dtypes.bfloat16)
      fits = bits <= int(most.view(np.int16)[0])
    if not fits:
      raise ValueError(f'what is stored of {self.name} {shape} does not fit together')


@functools.partial(jax.jit, static_argnames='dtype', compiler_options=blocks.WIDE)
def _products(
  numbers: Any, scales: Any, minima: Any, zero: Any, no_bits: Any, *, dtype: Any
) -> jax.Array:
  """Returns numbers `[n, 32]` times scales plus minima, `[n, 1]` or `[n, 2]`.

  The number `zero` means -0, and `no_bits` is 0.
  """
  is_first = jnp.arange(numbers.shape[1]) < _WIDTH // 2
  of_runs = lambda x: x if x.shape[1] == 1 else jnp.where(is_first, x[:, :1], x[:, 1:])
  floats = numbers.astype(jnp.float32)
  products = jnp.where(floats == zero, jnp.float32(-0.0), floats) * of_runs(scales)
  # So that XLA does not make one operation of two, which would round once.
  rounded = (products.view(jnp.uint32) ^ no_bits).view(jnp.float32)
  return (rounded + of_runs(minima)).astype(dtype)


def decoded(codes: np.ndarray, form: tuple[int, int]) -> np.ndarray:
  """Returns the float32 of codes, given the number of code 0 and a shift.

  A number n stands for the float with the bits |n| << shift and the sign of n.
  """
  base, shift = form
  is_narrow = codes.itemsize < 4 and abs(base) < 1 << 30
  numbers: Any = codes.astype(np.int32 if is_narrow else np.int64)
  numbers += base
  is_negative = numbers < 0
  np.abs(numbers, out=numbers)
  np.minimum(numbers, _MOST_BITS >> shift, out=numbers)
  numbers <<= shift
  bits = numbers.astype(np.uint32, copy=False)
  bits |= is_negative.astype(np.uint32) << np.uint32(31)
  return bits.view(np.float32)


def encoded(floats: np.ndarray, shift: int) -> tuple[np.ndarray, tuple[int, int]]:
  """Returns codes of float32 whose low bits are 0, and their form: see `decoded`."""
  bits = floats.view(np.int32).astype(np.int64)
  numbers = np.copysign((bits & _MOST_BITS) >> shift, bits).astype(np.int64)
  codes = numbers - numbers.min()
  form = int(numbers.min()), shift
  return codes.astype(np.min_scalar_type(int(codes.max()))), form


def chunks(matrix: np.ndarray) -> list[slice]:
  """Returns runs of rows that fit the cache."""
  step = max(CHUNK // matrix.shape[1], 1)
  return [slice(start, start + step) for start in range(0, len(matrix), step)]


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
  if rows >= height:
    blocks = 'a scale a tensor' if columns == width else 'columns'
  elif columns == width:
    blocks = 'rows'
  elif 1 in (rows, columns):
    blocks = f'groups of {rows * columns}'
  else:
    blocks = f'blocks of {rows} x {columns}'
  return f'{grid}, {blocks}' + (', with minima' if 'minima' in names else '')

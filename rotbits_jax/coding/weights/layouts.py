"""Layouts: how a number divides into a symbol and a rest, one class for each kind.

The symbol is modelled and coded; the rest is stored unchanged. To add a kind, write a
subclass of `Layout` and add it to `KINDS`.

Shape letters: A symbols in the alphabet.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax.coding.weights import floats
from rotbits_jax.coding.weights import integers

DTYPES = {
  np.dtype(d).name: np.dtype(d)
  for d in (
    *(ml_dtypes.bfloat16, np.float16, np.float32, np.float64, np.bool_),
    *(np.int8, np.int16, np.int32, np.int64),
    *(np.uint8, np.uint16, np.uint32, np.uint64),
  )
}
"""The dtypes that can be stored, by name.

Arrays of a dtype for which there is no layout are stored unchanged.
"""


@dataclasses.dataclass(frozen=True)
class Layout(abc.ABC):
  """A way to divide numbers.

  Attributes:
    dtype: dtype of the numbers.
    rest: number of bits of a rest.
    step: a parameter of the kind, such as the floor; 0 if the kind has none. Layouts
      that differ only in the step share their compiled programs.
  """

  dtype: np.dtype
  rest: int
  step: int = 0

  kind: ClassVar[str]

  @property
  def unsigned(self) -> np.dtype:
    """Dtype of the bit patterns of the numbers."""
    return np.dtype(f'u{self.dtype.itemsize}')

  @property
  def program(self) -> Self:
    """The layout with which the programs that this layout uses are compiled."""
    return dataclasses.replace(self, step=min(self.step, 1))

  @property
  @abc.abstractmethod
  def alphabet(self) -> int:
    """A, the number of symbols."""

  @property
  @abc.abstractmethod
  def has_scale(self) -> bool:
    """Whether numbers are distributed around zero, so that lines have scales."""

  @classmethod
  @abc.abstractmethod
  def takes(cls, dtype: np.dtype, rest: int, step: int) -> bool:
    """Returns whether the kind has a layout of this dtype, rest and step."""

  @abc.abstractmethod
  def split(self, bits: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
    """Divides numbers into symbols and rests.

    Args:
      bits: bit patterns of the numbers.
      step: the step of the layout. It may be traced; then `self` is its `program`.

    Returns:
      The symbols, uint16, and the rests, which are as wide as the patterns.
    """

  @abc.abstractmethod
  def join(self, symbols: jax.Array, rests: jax.Array, step: Any) -> jax.Array:
    """Returns the bit patterns: the inverse of `split`.

    Symbols and rests that no number has give any bits, but no error.
    """

  @abc.abstractmethod
  def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the magnitudes for which each symbol stands, as three int64 `[A]`.

    The three are centre, exponent and width. The magnitudes lie around
    centre * 2^exponent, in a cell of width 2^width times a factor that all symbols
    share.
    """


@dataclasses.dataclass(frozen=True)
class Float(Layout):
  """The symbol is the exponent and the top of the mantissa; see `floats`.

  The rest does not contain low bits that are zero in all numbers, because numbers that
  were widened from a shorter dtype end in zeros. The step is the floor minus 1.
  """

  kind: ClassVar[str] = 'float'

  @property
  def alphabet(self) -> int:
    return floats.LAYOUTS[self.dtype].alphabet

  @property
  def has_scale(self) -> bool:
    return True

  @property
  def _zeros(self) -> int:
    return floats.LAYOUTS[self.dtype].rest_bits - self.rest

  @classmethod
  def takes(cls, dtype: np.dtype, rest: int, step: int) -> bool:
    if dtype not in floats.LAYOUTS:
      return False
    layout = floats.LAYOUTS[dtype]
    return 0 <= rest <= layout.rest_bits and 0 <= step < (1 << layout.exponent) - 2

  def split(self, bits: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
    layout = floats.LAYOUTS[self.dtype]
    if self.step:
      bits = floats.raise_floor(bits, layout, step + 1)
    symbols, rests = floats.split_bits(bits, layout)
    return symbols, rests >> self._zeros

  def join(self, symbols: jax.Array, rests: jax.Array, step: Any) -> jax.Array:
    layout = floats.LAYOUTS[self.dtype]
    bits = floats.join_bits(symbols, rests << self._zeros, layout)
    return floats.lower_floor(bits, layout, step + 1) if self.step else bits

  def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    symbols = np.arange(self.alphabet, dtype=np.int64)
    layout = floats.LAYOUTS[self.dtype]
    top = layout.modelled_mantissa
    exponent, mantissa = symbols >> top, symbols & ((1 << top) - 1)
    # Numbers with the exponent 0 have no leading 1, and the spacing of the exponent 1.
    leading = np.where(exponent > 0, 1 << top, 0)
    width = np.maximum(exponent, 1) - (1 << (layout.exponent - 1)) + 1 - top
    width += self.step
    return 2 * (leading + mantissa) + 1, width - 1, width


@dataclasses.dataclass(frozen=True)
class Int(Layout):
  """The symbol is the top bits of the folded integer; see `integers`."""

  kind: ClassVar[str] = 'int'

  @property
  def alphabet(self) -> int:
    return 1 << min(8 * self.dtype.itemsize - self.rest, integers.MODELLED_BITS)

  @property
  def has_scale(self) -> bool:
    return self.dtype.kind == 'i'

  @classmethod
  def takes(cls, dtype: np.dtype, rest: int, step: int) -> bool:
    known = dtype in integers.DTYPES
    return known and 0 <= rest < 8 * dtype.itemsize and step == 0

  def split(self, bits: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
    return integers.split_bits(bits, self.rest, self.has_scale)

  def join(self, symbols: jax.Array, rests: jax.Array, step: Any) -> jax.Array:
    return integers.join_bits(symbols, rests, self.rest, self.dtype)

  def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return integers.cells(self.alphabet, self.rest)


@dataclasses.dataclass(frozen=True)
class Grid(Layout):
  """Floats that are integer multiples of one unit; the integer k has 16 bits.

  The unit is a small integer times a power of two, because each product is then exact:

      value = k (4 + i) 2^(e - 152)        step = 4 e + i, i < 4

  The symbol and the rest are those of k, as in `Int`. This kind suits numbers that have
  few levels. It stores no sign for k = 0, while `Float` stores a sign for every zero.
  Subclasses differ in the size of the alphabet, because a small alphabet decodes
  faster.
  """

  symbol_bits: ClassVar[int]

  # The least positive number of a grid is a normal float32, and the greatest is finite.
  LEAST_STEP: ClassVar[int] = 4 * (152 - 126)
  MOST_STEP: ClassVar[int] = 4 * (152 + 108) + 3

  @property
  def alphabet(self) -> int:
    return 1 << self.symbol_bits

  @property
  def has_scale(self) -> bool:
    return True

  @property
  def program(self) -> Self:
    return dataclasses.replace(self, step=self.LEAST_STEP)

  @property
  def unit(self) -> np.float32:
    return np.ldexp(np.float32(4 + self.step % 4), self.step // 4 - 152)

  @property
  def integers(self) -> Int:
    """The layout of the integers k, which have the symbols and rests of the numbers."""
    return Int(np.dtype(np.int16), self.rest)

  @property
  def integer_dtype(self) -> np.dtype:
    """The shortest dtype that holds every k."""
    return np.dtype(np.int8 if self.symbol_bits + self.rest <= 8 else np.int16)

  def numbers(self, integers: np.ndarray) -> np.ndarray:
    """Returns the numbers of integers k, bit for bit those of `join`."""
    with np.errstate(over='ignore'):  # in a damaged file
      return (integers.astype(np.float32) * self.unit).astype(self.dtype)

  @classmethod
  def takes(cls, dtype: np.dtype, rest: int, step: int) -> bool:
    known = dtype in floats.LAYOUTS and 0 <= rest <= 16 - cls.symbol_bits
    return known and cls.LEAST_STEP <= step <= cls.MOST_STEP

  def split(self, bits: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
    values = jax.lax.bitcast_convert_type(bits, self.dtype).astype(jnp.float32)
    exponent, factor = _unit(step)
    # It multiplies twice, because the inverse of a large power is not a normal float32.
    scaled = values * _power(-(exponent // 2)) * _power(exponent // 2 - exponent)
    # The quotient is an integer up to the rounding error of the division.
    whole = jnp.rint(scaled / factor).astype(jnp.int16)
    symbols, rests = integers.split_bits(
      jax.lax.bitcast_convert_type(whole, jnp.uint16), self.rest, True
    )
    return symbols, rests.astype(self.unsigned)

  def join(self, symbols: jax.Array, rests: jax.Array, step: Any) -> jax.Array:
    bits = integers.join_bits(symbols, rests, self.rest, np.dtype(np.int16))
    whole = jax.lax.bitcast_convert_type(bits, jnp.int16).astype(jnp.float32)
    exponent, factor = _unit(step)
    values = whole * factor * _power(exponent)
    return jax.lax.bitcast_convert_type(values.astype(self.dtype), self.unsigned)

  def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    centre, exponent, width = integers.cells(self.alphabet, self.rest)
    return centre * (4 + self.step % 4), exponent + self.step // 4 - 152, width


def _unit(step: Any) -> tuple[jax.Array, jax.Array]:
  """Returns the exponent, int32, and the factor, float32, of the unit of a grid."""
  step = jnp.asarray(step, jnp.int32)
  return step // 4 - 152, (4 + step % 4).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class SmallGrid(Grid):
  """A grid of 2^8 symbols."""

  kind: ClassVar[str] = 'grid8'
  symbol_bits: ClassVar[int] = 8


@dataclasses.dataclass(frozen=True)
class LargeGrid(Grid):
  """A grid of 2^11 symbols."""

  kind: ClassVar[str] = 'grid11'
  symbol_bits: ClassVar[int] = 11


def _power(exponent: jax.Array) -> jax.Array:
  """Returns 2^exponent, float32, of int32 exponents from -126 to 127."""
  return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


KINDS: dict[str, type[Layout]] = {
  cls.kind: cls for cls in (Float, Int, SmallGrid, LargeGrid)
}
"""The kinds of layouts, by their names in a file."""


def layout(kind: str, dtype: np.dtype, rest: int, step: int) -> Layout:
  """Makes the layout of a kind.

  Raises:
    ValueError: if the kind is unknown, or has no layout of this dtype, rest and step.
  """
  if kind not in KINDS:
    raise ValueError(f'there is no layout of the kind {kind!r}')
  if not KINDS[kind].takes(dtype, rest, step):
    raise ValueError(
      f'the layout {kind!r} of {dtype} cannot have rests of {rest} bits and {step=}'
    )
  return KINDS[kind](dtype, rest, step)


# A grid is used if the scale of the numbers is less than 2^12 steps, because its
# integers have 16 bits and must hold numbers of 8 times the scale. The dtype must also
# be able to represent every multiple of the step near the scale. Otherwise the rests of
# large numbers end in zeros, and the grid stores these zeros.
_GRID_OCTAVES = 12
_BEYOND_OCTAVES = 2

_ABOVE_OCTAVES = 2

# A floor that is further below the scale saves less than 0.03 bits per number.
_FLOOR_OCTAVES = 6

# A symbol of a small grid is at most a quarter of the scale wide, because wider symbols
# lose more than 0.1% of the bits.
_WIDEST_SYMBOL = 2


def of_floats(bits: np.ndarray, dtype: np.dtype) -> Float | Grid:
  """Chooses the layout of floats by the bits that they use.

  Args:
    bits: the bit patterns, unsigned integers `[n]`.
    dtype: dtype of the numbers, in `floats.LAYOUTS`.

  Returns:
    A grid if the numbers are small multiples of a power of two. Otherwise a `Float`
    with the highest floor that the numbers allow; its rest does not contain the low
    bits that are zero in all numbers.
  """
  layout = floats.LAYOUTS[dtype]
  found = floats.survey(bits, layout)
  if not found.count:
    return Float(dtype, int(found.used > 0))
  # log2 of the scale. For a normal distribution the mean of log2 |x| is 0.92 less than
  # log2 of the standard deviation, and the exponent is on average 0.5 less than log2.
  scale = int(found.exponents / found.count + 1.42)
  if not found.negative_zeros:
    grid = _grid(bits, dtype, found, scale)
    if grid is not None:
      return grid
  # The rest is the sign and the low bits of the mantissa.
  low = layout.rest_bits - 1
  used = found.used >> (layout.width - 1) << low | found.used & ((1 << low) - 1)
  zeros = (used & -used).bit_length() - 1 if used else layout.rest_bits
  # Numbers above the floor end in this many zeros, so numbers below it must, too.
  floor = found.lowest + 1 - min(zeros, layout.mantissa)
  # With a higher floor too few symbols would be left for the numbers below it.
  floor = min(floor, scale + _ABOVE_OCTAVES)
  floor = min(floor, (1 << layout.exponent) - 2)  # NaN must stay above the floor
  floor = floor if floor > max(scale - _FLOOR_OCTAVES, 1) else 1
  return Float(dtype, layout.rest_bits - zeros, floor - 1)


def _grid(
  bits: np.ndarray, dtype: np.dtype, found: floats.Survey, scale: int
) -> Grid | None:
  """Returns the grid that suits numbers; None if they have too many levels."""
  layout = floats.LAYOUTS[dtype]
  bias = (1 << layout.exponent - 1) - 1
  # All numbers are multiples of 2^unit, and perhaps of an odd number times 2^unit.
  unit = found.lowest + 1 - bias - layout.mantissa
  octaves = scale - bias - unit
  most = min(_GRID_OCTAVES, layout.mantissa - _BEYOND_OCTAVES)
  greatest = np.array(found.greatest, bits.dtype).view(dtype)
  steps = np.ldexp(np.float64(greatest), -unit)
  if not (octaves < most + 3 and steps < 7 << 15):
    return None
  divisor = floats.divisor(bits, layout, unit)
  octaves -= round(math.log2(divisor))
  largest = int(steps) // divisor
  if not (octaves < most and largest < 1 << 15):
    return None
  # The divisor is written as 4, 5, 6 or 7 times a power of two.
  shift = {1: 2, 3: 1, 5: 0, 7: 0}[divisor]
  step = 4 * (unit - shift + 152) + (divisor << shift) - 4
  for kind in (SmallGrid, LargeGrid):
    rest = integers.least_low(largest, -largest, True, kind.symbol_bits)
    # Folding doubles the numbers.
    fits = rest <= max(octaves + 1 - _WIDEST_SYMBOL, 0) or kind is LargeGrid
    if fits and kind.takes(dtype, rest, step):
      return kind(dtype, rest, step)
  return None

"""How the numbers of an array divide into symbols and rests: one class for each kind.

A layout says which symbol a bit pattern has, which is modelled, and which rest, which
is stored as it is. To add a kind, write a class with the members of `Layout` and name
it in `KINDS`.

Shape letters: A symbols of the alphabet.
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
"""Dtypes that can be stored, by name. Those that a kind of layout takes are modelled,
the others are stored as they are."""


@dataclasses.dataclass(frozen=True)
class Layout(abc.ABC):
  """A division of numbers.

  Attributes:
    dtype: of the numbers.
    rest: bits of a rest.
    step: where the numbers lie, as the kind counts it; 0 where it has no use for it.
      Layouts that differ only here share their compiled programs.
  """

  dtype: np.dtype
  rest: int
  step: int = 0

  kind: ClassVar[str]

  @property
  def unsigned(self) -> np.dtype:
    """The dtype of bit patterns."""
    return np.dtype(f'u{self.dtype.itemsize}')

  @property
  def program(self) -> Self:
    """The layout that stands for all those with the same compiled programs."""
    return dataclasses.replace(self, step=min(self.step, 1))

  @property
  @abc.abstractmethod
  def alphabet(self) -> int:
    """A."""

  @property
  @abc.abstractmethod
  def has_scale(self) -> bool:
    """Whether numbers lie around zero."""

  @classmethod
  @abc.abstractmethod
  def takes(cls, dtype: np.dtype, rest: int, step: int) -> bool:
    """Whether there is such a layout."""

  @abc.abstractmethod
  def split(self, bits: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
    """Divides numbers.

    Args:
      bits: their bit patterns.
      step: of the layout; it may be traced, and then `self` is the `program`.

    Returns:
      Symbols, uint16, and rests, as wide as the patterns.
    """

  @abc.abstractmethod
  def join(self, symbols: jax.Array, rests: jax.Array, step: Any) -> jax.Array:
    """The inverse of `split`; of any symbols and rests, if only something."""

  @abc.abstractmethod
  def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The magnitudes that a symbol stands for: int64 `[A]` each.

    They lie around centre * 2^exponent, in a cell 2^width wide up to a common factor.
    """


@dataclasses.dataclass(frozen=True)
class Float(Layout):
  """Exponent and top of the mantissa are the symbol; see `floats`.

  Numbers that were widened from a shorter dtype end in zeros. The rest leaves out low
  bits that are zero in all numbers. The step is the floor less 1.
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
    # Numbers of exponent 0 have no leading 1 and the spacing of exponent 1.
    leading = np.where(exponent > 0, 1 << top, 0)
    width = np.maximum(exponent, 1) - (1 << (layout.exponent - 1)) + 1 - top
    width += self.step
    return 2 * (leading + mantissa) + 1, width - 1, width


@dataclasses.dataclass(frozen=True)
class Int(Layout):
  """The top bits of the folded integer are the symbol; see `integers`."""

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
  """Floats that are multiples of one number: an integer k of 16 bits times a unit.

  The unit is a small integer times a power of two, so that each product is exact:

      value = k (4 + i) 2^(e - 152)        step = 4 e + i, i < 4

  The symbol and the rest are those of k, as in `Int`. This suits numbers of few levels:
  k = 0 has no sign, while `Float` would store a sign with every zero. Subclasses differ
  in the size of the alphabet, because a small one decodes faster.
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

  @classmethod
  def takes(cls, dtype: np.dtype, rest: int, step: int) -> bool:
    known = dtype in floats.LAYOUTS and 0 <= rest <= 16 - cls.symbol_bits
    return known and cls.LEAST_STEP <= step <= cls.MOST_STEP

  def split(self, bits: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
    values = jax.lax.bitcast_convert_type(bits, self.dtype).astype(jnp.float32)
    exponent, factor = _unit(step)
    # Two powers, because the inverse of a large one is no normal float32.
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
    raise ValueError(f'numbers in a layout of unknown kind, {kind!r}')
  if not KINDS[kind].takes(dtype, rest, step):
    raise ValueError(
      f'no layout {kind!r} of {dtype} has rests of {rest} bits and the step {step}'
    )
  return KINDS[kind](dtype, rest, step)


# A grid is used if the scale of the numbers is less than 2^8 steps. It must also be
# small enough for the dtype to have the grid's step at most numbers, because the rests
# of the others end in zeros, which are stored.
_GRID_OCTAVES = 8
_BEYOND_OCTAVES = 2

_ABOVE_OCTAVES = 2

# A floor further below the scale saves less than 0.03 bits a number.
_FLOOR_OCTAVES = 6

# A symbol of a small grid is at most a quarter of the scale wide, because wider symbols
# lose more than 0.1% of the bits.
_WIDEST_SYMBOL = 2


def of_floats(bits: np.ndarray, dtype: np.dtype) -> Float | Grid:
  """Chooses the layout of floats from the bits that they use.

  Args:
    bits: the bit patterns, unsigned integers `[n]`.
    dtype: dtype of the numbers, in `floats.LAYOUTS`.

  Returns:
    A grid where the numbers are small multiples of a power of two; else a `Float` with
    the highest floor that the numbers allow and without the low bits that are zero in
    all numbers.
  """
  layout = floats.LAYOUTS[dtype]
  found = floats.survey(bits, layout)
  if not found.count:
    return Float(dtype, int(found.used > 0))
  # log2 of the scale. The mean of log2 |x| of a normal distribution is 0.92 below that
  # of its standard deviation, and an exponent is another 0.5 below on average.
  scale = int(found.exponents / found.count + 1.42)
  if not found.negative_zeros:
    grid = _grid(bits, dtype, found, scale)
    if grid is not None:
      return grid
  # The rest is the sign and the low bits of the mantissa.
  low = layout.rest_bits - 1
  used = found.used >> (layout.width - 1) << low | found.used & ((1 << low) - 1)
  zeros = (used & -used).bit_length() - 1 if used else layout.rest_bits
  # A number above the floor ends in this many zeros, so a number below it must, too.
  floor = found.lowest + 1 - min(zeros, layout.mantissa)
  # A higher floor would leave too few symbols to the numbers below it.
  floor = min(floor, scale + _ABOVE_OCTAVES)
  floor = min(floor, (1 << layout.exponent) - 2)  # the exponents of NaN are above it
  floor = floor if floor > max(scale - _FLOOR_OCTAVES, 1) else 1
  return Float(dtype, layout.rest_bits - zeros, floor - 1)


def _grid(
  bits: np.ndarray, dtype: np.dtype, found: floats.Survey, scale: int
) -> Grid | None:
  """Returns the grid that suits numbers; None if they have too many levels."""
  layout = floats.LAYOUTS[dtype]
  bias = (1 << layout.exponent - 1) - 1
  # All numbers are multiples of 2^unit, and perhaps of an odd number times that.
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
  # 1, 3, 5 and 7 as 4, 5, 6 or 7 times a power of two.
  shift = {1: 2, 3: 1, 5: 0, 7: 0}[divisor]
  step = 4 * (unit - shift + 152) + (divisor << shift) - 4
  for kind in (SmallGrid, LargeGrid):
    rest = integers.least_low(largest, -largest, True, kind.symbol_bits)
    # Folding doubles the numbers.
    fits = rest <= max(octaves + 1 - _WIDEST_SYMBOL, 0) or kind is LargeGrid
    if fits and kind.takes(dtype, rest, step):
      return kind(dtype, rest, step)
  return None

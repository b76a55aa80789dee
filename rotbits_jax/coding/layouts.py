r"""Layouts: how the bits of an element divide into a symbol and raw bits.

The symbol is worth modelling and is coded; the raw bits are noise and are stored as
they are. A layout belongs to one dtype; it is one of three types.

**Floats.** The bits of a float, from the top, are its sign, its exponent and its
mantissa. In trained weights only the exponent and the first bits of the mantissa are
predictable.

    bits     = [ sign | exponent e | mantissa m ]
    symbol   = [ exponent e | top t of the mantissa ]        t = min(3, m)
    raw bits = [ sign | low m - t of the mantissa ]

The raw bits do not contain low bits that are zero in all elements, because elements
that were widened from a shorter dtype end in zeros.

Elements may be rounded so that all small ones share one step. In IEEE 754 the exponents
0 and 1 share a step. The *minimum exponent* f is the greatest exponent that shares the
step of all exponents below it, so that of IEEE 754 itself is 1. A magnitude is
[ exponent | mantissa ]. With a minimum exponent f it is replaced by

    magnitude - (f - 1) 2^m                  if its exponent is at least f,
    the value divided by the step            otherwise.

The second line is an integer. Both lines give the same result for the exponent f,
because IEEE 754 defines subnormal numbers in this way. Exponents are biased, as they
are in the bits.

**Integers.** Signed integers are folded first: 0, -1, 1, -2, ... become 0, 1, 2, 3, ...
Then small magnitudes have small symbols. For the folded integer n and r raw bits,

    symbol = n >> r          raw bits = n & (2^r - 1)

**Differences.** The frequency table of an element tells how many raw bits it has, its
shift s. For an integer x with -2^(s + 7) <= x < 2^(s + 7),

    n = x + 2^(s + 7)        symbol = n >> s         raw bits = n & (2^s - 1)

The raw bits of an element are cut into *pieces*, from the lowest bit on: as many of 8
bits as there are, then one of 4, of 2 and of 1 where they are needed.

To add a type, write a subclass of `Layout` and add it to `TYPES`. Shape letters: A
symbols in the alphabet.
"""

import abc
import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax.system import native

MOST_SHIFT = 24
"""The greatest shift of a table."""


class Piece(NamedTuple):
  """Raw bits that elements have in the same place, or behind their pieces of 8 bits.

  Attributes:
    width: 8, 4, 2 or 1 bits.
    place: the lowest bit of a piece of 8 bits; that of others depends on the shift.
  """

  width: int
  place: int = 0

  def is_in(self, shift: Any) -> Any:
    """Returns whether elements with so many raw bits have the piece."""
    return shift >= self.place + 8 if self.width == 8 else shift & self.width > 0

  def low(self, shift: Any) -> Any:
    """Returns the lowest bit of the piece in elements with so many raw bits."""
    return self.place if self.width == 8 else shift & (256 - 2 * self.width)


@dataclasses.dataclass(frozen=True)
class Layout(abc.ABC):
  """A way to divide elements.

  Attributes:
    dtype: dtype of the elements.
    raw_bits: number of raw bits of an element; the greatest one of differences.
    min_exponent: the minimum exponent of floats; 1 for others.
  """

  dtype: np.dtype
  raw_bits: int
  min_exponent: int = 1

  type_name: ClassVar[str]

  @property
  def unsigned(self) -> np.dtype:
    """Dtype of the bit patterns of the elements."""
    return np.dtype(f'u{self.dtype.itemsize}')

  @property
  def first(self) -> int:
    """The bit pattern of an element without raw bits whose symbol is 0."""
    return 0

  @property
  def program(self) -> Self:
    """The layout with which the programs that this layout uses are compiled."""
    return dataclasses.replace(self, min_exponent=min(self.min_exponent, 2))

  @property
  def pieces(self) -> tuple[Piece, ...]:
    """The pieces of raw bits that an element has or may have."""
    whole = tuple(Piece(8, place) for place in range(0, self.raw_bits & ~7, 8))
    return whole + tuple(Piece(width) for width in (4, 2, 1) if self.raw_bits & width)

  @property
  @abc.abstractmethod
  def alphabet(self) -> int:
    """A, the number of symbols; at most 2^14."""

  @property
  @abc.abstractmethod
  def has_scale(self) -> bool:
    """Whether elements are distributed around zero, so that rows have scales."""

  @abc.abstractmethod
  def is_valid(self) -> bool:
    """Returns whether the type has a layout of these attributes."""

  def symbols(self, bits: jax.Array, min_exponent: Any, shift: Any) -> jax.Array:
    """Returns the symbols of `split`, uint16; `shift` may be traced."""
    return self.split(bits, min_exponent, shift)[0]

  @abc.abstractmethod
  def split(
    self, bits: jax.Array, min_exponent: Any, shift: Any
  ) -> tuple[jax.Array, jax.Array]:
    """Divides elements into symbols and raw bits.

    Args:
      bits: bit patterns of the elements.
      min_exponent: the attribute, which may be traced, so that layouts share programs.
        Then that of `self` only tells whether it is 1.
      shift: the number of raw bits; an array for differences.

    Returns:
      The symbols, uint16, and the raw bits.
    """

  @abc.abstractmethod
  def join(
    self, symbols: jax.Array, raw: jax.Array, min_exponent: Any, shift: Any
  ) -> jax.Array:
    """Returns the bit patterns: the inverse of `split`.

    Symbols and raw bits that no element has give any bits, but no error.
    """

  def cells(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the magnitudes for which the first symbols stand, as three int64 arrays.

    The three are centre, exponent and width. The magnitudes lie around
    centre * 2^exponent, in a cell of width 2^width times a factor that all symbols
    share. Of neighbours that share exponent and width, no centre is less than the one
    before.

    Args:
      count: number of symbols.
    """
    raise NotImplementedError


class Format(NamedTuple):
  """How many bits of a dtype the exponent and the mantissa have."""

  width: int
  exponent: int
  mantissa: int

  @property
  def bias(self) -> int:
    return (1 << self.exponent - 1) - 1


FORMATS = {
  np.dtype(np.float16): Format(width=16, exponent=5, mantissa=10),
  np.dtype(ml_dtypes.bfloat16): Format(width=16, exponent=8, mantissa=7),
  np.dtype(np.float32): Format(width=32, exponent=8, mantissa=23),
}
"""The dtypes of `Float`."""

_MODELLED_MANTISSA_BITS = 3


@dataclasses.dataclass(frozen=True)
class Float(Layout):
  """The symbol is the exponent and the top of the mantissa."""

  type_name: ClassVar[str] = 'float'

  @property
  def format(self) -> Format:
    return FORMATS[self.dtype]

  @property
  def _low(self) -> int:
    """The number of bits below the symbol."""
    return self.format.mantissa - _MODELLED_MANTISSA_BITS

  @property
  def most_raw_bits(self) -> int:
    return self._low + 1

  @property
  def alphabet(self) -> int:
    return 1 << self.format.exponent + _MODELLED_MANTISSA_BITS

  @property
  def has_scale(self) -> bool:
    return True

  def is_valid(self) -> bool:
    return (
      self.dtype in FORMATS
      and 0 <= self.raw_bits <= self.most_raw_bits
      and 1 <= self.min_exponent < (1 << self.format.exponent) - 1
    )

  def symbols(self, bits: jax.Array, min_exponent: Any, shift: Any) -> jax.Array:
    # Raw bits that nobody needs would make the compiler of JAX 0.10 abort.
    mask = bits.dtype.type(self.alphabet - 1)
    return (self._raised(bits, min_exponent) >> self._low & mask).astype(jnp.uint16)

  def _raised(self, bits: jax.Array, min_exponent: Any) -> jax.Array:
    """Returns the patterns with the minimum exponent as their least."""
    return raised(bits, self.format, min_exponent) if self.min_exponent > 1 else bits

  def split(
    self, bits: jax.Array, min_exponent: Any, shift: Any
  ) -> tuple[jax.Array, jax.Array]:
    kind, low = bits.dtype.type, self._low
    symbols, bits = (
      self.symbols(bits, min_exponent, shift),
      self._raised(bits, min_exponent),
    )
    raw = bits >> self.format.width - 1 << low | bits & kind((1 << low) - 1)
    return symbols, raw >> self.most_raw_bits - shift

  def join(
    self, symbols: jax.Array, raw: jax.Array, min_exponent: Any, shift: Any
  ) -> jax.Array:
    kind, low = self.unsigned.type, self._low
    raw = raw << self.most_raw_bits - shift
    sign = raw >> low << self.format.width - 1
    bits = sign | symbols.astype(self.unsigned) << low | raw & kind((1 << low) - 1)
    if self.min_exponent > 1:
      bits = lowered(bits, self.format, min_exponent)
    return bits

  def cells(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    symbols, top = np.arange(count, dtype=np.int64), _MODELLED_MANTISSA_BITS
    exponent, mantissa = symbols >> top, symbols & ((1 << top) - 1)
    # Numbers with the exponent 0 have no leading 1, and the spacing of the exponent 1.
    leading = np.where(exponent > 0, 1 << top, 0)
    width = np.maximum(exponent, 1) - self.format.bias - top + self.min_exponent - 1
    return 2 * (leading + mantissa) + 1, width - 1, width


def raised(bits: jax.Array, form: Format, min_exponent: Any) -> jax.Array:
  """Replaces the magnitudes in bit patterns by those of a minimum exponent.

  Args:
    bits: unsigned integers as wide as the elements. Elements with a lower exponent must
      be multiples of the step of the minimum exponent.
    form: format of the dtype.
    min_exponent: f, an integer of at least 1; it may be traced. 1 changes nothing.

  Returns:
    Unsigned integers of the same shape and width.
  """
  kind, top = bits.dtype.type, form.mantissa
  magnitude = bits & kind((1 << form.width - 1) - 1)
  least = jnp.asarray(min_exponent).astype(bits.dtype)
  exponent = jnp.maximum(magnitude >> top, kind(1))
  shift = jnp.where(exponent < least, least - exponent, kind(0))
  leading = (magnitude >> top > 0).astype(bits.dtype) << top
  significand = magnitude & kind((1 << top) - 1) | leading
  steps = significand >> jnp.minimum(shift, kind(form.width - 1))
  return bits - magnitude | jnp.where(
    shift > 0, steps, magnitude - (least - kind(1) << top)
  )


def lowered(bits: jax.Array, form: Format, min_exponent: Any) -> jax.Array:
  """Restores the magnitudes: the inverse of `raised`."""
  kind, top = bits.dtype.type, form.mantissa
  magnitude = bits & kind((1 << form.width - 1) - 1)
  least = jnp.asarray(min_exponent).astype(jnp.int32)
  # A float32 holds an integer below 2^24 exactly, and its bits tell the exponent.
  wide = jax.lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32)
  below = least - jnp.int32(127 + top)
  normal = ((wide >> (23 - top)) + (below << top)).astype(bits.dtype)
  subnormal = magnitude << jnp.clip(least - 1, 0, form.width - 1).astype(bits.dtype)
  small = jnp.where((wide >> 23) + below >= 1, normal, subnormal)
  small = jnp.where(magnitude > 0, small, kind(0))
  large = magnitude + ((least - 1) << top).astype(bits.dtype)
  return bits - magnitude | jnp.where(magnitude >> top > 0, large, small)


MOST_SYMBOL_BITS = 14  # a frequency table has as many slots


@dataclasses.dataclass(frozen=True)
class Int(Layout):
  """The symbol is the top of the folded integer."""

  type_name: ClassVar[str] = 'int'

  @property
  def alphabet(self) -> int:
    return 1 << min(8 * self.dtype.itemsize - self.raw_bits, MOST_SYMBOL_BITS)

  @property
  def has_scale(self) -> bool:
    return self.dtype.kind == 'i'

  def is_valid(self) -> bool:
    known = self.dtype.kind in 'iu' and self.dtype.itemsize <= 4
    return (
      known and 0 <= self.raw_bits < 8 * self.dtype.itemsize and self.min_exponent == 1
    )

  def symbols(self, bits: jax.Array, min_exponent: Any, shift: Any) -> jax.Array:
    del min_exponent
    # Wider elements are shifted by a traced number faster.
    return (self._folded(bits).astype(jnp.uint32) >> shift).astype(jnp.uint16)

  def split(
    self, bits: jax.Array, min_exponent: Any, shift: Any
  ) -> tuple[jax.Array, jax.Array]:
    raw = self._folded(bits) & bits.dtype.type((1 << shift) - 1)
    return self.symbols(bits, min_exponent, shift), raw

  def _folded(self, bits: jax.Array) -> jax.Array:
    if not self.has_scale:
      return bits
    sign = bits >> (8 * bits.dtype.itemsize - 1)
    return (bits << 1) ^ (bits.dtype.type(0) - sign)

  def join(
    self, symbols: jax.Array, raw: jax.Array, min_exponent: Any, shift: Any
  ) -> jax.Array:
    folded = symbols.astype(self.unsigned) << shift | raw
    if not self.has_scale:
      return folded
    kind = self.unsigned.type
    return (folded >> 1) ^ (kind(0) - (folded & kind(1)))

  def cells(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    symbols = np.arange(count, dtype=np.int64)
    zeros = np.zeros_like(symbols)
    if self.raw_bits:
      return 2 * symbols + 1, zeros + self.raw_bits - 2, zeros
    return (symbols + 1) // 2, zeros, zeros


@dataclasses.dataclass(frozen=True)
class Difference(Layout):
  """The symbol is the top of a signed integer that each table shifts differently."""

  type_name: ClassVar[str] = 'difference'

  @property
  def first(self) -> int:
    return (1 << 8 * self.dtype.itemsize) - (1 << 7)

  @property
  def program(self) -> Self:
    return dataclasses.replace(self, raw_bits=self.raw_bits | 7)

  @property
  def pieces(self) -> tuple[Piece, ...]:
    whole = tuple(Piece(8, place) for place in range(0, self.raw_bits & ~7, 8))
    return (*whole, Piece(4), Piece(2), Piece(1))

  @property
  def alphabet(self) -> int:
    return 256

  @property
  def has_scale(self) -> bool:
    return False

  def is_valid(self) -> bool:
    known = self.dtype.kind == 'i' and self.dtype.itemsize <= 4
    return known and 0 <= self.raw_bits <= MOST_SHIFT and self.min_exponent == 1

  def split(
    self, bits: jax.Array, min_exponent: Any, shift: Any
  ) -> tuple[jax.Array, jax.Array]:
    del min_exponent
    shift = jnp.asarray(shift, jnp.uint32)
    signed = bits.view(self.dtype).astype(jnp.int32).view(jnp.uint32)
    numbers = signed + (jnp.uint32(1 << 7) << shift)
    raw = numbers & (jnp.uint32(1) << shift) - jnp.uint32(1)
    return (numbers >> shift & jnp.uint32(255)).astype(jnp.uint16), raw

  def join(
    self, symbols: jax.Array, raw: jax.Array, min_exponent: Any, shift: Any
  ) -> jax.Array:
    del min_exponent
    shift = jnp.asarray(shift, jnp.uint32)
    numbers = symbols.astype(jnp.uint32) << shift | raw.astype(jnp.uint32)
    return (numbers - (jnp.uint32(1 << 7) << shift)).astype(self.unsigned)


TYPES: dict[str, type[Layout]] = {x.type_name: x for x in (Float, Int, Difference)}
"""The types of layouts, by their names in a file."""


# ---- programs ------------------------------------------------------------------------

_STEP = 1 << 12  # elements that one step splits or joins


class Shifts(NamedTuple):
  """The shifts of elements whose tables have different ones.

  Attributes:
    contexts: uint8 `[n]`, the table of each element.
    of_tables: uint8 `[256]`.
  """

  contexts: Any
  of_tables: Any

  def at(self, start: jax.Array, size: int) -> jax.Array:
    contexts = jax.lax.dynamic_slice(self.contexts, (start,), (size,))
    shifts = self.of_tables.at[contexts].get(mode='promise_in_bounds')
    return shifts.astype(jnp.uint32)


@functools.partial(jax.jit, static_argnames='layout', donate_argnums=0)
def split(
  out: tuple[jax.Array, ...],
  bits: jax.Array,
  shifts: Shifts | None,
  min_exponent: jax.Array,
  count: jax.Array,
  *,
  layout: Layout,
) -> tuple[jax.Array, ...]:
  """Divides elements into symbols, uint16, and pieces of raw bits, uint8.

  Args:
    out: arrays `[n]` like the results, whose memory these get.
    bits: the bit patterns, unsigned integers `[n]`.
    shifts: those of differences; None if all have `layout.raw_bits`.
    min_exponent: that of the layout.
    count: how many elements are wanted, the first ones; int32.
    layout: the program of the layout.

  Returns:
    The symbols, and each of `layout.pieces`.
  """

  def loop(out: Any, bits: Any, shifts: Any, min_exponent: Any, count: Any) -> Any:
    size = math.gcd(bits.size, _STEP)

    def step(i: jax.Array, out: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      shift = layout.raw_bits if shifts is None else shifts.at(i * size, size)
      elements = jax.lax.dynamic_slice(bits, (i * size,), (size,))
      symbols, raw = layout.split(elements, min_exponent, shift)
      pieces = [
        (raw >> x.low(shift)).astype(jnp.uint8) & jnp.uint8((1 << x.width) - 1)
        for x in layout.pieces
      ]
      put = lambda x, result: jax.lax.dynamic_update_slice(x, result, (i * size,))
      return tuple(map(put, out, (symbols, *pieces)))

    return jax.lax.fori_loop(0, -(-count // size), step, out)

  # On one thread, because the others have blocks of their own.
  divided: tuple[jax.Array, ...] = native.loop(loop)(
    out, bits, shifts, min_exponent, count
  )
  return divided


@functools.partial(jax.jit, static_argnames='layout', donate_argnums=0)
def join(
  out: jax.Array,
  symbols: jax.Array,
  pieces: tuple[jax.Array, ...],
  shifts: Shifts | None,
  min_exponent: jax.Array,
  count: jax.Array,
  *,
  layout: Layout,
) -> jax.Array:
  """Returns the bit patterns of elements: the inverse of `split`, with its arguments.

  The result gets the memory of `out`, unsigned integers `[n]`. A piece that an element
  does not have is 0.
  """

  def loop(
    out: Any, symbols: Any, pieces: Any, shifts: Any, min_exponent: Any, count: Any
  ) -> Any:
    size = math.gcd(out.size, _STEP)
    some = lambda x, i: jax.lax.dynamic_slice(x, (i * size,), (size,))
    wide = layout.unsigned if shifts is None else jnp.uint32

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
      shift = layout.raw_bits if shifts is None else shifts.at(i * size, size)
      raw = jnp.zeros(size, wide)
      for x, piece in zip(layout.pieces, pieces, strict=True):
        raw = raw | some(piece, i).astype(wide) << x.low(shift)
      bits = layout.join(some(symbols, i), raw, min_exponent, shift)
      return jax.lax.dynamic_update_slice(out, bits, (i * size,))

    return jax.lax.fori_loop(0, -(-count // size), step, out)

  joined: jax.Array = native.loop(loop)(
    out, symbols, pieces, shifts, min_exponent, count
  )
  return joined

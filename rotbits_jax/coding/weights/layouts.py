r"""Layouts: how the bits of an element divide into a symbol and raw bits.

The symbol is worth modelling and is coded; the raw bits are noise and are stored as
they are. A layout belongs to one dtype; it is one of two types.

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


@dataclasses.dataclass(frozen=True)
class Layout(abc.ABC):
  """A way to divide elements.

  Attributes:
    dtype: dtype of the elements.
    raw_bits: number of raw bits of an element.
    min_exponent: the minimum exponent of floats; 1 for integers.
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
  def program(self) -> Self:
    """The layout with which the programs that this layout uses are compiled."""
    return dataclasses.replace(self, min_exponent=min(self.min_exponent, 2))

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

  @abc.abstractmethod
  def symbols(self, bits: jax.Array, min_exponent: Any, raw_bits: Any) -> jax.Array:
    """Returns the symbols of `split`, uint16; both attributes may be traced."""

  @abc.abstractmethod
  def split(self, bits: jax.Array, min_exponent: Any) -> tuple[jax.Array, jax.Array]:
    """Divides elements into symbols and raw bits.

    Args:
      bits: bit patterns of the elements.
      min_exponent: the attribute, which may be traced, so that layouts share programs.
        Then that of `self` only tells whether it is 1.

    Returns:
      The symbols, uint16, and the raw bits, which are as wide as the patterns.
    """

  @abc.abstractmethod
  def join(self, symbols: jax.Array, raw: jax.Array, min_exponent: Any) -> jax.Array:
    """Returns the bit patterns: the inverse of `split`.

    Symbols and raw bits that no element has give any bits, but no error.
    """

  @abc.abstractmethod
  def cells(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the magnitudes for which the first symbols stand, as three int64 arrays.

    The three are centre, exponent and width. The magnitudes lie around
    centre * 2^exponent, in a cell of width 2^width times a factor that all symbols
    share. Of neighbours that share exponent and width, no centre is less than the one
    before.

    Args:
      count: number of symbols.
    """


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

  def symbols(self, bits: jax.Array, min_exponent: Any, raw_bits: Any) -> jax.Array:
    del raw_bits  # they leave out low bits, which no symbol has
    bits = self._raised(bits, min_exponent)
    return (bits >> self._low & bits.dtype.type(self.alphabet - 1)).astype(jnp.uint16)

  def split(self, bits: jax.Array, min_exponent: Any) -> tuple[jax.Array, jax.Array]:
    symbols = self.symbols(bits, min_exponent, self.raw_bits)
    bits, low = self._raised(bits, min_exponent), self._low
    raw = bits >> self.format.width - 1 << low | bits & bits.dtype.type((1 << low) - 1)
    return symbols, raw >> self.most_raw_bits - self.raw_bits

  def _raised(self, bits: jax.Array, min_exponent: Any) -> jax.Array:
    return raised(bits, self.format, min_exponent) if self.min_exponent > 1 else bits

  def join(self, symbols: jax.Array, raw: jax.Array, min_exponent: Any) -> jax.Array:
    kind, low = self.unsigned.type, self._low
    raw = raw << self.most_raw_bits - self.raw_bits
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


_MOST_SYMBOL_BITS = 14  # a frequency table has as many slots


@dataclasses.dataclass(frozen=True)
class Int(Layout):
  """The symbol is the top of the folded integer."""

  type_name: ClassVar[str] = 'int'

  @property
  def alphabet(self) -> int:
    return 1 << min(8 * self.dtype.itemsize - self.raw_bits, _MOST_SYMBOL_BITS)

  @property
  def has_scale(self) -> bool:
    return self.dtype.kind == 'i'

  def is_valid(self) -> bool:
    known = self.dtype.kind in 'iu' and self.dtype.itemsize <= 4
    return (
      known and 0 <= self.raw_bits < 8 * self.dtype.itemsize and self.min_exponent == 1
    )

  def symbols(self, bits: jax.Array, min_exponent: Any, raw_bits: Any) -> jax.Array:
    del min_exponent
    # Wider elements are shifted by a traced number faster.
    return (self._folded(bits).astype(jnp.uint32) >> raw_bits).astype(jnp.uint16)

  def split(self, bits: jax.Array, min_exponent: Any) -> tuple[jax.Array, jax.Array]:
    raw = self._folded(bits) & bits.dtype.type((1 << self.raw_bits) - 1)
    return self.symbols(bits, min_exponent, self.raw_bits), raw

  def _folded(self, bits: jax.Array) -> jax.Array:
    if not self.has_scale:
      return bits
    sign = bits >> (8 * bits.dtype.itemsize - 1)
    return (bits << 1) ^ (bits.dtype.type(0) - sign)

  def join(self, symbols: jax.Array, raw: jax.Array, min_exponent: Any) -> jax.Array:
    folded = symbols.astype(self.unsigned) << self.raw_bits | raw
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


TYPES: dict[str, type[Layout]] = {cls.type_name: cls for cls in (Float, Int)}
"""The types of layouts, by their names in a file."""


# ---- the choice of a layout ----------------------------------------------------------

# A minimum exponent that is further below the scale saves less than 0.03 bits.
_MOST_BELOW = 6
_MOST_ABOVE = 2

_CHUNK = 1 << 16  # elements that are looked at at once, so that they fit the cache
_RUNS = 4  # of elements, of which a sample consists


class Survey(NamedTuple):
  """Properties of some floats.

  Attributes:
    used: the union of their bit patterns.
    greatest: the greatest of their magnitudes.
    lowest: an exponent. All elements are multiples of the step that the minimum
      exponent `lowest + 1` has, and not of a coarser one; it may be negative or large.
    scale: about log2 of their standard deviation, biased as exponents are.
    negative_zeros: whether an element is -0.
  """

  used: int
  greatest: int
  lowest: int
  scale: int
  negative_zeros: bool


def survey(bits: np.ndarray, form: Format) -> Survey | None:
  """Looks at the bit patterns of elements, not empty; None if all elements are 0."""
  used = greatest = exponents = count = 0
  lowest, negative_zeros = 1 << 30, False
  for start in range(0, bits.size, _CHUNK):
    part = bits[start : start + _CHUNK]
    used |= _union(part)
    magnitude = part & part.dtype.type((1 << form.width - 1) - 1)
    present = magnitude > 0
    if not present.all():
      negative_zeros = negative_zeros or bool(part[~present].any())
      magnitude = magnitude[present]
    if not magnitude.size:
      continue
    greatest = max(greatest, int(magnitude.max()))
    exponent = np.maximum(magnitude >> form.mantissa, 1).astype(np.int32)
    significand = magnitude & magnitude.dtype.type((1 << form.mantissa) - 1)
    significand |= (magnitude >> form.mantissa > 0).astype(part.dtype) << form.mantissa
    # A float32 holds a power of two exactly, and its bits tell the exponent.
    lowest_bit = (significand & -significand).astype(np.float32).view(np.int32) >> 23
    lowest = min(lowest, int((exponent + lowest_bit).min()) - 128)
    exponents += int(exponent.sum())
    count += magnitude.size
  if not count:
    return None
  # For a normal distribution the mean of log2 |x| is 0.92 less than log2 of the
  # standard deviation, and the exponent is on average 0.5 less than log2.
  scale = int(exponents / count + 1.42)
  return Survey(used, greatest, lowest, scale, negative_zeros)


def _union(bits: np.ndarray) -> int:
  return int(np.bitwise_or.reduce(bits))  # type: ignore[call-overload]


def of_floats(bits: np.ndarray, dtype: np.dtype) -> tuple[Float, Survey | None]:
  """Chooses the layout of floats by the bits that they use.

  Args:
    bits: the bit patterns, unsigned integers `[n]`.
    dtype: dtype of the elements, in `FORMATS`.

  Returns:
    The layout, with the highest minimum exponent that the elements allow and without
    low bits that are zero in all of them; and a survey of the elements. If the layout
    has no such property, the survey is one of a sample.
  """
  form = FORMATS[dtype]
  # With more elements `used` only grows and `lowest` only falls.
  for run in (_CHUNK >> 4, _CHUNK >> 2, _CHUNK, bits.size):
    part = bits
    if _RUNS * run < bits.size:
      starts = np.linspace(0, bits.size - run, _RUNS).astype(int)
      part = np.concatenate([bits[start : start + run] for start in starts])
    found = survey(part, form)
    layout = _layout(found, _union(part), dtype)
    if part is bits or layout == Float(dtype, layout.most_raw_bits):
      break
  return layout, found


def _layout(found: Survey | None, used: int, dtype: np.dtype) -> Float:
  if found is None:
    return Float(dtype, int(used > 0))
  form, most = FORMATS[dtype], Float(dtype, 0).most_raw_bits
  # The raw bits are the sign and the low bits of the mantissa.
  low = found.used >> (form.width - 1) << most - 1 | found.used & ((1 << most - 1) - 1)
  zeros = (low & -low).bit_length() - 1 if low else most
  # Elements above the minimum exponent end in this many zeros, so those below must.
  least = found.lowest + 1 - min(zeros, form.mantissa)
  # With a higher one too few symbols would be left for the elements below it.
  least = min(least, found.scale + _MOST_ABOVE)
  least = min(least, (1 << form.exponent) - 2)  # NaN must stay above it
  least = least if least > max(found.scale - _MOST_BELOW, 1) else 1
  return Float(dtype, most - zeros, least)


def most_folded(array: np.ndarray) -> int:
  """Returns the greatest of some integers, not empty, after folding."""
  largest, least = int(array.max()), int(array.min())
  return max(2 * largest, -2 * least - 1) if array.dtype.kind == 'i' else largest


def least_raw_bits(array: np.ndarray) -> int:
  """Returns the fewest raw bits that a layout of some integers, not empty, can have."""
  return max(most_folded(array).bit_length() - _MOST_SYMBOL_BITS, 0)


# ---- programs ------------------------------------------------------------------------


def piece_widths(raw_bits: int) -> tuple[int, ...]:
  """Returns the widths of the pieces into which raw bits are cut, from the lowest on.

  All are 8 but the last ones, which are 4, 2 and 1, each at most once.
  """
  return (8,) * (raw_bits // 8) + tuple(b for b in (4, 2, 1) if raw_bits & b)


_STEP = 1 << 12  # elements that one step splits or joins


@functools.partial(jax.jit, static_argnames='layout', donate_argnums=0)
def split(
  out: tuple[jax.Array, ...],
  bits: jax.Array,
  min_exponent: jax.Array,
  count: jax.Array,
  *,
  layout: Layout,
) -> tuple[jax.Array, ...]:
  """Divides elements into symbols, uint16, and pieces of raw bits, uint8.

  Args:
    out: arrays `[n]` like the results, whose memory these get.
    bits: the bit patterns, unsigned integers `[n]`.
    min_exponent: that of the layout.
    count: how many elements are wanted, the first ones; int32.
    layout: the program of the layout.

  Returns:
    The symbols, and each of the pieces.
  """

  def loop(
    out: tuple[jax.Array, ...],
    bits: jax.Array,
    min_exponent: jax.Array,
    count: jax.Array,
  ) -> tuple[jax.Array, ...]:
    size = math.gcd(bits.size, _STEP)

    def step(i: jax.Array, out: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      own = jax.lax.dynamic_slice(bits, (i * size,), (size,))
      symbols, raw = layout.split(own, min_exponent)
      found, shift = [symbols], 0
      for width in piece_widths(layout.raw_bits):
        found.append((raw >> shift).astype(jnp.uint8) & jnp.uint8((1 << width) - 1))
        shift += width
      put = lambda x, own: jax.lax.dynamic_update_slice(x, own, (i * size,))
      return tuple(map(put, out, found))

    return jax.lax.fori_loop(0, -(-count // size), step, out)

  # On one thread, because the others have blocks of their own.
  return native.loop(loop)(out, bits, min_exponent, count)


@functools.partial(jax.jit, static_argnames='layout', donate_argnums=0)
def join(
  out: jax.Array,
  symbols: jax.Array,
  pieces: tuple[jax.Array, ...],
  min_exponent: jax.Array,
  count: jax.Array,
  *,
  layout: Layout,
) -> jax.Array:
  """Returns the bit patterns of elements: the inverse of `split`, with its arguments.

  The result gets the memory of `out`, unsigned integers `[n]`.
  """

  def loop(
    out: jax.Array,
    symbols: jax.Array,
    pieces: tuple[jax.Array, ...],
    min_exponent: jax.Array,
    count: jax.Array,
  ) -> jax.Array:
    size = math.gcd(out.size, _STEP)
    some = lambda x, i: jax.lax.dynamic_slice(x, (i * size,), (size,))

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
      raw, shift = jnp.zeros(size, layout.unsigned), 0
      for width, piece in zip(piece_widths(layout.raw_bits), pieces, strict=True):
        raw = raw | some(piece, i).astype(layout.unsigned) << shift
        shift += width
      bits = layout.join(some(symbols, i), raw, min_exponent)
      return jax.lax.dynamic_update_slice(out, bits, (i * size,))

    return jax.lax.fori_loop(0, -(-count // size), step, out)

  return native.loop(loop)(out, symbols, pieces, min_exponent, count)

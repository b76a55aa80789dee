"""How the numbers of an array divide into symbols and rests: one class for each kind.

A layout says what a bit pattern's symbol is, which is modelled, and what its rest is,
which is stored as it is. To add a kind, write a class with the members of `Layout` and
name it in `KINDS`.

Shape letters: A symbols of the alphabet.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
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
  """

  dtype: np.dtype
  rest: int

  kind: ClassVar[str]

  @property
  def unsigned(self) -> np.dtype:
    """The dtype of bit patterns."""
    return np.dtype(f'u{self.dtype.itemsize}')

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
  def takes(cls, dtype: np.dtype, rest: int) -> bool:
    """Whether there is such a layout."""

  @abc.abstractmethod
  def split(self, bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Bit patterns to symbols, uint16, and rests, as wide as the patterns."""

  @abc.abstractmethod
  def join(self, symbols: jax.Array, rests: jax.Array) -> jax.Array:
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
  bits that are zero in all numbers.
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
  def takes(cls, dtype: np.dtype, rest: int) -> bool:
    return dtype in floats.LAYOUTS and 0 <= rest <= floats.LAYOUTS[dtype].rest_bits

  @classmethod
  def of(cls, bits: np.ndarray, dtype: np.dtype) -> 'Float':
    """The layout with the least rest for these bit patterns."""
    layout = floats.LAYOUTS[dtype]
    union: Any = np.bitwise_or.reduce  # mypy knows no overload of it
    used = int(union(bits.reshape(-1)))
    low = layout.rest_bits - 1
    used = used >> (layout.width - 1) << low | used & ((1 << low) - 1)
    zeros = (used & -used).bit_length() - 1 if used else layout.rest_bits
    return cls(dtype, layout.rest_bits - zeros)

  def split(self, bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    symbols, rests = floats.split_bits(bits, floats.LAYOUTS[self.dtype])
    return symbols, rests >> self._zeros

  def join(self, symbols: jax.Array, rests: jax.Array) -> jax.Array:
    layout = floats.LAYOUTS[self.dtype]
    return floats.join_bits(symbols, rests << self._zeros, layout)

  def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    symbols = np.arange(self.alphabet, dtype=np.int64)
    layout = floats.LAYOUTS[self.dtype]
    top = layout.modelled_mantissa
    exponent, mantissa = symbols >> top, symbols & ((1 << top) - 1)
    # Numbers of exponent 0 have no leading 1 and the spacing of exponent 1.
    leading = np.where(exponent > 0, 1 << top, 0)
    width = np.maximum(exponent, 1) - (1 << (layout.exponent - 1)) + 1 - top
    return 2 * (leading + mantissa) + 1, width - 1, width


@dataclasses.dataclass(frozen=True)
class Int(Layout):
  """The top bits of the folded integer are the symbol; see `integers`."""

  kind: ClassVar[str] = 'int'

  @property
  def alphabet(self) -> int:
    bits = min(8 * self.dtype.itemsize - self.rest, integers.MODELLED_BITS)
    return 1 << bits

  @property
  def has_scale(self) -> bool:
    return self.dtype.kind == 'i'

  @classmethod
  def takes(cls, dtype: np.dtype, rest: int) -> bool:
    return dtype in integers.DTYPES and 0 <= rest < 8 * dtype.itemsize

  def split(self, bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    return integers.split_bits(bits, self.rest, self.has_scale)

  def join(self, symbols: jax.Array, rests: jax.Array) -> jax.Array:
    return integers.join_bits(symbols, rests, self.rest, self.dtype)

  def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    symbols = np.arange(self.alphabet, dtype=np.int64)
    zeros = np.zeros_like(symbols)
    if self.rest:
      return 2 * symbols + 1, zeros + self.rest - 2, zeros
    return (symbols + 1) // 2, zeros, zeros


KINDS: dict[str, type[Layout]] = {cls.kind: cls for cls in (Float, Int)}
"""The kinds of layouts, by their names in a file."""


def layout(kind: str, dtype: np.dtype, rest: int) -> Layout:
  """The layout of this kind.

  Raises:
    ValueError: if the kind is unknown, or has no layout of this dtype and rest.
  """
  if kind not in KINDS:
    raise ValueError(f'numbers in a layout of unknown kind, {kind!r}')
  if not KINDS[kind].takes(dtype, rest):
    raise ValueError(f'no layout {kind!r} of {dtype} leaves rests of {rest} bits')
  return KINDS[kind](dtype, rest)

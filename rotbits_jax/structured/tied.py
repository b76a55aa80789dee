"""Embeddings that are linear images of the head."""

from collections.abc import Iterator
import math
from typing import Any, ClassVar

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured.base import Arrays
from rotbits_jax.structured.base import Dependent
from rotbits_jax.structured.base import Settings
from rotbits_jax.structured.base import register
from rotbits_jax.structured.stored import Stored


@register
@struct.dataclass
class Tied(Dependent):
  """A token embedding `[V, d]` that is the image `head^T @ map` of the head `[D, V]`.

  Attributes:
    map: `[D, d]`.
    tokens: V.
  """

  kind: ClassVar[str] = 'tied'
  needs: ClassVar[tuple[str, ...]] = ('head/kernel',)

  map: Any
  tokens: int = struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.tokens, self.map.shape[-1]

  @property
  def dtype(self) -> Any:
    return self.map.dtype

  def expand(self, *needed: Any) -> jax.Array:
    (head,) = needed
    return self.rows(head, jnp.arange(self.tokens)).astype(self.dtype)

  def rows(self, *needed_and_indices: Any) -> jax.Array:
    """The rows of some tokens, float32 `[..., d]`, without the other rows.

    Args:
      needed_and_indices: the head, `[D, V]`, and tokens, integers `[...]`; rows of
        tokens that there are not are NaN.
    """
    head, tokens = needed_and_indices
    columns = jnp.asarray(head).at[:, tokens].get(mode='fill', fill_value=jnp.nan)
    columns = jnp.moveaxis(columns.astype(jnp.float32), 0, -1)
    return jnp.matmul(columns, self.map.astype(jnp.float32), precision='highest')

  def stored(self) -> tuple[Settings, Arrays]:
    return {'tokens': self.tokens}, {'map': np.asarray(self.map)}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'Tied':
    given = Stored(settings, arrays)
    map, tokens = given.array('map', 2), given.size('tokens')
    given.finish()
    return cls(map, tokens)


@register
@struct.dataclass
class TiedExactly(Dependent):
  """`head^T @ T` and what that is off by: every bit of the embedding.

  With the head in fixed point, T is a matrix of integers and the product P a sum of
  integers, small enough for float64 to add them exactly in whatever order:

      2^scale P[i, j] = sum_k round(2^shifts[k] head[k, i]) map[k, j]

  P, rounded to the embedding's format, and the embedding become ordinals: integers that
  count the format's numbers upwards. Residuals are the differences. How large they are
  depends on how far the format's numbers are apart, so that those of each exponent of P
  are an array of their own.

  Attributes:
    map: int32 `[D, d]`, below 2^23 in absolute value.
    shifts: int16 `[D]`.
    residuals: int8 `[n]` for each class of exponents, ordered by token; -128 stands for
      an exception.
    exceptions: `[n]`, the entries of the embedding that are further off, by token.
    tokens: V.
    scale: see above.
    first: the exponent, as the format's bits have it, of the first class. Each class
      has one; lower exponents join the first, higher ones the last.
  """

  kind: ClassVar[str] = 'tied_exactly'
  needs: ClassVar[tuple[str, ...]] = ('head/kernel',)
  eager: ClassVar[bool] = True

  map: Any
  shifts: Any
  residuals: tuple[Any, ...]
  exceptions: Any
  tokens: int = struct.field(pytree_node=False)
  scale: int = struct.field(pytree_node=False)
  first: int = struct.field(pytree_node=False)

  @classmethod
  def from_table(
    cls, table: np.ndarray, head: np.ndarray, map: np.ndarray, exponents: np.ndarray
  ) -> 'TiedExactly':
    """What an embedding is in terms of a head.

    Args:
      table: the embedding `[V, d]`, float16 or bfloat16.
      head: `[D, V]`, finite.
      map: int32 `[D, d]`, below 2^23 in absolute value.
      exponents: integers `[D]`: T is `2^-exponents[k] map[k]`.

    Returns:
      The leaf.
    """
    # As fine a fixed point as keeps the sums below 2^52, and below 2^53 when rounded.
    weights = np.ldexp(_greatest(map), -exponents)
    bound = max(
      float(np.max(weights @ np.abs(np.float64(head[:, block]))))
      for block in token_blocks(head)
    )
    scale = 52 - math.frexp(bound)[1]
    shifts = (scale - exponents).astype(np.int16)
    predicted = _predict(head, map, shifts, scale, table.dtype)
    off = np.subtract(_ordinals(table), predicted, dtype=np.int32)
    off = np.where(np.abs(off) < -_EXCEPTION, off, _EXCEPTION).astype(np.int8)
    classes = _exponents(predicted, table.dtype)
    first, last = _common(np.bincount(classes.reshape(-1)))
    classes = np.clip(classes, first, last)
    return cls(
      map=map,
      shifts=shifts,
      residuals=tuple(off[classes == c] for c in range(first, last + 1)),
      exceptions=table[off == _EXCEPTION],
      tokens=len(table),
      scale=scale,
      first=first,
    )

  @property
  def shape(self) -> tuple[int, ...]:
    return self.tokens, self.map.shape[-1]

  @property
  def dtype(self) -> Any:
    return self.exceptions.dtype

  def astype(self, dtype: Any) -> 'TiedExactly':
    """The leaf as it is: it stands for bits, which have one format."""
    return self

  def expand(self, *needed: Any) -> np.ndarray:
    """The embedding `[V, d]`, bit for bit, given the head `[D, V]`.

    Raises:
      ValueError: if it cannot be that head.
    """
    head = np.asarray(*needed)
    if head.shape != (len(self.map), self.tokens):
      raise ValueError(
        f'the embedding is tied to a head of shape {(len(self.map), self.tokens)}, '
        f'got {head.shape=}'
      )
    ordinals = _predict(head, self.map, self.shifts, self.scale, self.dtype)
    classes = _exponents(ordinals, self.dtype)
    last = self.first + len(self.residuals) - 1
    classes = np.clip(classes, self.first, last)
    off = np.empty(self.shape, np.int8)
    for c, residuals in enumerate(self.residuals, self.first):
      _fill(off, classes == c, residuals)
    ordinals += off
    table = _numbers(ordinals, self.dtype)
    _fill(table, off == _EXCEPTION, self.exceptions)
    return table

  def stored_sizes(self) -> list[tuple[np.dtype, int]]:
    return [(x.dtype, x.size) for x in self.stored()[1].values()]

  def stored(self) -> tuple[Settings, Arrays]:
    map = np.asarray(self.map)
    # Bits that int16 has no room for.
    low = max(int(np.abs(map).max(initial=0)).bit_length() - 15, 0)
    settings = {
      'tokens': self.tokens,
      'scale': self.scale,
      'first': self.first,
      'low': low,
    }
    arrays = {
      'map': (map >> low).astype(np.int16),
      'shifts': np.asarray(self.shifts),
      'exceptions': np.asarray(self.exceptions),
    }
    if low:
      arrays['low'] = (map & (1 << low) - 1).astype(np.uint8)
    for i, residuals in enumerate(self.residuals):
      arrays[f'residuals_{i}'] = np.asarray(residuals)
    return settings, arrays

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'TiedExactly':
    given = Stored(settings, arrays)
    map, tokens = given.array('map', 2, np.int16).astype(np.int32), given.size('tokens')
    scale, first = given.integer('scale', -1000, 2000), given.integer('first', 0, 255)
    bits = given.integer('low', 0, 8)
    low = np.zeros(map.shape, np.uint8)
    if bits:
      low = given.array('low', low.ndim, np.uint8)
    shifts, exceptions = given.array('shifts', 1, np.int16), given.array('exceptions', 1)
    residuals: list[np.ndarray] = []
    while (name := f'residuals_{len(residuals)}') in given:
      residuals.append(given.array(name, 1, np.int8))
    given.finish()
    count = sum(x.size for x in residuals)
    fits = residuals and count == tokens * map.shape[1]
    if not fits or low.shape != map.shape or shifts.shape != map.shape[:1]:
      raise ValueError(
        f'no embedding of {tokens} tokens is made of {count} residuals, {map.shape=}, '
        f'{low.shape=} and {shifts.shape=}'
      )
    if exceptions.dtype not in _EXACT_DTYPES:
      raise ValueError(f'no embedding is tied exactly in {exceptions.dtype}')
    return cls(
      map=map << bits | low,
      shifts=shifts,
      residuals=tuple(residuals),
      exceptions=exceptions,
      tokens=tokens,
      scale=scale,
      first=first,
    )


_EXCEPTION = -128
_EXACT_DTYPES = (np.dtype(np.float16), np.dtype(jnp.bfloat16))


def token_blocks(head: Any, numbers: int = 1 << 23) -> Iterator[slice]:
  """Ranges of the tokens of a head `[D, V]`, of so many numbers each."""
  step = max(numbers // head.shape[0], 1)
  return (slice(i, i + step) for i in range(0, head.shape[1], step))


def _predict(
  head: np.ndarray, map: Any, shifts: Any, scale: int, dtype: Any
) -> np.ndarray:
  """Ordinals of P, see `TiedExactly`: int16 `[V, d]`, the same on every machine.

  Raises:
    ValueError: if the sums could be inexact.
  """
  map = np.asarray(map, np.float64)
  greatest = _greatest(map)
  units = np.ldexp(1.0, np.asarray(shifts, np.int32))[:, None]
  ordinals = np.empty((head.shape[1], map.shape[1]), np.int16)
  for block in token_blocks(head, 1 << 20):  # such as stay in a cache
    integers = np.rint(np.float64(head[:, block]) * units)
    # No partial sum of a product below exceeds this in absolute value. If a sum of
    # these, none of which is negative, is below 2^53, it is exact itself.
    if not np.max(greatest @ np.abs(integers)) < 2.0**53:
      raise ValueError('the head is too large for the embedding that is tied to it')
    product = integers.T @ map
    ordinals[block] = _rounded(product * 2.0**-scale, dtype)
  return ordinals


def _greatest(map: Any) -> np.ndarray:
  """The greatest absolute value of each row, float64."""
  return np.abs(np.asarray(map, np.float64)).max(axis=1, initial=0)


def _rounded(numbers: np.ndarray, dtype: Any) -> np.ndarray:
  """The ordinals of float64 numbers, rounded to a format of 16 bits."""
  info = jnp.finfo(dtype)
  low = 52 - info.nmant
  least = np.float64(info.smallest_normal)
  size = np.abs(numbers)
  # The ordinal of a normal number is its bits, without those that float64 adds.
  bits = np.maximum(size, least).view(np.int64)
  normal = ((bits + (1 << (low - 1))) >> low) - (int(least.view(np.int64)) >> low)
  subnormal = np.rint(np.minimum(size, least) * (2.0**info.nmant / least))
  ordinals = np.minimum(normal + subnormal.astype(np.int64), 0x7FFF).astype(np.int16)
  return ordinals ^ -(numbers < 0).astype(np.int16)


def _ordinals(numbers: np.ndarray) -> np.ndarray:
  """Integers that count a format's numbers upwards: 0 is 0, -0 is -1; int16."""
  bits = np.ascontiguousarray(numbers).view(np.int16)
  return bits ^ (bits >> 15 & 0x7FFF)


def _numbers(ordinals: np.ndarray, dtype: Any) -> np.ndarray:
  """The inverse of `_ordinals`."""
  return (ordinals ^ (ordinals >> 15 & 0x7FFF)).view(dtype)


def _exponents(ordinals: np.ndarray, dtype: Any) -> np.ndarray:
  """The exponents in the bits of the numbers, uint8."""
  return ((ordinals ^ ordinals >> 15) >> jnp.finfo(dtype).nmant).astype(np.uint8)


def _common(counts: np.ndarray) -> tuple[int, int]:
  """The first and the last class that, with all beyond it, is worth a table."""
  least = min(max(counts.sum() // 512, 1024), counts.sum())
  first = int(np.searchsorted(np.cumsum(counts), least))
  last = counts.size - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), least))
  return first, max(first, last)


def _fill(array: np.ndarray, places: np.ndarray, values: Any) -> None:
  """Puts values where a mask is true."""
  count = np.count_nonzero(places)
  if values.shape != (count,):
    raise ValueError(
      f'the embedding has {count} entries of a class here, got {values.shape=}'
    )
  array[places] = values

"""Leaves for a token embedding that is a linear image of the head.

Let V be the number of tokens, d the width of the embedding, and D that of the head. The
head has the kernel `[D, V]`. The embedding `[V, d]` is tied to the head if it is
`head^T @ T` for a small matrix T `[D, d]`. A tied embedding is stored as T, which has
far fewer numbers. `symmetries.tied` finds T.

Both leaves are dependent: they stand for the embedding only together with the head.
"""

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
  """The embedding `head^T @ map`, up to rounding.

  Attributes:
    map: the matrix T, `[D, d]`.
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
    """Returns the rows of some tokens; the other rows are not computed.

    Args:
      needed_and_indices: the head `[D, V]`, then the tokens, integers `[...]`.

    Returns:
      The rows, float32 `[..., d]`. The row of a token of V or more is NaN.
    """
    head, tokens = needed_and_indices
    if head.shape != (len(self.map), self.tokens):
      raise ValueError(
        f'the embedding is tied to a head of shape {(len(self.map), self.tokens)}, '
        f'got {head.shape=}'
      )
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
  """Every bit of the embedding: a prediction from the head, and residuals.

  The prediction is the product P = `head^T @ T`. It must have the same bits on every
  machine. Therefore it is a sum of integers that float64 adds exactly in any order:

      2^scale P[i, j] = sum_k round(2^shifts[k] head[k, i]) map[k, j]

  P is rounded to the embedding's dtype. The rounded P and the embedding are then
  converted to ordinals. An ordinal is an integer that counts the numbers of the dtype
  upwards, so neighbours differ by 1. A residual is the ordinal of an entry of the
  embedding minus the ordinal that P predicts for it.

  Residuals are smaller where the numbers of the dtype lie further apart, and this
  distance depends on the exponent. Therefore each exponent of P forms a class, and the
  residuals of each class are an array of their own. The rare exponents at both ends
  share a class.

  Attributes:
    map: int32 `[D, d]`, below 2^23 in absolute value.
    shifts: int16 `[D]`.
    residuals: int8 `[n]` for each class, in row-major order of the embedding's entries;
      -128 marks an exception.
    exceptions: `[n]`, the entries of the embedding whose residual int8 cannot hold, in
      row-major order. Their dtype is that of the embedding.
    tokens: V.
    scale: see above.
    first: the biased exponent of the first class. The next class has the next exponent,
      and so on. Lower exponents are in the first class, higher ones in the last.
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
    """Makes the leaf that predicts an embedding from a head.

    Args:
      table: the embedding `[V, d]`, float16 or bfloat16.
      head: `[D, V]`, finite.
      map: int32 `[D, d]`, below 2^23 in absolute value.
      exponents: integers `[D]`. Row k of T is `2^-exponents[k] map[k]`.

    Returns:
      The leaf.
    """
    # The scale is the largest for which all sums are below 2^52. Rounding the head to
    # integers can make the sums larger, but they stay below 2^53.
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
    """Returns the leaf unchanged, because it stands for bits of one dtype."""
    return self

  def expand(self, *needed: Any) -> np.ndarray:
    """Returns the embedding `[V, d]`, bit for bit, given the head `[D, V]`.

    Raises:
      ValueError: if the leaf cannot have been made from this head.
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
    # `map` is stored as int16. The low bits that do not fit are stored separately.
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
    shifts = given.array('shifts', 1, np.int16)
    exceptions = given.array('exceptions', 1)
    residuals: list[np.ndarray] = []
    while (name := f'residuals_{len(residuals)}') in given:
      residuals.append(given.array(name, 1, np.int8))
    given.finish()
    count = sum(x.size for x in residuals)
    fits = residuals and count == tokens * map.shape[1]
    if not fits or low.shape != map.shape or shifts.shape != map.shape[:1]:
      raise ValueError(
        f'an embedding of {tokens} tokens cannot have {count} residuals, {map.shape=}, '
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
  """Yields the tokens of a head `[D, V]` as slices of about `numbers` numbers each."""
  step = max(numbers // head.shape[0], 1)
  return (slice(i, i + step) for i in range(0, head.shape[1], step))


def _predict(
  head: np.ndarray, map: Any, shifts: Any, scale: int, dtype: Any
) -> np.ndarray:
  """Returns the ordinals of P, see `TiedExactly`: int16 `[V, d]`.

  They are the same on every machine.

  Raises:
    ValueError: if the sums are so large that float64 may round them.
  """
  map = np.asarray(map, np.float64)
  greatest = _greatest(map)
  units = np.ldexp(1.0, np.asarray(shifts, np.int32))[:, None]
  ordinals = np.empty((head.shape[1], map.shape[1]), np.int16)
  for block in token_blocks(head, 1 << 20):  # small enough to stay in a cache
    integers = np.rint(np.float64(head[:, block]) * units)
    # This bounds the absolute value of every partial sum of the product below. The
    # bound is a sum of integers that are not negative, so it is exact if it is below
    # 2^53.
    if not np.max(greatest @ np.abs(integers)) < 2.0**53:
      raise ValueError('the head is too large for the embedding that is tied to it')
    product = integers.T @ map
    ordinals[block] = _rounded(product * 2.0**-scale, dtype)
  return ordinals


def _greatest(map: Any) -> np.ndarray:
  """Returns the greatest absolute value of each row, float64."""
  return np.abs(np.asarray(map, np.float64)).max(axis=1, initial=0)


def _rounded(numbers: np.ndarray, dtype: Any) -> np.ndarray:
  """Rounds float64 numbers to a dtype of 16 bits and returns their ordinals."""
  info = jnp.finfo(dtype)
  low = 52 - info.nmant
  least = np.float64(info.smallest_normal)
  size = np.abs(numbers)
  # The bits of a float64 number without the lowest `low` mantissa bits, minus those of
  # the least normal number, count the normal numbers of the dtype.
  bits = np.maximum(size, least).view(np.int64)
  normal = ((bits + (1 << (low - 1))) >> low) - (int(least.view(np.int64)) >> low)
  subnormal = np.rint(np.minimum(size, least) * (2.0**info.nmant / least))
  ordinals = np.minimum(normal + subnormal.astype(np.int64), 0x7FFF).astype(np.int16)
  return ordinals ^ -(numbers < 0).astype(np.int16)


def _ordinals(numbers: np.ndarray) -> np.ndarray:
  """Returns the ordinals of numbers, int16: 0 for 0, -1 for -0."""
  bits = np.ascontiguousarray(numbers).view(np.int16)
  return bits ^ (bits >> 15 & 0x7FFF)


def _numbers(ordinals: np.ndarray, dtype: Any) -> np.ndarray:
  """Returns the numbers with these ordinals: the inverse of `_ordinals`."""
  return (ordinals ^ (ordinals >> 15 & 0x7FFF)).view(dtype)


def _exponents(ordinals: np.ndarray, dtype: Any) -> np.ndarray:
  """Returns the biased exponents of the numbers with these ordinals, uint8."""
  return ((ordinals ^ ordinals >> 15) >> jnp.finfo(dtype).nmant).astype(np.uint8)


def _common(counts: np.ndarray) -> tuple[int, int]:
  """Returns the exponents of the first and the last class.

  Each of the two classes, with the exponents beyond it, has so many entries that its
  frequency table is worth its bytes.

  Args:
    counts: the number of entries for each exponent, from 0.
  """
  least = min(max(counts.sum() // 512, 1024), counts.sum())
  first = int(np.searchsorted(np.cumsum(counts), least))
  last = counts.size - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), least))
  return first, max(first, last)


def _fill(array: np.ndarray, places: np.ndarray, values: Any) -> None:
  """Puts values where a mask is true.

  Raises:
    ValueError: if there are more or fewer values than places.
  """
  count = np.count_nonzero(places)
  if values.shape != (count,):
    raise ValueError(
      f'an array of the tied embedding must have {count} entries, got {values.shape=}'
    )
  array[places] = values

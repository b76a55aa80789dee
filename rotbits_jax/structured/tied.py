"""Leaves for a token embedding that is a linear image of the head.

Let V be the number of tokens, d the width of the embedding, and D the width of the
head's input. The kernel of the head is `[D, V]`. The embedding `[V, d]` is tied to the
head if it is `head^T @ T` for a small matrix T `[D, d]`. A tied embedding is stored as
T, which has far fewer numbers. `symmetries.tied` finds T.

Both leaves are dependent: they stand for the embedding only together with the head.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import math
from typing import Any, ClassVar, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured import ordinals as ordinals_lib
from rotbits_jax.structured.base import Arrays
from rotbits_jax.structured.base import Dependent
from rotbits_jax.structured.base import Settings
from rotbits_jax.structured.base import register
from rotbits_jax.structured.stored import Stored
from rotbits_jax.system import host


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

  def check_needed(self, *shapes: tuple[int, ...]) -> None:
    _check_head(self, *shapes)

  def expand(self, *needed: Any) -> jax.Array:
    (head,) = needed
    tokens = jnp.arange(self.tokens)
    # In blocks, because the rows and the head's columns are float32 until the end.
    rows = lambda block: self.rows(head, tokens[block]).astype(self.dtype)
    return jnp.concatenate([rows(block) for block in token_blocks(head)])

  def rows(self, *needed_and_indices: Any) -> jax.Array:
    """Returns the rows of some tokens; the other rows are not computed.

    Args:
      needed_and_indices: the head `[D, V]`, then the tokens, integers `[...]`.

    Returns:
      The rows, float32 `[..., d]`. The row of a token of V or more is NaN.
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
  expands_on_reading = True

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
    off, classes = np.empty(table.shape, np.int8), np.empty(table.shape, np.uint8)
    for part in _predict(head, map, shifts, scale, table.dtype, (0, 255)):
      actual = ordinals_lib.of_numbers(table[part.tokens])
      far = np.subtract(actual, part.ordinals, dtype=np.int32)
      off[part.tokens] = np.where(np.abs(far) < -_EXCEPTION, far, _EXCEPTION)
      classes[part.tokens] = part.classes
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

  def map_numbers(self, function: Callable[[Any], Any]) -> 'TiedExactly':
    """Returns the leaf unchanged, because it stands for bits of one dtype."""
    return self

  def check_needed(self, *shapes: tuple[int, ...]) -> None:
    _check_head(self, *shapes)

  def expand(self, *needed: Any) -> np.ndarray:
    """Returns the embedding `[V, d]`, bit for bit, given the head `[D, V]`.

    Raises:
      ValueError: if the leaf cannot have been made from this head.
    """
    head = np.asarray(*needed)
    _check_head(self, head.shape)
    table, count = host.empty(self.shape, self.dtype), len(self.residuals)
    bounds = self.first, self.first + count - 1
    residuals = [_Stream(x) for x in self.residuals]
    exceptions = _Stream(self.exceptions)
    for part in _predict(head, self.map, self.shifts, self.scale, self.dtype, bounds):
      flat, of_all = table[part.tokens].reshape(-1), part.classes.reshape(-1)
      ordinals = part.ordinals.reshape(-1)
      for start in range(0, flat.size, _PIECE):
        piece = slice(start, start + _PIECE)
        classes = of_all[piece]
        # A stable sort keeps the row-major order of the entries within each class.
        order = np.argsort(classes, kind='stable')
        counts = [int(np.count_nonzero(classes == c)) for c in range(count)]
        off = np.empty(order.size, np.int8)
        off[order] = np.concatenate(
          [x.take(n) for x, n in zip(residuals, counts, strict=True)]
        )
        flat[piece] = ordinals_lib.to_numbers(ordinals[piece] + off, self.dtype)
        (odd,) = np.nonzero(off == _EXCEPTION)
        flat[piece][odd] = exceptions.take(odd.size)
    for stream in (*residuals, exceptions):
      stream.finish()
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
    if first + len(residuals) > 256:
      raise ValueError(f'no exponents are {len(residuals)} from {first} on')
    return cls(
      map=map << bits | low,
      shifts=shifts,
      residuals=tuple(residuals),
      exceptions=exceptions,
      tokens=tokens,
      scale=scale,
      first=first,
    )


def _check_head(leaf: 'Tied | TiedExactly', shape: tuple[int, ...]) -> None:
  expected = len(leaf.map), leaf.tokens
  if shape != expected:
    raise ValueError(
      f'the embedding is tied to a head of shape {expected}, got head.shape={shape}'
    )


_EXCEPTION = -128
_EXACT_DTYPES = (np.dtype(np.float16), np.dtype(jnp.bfloat16))
_TOKENS = 1024  # number of tokens in a block of P
_PIECE = 1 << 15  # numbers that are expanded together, so few that a cache holds them


def token_blocks(head: Any, numbers: int = 1 << 23) -> Iterator[slice]:
  """Yields the tokens of a head `[D, V]` as slices of about `numbers` numbers each."""
  step = max(numbers // head.shape[0], 1)
  return (slice(i, i + step) for i in range(0, head.shape[1], step))


class _Stream:
  """An array whose values are taken in order."""

  def __init__(self, values: Any):
    self._values, self._next = np.asarray(values), 0

  def take(self, count: int) -> np.ndarray:
    """Returns the next values.

    Raises:
      ValueError: if too few values are left.
    """
    self._next += count
    if self._next > self._values.size:
      raise self._error()
    return self._values[self._next - count : self._next]

  def finish(self) -> None:
    """Raises ValueError if values are left."""
    if self._next != self._values.size:
      raise self._error()

  def _error(self) -> ValueError:
    return ValueError(
      f'an array of the tied embedding has {self._values.size} entries, which are '
      'too many or too few'
    )


class _Prediction(NamedTuple):
  """P for a block of n tokens, see `TiedExactly`.

  Attributes:
    tokens: the tokens.
    ordinals: the ordinals of P, int16 `[n, d]`.
    classes: the classes of P, uint8 `[n, d]`, counted from the least exponent.
  """

  tokens: slice
  ordinals: np.ndarray
  classes: np.ndarray


def _predict(
  head: np.ndarray,
  map: Any,
  shifts: Any,
  scale: int,
  dtype: np.dtype,
  exponents: tuple[int, int],
) -> Iterator[_Prediction]:
  """Yields P in blocks of tokens. It is the same on every machine.

  Args:
    head: `[D, V]`.
    map: int32 `[D, d]`.
    shifts: int16 `[D]`.
    scale: see `TiedExactly`.
    dtype: dtype of the embedding.
    exponents: the biased exponents of the first and the last class. Lower exponents
      are in the first class, higher ones in the last.

  Raises:
    ValueError: if the sums are so large that float64 may round them.
  """
  count = head.shape[1]
  step = max(min(_TOKENS, count), 1)
  with _float64():
    constants = (
      jnp.asarray(np.ldexp(1.0, np.asarray(shifts, np.int32))),
      jnp.asarray(map, jnp.float64),
      jnp.asarray(_greatest(map)),
      jnp.asarray(np.ldexp(1.0, -scale)),
      jnp.asarray(exponents, jnp.int16),
    )

  def begin(start: int) -> tuple[slice, int, Any]:
    # All blocks have the same size, so that one program serves all. Therefore the last
    # block overlaps the block before it.
    first = min(start, count - step)
    columns = np.ascontiguousarray(head[:, first : first + step])
    with _float64():
      made = _block(columns, *constants, dtype=dtype)
    return slice(start, start + step), start - first, made

  # JAX computes a block while the caller uses the block before it.
  begun = [begin(start) for start in range(0, min(count, step), step)]
  for start in range(step, count + step, step):
    if start < count:
      begun.append(begin(start))
    tokens, skip, made = begun.pop(0)
    ordinals, classes, bound = jax.device_get(made)
    if not bound < 2.0**53:
      raise ValueError('the head is too large for the embedding that is tied to it')
    yield _Prediction(tokens, ordinals[skip:], classes[skip:])


@contextlib.contextmanager
def _float64() -> Iterator[None]:
  """Makes JAX use float64, on the CPU."""
  with jax.enable_x64(True), jax.default_device(host.device()):
    yield


@functools.partial(jax.jit, static_argnames='dtype')
def _block(
  columns: jax.Array,
  units: jax.Array,
  map: jax.Array,
  greatest: jax.Array,
  unit: jax.Array,
  exponents: jax.Array,
  *,
  dtype: np.dtype,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes the ordinals and classes of a block of P, and a bound on its sums.

  Args:
    columns: columns of the head, `[D, n]`.
    units: 2^shifts, float64 `[D]`.
    map: float64 `[D, d]`.
    greatest: the greatest absolute value in each row of the map, float64 `[D]`.
    unit: 2^-scale, float64.
    exponents: int16 `[2]`, see `_predict`.
    dtype: dtype of the embedding.

  Returns:
    The ordinals and the classes, `[n, d]`, and the bound.
  """
  integers = jnp.round(_exact(columns) * units[:, None])
  # This bounds the absolute value of every partial sum of the product below. The
  # bound is a sum of integers that are not negative, so it is exact if it is below
  # 2^53.
  bound = jnp.max(greatest @ jnp.abs(integers), initial=0.0)
  product = jax.lax.dot_general(integers, map, (((0,), (0,)), ((), ())))
  ordinals = _rounded(product * unit, dtype)
  classes = jnp.clip(_exponents(ordinals, dtype), exponents[0], exponents[1])
  return ordinals, (classes - exponents[0]).astype(jnp.uint8), bound


def _exact(numbers: jax.Array) -> jax.Array:
  """Converts floating-point numbers to float64 with integer arithmetic.

  XLA's own conversion may replace subnormal numbers by zeros.
  """
  info = jnp.finfo(numbers.dtype)
  if info.bits == 64:
    return numbers
  if info.dtype == np.float16:  # float32 holds its subnormal numbers as normal ones
    return numbers.astype(jnp.float32).astype(jnp.float64)
  bits = jax.lax.bitcast_convert_type(numbers, f'int{info.bits}').astype(jnp.int64)
  exponent = bits >> info.nmant & (1 << info.nexp) - 1
  mantissa = bits & (1 << info.nmant) - 1
  mantissa += jnp.where(exponent > 0, 1 << info.nmant, 0)
  power = jnp.maximum(exponent, 1) + (info.minexp - 1 - info.nmant + 1023)
  power = jax.lax.bitcast_convert_type(power << 52, jnp.float64)
  finite = exponent < (1 << info.nexp) - 1
  size = jnp.where(finite, mantissa.astype(jnp.float64) * power, jnp.nan)
  return jnp.where(bits < 0, -size, size)


def _greatest(map: Any) -> np.ndarray:
  """Returns the greatest absolute value of each row, float64."""
  return np.abs(np.asarray(map, np.float64)).max(axis=1, initial=0)


def _rounded(numbers: jax.Array, dtype: np.dtype) -> jax.Array:
  """Rounds float64 numbers to a dtype of 16 bits and returns their ordinals."""
  info = jnp.finfo(dtype)
  low, least = 52 - info.nmant, float(info.smallest_normal)
  size = jnp.abs(numbers)
  # The bits of a float64 number without the lowest `low` mantissa bits, minus those of
  # the least normal number, count the normal numbers of the dtype.
  bits = jax.lax.bitcast_convert_type(jnp.maximum(size, least), jnp.int64)
  first = int(np.float64(least).view(np.int64)) >> low
  normal = (bits + (1 << (low - 1)) >> low) - first
  subnormal = jnp.round(jnp.minimum(size, least) * (2.0**info.nmant / least))
  ordinals = jnp.minimum(normal + subnormal.astype(jnp.int64), 0x7FFF)
  return jnp.where(numbers < 0, ~ordinals, ordinals).astype(jnp.int16)


def _exponents(ordinals: jax.Array, dtype: np.dtype) -> jax.Array:
  """Returns the biased exponents of the numbers with these ordinals, int16."""
  return (ordinals ^ ordinals >> 15) >> jnp.finfo(dtype).nmant


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

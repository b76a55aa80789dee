"""Leaves for a token embedding that is a linear image of the head.

Let V be the number of tokens, d the width of the embedding, and D the width of the
head's input. The kernel of the head is `[D, V]`. The embedding `[V, d]` is tied to the
head if it is `head^T @ T` for a small matrix T `[D, d]`. A tied embedding is stored as
T, which has far fewer numbers. `passes.tied` finds T.

Both leaves stand for the embedding only together with the head.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import math
from typing import Annotated, Any, ClassVar

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import buffers
from rotbits_jax.structured import ulps
from rotbits_jax.structured.base import Origin
from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import register
from rotbits_jax.structured.fields import Array
from rotbits_jax.structured.fields import Length
from rotbits_jax.structured.fields import Matrix
from rotbits_jax.structured.fields import static
from rotbits_jax.system import host
from rotbits_jax.system import native
from rotbits_jax.system import schema


class _OfHead(Structured):
  """An embedding that is made from the head and a map `[D, d]`."""

  needs: ClassVar[tuple[str, ...]] = ('head/kernel',)
  map: Any
  tokens: int

  @property
  def shape(self) -> tuple[int, ...]:
    return self.tokens, int(self.map.shape[-1])

  def check_needed(self, *shapes: tuple[int, ...]) -> None:
    expected = (len(self.map), self.tokens)
    if shapes != (expected,):
      raise ValueError(
        f'a leaf of type {self.type_name!r} needs head/kernel of shape {expected}, '
        f'got {shapes}'
      )


@register
@struct.dataclass
class Tied(_OfHead):
  """The embedding `head^T @ map`, up to rounding.

  Attributes:
    map: the matrix T, `[D, d]`.
    tokens: V.
  """

  type_name: ClassVar[str] = 'tied'

  map: Matrix
  tokens: Length = static()

  @property
  def dtype(self) -> Any:
    return self.map.dtype

  def materialize(self, *needed: Any) -> jax.Array:
    self.check_needed(*(x.shape for x in needed))
    tokens = jnp.arange(self.tokens)
    # In blocks, because the rows and the head's columns are float32 until the end.
    rows = lambda block: self.rows(*needed, tokens[block]).astype(self.dtype)
    return jnp.concatenate([rows(block) for block in token_blocks(*needed)])

  def rows(self, *needed_and_indices: Any) -> jax.Array:
    """Returns the rows of some tokens; the other rows are not computed."""
    head, tokens = needed_and_indices
    columns = jnp.asarray(head).at[:, tokens].get(mode='fill', fill_value=jnp.nan)
    columns = jnp.moveaxis(columns.astype(jnp.float32), 0, -1)
    return jnp.matmul(columns, self.map.astype(jnp.float32), precision='highest')


@register
@struct.dataclass
class TiedExactly(_OfHead):
  """Every bit of the embedding: a prediction from the head, and residuals.

  The prediction is the product P = `head^T @ T`. It must have the same bits on every
  machine. Therefore it is a sum of integers that float64 adds exactly in any order:

      2^scale P[i, j] = sum_k round(2^shifts[k] head[k, i]) map[k, j]

  P is rounded to the embedding's dtype. A residual is the ULP index of an entry of the
  embedding minus the ULP index of P, see `ulps`.

  Residuals are smaller where the numbers of the dtype lie further apart, and this
  distance depends on the exponent. Therefore each exponent of P forms a bucket, and the
  residuals of each bucket are an array of their own. The rare exponents at both ends
  share a bucket.

  Attributes:
    map: int32 `[D, d]`, below 2^23 in absolute value.
    shifts: int16 `[D]`.
    residuals: int8 `[n]` for each bucket, in row-major order of the embedding's
      entries; -128 marks an exception.
    exceptions: `[n]`, the entries of the embedding whose residual int8 cannot hold, in
      row-major order. Their dtype is that of the embedding.
    tokens: V.
    scale: see above.
    first: the biased exponent of the first bucket. The next bucket has the next
      exponent, and so on. Lower exponents are in the first bucket, higher ones in the
      last.
  """

  type_name: ClassVar[str] = 'tied_exactly'
  origin: ClassVar[Origin] = Origin.KNOWN

  map: Annotated[Any, Array(2, np.dtype(np.int32))]
  shifts: Annotated[Any, Array(1, np.dtype(np.int16))]
  residuals: Annotated[Any, Array(1, np.dtype(np.int8), several=True)]
  exceptions: Annotated[Any, Array(1)]
  tokens: Length = static()
  scale: Annotated[int, schema.between(-1000, 2000)] = static()
  first: int = static()

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
    off, buckets = np.empty(table.shape, np.int8), np.empty(table.shape, np.uint8)
    for tokens, predicted in _predict(head, map, shifts, scale, table.dtype):
      far = np.subtract(ulps.index(table[tokens]), predicted, dtype=np.int32)
      off[tokens] = np.where(np.abs(far) < -_EXCEPTION, far, _EXCEPTION)
      buckets[tokens] = _exponents(predicted, table.dtype)
    first, last = _common(np.bincount(buckets.reshape(-1)))
    buckets = np.clip(buckets, first, last)
    return cls(
      map=map,
      shifts=shifts,
      residuals=tuple(off[buckets == e] for e in range(first, last + 1)),
      exceptions=table[off == _EXCEPTION],
      tokens=len(table),
      scale=scale,
      first=first,
    )

  @property
  def dtype(self) -> Any:
    return self.exceptions.dtype

  def map_arrays(self, function: Callable[[Any], Any]) -> 'TiedExactly':
    """Returns the leaf unchanged, because it stands for bits of one dtype."""
    return self

  def materialize(self, *needed: Any) -> np.ndarray:
    """Returns the embedding `[V, d]`, bit for bit, given the head `[D, V]`."""
    self.check_needed(*(x.shape for x in needed))
    head = np.asarray(*needed)
    table, last = host.empty(self.shape, self.dtype), len(self.residuals) - 1
    residuals = [_Stream(x) for x in self.residuals]
    exceptions = _Stream(self.exceptions)
    for tokens, predicted in _predict(
      head, self.map, self.shifts, self.scale, self.dtype
    ):
      flat, whole = table[tokens].reshape(-1), predicted.reshape(-1)
      for start in range(0, flat.size, _PIECE):
        piece = slice(start, start + _PIECE)
        own = np.clip(_exponents(whole[piece], self.dtype) - self.first, 0, last)
        counts = np.bincount(own, minlength=last + 1).tolist()
        parts = [x.take(n) for x, n in zip(residuals, counts, strict=True)]
        off = _merged(own, parts)
        flat[piece] = ulps.number(whole[piece] + off, self.dtype)
        (odd,) = np.nonzero(off == _EXCEPTION)
        flat[piece][odd] = exceptions.take(odd.size)
    for stream in (*residuals, exceptions):
      stream.finish()
    return table

  def check(self) -> None:
    count, size = sum(x.size for x in self.residuals), math.prod(self.shape)
    if count != size or self.shifts.shape != self.map.shape[:1]:
      raise ValueError(
        f'an embedding of {self.shape} cannot have {count} residuals and '
        f'{self.shifts.shape=}'
      )
    if self.dtype not in EXACT_DTYPES:
      raise ValueError(f'expected float16 or bfloat16, got {self.dtype}')
    if not self.residuals or self.first + len(self.residuals) > 256:
      raise ValueError(
        f'buckets {self.first}..{self.first + len(self.residuals) - 1} exceed 255'
      )


EXACT_DTYPES = (np.dtype(np.float16), np.dtype(jnp.bfloat16))
_EXCEPTION = -128
_TOKENS = 1024  # in a block of P
_PIECE = 1 << 18  # entries that are looked at at once, so that they fit the cache


def token_blocks(head: Any, numbers: int = 1 << 23) -> Iterator[slice]:
  """Yields the tokens of a head `[D, V]` as slices of about `numbers` numbers each."""
  step = max(numbers // max(head.shape[0], 1), 1)
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


def _merged(buckets: np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray:
  """Merges residuals: the inverse of a stable sort by buckets.

  Args:
    buckets: the bucket of each entry, integers `[n]` below 256; n is at most `_PIECE`.
    parts: int8, the residuals of each bucket, in the order of the entries.

  Returns:
    int8 `[n]`.
  """
  own = buffers.scratch('buckets', _PIECE, np.uint8)
  own[: buckets.size] = buckets
  values = buffers.scratch('residuals', _PIECE, np.int8)
  np.concatenate(parts, out=values[: buckets.size])
  starts = np.zeros(256, np.uint32)
  starts[1 : len(parts)] = np.cumsum([x.size for x in parts[:-1]])
  with host.own_settings(), jax.default_device(host.device()):
    out = buffers.taken('merged', _PIECE, np.int8)
    out = _merge(out, own, values, starts, np.int32(buckets.size))
  found = np.asarray(out)[: buckets.size].copy()
  buffers.keep('merged', out)
  return found


@functools.partial(jax.jit, donate_argnums=0)
def _merge(
  out: jax.Array,
  buckets: jax.Array,
  values: jax.Array,
  starts: jax.Array,
  count: jax.Array,
) -> jax.Array:
  """Writes the next value of each entry's bucket.

  Args:
    out: int8 `[_PIECE]`.
    buckets: uint8 `[_PIECE]`.
    values: int8 `[_PIECE]`, those of each bucket together.
    starts: uint32 `[256]`, where the values of each bucket begin.
    count: how many entries are wanted, the first ones; int32.
  """

  def loop(out: Any, buckets: Any, values: Any, starts: Any, count: Any) -> jax.Array:
    one = lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    put = lambda x, y, i: jax.lax.dynamic_update_index_in_dim(x, y, i, 0)

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> Any:
      out, starts = carry
      bucket = one(buckets, i).astype(jnp.uint32)
      starts = put(starts, one(starts, bucket) + 1, bucket)
      # The place is that before the update. If it were read before, XLA would copy all
      # of them for each entry.
      place = one(starts, bucket) - 1
      return jax.lax.optimization_barrier((put(out, one(values, place), i), starts))

    return jax.lax.fori_loop(0, count, step, (out, starts))[0]

  return native.loop(loop)(out, buckets, values, starts, count)


def _predict(
  head: np.ndarray, map: Any, shifts: Any, scale: int, dtype: np.dtype
) -> Iterator[tuple[slice, np.ndarray]]:
  """Yields P in blocks of tokens. It is the same on every machine.

  Args:
    head: `[D, V]`.
    map: int32 `[D, d]`.
    shifts: int16 `[D]`.
    scale: see `TiedExactly`.
    dtype: dtype of the embedding.

  Yields:
    The tokens of a block, and the ULP indices of their rows of P, int16 `[n, d]`.

  Raises:
    ValueError: if the sums are so large that float64 may round them.
  """
  count = head.shape[1]
  step = max(min(_TOKENS, count), 1)
  powers = np.ldexp(1.0, np.asarray(shifts, np.int32))[:, None]
  with _float64():
    constants = (
      jnp.asarray(map, jnp.float64),
      jnp.asarray(_greatest(map)),
      jnp.asarray(np.ldexp(1.0, -scale)),
    )

  def begin(start: int) -> tuple[slice, int, Any]:
    # All blocks have the same size, so that one program serves all. Therefore the last
    # block overlaps the block before it.
    first = min(start, count - step)
    # NumPy converts subnormal numbers, which XLA may replace by zeros.
    given = head[:, first : first + step].astype(np.float64, order='C')
    given *= powers
    integers = np.rint(given, out=given)
    with _float64():
      made = _block(integers, *constants, dtype=dtype)
    return slice(start, start + step), start - first, made

  # JAX computes a block while the caller uses the block before it.
  begun = [begin(start) for start in range(0, min(count, step), step)]
  for start in range(step, count + step, step):
    if start < count:
      begun.append(begin(start))
    tokens, skip, made = begun.pop(0)
    predicted, bound = jax.device_get(made)
    if not bound < 2.0**53:
      raise ValueError('the head is too large for the embedding that is tied to it')
    yield tokens, predicted[skip:]


@contextlib.contextmanager
def _float64() -> Iterator[None]:
  """Makes JAX use float64, on the CPU."""
  with (
    host.own_settings(),
    jax.enable_x64(True),
    jax.default_device(host.device()),
  ):
    yield


@functools.partial(jax.jit, static_argnames='dtype')
def _block(
  integers: jax.Array,
  map: jax.Array,
  greatest: jax.Array,
  unit: jax.Array,
  *,
  dtype: np.dtype,
) -> tuple[jax.Array, jax.Array]:
  """Computes a block of P and a bound on its sums.

  Args:
    integers: the integers of the head for n tokens, float64 `[D, n]`.
    map: float64 `[D, d]`.
    greatest: the greatest absolute value in each row of the map, float64 `[D]`.
    unit: 2^-scale, float64.
    dtype: dtype of the embedding.

  Returns:
    The ULP indices, int16 `[n, d]`, and the bound.
  """
  # This bounds the absolute value of every partial sum of the product below. The
  # bound is a sum of integers that are not negative, so it is exact if it is below
  # 2^53.
  bound = jnp.max(greatest @ jnp.abs(integers), initial=0.0)
  return _rounded((integers.T @ map) * unit, dtype), bound


def _greatest(map: Any) -> np.ndarray:
  """Returns the greatest absolute value of each row, float64."""
  return np.abs(np.asarray(map, np.float64)).max(axis=1, initial=0)


def _rounded(numbers: jax.Array, dtype: np.dtype) -> jax.Array:
  """Rounds float64 numbers to a dtype of 16 bits and returns their ULP indices."""
  info = jnp.finfo(dtype)
  low, least = 52 - info.nmant, float(info.smallest_normal)
  size = jnp.abs(numbers)
  # The bits of a float64 number without the lowest `low` mantissa bits, minus those of
  # the least normal number, count the normal numbers of the dtype.
  bits = jax.lax.bitcast_convert_type(jnp.maximum(size, least), jnp.int64)
  first = int(np.float64(least).view(np.int64)) >> low
  normal = (bits + (1 << (low - 1)) >> low) - first
  subnormal = jnp.round(jnp.minimum(size, least) * (2.0**info.nmant / least))
  indices = jnp.minimum(normal + subnormal.astype(jnp.int64), 0x7FFF)
  return jnp.where(numbers < 0, ~indices, indices).astype(jnp.int16)


def _exponents(indices: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns the biased exponents of the numbers with these ULP indices, int16."""
  return (indices ^ indices >> 15) >> jnp.finfo(dtype).nmant


def _common(counts: np.ndarray) -> tuple[int, int]:
  """Returns the exponents of the first and the last bucket.

  Each of the two buckets, with the exponents beyond it, has so many entries that its
  frequency table is worth its bytes.

  Args:
    counts: the number of entries for each exponent, from 0.
  """
  least = min(max(counts.sum() // 512, 1024), counts.sum())
  first = int(np.searchsorted(np.cumsum(counts), least))
  last = counts.size - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), least))
  return first, max(first, last)

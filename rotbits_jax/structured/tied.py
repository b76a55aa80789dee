"""A token embedding that is a linear image of the head.

Let V be the number of tokens, d the width of the embedding, and D the width of the
head's input. The kernel of the head is `[D, V]`. The embedding `[V, d]` is tied to the
head if it is `head^T @ T` for a small matrix T `[D, d]`. A tied embedding is stored as
T, which has far fewer numbers. `passes.tied` finds T.

The leaf `Tied` stands for the embedding only together with the head. `product` is the
known array of a `Difference` that has every bit of the embedding.
"""

from collections.abc import Iterator
import contextlib
import functools
import math
from typing import Any, ClassVar

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured import ulps
from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import register
from rotbits_jax.structured.fields import Length
from rotbits_jax.structured.fields import Matrix
from rotbits_jax.structured.fields import static
from rotbits_jax.system import host


@register
@struct.dataclass
class Tied(Structured):
  """The embedding `head^T @ map`, up to rounding.

  Attributes:
    map: the matrix T, `[D, d]`.
    tokens: V.
  """

  type_name: ClassVar[str] = 'tied'
  needs: ClassVar[tuple[str, ...]] = ('head/kernel',)

  map: Matrix
  tokens: Length = static()

  @property
  def shape(self) -> tuple[int, ...]:
    return self.tokens, int(self.map.shape[-1])

  @property
  def dtype(self) -> Any:
    return self.map.dtype

  def check_needed(self, *shapes: tuple[int, ...]) -> None:
    check_head(len(self.map), self.tokens, shapes)

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


def token_blocks(head: Any, numbers: int = 1 << 23) -> Iterator[slice]:
  """Yields the tokens of a head `[D, V]` as slices of about `numbers` numbers each."""
  step = max(numbers // max(head.shape[0], 1), 1)
  return (slice(i, i + step) for i in range(0, head.shape[1], step))


def check_head(rank: int, tokens: int, shapes: tuple[tuple[int, ...], ...]) -> None:
  """Checks the shape of the head that an embedding needs.

  Raises:
    ValueError: if it is another one.
  """
  if shapes != ((rank, tokens),):
    raise ValueError(
      f'a tied embedding needs head/kernel of shape {(rank, tokens)}, got {shapes}'
    )


# ---- the exact product ---------------------------------------------------------------

EXACT_DTYPES = (np.dtype(np.float16), np.dtype(jnp.bfloat16))
_TOKENS = 1024  # in a block of P


def product(
  head: np.ndarray, map: Any, shifts: Any, scale: int, dtype: np.dtype
) -> np.ndarray:
  """Returns the product P = `head^T @ T`, the same on every machine.

  It is a sum of integers that float64 adds exactly in any order:

      2^scale P[i, j] = sum_k round(2^shifts[k] head[k, i]) map[k, j]

  Args:
    head: `[D, V]`.
    map: int32 `[D, d]`, below 2^23 in absolute value.
    shifts: int16 `[D]`.
    scale: see above.
    dtype: to which P is rounded, one of `EXACT_DTYPES`.

  Returns:
    P, `[V, d]`.

  Raises:
    ValueError: if the sums are so large that float64 may round them.
  """
  made = host.empty((head.shape[1], map.shape[1]), dtype)
  for tokens, indices in _blocks(head, map, shifts, scale, dtype):
    made[tokens] = ulps.number(indices, dtype)
  return made


def scale_of(
  head: np.ndarray, map: np.ndarray, exponents: np.ndarray
) -> tuple[int, np.ndarray]:
  """Returns the scale and the shifts of `product`.

  Args:
    head: `[D, V]`, finite.
    map: int32 `[D, d]`, below 2^23 in absolute value.
    exponents: integers `[D]`. Row k of T is `2^-exponents[k] map[k]`.
  """
  # The scale is the largest for which all sums are below 2^52. Rounding the head to
  # integers can make the sums larger, but they stay below 2^53.
  weights = np.ldexp(_greatest(map), -exponents)
  bound = max(
    float(np.max(weights @ np.abs(np.float64(head[:, block]))))
    for block in token_blocks(head)
  )
  scale = 52 - math.frexp(bound)[1]
  return scale, (scale - exponents).astype(np.int16)


def check(map: Any, shifts: Any, lengths: tuple[int, ...], dtype: np.dtype) -> None:
  """Checks the arguments of `product` for an embedding of a shape.

  Raises:
    ValueError: if they do not fit.
  """
  if shifts is None or shifts.shape != map.shape[:1] or lengths[1:] != map.shape[1:]:
    raise ValueError(f'an embedding of {lengths} cannot have a map of {map.shape}')
  if dtype not in EXACT_DTYPES:
    raise ValueError(f'expected float16 or bfloat16, got {dtype}')


def _blocks(
  head: np.ndarray, map: Any, shifts: Any, scale: int, dtype: np.dtype
) -> Iterator[tuple[slice, np.ndarray]]:
  """Yields P in blocks of tokens. It is the same on every machine.

  Args:
    head: `[D, V]`.
    map: int32 `[D, d]`.
    shifts: int16 `[D]`.
    scale: see `product`.
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

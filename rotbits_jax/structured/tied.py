"""A token embedding that is a linear image of the head.

Let V be the number of tokens, d the width of the embedding, and D the width of the
head's input. The kernel of the head is `[D, V]`. The embedding `[V, d]` is tied to the
head if it is `head^T @ T` for a small matrix T `[D, d]`. A tied embedding is stored as
T, which has far fewer numbers. `passes.tied` finds T.

The leaf `Tied` stands for the embedding only together with the head. `product` is the
known array of a `Difference` that has every bit of the embedding.
"""

from collections.abc import Iterator
import math
from typing import Annotated, Any, ClassVar

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured import base
from rotbits_jax.structured import exact
from rotbits_jax.structured import fields
from rotbits_jax.system import host


@base.register
@struct.dataclass
class Tied(base.Structured):
  """The embedding `head^T @ map`, up to rounding."""

  type_name: ClassVar[str] = 'tied'
  needs: ClassVar[tuple[str, ...]] = ('head/kernel',)

  map: Annotated[Any, fields.Array('Dd')]  # the matrix T
  tokens: fields.Length = fields.static()  # V

  @property
  def shape(self) -> tuple[int, ...]:
    return self.tokens, int(self.map.shape[-1])

  def check_needed(self, *shapes: tuple[int, ...]) -> None:
    if shapes != (expected := ((len(self.map), self.tokens),)):
      raise ValueError(f'an embedding needs head/kernel of {expected}, got {shapes}')

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


def product(
  head: np.ndarray, map: np.ndarray, shifts: np.ndarray, scale: int, dtype: np.dtype
) -> np.ndarray:
  """Returns the product P = `head^T @ T`, `[V, d]`, with the same bits everywhere.

      2^scale P[i, j] = sum_k round(2^shifts[k] head[k, i]) map[k, j]

  Args:
    head: `[D, V]`.
    map: int32 `[D, d]`.
    shifts: int16 `[D]`.
    scale: see above.
    dtype: to which P is rounded.
  """
  table = host.empty((head.shape[1], map.shape[1]), dtype)
  integers = map.astype(np.float64)
  with np.errstate(over='ignore', invalid='ignore'):
    powers = np.ldexp(1.0, shifts)[:, None]
    for tokens in token_blocks(head, 1 << 19):  # which fit the cache
      columns = np.rint(head[:, tokens] * powers)
      sums = exact.product(columns.T, integers)
      table[tokens] = exact.rounded(sums * 2.0**-scale, dtype)
  return table


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
  weights = np.ldexp(1.0, -exponents)[:, None]
  norms = (
    np.linalg.norm(weights * head[:, block].astype(np.float64), axis=0).max()
    for block in token_blocks(head)
  )
  longest = np.max(np.linalg.norm(map.astype(np.float64), axis=0))
  bound = float(max(norms)) * float(longest)
  scale = 52 - math.frexp(bound)[1]
  return scale, (scale - exponents).astype(np.int16)

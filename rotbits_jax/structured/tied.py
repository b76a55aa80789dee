"""A token embedding that is a linear image of the head.

Let V be the number of tokens, d the width of the embedding, and D the width of the
head's input. The kernel of the head is `[D, V]`. The embedding `[V, d]` is tied to the
head if it is `head^T @ T` for a small matrix T `[D, d]`. A tied embedding is stored as
T, which has far fewer numbers. `passes.tied` finds T.

The leaf `Tied` stands for the embedding only together with the head. `product` is the
known array of a `Difference` that has every bit of the embedding.
"""

from collections.abc import Iterator
import dataclasses
import functools
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import pool
from rotbits_jax.structured import base
from rotbits_jax.structured import fields
from rotbits_jax.system import host

_BLOCK = 1 << 9  # tokens of a block of a product, which fits the cache
_LEAST = -50  # exponent of a column, so that no number of a product is subnormal


@base.register
@dataclasses.dataclass(frozen=True)
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


def token_blocks(head: Any) -> Iterator[slice]:
  """Yields the tokens of a head `[D, V]` as slices of about 2^23 numbers each."""
  step = max((1 << 23) // max(head.shape[0], 1), 1)
  return (slice(i, i + step) for i in range(0, head.shape[1], step))


def product(
  head: np.ndarray,  # [D, V]
  map: np.ndarray,  # int16 [D, d]
  scale: int,  # from -64 to 64
  dtype: np.dtype,  # of P, at most 16 bits
) -> np.ndarray:
  """Returns the product P = `2^-scale head^T @ map`, `[V, d]`, rounded.

  Each column of both matrices becomes integers of 16 bits, h and t, of a high byte and
  a low one, because processors multiply bytes many times as fast as float64:

      h t / 256 = 256 h1 t1 + h1 t0 + h0 t1 + h0 t0 / 256

  The last term is left out; it is smaller than what rounding the head changes.

  All machines compute the same bits. Sums of int32 do not depend on their order, even
  if they overflow. Floats are multiplied by powers of two, without subnormal numbers,
  and are rounded to integers, to float32 and to the dtype, as IEEE 754 defines it.
  """
  table = host.empty((head.shape[1], map.shape[1]), dtype)
  high, low, exponents = _bytes(map.astype(np.float32))
  factors = jnp.concatenate((high, low), axis=1).T, exponents[:, None] - scale
  step = min(_BLOCK, len(table))

  def job(start: int) -> None:
    tokens = slice(start, start + step)
    columns = np.ascontiguousarray(head[:, tokens])
    table[tokens] = _transposed(_product(columns, *factors, dtype))

  # All blocks have one shape, for one program; the last one overlaps another.
  pool.each(job, {min(i, len(table) - step) for i in range(0, len(table), step or 1)})
  return table


def _power(exponents: jax.Array) -> jax.Array:
  """Returns powers of two, float32; exponents are those of normal numbers."""
  return jax.lax.bitcast_convert_type((exponents + 127) << 23, jnp.float32)


@jax.jit
def _bytes(columns: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the high and the low bytes of integers, `[D, n]`, and their exponents.

  A column, float32, is `2^exponent` times its integers.
  """
  bits = jax.lax.bitcast_convert_type(columns, jnp.int32) >> 16 & 0x7FFF
  # A little more than the greatest number, so that its high byte is at most 127.
  most = jnp.max(bits.astype(jnp.int16), axis=0).astype(jnp.int32) + 2
  exponents = jnp.maximum((most >> 7) - (126 + 15), _LEAST)
  # The sum is rounded to an integer, whose lowest bits are those of the float.
  sums = columns * _power(-exponents) + np.float32(3 << 22)
  integers = jax.lax.bitcast_convert_type(sums, jnp.int32)
  return (integers + 128 >> 8).astype(jnp.int8), integers.astype(jnp.int8), exponents


@functools.partial(jax.jit, static_argnames='dtype')
def _product(
  columns: jax.Array, both: jax.Array, exponents: jax.Array, dtype: Any
) -> jax.Array:
  """Returns P^T `[d, n]`, given columns of the head, and both bytes of map^T."""
  times = functools.partial(jnp.matmul, preferred_element_type=jnp.int32)
  head_high, head_low, head_exponents = _bytes(columns.astype(jnp.float32))
  of_high, of_low = jnp.split(times(both, head_high), 2)
  sums = (of_high << 8) + of_low + times(both[: len(of_high)], head_low)
  # Two factors, because their product may be too large or too small for float32.
  product = sums.astype(jnp.float32) * _power(exponents + 8) * _power(head_exponents)
  return product.astype(dtype)


# XLA would transpose the factors of a product in the same program, which takes long.
_transposed = jax.jit(jnp.transpose)

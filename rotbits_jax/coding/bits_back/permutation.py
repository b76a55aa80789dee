r"""Bits-back coding over the symmetric group: the order of rows costs no bits.

Sometimes the order of n rows does not matter, as for the neurons of an MLP. Then the
encoder pops an order from the message, and stores the rows in this order. The decoder
finds the order by sorting the rows, and pushes it back. All of this is exact, because
only integers are involved. It saves log2 n! bits. The order among equal rows cannot be
found, so it is not popped: with blocks of t_1, t_2, ... equal rows, coding saves
log2 n! / (t_1! t_2! ...) bits.

Encoder:

    order, starts = canonical_order(rows)
    message, arrangement = arrangements(starts).pop(message)
    stored = rows[order][arrangement]                            # and push these

Decoder, when it has popped these:

    order, starts = canonical_order(stored)
    message = arrangements(starts).push(message, inverse(order))

Shape letters: n rows, C numbers in a row. A permutation p, int32 `[n]`, maps rows to
`rows[p]`.

Reference: R. Durstenfeld, Algorithm 235: Random permutation, CACM 7 (1964) 420.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.system import native

# Each value of a digit with at most 2^12 values owns at least 2^4 of 2^16 slots.
# Therefore their unequal shares cost less than 1e-3 bits.
_DIGIT_BITS = 12


def uniform(starts: jax.Array) -> codecs.Codec:
  """Returns the codec of uniform permutations that map every block to itself.

  A block is a run of consecutive places. The codec does a Fisher-Yates shuffle within
  each block: it goes over the places from the last one down, and swaps each place with
  a place of the same block at or below it. The symbols are these other places.

  Args:
    starts: int32 `[n]`, the first place of the block that contains each place. If all
      are 0, the permutations are the whole symmetric group.

  Returns:
    A codec of int32 `[n]`.
  """
  starts = jnp.asarray(starts, jnp.int32)
  if starts.size < 2:  # XLA cannot compile the loops over one place
    return codecs.certain(jnp.zeros_like(starts))
  places = jnp.arange(starts.size, dtype=jnp.int32)
  sizes = (places - starts + 1).astype(jnp.uint32)
  one_digit = starts.size <= 1 << _DIGIT_BITS
  choices = codecs.uniform(sizes) if one_digit else _two_digits(sizes)

  def push(message: rans.Message, permutation: jax.Array) -> rans.Message:
    symbols = native.loop(_choices)(permutation, starts)
    return choices.push(message, symbols.astype(jnp.uint32))

  def pop(message: rans.Message) -> tuple[rans.Message, jax.Array]:
    message, symbols = choices.pop(message)
    return message, native.loop(_shuffled)(starts + symbols.astype(jnp.int32))

  return codecs.Codec(push, pop)


def _shuffled(chosen: jax.Array) -> jax.Array:
  """Swaps each place, from the last one down, with the place that is chosen for it."""
  places = jnp.arange(chosen.size, dtype=jnp.int32)
  step = lambda values, x: (_swap(values, *x), None)
  return jax.lax.scan(step, places, (places, chosen), reverse=True)[0]


def _choices(permutation: jax.Array, starts: jax.Array) -> jax.Array:
  """Returns `chosen - starts` for the chosen places: the inverse of `_shuffled`."""
  places = jnp.arange(starts.size, dtype=jnp.int32)

  def step(
    carry: tuple[jax.Array, jax.Array], x: tuple[jax.Array, jax.Array, jax.Array]
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    values, where = carry
    i, row, start = x
    j = where[row]
    carry = _swap(values, i, j), _swap(where, values[i], values[j])
    return carry, j - start

  carry, rows = (places, places), (places, permutation, starts)
  return jax.lax.scan(step, carry, rows, reverse=True)[1]


def _swap(values: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
  # Two updates and not a scatter, which a native loop cannot contain.
  first, second = values[i], values[j]
  return values.at[i].set(second).at[j].set(first)


def arrangements(starts: jax.Array) -> codecs.Codec:
  """Returns the codec of distinguishable orders of rows, which it codes as uniform.

  Orders that differ only among equal rows are not distinguishable. `pop` pops a
  permutation of all rows, and pushes back the permutations within blocks of equal rows.

  Args:
    starts: int32 `[n]`, the first place of the block of equal rows that contains each
      place, from `canonical_order`.

  Returns:
    A codec of int32 `[n]`: permutations that keep the rows of a block in order.
  """
  starts = jnp.asarray(starts, jnp.int32)
  everything, within = uniform(jnp.zeros_like(starts)), uniform(starts)

  def pop(message: rans.Message) -> tuple[rans.Message, jax.Array]:
    message, permutation = everything.pop(message)
    # The places to which the rows of each block go, in ascending order.
    order = jnp.argsort(starts[permutation], stable=True)
    message = within.push(message, permutation[order])
    return message, inverse(order)

  def push(message: rans.Message, arrangement: jax.Array) -> rans.Message:
    message, inner = within.pop(message)
    return everything.push(message, inner[arrangement])

  return codecs.Codec(push, pop)


def canonical_order(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Sorts rows lexicographically by their bits, taken as unsigned integers.

  This runs on the host, because there rows are compared as bytes, which is far faster
  than a sort by thousands of keys.

  Args:
    rows: `[n, C]`, of any dtype with a fixed size.

  Returns:
    order: int32 `[n]`. `rows[order]` is sorted, and equal rows keep their order.
    starts: int32 `[n]`. In the sorted rows, the first place of the block of equal rows
      that contains each place.
  """
  n = rows.shape[0]
  if rows.size == 0:
    return np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
  bits = np.ascontiguousarray(rows).view(f'u{rows.dtype.itemsize}')
  # The order of big-endian integers is the order of their bytes.
  big_endian = bits.astype(bits.dtype.newbyteorder('>'))
  keys = big_endian.view(f'V{bits[0].nbytes}')[:, 0]
  order = np.argsort(keys, kind='stable').astype(np.int32)
  new = np.ones(n, bool)
  new[1:] = (bits[order[1:]] != bits[order[:-1]]).any(axis=1)
  starts = np.maximum.accumulate(np.where(new, np.arange(n), 0))
  return order, starts.astype(np.int32)


def inverse(permutation: jax.Array) -> jax.Array:
  """Returns the inverse of a permutation."""
  places = jnp.arange(permutation.size, dtype=jnp.int32)
  return jnp.zeros_like(places).at[permutation].set(places, unique_indices=True)


def _two_digits(sizes: jax.Array) -> codecs.Codec:
  """Returns the codec of integers uniform on `[0, size)`, for sizes up to 2^28.

  It codes an integer as two digits, each with a uniform codec.
  """
  bits = jnp.uint32(32) - jax.lax.clz(sizes - 1)
  shift = jnp.maximum(bits, _DIGIT_BITS) - _DIGIT_BITS
  unit = jnp.uint32(1) << shift
  high_codec = codecs.uniform((sizes + unit - 1) >> shift)
  low_codec = lambda high: codecs.uniform(jnp.minimum(unit, sizes - (high << shift)))

  def push(message: rans.Message, symbols: jax.Array) -> rans.Message:
    high = symbols >> shift
    message = low_codec(high).push(message, symbols & (unit - 1))
    return high_codec.push(message, high)

  def pop(message: rans.Message) -> tuple[rans.Message, jax.Array]:
    message, high = high_codec.pop(message)
    message, low = low_codec(high).pop(message)
    return message, high << shift | low

  return codecs.Codec(push, pop)

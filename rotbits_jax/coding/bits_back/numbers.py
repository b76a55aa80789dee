"""Arrays of floating-point numbers on a stack of words, plain or entropy coded.

Bits-back coding puts the numbers of all arrays on one stack. (`coding.weights` codes
arrays for files of which each part decodes on its own.)

A plain array is pushed as the 16-bit words that it consists of. To entropy code an
array, each number is split into a symbol, which depends on the exponent and the top
bits of the mantissa, and a rest, the other bits; see `floats`. The rests are packed
densely and pushed first. Then the symbols are pushed in blocks, under one frequency
table for the array. Each block is a `rans.Message`, in the layout of `rans.to_words`,
with its number of words on top.

Shape letters: N lanes of a block, T symbols of a lane, A symbols in the alphabet.
"""

from collections.abc import Iterator
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import categorical
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding.bits_back import word_stack
from rotbits_jax.coding.weights import floats

_MAX_LANES = 1024
_MAX_STEPS = 4096


def push(
  stack: word_stack.WordStack, array: np.ndarray, *, entropy: bool
) -> np.ndarray | None:
  """Pushes an array.

  Args:
    stack: the words; changed in place.
    array: an array of a dtype in `floats.LAYOUTS`.
    entropy: whether to entropy code the array.

  Returns:
    The frequency table of the array, int64 `[A]`; None if `entropy` is false.

  Raises:
    ValueError: if the dtype of the array is not supported.
  """
  if array.dtype not in floats.LAYOUTS:
    raise ValueError(f'only floats can be coded, got {array.dtype=}')
  flat = np.ascontiguousarray(array).reshape(-1)
  if not entropy:
    stack.push(flat.view(np.uint16))
    return None
  layout = floats.LAYOUTS[flat.dtype]
  symbols, rests = jax.device_get(_split(flat))
  packed = floats.pack_bits(rests, layout.rest_bits)
  stack.push(np.pad(packed, (0, packed.size % 2)).view(np.uint16))
  counts = np.bincount(symbols, minlength=layout.alphabet)
  table = tables.quantize(counts if flat.size else counts + 1)
  intervals = tables.pack_intervals(table[None])
  for start, count in _blocks(flat.size):
    steps, lanes = _geometry(count)
    message = _push_symbols(
      rans.empty(lanes, steps),
      np.pad(symbols[start : start + count], (0, steps * lanes - count)),
      count,
      intervals,
    )
    stack.push_block(rans.to_words(message))
  return table


def pop(
  stack: word_stack.WordStack,
  dtype: str,
  shape: tuple[int, ...],
  table: np.ndarray | None,
) -> np.ndarray:
  """Pops an array: the inverse of `push`.

  Args:
    stack: the words; changed in place.
    dtype: dtype of the array.
    shape: shape of the array.
    table: the table that `push` returned; zeros may be appended to it.

  Returns:
    The array.

  Raises:
    ValueError: if the stack does not hold such an array.
  """
  kind = jnp.dtype(dtype)
  size = int(np.prod(shape, dtype=np.int64))
  if table is None:
    return stack.pop(size * kind.itemsize // 2).view(kind).reshape(shape)
  layout = floats.LAYOUTS[np.dtype(kind)]
  if table[layout.alphabet :].any():
    raise ValueError(f'a frequency table has symbols that do not exist for {dtype}')
  own = table[None, : layout.alphabet]
  intervals, slots = tables.pack_intervals(own), tables.slots(own)
  symbols = np.empty(size, np.uint16)
  for start, count in reversed(list(_blocks(size))):
    steps, lanes = _geometry(count)
    message = rans.from_words(stack.pop_block(), lanes, steps)
    message, popped = _pop_symbols(message, count, intervals, slots, steps)
    check_empty(message)
    symbols[start : start + count] = np.asarray(popped)[:count]
  packed_size = floats.packed_size(size, layout.rest_bits)
  packed = stack.pop(-(-packed_size // 2)).view(np.uint8)
  rests = floats.unpack_bits(packed, size, layout.rest_bits)
  return np.asarray(_join(symbols, rests, dtype)).reshape(shape)


def check_empty(message: rans.Message) -> None:
  """Checks that exactly the content of a message has been popped.

  Raises:
    ValueError: if content is left, or if more was popped than the message held.
  """
  rans.check(message)
  if np.any(np.asarray(message.size)) or np.any(np.asarray(message.state) != 1 << 16):
    raise ValueError('a block of symbols holds more than it should')


def _blocks(size: int) -> Iterator[tuple[int, int]]:
  """Yields the first symbol of each block, and its number of symbols."""
  most = _MAX_LANES * _MAX_STEPS
  return ((start, min(most, size - start)) for start in range(0, size, most))


def _geometry(count: int) -> tuple[int, int]:
  """Returns T and N for a block of `count` symbols.

  Both are powers of two, so that blocks share compiled programs.
  """
  lanes = 1 << min(max(count >> 9, 1), _MAX_LANES).bit_length() - 1
  return 1 << max(-(-count // lanes) - 1, 0).bit_length(), lanes


_split = jax.jit(floats.split)
_join = jax.jit(
  lambda symbols, rests, dtype: floats.join(symbols, rests, jnp.dtype(dtype)),
  static_argnums=2,
)


def _contexts(steps: int, lanes: int, count: int | jax.Array) -> jax.Array:
  """Returns 0 for places with a symbol and 1 for the others: uint32 `[T, N]`."""
  places = jnp.arange(steps * lanes).reshape(steps, lanes)
  return (places >= count).astype(jnp.uint32)


@functools.partial(jax.jit, donate_argnums=0)
def _push_symbols(
  message: rans.Message, symbols: jax.Array, count: jax.Array, intervals: jax.Array
) -> rans.Message:
  dealt = symbols.reshape(-1, message.lanes)
  contexts = _contexts(dealt.shape[0], message.lanes, count)
  return categorical.push(message, dealt, contexts, intervals)


@functools.partial(jax.jit, static_argnums=4)
def _pop_symbols(
  message: rans.Message,
  count: jax.Array,
  intervals: jax.Array,
  slots: jax.Array,
  steps: int,
) -> tuple[rans.Message, jax.Array]:
  contexts = _contexts(steps, message.lanes, count)
  message, symbols = categorical.pop(message, contexts, intervals, slots)
  return message, symbols.astype(jnp.uint16).reshape(-1)

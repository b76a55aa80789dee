"""Statistics of up to 2^20 elements, by which `plans` chooses how arrays are stored.

Shape letters: n elements, R rows, C columns, B buckets, A symbols.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding.weights import blocks
from rotbits_jax.coding.weights import buffers
from rotbits_jax.coding.weights import contexts as contexts_lib
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import line_sums
from rotbits_jax.system import native

# ---- symbols -------------------------------------------------------------------------

_UNROLLED = 8  # elements that one step counts
_ZEROS = 1 << 12  # counts that one step clears


@functools.partial(jax.jit, static_argnames='layout', donate_argnums=0)
def _count(
  counts: jax.Array,  # int32 [2^20]
  bits: jax.Array,  # unsigned integers [2^20]
  buckets: jax.Array,  # uint8 [2^20]
  *numbers: jax.Array,
  layout: layouts.Layout,
) -> jax.Array:
  def loop(
    counts: jax.Array,
    bits: jax.Array,
    buckets: jax.Array,
    alphabet: jax.Array,
    used: jax.Array,
    count: jax.Array,
    min_exponent: jax.Array,
    raw_bits: jax.Array,
  ) -> jax.Array:
    zeros = jnp.zeros(_ZEROS, counts.dtype)
    clear = lambda i, x: jax.lax.dynamic_update_slice(x, zeros, (i * _ZEROS,))
    counts = jax.lax.fori_loop(0, -(-used // _ZEROS), clear, counts)
    part = lambda x, i: jax.lax.dynamic_slice(x, (i * _UNROLLED,), (_UNROLLED,))

    def step(i: jax.Array, counts: jax.Array) -> jax.Array:
      symbols = layout.symbols(part(bits, i), min_exponent, raw_bits)
      # Unsigned, because it takes time to see whether signed indices are below 0.
      for j in symbols + part(buckets, i).astype(jnp.uint32) * alphabet:
        found = jax.lax.dynamic_index_in_dim(counts, j, keepdims=False)
        counts = jax.lax.dynamic_update_index_in_dim(counts, found + 1, j, 0)
      return counts

    return jax.lax.fori_loop(0, count // _UNROLLED, step, counts)

  return native.loop(loop)(counts, bits, buckets, *numbers)


def histogram(
  bits: blocks.Fill,
  buckets: blocks.Fill,
  count: int,
  shape: tuple[int, int],
  layout: layouts.Layout,
) -> np.ndarray:
  """Counts how often each symbol occurs in each scale bucket, on this thread.

  Args:
    bits: writes the bit patterns of the elements.
    buckets: writes the bucket of each element.
    count: n.
    shape: the number of buckets B, and a bound A for the symbols. `(B + 1) * A` is at
      most `contexts.MAX_ENTRIES`.
    layout: layout of the elements.

  Returns:
    int64 `[*shape]`.
  """
  whole, used = -(-count // _UNROLLED) * _UNROLLED, shape[0] * shape[1]
  patterns = buffers.scratch('bits', buffers.ROOM, layout.unsigned)
  places = buffers.scratch('contexts', buffers.ROOM, np.uint8)
  bits(patterns[:count])
  buckets(places[:count])
  # The others count in a bucket of their own.
  patterns[count:whole], places[count:whole] = 0, shape[0]
  counts = _count(
    buffers.taken('counts', contexts_lib.MAX_ENTRIES, np.int32),
    patterns,
    places,
    np.uint32(shape[1]),
    np.int32(used + shape[1]),
    np.int32(whole),
    layout.unsigned.type(layout.min_exponent),
    np.uint32(layout.raw_bits),
    # The raw bits are an operand, so that layouts share programs.
    layout=dataclasses.replace(layout.program, raw_bits=0),
  )
  found = np.asarray(counts)[:used].reshape(shape).astype(np.int64)
  buffers.keep('counts', counts)
  return found


# ---- squares -------------------------------------------------------------------------

_GREATEST = 2.0**60  # elements are limited to it, so that their squares are finite
_MOST_EXPONENT = 126


@functools.partial(jax.jit, static_argnames='dtype', donate_argnums=0)
def _sums(
  out: line_sums.Sums,
  elements: tuple[jax.Array],  # unsigned integers
  *others: jax.Array,
  unit: jax.Array,
  dtype: np.dtype,
) -> line_sums.Sums:
  def squares(elements: tuple[jax.Array, jax.Array], start: jax.Array) -> jax.Array:
    bits, unit = elements
    x = jax.lax.dynamic_slice(bits, (start,), (line_sums.WIDTH,))
    x = jnp.abs(line_sums.floats(x, dtype) * unit)
    return jnp.square(jnp.where(x < _GREATEST, x, jnp.float32(_GREATEST)))

  return line_sums.loop(squares, out, (*elements, unit), *others)


def sums(matrix: np.ndarray, weights: np.ndarray, exponent: int) -> line_sums.Sums:
  """Sums squares of elements, divided by 4^exponent, on this thread.

  Args:
    matrix: floats or integers `[R, C]`, contiguous, of at most 2^20 elements.
    weights: float32 `[C]`, of the columns.
    exponent: from `scales.exponent_of`.
  """
  exponent = int(np.clip(exponent, -_MOST_EXPONENT, _MOST_EXPONENT))
  unit, bits = np.float32(2.0**-exponent), matrix.view(f'u{matrix.dtype.itemsize}')
  program = functools.partial(_sums, unit=unit, dtype=matrix.dtype)
  return line_sums.run(program, (bits,), weights)

"""Statistics of up to 2^20 elements, by which `plans` chooses how arrays are stored.

Shape letters: n elements, R rows, C columns, B buckets, A symbols.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding.weights import blocks
from rotbits_jax.coding.weights import buffers
from rotbits_jax.coding.weights import contexts as contexts_lib
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import scales
from rotbits_jax.system import native

_ROOM = blocks.CAPACITY  # elements of the arrays that the programs are compiled for

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
  patterns = buffers.scratch('bits', _ROOM, layout.unsigned)
  places = buffers.scratch('contexts', _ROOM, np.uint8)
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

_WIDTH = 128  # elements of a row that one step squares
_PADDED = _ROOM + _WIDTH  # because the last step of a row may go beyond it

_GREATEST = 2.0**60  # elements are limited to it, so that their squares are finite
_MOST_EXPONENT = 126


@functools.partial(jax.jit, static_argnames='dtype', donate_argnums=0)
def _sums(
  out: tuple[jax.Array, ...],  # float32 [2^20 + 128] each
  bits: jax.Array,  # unsigned integers [2^20 + 128]
  weights: jax.Array,  # float32 [2^20 + 128], 0 from C on
  unit: jax.Array,
  rows: jax.Array,
  columns: jax.Array,
  *,
  dtype: np.dtype,
) -> tuple[jax.Array, ...]:
  part = lambda x, start: jax.lax.dynamic_slice(x, (start,), (_WIDTH,))
  put = lambda x, own, start: jax.lax.dynamic_update_slice(x, own, (start,))

  def loop(
    out: tuple[jax.Array, ...],
    bits: jax.Array,
    weights: jax.Array,
    unit: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
  ) -> tuple[jax.Array, ...]:
    steps, share = -(-columns // _WIDTH), 1 / columns.astype(jnp.float32)

    def squares(start: jax.Array) -> jax.Array:
      x = part(bits, start)
      if dtype == jnp.bfloat16:  # which XLA converts slowly
        x = jax.lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)
      else:
        x = jax.lax.bitcast_convert_type(x, dtype).astype(jnp.float32)
      x = jnp.abs(x * unit)
      return jnp.square(jnp.where(x < _GREATEST, x, jnp.float32(_GREATEST)))

    def clear(j: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      return tuple(put(x, jnp.zeros(_WIDTH, x.dtype), j * _WIDTH) for x in sums)

    def row(r: jax.Array, out: tuple[jax.Array, ...]) -> Any:
      *of_rows, of_columns, weighted = out

      def add(j: jax.Array, both: tuple[jax.Array, jax.Array]) -> Any:
        found = squares(r * columns + j * _WIDTH)
        is_own = jnp.arange(_WIDTH) < columns - j * _WIDTH
        return (
          both[0] + jnp.where(is_own, found, 0) * share,
          both[1] + found * part(weights, j * _WIDTH),
        )

      both = jax.lax.fori_loop(0, steps, add, (jnp.zeros(_WIDTH, jnp.float32),) * 2)
      own = [x.sum() for x in both]
      factors = jnp.float32(1), jnp.where(own[1] > 0, 1 / own[1], 0)

      def below(j: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start, found = j * _WIDTH, squares(r * columns + j * _WIDTH)
        return tuple(
          put(x, part(x, start) + found * factor, start)
          for x, factor in zip(sums, factors, strict=True)
        )

      of_columns, weighted = jax.lax.fori_loop(0, steps, below, (of_columns, weighted))
      pairs = zip(of_rows, own, strict=True)
      made = [jax.lax.dynamic_update_index_in_dim(x, y, r, 0) for x, y in pairs]
      return *made, of_columns, weighted

    *of_rows, of_columns, weighted = out
    cleared = jax.lax.fori_loop(0, steps, clear, (of_columns, weighted))
    return jax.lax.fori_loop(0, rows, row, (*of_rows, *cleared))

  return native.loop(loop)(out, bits, weights, unit, rows, columns)


def sums(matrix: np.ndarray, weights: np.ndarray, exponent: int) -> scales.Sums:
  """Sums squares of elements, divided by 4^exponent, on this thread.

  The order of the additions depends on the shape of the matrix alone.

  Args:
    matrix: floats or integers `[R, C]`, contiguous, of at most 2^20 elements.
    weights: float32 `[C]`, of the columns.
    exponent: from `scales.exponent_of`.
  """
  rows, columns = matrix.shape
  unsigned = np.dtype(f'u{matrix.dtype.itemsize}')
  padded = buffers.scratch('padded', _PADDED, unsigned)
  padded[: matrix.size] = matrix.reshape(-1).view(unsigned)
  # Elements beyond a row count nothing.
  of_columns = buffers.scratch('weights', _PADDED, np.float32)
  of_columns[:columns] = weights
  of_columns[columns : columns + _WIDTH] = 0
  names = 'means', 'rows', 'columns', 'weighted'
  exponent = int(np.clip(exponent, -_MOST_EXPONENT, _MOST_EXPONENT))
  found = _sums(
    tuple(buffers.taken(name, _PADDED, np.float32) for name in names),
    padded,
    of_columns,
    np.float32(2.0**-exponent),
    np.int32(rows),
    np.int32(columns),
    dtype=matrix.dtype,
  )
  sizes = rows, rows, columns, columns
  # A sum is infinite where some rows gave a column of great elements a great weight.
  most = np.finfo(np.float32).max
  pairs = zip(found, sizes, strict=True)
  made = [np.minimum(np.asarray(x)[:n], most).astype(np.float64) for x, n in pairs]
  for name, array in zip(names, found, strict=True):
    buffers.keep(name, array)
  return scales.Sums(*made)

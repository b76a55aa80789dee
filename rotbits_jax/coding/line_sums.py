"""Sums of the rows and of the columns of a matrix, of what a program makes of elements.

A matrix has at most 2^20 elements. The program is the same for all shapes, and takes a
row a few elements at a time.

Shape letters: R rows, C columns.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import buffers
from rotbits_jax.system import native

WIDTH = 128  # elements of a row that one step takes
PADDED = buffers.ROOM + WIDTH  # because the last step of a row may go beyond it

_NAMES = 'rows', 'weighted'


class Sums(NamedTuple):
  """Sums of one number of each element of some rows.

  Attributes:
    rows: the sum of each row, weighted by columns, `[R]`.
    weighted: the sum of each column, weighted by the inverse of `rows`, `[C]`.
  """

  rows: Any
  weighted: Any


def loop(
  numbers: Callable[[Any, jax.Array], jax.Array],
  out: Sums,
  elements: Any,
  weights: jax.Array,
  rows: jax.Array,
  columns: jax.Array,
  summed: jax.Array,
) -> Sums:
  """Sums numbers of elements, in a program.

  Args:
    numbers: takes `elements` and the index of the first of `WIDTH` of them, in C order;
      returns their numbers, float32 `[WIDTH]`, at least 0.
    out: float32 `[PADDED]` each, written.
    elements: a PyTree of arrays.
    weights: float32 `[PADDED]`, of the columns; 0 behind them.
    rows: R.
    columns: C.
    summed: the columns that are summed: C, or 0 if their sums are not wanted.
  """
  part = lambda x, start: jax.lax.dynamic_slice(x, (start,), (WIDTH,))
  put = lambda x, own, start: jax.lax.dynamic_update_slice(x, own, (start,))

  def whole(out: Sums, elements: Any, weights: jax.Array, *counts: jax.Array) -> Sums:
    rows, columns, summed = counts

    def clear(j: jax.Array, sums: jax.Array) -> jax.Array:
      return put(sums, jnp.zeros(WIDTH, sums.dtype), j * WIDTH)

    def row(r: jax.Array, out: Sums) -> Sums:
      def add(j: jax.Array, total: jax.Array) -> jax.Array:
        own = numbers(elements, r * columns + j * WIDTH)
        return total + own * part(weights, j * WIDTH)

      steps, zeros = -(-columns // WIDTH), jnp.zeros(WIDTH, jnp.float32)
      total = jax.lax.fori_loop(0, steps, add, zeros).sum()
      factor = jnp.where(total > 0, 1 / total, 0)

      def below(j: jax.Array, sums: jax.Array) -> jax.Array:
        own = numbers(elements, r * columns + j * WIDTH)
        return put(sums, part(sums, j * WIDTH) + own * factor, j * WIDTH)

      weighted = jax.lax.fori_loop(0, -(-summed // WIDTH), below, out.weighted)
      own_rows = jax.lax.dynamic_update_index_in_dim(out.rows, total, r, 0)
      return Sums(own_rows, weighted)

    cleared = jax.lax.fori_loop(0, -(-summed // WIDTH), clear, out.weighted)
    return jax.lax.fori_loop(0, rows, row, Sums(out.rows, cleared))

  found: Sums = native.loop(whole)(out, elements, weights, rows, columns, summed)
  return found


def floats(bits: jax.Array, dtype: np.dtype) -> jax.Array:
  """Returns elements of a dtype, given by integers with their bits, as float32."""
  if dtype == jnp.bfloat16:  # which XLA converts slowly
    wide = bits.astype(f'{bits.dtype.kind}4') << 16
    return jax.lax.bitcast_convert_type(wide, jnp.float32)
  return jax.lax.bitcast_convert_type(bits, dtype).astype(jnp.float32)


def run(
  program: Callable[..., Sums],
  arrays: Sequence[np.ndarray],
  weights: np.ndarray,
  *,
  of_columns: bool = True,
) -> Sums:
  """Runs a program on this thread.

  Args:
    program: a compiled program that returns `loop`; it takes `out`, which is
      donated, and what follows there.
    arrays: the program's `elements`, `[R, C]` each, of at most 2^20 elements.
    weights: float32 `[C]`, of the columns.
    of_columns: whether the columns are summed. If not, nothing is returned for them.

  Returns:
    The sums, float64. They depend on the shape and the elements alone.
  """
  rows, columns = arrays[0].shape
  padded = buffers.scratch('weights', PADDED, np.float32)
  padded[:columns] = weights
  padded[columns : columns + WIDTH] = 0
  summed = columns if of_columns else 0
  elements = tuple(_padded(f'elements {i}', x) for i, x in enumerate(arrays))
  out = Sums(*(buffers.taken(name, PADDED, np.float32) for name in _NAMES))
  numbers = map(np.int32, (rows, columns, summed))
  found = program(out, elements, padded, *numbers)
  sizes = rows, summed
  # A sum is infinite where some rows gave a column of great elements a great weight.
  most = np.finfo(np.float32).max
  pairs = zip(found, sizes, strict=True)
  made = [np.minimum(np.asarray(x)[:n], most).astype(np.float64) for x, n in pairs]
  for name, array in zip(_NAMES, found, strict=True):
    buffers.keep(name, array)
  return Sums(*made)


def joined(parts: Sequence[Sums]) -> Sums:
  """Returns the sums over all rows, given those over parts of the rows, in order."""
  rows, weighted = zip(*parts, strict=True)
  return Sums(np.concatenate(rows), np.sum(weighted, axis=0))


def row_parts(shape: tuple[int, ...], most: int = buffers.ROOM) -> Iterator[slice]:
  """Yields parts of the rows of a matrix, of at most `most` elements or one row."""
  step = max(most // max(shape[1], 1), 1)
  return (slice(start, start + step) for start in range(0, shape[0], step))


def _padded(name: str, array: np.ndarray) -> np.ndarray:
  found = buffers.scratch(name, PADDED, array.dtype)
  found[: array.size] = array.reshape(-1)
  return found

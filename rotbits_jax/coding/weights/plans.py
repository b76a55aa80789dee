"""One array as symbols to code and bytes that are stored as they are.

Symbols are of floats or of short integers, and are coded in classes of lines or as one;
an array that is no shorter so is stored as it is.

Shape letters: R rows, C columns, A symbols of the alphabet.
"""

import functools
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import contexts
from rotbits_jax.coding.weights import floats
from rotbits_jax.coding.weights import integers
from rotbits_jax.coding.weights import scales

DTYPES = {
  np.dtype(d).name: np.dtype(d)
  for d in (
    *(ml_dtypes.bfloat16, np.float16, np.float32, np.float64, np.bool_),
    *(np.int8, np.int16, np.int32, np.int64),
    *(np.uint8, np.uint16, np.uint32, np.uint64),
  )
}
"""Dtypes that can be stored, by name. Those in `floats.LAYOUTS` and `integers.DTYPES`
are modelled, the others are stored as they are."""


class Coded(NamedTuple):
  """The parts of an array that is coded."""

  form: scales.Format
  rest: int  # bits of each of the rests
  symbols: np.ndarray  # uint16 [R, C]
  rests: np.ndarray  # unsigned [R, C]
  lines: scales.Lines | None  # None: a table of its own
  counts: np.ndarray  # int64 [labels, A], of the symbols in the lines of each label


class Plan(NamedTuple):
  """How an array is stored."""

  array: np.ndarray
  coded: Coded | None = None  # None: as it is
  saved: float = 0.0  # bytes, about

  def raw(self) -> np.ndarray:
    """What is stored as it is: uint8."""
    if self.coded is None:
      return np.ascontiguousarray(self.array).reshape(-1).view(np.uint8)
    return floats.pack_bits(self.coded.rests.reshape(-1), self.coded.rest)

  def take(self, order: np.ndarray, axis: int) -> 'Plan':
    """The plan of the array with its lines along an axis in this order."""
    array, coded = self.array.take(order, axis), self.coded
    if coded:
      shape, lines = self.array.shape, coded.lines
      reorder = lambda x: x.reshape(shape).take(order, axis).reshape(x.shape)
      if lines and axis == len(shape) - 1 and lines.columns.size > 1:
        lines = lines._replace(columns=lines.columns[order])
      if lines and axis < len(shape) - 1 and lines.rows.size > 1:
        rows = lines.rows.reshape(shape[:-1]).take(order, axis).reshape(-1)
        lines = lines._replace(rows=rows)
      coded = coded._replace(
        symbols=reorder(coded.symbols), rests=reorder(coded.rests), lines=lines
      )
    return self._replace(array=array, coded=coded)


def plan(array: np.ndarray) -> Plan:
  """The shortest of: the array as it is; coded with one table; in classes of lines.

  Args:
    array: of a dtype in `DTYPES`.

  Returns:
    The plan.

  Raises:
    ValueError: if the dtype is another.
  """
  if array.dtype.name not in DTYPES:
    raise ValueError(f'numbers of this dtype cannot be stored, got {array.dtype=}')
  plain = Plan(array)
  if not array.size:
    return plain
  matrix = array.reshape(scales.matrix_shape(array.shape))
  if array.dtype in floats.LAYOUTS:
    # Flat, so that arrays of one size share a compiled function.
    parts = _split(array.reshape(-1))
    symbols, rests = (np.asarray(x).reshape(matrix.shape) for x in parts)
    width = floats.LAYOUTS[array.dtype].rest_bits
    zeros = floats.trailing_zeros(rests, width)
    rest = width - zeros
    rests = rests >> rests.dtype.type(zeros) if rest else rests
  elif array.dtype in integers.DTYPES:
    rest = _low_bits(matrix)
    symbols, rests = integers.split(matrix, rest)
  else:
    return plain
  form = scales.format_of(array.dtype, rest)
  lines = scales.sort(matrix) if form.has_scale else None
  counts = _counts(symbols, lines, form.alphabet)
  total = counts.sum(axis=0, keepdims=True)
  cost = contexts.choose(form, None, total).cost
  coded = Coded(form, rest, symbols, rests, None, total)
  if lines:
    (used,) = np.nonzero(counts.any(axis=1))
    other = contexts.choose(form, lines.classes(used), counts[used]).cost
    for labels in (lines.rows, lines.columns):
      other += tables.entropy_bits(np.bincount(labels)) / 8
    if other < cost:
      cost, coded = other, coded._replace(lines=lines, counts=counts)
  saved = array.nbytes - floats.packed_size(array.size, rest) - cost
  return Plan(array, coded, saved) if saved > 0 else plain


def restore(
  symbols: np.ndarray | None,
  raw: np.ndarray,
  shape: tuple[int, ...],
  dtype: np.dtype,
  rest: int,
) -> np.ndarray:
  """The array of a plan.

  Args:
    symbols: `[n]`; None if the array is stored as it is.
    raw: what `Plan.raw` returned.
    shape: of the array.
    dtype: of the array.
    rest: as in `Coded`.

  Returns:
    The array.
  """
  if symbols is None:
    return raw.view(dtype).reshape(shape)
  rests = floats.unpack_bits(raw, symbols.size, rest)
  if dtype not in floats.LAYOUTS:
    return integers.join(symbols, rests, rest, dtype).reshape(shape)
  if rest:
    rests <<= np.uint32(floats.LAYOUTS[dtype].rest_bits - rest)
  return np.asarray(_join(symbols, rests, dtype.name)).reshape(shape)


def _low_bits(values: np.ndarray) -> int:
  """How many low bits of integers are best stored as they are."""
  least = integers.least_low(values)
  symbols, _ = integers.split(values, least)
  counts = np.bincount(symbols.reshape(-1), minlength=1 << integers.MODELLED_BITS)[None]
  costs = []
  for low in range(least, min(8 * values.dtype.itemsize, integers.MODELLED_BITS)):
    form = scales.Format(values.dtype, low, counts.shape[1])
    cost = contexts.choose(form, None, counts).cost
    costs.append(cost + floats.packed_size(values.size, low))
    counts = counts[:, ::2] + counts[:, 1::2]
  return least + int(np.argmin(costs))


def _counts(
  symbols: np.ndarray, lines: scales.Lines | None, alphabet: int
) -> np.ndarray:
  """How often each symbol occurs under each label: int64 `[labels, A]`."""
  if lines is None:
    return np.bincount(symbols.reshape(-1), minlength=alphabet)[None]
  size = (int(lines.labels().max()) + 1) * alphabet
  starts = np.arange(0, size, alphabet, dtype=np.int32)
  counts = np.zeros(size, np.int64)
  step = max(max(_BLOCK, size) // symbols.shape[1], 1)
  for row in range(0, symbols.shape[0], step):
    block = symbols[row : row + step]
    rows = lines.rows if lines.rows.size == 1 else lines.rows[row : row + step]
    index = lines._replace(rows=rows).spread(starts, block.shape) + block
    counts += np.bincount(index.reshape(-1), minlength=size)
  return counts.reshape(-1, alphabet)


_BLOCK = 1 << 20  # numbers that are counted together, to bound what that holds


_split = jax.jit(floats.split)


@functools.partial(jax.jit, static_argnames='dtype')
def _join(symbols: Any, rests: Any, dtype: str) -> jax.Array:
  return floats.join(symbols, rests, DTYPES[dtype])

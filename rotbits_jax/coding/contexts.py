"""The contexts of the elements of a group: which frequency table codes each of them.

All arrays of a group have one layout. An array either has a table to itself, or its
rows and columns have *scales*: class k stands for a standard deviation of 2^(k / 8),
and the class of an element is the sum of those of its row and its column. A rotated
matrix is nearly normally distributed, and so are trained weights; their standard
deviation depends on the row, on the column, or on both as a product. Classes are
absolute, so that few classes, and few frequency tables, serve many arrays. If a class
is wrong by half a step, an element costs 2.7e-3 bits more; the average cost of rounding
is 0.9e-3 bits.

The table of a class is that of the normal distribution, of which the stream holds only
the symbols that occur; or, if that is shorter, the stream holds its frequencies. The
encoder chooses the tables, and the decoder reads them. The table of the normal
distribution follows from the class k by integer arithmetic alone:

    weight(symbol) = 2^width exp(-x^2 / 2 s^2)
                   = 2^(width - x^2 / s^2 * log2(e) / 2),        s = 2^(k / 8)

Here x is the centre of the symbol's cell, the range of the elements that have this
symbol, and 2^width is the width of the cell.

An array is taken as a matrix: its last axis is that of columns, and all others together
are that of rows. Shape letters: M arrays of the group, R rows, C columns, K tables, A
symbols in use.
"""

from collections.abc import Sequence
import functools
import math
from typing import NamedTuple
import zlib

import numpy as np
from zlib_ng import zlib_ng

from rotbits_jax.coding import blocks
from rotbits_jax.coding import buffers
from rotbits_jax.coding import layouts
from rotbits_jax.coding import tables

Shape = tuple[int, ...]

STEPS = 8
"""The number of classes for a factor of 2 in the standard deviation."""

MOST_CLASSES = 254
"""The greatest number of classes of an array."""

TABLE_BYTES = 8
"""Estimated bytes for the list of symbols that occur in a class."""


def matrix_shape(shape: Shape) -> tuple[int, int]:
  """Returns R and C of an array: the product of all axes but the last; the last."""
  return math.prod(shape[:-1]), math.prod(shape[-1:])


class Scales(NamedTuple):
  """The scales of the rows and columns of an array.

  Attributes:
    base: the least class of an element.
    rows: uint8 `[R]`, added for an element's row; or a single 0 for all rows.
    columns: the same for columns, `[C]` or `[1]`.
  """

  base: int
  rows: np.ndarray
  columns: np.ndarray

  @property
  def num_classes(self) -> int:
    """The number of classes from the least to the greatest that may occur."""
    return int(self.rows.max()) + int(self.columns.max()) + 1

  def write(self, out: np.ndarray, start: int, columns: int, first: int) -> None:
    """Writes the index of each element's table.

    Args:
      out: uint8 `[n]` to write into, for n elements in C order.
      start: the first of the n elements, counted within the array.
      columns: C.
      first: the table of the least class.
    """
    if self.rows.size == self.columns.size == 1:
      out[:] = first
      return
    low, high = start // columns, -(-(start + out.size) // columns)
    rows = self.rows[low:high] if self.rows.size > 1 else self.rows
    terms = (rows + np.uint8(first))[:, None], self.columns
    if start == low * columns and out.size == (high - low) * columns:
      np.add(*terms, out=out.reshape(-1, columns))
      return
    grid = np.add(*terms, out=np.empty((high - low, columns), np.uint8))
    out[:] = grid.reshape(-1)[start - low * columns :][: out.size]


class Contexts(NamedTuple):
  """The tables with which the symbols of M arrays are coded.

  The tables of classes come first, those of single arrays last.

  Attributes:
    scales: the scales of each array; None for an array with one table.
    first: for each array, the index of the table of its least class, or of its only
      table.
    normal: bool `[K]`, whether each table is that of the normal distribution.
    frequencies: int64 `[K, A]`. The frequencies of a table that is not used are 0.
  """

  scales: tuple[Scales | None, ...]
  first: tuple[int, ...]
  normal: np.ndarray
  frequencies: np.ndarray

  def tables(self, layout: layouts.Layout) -> blocks.Tables:
    return blocks.Tables.make(self.frequencies, layout.raw_bits)

  def write(self, out: np.ndarray, index: int, start: int, shape: Shape) -> None:
    """Writes the index of each element's table.

    Args:
      out: uint8 `[n]` to write into, for n elements in C order.
      index: index of the array among the M arrays.
      start: the first of the n elements, counted within the array.
      shape: shape of the array.
    """
    scales = self.scales[index]
    if scales is None:
      out[:] = self.first[index]
    else:
      scales.write(out, start, matrix_shape(shape)[1], self.first[index])


def fits(scales: Sequence[Scales | None], alphabet: int) -> bool:
  """Tells whether arrays fit into one group."""
  count = _arrange(scales).classes.size
  return count <= blocks.MAX_TABLES and (count + 1) * alphabet <= blocks.MAX_ENTRIES


def fit(
  layout: layouts.Layout,
  scales: Sequence[Scales | None],
  counts: Sequence[np.ndarray],
) -> Contexts:
  """Makes the tables from counts of symbols. For each table it takes the shorter kind.

  Args:
    layout: the layout.
    scales: the scales of each array; None for an array with one table.
    counts: for each array, how often each symbol occurs in each class, int64
      `[classes, a]`; `[1, a]` for an array with one table.

  Returns:
    The contexts.
  """
  first, classes, has_class = _arrange(scales)
  total = np.zeros((classes.size, max(x.shape[1] for x in counts)), np.int64)
  for table, count in zip(first, counts, strict=True):
    total[table : table + len(count), : count.shape[1]] += count
  normal, frequencies = np.ones(classes.size, bool), np.zeros_like(total)
  used = total.any(axis=1)
  for members in (used & has_class, used & ~has_class):
    if members.any():
      of_tables = classes[members] if has_class[members][0] else None
      choice = choose(layout, of_tables, total[members])
      normal[members] = choice.normal
      places = np.ix_(members, choice.symbols)
      frequencies[places] = tables.quantize(choice.weights)
  return Contexts(tuple(scales), first, normal, frequencies)


class TableChoice(NamedTuple):
  """K tables and their cost."""

  symbols: np.ndarray  # int64 [a], those that occur
  normal: np.ndarray  # bool [K], whether each is that of the normal distribution
  weights: np.ndarray  # int64 [K, a], of which `tables.quantize` makes the frequencies
  costs: np.ndarray  # [K], estimated bytes of each table and the symbols coded with it


def choose(
  layout: layouts.Layout, classes: np.ndarray | None, counts: np.ndarray
) -> TableChoice:
  """Chooses, for each table, between the normal distribution and stored frequencies.

  Args:
    layout: layout of the elements.
    classes: `[K]`, the class of each table; None if the tables have no class, and then
      all of them are stored.
    counts: `[K, A]`, how often each symbol occurs with each table.

  Returns:
    The shorter choice for each table.
  """
  alphabet = counts.shape[1]
  (symbols,) = np.nonzero(counts.any(axis=0))
  weights = counts = counts[:, symbols]
  # A stored frequency takes about a byte.
  costs = _coded_bytes(counts, counts) + np.count_nonzero(counts, axis=1)
  normal = np.zeros(len(counts), bool)
  if classes is not None:
    likely = normal_weights(layout, alphabet, classes, symbols)
    likely = np.where(counts > 0, likely, 0)
    other = _coded_bytes(counts, likely) + TABLE_BYTES
    normal = other < costs
    weights = np.where(normal[:, None], likely, counts)
    costs = np.where(normal, other, costs)
  return TableChoice(symbols, normal, weights, costs)


def _coded_bytes(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Returns the bytes of symbols coded with frequencies that are not rounded."""
  whole = weights.sum(axis=1, keepdims=True)
  return tables.cost_bits(counts, weights * (tables.TOTAL / whole)) / 8


class _Tables(NamedTuple):
  """The tables of a group in their order; see `Contexts`."""

  first: tuple[int, ...]
  classes: np.ndarray  # int64 [K], the class of each table
  has_class: np.ndarray  # bool [K]


def _arrange(scales: Sequence[Scales | None]) -> _Tables:
  """Arranges the tables of arrays, which share those of classes that overlap."""
  first, classes = [0] * len(scales), list[int]()
  spans = sorted(
    (x.base, x.num_classes, i) for i, x in enumerate(scales) if x is not None
  )
  for base, count, i in spans:
    start = base if not classes or base > classes[-1] else classes[-1] + 1
    classes += range(start, base + count)
    first[i] = classes.index(base)
  singles = [i for i, x in enumerate(scales) if x is None]
  for table, i in enumerate(singles, len(classes)):
    first[i] = table
  has_class = np.repeat([True, False], (len(classes), len(singles)))
  return _Tables(tuple(first), np.array(classes + [0] * len(singles)), has_class)


# ---- bytes ---------------------------------------------------------------------------


def to_bytes(contexts: Contexts) -> bytes:
  """Serialises contexts; `from_bytes` describes the bytes."""
  heads, lines = [], []
  for scales in contexts.scales:
    head = 0, 0
    if scales:
      head = 1 + (scales.rows.size > 1) + 2 * (scales.columns.size > 1), scales.base
      lines += [x.tobytes() for x in (scales.rows, scales.columns) if x.size > 1]
    heads.append(head)
  alphabet = np.array(contexts.frequencies.shape[1], '<u2').tobytes()
  of_arrays = alphabet + np.array(heads, '<i2').tobytes() + b''.join(lines)
  present = contexts.frequencies[contexts.normal] > 0
  normal = np.packbits(contexts.normal).tobytes()
  normal += np.packbits(present, axis=1).tobytes()
  stored = tables.to_bytes(contexts.frequencies[~contexts.normal])
  return deflate(of_arrays) + deflate(normal) + stored


def from_bytes(
  data: bytes, layout: layouts.Layout, shapes: Sequence[Shape]
) -> Contexts:
  """Makes contexts from bytes: the inverse of `to_bytes`.

  The bytes have three parts. The first two are raw Deflate streams.

  * Arrays. A, uint16. Then, for each array, two int16: a mode and the base. The mode is
    0 if the array has one table; else it is 1, plus 1 if rows differ, plus 2 if columns
    differ. Then follow the scales of the rows and columns that differ, uint8.
  * Normal tables. One bit for each of the K tables tells whether it is that of the
    normal distribution; the bits fill whole bytes. Then, for each such table, one bit
    for each symbol tells whether it occurs; these fill whole bytes, too.
  * Stored tables, see `tables.to_bytes`.

  Args:
    data: the bytes.
    layout: the layout.
    shapes: the shapes of the M arrays.

  Returns:
    The contexts.

  Raises:
    ValueError: if the bytes are not contexts of such arrays.
  """
  sizes = [matrix_shape(shape) for shape in shapes]
  part, data = inflate(data, 2 + sum(4 + sum(size) for size in sizes))
  alphabet = int(part[:2].view('<u2')[0]) if part.size > 1 else 0
  if not 0 < alphabet <= layout.alphabet:
    raise ValueError(f'{alphabet} symbols of {layout.alphabet} cannot be in use')
  scales = _scales(part[2:], sizes)
  if not fits(scales, alphabet):
    raise ValueError(f'the tables of {alphabet} symbols are too many')
  first, classes, has_class = _arrange(scales)
  count, width = classes.size, -(-alphabet // 8) * 8
  part, data = inflate(data, -(-count // 8) + count * width // 8)
  normal = np.unpackbits(part[: -(-count // 8)], count=count).astype(bool)
  present = np.unpackbits(part[-(-count // 8) :]).astype(bool)
  if present.size != normal.sum() * width:
    raise ValueError(
      f'the symbols of {normal.sum()} normal tables need '
      f'{normal.sum() * width} bits, got {present.size}'
    )
  present = present.reshape(-1, width)[:, :alphabet]
  used = present.any(axis=1)
  if np.any(used & ~has_class[normal]):
    raise ValueError('a normal table belongs to an array without classes')
  # Every listed symbol occurs, and so does one of each stored table. So there cannot be
  # more of them than elements.
  occurring = int(present.sum() + count - normal.sum())
  elements = sum(rows * columns for rows, columns in sizes)
  if occurring > elements:
    raise ValueError(f'{occurring} symbols cannot occur in {elements} elements')
  frequencies = np.zeros((count, alphabet), np.int64)
  frequencies[~normal] = tables.from_bytes(data, count - len(present), alphabet)
  if used.any():
    members = np.flatnonzero(normal)[used]
    symbols = np.flatnonzero(present.any(axis=0))
    weights = normal_weights(layout, alphabet, classes[members], symbols)
    weights = np.where(present[used][:, symbols], weights, 0)
    frequencies[np.ix_(members, symbols)] = tables.quantize(weights)
  return Contexts(tuple(scales), first, normal, frequencies)


def _scales(part: np.ndarray, sizes: Sequence[tuple[int, int]]) -> list[Scales | None]:
  """Reads the scales of arrays, whose sizes are R and C, from the first part."""
  position = 4 * len(sizes)
  if part.size < position:
    raise ValueError('the scales of the arrays are cut short')
  result: list[Scales | None] = []
  for (mode, base), shape in zip(
    part[:position].view('<i2').reshape(-1, 2).tolist(), sizes, strict=True
  ):
    if not 0 <= mode <= 4:
      raise ValueError(f'scales of unknown {mode=}')
    lines = [np.zeros(1, np.uint8), np.zeros(1, np.uint8)]
    for axis, size in enumerate(shape):
      if mode and (mode - 1) >> axis & 1:
        lines[axis] = part[position : position + size]
        position += size
        if lines[axis].size != size or not size:
          raise ValueError('the scales of the arrays are cut short')
    scales = Scales(base, *lines)
    # A block of few elements makes the contexts of whole rows.
    if mode > 1 and shape[1] > buffers.ROOM:
      raise ValueError(f'rows of {shape[1]} elements cannot have scales')
    if scales.num_classes > MOST_CLASSES:
      raise ValueError(f'{scales.num_classes} classes of an array are too many')
    result.append(scales if mode else None)
  if part.size != position:
    raise ValueError(f'the scales need {position} bytes, got {part.size}')
  return result


def deflate(data: bytes) -> bytes:
  """Returns a raw Deflate stream; `inflate` reads it."""
  # Some scales are close to noise, where matches are chance and cost more than they
  # save. Others repeat.
  packed = []
  for strategy in (zlib.Z_RLE, zlib.Z_DEFAULT_STRATEGY):
    packer = zlib_ng.compressobj(6, zlib.DEFLATED, -15, 9, strategy)
    packed.append(packer.compress(data) + packer.flush())
  return min(packed, key=len)


def inflate(data: bytes, most: int) -> tuple[np.ndarray, bytes]:
  """Inflates a raw Deflate stream.

  Args:
    data: the stream, and bytes after it.
    most: the greatest number of bytes that the stream may hold.

  Returns:
    The content of the stream, uint8; and the bytes after the stream.
  """
  unpacker = zlib.decompressobj(-15)
  try:
    part = unpacker.decompress(data, most + 1)
  except zlib.error as error:
    raise ValueError(f'not contexts of arrays: {error}') from error
  if not unpacker.eof:
    raise ValueError('the contexts of the arrays are cut short or too long')
  return np.frombuffer(part, np.uint8), unpacker.unused_data


# ---- the normal distribution ---------------------------------------------------------

# log2(e) / 2 * 2^(i / 4) for i = 0, ..., 3.
_HALF_LOG2_E_BITS = 20
_HALF_LOG2_E = 756388, 899502, 1069694, 1272087

_FRACTION = 8


def normal_weights(
  layout: layouts.Layout, alphabet: int, classes: np.ndarray, symbols: np.ndarray
) -> np.ndarray:
  """Returns the weights of symbols under the normal distribution.

  Args:
    layout: layout of the elements; its `has_scale` must be true.
    alphabet: A, the number of symbols in use.
    classes: integers `[K]`.
    symbols: the symbols whose weights are wanted, `[a]`.

  Returns:
    int64 `[K, a]`, from 1 to 2^30. `tables.quantize` scales them to
    frequencies.
  """
  cells = np.array(layout.cells(alphabet))
  # The greatest weight is that of the first of some cells that differ in the centre.
  firsts = np.diff(cells[1:], prepend=1 << 32).any(axis=0)
  below = _log_weights(cells[:, firsts], classes).max(axis=-1, keepdims=True)
  below = below - _log_weights(cells[:, symbols], classes)
  whole, part = below >> _FRACTION, below & ((1 << _FRACTION) - 1)
  return np.maximum(_powers()[part] >> np.minimum(whole, 62), 1)


def _log_weights(cells: np.ndarray, classes: np.ndarray) -> np.ndarray:
  """Returns log2 of weights, up to a constant, times 2^8: int64 `[K, a]`."""
  centre, exponent, width = cells
  # x^2 / s^2 = centre^2 * 2^(quarters / 4)
  quarters = STEPS * exponent - np.asarray(classes, np.int64)[:, None]
  mantissa = centre**2 * np.array(_HALF_LOG2_E, np.int64)[quarters & 3]
  shift = (quarters >> 2) + _FRACTION - _HALF_LOG2_E_BITS
  square = mantissa << np.clip(shift, 0, 12) >> np.clip(-shift, 0, 62)
  return (width << _FRACTION) - square


@functools.cache
def _powers() -> np.ndarray:
  """Returns 2^(30 - i / 2^8) for i = 0, ..., 2^8 - 1, rounded down: int64."""
  powers = []
  for i in range(1 << _FRACTION):
    power = 1 << ((30 << _FRACTION) - i)
    for _ in range(_FRACTION):
      power = math.isqrt(power)
    powers.append(power)
  return np.array(powers, np.int64)

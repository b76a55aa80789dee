"""The model of a layout: its frequency tables, and the table of each number.

A layout is a division of numbers into symbols and rests, see `layouts`; all arrays of
one layout share a model. An array either has a table of its own, or its lines (rows and
columns) are sorted into classes by their standard deviation, see `scales`. Then each
class of numbers has a table. Arrays whose classes lie in one lattice (with the same
step and the same offset) share tables. The tables of neighbouring classes are
neighbours; so the index of a number's table is the label of its row plus the label of
its column plus a constant.

The table of a class is that of the normal distribution, of which the model stores only
the symbols that occur; or, if that is shorter, the model stores its frequencies. The
encoder makes the model, and the decoder reads it.

Shape letters: M arrays of the layout, K tables, A symbols in the alphabet.
"""

from collections.abc import Sequence
from typing import NamedTuple
import zlib

import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import scales

Shape = tuple[int, ...]

MAX_TABLES = 1023
"""The greatest K."""


class Model(NamedTuple):
  """The tables with which the symbols of the M arrays of a layout are coded.

  The tables of classes come first. Then comes the table of lines that are zero
  throughout, if there are such lines. The arrays' own tables come last.

  Attributes:
    lines: the lines of each array; None for an array with a table of its own.
    first: for each array, the index of the table for its label 1, or of its own table.
    zero: the index of the table for lines of zeros; the table exists only if there are
      such lines.
    normal: bool `[K]`, whether each table is that of the normal distribution.
    frequencies: int64 `[K, A]`. The frequencies of a table that is not used are 0.
  """

  lines: tuple[scales.Lines | None, ...]
  first: tuple[int, ...]
  zero: int
  normal: np.ndarray
  frequencies: np.ndarray

  def write(self, out: np.ndarray, index: int, start: int, shape: Shape) -> None:
    """Writes the index of each number's table.

    Args:
      out: unsigned integers `[n]` to write into, for n numbers in C order.
      index: index of the array among the M arrays.
      start: the first of the n numbers, counted within the array.
      shape: shape of the array.
    """
    lines = self.lines[index]
    if lines is None:
      out[:] = self.first[index]
    else:
      sizes = scales.matrix_shape(shape)
      lines.write(out, start, sizes, self.first[index], self.zero)

  def take(self, index: int, order: np.ndarray, axis: int, shape: Shape) -> 'Model':
    """Returns the model after an array has been reordered along an axis.

    Args:
      index: index of the array among the M arrays.
      order: the lines of the old array in their new order.
      axis: the axis.
      shape: shape of the array.
    """
    lines = self.lines[index]
    if lines and axis == len(shape) - 1 and lines.columns.size > 1:
      lines = lines._replace(columns=lines.columns[order])
    if lines and axis < len(shape) - 1 and lines.rows.size > 1:
      rows = lines.rows.reshape(shape[:-1]).take(order, axis).reshape(-1)
      lines = lines._replace(rows=rows)
    return self._replace(lines=(*self.lines[:index], lines, *self.lines[index + 1 :]))


def count_tables(lines: Sequence[scales.Lines | None]) -> int:
  """Returns K, given the lines of the M arrays."""
  return _arrange(lines).classes.size


def fit(
  layout: layouts.Layout,
  lines: Sequence[scales.Lines | None],
  counts: Sequence[np.ndarray],
) -> Model:
  """Makes a model from counts of symbols. For each table it takes the shorter kind.

  Args:
    layout: the layout.
    lines: the lines of each array; None for an array with a table of its own.
    counts: for each array, how often each symbol occurs with each label, int64
      `[labels, A]`; `[1, A]` for an array with a table of its own.

  Returns:
    The model.
  """
  first, zero, classes = _arrange(lines)
  total = np.zeros((classes.size, layout.alphabet), np.int64)
  for table, line, count in zip(first, lines, counts, strict=True):
    if line is None:
      total[table] += count[0]
      continue
    total[table : table + len(count) - 1] += count[1:]
    if line.has_zeros:
      total[zero] += count[0]
  normal, frequencies = np.ones(classes.size, bool), np.zeros_like(total)
  used = total.any(axis=1)
  for members in (used & (classes != _OWN), used & (classes == _OWN)):
    if members.any():
      own = classes[members][0] == _OWN
      choice = choose(layout, None if own else classes[members], total[members])
      normal[members], frequencies[members] = choice.normal, choice.frequencies
  return Model(tuple(lines), first, zero, normal, frequencies)


class Choice(NamedTuple):
  """K tables and their cost."""

  normal: np.ndarray  # bool [K], whether each is that of the normal distribution
  frequencies: np.ndarray  # int64 [K, A]
  cost: float  # estimated bytes of the tables and of all symbols coded with them


def choose(
  layout: layouts.Layout, classes: np.ndarray | None, counts: np.ndarray
) -> Choice:
  """Chooses, for each table, between the normal distribution and stored frequencies.

  Args:
    layout: layout of the numbers.
    classes: `[K]`, the class of each table; None if the tables have no class, and then
      all of them are stored.
    counts: `[K, A]`, how often each symbol occurs with each table.

  Returns:
    The shorter choice for each table.
  """
  stored = tables.quantize(counts)
  # A stored frequency takes about a byte.
  cost = tables.cost_bits(counts, stored) / 8 + np.count_nonzero(stored, axis=1)
  if classes is None:
    return Choice(np.zeros(len(counts), bool), stored, float(cost.sum()))
  weights = np.where(counts > 0, scales.normal_weights(layout, classes), 0)
  frequencies = tables.quantize(weights)
  other = tables.cost_bits(counts, frequencies) / 8 + scales.TABLE_BYTES
  normal = other < cost
  frequencies = np.where(normal[:, None], frequencies, stored)
  return Choice(normal, frequencies, float(np.where(normal, other, cost).sum()))


def to_bytes(model: Model) -> bytes:
  """Serialises a model; `from_bytes` describes the bytes."""
  heads, labels = [], []
  for lines in model.lines:
    head = 0, 0, 0
    if lines:
      sorted_axes = lines.rows.size > 1, lines.columns.size > 1
      head = 1 + sorted_axes[0] + 2 * sorted_axes[1], lines.base, lines.step
      labels += [x.tobytes() for x in (lines.rows, lines.columns) if x.size > 1]
    heads.append(head)
  lined = np.array(heads, '<i2').tobytes() + b''.join(labels)
  present = model.frequencies[model.normal] > 0
  normal = np.packbits(model.normal).tobytes() + np.packbits(present, axis=1).tobytes()
  stored = tables.to_bytes(model.frequencies[~model.normal])
  return _deflate(lined) + _deflate(normal) + stored


def from_bytes(data: bytes, layout: layouts.Layout, shapes: Sequence[Shape]) -> Model:
  """Makes a model from bytes: the inverse of `to_bytes`.

  The bytes have three parts. The first two are raw Deflate streams.

  * Lines. For each array, three int16: its kind, base and step. The kind is 0 if the
    array has a table of its own; else it is 1, plus 1 if rows are sorted, plus 2 if
    columns are sorted. See `scales.Lines` for base and step. Then follow the labels of
    the sorted lines of all arrays, uint8.
  * Normal tables. One bit for each of the K tables tells whether it is that of the
    normal distribution; the bits fill whole bytes. Then, for each such table, one bit
    for each symbol tells whether it occurs; these fill whole bytes, too.
  * Stored tables, see `tables.to_bytes`.

  Args:
    data: the bytes.
    layout: the layout.
    shapes: the shapes of the M arrays.

  Returns:
    The model.

  Raises:
    ValueError: if the bytes are not a model of such arrays.
  """
  sizes = [scales.matrix_shape(shape) for shape in shapes]
  part, data = _inflate(data, sum(6 + sum(size) for size in sizes))
  lines = _lines(part, sizes)
  first, zero, classes = _arrange(lines)
  count, width = classes.size, -(-layout.alphabet // 8) * 8
  if count > MAX_TABLES:
    raise ValueError(f'the arrays have more than {MAX_TABLES} tables')
  part, data = _inflate(data, -(-count // 8) + count * width // 8)
  normal = np.unpackbits(part[: -(-count // 8)], count=count).astype(bool)
  present = np.unpackbits(part[-(-count // 8) :]).astype(bool)
  if present.size != normal.sum() * width:
    raise ValueError(
      f'the symbols of {normal.sum()} normal tables need '
      f'{normal.sum() * width} bits, got {present.size}'
    )
  present = present.reshape(-1, width)[:, : layout.alphabet]
  frequencies = np.zeros((count, layout.alphabet), np.int64)
  stored = count - len(present)
  frequencies[~normal] = tables.from_bytes(data, stored, layout.alphabet)
  chosen, used = np.flatnonzero(normal), present.any(axis=1)
  if np.any(classes[chosen[used]] == _OWN):
    raise ValueError('a normal table belongs to an array without classes')
  if used.any():
    weights = scales.normal_weights(layout, classes[chosen[used]])
    weights = np.where(present[used], weights, 0)
    frequencies[chosen[used]] = tables.quantize(weights)
  return Model(tuple(lines), first, zero, normal, frequencies)


def _lines(
  part: np.ndarray, sizes: Sequence[tuple[int, int]]
) -> list[scales.Lines | None]:
  """Reads the lines of arrays from their part of a model's bytes.

  Args:
    part: uint8, the inflated part.
    sizes: R and C of each array.

  Returns:
    The lines; None for an array with a table of its own.
  """
  position = 6 * len(sizes)
  if part.size < position:
    raise ValueError('the lines of the arrays are cut short')
  heads = part[:position].view('<i2').reshape(-1, 3).tolist()
  lines: list[scales.Lines | None] = []
  for (kind, base, step), shape in zip(heads, sizes, strict=True):
    if not (0 <= kind <= 4 and (kind == 0 or 1 <= step <= scales.STEPS)):
      raise ValueError(f'lines of unknown {kind=} or {step=}')
    if kind == 0:
      lines.append(None)
      continue
    labels = [np.ones(1, np.uint8), np.ones(1, np.uint8)]
    for axis, size in enumerate(shape):
      if (kind - 1) >> axis & 1:
        labels[axis] = part[position : position + size]
        position += size
        if labels[axis].size != size:
          raise ValueError('the labels of the lines are cut short')
    lines.append(scales.Lines(base, step, *labels))
  if part.size != position:
    raise ValueError(f'the lines of the arrays need {position} bytes, got {part.size}')
  if any(x is not None and x.top >= scales.MAX_LABELS for x in lines):
    raise ValueError('the label of a number is out of range')
  return lines


def _deflate(data: bytes) -> bytes:
  # Labels and bits are close to noise. Z_FILTERED looks for fewer matches, because
  # matches in noise are chance.
  packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_FILTERED)
  return packer.compress(data) + packer.flush()


def _inflate(data: bytes, most: int) -> tuple[np.ndarray, bytes]:
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
    raise ValueError(f'not a model of arrays: {error}') from error
  if not unpacker.eof:
    raise ValueError('the model of the arrays is cut short or too long')
  return np.frombuffer(part, np.uint8), unpacker.unused_data


# Stands for the class in the table of an array that has no classes.
_OWN = 1 << 62


class _Tables(NamedTuple):
  """The tables of a layout in their order; see `Model`."""

  first: tuple[int, ...]
  zero: int
  classes: np.ndarray  # int64 [K], the class of each table


def _arrange(lines: Sequence[scales.Lines | None]) -> _Tables:
  """Arranges the tables of arrays so that arrays share the tables of equal classes."""
  spans = sorted(
    (line.step, line.base % line.step, line.base, line.top, i)
    for i, line in enumerate(lines)
    if line is not None
  )
  first, classes = [0] * len(lines), list[int]()
  # The run of classes that is being added: its lattice, its bounds, its first table.
  lattice, start, end, origin = (0, 0), 0, 0, 0
  for step, phase, base, top, i in spans:
    if lattice != (step, phase) or base > end:
      lattice, start, end = (step, phase), base, base
      origin = len(classes)
    first[i] = origin + (base - start) // step
    while end < base + max(top, 1) * step:
      classes.append(end)
      end += step
  zero = len(classes)
  if any(line is not None and line.has_zeros for line in lines):
    classes.append(scales.ZERO)
  for i, line in enumerate(lines):
    if line is None:
      first[i] = len(classes)
      classes.append(_OWN)
  return _Tables(tuple(first), zero, np.array(classes, np.int64))

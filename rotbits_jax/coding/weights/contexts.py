"""Which table each number of a layout is coded with, in few bytes.

An array has a table of its own, or its rows and columns are sorted into classes of
scale, see `scales`, and each class has one. Arrays whose classes lie in one lattice
share tables: the tables of neighbouring classes are neighbours, so that a number's
table is its row's label plus its column's plus a constant. A class's table is the
normal distribution's, of which only the symbols that occur are stored, or is stored in
full where that is shorter. The encoder finds all this, and the decoder reads it.

Shape letters: M arrays of the layout, K tables, A symbols, R rows, C columns.
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
"""Bound of K."""


class Model(NamedTuple):
  """What the symbols of the M arrays of a layout are coded with.

  Tables are in this order: of classes; of lines of zeros, if there are such; of arrays
  that have their own.

  Attributes:
    lines: of the arrays, None for one with a table of its own.
    first: of each array, the table of its label 1, or its own table.
    zero: the table of lines of zeros, whether it exists or not.
    normal: bool `[K]`, whether the table is the normal distribution's.
    frequencies: int64 `[K, A]`; zeros, of a table that is not used.
  """

  lines: tuple[scales.Lines | None, ...]
  first: tuple[int, ...]
  zero: int
  normal: np.ndarray
  frequencies: np.ndarray

  def write(self, out: np.ndarray, index: int, start: int, shape: Shape) -> None:
    """Writes the tables of numbers, from `start` on, of an array of this shape."""
    lines = self.lines[index]
    if lines is None:
      out[:] = self.first[index]
    else:
      sizes = scales.matrix_shape(shape)
      lines.write(out, start, sizes, self.first[index], self.zero)

  def take(self, index: int, order: np.ndarray, axis: int, shape: Shape) -> 'Model':
    """The model when the array's lines along an axis are in this order."""
    lines = self.lines[index]
    if lines and axis == len(shape) - 1 and lines.columns.size > 1:
      lines = lines._replace(columns=lines.columns[order])
    if lines and axis < len(shape) - 1 and lines.rows.size > 1:
      rows = lines.rows.reshape(shape[:-1]).take(order, axis).reshape(-1)
      lines = lines._replace(rows=rows)
    return self._replace(lines=(*self.lines[:index], lines, *self.lines[index + 1 :]))


def count_tables(lines: Sequence[scales.Lines | None]) -> int:
  """K."""
  return _arrange(lines).classes.size


def fit(
  layout: layouts.Layout,
  lines: Sequence[scales.Lines | None],
  counts: Sequence[np.ndarray],
) -> Model:
  """The tables that take fewest bytes.

  Args:
    layout: of the M arrays.
    lines: their lines, None for an array with a table of its own.
    counts: how often each symbol occurs under each label, int64 `[labels, A]` each;
      `[1, A]` for an array with a table of its own.

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
  """Tables, and what they and all symbols coded with them take, in bytes."""

  normal: np.ndarray  # bool [K]
  frequencies: np.ndarray  # int64 [K, A]
  cost: float


def choose(
  layout: layouts.Layout, classes: np.ndarray | None, counts: np.ndarray
) -> Choice:
  """The shorter of the normal distribution's table and one that is stored.

  Args:
    layout: of the numbers.
    classes: `[K]`, or None where the numbers are of no class.
    counts: of symbols, `[K, A]`.

  Returns:
    The tables chosen.
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
  """A model in a compact form: see `from_bytes`."""
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
  """The inverse of `to_bytes`.

  Args:
    data: three parts, the first two as raw Deflate streams. Lines: for each array,
      three int16: 0 if it has a table of its own, else 1 and 1 more if rows are sorted
      and 2 more if columns are; base; step, see `scales.Lines`; then the labels of the
      lines of all arrays. Normal tables: which ones are, as bits in whole bytes; then,
      for each of those, which symbols occur, likewise. Stored tables: see
      `tables.to_bytes`.
    layout: of the M arrays.
    shapes: of the M arrays.

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
  part, data = _inflate(data, -(-count // 8) + count * width // 8)
  normal = np.unpackbits(part[: -(-count // 8)], count=count).astype(bool)
  present = np.unpackbits(part[-(-count // 8) :]).astype(bool)
  if present.size != normal.sum() * width:
    raise ValueError(f'{present.size} bits for {normal.sum()} normal tables')
  present = present.reshape(-1, width)[:, : layout.alphabet]
  frequencies = np.zeros((count, layout.alphabet), np.int64)
  stored = count - len(present)
  frequencies[~normal] = tables.from_bytes(data, stored, layout.alphabet)
  chosen, used = np.flatnonzero(normal), present.any(axis=1)
  if np.any(classes[chosen[used]] == _OWN):
    raise ValueError('a normal distribution of no scale')
  if used.any():
    weights = scales.normal_weights(layout, classes[chosen[used]])
    weights = np.where(present[used], weights, 0)
    frequencies[chosen[used]] = tables.quantize(weights)
  return Model(tuple(lines), first, zero, normal, frequencies)


def _lines(
  part: np.ndarray, sizes: Sequence[tuple[int, int]]
) -> list[scales.Lines | None]:
  """The lines of arrays, from their part of a model's bytes."""
  position = 6 * len(sizes)
  if part.size < position:
    raise ValueError('the lines of the arrays are cut short')
  heads = part[:position].view('<i2').reshape(-1, 3).tolist()
  lines: list[scales.Lines | None] = []
  for (kind, base, step), shape in zip(heads, sizes, strict=True):
    if not (0 <= kind <= 4 and (kind == 0 or 1 <= step <= scales.STEPS)):
      raise ValueError(f'lines of an unknown kind, {kind}, or step, {step}')
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
    raise ValueError(f'{part.size} bytes of lines, where the arrays need {position}')
  if any(x is not None and x.top >= scales.MAX_LABELS for x in lines):
    raise ValueError('a label of a number is out of range')
  if count_tables(lines) > MAX_TABLES:
    raise ValueError('there are too many tables')
  return lines


def _deflate(data: bytes) -> bytes:
  # Labels and bits are close to noise, in which matches are chance.
  packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_FILTERED)
  return packer.compress(data) + packer.flush()


def _inflate(data: bytes, most: int) -> tuple[np.ndarray, bytes]:
  """What a raw Deflate stream holds, so many bytes at most, and the bytes behind it."""
  unpacker = zlib.decompressobj(-15)
  try:
    part = unpacker.decompress(data, most + 1)
  except zlib.error as error:
    raise ValueError(f'not a model of arrays: {error}') from error
  if not unpacker.eof:
    raise ValueError('the model of the arrays is cut short, or too long')
  return np.frombuffer(part, np.uint8), unpacker.unused_data


# The class of a table that is an array's own.
_OWN = 1 << 62


class _Tables(NamedTuple):
  """Tables of arrays in their order."""

  first: tuple[int, ...]  # see Model
  zero: int  # see Model
  classes: np.ndarray  # int64 [K]: of each table


def _arrange(lines: Sequence[scales.Lines | None]) -> _Tables:
  """The order of tables: what arrays have in common, they share."""
  spans = sorted(
    (line.step, line.base % line.step, line.base, line.top, i)
    for i, line in enumerate(lines)
    if line is not None
  )
  first, classes = [0] * len(lines), list[int]()
  # Of the classes that were added last: their lattice, bounds, and first table.
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

"""The frequency tables of a group of arrays, and the table of each element.

All arrays of a group have one layout. An array either has a table to itself, or its
rows and columns are sorted into scale buckets, see `scales`. Then each class of
elements has a table. Arrays whose classes lie in one lattice (with the same step and
the same offset) share tables. The tables of neighbouring classes are neighbours; so the
index of an element's table is the bucket of its row plus the bucket of its column plus
a constant.

The table of a class is that of the normal distribution, of which the stream holds only
the symbols that occur; or, if that is shorter, the stream holds its frequencies. The
encoder chooses the tables, and the decoder reads them.

Shape letters: M arrays of the group, K tables, A symbols in use.
"""

from collections.abc import Sequence
from typing import NamedTuple
import zlib

import numpy as np
from zlib_ng import zlib_ng

from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import buffers
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import scales

Shape = tuple[int, ...]

MAX_TABLES = 255
"""The greatest K. With one more table, for places without an element, a byte tells it.
"""

MAX_ENTRIES = 1 << 20
"""The greatest (K + 1) * A."""


class Contexts(NamedTuple):
  """The tables with which the symbols of M arrays are coded.

  The tables of classes come first. Then comes the table of bucket 0, if an element is
  in it. The tables of single arrays come last.

  Attributes:
    buckets: the scale buckets of each array; None for an array with one table.
    first: for each array, the index of the table of bucket 1, or of its only table.
    zero: the index of the table of bucket 0.
    normal: bool `[K]`, whether each table is that of the normal distribution.
    frequencies: int64 `[K, A]`. The frequencies of a table that is not used are 0.
  """

  buckets: tuple[scales.Buckets | None, ...]
  first: tuple[int, ...]
  zero: int
  normal: np.ndarray
  frequencies: np.ndarray

  def write(self, out: np.ndarray, index: int, start: int, shape: Shape) -> None:
    """Writes the index of each element's table.

    Args:
      out: uint8 `[n]` to write into, for n elements in C order.
      index: index of the array among the M arrays.
      start: the first of the n elements, counted within the array.
      shape: shape of the array.
    """
    buckets = self.buckets[index]
    if buckets is None:
      out[:] = self.first[index]
    else:
      _, columns = scales.matrix_shape(shape)
      buckets.write(out, start, columns, self.first[index], self.zero)


def fits(buckets: Sequence[scales.Buckets | None], alphabet: int) -> bool:
  """Tells whether arrays fit into one group."""
  count = _arrange(buckets).classes.size
  return count <= MAX_TABLES and (count + 1) * alphabet <= MAX_ENTRIES


def fit(
  layout: layouts.Layout,
  buckets: Sequence[scales.Buckets | None],
  counts: Sequence[np.ndarray],
) -> Contexts:
  """Makes the tables from counts of symbols. For each table it takes the shorter kind.

  Args:
    layout: the layout.
    buckets: the scale buckets of each array; None for an array with one table.
    counts: for each array, how often each symbol occurs in each bucket, int64
      `[buckets, a]`; `[1, a]` for an array with one table.

  Returns:
    The contexts.
  """
  first, zero, classes = _arrange(buckets)
  total = np.zeros((classes.size, max(x.shape[1] for x in counts)), np.int64)
  for table, own, count in zip(first, buckets, counts, strict=True):
    width = count.shape[1]
    if own is None:
      total[table, :width] += count[0]
      continue
    total[table : table + len(count) - 1, :width] += count[1:]
    if own.has_zeros:
      total[zero, :width] += count[0]
  normal, frequencies = np.ones(classes.size, bool), np.zeros_like(total)
  used = total.any(axis=1)
  for members in (used & (classes != _OWN), used & (classes == _OWN)):
    if members.any():
      own = classes[members][0] == _OWN
      choice = choose(layout, None if own else classes[members], total[members])
      normal[members] = choice.normal
      places = np.ix_(members, choice.symbols)
      frequencies[places] = tables.quantize(choice.weights)
  return Contexts(tuple(buckets), first, zero, normal, frequencies)


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
  cost = _coded_bytes(counts, counts) + np.count_nonzero(counts, axis=1)
  normal = np.zeros(len(counts), bool)
  if classes is not None:
    own = scales.normal_weights(layout, alphabet, classes, symbols)
    own = np.where(counts > 0, own, 0)
    other = _coded_bytes(counts, own) + scales.TABLE_BYTES
    normal = other < cost
    weights = np.where(normal[:, None], own, counts)
    cost = np.where(normal, other, cost)
  return TableChoice(symbols, normal, weights, cost)


def _coded_bytes(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Returns the bytes of symbols coded with frequencies that are not rounded."""
  whole = weights.sum(axis=1, keepdims=True)
  return tables.cost_bits(counts, weights * (tables.TOTAL / whole)) / 8


def to_bytes(contexts: Contexts) -> bytes:
  """Serialises contexts; `from_bytes` describes the bytes."""
  alphabet = contexts.frequencies.shape[1]
  heads, lines = [], []
  for own in contexts.buckets:
    head = 0, 0, 0
    if own:
      is_sorted = own.rows.size > 1, own.columns.size > 1
      head = 1 + is_sorted[0] + 2 * is_sorted[1], own.base, own.step
      lines += [x.tobytes() for x in (own.rows, own.columns) if x.size > 1]
    heads.append(head)
  of_arrays = np.array(alphabet, '<u2').tobytes() + np.array(heads, '<i2').tobytes()
  present = contexts.frequencies[contexts.normal] > 0
  normal = np.packbits(contexts.normal).tobytes()
  normal += np.packbits(present, axis=1).tobytes()
  stored = tables.to_bytes(contexts.frequencies[~contexts.normal])
  return _deflate(of_arrays + b''.join(lines)) + _deflate(normal) + stored


def from_bytes(
  data: bytes, layout: layouts.Layout, shapes: Sequence[Shape]
) -> Contexts:
  """Makes contexts from bytes: the inverse of `to_bytes`.

  The bytes have three parts. The first two are raw Deflate streams.

  * Arrays. A, uint16. Then, for each array, three int16: a mode, base and step. The
    mode is 0 if the array has one table; else it is 1, plus 1 if rows are sorted, plus
    2 if columns are sorted. See `scales.Buckets` for base and step. Then follow the
    buckets of the sorted rows and columns of each array, uint8.
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
  sizes = [scales.matrix_shape(shape) for shape in shapes]
  part, data = _inflate(data, 2 + sum(6 + sum(size) for size in sizes))
  alphabet = int(part[:2].view('<u2')[0]) if part.size > 1 else 0
  if not 0 < alphabet <= layout.alphabet:
    raise ValueError(f'{alphabet} symbols of {layout.alphabet} cannot be in use')
  buckets = _buckets(part[2:], sizes)
  for own, (_, columns) in zip(buckets, sizes, strict=True):
    # A block of few elements makes the tables of whole rows.
    if own and own.rows.size + own.columns.size > 2 and columns > buffers.ROOM:
      raise ValueError(f'rows of {columns} elements cannot be sorted')
  first, zero, classes = _arrange(buckets)
  count, width = classes.size, -(-alphabet // 8) * 8
  if count > MAX_TABLES or (count + 1) * alphabet > MAX_ENTRIES:
    raise ValueError(f'{count} tables of {alphabet} symbols are too many')
  part, data = _inflate(data, -(-count // 8) + count * width // 8)
  normal = np.unpackbits(part[: -(-count // 8)], count=count).astype(bool)
  present = np.unpackbits(part[-(-count // 8) :]).astype(bool)
  if present.size != normal.sum() * width:
    raise ValueError(
      f'the symbols of {normal.sum()} normal tables need '
      f'{normal.sum() * width} bits, got {present.size}'
    )
  present = present.reshape(-1, width)[:, :alphabet]
  # An element has each symbol of a normal table, and one of each stored table.
  occurring = int(present.sum() + count - normal.sum())
  elements = sum(rows * columns for rows, columns in sizes)
  if occurring > elements:
    raise ValueError(f'{occurring} symbols cannot occur in {elements} elements')
  frequencies = np.zeros((count, alphabet), np.int64)
  frequencies[~normal] = tables.from_bytes(data, count - len(present), alphabet)
  chosen, used = np.flatnonzero(normal), present.any(axis=1)
  if np.any(classes[chosen[used]] == _OWN):
    raise ValueError('a normal table belongs to an array without classes')
  if used.any():
    symbols = np.flatnonzero(present.any(axis=0))
    weights = scales.normal_weights(layout, alphabet, classes[chosen[used]], symbols)
    weights = np.where(present[used][:, symbols], weights, 0)
    frequencies[np.ix_(chosen[used], symbols)] = tables.quantize(weights)
  return Contexts(tuple(buckets), first, zero, normal, frequencies)


def _buckets(
  part: np.ndarray, sizes: Sequence[tuple[int, int]]
) -> list[scales.Buckets | None]:
  """Reads the scale buckets of arrays from their part of the bytes.

  Args:
    part: uint8, the inflated part.
    sizes: R and C of each array.

  Returns:
    The buckets; None for an array with one table.
  """
  position = 6 * len(sizes)
  if part.size < position:
    raise ValueError('the scale buckets of the arrays are cut short')
  heads = part[:position].view('<i2').reshape(-1, 3).tolist()
  found: list[scales.Buckets | None] = []
  for (mode, base, step), shape in zip(heads, sizes, strict=True):
    if not (0 <= mode <= 4 and (mode == 0 or 1 <= step <= scales.STEPS)):
      raise ValueError(f'scale buckets of unknown {mode=} or {step=}')
    if mode == 0:
      found.append(None)
      continue
    lines = [np.ones(1, np.uint8), np.ones(1, np.uint8)]
    for axis, size in enumerate(shape):
      if (mode - 1) >> axis & 1:
        lines[axis] = part[position : position + size]
        position += size
        if lines[axis].size != size:
          raise ValueError('the scale buckets of the arrays are cut short')
    found.append(scales.Buckets(base, step, *lines))
  if part.size != position:
    raise ValueError(f'the scale buckets need {position} bytes, got {part.size}')
  if any(x is not None and x.top >= scales.MAX_BUCKETS for x in found):
    raise ValueError('the scale bucket of an element is out of range')
  return found


def _deflate(data: bytes) -> bytes:
  # Some buckets are close to noise, where matches are chance and cost more than they
  # save. Others repeat.
  found = []
  for strategy in (zlib.Z_RLE, zlib.Z_DEFAULT_STRATEGY):
    packer = zlib_ng.compressobj(6, zlib.DEFLATED, -15, 9, strategy)
    found.append(packer.compress(data) + packer.flush())
  return min(found, key=len)


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
    raise ValueError(f'not contexts of arrays: {error}') from error
  if not unpacker.eof:
    raise ValueError('the contexts of the arrays are cut short or too long')
  return np.frombuffer(part, np.uint8), unpacker.unused_data


# Stands for the class in the table of an array that has no classes.
_OWN = 1 << 62


class _Tables(NamedTuple):
  """The tables of a group in their order; see `Contexts`."""

  first: tuple[int, ...]
  zero: int
  classes: np.ndarray  # int64 [K], the class of each table


def _arrange(buckets: Sequence[scales.Buckets | None]) -> _Tables:
  """Arranges the tables of arrays so that arrays share the tables of equal classes."""
  spans = sorted(
    (own.step, own.base % own.step, own.base, own.top, i)
    for i, own in enumerate(buckets)
    if own is not None
  )
  first, classes = [0] * len(buckets), list[int]()
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
  if any(own is not None and own.has_zeros for own in buckets):
    classes.append(scales.ZERO)
  for i, own in enumerate(buckets):
    if own is None:
      first[i] = len(classes)
      classes.append(_OWN)
  return _Tables(tuple(first), zero, np.array(classes, np.int64))

"""Which table each number of a unit is coded with, in few bytes.

An array has a table of its own, or its rows and columns are sorted into classes of
scale, see `scales`, and each class has one, shared by all arrays of the format. A
class's table is the normal distribution's, of which only the symbols that occur are
stored, or is stored in full where that is shorter. The encoder finds all this, and the
decoder reads it.

Shape letters: M arrays, K tables, A symbols of the alphabet, R rows, C columns.
"""

from collections.abc import Sequence
from typing import NamedTuple
import zlib

import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import scales

Shape = tuple[int, ...]


class Model(NamedTuple):
  """What the symbols of M arrays are coded with.

  Attributes:
    formats: of the arrays.
    lines: their lines, None for an array with a table of its own.
    indices: the table of each label of each array, `[512]` each; only entry 0 where
      the array has a table of its own.
    normal: bool `[K]`, whether the table is the normal distribution's.
    frequencies: int64 `[K, A]`.
  """

  formats: tuple[scales.Format, ...]
  lines: tuple[scales.Lines | None, ...]
  indices: tuple[np.ndarray, ...]
  normal: np.ndarray
  frequencies: np.ndarray

  def contexts(self, shapes: Sequence[Shape], dtype: np.dtype) -> np.ndarray:
    """The table of each number of all arrays, one after the other."""
    parts = []
    for shape, lines, own in zip(shapes, self.lines, self.indices, strict=True):
      sizes, index = scales.matrix_shape(shape), own.astype(dtype)
      spread = lines.spread(index, sizes) if lines else np.full(sizes, index[0])
      parts.append(spread.reshape(-1))
    return np.concatenate(parts)


def fit(
  formats: Sequence[scales.Format],
  lines: Sequence[scales.Lines | None],
  counts: Sequence[np.ndarray],
) -> tuple[Model, float]:
  """The tables that take fewest bytes.

  Args:
    formats: of the M arrays.
    lines: their lines, None for an array with a table of its own.
    counts: how often each symbol occurs under each label, int64 `[labels, A]` each;
      `[1, A]` for an array with a table of its own.

  Returns:
    The model, and the bits that the symbols take with it.
  """
  alphabet = max(form.alphabet for form in formats)
  indices, owners = _assign(formats, lines)
  total = np.zeros((len(owners), alphabet), np.int64)
  for index, count in zip(indices, counts, strict=True):
    (used,) = np.nonzero(count.any(axis=1))
    total[index[used], : count.shape[1]] += count[used]
  normal, frequencies = np.zeros(len(owners), bool), np.zeros_like(total)
  for form, members, classes in _groups(owners):
    choice = choose(form, classes, total[members, : form.alphabet])
    normal[members] = choice.normal
    frequencies[members, : form.alphabet] = choice.frequencies
  bits = float(tables.cost_bits(total, frequencies).sum())
  return Model(tuple(formats), tuple(lines), indices, normal, frequencies), bits


class Choice(NamedTuple):
  """Tables, and what they and all symbols coded with them take, in bytes."""

  normal: np.ndarray  # bool [K]
  frequencies: np.ndarray  # int64 [K, A]
  cost: float


def choose(
  form: scales.Format, classes: np.ndarray | None, counts: np.ndarray
) -> Choice:
  """The shorter of the normal distribution's table and one that is stored.

  Args:
    form: the format.
    classes: `[K]`, or None where the numbers are of no class.
    counts: of symbols, `[K, A]`.

  Returns:
    The tables chosen.
  """
  stored = tables.quantize(counts)
  # A stored frequency takes about a byte.
  cost = tables.cost_bits(counts, stored) / 8 + np.count_nonzero(stored, axis=1)
  if classes is None:
    return Choice(np.zeros(len(counts), bool), stored, cost.sum())
  weights = np.where(counts > 0, scales.normal_weights(form, classes), 0)
  frequencies = tables.quantize(weights)
  other = tables.cost_bits(counts, frequencies) / 8 + scales.TABLE_BYTES
  normal = other < cost
  frequencies = np.where(normal[:, None], frequencies, stored)
  return Choice(normal, frequencies, float(np.where(normal, other, cost).sum()))


def to_bytes(model: Model) -> bytes:
  """A model without its formats in a compact form: see `from_bytes`."""
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


def from_bytes(
  data: bytes, formats: Sequence[scales.Format], shapes: Sequence[Shape]
) -> Model:
  """The inverse of `to_bytes`.

  Args:
    data: three parts, the first two as raw Deflate streams. Lines: for each array,
      three int16: 0 if it has a table of its own, else 1 and 1 more if rows are sorted
      and 2 more if columns are; base; step, see `scales.Lines`; then the labels of the
      lines of all arrays. Normal tables: which ones are, as bits; then, for each of
      those, which symbols occur, as bits in whole bytes. Stored tables: see
      `tables.to_bytes`. Tables are in the order in which the arrays need them, and each
      array's labels from the least up.
    formats: of the M arrays.
    shapes: of the M arrays.

  Returns:
    The model.

  Raises:
    ValueError: if the bytes are not a model of such arrays.
  """
  part, data = _inflate(data)
  lines = _lines(part, shapes)
  alphabet = max(form.alphabet for form in formats)
  indices, owners = _assign(formats, lines)
  part, data = _inflate(data)
  normal = np.unpackbits(part[: -(-len(owners) // 8)], count=len(owners)).astype(bool)
  bits = np.unpackbits(part[-(-len(owners) // 8) :])
  count, width = int(normal.sum()), -(-alphabet // 8) * 8
  if bits.size != count * width:
    raise ValueError(f'{bits.size} bits of normal tables, not {count * width}')
  present = np.zeros((len(owners), alphabet), bool)
  present[normal] = bits.reshape(count, width)[:, :alphabet]

  frequencies = np.zeros(present.shape, np.int64)
  frequencies[~normal] = tables.from_bytes(data, len(owners) - count, alphabet)
  for form, members, classes in _groups(owners):
    chosen = members[normal[members]]
    if classes is None and chosen.size:
      raise ValueError('a normal distribution of no scale')
    if classes is not None and chosen.size:
      weights = scales.normal_weights(form, classes[normal[members]])
      weights = np.where(present[chosen, : form.alphabet], weights, 0)
      frequencies[chosen, : form.alphabet] = tables.quantize(weights)
  return Model(tuple(formats), tuple(lines), indices, normal, frequencies)


def _lines(part: np.ndarray, shapes: Sequence[Shape]) -> list[scales.Lines | None]:
  """The lines of arrays, from their part of a model's bytes."""
  position = 6 * len(shapes)
  if part.size < position:
    raise ValueError('the lines of the arrays are cut short')
  heads = part[:position].view('<i2').reshape(-1, 3).tolist()
  lines: list[scales.Lines | None] = []
  for (kind, base, step), shape in zip(heads, shapes, strict=True):
    if not 0 <= kind <= 4:
      raise ValueError(f'lines of an unknown kind, {kind}')
    if kind == 0:
      lines.append(None)
      continue
    labels = [np.ones(1, np.uint8), np.ones(1, np.uint8)]
    for axis, size in enumerate(scales.matrix_shape(shape)):
      if (kind - 1) >> axis & 1:
        labels[axis] = part[position : position + size]
        position += size
    lines.append(scales.Lines(base, step, *labels))
  if part.size != position:
    raise ValueError(f'{part.size} bytes of lines, where the arrays need {position}')
  return lines


def _deflate(data: bytes) -> bytes:
  # Labels and bits are close to noise, in which matches are chance.
  packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_FILTERED)
  return packer.compress(data) + packer.flush()


def _inflate(data: bytes) -> tuple[np.ndarray, bytes]:
  """What a raw Deflate stream holds, and the bytes behind it."""
  unpacker = zlib.decompressobj(-15)
  try:
    part = unpacker.decompress(data)
  except zlib.error as error:
    raise ValueError(f'not a model of arrays: {error}') from error
  if not unpacker.eof:
    raise ValueError('the model of the arrays is cut short')
  return np.frombuffer(part, np.uint8), unpacker.unused_data


# A table's owner: lines of a format and a class, or the array of this number.
_Owner = tuple[scales.Format, int | None, int | None]


def _assign(
  formats: Sequence[scales.Format], lines: Sequence[scales.Lines | None]
) -> tuple[tuple[np.ndarray, ...], list[_Owner]]:
  """The table of each label of each array, `[512]`, and the owners of the tables."""
  numbers: dict[_Owner, int] = {}
  indices = []
  for i, (form, line) in enumerate(zip(formats, lines, strict=True)):
    index = np.zeros(scales.MAX_LABELS, np.int64)
    if line is None:
      index[0] = numbers.setdefault((form, None, i), len(numbers))
    else:
      labels = line.labels()
      for label, k in zip(labels, line.classes(labels).tolist(), strict=True):
        index[label] = numbers.setdefault((form, k, None), len(numbers))
    indices.append(index)
  return tuple(indices), list(numbers)


def _groups(
  owners: list[_Owner],
) -> list[tuple[scales.Format, np.ndarray, np.ndarray | None]]:
  """Tables that are made together: their format, numbers, and classes if they have."""
  groups: dict[tuple[scales.Format, bool], list[int]] = {}
  for number, (form, k, _) in enumerate(owners):
    groups.setdefault((form, k is None), []).append(number)
  return [
    (
      form,
      np.array(members),
      None if alone else np.array([owners[i][1] for i in members]),
    )
    for (form, alone), members in groups.items()
  ]

"""Sparse differences: trees tell which elements change, a group at a time.

A training's step changes few elements. The n elements are a matrix of 16 rows, of which
a column is a *group*, and a tail of n mod 16 elements. One symbol tells whether a group
changes. In one that does, the rows i, i + h, i + 2 h, ... are node i of h. The symbol
of a node that changes tells which halves do, of nodes i and i + h of 2 h: 0 and 1 say
the first and the second one alone, 2 both. In the end each node is an element. So a
group without changes costs one symbol, and a changed element about five.

An element changes about as often as its ULP is small. Its *weight* is the power of two
in proportion to that, up to 2^19 for those that nearly always change. Whether a group
changes depends on the sum of its weights, and which halves do on the ratio of theirs,
too. The classes tell these in half octaves. All sums are exact in float32.

Shape letters: G groups, m that change, h nodes of each.
"""

from collections.abc import Iterator
import itertools
from typing import Any

import numpy as np

from rotbits_jax.structured import ulps

SIZE = 16  # elements of a group

_OCTAVES = 19  # of weights; their sums have 24 bits

CHUNK = 1 << 14  # columns that follow each other in a section, so that they fit a cache
_RATIO = 10  # half octaves from an even ratio up to which classes differ
_LEAST, _LEVELS = 13, 8  # octaves of sums of nodes that classes tell
_NODES = 40  # the first class of nodes; those of groups are below
_DIFFERENCES = 208  # the first class of differences
_COARSER = 4  # octaves from weight 1 up to which classes of differences differ


def most_exponent(dtype: np.dtype) -> int:
  """Returns the greatest exponent in the bits of a dtype; 1 for integers."""
  mantissa = ulps.MANTISSA_BITS.get(dtype)
  return 1 if mantissa is None else (1 << 8 * dtype.itemsize - 1 - mantissa) - 1


def exponents(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns the exponents in the bits of elements, at least 1; 1 for integers."""
  mantissa = ulps.MANTISSA_BITS.get(dtype)
  if mantissa is None:
    return np.ones(bits.shape, np.int32)
  magnitudes = bits & np.iinfo(bits.dtype).max
  return np.maximum(magnitudes >> mantissa, 1).astype(np.int32)


def encode(
  bits: np.ndarray, known: np.ndarray, dtype: np.dtype, exponent: int
) -> tuple[np.ndarray, list[np.ndarray]]:
  """Returns the sections of symbols and then of differences, and their classes.

  Args:
    bits: bits of the elements, signed integers `[n]`.
    known: bits of the known ones.
    dtype: dtype of the elements.
    exponent: the exponent from which the weights of elements fall.
  """
  new, old = _matrix(bits), _matrix(known)
  sections: list[list[np.ndarray]] = [[] for _ in range(5)]
  classes: list[list[np.ndarray]] = [[] for _ in range(5)]
  places = [np.arange(old.size, bits.size)]  # the tail, which comes last
  for columns in _chunks(old):
    flags = [new[:, columns] != old[:, columns]]
    while len(flags[-1]) > 1:
      flags.append(np.logical_or(*_halves(flags[-1])))
    *sums, weights = _sums(old[:, columns], dtype, exponent)
    sections[0].append(flags.pop()[0].view(np.int8))
    classes[0].append(_group_classes(weights))
    nodes = np.flatnonzero(sections[0][-1])
    for i in range(1, 5):
      classes[i].append(_node_classes(sums[-i], nodes))
      first, second = flags[-i].reshape(2, -1).view(np.int8)
      sections[i].append(first.take(nodes) + 2 * second.take(nodes) - 1)
      nodes = _halved(nodes, first.size, sections[i][-1])
    places.insert(-1, _places(nodes, columns, old.shape[1]))
  elements, known_elements = (x.take(np.concatenate(places)) for x in (bits, known))
  differences = ulps.differences(elements, known_elements, dtype)
  coded = np.concatenate([*itertools.chain(*sections), differences], dtype=bits.dtype)
  all_classes = [np.concatenate(x) for x in classes]
  return coded, [*all_classes, _difference_classes(known_elements, dtype, exponent)]


def decode(
  bits: np.ndarray, coded: np.ndarray, dtype: np.dtype, exponent: int
) -> Iterator[np.ndarray]:
  """Yields the classes of sections, given those before; then changes `bits`.

  Args:
    bits: bits of the known elements, signed integers `[n]`, and then of the elements.
    coded: the sections. They must be there when the generator goes on.
    dtype: dtype of the elements.
    exponent: as `encode` takes it.
  """
  matrix = _matrix(bits)
  sums_of = lambda columns: _sums(matrix[:, columns], dtype, exponent)
  chunks = [*_chunks(matrix)]
  yield np.concatenate([_group_classes(sums_of(x)[-1]) for x in chunks])
  end = matrix.shape[1]
  columns_of = [x.start + np.flatnonzero(coded[x]) for x in chunks]
  sums = [sums_of(x) for x in columns_of]
  nodes = [np.arange(x.size) for x in columns_of]
  for i in range(2, 6):
    yield np.concatenate(
      [_node_classes(x[-i], y) for x, y in zip(sums, nodes, strict=True)]
    )
    ends = end + np.cumsum([x.size for x in nodes])
    symbols = np.split(coded[end : ends[-1]], ends[:-1] - end)
    nodes = [
      _halved(x, y[-i].size // 2, z)
      for x, y, z in zip(nodes, sums, symbols, strict=True)
    ]
    end = ends[-1]
  several = zip(nodes, columns_of, strict=True)
  parts = [_places(x, y, matrix.shape[1]) for x, y in several]
  places = np.concatenate([*parts, np.arange(matrix.size, bits.size)])
  if end + places.size != coded.size:
    raise ValueError(f'{coded.size} symbols and differences, not {end + places.size}')
  changed = bits.take(places)
  yield _difference_classes(changed, dtype, exponent)
  bits[places] = ulps.moved(changed, coded[end:], dtype)


def _matrix(elements: np.ndarray) -> np.ndarray:
  """Returns the matrix of groups, without the tail."""
  return elements[: elements.size - elements.size % SIZE].reshape(SIZE, -1)


def _chunks(matrix: np.ndarray) -> Iterator[slice]:
  """Yields slices of columns; one if there are none."""
  count = matrix.shape[1]
  return (slice(i, min(i + CHUNK, count)) for i in range(0, max(count, 1), CHUNK))


def _halves(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns both halves of rows, faster than `np.split`."""
  return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def _places(nodes: np.ndarray, columns: Any, count: int) -> np.ndarray:
  """Returns the places, in `[16, count]`, of nodes `[16, m]` of columns `[m]`."""
  if isinstance(columns, slice):
    columns = np.arange(columns.start, columns.stop)
  rows, some = np.divmod(nodes, max(columns.size, 1))
  return rows * count + columns.take(some)


def _halved(nodes: np.ndarray, count: int, symbols: np.ndarray) -> np.ndarray:
  """Returns the halves that change, of `[2 h, m]`, of nodes that do, of `[h, m]`.

  `count` is h m. A ValueError says that there are too few symbols.
  """
  # Indexing with booleans is slower.
  halves = nodes.compress(symbols != 1), nodes.compress(symbols != 0)
  if symbols.size < nodes.size:
    raise ValueError(f'{nodes.size} nodes have {symbols.size} symbols')
  return np.concatenate([halves[0], halves[1] + count])


def _weights(bits: np.ndarray, dtype: np.dtype, exponent: int) -> np.ndarray:
  """Returns the weights of elements, float32."""
  mantissa = ulps.MANTISSA_BITS.get(dtype)
  if mantissa is None:
    return np.ones(bits.shape, np.float32)
  scaled = lambda exponent: bits.dtype.type(exponent << mantissa)
  # NumPy shifts slowly.
  exponents = bits & scaled(most_exponent(dtype))
  limits = scaled(exponent), scaled(min(exponent + _OCTAVES, most_exponent(dtype)))
  np.clip(exponents, *limits, out=exponents)
  exponents -= scaled(exponent)
  weights = exponents.astype(np.int32)
  weights *= -1 << 23 - mantissa
  weights += 127 + _OCTAVES << 23
  return weights.view(np.float32)


def _sums(bits: np.ndarray, dtype: np.dtype, exponent: int) -> list[np.ndarray]:
  """Returns the weights of elements `[16, m]`, and of 8, 4, 2 and 1 nodes."""
  sums = [_weights(bits, dtype, exponent)]
  while len(sums[-1]) > 1:
    sums.append(np.add(*_halves(sums[-1])))
  return sums


def _octaves(sums: np.ndarray, steps: int) -> np.ndarray:
  """Returns about the logarithms of sums in octaves, or halves of these, int32."""
  return (sums.view(np.int32) >> 24 - steps) - (127 << steps - 1)


# ---- classes -------------------------------------------------------------------------


def _group_classes(weights: np.ndarray) -> np.ndarray:
  """Returns the classes of groups, given their weights `[1, m]`: uint8 `[m]`."""
  return (_octaves(weights[0], 2) - 8).astype(np.uint8)


def _node_classes(sums: np.ndarray, nodes: np.ndarray) -> np.ndarray:
  """Returns the classes of nodes, given the sums of halves `[2 h, m]`: uint8."""
  first, second = (x.take(nodes) for x in sums.reshape(2, -1))
  ratio = (_octaves(first, 2) - _octaves(second, 2)).clip(-_RATIO, _RATIO)
  level = (_octaves(first + second, 1) - _LEAST).clip(0, _LEVELS - 1)
  return (level * (2 * _RATIO + 1) + (ratio + _RATIO + _NODES)).astype(np.uint8)


def _difference_classes(bits: np.ndarray, dtype: np.dtype, exponent: int) -> np.ndarray:
  """Returns the classes of differences from elements: uint8."""
  octaves = exponent + _OCTAVES + _COARSER - exponents(bits, dtype)
  return (_DIFFERENCES + octaves.clip(0, 255 - _DIFFERENCES)).astype(np.uint8)

"""Finds arrays whose numbers carry less than their dtype allows, and packs them.

An array may have many zeros because it was pruned, or few distinct numbers because it
was dequantised. `find` looks at a sample of each array. If the sample shows one of
these, the function makes the leaves that suit the array and keeps the smallest one. The
leaf takes the place of the array if the coder's own estimate says that it saves bytes.

Shape letters are those of `structured.packed`.
"""

from collections.abc import Mapping
import functools
from typing import NamedTuple

import numpy as np

from rotbits_jax import structured
from rotbits_jax.coding import weights
from rotbits_jax.structured import packed


class Packing(NamedTuple):
  """The packed leaf of an array.

  Attributes:
    array: the array.
    leaf: the leaf that takes the fewest bytes.
    nbytes: about how many bytes it takes.
  """

  array: np.ndarray
  leaf: structured.Packed
  nbytes: float

  def is_smaller(self, rival: np.ndarray) -> bool:
    """Tells whether the leaf takes fewer bytes than an array would."""
    return self.nbytes < weights.estimate([rival])


def find(arrays: Mapping[str, np.ndarray]) -> dict[str, Packing]:
  """Finds the packed leaves of arrays, by path.

  Args:
    arrays: the arrays.

  Returns:
    The packings of the arrays that a packed leaf may suit. It may take more bytes than
    the array.
  """
  jobs = (functools.partial(_candidates, array) for array in arrays.values())
  found: dict[str, Packing] = {}
  for (path, array), leaves in zip(arrays.items(), weights.run(jobs), strict=True):
    sizes = [_estimate(leaf) for leaf in leaves]
    if leaves:
      least = int(np.argmin(sizes))
      found[path] = Packing(array, leaves[least], sizes[least])
  return found


def pack(arrays: Mapping[str, np.ndarray]) -> dict[str, structured.Packed]:
  """Returns the leaves that take the place of arrays, because that saves bytes."""
  return {
    path: packing.leaf
    for path, packing in find(arrays).items()
    if packing.is_smaller(packing.array)
  }


# Settings of a leaf and the stream of small arrays cost more than packing saves.
_LEAST_NUMBERS = 4096

# The bytes that a leaf and each of its arrays take in the manifest, about.
_ARRAY_BYTES = 100

# Equal nonzero numbers in a run of `_RUN` numbers, on average. Dense bfloat16 numbers
# have 0.1, and 8-bit integers with one step have 0.7.
_RUN = 16
_LEAST_REPEATS = 0.3

_SAMPLED_LINES = 64
_SAMPLED_RUNS = 1024

# The lengths of blocks that quantisers use; and a block may be a whole line.
_BLOCKS = (256, 128, 64, 32, 16)

# The number of steps between the base of a block and its farthest number, see
# `structured.Grid`.
_COUNTS = (*range(1, 33), 63, 64, 127, 255)

_PRECISIONS = (8, 11, 16, 24)

_FIRST_BLOCKS, _TRIED_BLOCKS = 4, 32
_MOST_TRIED = 1 << 14  # numbers

# Shares of numbers that a grid may miss, because residuals correct them.
_MOST_MISSED, _FEW_MISSED = 0.15, 0.001


def _candidates(array: np.ndarray) -> list[structured.Packed]:
  """Returns the leaves that may suit an array, by the look of a sample."""
  if array.dtype.name not in structured.PACKED_DTYPES or array.size < _LEAST_NUMBERS:
    return []
  if not packed.is_packable(array.shape):
    return []
  array = np.ascontiguousarray(array)
  leaves: list[structured.Packed] = []
  for transposed in (False, True):
    runs = _runs(packed.lines_of(packed.bits(array), transposed))
    if not runs.size:
      continue
    equal = (runs[:, 1:] == runs[:, :-1]) & (runs[:, 1:] << 1 != 0)
    if equal.sum() < _LEAST_REPEATS * len(runs):
      continue
    grid = _grid(array, transposed)
    if grid is not None:
      leaves.append(structured.Levels.from_array(array, grid))
  return leaves


def _estimate(leaf: structured.Packed) -> float:
  """Returns about how many bytes a leaf takes."""
  arrays = list(leaf.stored()[1].values())
  return weights.estimate(arrays) + _ARRAY_BYTES * (1 + len(arrays))


def _runs(lines: np.ndarray) -> np.ndarray:
  """Returns a sample of runs of neighbours in lines, each sorted: `[n, _RUN]`."""
  count, length = lines.shape
  per_line = length // _RUN
  rows = np.linspace(0, count - 1, min(count, _SAMPLED_LINES)).astype(int)
  most = max(_SAMPLED_RUNS // rows.size, 1)
  places = np.linspace(0, per_line - 1, min(per_line, most)).astype(int)
  columns = (places[:, None] * _RUN + np.arange(_RUN)).reshape(-1)
  return np.sort(lines[np.ix_(rows, columns)].reshape(-1, _RUN), axis=1)


def _grid(array: np.ndarray, transposed: bool) -> structured.Grid | None:
  """Returns the grid on which a sample of blocks lies; None if there is none."""
  lines = packed.lines_of(array, transposed)
  length = lines.shape[1]
  best, least = None, np.inf
  for block in (length, *(n for n in _BLOCKS if n < length and length % n == 0)):
    blocks = _sample(lines, block)
    for has_base in (False, True):
      grid, missed = _fitted(
        blocks, structured.Grid(transposed, block, has_base, (), 24)
      )
      if missed <= _MOST_MISSED:
        bits = np.log2(1 + max(grid.counts)) + (1 + has_base) * 12 / block + 8 * missed
        if bits < least:
          best, least = grid, bits
      if missed <= _FEW_MISSED:
        return best
  return best


def _sample(lines: np.ndarray, block: int) -> np.ndarray:
  """Returns blocks of lines, from many lines: `[n, block]`."""
  count, length = lines.shape
  most = max(min(_TRIED_BLOCKS, _MOST_TRIED // block), 2)
  rows = np.linspace(0, count - 1, min(count, most)).astype(int)
  starts = np.arange(rows.size) * 7 % (length // block) * block
  return np.stack(
    [lines[row, start : start + block] for row, start in zip(rows, starts, strict=True)]
  )


def _fitted(blocks: np.ndarray, grid: structured.Grid) -> tuple[structured.Grid, float]:
  """Chooses the counts and the precision with which a grid fits blocks best.

  Returns:
    The grid, and the share of numbers that it misses.
  """
  first = blocks[:: max(len(blocks) // _FIRST_BLOCKS, 1)][:_FIRST_BLOCKS]
  for part in (first, blocks):
    tried = np.repeat(_COUNTS, len(part))
    missed = structured.fit_counts(np.tile(part, (len(_COUNTS), 1)), tried, grid).missed
    missed = missed.reshape(len(_COUNTS), -1)
    share = missed.min(axis=0).sum() / part.size
    if share > 2 * _MOST_MISSED:
      return grid, 1.0
  # A block takes the least of its best counts.
  chosen, often = np.unique(missed.argmin(axis=0), return_counts=True)
  counts = tuple(_COUNTS[i] for i in chosen[np.argsort(-often)])
  grid = grid._replace(counts=counts)
  for precision in _PRECISIONS:
    grid = grid._replace(precision=precision)
    found = float(structured.fit(blocks, grid).missed.sum()) / blocks.size
    if found <= share + _FEW_MISSED:
      break
  return grid, found

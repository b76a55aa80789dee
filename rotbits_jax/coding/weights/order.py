r"""The order of lines costs no bits: bits-back coding with whole numbers.

Sometimes the order of F lines does not matter, as for the neurons of an MLP. Then it is
chosen by noise, which is bytes that must be stored anyway. The decoder finds the order
by sorting the lines, and computes the noise from it. All of this is exact:

1.  The D distinct lines are sorted: line 0 < line 1 < ... < line D - 1.
2.  s bytes of noise are read as a number v below V = 2^(8 s), which is divided by
    P = 2 * 3 * ... * D: v = q P + r. The mixed-radix digits of r are integers j_i in
    {0, ..., i} for i = 1, ..., D - 1.
3.  For i = D - 1, ..., 1, the line in place i is swapped with the line in place j_i.
4.  q is stored in place of v. It takes as many bytes as floor((V - 1) / P) does.

Long division is slow, so the places i are divided into groups of `_GROUP`. Each group
has its own v. Equal lines cannot be told apart: one of them counts as distinct, and the
others follow after the distinct lines, sorted.

`bits_back.permutation` does the same for a rANS message of any content.

Shape letters: F lines, D distinct lines.
"""

from collections.abc import Callable, Iterator
import functools
import math
from typing import NamedTuple

import numpy as np

MAX_LINES = 1 << 20
"""The greatest number of lines in an order."""

_GROUP = 256
_SPARE = 2  # number of bytes by which v is longer than P


def sort(
  prefixes: np.ndarray, lines: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, int]:
  """Sorts lines by their bytes, in the order of Python's `bytes`.

  Args:
    prefixes: uint8 `[F, P]`, the first P bytes of each line; P is at most 8.
    lines: takes indices, int64 `[n]`; returns the bytes of these lines, uint8 `[n, C]`.
      It is called only for lines with equal prefixes.

  Returns:
    int64 `[F]`, the indices of the distinct lines in order, then those of the other
    lines in order; and D. Of equal lines, the first one counts as distinct.
  """
  count, width = prefixes.shape
  padded = np.zeros((count, 8), np.uint8)
  padded[:, :width] = prefixes
  keys = padded.view('>u8')[:, 0].astype(np.uint64)
  order = np.argsort(keys, kind='stable')
  new = np.ones(count, bool)
  new[1:] = keys[order[1:]] != keys[order[:-1]]
  (starts,) = np.nonzero(new)
  stops = np.append(starts[1:], count)
  ties = stops - starts > 1
  for start, stop in zip(starts[ties], stops[ties], strict=True):
    tied = lines(order[start:stop])
    rows = [row.tobytes() for row in tied]
    ranks = sorted(range(len(rows)), key=rows.__getitem__)
    order[start:stop] = order[start:stop][ranks]
    new[start + 1 : stop] = (tied[ranks[1:]] != tied[ranks[:-1]]).any(axis=1)
  return np.concatenate([order[new], order[~new]]), int(new.sum())


@functools.lru_cache(maxsize=16)
def noise_size(distinct: int) -> int:
  """Returns the number of bytes of noise that choose an order of D lines."""
  return sum(group.size for group in _groups(distinct))


@functools.lru_cache(maxsize=16)
def stored_size(distinct: int) -> int:
  """Returns the number of bytes that are stored in place of this noise."""
  return sum(group.kept for group in _groups(distinct))


def pop(noise: np.ndarray, distinct: int) -> tuple[np.ndarray, np.ndarray]:
  """Chooses an order by noise.

  Args:
    noise: uint8 `[noise_size(D)]`.
    distinct: D.

  Returns:
    int64 `[D]`, the line in each place; and uint8 `[stored_size(D)]`, the bytes to
    store in place of the noise.
  """
  left, digits, position = [], [0] * distinct, 0
  for places, radix, size, kept in _groups(distinct):
    value = int.from_bytes(noise[position : position + size].tobytes(), 'little')
    position += size
    value, rank = divmod(value, radix)
    left.append(value.to_bytes(kept, 'little'))
    for i in places:
      rank, digits[i] = divmod(rank, i + 1)
  lines = list(range(distinct))
  for i in range(distinct - 1, 0, -1):
    j = digits[i]
    lines[i], lines[j] = lines[j], lines[i]
  return np.array(lines, np.int64), np.frombuffer(b''.join(left), np.uint8)


def push(stored: np.ndarray, lines: np.ndarray) -> np.ndarray:
  """Returns the noise that chose an order: the inverse of `pop`.

  Args:
    stored: uint8 `[stored_size(D)]`, the bytes that `pop` returned.
    lines: int64 `[D]`, the line in each place.

  Returns:
    uint8 `[noise_size(D)]`.

  Raises:
    ValueError: if `pop` cannot have returned the stored bytes.
  """
  distinct = lines.size
  values, places_of = list(range(distinct)), list(range(distinct))
  digits = [0] * distinct
  for i, line in reversed(list(enumerate(lines.tolist()))):
    # The line is swapped into place i, which nothing reads from here on.
    j = digits[i] = places_of[line]
    values[j] = value = values[i]
    places_of[value] = j
  noise, position = [], 0
  for places, radix, size, kept in _groups(distinct):
    value = int.from_bytes(stored[position : position + kept].tobytes(), 'little')
    position += kept
    rank = 0
    for i in reversed(places):
      rank = rank * (i + 1) + digits[i]
    value = value * radix + rank
    if value >> 8 * size:
      raise ValueError('the bytes beside the order of lines are damaged')
    noise.append(value.to_bytes(size, 'little'))
  return np.frombuffer(b''.join(noise), np.uint8)


class _Group(NamedTuple):
  """A group of places, which share a v.

  Attributes:
    places: the places.
    radix: P, how many values their digits can have.
    size: number of bytes of v.
    kept: number of bytes of q.
  """

  places: range
  radix: int
  size: int
  kept: int


def _groups(distinct: int) -> Iterator[_Group]:
  for start in range(1, distinct, _GROUP):
    yield _group(start, min(start + _GROUP, distinct))


# All whole groups of the longest order fit into the cache, so that orders of many
# lengths, which a stranger may ask for, take little time and memory.
@functools.lru_cache(maxsize=MAX_LINES // _GROUP + 256)
def _group(start: int, stop: int) -> _Group:
  places = range(start, stop)
  radix = math.prod(i + 1 for i in places)
  size = (radix.bit_length() + 7) // 8 + _SPARE
  kept = (((1 << 8 * size) - 1) // radix).bit_length()
  return _Group(places, radix, size, -(-kept // 8))

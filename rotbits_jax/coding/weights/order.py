r"""The order of lines, for free: bits-back coding with whole numbers.

Where the order of F lines changes nothing (the neurons of an MLP), it is chosen by bits
that must be stored anyway, and the decoder, which finds the order by sorting the lines,
gets these bits back. All is exact:

    D distinct lines are sorted: line 0 < line 1 < ... < line D - 1.
    Place i, for i = D - 1, ..., 1, is swapped with place j_i in {0, ..., i}.
    A number v below V = 2^(8 s), s bytes of noise, is divided by
      P = 2 * 3 * ... : v = q P + r; the digits of r in the mixed radix are the j_i,
      and q is stored in place of v, in the bytes that floor((V - 1) / P) takes.

Places are taken in groups of `_GROUP`, each with its own v, since long division is
slow. Equal lines are told apart by nothing: one of each is distinct, and the others
follow at the end, sorted.

The same is `bits_back.permutation` for a rANS message of any content.
"""

from collections.abc import Callable
import functools
import math

import numpy as np

_GROUP = 256
_SPARE = 2  # bytes that v has beyond P


def sort(
  prefixes: np.ndarray, lines: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, int]:
  """Sorts lines by their bytes, as `bytes` are compared.

  Args:
    prefixes: uint8 `[F, P]`, the first bytes of each line, 8 at most.
    lines: takes indices, int64 `[n]`, and returns the bytes of these lines, uint8
      `[n, C]`. Few lines agree in their first bytes, if they are not equal.

  Returns:
    int64 `[F]`, the distinct lines in order, then the others in order; and D. Equal
    lines keep their order.
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
  for start, stop in zip(starts, stops, strict=True):
    if stop - start > 1:
      tied = lines(order[start:stop])
      rows = [row.tobytes() for row in tied]
      ranks = sorted(range(len(rows)), key=rows.__getitem__)
      order[start:stop] = order[start:stop][ranks]
      new[start + 1 : stop] = (tied[ranks[1:]] != tied[ranks[:-1]]).any(axis=1)
  return np.concatenate([order[new], order[~new]]), int(new.sum())


def noise_size(distinct: int) -> int:
  """Bytes that the order of D distinct lines is chosen by."""
  return sum(size for _, size, _ in _groups(distinct))


def stored_size(distinct: int) -> int:
  """Bytes that are left of these."""
  return sum(size for *_, size in _groups(distinct))


def pop(noise: np.ndarray, distinct: int) -> tuple[np.ndarray, np.ndarray]:
  """Chooses an order.

  Args:
    noise: uint8 `[noise_size(D)]`.
    distinct: D.

  Returns:
    int64 `[D]`, which line each place holds; and uint8 `[stored_size(D)]`, what is to
    be stored in place of the noise.
  """
  left, digits, position = [], [0] * distinct, 0
  for places, size, kept in _groups(distinct):
    value = int.from_bytes(noise[position : position + size].tobytes(), 'little')
    position += size
    value, rank = divmod(value, _radix(places))
    left.append(value.to_bytes(kept, 'little'))
    for i in places:
      rank, digits[i] = divmod(rank, i + 1)
  lines = list(range(distinct))
  for i in range(distinct - 1, 0, -1):
    j = digits[i]
    lines[i], lines[j] = lines[j], lines[i]
  return np.array(lines, np.int64), np.frombuffer(b''.join(left), np.uint8)


def push(stored: np.ndarray, lines: np.ndarray) -> np.ndarray:
  """The inverse of `pop`: the noise.

  Raises:
    ValueError: if the bytes stored are none that `pop` returns.
  """
  distinct = lines.size
  values, places_of, digits = (
    list(range(distinct)),
    list(range(distinct)),
    [0] * distinct,
  )
  for i, line in reversed(list(enumerate(lines.tolist()))):
    j = digits[i] = places_of[line]
    values[i], values[j] = values[j], values[i]
    places_of[values[i]], places_of[values[j]] = i, j
  noise, position = [], 0
  for places, size, kept in _groups(distinct):
    value = int.from_bytes(stored[position : position + kept].tobytes(), 'little')
    position += kept
    rank = 0
    for i in reversed(places):
      rank = rank * (i + 1) + digits[i]
    value = value * _radix(places) + rank
    if value >> 8 * size:
      raise ValueError('the bytes beside the order of lines are damaged')
    noise.append(value.to_bytes(size, 'little'))
  return np.frombuffer(b''.join(noise), np.uint8)


@functools.cache
def _groups(distinct: int) -> tuple[tuple[range, int, int], ...]:
  """Places that share a number v; bytes of v, and of q."""
  groups = []
  for start in range(1, distinct, _GROUP):
    places = range(start, min(start + _GROUP, distinct))
    radix = _radix(places)
    size = (radix.bit_length() + 7) // 8 + _SPARE
    kept = (((1 << 8 * size) - 1) // radix).bit_length()
    groups.append((places, size, -(-kept // 8)))
  return tuple(groups)


@functools.cache
def _radix(places: range) -> int:
  return math.prod(i + 1 for i in places)

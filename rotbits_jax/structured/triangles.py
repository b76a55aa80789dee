"""Lower trapezoidal matrices without their zeros: a packed corner and the other rows.

The corner is the first rows, as many as the matrix has columns, or all rows if these
are fewer. It is packed: only the entries on and below the diagonal are kept, row by
row. The rows below the corner have no zeros.

>>> corner, below = split_lower(np.array([[1, 0], [2, 3], [4, 5]]))
>>> corner.tolist(), below.tolist()
([1, 2, 3], [[4, 5]])
>>> join_lower(corner, below).tolist()
[[1, 0], [2, 3], [4, 5]]
"""

import math
from typing import Any

import numpy as np

from rotbits_jax.system import host

_SMALL = 1 << 24  # entries of a matrix that may be all zeros


def lower_size(shape: tuple[int, ...]) -> int:
  """Returns how many entries `[rows, columns]` has on and below the diagonal."""
  rows, columns = shape[-2:]
  corner = min(rows, columns)
  return corner * (corner + 1) // 2 + (rows - corner) * columns


def split_lower(matrix: Any) -> tuple[np.ndarray, np.ndarray]:
  """Returns the packed corner `[n (n + 1) / 2]` and the other rows `[r, columns]`."""
  matrix = np.asarray(matrix)
  n = min(matrix.shape)
  return matrix[:n, :n][np.tri(n, dtype=np.bool)], matrix[n:]


def join_lower(
  corner: np.ndarray, below: np.ndarray, *, is_tall: bool = False
) -> np.ndarray:
  """Makes a lower trapezoidal matrix: the inverse of `split_lower`.

  Few numbers of untrusted input must not ask for much memory. So the matrix must not be
  far larger than its parts, nor wider than it is long if `is_tall`.
  """
  n, (rows, columns) = (math.isqrt(8 * corner.size + 1) - 1) // 2, below.shape
  fits = n * (n + 1) // 2 == corner.size and (
    n == columns or (n < columns and not rows and not is_tall)
  )
  if not fits or corner.dtype != below.dtype:
    raise ValueError(f'no triangle has {corner.size} numbers above {below.shape=}')
  rows += n
  # A square one has twice as many; a kernel may have fewer outputs than inputs.
  if rows * columns > 16 * (corner.size + below.size) + _SMALL:
    raise ValueError(f'{corner.size} numbers are too few for {rows} x {columns}')
  matrix = host.empty((rows, columns), corner.dtype)
  matrix[:n], matrix[n:] = 0, below
  matrix[:n, :n][np.tri(n, dtype=np.bool)] = corner
  return matrix

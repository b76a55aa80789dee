r"""A codec of rotations and frames under the Haar measure.

The Haar measure is the uniform distribution of rotations: it does not change if all of
them are multiplied by one more rotation. Rotation means any orthogonal matrix, of
determinant 1 or -1. A frame is a matrix of k orthonormal columns in n dimensions; for
k = n it is a rotation.

**Factors.** Let x_0, ..., x_{k-1} be unit vectors in n dimensions. The first j
coordinates of x_j are 0, and x_j is uniform on the sphere in the other n - j. Let s_j
be the sign of the coordinate j of x_j, and let H_j be the reflection that exchanges x_j
and -s_j e_j. Then

    Q = H_0 H_1 ... H_{k-1} D,    D = diag(-s_0, -s_1, ...)    [n, k]

has the Haar measure: on O(n) for k = n, and on the orthonormal k-frames of R^n (the
Stiefel manifold) for k < n.

**Coordinates.** Within a vector the ratios t_i = x_i / |x_i, ..., x_{n-1}| are
independent. The density of t_i is proportional to (1 - t^2)^((v - 3) / 2), where
v = n - i is the number of coordinates from i on. The last two coordinates of a vector
are coded together, as an angle that is uniform on the circle. So a rotation consists of
n (n - 1) / 2 independent numbers and one sign; the sign is the last vector.

**Cells.** A cell is an integer in [0, 2^16) that stands for a small interval of a
number. The cells divide the circle evenly for an angle. For a ratio t they divide the
range [-1, 1] evenly, or the range -4 <= t sqrt(v) <= 4 if that is narrower. The high 6
bits of a cell, its bin, are coded with an integer table for each v; the low 10 bits are
uniform. Even steps of t sqrt(v) suit the errors of a recovered rotation, because these
are about equal everywhere. Even steps of probability would cost 0.7 bits more.

**Recovery.** The decoder has a frame Q_hat near Q and a `Correction`, which makes every
cell exact; the cells of a column are a group. Its `others` are one array, uint8 [k], 1
for each column that was recovered with the wrong sign. The decoder reads the columns
from left to right. Before it reads a column, it applies the exact reflections of all
columns before that one, so errors do not accumulate: Householder QR with corrections.

Shape letters: [n, k] the shape of the frame; S cells of a frame, of which one is the
sign if k = n; P columns of a panel. Functions are unbatched; use `vmap`.

References:
  G. W. Stewart, SIAM J. Numer. Anal. 17 (1980) 403.
  F. Mezzadri, Notices AMS 54 (2007) 592.
  C. Puglisi, SIAM J. Sci. Stat. Comput. 13 (1992) 723: H_0 ... H_{k-1} in closed form.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding.bits_back import correction as correction_lib
from rotbits_jax.system import native

_BINS = 64
_FINE_BITS = 10
_CELLS = _BINS << _FINE_BITS
_PANEL = 32
_CUT = 256  # columns that are read before they are cut off

_Panel = tuple[jax.Array, jax.Array, jax.Array]  # columns, reflectors, cells

_matmul = functools.partial(jnp.matmul, precision='highest')


def num_cells(n: int, k: int) -> int:
  """Returns S, the number of cells of a frame `[n, k]`, 1 <= k <= n."""
  return k * (2 * n - 1 - k) // 2 + (k == n)


def codec(n: int, k: int) -> codecs.Codec:
  """Returns the codec under the Haar measure of the cells of a frame, uint16 `[S]`.

  Raises:
    ValueError: unless 1 <= k <= n.
  """
  _check_shape(n, k)
  row, _ = places(n, k)
  # The sign is in the last row. It has no bin, and its low part is one bit.
  is_sign = row == n - 1
  fine = jnp.where(is_sign, jnp.uint32(1), jnp.uint32(_FINE_BITS))
  context = jnp.where(is_sign, n - 1, n - 2 - row)
  parts = codecs.serial(
    codecs.uniform(fine), codecs.categorical(context, bin_tables(n))
  )

  def push(message: rans.Message, cells: jax.Array) -> rans.Message:
    low = cells & ((1 << _FINE_BITS) - 1)
    return parts.push(message, (low, cells >> _FINE_BITS))

  def pop(message: rans.Message) -> tuple[rans.Message, jax.Array]:
    message, (low, bins) = parts.pop(message)
    return message, bins << _FINE_BITS | low

  return codecs.Codec(push, pop)


def _check_shape(n: int, k: int) -> None:
  """Raises a ValueError if there are no frames of k columns in n dimensions."""
  if not 1 <= k <= n:
    raise ValueError(f'a frame must have 1 <= k <= n, got {n=}, {k=}')


def rotation(cells: jax.Array, n: int, k: int) -> jax.Array:
  """Returns the frame Q = H_0 ... H_{k-1} D of its cells.

  Args:
    cells: uint16 `[S]`.
    n: rows of the frame.
    k: its columns, 1 <= k <= n.

  Returns:
    Q, float32 `[n, k]`.

  Raises:
    ValueError: if there is no such frame, or it has another number of cells.
  """
  _check_shape(n, k)
  if cells.shape != (num_cells(n, k),):
    raise ValueError(f'cells must be [{num_cells(n, k)}], got {cells.shape=}')
  return _compose(*_reflectors(_unpack(cells, n, k), jnp.arange(k, dtype=jnp.int32)))


def correct(
  recovered: jax.Array, other: jax.Array, cells: jax.Array
) -> correction_lib.Correction:
  """Returns the correction with which `recover` finds the cells from either frame.

  Args:
    recovered: Q_hat, float32 `[n, k]`; columns may have the other sign.
    other: Q_hat as another machine may recover it.
    cells: uint16 `[S]`.

  Returns:
    The correction.

  Raises:
    ValueError: if the frames and the cells have different shapes.
  """
  _check_shape(*recovered.shape)
  if other.shape != recovered.shape or cells.shape != (num_cells(*recovered.shape),):
    raise ValueError(
      f'expected frames [n, k] and their cells, got {recovered.shape=}, '
      f'{other.shape=}, {cells.shape=}'
    )
  n, k = recovered.shape
  _, column = places(n, k)
  # The least margin covers the decoder's own float32 arithmetic, whose errors grow as
  # sqrt(n). In 1024 dimensions two orders of applying the reflections differed by 0.04
  # cells, and two computations of a well-conditioned polar factor by 0.08 cells.
  margin = max(1 / 8, n**0.5 / 128)
  vectors, signs = _reflectors(_unpack(cells, n, k), jnp.arange(k, dtype=jnp.int32))
  flips = (_compose(vectors, signs) * recovered).sum(axis=0) < 0

  def remaining(recovered: jax.Array) -> jax.Array:
    """Reflects all columns at once, each by the reflections of those before it."""
    flipped = jnp.where(flips, -recovered, recovered)
    inner = Householder(vectors).coefficients(flipped, transpose=True)
    return jnp.tril(flipped - _matmul(vectors, jnp.triu(inner, 1)))

  here = remaining(recovered)
  elsewhere = remaining(other)
  # An error of a coordinate x_i changes the ratio t_i by its part of |x_i, ...|.
  sensitivity = _pack(1 / _norms(here), n, k)
  corrected = correction_lib.correct(
    _pack(_positions(here), n, k),
    cells,
    _pack(_positions(elsewhere), n, k),
    margin,
    column,
    k,
    sensitivity,
  )
  return corrected._replace(others=(flips.astype(jnp.uint8),))


def recover(recovered: jax.Array, correction: correction_lib.Correction) -> jax.Array:
  """Returns the exact cells, uint16 `[S]`, of a frame that was recovered inexactly."""
  n, k = recovered.shape
  base, extra, residue, (flips,) = correction
  level = correction_lib.levels(base, extra, places(n, k)[1])
  remaining = jnp.where(flips > 0, -recovered, recovered)
  read = _read_columns(
    _widened(remaining),
    _widened(_unpack(level, n, k)),
    _widened(_unpack(residue, n, k)),
  )
  return _pack(read, n, k)


def _widened(matrix: jax.Array) -> jax.Array:
  """Adds columns of zeros, so that they fill panels."""
  return jnp.pad(matrix, ((0, 0), (0, -matrix.shape[1] % _PANEL)))


def _read_columns(
  remaining: jax.Array, levels: jax.Array, residues: jax.Array
) -> jax.Array:
  """Reads the columns of a frame from the left, a panel at a time: uint16 cells."""
  rows = jnp.arange(remaining.shape[0], dtype=jnp.int32)
  count = min(remaining.shape[1], _CUT)

  def read_panel(panel: jax.Array, start: jax.Array) -> _Panel:
    """Reads the columns of a panel; applies the reflection of each to the panel."""

    def read(c: jax.Array, carry: _Panel) -> _Panel:
      panel, vectors, cells = carry
      j = start + c
      position = _positions(jnp.where(rows >= j, panel[:, c], 0)[:, None])[:, 0]
      cell = correction_lib.nearest(position, levels[:, j], residues[:, j])
      vector = _reflectors(cell[:, None], j[None])[0][:, 0]
      # Two columns: XLA's native functions have no product of two vectors this long.
      square = _matmul(vector, jnp.stack([vector, vector], 1))[0]
      scale = 2 / jnp.maximum(square, 1)
      panel = panel - jnp.outer(scale * vector, _matmul(vector, panel))
      return panel, _with_column(vectors, vector, c), _with_column(cells, cell, c)

    carry = panel, jnp.zeros_like(panel), jnp.zeros(panel.shape, jnp.uint16)
    return jax.lax.fori_loop(0, _PANEL, read, carry)

  def step(remaining: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    panel = jax.lax.dynamic_slice_in_dim(remaining, start, _PANEL, axis=1)
    _, vectors, cells = native.loop(read_panel)(panel, start)
    return Householder(vectors).apply_transposed(remaining), cells

  starts = jnp.arange(0, count, _PANEL, dtype=jnp.int32)
  remaining, panels = jax.lax.scan(step, remaining, starts)
  cells = panels.transpose(1, 0, 2).reshape(rows.size, count)
  if count == remaining.shape[1]:
    return cells
  # Later reflections do not change the rows and columns that have been read.
  right = _read_columns(*(x[count:, count:] for x in (remaining, levels, residues)))
  return jnp.concatenate([cells, jnp.pad(right, ((count, 0), (0, 0)))], axis=1)


class Householder(NamedTuple):
  """A product of Householder reflections, `H_0 ... H_{k-1} = I - V T V^T`.

      H_j = I - 2 v_j v_j^T / |v_j|^2,    T^-1 = triu(V^T V, 1) + diag(V^T V) / 2

  The vectors v_j are the columns of V. A zero vector stands for no reflection, H_j = I.
  """

  vectors: jax.Array  # V, float32 [n, k]

  def apply(self, x: jax.Array) -> jax.Array:
    """Returns `H_0 ... H_{k-1} x`, of x `[n, c]`."""
    return x - _matmul(self.vectors, self.coefficients(x, transpose=False))

  def apply_transposed(self, x: jax.Array) -> jax.Array:
    """Returns `H_{k-1} ... H_0 x`, of x `[n, c]`."""
    return x - _matmul(self.vectors, self.coefficients(x, transpose=True))

  def coefficients(self, x: jax.Array, *, transpose: bool) -> jax.Array:
    """Returns what the reflections subtract, `T V^T x` or `T^T V^T x`: `[k, c]`."""
    gram = _matmul(self.vectors.T, self.vectors)
    diagonal = jnp.diagonal(gram)
    diagonal = jnp.where(diagonal > 0, diagonal / 2, 1)
    factor = jnp.triu(gram, 1) + jnp.diag(diagonal)
    products = _matmul(self.vectors.T, x)
    return jax.scipy.linalg.solve_triangular(factor, products, trans=int(transpose))


def _with_column(matrix: jax.Array, column: jax.Array, index: jax.Array) -> jax.Array:
  """Returns a matrix in which one column is replaced."""
  return jax.lax.dynamic_update_index_in_dim(matrix, column, index, 1)


@functools.lru_cache(maxsize=8)
def bin_tables(n: int) -> np.ndarray:
  """Returns the frequency tables of the bins for v = 2, ..., n: int64 `[n - 1, 64]`.

  They must be equal on all machines to the last bit. Therefore the computation uses
  only float64 operations that IEEE 754 rounds correctly, one at a time: no sums in an
  order that a library chooses, no powers and no logarithms.
  """
  points = 16
  half = _BINS // 2
  v = np.arange(2, n + 1, dtype=np.float64)[:, None]
  midpoints = (np.arange(half * points) + 0.5) / (half * points)
  t = np.where(v <= 16, 1.0, 4.0 / np.sqrt(v)) * midpoints
  # Computes sqrt(1 - t^2)^(v - 3) by squaring. The exponent is 0 for v = 2, because the
  # angle is uniform.
  power = np.sqrt((1.0 - t) * (1.0 + t))
  weight = np.ones_like(t)
  exponent = np.maximum(v.astype(np.int64) - 3, 0)
  while exponent.any():
    weight = np.where(exponent & 1, weight * power, weight)
    power = power * power
    exponent = exponent >> 1
  mass = functools.reduce(np.add, (weight[:, i::points] for i in range(points)))
  total = functools.reduce(np.add, (mass[:, i : i + 1] for i in range(half)))
  counts = np.floor(mass / (2 * total) * 2.0**40).astype(np.int64)
  ends = np.cumsum(np.concatenate([counts[:, ::-1], counts], axis=1), axis=1)
  whole = ends[:, -1:]
  # A bin may have the frequency 0, because cells are popped before they are pushed.
  return np.diff((ends * tables.TOTAL + whole // 2) // whole, prepend=0, axis=1)


def _reach(n: int) -> jax.Array:
  """Returns the greatest |t| that the cells of each row can have: float32 `[n, 1]`."""
  left = n - jnp.arange(n, dtype=jnp.float32)[:, None]
  return jnp.minimum(1, 4 / jnp.sqrt(left))


def _reflectors(cells: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the Householder vectors x_j + s_j e_j and the signs s_j."""
  n = cells.shape[0]
  rows = jnp.arange(n, dtype=jnp.int32)[:, None]
  number = cells.astype(jnp.float32)
  t = _reach(n) * ((number - 32767.5) / 32768)
  t = jnp.where((rows >= first) & (rows < n - 2), t, 0)
  left = jnp.cumprod(jnp.sqrt((1 - t) * (1 + t)), axis=0)
  left = jnp.concatenate([jnp.ones_like(left[:1]), left[:-1]])
  angle = (2 * np.pi / _CELLS) * (number[n - 2] + 0.5)
  last = jnp.where(first == n - 1, 2 * number[-1] - 1, left[-1] * jnp.sin(angle))
  x = jnp.where(rows == n - 2, jnp.cos(angle), t) * left
  x = jnp.where(rows == n - 1, last, x)
  x = jnp.where(rows >= first, x, 0)
  at_first = rows == first
  negative = (at_first & (x < 0)).any(axis=0)
  signs = jnp.where(negative, jnp.float32(-1), jnp.float32(1))
  return x + jnp.where(at_first, signs, 0), signs


def _positions(x: jax.Array) -> jax.Array:
  """Returns the positions of vectors in units of cells, modulo 2^16."""
  n = x.shape[0]
  rows = jnp.arange(n, dtype=jnp.int32)[:, None]
  t = x / _norms(x)
  position = 32767.5 + 32768 * jnp.clip(t / _reach(n), -1, 1)
  angle = jnp.arctan2(x[-1], x[n - 2]) * (_CELLS / (2 * np.pi)) - 0.5
  position = jnp.where(rows == n - 2, angle, position)
  return jnp.where(rows == n - 1, (x > 0).astype(jnp.float32), position)


def _norms(x: jax.Array) -> jax.Array:
  """Returns the norms |x_i, ..., x_{n-1}| of vectors, at least 1e-30: `[n, c]`."""
  squares = jax.lax.cumsum(x * x, axis=0, reverse=True)
  return jnp.maximum(jnp.sqrt(squares), 1e-30)


def _compose(vectors: jax.Array, signs: jax.Array) -> jax.Array:
  """Returns `H_0 ... H_{k-1} D`, given Householder vectors and signs."""
  diagonal = jnp.eye(vectors.shape[0], signs.size, dtype=jnp.float32) * -signs
  return Householder(vectors).apply(diagonal)


def places(n: int, k: int) -> tuple[jax.Array, jax.Array]:
  """Returns the row and the column of each cell in the frame: int32 `[S]`.

  The columns j and k - 1 - j together have 2n - 1 - k coordinates. So the trapezoid of
  coordinates folds to a rectangle. The sign comes last.
  """
  index = jnp.arange(num_cells(n, k), dtype=jnp.int32)
  pair, offset = jnp.divmod(index, max(2 * n - 1 - k, 1))
  second = offset >= n - 1 - pair
  column = jnp.where(second, k - 1 - pair, pair)
  row = jnp.where(second, column + offset - (n - 1 - pair), column + offset)
  is_sign = index == n * (n - 1) // 2
  return jnp.where(is_sign, n - 1, row), jnp.where(is_sign, n - 1, column)


def _pack(matrix: jax.Array, n: int, k: int) -> jax.Array:
  """Returns the entries `[S]` of a matrix `[n, >= k]` at the places of the cells."""
  row, column = places(n, k)
  return matrix.at[row, column].get(mode='promise_in_bounds')


def _unpack(values: jax.Array, n: int, k: int) -> jax.Array:
  """Puts values `[S]` at the places of the cells and zeros elsewhere: `[n, k]`."""
  matrix = jnp.zeros((n, k), values.dtype)
  return matrix.at[places(n, k)].set(
    values, mode='promise_in_bounds', unique_indices=True
  )

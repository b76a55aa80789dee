r"""A codec over the orthogonal group under the Haar measure.

**Factors.** Let x_0, x_1, ... be unit vectors, x_j uniform on the sphere in n - j
dimensions, on the coordinates from j on, and let the reflection H_j exchange x_j with
-s_j e_j, where s_j is the sign of the first coordinate of x_j. Then

    Q = H_0 H_1 ... H_{k-1} D,    D = diag(-s_0, -s_1, ...)    [n, k]

has the Haar measure: on O(n) for k = n, both determinants included, and on the
orthonormal k-frames of R^n (the Stiefel manifold) for k < n.

**Coordinates.** Within a vector the ratios t_i = x_i / |x_i, ..., x_{n-1}| are
independent, with density proportional to (1 - t^2)^((v - 3) / 2), where v = n - i
coordinates are left. The last two are taken together, as an angle that is uniform on
the circle. So a rotation is n (n - 1) / 2 independent numbers, and one sign, which is
the last vector.

**Cells.** Each number is one of 2^16 cells, which divide evenly the range of t, of
t sqrt(v) from -4 to 4 where that is less, or the circle. The high 6 bits of a cell are
coded with an integer table for each v, the low 10 are uniform. Even steps of t sqrt(v)
suit the errors of a recovered rotation, which are about the same everywhere; even
steps of probability would be 0.7 bits worse, being finest in the middle.

**Recovery.** The decoder has Q_hat, near Q, and a `Correction`, which makes every cell
exact (see `correction`). Each column is read after the exact reflections of all columns
before it, so errors do not pile up. That is Householder QR with corrections.

A message's cells and corrections are integers; no float decides anything.

Shape letters: [n, k] the frame, S = coordinates + 1 for the sign if k = n, P columns of
a panel. Functions take leading axes where it says so, else `vmap` them.

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

_BINS = 64
_FINE_BITS = 10
_CELLS = _BINS << _FINE_BITS
_PANEL = 32
_CUTS, _LEAST_CUT = 4, 256  # how often what is read is cut off; columns

_Panel = tuple[jax.Array, jax.Array, jax.Array]  # columns, reflectors, cells

_matmul = functools.partial(jnp.matmul, precision='highest')


class Correction(NamedTuple):
  """What leads from a recovered rotation to the exact cells."""

  flips: jax.Array  # bool [k], columns whose sign was recovered wrong
  cells: correction_lib.Correction  # of the cells, grouped by column


def num_cells(n: int, k: int) -> int:
  """S, how many cells an [n, k] frame has."""
  if not 0 <= k <= n:
    raise ValueError(f'no {k} orthonormal vectors exist in {n} dimensions')
  return k * (2 * n - 1 - k) // 2 + (0 < k == n)


def codec(n: int, k: int, batch: tuple[int, ...] = ()) -> codecs.Codec:
  """The codec of cells under the Haar measure.

  Args:
    n: rows of the frame.
    k: columns of it; n for a rotation.
    batch: leading axes, for a stack of rotations.

  Returns:
    A codec of uint16 `[*batch, S]`.
  """
  shape = (*batch, num_cells(n, k))

  def make() -> codecs.Codec:
    row, _ = _places(n, k)
    # The sign, in the last row, has no bin and one bit.
    context = jnp.where(row < n - 1, n - 2 - row, max(n - 1, 0))
    fine = jnp.where(row < n - 1, 1 << _FINE_BITS, 2)
    return codecs.serial(
      codecs.uniform(jnp.broadcast_to(fine, shape)),
      codecs.categorical(jnp.broadcast_to(context, shape), bin_tables(n)),
    )

  parts = codecs.deferred(make)

  def push(message: rans.Message, cells: jax.Array) -> rans.Message:
    cells = cells.astype(jnp.uint32)
    low = cells & ((1 << _FINE_BITS) - 1)
    return parts.push(message, (low, cells >> _FINE_BITS))

  def pop(message: rans.Message) -> tuple[rans.Message, jax.Array]:
    message, (low, high) = parts.pop(message)
    return message, (high << _FINE_BITS | low).astype(jnp.uint16)

  return codecs.Codec(push, pop)


def rotation(cells: jax.Array, n: int, k: int) -> jax.Array:
  """The frame that cells stand for.

  Args:
    cells: uint16 `[S]`.
    n: rows.
    k: columns.

  Returns:
    Q, float32 `[n, k]`.
  """
  _check_cells(cells, n, k)
  if k == 0:
    return jnp.zeros((n, 0), jnp.float32)
  vectors, signs = _reflectors(_unpack(cells, n, k), jnp.arange(k))
  return _compose(vectors, signs)


def correct(
  recovered: jax.Array, cells: jax.Array, frame: jax.Array | None = None
) -> Correction:
  """The correction with which `recover` gets the cells back.

  Args:
    recovered: Q_hat, float32 `[n, k]`, near `rotation(cells)` up to columns' signs.
    cells: uint16 `[S]`.
    frame: `rotation(cells)`, if it is known.

  Returns:
    The correction.
  """
  n, k = recovered.shape
  _check_cells(cells, n, k)
  _, column = _places(n, k)
  if k == 0:
    flips, position = jnp.zeros(0, bool), jnp.zeros(0, jnp.float32)
  else:
    vectors, signs = _reflectors(_unpack(cells, n, k), jnp.arange(k))
    frame = _compose(vectors, signs) if frame is None else frame
    flips = (frame * recovered).sum(axis=0) < 0
    flipped = jnp.where(flips, -recovered, recovered)
    # All columns at once, each after the reflections of the columns before it.
    factor = _compact_factor(vectors)
    inner = _solve(factor, _matmul(vectors.T, flipped), transpose=True)
    remaining = flipped - _matmul(vectors, jnp.triu(inner, 1))
    position = _pack(_positions(jnp.tril(remaining)), n, k)
  # What float32 linear algebra may differ by: its errors grow as sqrt(n). In 1024
  # dimensions two polar factors were seen to differ by 0.08 cells, and reading them by
  # reflections in another order of operations by 0.04.
  margin = max(1 / 8, n**0.5 / 128)
  return Correction(flips, correction_lib.correct(position, cells, margin, column, k))


def recover(recovered: jax.Array, correction: Correction) -> jax.Array:
  """The exact cells of a rotation that was recovered inexactly.

  Args:
    recovered: Q_hat, float32 `[n, k]`.
    correction: from `correct`.

  Returns:
    uint16 `[S]`.
  """
  n, k = recovered.shape
  if k == 0:
    return jnp.zeros(0, jnp.uint16)
  width = -(-k // _PANEL) * _PANEL
  widen = lambda x: jnp.pad(x, ((0, 0), (0, width - k)))
  _, column = _places(n, k)
  levels = widen(_unpack(correction_lib.levels(correction.cells, column), n, k))
  residues = widen(_unpack(correction.cells.residue, n, k))
  remaining = widen(jnp.where(correction.flips, -recovered, recovered))
  cells, start = [], 0
  while start < width:
    # What is read is cut off from time to time: reflections leave it alone.
    count = min(max(width // _CUTS // _PANEL * _PANEL, _LEAST_CUT), width - start)
    remaining, read = _recover_columns(
      remaining, levels[start:, start:], residues[start:, start:], k - start, count
    )
    cells.append(jnp.pad(read, ((start, 0), (0, 0))))
    remaining, start = remaining[count:, count:], start + count
  return _pack(jnp.concatenate(cells, axis=1), n, k)


def _recover_columns(
  remaining: jax.Array, levels: jax.Array, residues: jax.Array, k: int, count: int
) -> tuple[jax.Array, jax.Array]:
  """Reads the first columns of what is left of a frame.

  Args:
    remaining: float32 `[m, w]`, the last m coordinates of the columns that are left,
      reflected by all reflections so far.
    levels: int32 `[m, w]`, of these cells' corrections.
    residues: uint16 `[m, w]`, likewise.
    k: how many of the columns are no padding.
    count: how many columns to read, a multiple of P.

  Returns:
    The columns reflected, `[m, w]`, and the cells read, uint16 `[m, count]`.
  """
  rows = jnp.arange(remaining.shape[0])

  def read(start: jax.Array, c: jax.Array, carry: _Panel) -> _Panel:
    """Reads one column of a panel and reflects the panel."""
    panel, vectors, cells = carry
    j = start + c
    position = _positions(jnp.where(rows >= j, panel[:, c], 0)[:, None])[:, 0]
    cell = correction_lib.nearest(position, levels[:, j], residues[:, j])
    vector, _ = _reflectors(cell[:, None], j[None])
    vector = jnp.where(j < k, vector[:, 0], 0)
    scale = 2 / jnp.maximum(_matmul(vector, vector), 1)
    panel = panel - jnp.outer(scale * vector, _matmul(vector, panel))
    return panel, vectors.at[:, c].set(vector), cells.at[:, c].set(cell)

  def read_panel(remaining: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    panel = jax.lax.dynamic_slice_in_dim(remaining, start, _PANEL, axis=1)
    carry = panel, jnp.zeros_like(panel), jnp.zeros(panel.shape, jnp.uint16)
    step = functools.partial(read, start)
    _, vectors, cells = jax.lax.fori_loop(0, _PANEL, step, carry)
    inner = _matmul(vectors.T, remaining)
    inner = _solve(_compact_factor(vectors), inner, transpose=True)
    return remaining - _matmul(vectors, inner), cells

  remaining, panels = jax.lax.scan(read_panel, remaining, jnp.arange(0, count, _PANEL))
  return remaining, panels.transpose(1, 0, 2).reshape(rows.size, count)


def fit(correction: Correction) -> np.ndarray:
  """Frequency tables for corrections: int64 `[3, 17]`."""
  flips = np.asarray(correction.flips).astype(np.int64).reshape(-1)
  counts = np.bincount(flips, minlength=correction_lib.LEVELS)
  flip_table = tables.quantize(counts if flips.size else counts + 1)
  return np.concatenate([correction_lib.fit(correction.cells), flip_table[None]])


def correction_codec(
  n: int, k: int, frequencies: jax.Array, batch: tuple[int, ...] = ()
) -> codecs.Codec:
  """The codec of corrections.

  Args:
    n: rows of the frame.
    k: columns.
    frequencies: `[3, 17]`, from `fit`.
    batch: leading axes, for a stack of rotations.

  Returns:
    A codec of corrections whose arrays have the leading axes `batch`.
  """
  parts = codecs.deferred(
    lambda: codecs.serial(
      correction_lib.codec(_places(n, k)[1], batch, k, frequencies[:2]),
      codecs.categorical(jnp.zeros((*batch, k), jnp.uint32), frequencies[2:]),
    )
  )

  def push(message: rans.Message, correction: Correction) -> rans.Message:
    return parts.push(message, (correction.cells, correction.flips))

  def pop(message: rans.Message) -> tuple[rans.Message, Correction]:
    message, (cells, flips) = parts.pop(message)
    return message, Correction(flips.astype(bool), cells)

  return codecs.Codec(push, pop)


@functools.lru_cache(maxsize=8)
def bin_tables(n: int) -> np.ndarray:
  """Integer tables of the bins: int64 `[n - 1, 64]`, for v = 2, ..., n.

  The encoder and the decoder both make them, so they must not differ by a bit between
  machines: they use only those float64 operations that IEEE 754 rounds correctly, each
  on its own (no sums whose order a library chooses, no powers, no logarithms).
  """
  points = 16
  half = _BINS // 2
  v = np.arange(2, max(n, 1) + 1, dtype=np.float64)[:, None]
  midpoints = (np.arange(half * points) + 0.5) / (half * points)
  t = np.where(v <= 16, 1.0, 4.0 / np.sqrt(v)) * midpoints
  # sqrt(1 - t^2)^(v - 3) by squaring; v = 2 is uniform on the circle.
  power, weight = np.sqrt((1.0 - t) * (1.0 + t)), np.ones_like(t)
  exponent = np.maximum(v.astype(np.int64) - 3, 0)
  while exponent.any():
    weight = np.where(exponent & 1, weight * power, weight)
    power, exponent = power * power, exponent >> 1
  mass, total = np.zeros((v.size, half)), np.zeros((v.size, 1))
  for i in range(points):
    mass = mass + weight[:, i::points]
  for i in range(half):
    total = total + mass[:, i : i + 1]
  # Bins with less than half of the least frequency are left out.
  share = mass / total / 2
  share = np.where(share * tables.TOTAL < 0.5, 0, share)
  counts = np.floor(share * 2.0**40).astype(np.int64)
  counts = np.concatenate([counts[:, ::-1], counts], axis=1)
  return np.array([tables.quantize(row) for row in counts]).reshape(-1, _BINS)


def _check_cells(cells: jax.Array, n: int, k: int) -> None:
  if cells.shape != (num_cells(n, k),):
    raise ValueError(
      f'a frame of {k} vectors in {n} dimensions has {num_cells(n, k)} cells, '
      f'got {cells.shape=}'
    )


def _reach(n: int) -> jax.Array:
  """The greatest |t| in each row: float32 `[n, 1]`."""
  left = n - jnp.arange(n, dtype=jnp.float32)[:, None]
  return jnp.minimum(1, 4 / jnp.sqrt(left))


def _reflectors(cells: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Householder vectors x_j + s_j e_j and signs s_j.

  Args:
    cells: uint16 `[n, c]`, one vector a column.
    first: int32 `[c]`, each vector's first row.

  Returns:
    float32 `[n, c]`, zero above the first rows, and `[c]`.
  """
  n = cells.shape[0]
  rows = jnp.arange(n)[:, None]
  number = cells.astype(jnp.float32)
  t = _reach(n) * ((number - 32767.5) / 32768)
  t = jnp.where((rows >= first) & (rows < n - 2), t, 0)
  left = jnp.cumprod(jnp.sqrt((1 - t) * (1 + t)), axis=0)
  left = jnp.concatenate([jnp.ones_like(left[:1]), left[:-1]])
  angle = (2 * np.pi / _CELLS) * (number[max(n - 2, 0)] + 0.5)
  last = jnp.where(first == n - 1, 2 * number[-1] - 1, left[-1] * jnp.sin(angle))
  x = jnp.where(rows == n - 2, jnp.cos(angle), t) * left
  x = jnp.where(rows == n - 1, last, x)
  x = jnp.where(rows >= first, x, 0)
  at_first = rows == first
  negative = (at_first & (x < 0)).any(axis=0)
  signs = jnp.where(negative, jnp.float32(-1), jnp.float32(1))
  return x + jnp.where(at_first, signs, 0), signs


def _positions(x: jax.Array) -> jax.Array:
  """Where vectors are in units of cells, modulo 2^16: the inverse of `_reflectors`.

  Args:
    x: float32 `[n, c]`, zero above each vector's first row.

  Returns:
    float32 `[n, c]`, meaningless where the vectors have no cells.
  """
  n = x.shape[0]
  rows = jnp.arange(n)[:, None]
  norm = jnp.sqrt(jax.lax.cumsum(x * x, axis=0, reverse=True))
  t = x / jnp.maximum(norm, 1e-30)
  position = 32767.5 + 32768 * jnp.clip(t / _reach(n), -1, 1)
  angle = jnp.arctan2(x[-1], x[max(n - 2, 0)]) * (_CELLS / (2 * np.pi)) - 0.5
  position = jnp.where(rows == n - 2, angle, position)
  return jnp.where(rows == n - 1, (x > 0).astype(jnp.float32), position)


def _compose(vectors: jax.Array, signs: jax.Array) -> jax.Array:
  """`H_0 ... H_{k-1} D`."""
  diagonal = jnp.eye(vectors.shape[0], signs.size, dtype=jnp.float32) * -signs
  inner = _solve(_compact_factor(vectors), _matmul(vectors.T, diagonal))
  return diagonal - _matmul(vectors, inner)


def _compact_factor(vectors: jax.Array) -> jax.Array:
  """The inverse of the triangular T in `H_0 ... H_{k-1} = I - V T V^T`."""
  gram = _matmul(vectors.T, vectors)
  diagonal = jnp.diagonal(gram)
  # A zero vector stands for no reflection.
  diagonal = jnp.where(diagonal > 0, diagonal / 2, 1)
  return jnp.triu(gram, 1) + jnp.diag(diagonal)


def _solve(factor: jax.Array, x: jax.Array, *, transpose: bool = False) -> jax.Array:
  return jax.scipy.linalg.solve_triangular(factor, x, trans=int(transpose))


def _places(n: int, k: int) -> tuple[jax.Array, jax.Array]:
  """Row and column of each cell: int32 `[S]`.

  Columns j and k - 1 - j together have 2n - 1 - k coordinates whatever j is, so the
  trapezoid of coordinates folds to a rectangle.
  """
  index = jnp.arange(num_cells(n, k))
  pair, offset = jnp.divmod(index, max(2 * n - 1 - k, 1))
  second = offset >= n - 1 - pair
  column = jnp.where(second, k - 1 - pair, pair)
  row = jnp.where(second, column + offset - (n - 1 - pair), column + offset)
  # The sign comes last.
  is_sign = index == n * (n - 1) // 2
  return jnp.where(is_sign, n - 1, row), jnp.where(is_sign, n - 1, column)


def _pack(matrix: jax.Array, n: int, k: int) -> jax.Array:
  """Takes the cells' entries `[S]` out of a matrix `[n, >= k]`."""
  row, column = _places(n, k)
  return matrix.at[row, column].get(mode='promise_in_bounds')


def _unpack(values: jax.Array, n: int, k: int) -> jax.Array:
  """The inverse of `_pack`, with zeros elsewhere: `[n, k]`."""
  row, column = jnp.arange(n)[:, None], jnp.arange(k)[None]
  second = column >= (k + 1) // 2
  pair = jnp.where(second, k - 1 - column, column)
  start = pair * (2 * n - 1 - k) + jnp.where(second, n - 1 - pair, 0)
  index = start + row - column
  is_sign = (row == n - 1) & (column == n - 1)
  index = jnp.where(is_sign, n * (n - 1) // 2, index)
  present = (row >= column) & (row < n - 1) | is_sign
  taken = values.at[jnp.where(present, index, 0)].get(mode='promise_in_bounds')
  return jnp.where(present, taken, jnp.zeros_like(taken))

"""Measures how an array differs from another one, see `structured.Relative`.

Arrays are given by their bits, see `relative.bits_of`. Shape letters: R rows, C
columns.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import line_sums
from rotbits_jax.coding import pool
from rotbits_jax.structured import relative

LEAST_LINES = 16
"""Rows or columns for which scales of columns or rows are kept."""

_LINES = 1 << 9  # elements of a row, or of a column, that tell its scale
_SCALE_BITS = 9  # of a scale, and what its error in a short line seems to save
_FAR = 24  # eighths of an octave from which scales of lines are equally wrong
_LEAST = 1e-18  # of the scales by which roots are divided


def floats(bits: np.ndarray, base: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns the differences, float32; 0 for those not finite."""
  with np.errstate(all='ignore'):
    if relative.mantissa_bits(dtype) is None:
      return (bits - base).astype(np.float32)
    far = widened(bits, dtype)
    far -= widened(base, dtype)
    ends = far.max(initial=0), far.min(initial=0)
    if not np.isfinite(ends).all():
      far[~np.isfinite(far)] = 0
  return far


def widened(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns floats, given by their bits, as float32."""
  if relative.mantissa_bits(dtype) == 7:  # bfloat16, which NumPy converts slowly
    return (bits.astype(np.int32) << 16).view(np.float32)
  return np.ascontiguousarray(bits).view(dtype).astype(np.float32)


def scales(
  bits: np.ndarray, base: np.ndarray, dtype: np.dtype, run: pool.Run
) -> tuple[np.ndarray, np.ndarray]:
  """Measures the scales of the differences of rows and columns.

  The mean of square roots is used, because few large differences change it little.

  Args:
    bits: bits of the array, `[R, C]`. C is at most 2^20 if R is `LEAST_LINES` or more.
    base: bits of its base, `[R, C]`.
    dtype: their dtype.
    run: runs jobs for some rows, such as `pool.run`.

  Returns:
    The scales of the rows and of the columns, int16, see `structured.Relative`.
  """
  rows, columns = bits.shape
  few = slice(None, None, -(-columns // _LINES))
  if rows < LEAST_LINES:
    roots = np.sqrt(np.abs(floats(bits[:, few], base[:, few], dtype)))
    of_rows, of_columns = roots.mean(axis=1), np.ones(columns)
    share = np.count_nonzero(roots) / roots.size
  else:
    some = slice(None, None, -(-rows // _LINES))
    bits_of_some, base_of_some = bits[some], base[some]
    changed = np.count_nonzero(bits_of_some != base_of_some)
    share = changed / bits_of_some.size
    equal = np.full(columns, 1 / columns)
    sums = _sums(bits_of_some, base_of_some, equal, dtype, run, of_columns=True)
    of_columns = sums.weighted / max(np.count_nonzero(sums.rows), 1)
    weights = 1 / np.maximum(of_columns, _LEAST)
    weights[of_columns == 0] = 0
    sums = _sums(bits, base, weights, dtype, run, of_columns=False)
    of_rows = sums.rows / max(np.count_nonzero(weights), 1)
  bias = 0.0
  if (mantissa := relative.mantissa_bits(dtype)) is not None:
    one = int(np.array(1, dtype).view(bits.dtype)) >> mantissa
    bias = 8.0 * (one + mantissa)
  return (
    _kept(_logs(of_rows, bias), share * columns),
    _kept(_logs(of_columns, 0.0), share * rows),
  )


def _logs(roots: np.ndarray, bias: float) -> np.ndarray:
  logs = np.round(16 * np.log2(np.maximum(roots, 1e-30)) + bias)
  bound = relative.MOST_SCALE
  return np.clip(logs, -bound, bound).astype(np.int16)


def _kept(logs: np.ndarray, size: float) -> np.ndarray:
  """Returns the scales of lines, or one for all if they save less than they take.

  Numbers of a scale that is wrong by a factor of e^x take x^2 / ln 2 bits more.

  Args:
    logs: the scales, in eighths of an octave.
    size: the differences of a line that are not 0.
  """
  middle = float(np.median(logs))
  far = np.clip(logs - middle, -_FAR, _FAR)
  if size * float(np.square(far).mean()) * math.log(2) / 64 > _SCALE_BITS:
    return logs
  return np.full_like(logs, round(middle))


def _sums(
  bits: np.ndarray,
  base: np.ndarray,
  weights: np.ndarray,
  dtype: np.dtype,
  run: pool.Run,
  *,
  of_columns: bool,
) -> line_sums.Sums:
  """Sums the square roots of the absolute differences; 0 for those not finite."""
  is_float = relative.mantissa_bits(dtype) is not None
  program = functools.partial(_roots, dtype=dtype if is_float else None)

  def job(rows: slice) -> line_sums.Sums:
    own = bits[rows], base[rows]
    return line_sums.run(program, own, weights, of_columns=of_columns)

  jobs = [functools.partial(job, rows) for rows in line_sums.row_parts(bits.shape)]
  return line_sums.joined(run(jobs))


@functools.partial(jax.jit, static_argnames='dtype', donate_argnums=0)
def _roots(
  out: line_sums.Sums,
  elements: tuple[jax.Array, jax.Array],  # signed integers
  *others: jax.Array,
  dtype: np.dtype | None,
) -> line_sums.Sums:
  def roots(elements: tuple[jax.Array, jax.Array], start: jax.Array) -> jax.Array:
    bits, base = (
      jax.lax.dynamic_slice(x, (start,), (line_sums.WIDTH,)) for x in elements
    )
    if dtype is None:
      far = (bits - base).astype(jnp.float32)
    else:
      far = line_sums.floats(bits, dtype) - line_sums.floats(base, dtype)
    far = jnp.abs(far)
    return jnp.sqrt(jnp.where(far < jnp.inf, far, 0))

  return line_sums.loop(roots, out, elements, *others)

"""Rotation of the parameters around a segment, and recovery of the rotation from them.

A rotation T is a float32 array `[d, d]` on the device; None means that the segment is
not rotated. Large arrays are widened to float32 one slab at a time. Frames are defined
in `options`, readers and writers in `segments`.
"""

from collections.abc import Callable, Iterable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.paper import options as options_lib
from rotbits_jax.paper import segments
from rotbits_jax.symmetries import canonical

_SLAB = 8192  # number of rows or columns that are rotated at once

_matmul = functools.partial(jnp.matmul, precision='highest')


class Segment(NamedTuple):
  """The parameters around one residual segment, as `segments.Parts` lists them."""

  width: int
  readers: segments.Arrays
  writers: segments.Arrays
  shortcut: segments.Arrays
  biases: segments.Arrays
  leaving: segments.Arrays


def can_turn(segment: Segment) -> bool:
  """Tells whether every rotated number will be within the range of its dtype."""
  # A shortcut is rotated on both sides, so a number may be as great as its norm.
  norms = [
    *((x, _greatest_norm(x, 0)) for x in segment.readers.values()),
    *((x, _greatest_norm(np.atleast_2d(x), 1)) for x in segment.writers.values()),
    *((x, _greatest_norm(x.reshape(1, -1), 1)) for x in segment.shortcut.values()),
    *((x, _greatest_norm(x.reshape(1, -1), 1)) for x in segment.leaving.values()),
  ]
  return all(norm < 0.99 * float(jnp.finfo(x.dtype).max) for x, norm in norms)


def turned(
  segment: Segment, before: jax.Array | None, rotation: jax.Array | None
) -> segments.Arrays:
  """Rotates the parameters around a segment.

  Args:
    segment: the parameters.
    before: the rotation of the previous segment; None for none.
    rotation: the rotation of this segment; None for none.

  Returns:
    The rotated arrays by path, rounded to their dtypes.
  """
  arrays = {k: turn_rows(x, rotation) for k, x in segment.readers.items()}
  arrays |= {k: turn_columns(x, rotation) for k, x in segment.writers.items()}
  for path, matrix in segment.shortcut.items():
    product = jnp.asarray(matrix, jnp.float32)
    product = product if before is None else _rows(product, before)
    product = product if rotation is None else _columns(product, rotation)
    arrays[path] = np.asarray(_round(product, matrix.dtype))
  return arrays | {k: np.ascontiguousarray(x) for k, x in segment.biases.items()}


def turn_rows(matrix: np.ndarray, rotation: jax.Array | None) -> np.ndarray:
  """Returns `rotation^T @ matrix`, rounded to the dtype of the matrix: `[d, m]`."""
  if rotation is None:
    return np.ascontiguousarray(matrix)
  out = np.empty(matrix.shape, matrix.dtype)
  for i in range(0, matrix.shape[1], _SLAB):
    slab = _rows(jnp.asarray(matrix[:, i : i + _SLAB]), rotation)
    out[:, i : i + _SLAB] = np.asarray(_round(slab, matrix.dtype))
  return out


def turn_columns(matrix: np.ndarray, rotation: jax.Array | None) -> np.ndarray:
  """Returns `matrix @ rotation`, rounded to the dtype of the matrix: `[..., d]`."""
  if rotation is None:
    return np.ascontiguousarray(matrix)
  rows = np.atleast_2d(matrix)
  out = np.empty((rows.shape[0], rotation.shape[1]), matrix.dtype)
  for i in range(0, rows.shape[0], _SLAB):
    slab = _columns(jnp.asarray(rows[i : i + _SLAB]), rotation)
    out[i : i + _SLAB] = np.asarray(_round(slab, matrix.dtype))
  return out.reshape(*matrix.shape[:-1], rotation.shape[1])


def reader_rotation(readers: Iterable[np.ndarray], canonicaliser: str) -> jax.Array:
  """Returns the canonical rotation of the readers of a segment: float32 `[d, d]`.

  The readers side by side form W `[d, m]`. `svd` decomposes W. `qr` adds up every d-th
  column and decomposes the sum, a square matrix. The sum is far better conditioned than
  a block of W may be, such as the first columns of a head whose first tokens never
  occur. `qr` also serves the segments for which `polar_shortcut` cannot use a shortcut.
  """
  parts = list(readers)
  if canonicaliser == 'svd':
    matrix = np.concatenate([np.asarray(x, np.float32) for x in parts], axis=1)
    return _canonicalisers['svd'](jnp.asarray(matrix))
  width = parts[0].shape[0]
  folded, place = np.zeros((width, width), np.float32), 0
  for matrix in parts:
    start = 0
    while start < matrix.shape[1]:
      count = min(width - place, matrix.shape[1] - start)
      folded[:, place : place + count] += matrix[:, start : start + count]
      start, place = start + count, (place + count) % width
  return _canonicalisers['qr'](jnp.asarray(folded))


def sampled_rotation(
  frame: options_lib.Frame,
  segment: Segment,
  neutral: jax.Array | None,
  before: jax.Array | None,
  q: jax.Array,
) -> jax.Array:
  """Returns the rotation T of a segment, given its sampled frame.

  Args:
    frame: shape and source of the frame.
    segment: the parameters.
    neutral: the canonical rotation C of the readers; None if the frame will be
      recovered from the shortcut.
    before: the rotation T of the previous segment; None for none.
    q: float32 `[n, k]`, the sampled frame.

  Returns:
    float32 `[d, d]`.
  """
  if frame.from_shortcut:
    (shortcut,) = segment.shortcut.values()
    before = jnp.eye(frame.k) if before is None else before
    return _chained(shortcut, before, q)
  return _counter_turned(neutral, q)


def recovered(
  frame: options_lib.Frame,
  parts: segments.Parts,
  arrays: segments.Arrays,
  canonicaliser: str,
) -> jax.Array:
  """Recovers the sampled frame, inexactly, from the stored parameters of a segment.

  Args:
    frame: shape and source of the frame.
    parts: the paths of the parameters around the segment.
    arrays: the stored parameters by path.
    canonicaliser: see `options.Options`.

  Returns:
    float32 `[n, k]`.
  """
  if frame.from_shortcut:
    (shortcut,) = (arrays[path] for path in parts.shortcut)
    return _shortcut_frame(shortcut)
  q = reader_rotation((arrays[path] for path in parts.readers), canonicaliser)
  return q[frame.fixed :, frame.fixed :]


def _greatest_norm(matrix: np.ndarray, axis: int) -> float:
  """Returns the greatest norm of a column (axis 0) or of a row (axis 1).

  The result is NaN if a norm is NaN.
  """
  slabs = (
    matrix[i : i + _SLAB] if axis else matrix[:, i : i + _SLAB]
    for i in range(0, matrix.shape[1 - axis], _SLAB)
  )
  squares = [float(_greatest_square(slab, axis)) for slab in slabs]
  return float(np.sqrt(np.max(squares, initial=0.0)))


@functools.partial(jax.jit, static_argnums=1)
def _greatest_square(matrix: jax.Array, axis: int) -> jax.Array:
  x = matrix.astype(jnp.float32)
  return jnp.square(x).sum(axis=axis).max(initial=0)


@jax.jit
def _rows(matrix: jax.Array, rotation: jax.Array) -> jax.Array:
  return _matmul(rotation.T, matrix.astype(jnp.float32))


@jax.jit
def _columns(matrix: jax.Array, rotation: jax.Array) -> jax.Array:
  return _matmul(matrix.astype(jnp.float32), rotation)


_round = jax.jit(lambda x, dtype: x.astype(dtype), static_argnums=1)


@jax.jit
def _shortcut_frame(shortcut: jax.Array) -> jax.Array:
  """Returns the transposed polar factor `[e, d]` of a stored shortcut `[d, e]`."""
  return canonical.polar(shortcut).rotation[: shortcut.shape[0]].T


@jax.jit
def _chained(shortcut: jax.Array, before: jax.Array, q: jax.Array) -> jax.Array:
  """Returns `O^T (T + I) Z`, where q is the transpose of Z's first rows."""
  n, k = q.shape
  step = canonical.polar(shortcut).rotation
  embedded = jnp.eye(n).at[:k, :k].set(before)
  rest, _ = jnp.linalg.qr(q, mode='complete')
  z = jnp.concatenate([q, rest[:, k:]], axis=1) if k < n else q
  chained = _matmul(_matmul(step.T, embedded), z.T)
  return canonical.reorthogonalize(chained)


@jax.jit
def _counter_turned(neutral: jax.Array, q: jax.Array) -> jax.Array:
  """Returns `C (I + Q)^T`, where I + Q is block diagonal."""
  width, n = neutral.shape[0], q.shape[0]
  whole = jnp.eye(width).at[width - n :, width - n :].set(q)
  return canonical.reorthogonalize(_matmul(neutral, whole.T))


_canonicalisers: dict[str, Callable[[jax.Array], jax.Array]] = {
  name: jax.jit(lambda w, split=split: split(w)[1])
  for name, split in canonical.CANONICALISERS.items()
}

"""Rotation of the parameters around a segment, and recovery of the rotation from them.

A rotation T is a float32 array `[d, d]` on the device; None means that the segment is
not rotated. `layout` defines frames, and `segments` readers and writers.
"""

from collections.abc import Iterable
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.paper import layout
from rotbits_jax.paper import segments
from rotbits_jax.symmetries import factorizations
from rotbits_jax.symmetries import rotations

_matmul = functools.partial(jnp.matmul, precision='highest')

# Factorisations are backward stable: the factors that a machine computes are those of a
# matrix that differs from the given one by a few roundoffs of its norm.
_BACKWARD_ERROR = 4 * 2.0**-24
_NOISE = 0  # seed of the change of a matrix


def can_rotate(segment: segments.SegmentParameters, leaving: segments.Arrays) -> bool:
  """Tells whether every rotated element will be within the range of its dtype.

  `leaving` is the shortcut that leads out of the segment, or nothing.
  """
  axes = ((0,), segment.readers), ((-1,), segment.writers), ((0, 1), segment.shortcut)
  return all(
    rotations.largest_rotated(x, mixed) < 0.99 * float(jnp.finfo(x.dtype).max)
    for mixed, arrays in (*axes, ((0, 1), leaving))
    for x in arrays.values()
  )


rotate = jax.jit(rotations.rotate)


def rotated(
  segment: segments.SegmentParameters,
  before: jax.Array | None,
  rotation: jax.Array | None,
) -> segments.Arrays:
  """Rotates the parameters around a segment.

  Args:
    segment: the arrays around it.
    before: the rotation of the previous segment.
    rotation: the rotation of this segment.

  Returns:
    The arrays by path, in their dtypes.
  """
  arrays = {path: rotate(x, rotation) for path, x in segment.readers.items()}
  arrays |= {path: rotate(x, None, rotation) for path, x in segment.writers.items()}
  arrays |= {path: rotate(x, before, rotation) for path, x in segment.shortcut.items()}
  return {path: np.asarray(x) for path, x in (arrays | segment.biases).items()}


def reader_rotation(
  readers: Iterable[np.ndarray], canonicalizer: str, *, disturb: bool = False
) -> jax.Array:
  """Returns the canonical rotation of the readers of a segment: float32 `[d, d]`.

  The readers side by side form W `[d, m]`. `svd` decomposes W. `qr` adds up every d-th
  column and decomposes the sum, a square matrix. The sum is far better conditioned than
  a block of W may be, such as the first columns of a head whose first tokens never
  occur. `qr` also serves the segments for which `polar_shortcut` cannot use a shortcut.
  """
  matrix = np.concatenate([np.asarray(x, np.float32) for x in readers], axis=1)
  if canonicalizer == 'svd':
    return _svd(_disturbed(matrix, disturb))
  width, columns = matrix.shape
  blocks = np.pad(matrix, ((0, 0), (0, -columns % width))).reshape(width, -1, width)
  return _qr(_disturbed(blocks.sum(axis=1), disturb))


def recovered(
  frame: layout.Frame,
  shapes: segments.SegmentParameters,
  arrays: segments.Arrays,
  canonicalizer: str,
  *,
  disturb: bool = False,
) -> jax.Array:
  """Recovers the sampled frame inexactly from stored parameters.

  Args:
    frame: the shape of the frame.
    shapes: the parameters around the segment.
    arrays: the stored parameters, by path.
    canonicalizer: 'polar_shortcut', 'qr' or 'svd'.
    disturb: whether to make the errors of another machine.

  Returns:
    The frame, float32 `[n, k]`.
  """
  if frame.from_shortcut:
    (shortcut,) = (arrays[path] for path in shapes.shortcut)
    return _shortcut_frame(_disturbed(np.asarray(shortcut, np.float32), disturb))
  readers = (arrays[path] for path in shapes.readers)
  q = reader_rotation(readers, canonicalizer, disturb=disturb)
  fixed = len(q) - frame.n
  return q[fixed:, fixed:]


def _disturbed(matrix: np.ndarray, disturb: bool) -> jax.Array:
  """Returns a matrix, perhaps as inexact as its factorisation on another machine."""
  exact = jnp.asarray(matrix)
  noise = jax.random.normal(jax.random.key(_NOISE), matrix.shape, jnp.float32)
  error = _BACKWARD_ERROR * jnp.sqrt(jnp.square(exact).mean()) * noise
  return exact + error if disturb else exact


_svd = jax.jit(lambda w: factorizations.svd(w)[1])
_qr = jax.jit(lambda w: factorizations.qr(w)[1])


@jax.jit
def _shortcut_frame(shortcut: jax.Array) -> jax.Array:
  """Returns the transposed polar factor `[e, d]` of a stored shortcut `[d, e]`."""
  return factorizations.polar(shortcut).rotation[: shortcut.shape[0]].T


@jax.jit
def chained(shortcut: jax.Array, before: jax.Array | None, q: jax.Array) -> jax.Array:
  """Returns `O^T (T + I) Z`, see `paper`; q is the transpose of Z's first rows."""
  n, k = q.shape
  before = jnp.eye(k, dtype=jnp.float32) if before is None else before
  rest, _ = jnp.linalg.qr(q, mode='complete')
  z = jnp.concatenate([q, rest[:, k:]], axis=1) if k < n else q
  polar = rotations.next_rotation(factorizations.polar(shortcut).rotation, before)
  return factorizations.reorthogonalize(_matmul(polar, z.T))


@jax.jit
def counter_rotated(neutral: jax.Array, q: jax.Array) -> jax.Array:
  """Returns `C (I + Q)^T`, see `paper`; C is the readers' canonical rotation."""
  kept = jnp.eye(len(neutral) - len(q), dtype=jnp.float32)
  whole = jax.scipy.linalg.block_diag(kept, q)
  return factorizations.reorthogonalize(_matmul(neutral, whole.T))

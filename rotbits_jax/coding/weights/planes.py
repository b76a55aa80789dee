r"""Rests of a block in planes: bits that the decoder reads beside the symbols.

The rest of w bits is cut, from its low end, into pieces of 8 bits, then pieces of 4, 2
and 1 bits where w has these bits; each piece is a plane of bytes. A plane of 8 bits
holds a byte for each number. In a plane of b < 8 bits, a byte holds a lane's numbers of
8 / b steps, the first in the low bits:

    plane[g, lane] = sum_k piece[8 / b * g + k, lane] << b k,    k = 0, ..., 8 / b - 1

so that a step of all lanes is a row of bytes and one shift.

Shape letters: N lanes of the program, n lanes in use, T steps.
"""

import jax
import jax.numpy as jnp
import numpy as np


def widths(rest: int) -> tuple[int, ...]:
  """The bits of each plane."""
  return (8,) * (rest // 8) + tuple(b for b in (4, 2, 1) if rest & b)


def sizes(count: int, lanes: int, rest: int) -> list[int]:
  """The bytes of each plane of a block of `count` numbers."""
  steps = -(-count // lanes)
  return [
    count if bits == 8 else -(-steps * bits // 8) * lanes for bits in widths(rest)
  ]


def pack(rests: np.ndarray, lanes: int, rest: int) -> np.ndarray:
  """The planes of rests, unsigned integers `[count]`: uint8."""
  shift, planes = 0, [np.zeros(0, np.uint8)]
  for bits, size in zip(widths(rest), sizes(rests.size, lanes, rest), strict=True):
    piece = (rests >> rests.dtype.type(shift)).astype(np.uint8)
    shift += bits
    if bits < 8:
      grid = np.zeros((size // lanes, 8 // bits, lanes), np.uint8)
      grid.reshape(-1)[: piece.size] = piece & np.uint8((1 << bits) - 1)
      piece = grid[:, 0]
      for k in range(1, 8 // bits):
        piece = piece | grid[:, k] << np.uint8(bits * k)
    planes.append(piece.reshape(-1))
  return np.concatenate(planes)


def read(
  planes: jax.Array,
  starts: jax.Array,
  step: jax.Array,
  lanes: jax.Array,
  rest: int,
  dtype: jnp.dtype,
  count: int,
) -> jax.Array:
  """The rests of one step.

  Args:
    planes: uint8, as `pack` made them, with at least N bytes behind them.
    starts: int32, where each plane begins.
    step: int32, t.
    lanes: int32, n.
    rest: bits of a rest.
    dtype: of the result.
    count: N; entries from n on are anything.

  Returns:
    Unsigned integers `[N]`.
  """
  rests, shift = jnp.zeros(count, dtype), 0
  for i, bits in enumerate(widths(rest)):
    steps = 8 // bits  # that share a byte
    row = starts[i] + step // steps * lanes
    piece = jax.lax.dynamic_slice(planes, (row,), (count,))
    if bits < 8:
      part = (step % steps).astype(jnp.uint8) * jnp.uint8(bits)
      piece = (piece >> part) & jnp.uint8((1 << bits) - 1)
    rests = rests | piece.astype(dtype) << shift
    shift += bits
  return rests

r"""The rests of a block as planes of bits.

The rest of a number is the part of its bits that is not entropy coded. A rest of w bits
is cut from its low end into pieces of 8 bits; the remaining w mod 8 bits are cut into
pieces of 4, 2 and 1 bits, each used at most once. The first pieces of all numbers form
a plane of bytes, the second pieces another plane, and so on. A plane of 8-bit pieces
holds one byte for each number. In a plane of b-bit pieces with b < 8, a byte holds the
pieces of 8 / b successive numbers of a lane, the first in the low bits:

    plane[g, lane] = sum_k piece[8 / b * g + k, lane] << b k,    k = 0, ..., 8 / b - 1

So in each step the decoder reads a row of bytes for all lanes and shifts it once.

Shape letters: N lanes of the program, n lanes in use, T steps.
"""

import jax
import jax.numpy as jnp
import numpy as np


def widths(rest: int) -> tuple[int, ...]:
  """Returns the bits per piece of each plane, for rests of `rest` bits."""
  return (8,) * (rest // 8) + tuple(b for b in (4, 2, 1) if rest & b)


def sizes(count: int, lanes: int, rest: int) -> list[int]:
  """Returns the number of bytes of each plane for a block of `count` numbers."""
  steps = -(-count // lanes)
  return [
    count if bits == 8 else -(-steps * bits // 8) * lanes for bits in widths(rest)
  ]


def pack(rests: np.ndarray, lanes: int, rest: int) -> np.ndarray:
  """Packs the rests of a block into planes.

  Args:
    rests: unsigned integers `[count]`.
    lanes: n.
    rest: bits of a rest.

  Returns:
    uint8, one plane after the other, of the sizes that `sizes` returns.
  """
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
  """Reads the rests of all lanes for one step.

  Args:
    planes: uint8, the planes of `pack`, followed by at least N more bytes.
    starts: int32, where each plane starts.
    step: int32, t.
    lanes: int32, n.
    rest: bits of a rest.
    dtype: dtype of the result.
    count: N.

  Returns:
    Unsigned integers `[N]`. Entries from n on are arbitrary.
  """
  rests, shift = jnp.zeros(count, dtype), 0
  for i, bits in enumerate(widths(rest)):
    steps = 8 // bits  # number of steps that share a byte
    row = starts[i] + step // steps * lanes
    piece = jax.lax.dynamic_slice(planes, (row,), (count,))
    if bits < 8:
      part = (step % steps).astype(jnp.uint8) * jnp.uint8(bits)
      piece = (piece >> part) & jnp.uint8((1 << bits) - 1)
    rests = rests | piece.astype(dtype) << shift
    shift += bits
  return rests

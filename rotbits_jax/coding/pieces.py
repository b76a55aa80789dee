"""Cuts raw bits into pieces, and joins these, of numbers with shifts of their own.

A number has s raw bits, from 0 to 24. They are cut from the lowest on: into pieces of 8
bits, and then of 4, 2 and 1, each at most once, see `layouts.piece_widths`. Planes
follow each other: the first pieces of 8 bits of all numbers that have one, the second
ones, the third ones, and the pieces of 4, of 2 and of 1 bits. `blocks.packed` packs a
plane.

Programs move the pieces of some numbers. NumPy takes many times longer, because it
branches for each number.

Shape letter: m numbers, at most 2^20.
"""

from collections.abc import Callable, Iterator
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import blocks
from rotbits_jax.coding import buffers
from rotbits_jax.system import native

_UNROLLED = 8  # numbers that one step takes


def cut(raw: np.ndarray, shifts: np.ndarray) -> list[np.ndarray]:
  """Returns the planes of raw bits.

  Args:
    raw: unsigned integers `[m]`.
    shifts: uint8 `[m]`, how many bits of each number count.
  """
  found = []
  for width, has, low in _places(shifts):
    count = int(np.count_nonzero(has))
    if count:
      piece = (raw >> low).astype(np.uint8) & np.uint8((1 << width) - 1)
      piece = piece if count == raw.size else _moved(_some, piece, has, count)
      found.append(blocks.packed(piece, width))
  return found


def size(shifts: np.ndarray) -> int:
  """Returns the number of bytes of the planes of numbers."""
  counts = ((width, int(np.count_nonzero(x))) for width, x, _ in _places(shifts))
  return sum(-(-width * count // 8) for width, count in counts)


def joined(planes: np.ndarray, shifts: np.ndarray) -> np.ndarray:
  """Joins the raw bits of numbers, uint32 `[m]`: the inverse of `cut`.

  Args:
    planes: uint8 `[size(shifts)]`, the planes, one after the other.
    shifts: as in `cut`.
  """
  raw, end = np.zeros(shifts.size, np.uint32), 0
  for width, has, low in _places(shifts):
    count = int(np.count_nonzero(has))
    if count:
      piece, start = np.empty(count, np.uint8), end
      end += -(-count * width // 8)
      blocks.unpack(planes[start:end], width, piece)
      if count < shifts.size:
        piece = _moved(_all, piece, has, shifts.size)
      raw |= piece.astype(np.uint32) << low
  return raw


def _places(shifts: np.ndarray) -> Iterator[tuple[int, np.ndarray, Any]]:
  """Yields the width of each plane, which numbers have a piece, and the bits below."""
  for low in (0, 8, 16):
    yield 8, shifts >= low + 8, np.uint8(low)
  for width in (4, 2, 1):
    yield width, shifts & np.uint8(width) > 0, shifts & np.uint8(256 - 2 * width)


def _moved(program: Any, pieces: np.ndarray, has: np.ndarray, count: int) -> np.ndarray:
  """Returns `count` pieces, those of some numbers or of all."""
  own, places = (
    buffers.scratch('moved', buffers.ROOM, x) for x in (np.uint8, np.bool_)
  )
  own[: pieces.size], places[: has.size] = pieces, has
  places[has.size : has.size + _UNROLLED] = False
  out = buffers.taken('moved', buffers.ROOM, np.uint8)
  out = program(out, own, places, np.int32(has.size))
  found = np.asarray(out)[:count].copy()
  buffers.keep('moved', out)
  return found


# ---- programs ------------------------------------------------------------------------


@functools.partial(jax.jit, donate_argnums=0)
def _some(
  out: jax.Array, pieces: jax.Array, has: jax.Array, count: jax.Array
) -> jax.Array:
  """Writes the pieces of the numbers that have one."""

  def step(out: Any, i: Any, end: Any, pieces: Any, has: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice(out, _one(pieces, i), (end,))

  return _each(step, out, pieces, has, count)


@functools.partial(jax.jit, donate_argnums=0)
def _all(
  out: jax.Array, pieces: jax.Array, has: jax.Array, count: jax.Array
) -> jax.Array:
  """Writes the pieces of all numbers, 0 for those that have none."""

  def step(out: Any, i: Any, end: Any, pieces: Any, has: Any) -> jax.Array:
    piece = jnp.where(_one(has, i), _one(pieces, end), 0)
    return jax.lax.dynamic_update_slice(out, piece, (i,))

  return _each(step, out, pieces, has, count)


def _each(
  step: Callable[..., jax.Array],
  out: jax.Array,
  pieces: jax.Array,
  has: jax.Array,
  count: jax.Array,
) -> jax.Array:
  """Takes a step for each number, and some beyond them that have no piece."""

  def loop(out: Any, pieces: Any, has: Any, count: Any) -> jax.Array:
    def steps(i: jax.Array, carry: Any) -> Any:
      out, end = carry
      for j in range(_UNROLLED):
        place = i * _UNROLLED + j
        out = step(out, place, end, pieces, has)
        end += _one(has, place)[0]
      return out, end

    carry = out, jnp.int32(0)
    return jax.lax.fori_loop(0, -(-count // _UNROLLED), steps, carry)[0]

  return native.loop(loop)(out, pieces, has, count)


def _one(array: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_slice(array, (i,), (1,))

"""Programs that cut raw bits into pieces, and join these, if numbers have their shifts.

A number has s raw bits, from 0 to 24. They are cut from the lowest on: into pieces of 8
bits, and then of 4, 2 and 1, each at most once, see `layouts.piece_widths`. Planes
follow each other: the first pieces of 8 bits of all numbers that have one, the second
ones, the third ones, and the pieces of 4, of 2 and of 1 bits. `blocks.packed` packs a
plane.

Shape letter: m numbers, at most 2^20.
"""

from collections.abc import Callable, Iterator
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding.weights import blocks
from rotbits_jax.coding.weights import buffers
from rotbits_jax.system import native

_ROOM = blocks.CAPACITY
_STEP = 1 << 12  # numbers that one step takes
_UNROLLED = 4  # of a step
_NAMES = tuple(f'plane {i}' for i in range(6))


def cut(raw: np.ndarray, shifts: np.ndarray) -> list[np.ndarray]:
  """Returns the planes of raw bits.

  Args:
    raw: unsigned integers `[m]`.
    shifts: uint8 `[m]`, how many bits of each number count.
  """
  planes = _cut(
    tuple(buffers.taken(name, _ROOM, np.uint8) for name in _NAMES),
    _copied('raw', raw, np.uint32),
    _copied('shifts of raw bits', shifts, np.uint8),
    np.int32(raw.size),
  )
  found = [
    blocks.packed(np.asarray(plane)[: np.count_nonzero(has)].copy(), width)
    for plane, (width, has, _) in zip(planes, _places(shifts), strict=True)
  ]
  for name, plane in zip(_NAMES, planes, strict=True):
    buffers.keep(name, plane)
  return found


def size(shifts: np.ndarray) -> int:
  """Returns the number of bytes of the planes of numbers."""
  return sum(-(-np.count_nonzero(x) * width // 8) for width, x, _ in _places(shifts))


def joined(planes: np.ndarray, shifts: np.ndarray) -> np.ndarray:
  """Joins the raw bits of numbers: the inverse of `cut`.

  Args:
    planes: uint8 `[size(shifts)]`, the planes, one after the other.
    shifts: as in `cut`.

  Returns:
    uint32 `[m]`, which the next call on this thread uses again.
  """
  pieces, end = [], 0
  for name, (width, has, _) in zip(_NAMES, _places(shifts), strict=True):
    count = int(np.count_nonzero(has))
    piece, start = buffers.scratch(name, _ROOM, np.uint8), end
    end += -(-count * width // 8)
    blocks.unpack(planes[start:end], width, piece[:count])
    pieces.append(piece)
  raw = _join(
    buffers.taken('raw', _ROOM, np.uint32),
    tuple(pieces),
    _copied('shifts of raw bits', shifts, np.uint8),
    np.int32(shifts.size),
  )
  buffers.keep('raw', raw)
  return np.asarray(raw)[: shifts.size]


def _copied(name: str, array: np.ndarray, dtype: type) -> np.ndarray:
  found = buffers.scratch(name, _ROOM, dtype)
  found[: array.size] = array
  return found


def _places(shifts: Any) -> Iterator[tuple[int, Any, Any]]:
  """Yields the width of each plane, which numbers have a piece, and the bits below."""
  for low in (0, 8, 16):
    yield 8, shifts >= low + 8, low
  for width in (4, 2, 1):
    yield width, shifts & width > 0, shifts & 256 - 2 * width


@functools.partial(jax.jit, donate_argnums=0)
def _cut(
  planes: tuple[jax.Array, ...], raw: jax.Array, shifts: jax.Array, count: jax.Array
) -> tuple[jax.Array, ...]:
  def loop(planes: Any, raw: Any, shifts: Any, count: Any) -> Any:
    def body(i: jax.Array, carry: Any) -> Any:
      bits, own = _part(raw, i), _valid(_part(shifts, i), i, count)
      found = []
      for (plane, end), (width, has, low) in zip(carry, _places(own), strict=True):
        piece = (bits >> low).astype(jnp.uint8) & jnp.uint8((1 << width) - 1)

        def write(j: jax.Array, carry: Any, has: Any = has, piece: Any = piece) -> Any:
          plane, end = carry
          plane = jax.lax.dynamic_update_slice(plane, _one(piece, j), (end,))
          return plane, end + _one(has, j)[0]

        found.append(_each(has, write, (plane, end)))
      return found

    carry = [(plane, jnp.int32(0)) for plane in planes]
    carry = jax.lax.fori_loop(0, -(-count // _STEP), body, carry)
    return tuple(plane for plane, _ in carry)

  return native.loop(loop)(planes, raw, shifts, count)  # type: ignore[no-any-return]


@functools.partial(jax.jit, donate_argnums=0)
def _join(
  raw: jax.Array, planes: tuple[jax.Array, ...], shifts: jax.Array, count: jax.Array
) -> jax.Array:
  def loop(raw: Any, planes: Any, shifts: Any, count: Any) -> Any:
    def body(i: jax.Array, carry: Any) -> Any:
      raw, begins = carry
      own, bits = _valid(_part(shifts, i), i, count), jnp.zeros(_STEP, raw.dtype)
      found = []
      for plane, begin, place in zip(planes, begins, _places(own), strict=True):
        _, has, low = place

        def read(j: jax.Array, carry: Any, has: Any = has, plane: Any = plane) -> Any:
          piece, end = carry
          piece = jax.lax.dynamic_update_slice(piece, _one(plane, end), (j,))
          return piece, end + _one(has, j)[0]

        piece, end = _each(has, read, (jnp.zeros(_STEP, jnp.uint8), begin))
        bits |= jnp.where(has, piece, 0).astype(raw.dtype) << low
        found.append(end)
      raw = jax.lax.dynamic_update_slice(raw, bits, (i * _STEP,))
      return raw, tuple(found)

    carry = raw, (jnp.int32(0),) * len(planes)
    return jax.lax.fori_loop(0, -(-count // _STEP), body, carry)[0]

  return native.loop(loop)(raw, planes, shifts, count)  # type: ignore[no-any-return]


def _each(has: jax.Array, step: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
  """Takes a step for each number, or none if no number has a piece."""

  def steps(i: jax.Array, carry: Any) -> Any:
    for j in range(_UNROLLED):
      carry = step(i * _UNROLLED + j, carry)
    return carry

  count = _STEP // _UNROLLED * has.any().astype(jnp.int32)
  return jax.lax.fori_loop(0, count, steps, carry)


def _part(array: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_slice(array, (i * _STEP,), (_STEP,))


def _one(array: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_slice(array, (i,), (1,))


def _valid(shifts: jax.Array, i: jax.Array, count: jax.Array) -> jax.Array:
  """Returns shifts that are 0 behind the numbers."""
  return jnp.where(jnp.arange(_STEP) < count - i * _STEP, shifts, 0)

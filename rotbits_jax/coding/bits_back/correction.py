r"""Corrections: exact integers from numbers that were recovered inexactly.

The encoder knows an integer u in [0, 2^16). The decoder knows a real number p near u,
called the position. The last bits of p depend on the machine. A correction of level c
consists of the residue r, the c low bits of u. The decoder takes the integer nearest to
p that has these low bits:

    u = r + 2^c round((p - r) / 2^c)   modulo 2^16,    r = u mod 2^c.

A correction of level 0 is empty; at level 16 the residue is u itself. The result
changes if p moves to the other side of a tie, which is at a distance of 2^c / 2 from u.
The encoder chooses a level at which p is nearer to u than that by at least a *margin*.
So positions that differ between machines by less than the margin give the same integer:
floats propose, integers decide.

Integers form groups (the cells of one column of a rotation, for example) whose levels
are similar. A group has a base level, and each integer has an extra level that is added
to it. `coding.coder` stores both; residues are stored as they are.

Shape letters: S integers, G groups. `groups` is int32 `[S]`, the group of each integer,
and `count` is G.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LEVELS = 17

# The margin is at least this part of 2^c, because positions with large errors also
# differ more between machines.
_RELATIVE_MARGIN = 1 / 32

# A margin is this multiple of the root mean square of the differences that errors of
# another machine make. The greatest of 10^7 normal numbers is 5.5 times it, and another
# machine may err twice as much.
SAFETY = 12.0

_NEIGHBOURS = 9  # groups whose differences are taken together

# The bits of extra levels, about: those of Gaussian errors. The last one is that of
# integers that are sent in full.
_EXTRA = 14 - np.log2([14100, 1900, 220, 25, 8, *[1] * 11, 120])


class Correction(NamedTuple):
  """The data that the decoder needs to turn positions into the exact integers."""

  base: jax.Array  # uint8 [G], base level of each group
  extra: jax.Array  # uint8 [S], extra level of each integer
  residue: jax.Array  # uint16 [S], low bits of each integer, as many as its level
  others: tuple[jax.Array, ...] = ()  # arrays of the code, for the positions


def correct(
  positions: jax.Array,
  integers: jax.Array,
  others: jax.Array,
  margin: jax.Array | float,
  groups: jax.Array,
  count: int,
  sensitivity: jax.Array | float = 1.0,
) -> Correction:
  """Returns the correction that leads from the positions to the integers.

  Args:
    positions: float32 `[S]`; only their values modulo 2^16 matter.
    integers: uint16 `[S]`.
    others: positions with errors as of another machine, float32 `[S]`.
    margin: the least margin, float32 `[S]` or a number.
    groups: int32 `[S]`.
    count: G.
    sensitivity: that of positions to errors of the input, float32 `[S]` or a number.
  """
  distance = jnp.abs(_wrapped(positions - integers.astype(jnp.float32)))
  spread = _spread(_wrapped(positions - others), sensitivity, groups, count)
  margin = jnp.maximum(spread, margin)  # NaN if one is
  modulus = jnp.exp2(jnp.arange(LEVELS - 1, dtype=jnp.float32))
  slack = jnp.maximum(modulus * _RELATIVE_MARGIN, margin[:, None])
  # Comparisons with NaN are false, so with `~` a position of NaN needs the last level.
  beyond = ~(distance[:, None] + slack <= modulus / 2)
  needed = beyond.sum(axis=1, dtype=jnp.int32)
  histogram = jnp.zeros((count, LEVELS), jnp.float32)
  histogram = histogram.at[groups, needed].add(1.0, mode='drop')
  # The bits of integers that need each level, for each base level.
  places = np.arange(LEVELS)
  extra = np.maximum(places - places[:, None], 0)
  bits = np.maximum(places, places[:, None]) + _EXTRA[extra]
  cost = jnp.matmul(histogram, bits.T.astype(np.float32), precision='highest')
  base = jnp.argmin(cost, axis=1).astype(jnp.int32)
  return with_levels(integers, needed, base, groups)


def _spread(
  differences: jax.Array, sensitivity: jax.Array | float, groups: jax.Array, count: int
) -> jax.Array:
  """Returns how much positions may differ between machines: float32 `[S]`."""
  # Divided by their sensitivities, the differences of a group are alike.
  squares = jnp.square(differences / sensitivity)
  sums = jnp.zeros((2, count), jnp.float32)
  sums = sums.at[:, groups].add(jnp.stack([squares, jnp.ones_like(squares)]))
  # A group may have a single integer, whose difference may be small by chance.
  window = 1, _NEIGHBOURS
  sums = jax.lax.reduce_window(sums, 0.0, jax.lax.add, window, (1, 1), 'SAME')
  rms = jnp.sqrt(sums[0] / jnp.maximum(sums[1], 1))
  return SAFETY * rms[groups] * sensitivity


def _wrapped(difference: jax.Array) -> jax.Array:
  """Returns differences of positions modulo 2^16, from -2^15 to 2^15."""
  return difference - 65536 * jnp.round(difference / 65536)


def with_levels(
  integers: jax.Array, needed: jax.Array, base: jax.Array, groups: jax.Array
) -> Correction:
  """Returns the correction with levels of at least the base and the needed ones.

  Args:
    integers: uint16 `[S]`.
    needed: the least level of each integer, int32 `[S]`.
    base: the least level of each group, int32 `[G]`.
    groups: int32 `[S]`.
  """
  level = jnp.maximum(needed, base[groups])
  return Correction(
    base=base.astype(jnp.uint8),
    extra=(level - base[groups]).astype(jnp.uint8),
    residue=integers & ((1 << level) - 1).astype(jnp.uint16),
  )


def levels(base: jax.Array, extra: jax.Array, groups: jax.Array) -> jax.Array:
  """Returns the level of each integer, base plus extra level: int32 `[S]`."""
  return jnp.minimum(base[groups] + extra, LEVELS - 1).astype(jnp.int32)


def nearest(positions: jax.Array, level: jax.Array, residue: jax.Array) -> jax.Array:
  """Returns the integers with these residues that are nearest to the positions.

      u = r + 2^c round((p - r) / 2^c)   modulo 2^16

  Args:
    positions: p, float32, of any shape.
    level: c, int32, of the same shape.
    residue: r, uint16, of the same shape.

  Returns:
    u, uint16.
  """
  residue = residue.astype(jnp.int32)
  # Multiplying by a power of two is exact.
  scale = jnp.exp2(-level.astype(jnp.float32))
  steps = jnp.round((positions - residue.astype(jnp.float32)) * scale)
  integers = residue + (steps.astype(jnp.int32) << level)
  return integers.astype(jnp.uint16)


def pack(
  correction: Correction, groups: jax.Array
) -> tuple[list[np.ndarray], np.ndarray]:
  """Returns the arrays to be coded, and the bits of the residues as uint16 words."""
  base, extra, residue, others = jax.tree.map(np.asarray, correction)
  bits = np.unpackbits(residue.astype('>u2').view(np.uint8)).reshape(-1, 16)
  packed = np.packbits(bits[_is_stored(base, extra, groups)])
  return [*others, base, extra], np.pad(packed, (0, packed.size % 2)).view(np.uint16)


def unpack(
  arrays: Sequence[np.ndarray], pop: Callable[[int], np.ndarray], groups: jax.Array
) -> Correction:
  """Returns the correction of arrays: the inverse of `pack`; `pop` takes words."""
  *others, base, extra = map(jnp.asarray, arrays)
  is_stored = _is_stored(base, extra, groups)
  bits, count = np.zeros(is_stored.shape, np.uint8), int(is_stored.sum())
  bits[is_stored] = np.unpackbits(pop(-(-count // 16)).view(np.uint8), count=count)
  residue = np.packbits(bits).view('>u2').astype(np.uint16)
  return Correction(base, extra, jnp.asarray(residue), tuple(others))


def _is_stored(base: Any, extra: Any, groups: jax.Array) -> np.ndarray:
  """Returns which bits of residues, the high one first, are stored: `[S, 16]`."""
  level = np.asarray(levels(jnp.asarray(base), jnp.asarray(extra), groups))
  return np.arange(16) >= 16 - level[:, None]

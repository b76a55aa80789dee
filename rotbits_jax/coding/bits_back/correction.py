r"""Corrections: exact integers from numbers that were recovered inexactly.

The encoder knows an integer u in [0, 2^16); the decoder has a real number, the
position p, that is near u but depends on the machine in its last bits. A correction of
level c sends the c low bits of u; the decoder takes the integer nearest to p that has
them,

    u = r + 2^c round((p - r) / 2^c)   modulo 2^16,    r = u mod 2^c.

Level 0 sends nothing, level 16 sends u. The encoder takes a level at which p is a
*margin* nearer to u than to the tie, so a difference in the position below the margin
cannot change the result: floats propose, integers decide.

Levels are alike within a group of integers (a column of a rotation, say). They are sent
as each group's base level and what a single integer needs on top of it, both entropy
coded with integer tables.

Shape letters: S integers, G groups.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables

LEVELS = 17

# A position must be nearer to u than to the tie by this part of 2^c at least: positions
# whose errors are large differ more between machines, too.
_RELATIVE_MARGIN = 1 / 32

# Bits that an integer costs in the model that chooses base levels: its level, and a
# code for what it needs on top of the base (measured on Gaussian errors).
_COST = np.array(
  [
    [base + 0.3 if c <= base else c + 1.5 + 1.5 * (c - base) for c in range(LEVELS)]
    for base in range(LEVELS)
  ],
  np.float32,
)


class Correction(NamedTuple):
  """Integers that turn positions into the exact integers."""

  base: jax.Array  # uint8 [G], each group's level
  extra: jax.Array  # uint8 [S], what an integer's level is on top of that
  residue: jax.Array  # uint16 [S], the integer's low bits, as many as its level


def correct(
  positions: jax.Array,
  integers: jax.Array,
  margin: jax.Array | float,
  groups: jax.Array,
  count: int,
) -> Correction:
  """The correction that leads from positions to integers.

  Args:
    positions: float32 `[S]`; modulo 2^16.
    integers: uint16 `[S]`.
    margin: how much positions may differ between machines; one for all, or `[S]`.
    groups: int32 `[S]`, the group of each integer.
    count: G.

  Returns:
    The correction.
  """
  distance = positions - integers.astype(jnp.float32)
  distance = jnp.abs(distance - 65536 * jnp.round(distance / 65536))
  modulus = jnp.exp2(jnp.arange(LEVELS - 1, dtype=jnp.float32))
  slack = jnp.maximum(
    modulus * _RELATIVE_MARGIN, jnp.broadcast_to(margin, distance.shape)[:, None]
  )
  # Written so that a position that is not a number needs the last level.
  beyond = ~(distance[:, None] + slack <= modulus / 2)
  needed = beyond.sum(axis=1, dtype=jnp.int32)
  histogram = jnp.zeros((count, LEVELS), jnp.float32)
  histogram = histogram.at[groups, needed].add(1.0, mode='drop')
  cost = jnp.matmul(histogram, jnp.asarray(_COST).T, precision='highest')
  base = jnp.argmin(cost, axis=1).astype(jnp.int32)
  return with_levels(integers, needed, base, groups)


def with_levels(
  integers: jax.Array, needed: jax.Array, base: jax.Array, groups: jax.Array
) -> Correction:
  """The correction of integers with levels of at least `needed`: int32 `[S]`."""
  level = jnp.maximum(needed, base[groups])
  return Correction(
    base=base.astype(jnp.uint8),
    extra=(level - base[groups]).astype(jnp.uint8),
    residue=integers & ((1 << level) - 1).astype(jnp.uint16),
  )


def levels(correction: Correction, groups: jax.Array) -> jax.Array:
  """The level of each integer: int32 `[..., S]`."""
  base = correction.base[..., groups].astype(jnp.int32)
  return jnp.minimum(base + correction.extra.astype(jnp.int32), LEVELS - 1)


def nearest(positions: jax.Array, level: jax.Array, residue: jax.Array) -> jax.Array:
  """The integers with these residues nearest to positions: uint16, any shape."""
  residue = residue.astype(jnp.int32)
  # Dividing by a power of two is exact.
  steps = (positions - residue.astype(jnp.float32)) * jnp.exp2(
    -level.astype(jnp.float32)
  )
  integers = residue + (jnp.round(steps).astype(jnp.int32) << level)
  return integers.astype(jnp.uint16)


def fit(correction: Correction) -> np.ndarray:
  """Frequency tables for a correction's base and extra levels: int64 `[2, 17]`."""

  def table(symbols: jax.Array) -> np.ndarray:
    counts = np.bincount(np.asarray(symbols).reshape(-1), minlength=LEVELS)
    return tables.quantize(counts if counts.any() else np.eye(LEVELS, dtype=int)[0])

  return np.stack([table(correction.base), table(correction.extra)])


def codec(
  groups: jax.Array, batch: tuple[int, ...], count: int, frequencies: jax.Array
) -> codecs.Codec:
  """The codec of corrections.

  Args:
    groups: int32 `[S]`, as in `correct`.
    batch: leading axes of the corrections, which share the groups.
    count: G.
    frequencies: `[2, 17]`, from `fit`.

  Returns:
    A codec of corrections whose arrays have the leading axes `batch`.
  """
  tables_of = lambda size, table: codecs.categorical(
    jnp.full((*batch, size), table, jnp.uint32), frequencies
  )
  bases, extras = tables_of(count, 0), tables_of(groups.size, 1)

  def residues(correction: Correction) -> codecs.Codec:
    level = levels(correction, groups).astype(jnp.uint32)
    return codecs.uniform(jnp.uint32(1) << level)

  def push(message: rans.Message, correction: Correction) -> rans.Message:
    message = residues(correction).push(message, correction.residue)
    message = extras.push(message, correction.extra)
    return bases.push(message, correction.base)

  def pop(message: rans.Message) -> tuple[rans.Message, Correction]:
    message, base = bases.pop(message)
    message, extra = extras.pop(message)
    # The residues' codec needs the levels only.
    correction = Correction(base.astype(jnp.uint8), extra.astype(jnp.uint8), extra)
    message, residue = residues(correction).pop(message)
    return message, correction._replace(residue=residue.astype(jnp.uint16))

  return codecs.Codec(push, pop)

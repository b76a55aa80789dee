"""Packed leaves that may take the place of matrices, each found once.

A matrix that was pruned or dequantised may take fewer bytes as a packed leaf, see
`structured.Packed`, than after a rounding. Transforms of heads ask for the leaves to
decide, and `transform.rewrite` stores them. To find a leaf takes longer than everything
else that encoding does with a matrix, so both get the same leaf from `once`.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured
from rotbits_jax.structured import packed


class Packing(Protocol):
  """A packed leaf that may take the place of a matrix; see `file.packing`."""

  @property
  def array(self) -> np.ndarray:
    """The matrix."""

  @property
  def leaf(self) -> structured.Packed:
    """The leaf that stands for the matrix."""

  def is_smaller(self, rival: np.ndarray) -> bool:
    """Tells whether the leaf takes fewer bytes than an array would."""


Pack = Callable[[Mapping[str, np.ndarray]], Mapping[str, Packing]]
"""Takes matrices by path; returns the packings of those that can be packed."""


def once(pack: Pack) -> Pack:
  """Returns a function that finds the packing of a matrix once and keeps it.

  It finds a new packing for a path whose matrix has changed. It holds all packings that
  it found, so it should live no longer than they are needed.
  """
  known: dict[str, Packing] = {}

  def kept(matrices: Mapping[str, np.ndarray]) -> Mapping[str, Packing]:
    old = {
      path: known[path]
      for path, matrix in matrices.items()
      if path in known and _same_bits(known[path].array, matrix)
    }
    new = pack({path: x for path, x in matrices.items() if path not in old})
    known.update(new)
    return {**old, **new}

  return kept


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
  return a.dtype == b.dtype and np.array_equal(packed.bits(a), packed.bits(b))


def narrowed(array: jax.Array, dtype: np.dtype) -> np.ndarray | None:
  """Returns float32 numbers in a dtype; None if it does not hold all of them."""
  narrow, is_exact = _narrow(array, dtype)
  return np.asarray(narrow) if is_exact else None


@functools.partial(jax.jit, static_argnums=1)
def _narrow(array: jax.Array, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
  """Returns numbers in a dtype, and whether it holds all of them."""
  narrow = array.astype(dtype)
  return narrow, jnp.all(narrow.astype(jnp.float32) == array)

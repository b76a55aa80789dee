"""The rounding of float32 numbers to what is stored, once, after all transforms.

A floating-point dtype gives small numbers a finer step than large ones. The function of
a model cannot tell, because a number's error acts beside the errors of the large
numbers of the same array. So all numbers of an array are rounded to multiples of one
step 2^q, and then to the nearest number of the dtype, which is coarser for large
numbers only:

    q = floor(log2(rms) + octaves)

where rms is the root of the mean square of the numbers that are not zero. With m bits
of mantissa and octaves = -m, the numbers below 2 rms share the step that the dtype has
at the rms. Such numbers take about a bit less, see `coding.weights.floats`. The maximal
error of the array does not change; its mean square grows by less than a factor of 2.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured


class Rounding(NamedTuple):
  """How the parameters of a model are rounded.

  Attributes:
    octaves: takes the path of a parameter and the dtype that it is rounded to. Returns
      the octaves from the rms of an array to its step, see above; None for the nearest
      number of the dtype.
    keeps: whether an array stays as it is if all its numbers are numbers of the dtype
      already, because no transform changed it.
  """

  octaves: Callable[[str, np.dtype], float | None]
  keeps: bool = True


NEAREST = Rounding(lambda path, dtype: None)
"""Rounds to the nearest numbers of the dtype."""


def with_floor(offset: float = 0.0) -> Rounding:
  """Rounds small numbers to the step that the dtype has at the rms of their array.

  Args:
    offset: octaves from that step to a coarser one (positive) or a finer one.
  """
  return Rounding(lambda path, dtype: offset - jnp.finfo(dtype).nmant)


class Effect(NamedTuple):
  """What rounding did to the arrays of a leaf.

  Attributes:
    squares: sum of the squares of the errors, float32.
    norm: sum of the squares of the numbers, float32.
    bits: sum over the numbers that got a coarser step than the dtype has there, of the
      octaves between the two steps, float32. An entropy coder saves about as many bits.
    step: q of the largest array, int32; `NO_STEP` if it has none.
  """

  squares: Any
  norm: Any
  bits: Any
  step: Any


NO_STEP = 1 << 10


def round_leaf(
  leaf: Any, dtype: np.dtype, octaves: float | None, keeps: bool
) -> tuple[Any, Effect]:
  """Rounds an array or a structured leaf on its device.

  Args:
    leaf: float32 arrays. Other arrays stay as they are. Arrays of fewer than two axes
      are few, and are rounded to the nearest number.
    dtype: dtype of the result.
    octaves: see `Rounding`.
    keeps: see `Rounding`.

  Returns:
    The leaf, with infinity where a number is too large for the dtype, and the effect.
  """
  if octaves is None:
    return _round(leaf, np.float32(0), dtype, False, keeps)
  return _round(leaf, np.float32(octaves), dtype, True, keeps)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _round(
  leaf: Any, octaves: jax.Array, dtype: np.dtype, stepped: bool, keeps: bool
) -> tuple[Any, Effect]:
  arrays, treedef = jax.tree.flatten(leaf)
  zero = jnp.float32(0)
  rounded, effect, largest = [], Effect(zero, zero, zero, jnp.int32(NO_STEP)), 0
  for array in arrays:
    if not structured.is_plain(array):
      rounded.append(array)
      continue
    nearest = array.astype(dtype)
    result, step, bits = nearest, jnp.int32(NO_STEP), zero
    if stepped and array.ndim > 1 and array.size:
      result, step, bits = _to_steps(array, nearest, octaves, dtype)
      if keeps:
        same = jnp.all(nearest.astype(jnp.float32) == array)
        result = jnp.where(same, nearest, result)
        step = jnp.where(same, NO_STEP, step)
        bits = jnp.where(same, 0, bits)
    rounded.append(result)
    if array.size > largest:
      effect, largest = effect._replace(step=step), array.size
    effect = effect._replace(
      squares=effect.squares + jnp.square(result.astype(jnp.float32) - array).sum(),
      norm=effect.norm + jnp.square(array).sum(),
      bits=effect.bits + bits,
    )
  return jax.tree.unflatten(treedef, rounded), effect


def _to_steps(
  array: jax.Array, nearest: jax.Array, octaves: jax.Array, dtype: np.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
  info = jnp.finfo(dtype)
  # The greatest number is divided out, so that no square overflows or is zero.
  greatest = jnp.abs(array).max()
  scale = jnp.where(greatest > 0, greatest, 1)
  count = jnp.maximum(jnp.count_nonzero(array), 1).astype(jnp.float32)
  rms = scale * jnp.sqrt(jnp.square(array / scale).sum() / count)
  q = jnp.floor(jnp.log2(rms) + octaves).astype(jnp.int32)
  # The dtype has no finer step, and 2^-q must be a float32.
  least = int(np.log2(float(info.smallest_normal)))
  q = jnp.clip(q, max(least - info.nmant, -126), 127)
  steps = jnp.rint(array * _power(-q))
  # Adding 0 would not do: XLA takes x + 0 for x, though -0 + 0 is 0.
  multiple = jnp.where(steps == 0, 0, steps * _power(q)).astype(dtype)
  # A float32 counts steps exactly up to 2^24. Beyond, the dtype itself is coarser.
  exponents = (jax.lax.bitcast_convert_type(jnp.abs(array), jnp.int32) >> 23) - 127
  octaves_saved = q - (jnp.maximum(exponents, least) - info.nmant)
  bits = jnp.where(array != 0, jnp.maximum(octaves_saved, 0), 0).astype(jnp.float32)
  return jnp.where(jnp.abs(steps) < 1 << 24, multiple, nearest), q, bits.sum()


def _power(exponent: jax.Array) -> jax.Array:
  """Returns 2^exponent, float32, of int32 exponents from -126 to 127."""
  return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)

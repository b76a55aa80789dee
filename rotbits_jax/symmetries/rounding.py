"""The rounding of float32 numbers to the stored dtype, once, after all transforms.

The step of a dtype is the distance between neighbouring numbers. A floating-point dtype
has a finer step for small numbers than for large ones. This precision has little effect
on the function of a model, because the errors of the large numbers of the same array
are larger. Therefore all numbers of an array are rounded to multiples of one step 2^q,
and then to the nearest number of the dtype, which is coarser only for large numbers:

    q = floor(log2(rms) + octaves)

Here rms is the root of the mean square of the numbers that are not zero. If the
mantissa has m bits and octaves is -m, 2^q is the step of the dtype at the rms, and the
numbers below 2 rms share it. They take about one bit less, see `coding.weights.floats`.
The greatest error in the array does not change. The mean square of the errors grows by
less than a factor of 2.
"""

from collections.abc import Callable, Mapping
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured


class Rounding(NamedTuple):
  """How the parameters of a model are rounded.

  Attributes:
    octaves: function of the path of a parameter and the dtype to which it is rounded.
      It returns the octaves from the rms of an array to its step, see above; or None to
      round to the nearest number of the dtype.
    keeps: whether an array is not changed if the dtype holds all its numbers exactly.
      This is the case if no transform changed the array.
  """

  octaves: Callable[[str, np.dtype], float | None]
  keeps: bool = True


NEAREST = Rounding(lambda path, dtype: None)
"""Rounds to the nearest numbers of the dtype."""


def with_floor(offset: float = 0.0) -> Rounding:
  """Makes the rounding with the step that the dtype has at the rms of an array.

  In dtypes with fewer than 10 bits of mantissa, the step of the head is two octaves
  finer: no layer averages the head's errors, and on OPT in bfloat16 they are most of
  what a common step adds to the divergence (measured, see RESULTS.md).

  Args:
    offset: octaves by which the step is coarser; negative for a finer step.
  """

  def octaves(path: str, dtype: np.dtype) -> float:
    mantissa = jnp.finfo(dtype).nmant
    is_sensitive = path.startswith('head/') and mantissa < 10
    return offset - mantissa - (2 if is_sensitive else 0)

  return Rounding(octaves)


def to_steps(step: float, offsets: Mapping[str, float] | None = None) -> Rounding:
  """Rounds all numbers of an array to multiples of one step.

  Args:
    step: log2 of the step over the rms, which the nearest power of two replaces.
    offsets: octaves to add to the step, by kind of parameter, see `kind`; 0 for kinds
      that are not there.
  """
  by_kind = dict(offsets or {})
  return Rounding(
    # Rounding down halfway between two powers of two is rounding to the nearest one.
    lambda path, dtype: step + by_kind.get(kind(path), 0.0) + 0.5,
    keeps=False,
  )


def kind(path: str) -> str:
  """Returns the path of a parameter with `*` for the number of the layer."""
  return re.sub(r'^layers\.\d+/', 'layers.*/', path)


class Effect(NamedTuple):
  """The effect of rounding on the arrays of a leaf.

  Attributes:
    squares: sum of the squares of the errors, float32.
    norm: sum of the squares of the numbers, float32.
    bits: octaves from the step of the dtype to the coarser step 2^q, summed over the
      numbers for which 2^q is coarser, float32. An entropy coder saves about as many
      bits.
    step: q of the largest array, int32; `NO_STEP` if it was rounded without a step.
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
    leaf: the leaf, with float32 arrays. Arrays of integers are not changed. Arrays with
      fewer than two axes have few numbers; they are rounded to the nearest number.
    dtype: dtype of the result.
    octaves: see `Rounding`.
    keeps: see `Rounding`.

  Returns:
    The leaf and the effect. Numbers that are too large for the dtype become infinite.
  """
  if octaves is None:
    return _round(leaf, np.float32(0), dtype, False, keeps)
  return _round(leaf, np.float32(octaves), dtype, True, keeps)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _round(
  leaf: Any, octaves: jax.Array, dtype: np.dtype, stepped: bool, keeps: bool
) -> tuple[Any, Effect]:
  zero = jnp.float32(0)
  effect, largest = Effect(zero, zero, zero, jnp.int32(NO_STEP)), 0

  def round_array(array: jax.Array) -> jax.Array:
    nonlocal effect, largest
    nearest = array.astype(dtype)
    result, step, bits = nearest, jnp.int32(NO_STEP), zero
    if stepped and array.ndim > 1 and array.size:
      result, step, bits = _to_steps(array, nearest, octaves, dtype)
      if keeps:
        same = jnp.all(nearest.astype(jnp.float32) == array)
        result = jnp.where(same, nearest, result)
        step = jnp.where(same, NO_STEP, step)
        bits = jnp.where(same, 0, bits)
    if array.size > largest:
      effect, largest = effect._replace(step=step), array.size
    effect = effect._replace(
      squares=effect.squares + jnp.square(result.astype(jnp.float32) - array).sum(),
      norm=effect.norm + jnp.square(array).sum(),
      bits=effect.bits + bits,
    )
    return result

  if structured.is_structured(leaf):
    return leaf.map_numbers(round_array), effect
  return round_array(leaf) if structured.is_plain(leaf) else leaf, effect


def _to_steps(
  array: jax.Array, nearest: jax.Array, octaves: jax.Array, dtype: np.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
  info = jnp.finfo(dtype)
  # The numbers are divided by the greatest, so that no square is infinite and not all
  # squares are zero.
  greatest = jnp.abs(array).max()
  scale = jnp.where(greatest > 0, greatest, 1)
  count = jnp.maximum(jnp.count_nonzero(array), 1).astype(jnp.float32)
  rms = scale * jnp.sqrt(jnp.square(array / scale).sum() / count)
  q = jnp.floor(jnp.log2(rms) + octaves).astype(jnp.int32)
  # The dtype has no finer step, and 2^-q must be a float32.
  least = int(np.log2(float(info.smallest_normal)))
  q = jnp.clip(q, max(least - info.nmant, -126), 127)
  steps = jnp.rint(array * _power(-q))
  # This turns -0 into 0. Adding 0 would not, because XLA replaces x + 0 by x.
  multiple = jnp.where(steps == 0, 0, steps * _power(q)).astype(dtype)
  exponents = (jax.lax.bitcast_convert_type(jnp.abs(array), jnp.int32) >> 23) - 127
  octaves_saved = q - (jnp.maximum(exponents, least) - info.nmant)
  bits = jnp.where(array != 0, jnp.maximum(octaves_saved, 0), 0).astype(jnp.float32)
  # Beyond, the dtype itself is coarser.
  is_small = jnp.abs(steps) < 1 << info.nmant + 1
  return jnp.where(is_small, multiple, nearest), q, bits.sum()


def _power(exponent: jax.Array) -> jax.Array:
  """Returns 2^exponent in float32 for int32 exponents from -126 to 127."""
  return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)

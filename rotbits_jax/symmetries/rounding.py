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

from collections.abc import Callable, Mapping, Sequence
import functools
import math
import operator
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.symmetries import feedback


class Inputs(NamedTuple):
  """The inputs of a matrix on a text.

  Attributes:
    moments: float32 `[n, n]`, the sum of `x^T x` over the inputs x `[n]`.
    axis: the axis of the matrix that the inputs meet: 0 for a kernel, 1 for an
      embedding that is the head, too.
  """

  moments: Any
  axis: int


class Rounding(NamedTuple):
  """A rule for the rounding of the parameters of a model.

  Attributes:
    octaves: takes the path of a parameter and its dtype. Returns log2 of the step of an
      array over its rms, see above; None to round to the nearest number of the dtype.
    uniform: if False, arrays have the dtype of the source. Their step is the power of
      two below, and numbers for which the dtype is coarser are rounded to the dtype.
      An array stays as it is if all its numbers are numbers of the dtype already,
      because no transform changed it. If True, all numbers of an array are multiples of
      the step. The array is float32, because the step is the nearest one of
      4, 5, 6, 7 times a power of two, and the dtype may not have its multiples.
    inputs: the inputs of a matrix, by the path of the parameter. Such a matrix is
      rounded with error feedback, if it is a plain array and `uniform` is set.
  """

  octaves: Callable[[str, np.dtype], float | None]
  uniform: bool = False
  inputs: Mapping[str, 'Inputs'] = types.MappingProxyType({})


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


FINEST = -12.0
"""The finest uniform step, in octaves from the rms.

A normally distributed number then takes 14 bits, fewer than a number of any stored
dtype but those of 8 bits.
"""


def to_steps(
  step: float,
  offsets: Mapping[str, float] | None = None,
  inputs: Mapping[str, Inputs] | None = None,
) -> Rounding:
  """Makes the rounding of all numbers of an array to multiples of one step.

  Args:
    step: log2 of the step over the rms of the array.
    offsets: octaves to add to the step, by pattern of a path, see
      `models.names.pattern`. The offset of others is 0. No step is finer than `FINEST`.
    inputs: see `Rounding`.
  """
  by_kind = dict(offsets or {})
  octaves = lambda path, dtype: max(
    step + by_kind.get(models.names.pattern(path), 0.0), FINEST
  )
  return Rounding(octaves, uniform=True, inputs=inputs or {})


class Effect(NamedTuple):
  """The effect of rounding on the arrays of a leaf.

  Attributes:
    squares: sum of the squares of the errors, float32.
    norm: sum of the squares of the numbers, float32.
    bits: octaves from the step of the dtype to the coarser step of the array, summed
      over the numbers, float32. An entropy coder saves about as many bits.
    step: the step of the largest array, float32; 0 if it was rounded without a step.
  """

  squares: Any
  norm: Any
  bits: Any
  step: Any


def round_leaf(
  leaf: Any,
  dtype: np.dtype,
  octaves: float,
  uniform: bool,
  inputs: Inputs | None = None,
) -> tuple[Any, Effect]:
  """Rounds an array or a structured leaf on its device to a common step.

  Args:
    leaf: the leaf, with float32 arrays. Arrays of integers are not changed. Arrays with
      one row or column have few numbers; they are rounded to the nearest number.
    dtype: dtype of the parameter.
    octaves: log2 of the step over the rms, see `Rounding`.
    uniform: see `Rounding`.
    inputs: see `Rounding`; only a matrix with a uniform step uses them.

  Returns:
    The leaf and the effect. Numbers that are too large for the dtype become infinite.
  """
  octaves32 = np.float32(octaves)  # of one type, so that one program serves all
  moments, axis = inputs or (None, 0)
  if not (uniform and structured.is_plain(leaf) and is_matrix(leaf)):
    moments = None
  effects: list[tuple[int, Effect]] = []

  def round_array(array: Any) -> jax.Array:
    is_row = moments is None and array.size < _SMALL
    result, effect = _round(
      _row(array) if is_row else array,
      octaves32,
      moments,
      dtype,
      uniform,
      is_matrix(array),
      axis,
    )
    effects.append((array.size, effect))
    return _cut(result, array.shape) if is_row else result

  if structured.is_structured(leaf):
    leaf = leaf.map_numbers(round_array)
  elif structured.is_plain(leaf):
    leaf = round_array(leaf)
  return leaf, _total(effects)


# Programs are compiled for few lengths of smaller arrays, because compilation takes
# longer than the work.
_SMALL = 1 << 20


@jax.jit
def _row(array: jax.Array) -> jax.Array:
  """Returns the numbers of an array in a row, and zeros up to a power of two.

  The zeros do not change the step and the effect of the array.
  """
  length = max(1 << (array.size - 1).bit_length(), 1 << 12)
  return jnp.pad(array.reshape(-1), (0, length - array.size))


@functools.partial(jax.jit, static_argnums=1)
def _cut(row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns the array of a row: the inverse of `_row`."""
  return row[: math.prod(shape)].reshape(shape)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _round(
  array: jax.Array,
  octaves: jax.Array,
  moments: jax.Array | None,
  dtype: np.dtype,
  uniform: bool,
  common: bool,
  axis: int,
) -> tuple[jax.Array, Effect]:
  """Rounds an array; to a common step only if `common`."""
  nearest = array.astype(dtype)
  if not common:
    return nearest, _effect(array, nearest, jnp.float32(0), jnp.float32(0))
  if uniform:
    step = _quarter_step(_rms(array), octaves)
    if moments is None:
      result = feedback.multiples(array, step)
    else:
      result = feedback.round_to_steps(array, step, moments, axis=axis)
    return result, _effect(array, result, _bits_saved(array, step, dtype), step)
  step = jnp.ldexp(jnp.float32(1), _exponent(_rms(array), octaves, dtype))
  # Beyond, the dtype itself is coarser.
  is_small = jnp.abs(array) < step * (1 << jnp.finfo(dtype).nmant + 1)
  result = jnp.where(is_small, feedback.multiples(array, step).astype(dtype), nearest)
  same = jnp.all(nearest.astype(jnp.float32) == array)
  result = jnp.where(same, nearest, result)
  bits = jnp.where(same, 0, _bits_saved(array, step, dtype))
  return result, _effect(array, result, bits, jnp.where(same, 0, step))


def _effect(
  array: jax.Array, result: jax.Array, bits: jax.Array, step: jax.Array
) -> Effect:
  squares = jnp.square(result.astype(jnp.float32) - array).sum()
  return Effect(squares, jnp.square(array).sum(), bits, step)


def _total(effects: Sequence[tuple[int, Effect]]) -> Effect:
  """Returns the effect on a leaf, given the size of each array and the effect on it."""
  if not effects:
    return Effect(*np.zeros(4, np.float32))
  total = functools.reduce(
    lambda a, b: Effect(*map(operator.add, a, b)), [x for _, x in effects]
  )
  _, largest = max(effects, key=lambda x: x[0])
  return total._replace(step=largest.step)


def is_matrix(array: Any) -> bool:
  """Tells whether an array has several rows and several columns."""
  return array.ndim > 1 and min(array.shape[-2:]) > 1


def _rms(array: jax.Array) -> jax.Array:
  """Returns the root of the mean square of the numbers that are not zero."""
  # The numbers are divided by the greatest, so that no square is infinite and not all
  # squares are zero.
  greatest = jnp.abs(array).max()
  scale = jnp.where(greatest > 0, greatest, 1)
  count = jnp.maximum(jnp.count_nonzero(array), 1).astype(jnp.float32)
  return scale * jnp.sqrt(jnp.square(array / scale).sum() / count)


def _exponent(rms: jax.Array, octaves: jax.Array, dtype: np.dtype) -> jax.Array:
  """Returns q, see above; int32."""
  q = jnp.floor(jnp.log2(rms) + octaves).astype(jnp.int32)
  # The dtype has no finer step, and the inverse of 2^q must be a float32.
  return jnp.clip(q, max(_least_exponent(dtype) - jnp.finfo(dtype).nmant, -126), 126)


def _quarter_step(rms: jax.Array, octaves: jax.Array) -> jax.Array:
  """Returns the number of the form (4 + i) 2^(q - 2), i < 4, closest to the step."""
  target = jnp.clip(jnp.log2(rms) + octaves, -120.0, 110.0)
  q = jnp.floor(target)
  # In the middle between two of these in log2 are the roots of 4 * 5, 5 * 6, ...
  middles = jnp.log2(jnp.sqrt(jnp.float32([20, 30, 42, 56])) / 4)
  i = (target - q > middles).sum()
  return jnp.ldexp((4 + i).astype(jnp.float32), q.astype(jnp.int32) - 2)


def _bits_saved(array: jax.Array, step: jax.Array, dtype: np.dtype) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(jnp.abs(array), jnp.int32)
  exponents = jnp.maximum((bits >> 23) - 127, _least_exponent(dtype))
  octaves = jnp.log2(step) - (exponents - jnp.finfo(dtype).nmant)
  return jnp.where(array != 0, jnp.maximum(octaves, 0), 0).sum()


def _least_exponent(dtype: np.dtype) -> int:
  """Returns the exponent of the smallest normal number of a dtype."""
  return int(np.log2(float(jnp.finfo(dtype).smallest_normal)))

"""The rounding of float32 numbers to the stored dtype, once, after all transforms.

The step of a dtype is the distance between neighbouring numbers. A floating-point dtype
has a finer step for small numbers than for large ones. This precision has little effect
on the function of a model, because the errors of the large numbers of the same array
are larger. Therefore all numbers of an array are rounded to multiples of one step 2^q,
and then to the nearest number of the dtype, which is coarser only for large numbers:

    q = floor(log2(rms) + log2_step)

Here rms is the typical size of the array's numbers, see `symmetries.steps`. If
the mantissa has m bits and log2_step is -m, 2^q is the step of the dtype at the rms,
and the numbers below 2 rms share it. They take about one bit less, see
`coding.layouts`. The greatest error in the array does not change. The mean
square of the errors grows by less than a factor of 2.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import math
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import transform
from rotbits_jax.symmetries import steps
from rotbits_jax.system import host

_SMALL_ROW = 8.0  # how many times smaller than others a row is that shares their step


class Inputs(NamedTuple):
  """The inputs of a matrix on a text, and how much its outputs count.

  Attributes:
    moments: float32 `[n, n]`, the sum or the mean of `x^T x` over the inputs x `[n]`.
    axis: the axis of the matrix that the inputs meet: 0 for a kernel, 1 for an
      embedding. Those of an embedding are gradients, which meet its errors so.
    outputs: float32 `[m]`, how much the square of an error of each output counts; None
      if the rows and columns of the matrix have no steps of their own.
  """

  moments: Any
  axis: int
  outputs: Any = None


class Rounding(NamedTuple):
  """A rule for the rounding of the parameters of a model.

  Attributes:
    log2_step: takes the path of a parameter and its dtype. Returns log2 of the step of
      an array over its rms, see above; None to round to the nearest number of the
      dtype.
    uniform: if False, arrays have the dtype of the source. Their step is the power of
      two below, and weights for which the dtype is coarser are rounded to the dtype.
      An array does not change if all its weights are numbers of the dtype already,
      because no transform changed it. If True, all weights of an array are multiples of
      the step. The array is float32, because the step is the nearest one of
      4, 5, 6, 7 times a power of two, and the dtype may not have its multiples.
    dtype: the dtype of weights that have no step; None for that of each parameter.
    inputs: the inputs of a matrix, by the path of the parameter. If `uniform` is set,
      such a matrix is rounded with error feedback. Its rows and columns have steps of
      their own if it is a plain array or the head: the result is
      `structured.UniformlyQuantized`.
  """

  log2_step: Callable[[str, np.dtype], float | None]
  uniform: bool = False
  dtype: Any = None
  inputs: Mapping[str, Inputs] = types.MappingProxyType({})


NEAREST = Rounding(lambda path, dtype: None)
"""Rounds to the nearest numbers of the dtype."""

FLOAT32 = NEAREST._replace(dtype=np.float32)
"""Does not round: all weights stay float32."""

FINEST = -12.0
"""The finest uniform step: log2 of the step over the rms.

A normally distributed weight then takes 14 bits, fewer than a number of any stored
dtype but those of 8 bits.
"""

COARSEST = 1.0
"""The coarsest uniform step, as `FINEST`; two thirds of normal weights become 0."""


def with_minimum_exponent(offset: float = 0.0) -> Rounding:
  """Makes the rounding with the step that the dtype has at the rms of an array.

  In dtypes with fewer than 10 bits of mantissa, the step of the head is a quarter of
  that: no layer averages the head's errors, and on OPT in bfloat16 they are most of
  the divergence that a common step adds (measured). The step of low-rank factors is
  half of the usual one, see `round_params`.

  Args:
    offset: added to log2 of the step; negative for a finer step.
  """

  def log2_step(path: str, dtype: np.dtype) -> float:
    mantissa = jnp.finfo(dtype).nmant
    is_sensitive = path.startswith('head/') and mantissa < 10
    return offset - mantissa - (2 if is_sensitive else 0)

  return Rounding(log2_step)


def to_steps(
  step: float,
  offsets: Mapping[str, float] | None = None,
  inputs: Mapping[str, Inputs] | None = None,
) -> Rounding:
  """Makes the rounding of all weights of an array to multiples of one step.

  Args:
    step: log2 of the step over the rms of the array.
    offsets: added to `step`, by the path or by its pattern, see `models.names.pattern`.
      The offset of other parameters is 0. No step is finer than `FINEST`.
    inputs: see `Rounding`.
  """
  known = dict(offsets or {})

  def log2_step(path: str, dtype: np.dtype) -> float:
    del dtype
    offset = known.get(path, known.get(models.names.pattern(path), 0.0))
    return max(step + offset, FINEST)

  return Rounding(log2_step, uniform=True, inputs=inputs or {})


# ---- the parameters of a record ----------------------------------------------------


class Effect(NamedTuple):
  """The effect of rounding on the arrays of a leaf.

  Attributes:
    step: the step of the first array, float32; 0 if it was rounded without a step.
    squares: sum of the squares of the errors of finite weights, float32.
    norm: sum of the squares of the finite weights, float32.
    bits: log2 of the coarser step over the step of the dtype, summed over the weights,
      float32. An entropy coder saves about as many bits.
    outliers: how many weights did not count for the step, see `steps.Size`.
  """

  step: Any
  squares: Any
  norm: Any
  bits: Any
  outliers: Any

  def note(self, path: str) -> transform.Note:
    """Returns the note on a parameter, of an effect on the host."""
    error = np.sqrt(self.squares / max(self.norm, 1e-30))
    note = {'tensor': path, 'step': to_json(self.step), 'error': to_json(error)}
    return note | ({'outliers': int(self.outliers)} if self.outliers else {})


def round_params(
  rounding: Rounding, params: transform.Params, context: transform.Context
) -> tuple[transform.Params, list[transform.Note], float]:
  """Rounds matrices to their steps on their device, and fetches all parameters once.

  Args:
    rounding: the rule.
    params: leaves of a record by path, float32.
    context: it has the dtypes of the parameters.

  Returns:
    The rounded parameters on the host; a note for each matrix that was rounded to a
    step; and about how many bits that saves an entropy coder.
  """
  effects: dict[str, Effect] = {}
  for path in list(params):
    leaf, dtype = params[path], context.dtypes.get(path, context.dtype)
    log2_step = _log2_step(rounding, path, leaf, context)
    if log2_step is None:
      continue
    inputs = rounding.inputs.get(path)
    if inputs is not None and path == 'head/kernel':
      # Steps of its columns save more than the zeros of a structured leaf.
      leaf = structured.materialize(leaf)
    params[path], effects[path] = round_leaf(
      leaf, dtype, log2_step, rounding.uniform, inputs
    )
  params, effects = jax.device_get((params, effects))
  for path, leaf in params.items():
    if path not in effects:
      # On the host, because these are vectors as a rule, and a program for so few
      # weights takes longer to compile.
      dtype = rounding.dtype or context.dtypes.get(path, context.dtype)
      params[path] = structured.astype(leaf, dtype)
    elif isinstance(leaf, structured.UniformlyQuantized):
      params[path] = _in_files(leaf)
    elif rounding.uniform and structured.is_plain(leaf) and is_matrix(leaf):
      params[path] = structured.UniformlyQuantized.of(np.asarray(leaf)) or leaf
  stepped = {path: effect for path, effect in effects.items() if effect.step}
  notes = [effect.note(path) for path, effect in stepped.items()]
  return params, notes, sum(float(effect.bits) for effect in stepped.values())


def _log2_step(
  rounding: Rounding, path: str, leaf: Any, context: transform.Context
) -> float | None:
  """Returns log2 of the step of a parameter; None to round it to nearest numbers."""
  log2_step = rounding.log2_step(path, context.dtypes.get(path, context.dtype))
  is_on_device = any(isinstance(x, jax.Array) for x in jax.tree.leaves(leaf))
  is_vector = structured.is_plain(leaf) and not is_matrix(leaf)
  is_tied = isinstance(leaf, structured.Tied)  # fitted to a head, and small
  if log2_step is None or is_vector or is_tied or not is_on_device:
    return None
  if isinstance(leaf, structured.FactorPair) and not rounding.uniform:
    # The usual one would make twice the divergence that rounding other factors makes,
    # because the errors of two factors add up and a basis has errors of its own.
    log2_step -= 1
  if path == 'embed/tokens' and structured.is_plain(leaf) and not rounding.uniform:
    log2_step += _for_small_rows(leaf, context.config)
  return log2_step


def _for_small_rows(table: Any, config: models.ModelConfig) -> float:
  """Returns what to add to log2 of an embedding's step for its small rows, at most 0.

  A token uses one row alone, and the first norm makes it as large as any other. So the
  step must be small beside each row, but for those that are small beside the norm's
  epsilon, and where positions are added.
  """
  if config.learned_positions:
    return 0.0
  ratio = _least_row(table, config.norm_eps * config.hidden_size)
  return min(math.log2(_SMALL_ROW * float(ratio)), 0.0)


@jax.jit
def _least_row(table: jax.Array, least: jax.Array) -> jax.Array:
  """Returns the least norm of a row over the root of the mean square of all norms.

  Rows whose square is not above `least` do not count.
  """
  squares = jnp.square(table).sum(axis=1)
  counted = (squares > least) & jnp.isfinite(squares)
  mean = jnp.where(counted, squares, 0).sum() / jnp.maximum(counted.sum(), 1)
  smallest = jnp.where(counted, squares, jnp.inf).min()
  return jnp.where(counted.any(), jnp.sqrt(smallest / mean), 1)


def _in_files(leaf: structured.UniformlyQuantized) -> Any:
  """Returns a leaf with float32 integers as in files; its array if it does not fit."""
  if np.abs(leaf.integers).max(initial=0) < 1 << 15:
    narrow = dataclasses.replace(leaf, integers=leaf.integers.astype(np.int16))
    with contextlib.suppress(ValueError):
      narrow.check()
      return narrow
  return np.asarray(leaf.materialize())


def to_json(value: Any) -> Any:
  """Returns a number as in notes: with three digits, and None if it is not finite."""
  if isinstance(value, np.generic | np.ndarray):
    value = value.item()
  if not isinstance(value, float):
    return value
  return float(f'{value:.3g}') if math.isfinite(value) else None


# ---- one leaf ----------------------------------------------------------------------


def round_leaf(
  leaf: Any,
  dtype: np.dtype,
  log2_step: float,
  uniform: bool,
  inputs: Inputs | None = None,
) -> tuple[Any, Effect]:
  """Rounds an array or a structured leaf on its device to a common step.

  Args:
    leaf: the leaf, with float32 arrays. Arrays of integers are not changed. Arrays with
      one row or column have few numbers; they are rounded to the nearest number.
    dtype: dtype of the parameter.
    log2_step: log2 of the step over the rms, see `Rounding`.
    uniform: see `Rounding`.
    inputs: see `Rounding`; only a matrix with a uniform step uses them.

  Returns:
    The leaf and the effect. Numbers that are too large for the dtype become infinite.
    Those of which only the nearest multiple is too large get the largest one.
  """
  traced = np.float32(log2_step)  # of one type, so that one program serves all
  moments, axis, outputs = inputs or (None, 0, None)
  is_whole = structured.is_plain(leaf) and is_matrix(leaf)
  if not (uniform and (is_whole or isinstance(leaf, structured.TrapezoidalRows))):
    moments = outputs = None
  # Infinite numbers are no multiples.
  if outputs is not None and is_whole and bool(jnp.isfinite(leaf).all()):
    return _round_lines(leaf, traced, moments, outputs, dtype, axis)
  effects = [Effect(*np.zeros(5, np.float32))]

  def round_array(array: Any) -> Any:
    if not is_matrix(array):
      return array.astype(dtype)
    is_row = moments is None and array.size < 1 << 20
    given = _row(array) if is_row else array
    result, effect = _round(given, traced, moments, dtype, uniform, axis)
    effects.append(effect)
    return np.asarray(result)[: array.size].reshape(array.shape) if is_row else result

  if structured.is_structured(leaf):
    leaf = leaf.rounded(round_array)
  elif structured.is_plain(leaf):
    leaf = round_array(leaf)
  total = Effect(*map(sum, zip(*effects, strict=True)))
  return leaf, total._replace(step=effects[min(1, len(effects) - 1)].step)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _round_lines(
  array: jax.Array,
  log2_step: jax.Array,
  moments: jax.Array,
  outputs: jax.Array,
  dtype: np.dtype,
  axis: int,
) -> tuple[structured.UniformlyQuantized, Effect]:
  size = steps.typical_size(array)
  step = steps.quarter_step(size.rms, log2_step)
  leaf = steps.with_feedback(array, step, moments, outputs, axis=axis)
  values = leaf.materialize()
  # Where an integer is 0 the step is NaN, but nothing is too large.
  overflows, count = _overflows(values, values / leaf.integers, array, dtype)
  integers = jnp.where(overflows, jnp.copysign(count, values), leaf.integers)
  leaf = dataclasses.replace(leaf, integers=integers)
  return leaf, _effect(array, leaf.materialize(), step, dtype, size.outliers)


def _row(array: Any) -> jax.Array:
  """Returns the numbers of an array in a row, and zeros up to a power of four.

  Programs are then compiled for few lengths, because compilation takes longer than the
  work. Zeros do not change the step and the effect. The host makes the row, because
  another program would do it for each shape.
  """
  row = host.empty((4 ** max(-(-(array.size - 1).bit_length() // 2), 6),), np.float32)
  row[: array.size] = np.asarray(array).reshape(-1)
  row[array.size :] = 0
  return jax.device_put(row, array.device)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _round(
  array: jax.Array,
  log2_step: jax.Array,
  moments: jax.Array | None,
  dtype: np.dtype,
  uniform: bool,
  axis: int,
) -> tuple[jax.Array, Effect]:
  size, nearest = steps.typical_size(array), array.astype(dtype)
  if uniform:
    step = steps.quarter_step(size.rms, log2_step)
    if moments is None:
      result = steps.multiples(array, step)
    else:
      result = steps.with_feedback(array, step, moments, axis=axis).materialize()
    overflows, count = _overflows(result, step, array, dtype)
    result = jnp.where(overflows, jnp.copysign(count * step, result), result)
  else:
    step = _power_step(size.rms, log2_step, dtype)
    # Beyond, the dtype itself is coarser.
    is_small = jnp.abs(array) < step * (1 << jnp.finfo(dtype).nmant + 1)
    result = jnp.where(is_small, steps.multiples(array, step).astype(dtype), nearest)
    same = jnp.all((nearest.astype(jnp.float32) == array) | jnp.isnan(array))
    result, step = jnp.where(same, nearest, result), jnp.where(same, 0, step)
  return result, _effect(array, result, step, dtype, size.outliers)


def _overflows(
  multiples: jax.Array, step: jax.Array, array: jax.Array, dtype: np.dtype
) -> tuple[jax.Array, jax.Array]:
  """Finds the multiples that are too large for a dtype, although the numbers are not.

  Args:
    multiples: the multiples of a step.
    step: the step, or that of each multiple.
    array: the numbers that were rounded to them.
    dtype: the dtype.

  Returns:
    Where they are; and how many steps the largest multiple has that is not too large.
  """
  most = min(float(jnp.finfo(x).max) for x in (np.float32, dtype))
  overflows = (jnp.abs(multiples) > most) & (jnp.abs(array) <= most)
  return overflows, jnp.floor(most / step)


def _effect(
  array: jax.Array,
  result: jax.Array,
  step: jax.Array,
  dtype: np.dtype,
  outliers: jax.Array,
) -> Effect:
  finite = jnp.isfinite(array)
  squares = jnp.square(jnp.where(finite, result.astype(jnp.float32) - array, 0)).sum()
  norm = jnp.square(jnp.where(finite, array, 0)).sum()
  return Effect(step, squares, norm, _bits_saved(array, step, dtype), outliers)


def is_matrix(array: Any) -> bool:
  """Tells whether an array has several rows and several columns."""
  return array.ndim > 1 and min(array.shape[-2:]) > 1


def _power_step(rms: jax.Array, log2_step: jax.Array, dtype: np.dtype) -> jax.Array:
  """Returns 2^q, see above."""
  q = jnp.floor(jnp.log2(rms) + log2_step)
  # The dtype has no finer step, and the inverse of 2^q must be a float32.
  least = max(_least_exponent(dtype) - jnp.finfo(dtype).nmant, -126)
  return jnp.ldexp(jnp.float32(1), jnp.clip(q, least, 126).astype(jnp.int32))


def _bits_saved(array: jax.Array, step: jax.Array, dtype: np.dtype) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(jnp.abs(array), jnp.int32)
  exponents = jnp.maximum((bits >> 23) - 127, _least_exponent(dtype))
  saved = jnp.log2(step) - (exponents - jnp.finfo(dtype).nmant)
  return jnp.where(array != 0, jnp.maximum(saved, 0), 0).sum()


def _least_exponent(dtype: np.dtype) -> int:
  """Returns the exponent of the smallest normal number of a dtype."""
  return int(np.log2(float(jnp.finfo(dtype).smallest_normal)))

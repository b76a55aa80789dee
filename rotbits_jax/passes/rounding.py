"""The rounding of float32 numbers to the stored dtype, once, after all transforms.

A floating-point dtype has finer steps for small numbers than for large ones. This
precision has little effect on the function of a model, because the errors of the large
numbers of the same array are larger. Therefore all numbers of an array are rounded to
multiples of one step 2^q, and then to the nearest number of the dtype, which is coarser
only for large numbers:

    q = floor(log2(rms) + log2_step)

Here rms is the typical size of the array's numbers, see `symmetries.steps`. If the
mantissa has m bits and log2_step is -m, 2^q is the step of the dtype at the rms, and
the numbers below 2 rms share it. They take about one bit less. The greatest error in
the array does not change, and the mean square grows by less than a factor of 2.

An array does not change if all its numbers are those of the dtype already.

The preset `near` rounds to coarser steps, the nearest ones of 4, 5, 6, 7 times a power
of two, and stores the multiples as integers, see `structured.UniformlyQuantized`. With
`Inputs`, matrices are rounded with error feedback, and plain arrays and the head have a
step per row and column.
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
from rotbits_jax.passes.transform import Context
from rotbits_jax.passes.transform import Note
from rotbits_jax.passes.transform import Params
from rotbits_jax.symmetries import steps
from rotbits_jax.system import host

FINEST = -12.0
"""The finest uniform step: log2 of the step over the rms.

A normally distributed weight then takes 14 bits, fewer than in any 16-bit dtype.
"""

COARSEST = 1.0
"""The coarsest uniform step, as `FINEST`; two thirds of normal weights become 0."""

_SMALL_ROW = 8.0  # how many times smaller than others a row is that shares their step
_SMALL_ARRAY = 1 << 20  # elements of an array that shares its program with others


class Inputs(NamedTuple):
  """The inputs of a matrix on a text, and how much its outputs count."""

  moments: Any  # float32 [n, n], sum or mean of x^T x over the inputs x [n]
  axis: int  # of the matrix that meets them: 0, or 1 for an embedding
  outputs: Any = None  # float32 [m], see `steps.quantize`


class Rounding(NamedTuple):
  """A rule for the rounding of the parameters of a model."""

  # Takes the path of a parameter and its dtype; returns log2 of the step over the rms,
  # or None to round to the nearest number of the dtype.
  log2_step: Callable[[str, np.dtype], float | None]
  uniform: bool = False  # whether multiples are stored, and not numbers of the dtype
  dtype: Any = None  # of weights that have no step; None for that of each parameter
  inputs: Mapping[str, Inputs] = types.MappingProxyType({})  # of matrices, by path


NEAREST = Rounding(lambda path, dtype: None)
"""Rounds to the nearest numbers of the dtype."""

FLOAT32 = NEAREST._replace(dtype=np.float32)
"""Does not round: all weights stay float32."""


def with_minimum_exponent(offset: float = 0.0) -> Rounding:
  """Makes the rounding with the step that the dtype has at the rms of an array.

  The `offset` is added to log2 of the step. In dtypes with fewer than 10 bits of
  mantissa, the step of the head is a quarter of that: no layer averages the head's
  errors, and on OPT in bfloat16 they are most of the divergence that a common step adds
  (measured).
  """

  def log2_step(path: str, dtype: np.dtype) -> float:
    mantissa = jnp.finfo(dtype).nmant
    is_sensitive = path.startswith('head/') and mantissa < 10
    return offset - mantissa - (2 if is_sensitive else 0)

  return Rounding(log2_step)


def to_steps(
  step: float,  # log2 of the step over the rms of an array
  offsets: Mapping[str, float] | None = None,  # to add, by path or `names.pattern`
  inputs: Mapping[str, Inputs] | None = None,  # see `Rounding`
) -> Rounding:
  """Makes the rounding to multiples of one step for each array, at least `FINEST`."""
  known = dict(offsets or {})

  def log2_step(path: str, dtype: np.dtype) -> float:
    offset = known.get(path, known.get(models.names.pattern(path), 0.0))
    return max(step + offset, FINEST)

  return Rounding(log2_step, uniform=True, inputs=inputs or {})


# ---- the parameters of a record ----------------------------------------------------


def round_params(
  rounding: Rounding, params: Params, context: Context
) -> tuple[Params, list[Note], float]:
  """Rounds float32 matrices to their steps on their device, and fetches all parameters.

  Returns the rounded parameters on the host; a note for each matrix that was rounded to
  a step; and about how many bits that saves an entropy coder.
  """
  effects: dict[str, Effect] = {}
  for path in list(params):
    leaf = params[path]
    log2_step = _log2_step(rounding, path, leaf, context)
    if log2_step is None:
      continue
    inputs = rounding.inputs.get(path)
    if inputs is not None and path == 'head/kernel':
      # Steps of its columns save more than the zeros of a structured leaf.
      leaf = structured.materialize(leaf)
    dtype = context.dtype_of(path)
    params[path], effects[path] = round_leaf(
      leaf, dtype, log2_step, rounding.uniform, inputs
    )
  params, effects = jax.device_get((params, effects))
  for path, leaf in params.items():
    if path in effects:
      params[path] = narrowed(leaf)
    else:
      # On the host, because these are vectors as a rule, and a program for so few
      # weights takes longer to compile.
      dtype = rounding.dtype or context.dtype_of(path)
      params[path] = structured.astype(leaf, dtype)
  effects = {path: effect for path, effect in effects.items() if effect.step}
  notes = [effect.note(path) for path, effect in effects.items()]
  return params, notes, sum(float(effect.bits) for effect in effects.values())


def _log2_step(
  rounding: Rounding, path: str, leaf: Any, context: Context
) -> float | None:
  """Returns log2 of the step of a parameter; None to round it to nearest numbers."""
  log2_step = rounding.log2_step(path, context.dtype_of(path))
  is_on_device = any(isinstance(x, jax.Array) for x in jax.tree.leaves(leaf))
  is_vector = structured.is_plain(leaf) and not is_matrix(leaf)
  is_tied = isinstance(leaf, structured.Tied)  # fitted to a head, and small
  if log2_step is None or is_vector or is_tied or not is_on_device:
    return None
  if rounding.uniform:
    return log2_step
  if isinstance(leaf, structured.LowRank):
    # A whole step would make twice the divergence that rounding other factors makes,
    # because the errors of two factors add up and a basis has errors of its own.
    return log2_step - 1
  config = context.config
  is_table = path == 'embed/tokens' and structured.is_plain(leaf)
  if is_table and not config.learned_positions:
    # A token uses one row alone, and the first norm makes it as large as any other. So
    # the step must be small compared with each row, unless the norm's epsilon is
    # larger than the row, or positions are added to it.
    ratio = _least_row(leaf, config.norm_eps * config.hidden_size)
    log2_step += min(math.log2(_SMALL_ROW * float(ratio)), 0.0)
  return log2_step


@jax.jit
def _least_row(table: jax.Array, least: jax.Array) -> jax.Array:
  """Returns the least norm over the rms norm of rows with a square above `least`."""
  squares = jnp.square(table).sum(axis=1)
  counted = (squares > least) & jnp.isfinite(squares)
  mean = jnp.where(counted, squares, 0).sum() / jnp.maximum(counted.sum(), 1)
  smallest = jnp.where(counted, squares, jnp.inf).min()
  return jnp.where(counted.any(), jnp.sqrt(smallest / mean), 1)


def narrowed(leaf: Any) -> Any:
  """Returns a quantised leaf on the host with int16 integers; an array if none fit."""
  if not isinstance(leaf, structured.UniformlyQuantized):
    return leaf
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


class Effect(NamedTuple):
  """The effect of rounding on the arrays of a leaf, float32."""

  step: Any  # of the first array; 0 if it was rounded without a step
  squares: Any  # sum of the squares of the errors of finite weights
  norm: Any  # sum of the squares of the finite weights
  bits: Any  # saved by an entropy coder: log2 of the step over that of the dtype
  outliers: Any  # how many weights did not count for the step, see `steps.Size`

  def note(self, path: str) -> Note:
    """Returns the note on a parameter, of an effect on the host."""
    error = np.sqrt(self.squares / max(self.norm, 1e-30))
    note = {'tensor': path, 'step': to_json(self.step), 'error': to_json(error)}
    return note | ({'outliers': int(self.outliers)} if self.outliers else {})


def round_leaf(
  leaf: Any,  # with float32 arrays; integers are not changed
  dtype: np.dtype,  # of the parameter
  log2_step: float,  # log2 of the step over the rms
  uniform: bool,  # see `Rounding`
  inputs: Inputs | None = None,  # only a matrix with a uniform step uses them
) -> tuple[Any, Effect]:
  """Rounds an array or a structured leaf on its device to a common step.

  With a uniform step, a plain matrix becomes a `structured.UniformlyQuantized` with
  float32 integers. Arrays with one row or column are rounded to the nearest number.
  Numbers that are too large for the dtype become infinite; those of which only the
  nearest multiple is too large get the largest one.
  """
  is_whole = structured.is_plain(leaf) and is_matrix(leaf)
  moments, axis, outputs = inputs or (None, 0, None)
  if not (uniform and (is_whole or isinstance(leaf, structured.TrapezoidalRows))):
    moments = outputs = None
  # Infinite numbers are no multiples.
  if outputs is not None and not (is_whole and bool(jnp.isfinite(leaf).all())):
    outputs = None
  effects = [Effect(*np.zeros(5, np.float32))]
  traced = np.float32(log2_step)  # of one type, so that one program serves all

  def round_array(array: Any) -> Any:
    if not is_matrix(array):
      return array.astype(dtype)
    is_small = moments is None and array.size < _SMALL_ARRAY
    operand = _row(array) if is_small else array
    if uniform:
      rounded, effect = _to_multiples(
        operand, traced, moments, outputs, dtype=dtype, axis=axis, is_whole=is_whole
      )
    else:
      rounded, effect = _to_power_of_two(operand, traced, dtype)
    effects.append(effect)
    if is_small:
      cut = lambda x: np.asarray(x)[: array.size].reshape(array.shape)
      rounded = jax.tree.map(lambda x: cut(x) if x.ndim else x, rounded)
    return rounded

  if structured.is_structured(leaf):
    leaf = leaf.rounded(round_array)
  elif structured.is_plain(leaf):
    leaf = round_array(leaf)
  total = Effect(*map(sum, zip(*effects, strict=True)))
  return leaf, total._replace(step=effects[min(1, len(effects) - 1)].step)


def _row(array: Any) -> jax.Array:
  """Returns the numbers of an array in a row, and zeros up to a power of four.

  Few programs are compiled then, which takes longer than the work. The host makes the
  row, because another program would do it for each shape.
  """
  row = host.empty((4 ** max(-(-(array.size - 1).bit_length() // 2), 6),), np.float32)
  row[: array.size] = np.asarray(array).reshape(-1)
  row[array.size :] = 0
  return jax.device_put(row, array.device)


@functools.partial(jax.jit, static_argnames=('dtype', 'axis', 'is_whole'))
def _to_multiples(
  array: jax.Array,
  log2_step: jax.Array,
  moments: jax.Array | None,
  outputs: jax.Array | None,
  *,
  dtype: np.dtype,
  axis: int,
  is_whole: bool,
) -> tuple[Any, Effect]:
  """Rounds an array to multiples of a step, or of a step per row and column."""
  size = steps.typical_size(array)
  step = steps.quarter_step(size.rms, log2_step)
  leaf = steps.quantize(array, step, moments, outputs, axis=axis)
  values = leaf.materialize()
  most = min(float(jnp.finfo(x).max) for x in (np.float32, dtype))
  overflows = (jnp.abs(values) > most) & (jnp.abs(array) <= most)
  units = dataclasses.replace(leaf, integers=jnp.ones_like(values)).materialize()
  largest = jnp.copysign(jnp.floor(most / units), values)
  integers = jnp.where(overflows, largest, leaf.integers)
  leaf = dataclasses.replace(leaf, integers=integers)
  values = leaf.materialize()
  effect = _effect(array, values, step, dtype, size.outliers)
  return (leaf if is_whole else values), effect


@functools.partial(jax.jit, static_argnums=2)
def _to_power_of_two(
  array: jax.Array, log2_step: jax.Array, dtype: np.dtype
) -> tuple[jax.Array, Effect]:
  """Rounds an array to multiples of 2^q and to its dtype, see above."""
  size, nearest = steps.typical_size(array), array.astype(dtype)
  q = jnp.floor(jnp.log2(size.rms) + log2_step)
  # The dtype has no finer step, and the inverse of 2^q must be a float32.
  least = max(_least_exponent(dtype) - jnp.finfo(dtype).nmant, -126)
  step = jnp.ldexp(jnp.float32(1), jnp.clip(q, least, 126).astype(jnp.int32))
  # Beyond, the dtype itself is coarser.
  is_small = jnp.abs(array) < step * (1 << jnp.finfo(dtype).nmant + 1)
  result = jnp.where(is_small, steps.multiples(array, step).astype(dtype), nearest)
  same = jnp.all((nearest.astype(jnp.float32) == array) | jnp.isnan(array))
  result, step = jnp.where(same, nearest, result), jnp.where(same, 0, step)
  return result, _effect(array, result, step, dtype, size.outliers)


def _effect(
  array: jax.Array,
  result: jax.Array,
  step: jax.Array,
  dtype: np.dtype,
  outliers: jax.Array,
) -> Effect:
  """Measures the effect of rounding an array."""
  finite = jnp.isfinite(array)
  squares = jnp.square(jnp.where(finite, result.astype(jnp.float32) - array, 0)).sum()
  norm = jnp.square(jnp.where(finite, array, 0)).sum()
  patterns = jax.lax.bitcast_convert_type(jnp.abs(array), jnp.int32)
  exponents = jnp.maximum((patterns >> 23) - 127, _least_exponent(dtype))
  saved = jnp.log2(step) - (exponents - jnp.finfo(dtype).nmant)
  bits = jnp.where(array != 0, jnp.maximum(saved, 0), 0).sum()
  return Effect(step, squares, norm, bits, outliers)


def is_matrix(array: Any) -> bool:
  """Tells whether an array has several rows and several columns."""
  return array.ndim > 1 and min(array.shape[-2:]) > 1


def _least_exponent(dtype: np.dtype) -> int:
  """Returns the exponent of the smallest normal number of a dtype."""
  return int(np.log2(float(jnp.finfo(dtype).smallest_normal)))

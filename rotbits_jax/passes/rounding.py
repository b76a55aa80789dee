"""The rounding of float32 weights to the stored dtype, once, after all transforms.

A floating-point dtype has finer steps for small elements than for large ones. This
precision has little effect on the function of a model, because the errors of the large
elements of the same array are larger. So all elements of an array are rounded to
multiples of one step 2^q, and then to the nearest value of the dtype, which is coarser
only for large elements:

    q = floor(log2(rms) + log2_step)

Here rms is the typical size of the elements, see `symmetries.steps`. If the mantissa
has m bits and log2_step is -m, 2^q is the step of the dtype at the rms, and elements
below 2 rms share it. The greatest error in the array does not change, and the mean
square of the errors grows by less than a factor of 2.

The preset `near` rounds to coarser steps, the nearest ones of 4, 5, 6, 7 times a power
of two, and stores the multiples as integers, see `structured.UniformlyQuantized`. With
`Inputs`, matrices are rounded with error feedback, and plain arrays and the head have a
step per row and column.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured
from rotbits_jax.symmetries import steps
from rotbits_jax.system import host

FINEST, COARSEST = -12.0, 1.0
"""The finest and the coarsest uniform step: log2 of the step over the rms.

A normally distributed weight takes 14 bits with the finest one, fewer than in any
16-bit dtype. With the coarsest one, two thirds of the weights become 0.
"""

_SMALL_ARRAY = 1 << 20  # elements of an array that shares its program with others
_NOTHING: Mapping[str, Any] = types.MappingProxyType({})


class Inputs(NamedTuple):
  """The inputs of a matrix on a text, and how much its outputs count."""

  moments: Any  # float32 [n, n], sum or mean of x^T x over the inputs x [n]
  axis: int  # of the matrix that meets them: 0, or 1 for an embedding
  outputs: Any = None  # float32 [m], see `steps.quantize`


class Rounding(NamedTuple):
  """A rule for the rounding of the parameters of a model."""

  # Log2 of the step of an array: over its rms if it is uniform, or over the step that
  # the dtype has at the rms. None rounds to the nearest numbers of the dtype.
  step: float | None = None
  uniform: bool = False  # whether multiples are stored, and not numbers of the dtype
  offsets: Mapping[str, float] = _NOTHING  # to add, by path
  inputs: Mapping[str, Inputs] = _NOTHING  # of matrices with a uniform step, by path
  dtype: Any = None  # of weights that have no step; None for that of each parameter

  def log2_step(self, path: str, dtype: np.dtype) -> float | None:
    """Returns log2 of the step over the rms of a parameter; None for no step."""
    if self.step is None:
      return None
    if self.uniform:
      return max(self.step + self.offsets.get(path, 0.0), FINEST)
    # No layer averages the errors of the head. On OPT in bfloat16 they are most of the
    # divergence that a common step adds (measured).
    mantissa = jnp.finfo(dtype).nmant
    is_sensitive = path.startswith('head/') and mantissa < 10
    return self.step - mantissa - (2 if is_sensitive else 0)

  def is_finer_than(self, dtype: np.dtype) -> bool:
    """Returns whether multiples take more bits than typical elements of a dtype."""
    is_fine = self.step is not None and self.step <= -jnp.finfo(dtype).nmant
    return self.uniform and is_fine


NEAREST = Rounding()  # to the nearest numbers of the dtype


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


class Effect(NamedTuple):
  """The effect of rounding on the arrays of a leaf, float32."""

  step: Any  # of the first array; 0 if it was rounded without a step
  squares: Any  # sum of the squares of the errors of finite weights
  norm: Any  # sum of the squares of the finite weights
  bits: Any  # saved by an entropy coder: log2 of the step over that of the dtype


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
  if not (is_whole or isinstance(leaf, structured.TrapezoidalRows)):
    moments = None
  # Infinite numbers are no multiples.
  if outputs is not None and not (is_whole and bool(jnp.isfinite(leaf).all())):
    outputs = None
  effects: list[Effect] = []

  def round_array(array: Any) -> Any:
    if not is_matrix(array):
      return array.astype(dtype)
    is_small = moments is None and array.size < _SMALL_ARRAY
    rounded, effect = _round(
      _row(array) if is_small else array,
      np.float32(log2_step),  # of one type, so one program serves all
      moments,
      outputs,
      dtype=dtype,
      uniform=uniform,
      axis=axis,
    )
    effects.append(effect)
    if is_small:
      cut = lambda x: np.asarray(x)[: array.size].reshape(array.shape)
      rounded = jax.tree.map(lambda x: cut(x) if x.ndim else x, rounded)
    return rounded if is_whole or not uniform else rounded.integers * rounded.step

  if structured.is_structured(leaf):
    leaf = leaf.rounded(round_array)
  elif structured.is_plain(leaf):
    leaf = round_array(leaf)
  effects = effects or [Effect(*np.zeros(4, np.float32))]
  total = Effect(*map(sum, zip(*effects, strict=True)))
  return leaf, total._replace(step=effects[0].step)


def _row(array: Any) -> jax.Array:
  """Returns an array in a row, with zeros up to a power of four, for few programs."""
  row = host.empty((4 ** max(-(-(array.size - 1).bit_length() // 2), 6),), np.float32)
  row[: array.size] = np.asarray(array).reshape(-1)
  row[array.size :] = 0
  return jax.device_put(row, array.device)


@functools.partial(jax.jit, static_argnames=('dtype', 'uniform', 'axis'))
def _round(
  array: jax.Array,
  log2_step: jax.Array,
  moments: jax.Array | None,
  outputs: jax.Array | None,
  *,
  dtype: np.dtype,
  uniform: bool,
  axis: int,
) -> tuple[Any, Effect]:
  """Rounds an array to a step, and measures the effect."""
  rms = steps.typical_size(array)
  if uniform:
    step = steps.quarter_step(rms, log2_step)
    leaf = steps.quantize(array, step, moments, outputs, axis=axis)
    values, ones = leaf.materialize(), jnp.ones_like(leaf.integers)
    # The largest multiple, where only the nearest one is too large for the dtype.
    most = min(float(jnp.finfo(x).max) for x in (np.float32, dtype))
    overflows = (jnp.abs(values) > most) & (jnp.abs(array) <= most)
    units = dataclasses.replace(leaf, integers=ones).materialize()
    largest = jnp.copysign(jnp.floor(most / units), values)
    integers = jnp.where(overflows, largest, leaf.integers)
    rounded = dataclasses.replace(leaf, integers=integers)
    values = rounded.materialize()
  else:
    rounded, step = steps.round_to_power_of_two(array, rms, log2_step, dtype)
    values = rounded.astype(jnp.float32)
  finite = jnp.isfinite(array)
  squares = jnp.square(jnp.where(finite, values - array, 0)).sum()
  norm = jnp.square(jnp.where(finite, array, 0)).sum()
  patterns = jax.lax.bitcast_convert_type(jnp.abs(array), jnp.int32)
  exponents = jnp.maximum((patterns >> 23) - 127, steps.least_exponent(dtype))
  saved = jnp.log2(step) - (exponents - jnp.finfo(dtype).nmant)
  bits = jnp.where(array != 0, jnp.maximum(saved, 0), 0).sum()
  return rounded, Effect(step, squares, norm, bits)


def is_matrix(array: Any) -> bool:
  """Tells whether an array has several rows and several columns."""
  return array.ndim > 1 and min(array.shape[-2:]) > 1

r"""Rounding to multiples of a step, also with error feedback.

The step of an array is a fraction of its typical size, the root mean square of its
elements, see `typical_size`.

**Error feedback.** A kernel W `[n, m]` is applied to inputs x as `x W`. Let Q be the
rounded kernel, and `E = W - Q`. The mean square of the error `x E` of the outputs is
`tr(E^T H E)`, where `H = mean(x^T x)` are the second moments of the inputs. With
`H = L D L^T`, L unit lower triangular and D diagonal, it is

    sum_i D_i |E_i + sum_{j > i} L_ji E_j|^2

So rows are rounded from the last to the first, and row i is rounded to the multiple of
the step that is nearest to

    W_i + sum_{j > i} L_ji (W_j - Q_j)

Each square is then that of one rounding error, and no other factorisation of H has a
smaller trace of D. The rows of inputs with large moments come first, because the errors
of later rows can make up for theirs. Blocks of rows are updated by one product.

**A step per row and column.** If output j counts g_j times, the mean square of the
error is `sum_ij D_i g_j d_ij^2 / 12` for steps d_ij. With the mean of `log2 d_ij`
fixed, and so the bits of an entropy coder, it is least for `d_ij = d / sqrt(D_i g_j)`.
So rows have steps by the pivots D_i, and columns by g_j. They are divided by their
factors first, which scales H and L; then the rule above goes on with one step.

References:
  Frantar et al., GPTQ, arXiv 2210.17323: the rule, by the inverse of H.
  Chee et al., QuIP, arXiv 2307.13304, section 3: the rule in the form above.
  Lifar et al., WaterSIC, arXiv 2603.04956: steps of rows by the pivots.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured
from rotbits_jax.symmetries import products

_PIECE = 1 << 18  # elements that are measured together
_BLOCK = 128  # number of rows that are updated together
_DAMPING = 0.01  # of the mean moment, so no pivot is close to 0
_ROUNDS = 8  # of removing outliers
_LEAST_COUNT = 0.01  # of the mean, because sensitivities are measured on little text
_MOST_OCTAVES = 3  # of a line's step from that of its matrix

_matmul = products.matmul


def typical_size(array: jax.Array) -> jax.Array:
  """Returns the rms of the elements of a float32 array, without zeros and outliers.

  Structure makes zeros. If the rms is more than twice the mean magnitude, a few
  elements make most of the squares: those above 8 mean magnitudes are outliers, and are
  removed until there are none. (In a normal distribution, rms / mean is 1.25.)

  >>> int(typical_size(jnp.array([1.0, -1.0, 0.0, jnp.inf])))
  1
  """

  def measure(limit: jax.Array) -> _Size:
    """Measures the magnitudes up to a limit."""
    scale = _greatest(array, limit)
    # No square is infinite after the division, and not all squares are zero.
    scale = jnp.where(scale > 0, scale, 1)
    count, total, squares = _sums(array, limit, scale)
    count = jnp.maximum(count, 1).astype(jnp.float32)
    rms = jnp.sqrt(squares / count)
    mean = total / count
    is_uneven = (rms > 2 * mean) & (8 * mean < 1)
    return _Size(scale * rms, limit, jnp.where(is_uneven, 8 * mean * scale, limit))

  def has_outliers(state: tuple[_Size, jax.Array]) -> jax.Array:
    size, rounds = state
    return (size.next_limit < size.limit) & (rounds < _ROUNDS)

  def remove_outliers(state: tuple[_Size, jax.Array]) -> tuple[_Size, jax.Array]:
    size, rounds = state
    return measure(size.next_limit), rounds + 1

  largest = jnp.float32(jnp.finfo(jnp.float32).max)
  start = measure(largest), jnp.int32(0)
  size, _ = jax.lax.while_loop(has_outliers, remove_outliers, start)
  return size.rms


class _Size(NamedTuple):
  """The size of magnitudes up to a limit, float32 [] each."""

  rms: jax.Array
  limit: jax.Array
  next_limit: jax.Array  # the limit without outliers; the same if there are none


def _greatest(array: jax.Array, limit: jax.Array) -> jax.Array:
  """Returns the greatest magnitude up to a limit; 0 if there is none."""

  def larger(greatest: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.maximum(greatest, jnp.where(x <= limit, x, 0).max(initial=0))

  return _fold(array, larger, jnp.float32(0))


def _sums(
  array: jax.Array, limit: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sums nonzero magnitudes up to a limit, divided by the scale.

  Returns their number, int32, their sum, and the sum of their squares.
  """

  def add(sums: tuple[jax.Array, ...], x: jax.Array) -> tuple[jax.Array, ...]:
    kept = jnp.where(x <= limit, x, 0)
    sizes = kept / scale
    count = (kept > 0).sum(dtype=jnp.int32)
    return jax.tree.map(jnp.add, sums, (count, sizes.sum(), jnp.square(sizes).sum()))

  return _fold(array, add, (jnp.int32(0), jnp.float32(0), jnp.float32(0)))


def _fold(
  array: jax.Array, function: Callable[[Any, jax.Array], Any], start: Any
) -> Any:
  """Folds a function over the magnitudes of pieces of an array, so XLA copies none.

  Args:
    array: float32, of any shape.
    function: takes what is folded so far, and magnitudes with zeros among them.
    start: what is folded at first.
  """
  flat = array.reshape(-1)
  size = min(flat.size, _PIECE)

  def step(i: jax.Array, folded: Any) -> Any:
    begin = jnp.minimum(i * size, flat.size - size)
    piece = jax.lax.dynamic_slice(flat, (begin,), (size,))
    # The last piece begins in the one before it.
    is_new = begin + jnp.arange(size) >= i * size
    return function(folded, jnp.where(is_new, jnp.abs(piece), 0))

  return jax.lax.fori_loop(0, -(-flat.size // max(size, 1)), step, start)


def quarter_step(rms: jax.Array, log2_step: jax.Array) -> jax.Array:
  """Returns the number (4 + i) 2^(q - 2), i < 4, closest to `rms 2^log2_step`.

  Its mantissa is short, so few multiples need float32.
  """
  target = jnp.clip(jnp.log2(rms) + log2_step, -120.0, 110.0)
  return structured.line_factors(_quarters(target))


def _quarters(log2: jax.Array) -> jax.Array:
  """Returns 4 q + i of the numbers (4 + i) 2^(q - 2), i < 4, closest to given ones."""
  q = jnp.floor(log2)
  # In the middle between two of these in log2 are the roots of 4 * 5, 5 * 6, ...
  middles = jnp.log2(jnp.sqrt(jnp.float32([20, 30, 42, 56])) / 4)
  i = ((log2 - q)[..., None] > middles).sum(axis=-1)
  return 4 * q.astype(jnp.int32) + i


def multiples(array: jax.Array, step: jax.Array) -> jax.Array:
  """Returns the nearest multiples of a step, in the shape of the array."""
  steps = jnp.rint(array / step)
  # This turns -0 into 0. Adding 0 would not, because XLA replaces x + 0 by x.
  return jnp.where(steps == 0, 0, steps * step)


def round_to_power_of_two(
  array: jax.Array, rms: jax.Array, log2_step: jax.Array, dtype: np.dtype
) -> tuple[jax.Array, jax.Array]:
  """Rounds an array to multiples of 2^floor(log2(rms) + log2_step), and to its dtype.

  Args:
    array: float32, of any shape.
    rms: the typical size of its elements, float32 `[]`.
    log2_step: the logarithm of the step, in units of the typical size, float32 `[]`.
    dtype: that of the result.

  Returns:
    The rounded array; and the step, 0 if all elements are in the dtype already.
  """
  q = jnp.floor(jnp.log2(rms) + log2_step)
  nearest = array.astype(dtype)
  # The dtype has no finer step, and the inverse of 2^q must be a float32.
  least = max(least_exponent(dtype) - jnp.finfo(dtype).nmant, -126)
  step = jnp.ldexp(jnp.float32(1), jnp.clip(q, least, 126).astype(jnp.int32))
  # Beyond, the dtype itself is coarser.
  is_small = jnp.abs(array) < step * (1 << jnp.finfo(dtype).nmant + 1)
  result = jnp.where(is_small, multiples(array, step).astype(dtype), nearest)
  same = jnp.all((nearest.astype(jnp.float32) == array) | jnp.isnan(array))
  return jnp.where(same, nearest, result), jnp.where(same, 0, step)


def least_exponent(dtype: np.dtype) -> int:
  """Returns the exponent of the smallest normal number of a dtype."""
  return int(np.log2(float(jnp.finfo(dtype).smallest_normal)))


@functools.partial(jax.jit, static_argnames='axis')
def quantize(
  array: jax.Array,
  step: jax.Array,
  moments: jax.Array | None = None,
  outputs: jax.Array | None = None,
  *,
  axis: int = 0,
) -> structured.UniformlyQuantized:
  """Rounds an array to multiples of a step, or of a step per row and column.

  There is no feedback if the moments are None or not finite. Zeros remain, because
  structure makes them. The integers of the leaf are float32: an outlier may have more
  than 2^31 steps.

  >>> kernel, moments = jnp.full((4, 1), 0.4), jnp.ones((4, 4))  # inputs are equal
  >>> quantize(kernel, jnp.float32(1), moments).integers.sum().tolist()  # from 1.6
  2.0

  Args:
    array: float32 `[n, m]`, or `[m, n]` if the axis is 1; any without moments.
    step: float32 `[]`; with outputs, about the geometric mean of the steps.
    moments: H or its multiple, float32 `[n, n]`; None for no feedback.
    outputs: g, float32 `[m]`; None for one step.
    axis: the axis of the inputs, 0 or 1.

  Returns:
    The integers and steps.

  Raises:
    ValueError: if the moments have another shape.
  """
  if moments is None:
    integers = jnp.rint(array / step)
    integers = jnp.where(integers == 0, 0, integers)  # -0 becomes 0
    return structured.UniformlyQuantized(integers, step, 'float32')
  kernel = array if axis == 0 else array.T
  if moments.shape != (len(kernel), len(kernel)):
    raise ValueError(f'moments must be [n, n], got {moments.shape=}, {array.shape=}')
  order, lower, pivots = _factors(moments)
  rows = kernel[order]
  axis_exponents: list[jax.Array | None] = [None, None]
  if outputs is not None:
    of_inputs = _exponents(pivots)
    of_outputs = _exponents(outputs)
    factors = structured.line_factors(of_inputs)
    rows = rows / (factors[:, None] * structured.line_factors(of_outputs))
    lower = lower * (factors[:, None] / factors)
    axis_exponents = [jnp.zeros_like(of_inputs).at[order].set(of_inputs), of_outputs]
  rounded = jnp.rint(_round_rows(rows, step, lower) / step)
  integers = jnp.zeros_like(kernel).at[order].set(rounded)
  if axis == 1:
    integers = integers.T
    axis_exponents = axis_exponents[::-1]
  return structured.UniformlyQuantized(integers, step, 'float32', *axis_exponents)


def _exponents(counts: jax.Array) -> jax.Array:
  """Returns exponents for steps in proportion to `counts^(-1/2)`, int8."""
  damped = jnp.maximum(counts, 0) + _LEAST_COUNT * jnp.mean(counts)
  log2 = -jnp.log2(damped) / 2
  is_known = jnp.isfinite(log2)  # others count as the mean
  centred = jnp.where(is_known, log2 - jnp.mean(log2, where=is_known), 0)
  limited = jnp.clip(centred, -_MOST_OCTAVES, _MOST_OCTAVES)
  return _quarters(limited).astype(jnp.int8)


def _factors(moments: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the order of the inputs; and L and the diagonal of D in this order."""
  count = len(moments)
  diagonal = jnp.diagonal(moments)
  order = jnp.argsort(diagonal)  # the last row is rounded first
  mean = jnp.mean(diagonal)
  damping = _DAMPING * jnp.where(mean > 0, mean, 1)
  damped = moments[order][:, order] + damping * jnp.eye(count, dtype=jnp.float32)
  lower = jnp.linalg.cholesky(damped)
  roots = jnp.diagonal(lower)
  lower = lower / roots
  is_finite = jnp.isfinite(lower).all()
  lower = jnp.where(is_finite, lower, jnp.eye(count, dtype=jnp.float32))
  return order, lower, jnp.where(is_finite, jnp.square(roots), 1)


def _round_rows(rows: jax.Array, step: jax.Array, lower: jax.Array) -> jax.Array:
  """Rounds rows `[n, m]` from the last to the first, given L `[n, n]`, see above."""
  count, width = rows.shape
  # Rows of zeros in front fill the first block.
  padding = -count % _BLOCK
  lower = jnp.pad(lower, ((padding, 0), (padding, 0)))
  rows = jnp.pad(rows, ((padding, 0), (0, 0)))

  def round_block(errors: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds rows, given the errors of the rows after them, `[n, m]`."""
    columns = jax.lax.dynamic_slice_in_dim(lower, start, _BLOCK, axis=1)
    below = jax.lax.dynamic_slice_in_dim(columns, start, _BLOCK)
    block = jax.lax.dynamic_slice_in_dim(rows, start, _BLOCK)
    wanted = block + _matmul(columns.T, errors)

    def round_row(
      k: jax.Array, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
      rounded_rows, block_errors = carry
      i = _BLOCK - 1 - k
      after = jnp.where(jnp.arange(_BLOCK) > i, below[:, i], 0)
      rounded = multiples(wanted[i] + _matmul(after, block_errors), step)
      rounded = jnp.where(block[i] == 0, 0, rounded)
      error = block[i] - rounded
      error = jnp.where(jnp.isfinite(error), error, 0)
      return rounded_rows.at[i].set(rounded), block_errors.at[i].set(error)

    zeros = jnp.zeros((_BLOCK, width), jnp.float32)
    rounded_rows, block_errors = jax.lax.fori_loop(0, _BLOCK, round_row, (zeros, zeros))
    errors = jax.lax.dynamic_update_slice_in_dim(errors, block_errors, start, axis=0)
    return errors, rounded_rows

  starts = jnp.arange(0, count + padding, _BLOCK)
  _, blocks = jax.lax.scan(round_block, jnp.zeros_like(rows), starts, reverse=True)
  return blocks.reshape(-1, width)[padding:]

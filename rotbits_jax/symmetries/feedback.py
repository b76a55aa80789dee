r"""Rounding with error feedback: an output sees less of the errors of a kernel.

A kernel W `[n, m]` is applied to inputs x as `x W`. Let Q be the rounded kernel, and
`E = W - Q`. The mean square of the error `x E` of the outputs is `tr(E^T H E)`, where
`H = mean(x^T x)` are the second moments of the inputs. With `H = L D L^T`, L unit lower
triangular and D diagonal, it is

    sum_i D_i |E_i + sum_{j > i} L_ji E_j|^2

So rows are rounded from the last to the first, and row i is rounded to the multiple of
the step that is nearest to

    W_i + sum_{j > i} L_ji (W_j - Q_j)

Each square is then that of one rounding error, and no other factorisation of H has a
smaller trace of D. The rows of inputs with large moments come first, because the errors
of later rows can make up for theirs. Blocks of rows are updated by one product.

References:
  Frantar et al., GPTQ, arXiv 2210.17323: the rule, by the inverse of H.
  Chee et al., QuIP, arXiv 2307.13304, section 3: the rule in the form above.
"""

import functools

import jax
import jax.numpy as jnp

from rotbits_jax.symmetries import products

_BLOCK = 128  # number of rows that are updated together
_DAMPING = 0.01  # of the mean moment, so that no pivot is close to 0

_matmul = products.matmul


@functools.partial(jax.jit, static_argnames='axis')
def round_to_steps(
  array: jax.Array, step: jax.Array, moments: jax.Array, *, axis: int = 0
) -> jax.Array:
  """Rounds a matrix to multiples of a step with error feedback.

  Args:
    array: float32 `[n, m]`, or `[m, n]` if `axis` is 1.
    step: float32 `[]`, positive.
    moments: float32 `[n, n]`, sums or means of products of the inputs. If they are not
      finite, there is no feedback.
    axis: the axis of the inputs.

  Returns:
    UniformlyQuantized of the step, float32 with the shape of the array.
  """
  kernel = array if axis == 0 else array.T
  count, width = kernel.shape
  diagonal = jnp.diagonal(moments)
  order = jnp.argsort(diagonal)  # the last row is rounded first
  mean = jnp.mean(diagonal)
  damping = _DAMPING * jnp.where(mean > 0, mean, 1)
  damped = moments[order][:, order] + damping * jnp.eye(count)
  lower = jnp.linalg.cholesky(damped)
  lower = lower / jnp.diagonal(lower)
  lower = jnp.where(jnp.isfinite(lower).all(), lower, jnp.eye(count))
  # Rows of zeros in front fill the first block.
  padding = -count % _BLOCK
  lower = jnp.pad(lower, ((padding, 0), (padding, 0)))
  rows = jnp.pad(kernel[order], ((padding, 0), (0, 0)))

  def round_block(errors: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds rows, given the errors of the rows after them, `[n, m]`."""
    columns = jax.lax.dynamic_slice_in_dim(lower, start, _BLOCK, axis=1)
    own = jax.lax.dynamic_slice_in_dim(columns, start, _BLOCK)
    given = jax.lax.dynamic_slice_in_dim(rows, start, _BLOCK)
    wanted = given + _matmul(columns.T, errors)

    def round_row(
      k: jax.Array, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
      found, block_errors = carry
      i = _BLOCK - 1 - k
      after = jnp.where(jnp.arange(_BLOCK) > i, own[:, i], 0)
      rounded = multiples(wanted[i] + _matmul(after, block_errors), step)
      return found.at[i].set(rounded), block_errors.at[i].set(given[i] - rounded)

    zeros = jnp.zeros((_BLOCK, width))
    found, block_errors = jax.lax.fori_loop(0, _BLOCK, round_row, (zeros, zeros))
    errors = jax.lax.dynamic_update_slice_in_dim(errors, block_errors, start, axis=0)
    return errors, found

  starts = jnp.arange(0, count + padding, _BLOCK)
  _, blocks = jax.lax.scan(round_block, jnp.zeros_like(rows), starts, reverse=True)
  found = blocks.reshape(-1, width)[padding:]
  found = jnp.zeros_like(kernel).at[order].set(found)
  return found if axis == 0 else found.T


def multiples(array: jax.Array, step: jax.Array) -> jax.Array:
  """Returns the nearest multiples of a step, in the shape of the array."""
  steps = jnp.rint(array / step)
  # This turns -0 into 0. Adding 0 would not, because XLA replaces x + 0 by x.
  return jnp.where(steps == 0, 0, steps * step)

"""The Fisher information of the predictions, as products of two factors.

For the kernel of a linear layer they are the second moments A `[in, in]` of its inputs,
and the mean squares g `[out]` of the gradients at its outputs. The loss is that of
tokens that are drawn from the predictions. Sums are over the tokens of a batch.

References:
  Martens and Grosse, arXiv 1503.05671: K-FAC.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rotbits_jax import structured
from rotbits_jax.models import config as config_lib
from rotbits_jax.models import transformer


def second_moments(x: jax.Array) -> jax.Array:
  """Returns the sum of `x^T x` over all vectors x `[n]` of an array, `[n, n]`."""
  rows = x.reshape(-1, x.shape[-1])
  return rows.T @ rows


@functools.partial(jax.jit, static_argnums=1)
def of_predictions(
  outer: Any,  # the parameters outside the layers
  config: config_lib.ModelConfig,
  x: jax.Array,  # the last residual stream, float32 [B, T, d]
  key: jax.Array,  # draws a token from each prediction
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
  """Returns the gradient at x, and sums: A of the head, g, and the probabilities."""
  with jax.default_matmul_precision('highest'):
    unembed = lambda x: transformer.unembed(outer, config, x)[::-1]
    logits, pull, normed = jax.vjp(unembed, x, has_aux=True)
    p = jax.nn.softmax(logits)
    drawn = jax.random.categorical(key, logits)
    (gradient,) = pull(p - jax.nn.one_hot(drawn, p.shape[-1]))
    moments = second_moments(normed)
  # The mean over all tokens that may be drawn has no noise.
  squares = p * (1 - p)
  return gradient, (moments, squares.sum((0, 1)), p.sum((0, 1)))


@functools.partial(jax.jit, static_argnums=1)
def of_layer(
  params: Any,  # of the layer, unstacked
  config: config_lib.ModelConfig,
  x: jax.Array,  # its input, float32 [B, T, d]
  gradient: jax.Array,  # that at its output
) -> tuple[jax.Array, Any]:
  """Returns the gradient at x, and sums: A by the paths that share it, g by path."""
  flat = structured.flatten(params)
  zeros = {
    path: jnp.zeros((*x.shape[:2], leaf.shape[-1]), jnp.float32)
    for path, leaf in flat.items()
    if path.endswith('/kernel')
  }

  def apply(x: jax.Array, added: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
    # An array that is added to a bias of each token is added to its output.
    biased = dict(flat)
    for path, addend in added.items():
      bias = f'{path.removesuffix("kernel")}bias'
      old = structured.materialize(flat[bias]) if bias in flat else 0.0
      biased[bias] = addend + old
    written = transformer.layer(structured.unflatten(biased), config, x)
    inputs = structured.flatten(written.inputs)
    shared: dict[int, list[str]] = {}
    for path, kernel_input in inputs.items():
      shared.setdefault(id(kernel_input), []).append(path)
    moments = {tuple(x): second_moments(inputs[x[0]]) for x in shared.values()}
    return written.x, moments

  with jax.default_matmul_precision('highest'):
    _, pull, moments = jax.vjp(apply, x, zeros, has_aux=True)
    at_input, at_outputs = pull(gradient)
  squares = {path: jnp.square(g).sum((0, 1)) for path, g in at_outputs.items()}
  return at_input, (moments, squares)


@functools.partial(jax.jit, static_argnums=3)
def divergence(
  exact: Any,  # a matrix or a leaf, [in, out]; [out, in] if the axis is 1
  rounded: Any,
  moments: jax.Array,  # A
  axis: int,  # of the inputs
  outputs: jax.Array,  # g
) -> jax.Array:
  """Returns about the divergence in nats that rounding a matrix causes."""
  exact, rounded = structured.materialize((exact, rounded))
  # Tokens that no text has may have other numbers, which are kept.
  error = jnp.where(jnp.isfinite(exact), exact - rounded, 0)
  error = error if axis == 0 else error.T
  product = jnp.matmul(moments, error, precision='highest')
  return outputs @ (error * product).sum(axis=0) / 2

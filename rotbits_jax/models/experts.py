"""The forward pass of a mixture of experts.

Reference: Mixtral of Experts, arXiv 2401.04088, section 2.1. Shape letters are those of
`models.transformer`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rotbits_jax import structured
from rotbits_jax.models import config as config_lib
from rotbits_jax.models import linear
from rotbits_jax.models import model as model_lib


def mixture(
  params: model_lib.Params,
  config: config_lib.ModelConfig,
  x: jax.Array,
  activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Computes a mixture of experts: all experts, of which most have the weight 0.

  Args:
    params: the parameters of the sublayer.
    config: sizes and switches.
    x: `[B, T, d]` float32, the normed input.
    activation: the function between the kernels of an expert.

  Returns:
    The update of the residual stream.
  """
  every = weights(params['router'], config, x)
  kernels = [params[name]['kernel'] for name in ('gate', 'up', 'down')]
  kernels = [linear.float32(k) if structured.is_structured(k) else k for k in kernels]

  def add(total: jax.Array, own: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    gate, up, down, weight = map(linear.float32, own)
    hidden = activation(x @ gate) * (x @ up)
    return total + weight[..., None] * (hidden @ down), None

  # One after the other: side by side, their hidden states would take much memory.
  stacked = (*map(jnp.asarray, kernels), jnp.moveaxis(every, -1, 0))
  update, _ = jax.lax.scan(add, jnp.zeros_like(x), stacked)
  return update


def weights(
  params: model_lib.Params, config: config_lib.ModelConfig, x: jax.Array
) -> jax.Array:
  """Computes the weight of every expert for every token.

  It is the softmax of the router's output for the `experts_per_token` greatest, divided
  by their sum if `unit_expert_weights` is set, and 0 for the others.

  Args:
    params: the router.
    config: sizes and switches.
    x: `[B, T, d]` float32, the normed input.

  Returns:
    `[B, T, E]` float32.
  """
  every = jax.nn.softmax(linear.apply(params, x), axis=-1)
  greatest, places = jax.lax.top_k(every, config.experts_per_token)
  if config.unit_expert_weights:
    greatest = greatest / jnp.sum(greatest, axis=-1, keepdims=True)
  chosen = jax.nn.one_hot(places, config.num_experts)  # [B, T, experts_per_token, E]
  return jnp.einsum('btk,btke->bte', greatest, chosen)

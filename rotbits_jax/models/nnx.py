"""The forward pass as a Flax NNX module.

    module = nnx.Transformer(model.config, model.params)
    logits = module(tokens)
    trained = dataclasses.replace(model, params=module.to_params())

The module has a variable for each array of a model and calls `models.forward`.
"""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from rotbits_jax.models import config as config_lib
from rotbits_jax.models import model as model_lib
from rotbits_jax.models import transformer


class Transformer(nnx.Module):
  """A dense or sliced transformer.

  Attributes:
    config: sizes and switches.
    params: nested like `Model.params`, with a variable for each array: an `nnx.Param`,
      or an `nnx.Variable` for the integers of a structured leaf.
  """

  def __init__(self, config: config_lib.ModelConfig, params: model_lib.Params):
    self.config = config
    self.params = nnx.data(jax.tree.map(_variable, params))

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps `[B, T]` tokens to `[B, T, V]` float32 logits."""
    return transformer.forward(self.to_params(), self.config, tokens)

  def to_params(self) -> model_lib.Params:
    """Returns the present parameters, as `Model.params` has them."""
    is_variable = lambda x: isinstance(x, nnx.Variable)
    return jax.tree.map(lambda x: x[...], self.params, is_leaf=is_variable)


def _variable(array: Any) -> nnx.Variable[Any]:
  floating = jnp.issubdtype(array.dtype, jnp.floating)
  return (nnx.Param if floating else nnx.Variable)(jnp.asarray(array))

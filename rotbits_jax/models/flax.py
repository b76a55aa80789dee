"""The forward pass as Flax modules, in Linen and in NNX.

    module = flax.LinenTransformer.like(model)
    logits = module.apply({'params': model.params}, tokens)

    module = flax.NnxTransformer(model.config, model.params)
    logits = module(tokens)
    trained = dataclasses.replace(model, params=module.to_params())

The modules have the parameters of a model under the same paths.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp

from rotbits_jax import structured
from rotbits_jax.models import config as config_lib
from rotbits_jax.models import model as model_lib
from rotbits_jax.models import transformer


class LinenTransformer(nn.Module):
  """A dense or sliced transformer, whose `init` draws kernels and tables at random.

  Attributes:
    config: sizes and switches.
    specs: shape and dtype of each parameter, nested like `Model.params`; None for plain
      float32 arrays in the fewest stacks of layers.
  """

  config: config_lib.ModelConfig
  specs: Any = None

  @classmethod
  def like(cls, model: model_lib.Model) -> 'LinenTransformer':
    """Returns the module whose parameters are those of a model."""
    return cls(model.config, jax.eval_shape(lambda: model.params))

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps `[B, T]` tokens to `[B, T, V]` float32 logits."""
    specs = self.specs
    if specs is None:
      shapes = model_lib.stacked_shapes(self.config)
      specs = structured.unflatten(
        {path: jax.ShapeDtypeStruct(x, jnp.float32) for path, x in shapes.items()}
      )
    params = {name: _Params(subtree, name=name)() for name, subtree in specs.items()}
    return transformer.forward(params, self.config, tokens)


class _Params(nn.Module):
  """The parameters below one key; see `LinenTransformer`."""

  specs: Any

  @nn.compact
  def __call__(self) -> model_lib.Params:
    return {
      name: _Params(subtree, name=name)()
      if isinstance(subtree, Mapping)
      else self.param(name, _initial, name, subtree)
      for name, subtree in self.specs.items()
    }


def _initial(key: jax.Array, name: str, spec: Any) -> Any:
  """Draws a parameter: scales are one, biases and structured leaves zero."""
  if name == 'bias' or structured.is_structured(spec):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec)
  if name == 'scale':
    return jnp.ones(spec.shape, spec.dtype)
  deviation = spec.shape[-2] ** -0.5 if name == 'kernel' else 0.02
  return deviation * jax.random.normal(key, spec.shape, spec.dtype)


class NnxTransformer(nnx.Module):
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
  """Returns the variable of an array."""
  floating = jnp.issubdtype(array.dtype, jnp.floating)
  return (nnx.Param if floating else nnx.Variable)(jnp.asarray(array))

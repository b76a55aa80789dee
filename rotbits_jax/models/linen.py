"""The forward pass as a Flax Linen module.

    module = linen.Transformer.like(model)
    logits = module.apply({'params': model.params}, tokens)

The module has the parameters of a model under the same paths and calls
`models.forward`.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from rotbits_jax import structured
from rotbits_jax.models import config as config_lib
from rotbits_jax.models import model as model_lib
from rotbits_jax.models import shapes as shapes_lib
from rotbits_jax.models import transformer


class Transformer(nn.Module):
  """A dense or sliced transformer.

  `init` draws kernels and tables at random. Scales are one; biases, and the arrays of
  structured leaves, are zero.

  Attributes:
    config: sizes and switches.
    specs: shape and dtype of each parameter, nested like `Model.params`; None for plain
      float32 arrays in the fewest stacks of layers.
  """

  config: config_lib.ModelConfig
  specs: Any = None

  @classmethod
  def like(cls, model: model_lib.Model) -> 'Transformer':
    """Returns the module whose parameters are those of a model."""
    return cls(model.config, jax.eval_shape(lambda: model.params))

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps `[B, T]` tokens to `[B, T, V]` float32 logits."""
    specs = self.specs
    if specs is None:
      shapes = shapes_lib.stacked_shapes(self.config)
      specs = structured.unflatten(
        {path: jax.ShapeDtypeStruct(x, jnp.float32) for path, x in shapes.items()}
      )
    params = {name: _Params(own, name=name)() for name, own in specs.items()}
    return transformer.forward(params, self.config, tokens)


class _Params(nn.Module):
  """The parameters below one key; see `Transformer`."""

  specs: Any

  @nn.compact
  def __call__(self) -> model_lib.Params:
    return {
      name: _Params(own, name=name)()
      if isinstance(own, Mapping)
      else self.param(name, _initial, name, own)
      for name, own in self.specs.items()
    }


def _initial(key: jax.Array, name: str, spec: Any) -> Any:
  if name == 'bias' or structured.is_structured(spec):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec)
  if name == 'scale':
    return jnp.ones(spec.shape, spec.dtype)
  deviation = spec.shape[-2] ** -0.5 if name == 'kernel' else 0.02
  return deviation * jax.random.normal(key, spec.shape, spec.dtype)

"""The forward pass as Flax modules, in Linen and in NNX.

    module = flax.LinenTransformer.like(model)
    logits = module.apply({'params': model.params}, tokens)

    module = flax.NnxTransformer(model.config, model.params)
    logits = module(tokens)
    trained = dataclasses.replace(model, params=module.to_params())

The modules have the parameters of a model under the same paths. A linear layer is a
module, in which qwix looks for its kernel.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp

from rotbits_jax.models import config as config_lib
from rotbits_jax.models import layout
from rotbits_jax.models import model as model_lib
from rotbits_jax.models import names
from rotbits_jax.models import transformer


def _logits(
  outer: model_lib.Params,
  config: config_lib.ModelConfig,
  tokens: jax.Array,
  layers: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Computes logits by the parameters outside the layers, and the layers."""
  with jax.default_matmul_precision('highest'):
    # A tied embedding needs the kernel of the head.
    head = {'head': outer['head'].params()} if 'head' in outer else {}
    x = layers(transformer.embed(outer | head, config, tokens))
    return transformer.unembed(outer, config, x)[1]


# ---- Linen ---------------------------------------------------------------------------


class LinenTransformer(nn.Module):
  """A dense or sliced transformer, whose `init` returns zeros."""

  config: config_lib.ModelConfig
  specs: Any  # shape and dtype of each parameter, nested like `Model.params`

  @classmethod
  def like(cls, model: model_lib.Model) -> 'LinenTransformer':
    """Returns the module whose parameters are those of a model."""
    return cls(model.config, jax.eval_shape(lambda: model.params))

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps `[B, T]` tokens to `[B, T, V]` float32 logits."""
    stacks = {
      names.stack(x): len(x) for x in layout.check_params(self.specs, self.config)
    }
    outer = {k: _module(x, k) for k, x in self.specs.items() if k not in stacks}

    def apply_layer(params: Any, x: jax.Array) -> tuple[jax.Array, None]:
      return transformer.layer(params, self.config, x).x, None

    def layers(x: jax.Array) -> jax.Array:
      for name, count in stacks.items():
        spec_of = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        arguments = jax.tree.map(spec_of, self.specs[name]), apply_layer
        axes: dict[str, Any] = {
          'variable_axes': {'params': 0},
          'split_rngs': {'params': True},
        }
        if count > 1:
          x = nn.scan(_Linen, **axes, length=count)(*arguments, name=name)(x)[0]
        else:  # the layer may change the width, which a scan cannot
          layer = nn.vmap(_Linen, in_axes=None, **axes, axis_size=1)
          x = layer(*arguments, name=name)(x)[0][0]
      return x

    return _logits(outer, self.config, tokens, layers)


class _Linen(nn.Module):
  """Parameters below one key, and the function that they are for."""

  specs: Any
  function: Callable[[Any, jax.Array], Any] = transformer.linear

  @nn.compact
  def __call__(self, x: Any = None) -> Any:
    """Returns the function of x; without x, the parameters."""
    zeros = lambda key, spec: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec)
    params = {
      name: _module(spec, name)
      if isinstance(spec, Mapping)
      else self.param(name, zeros, spec)
      for name, spec in self.specs.items()
    }
    return params if x is None else self.function(params, x)

  params = __call__


def _module(specs: Any, name: str) -> Any:
  """Returns the module of a linear layer, or other parameters in nested dicts."""
  module = _Linen(specs, name=name)
  return module if 'kernel' in specs else module()


# ---- NNX -----------------------------------------------------------------------------


class NnxTransformer(nnx.Module):
  """A dense or sliced transformer.

  Attributes:
    config: sizes and switches.
    parts: modules with the parameters below the keys of `Model.params`; a list of one
      for each layer of a stack. There is a variable for each array, an `nnx.Param`, or
      an `nnx.Variable` for the integers of a structured leaf.
  """

  def __init__(self, config: config_lib.ModelConfig, params: model_lib.Params):
    self.config = config
    parts: dict[str, Any] = {}
    stacks = {names.stack(x): x for x in layout.check_params(params, config)}
    for key, x in params.items():
      layers = (model_lib.unstack_layer(x, i) for i in range(len(stacks.get(key, ()))))
      parts[key] = [_Nnx(layer) for layer in layers] or _Nnx(x)
    self.parts = nnx.data(parts)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps `[B, T]` tokens to `[B, T, V]` float32 logits."""
    outer = {k: x.part() for k, x in self.parts.items() if isinstance(x, _Nnx)}

    def layers(x: jax.Array) -> jax.Array:
      for stack in names.stacks(self.parts):
        of_stack: Any = self.parts[names.stack(stack)]
        for layer in of_stack:
          x = transformer.layer(layer.part(), self.config, x).x
      return x

    return _logits(outer, self.config, tokens, layers)

  def to_params(self) -> model_lib.Params:
    """Returns the present parameters, as `Model.params` has them."""
    return {
      key: x.params()
      if isinstance(x, _Nnx)
      else model_lib.stack_layers((layer.params() for layer in x), len(x))
      for key, x in self.parts.items()
    }


class _Nnx(nnx.Module):
  """Parameters below one key."""

  def __init__(self, params: Mapping[str, Any]):
    self.names = tuple(params)
    for name, x in params.items():
      part = _Nnx(x) if isinstance(x, Mapping) else jax.tree.map(_variable, x)
      setattr(self, name, nnx.data(part))

  def __call__(self, x: jax.Array) -> jax.Array:
    return transformer.linear(self.params(), x)

  def part(self) -> Any:
    """Returns the parameters in nested dicts, in which linear layers are modules."""
    return self if 'kernel' in self.names else self._map(_Nnx.part)

  def params(self) -> model_lib.Params:
    """Returns the parameters in nested dicts."""
    return self._map(_Nnx.params)

  def _map(self, function: Callable[['_Nnx'], Any]) -> model_lib.Params:
    is_variable = lambda x: isinstance(x, nnx.Variable)
    arrays = lambda x: jax.tree.map(lambda y: y[...], x, is_leaf=is_variable)
    parts = {name: getattr(self, name) for name in self.names}
    return {
      name: function(x) if isinstance(x, _Nnx) else arrays(x)
      for name, x in parts.items()
    }


def _variable(array: Any) -> nnx.Variable[Any]:
  floating = jnp.issubdtype(array.dtype, jnp.floating)
  return (nnx.Param if floating else nnx.Variable)(jnp.asarray(array))

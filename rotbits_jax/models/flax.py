"""The forward pass as Flax modules, in Linen and in NNX.

    module = flax.LinenTransformer.like(model)
    logits = module.apply({'params': model.params}, tokens)

    module = flax.NnxTransformer(model.config, model.params)
    logits = module(tokens)
    trained = dataclasses.replace(model, params=module.to_params())

The modules have the parameters of a model under the same paths.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp

from rotbits_jax import structured
from rotbits_jax.models import config as config_lib
from rotbits_jax.models import model as model_lib
from rotbits_jax.models import names
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
    stacks = {names.stack(x): len(x) for x in transformer.check(specs, self.config)}
    outer = {k: _parameters(x, k) for k, x in specs.items() if k not in stacks}

    def layers(x: jax.Array) -> jax.Array:
      for name, count in stacks.items():
        spec_of = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        arguments = self.config, jax.tree.map(spec_of, specs[name])
        axes: dict[str, Any] = {
          'variable_axes': {'params': 0},
          'split_rngs': {'params': True},
        }
        if count > 1:
          x = nn.scan(_Layer, **axes, length=count)(*arguments, name=name)(x)[0]
        else:  # the layer may change the width, which a scan cannot
          layer = nn.vmap(_Layer, in_axes=None, **axes, axis_size=1)
          x = layer(*arguments, name=name)(x)[0][0]
      return x

    return _logits(outer, self.config, tokens, layers)


class _Layer(nn.Module):
  """A layer, whose parameters have the names of an unstacked one."""

  config: config_lib.ModelConfig
  specs: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
    params = {name: _parameters(subtree, name) for name, subtree in self.specs.items()}
    return transformer.layer(params, self.config, x).x, None


class _Params(nn.Module):
  """The parameters below one key; see `LinenTransformer`."""

  specs: Any

  @nn.compact
  def __call__(self) -> model_lib.Params:
    return {
      name: _parameters(subtree, name)
      if isinstance(subtree, Mapping)
      else self.param(name, _initial, name, subtree)
      for name, subtree in self.specs.items()
    }


class _Linear(nn.Module):
  """A linear layer: the module in which qwix looks for its kernel."""

  specs: Any

  def setup(self) -> None:
    for name, spec in self.specs.items():
      setattr(self, name, self.param(name, _initial, name, spec))

  def __call__(self, x: jax.Array) -> jax.Array:
    return transformer.linear({name: getattr(self, name) for name in self.specs}, x)


def _parameters(specs: Any, name: str) -> Any:
  """Returns the module of a linear layer, or other parameters in nested dicts."""
  return _Linear(specs, name=name) if 'kernel' in specs else _Params(specs, name=name)()


def _logits(
  outer: model_lib.Params,
  config: config_lib.ModelConfig,
  tokens: jax.Array,
  layers: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Computes logits by the parameters outside the layers, and the layers."""
  with jax.default_matmul_precision('highest'):
    head = {'head': {'kernel': outer['head'].kernel}} if 'head' in outer else {}
    x = layers(transformer.embed(outer | head, config, tokens))
    return transformer.unembed(outer, config, x)[1]


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
    params: nested like `Model.params`, but with a list of layers for a stack. There is
      a variable for each array, an `nnx.Param`, or an `nnx.Variable` for the integers
      of a structured leaf; a linear layer is a module.
  """

  def __init__(self, config: config_lib.ModelConfig, params: model_lib.Params):
    self.config = config
    stacks = {names.stack(x): len(x) for x in transformer.check(params, config)}
    self.params = nnx.data(
      {
        key: [_variables(model_lib.unstack_layer(x, i)) for i in range(stacks[key])]
        if key in stacks
        else _variables(x)
        for key, x in params.items()
      }
    )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps `[B, T]` tokens to `[B, T, V]` float32 logits."""
    outer = {k: _arrays(x) for k, x in self.params.items() if not isinstance(x, list)}

    def layers(x: jax.Array) -> jax.Array:
      for stack in names.stacks(self.params):
        for params in self.params[names.stack(stack)]:
          x = transformer.layer(_arrays(params), self.config, x).x
      return x

    return _logits(outer, self.config, tokens, layers)

  def to_params(self) -> model_lib.Params:
    """Returns the present parameters, as `Model.params` has them."""
    return {
      key: model_lib.stack_layers(map(_plain, x), len(x))
      if isinstance(x, list)
      else _plain(x)
      for key, x in self.params.items()
    }


class _NnxLinear(nnx.Module):
  """A linear layer: the module in which qwix looks for its kernel."""

  def __init__(self, params: Mapping[str, Any]):
    self.names = tuple(params)
    for name, leaf in params.items():
      setattr(self, name, nnx.data(jax.tree.map(_variable, leaf)))

  def __call__(self, x: jax.Array) -> jax.Array:
    return transformer.linear(_plain(self), x)


def _variables(params: Any) -> Any:
  """Returns the variables and the modules of parameters in nested dicts."""
  if not isinstance(params, Mapping):
    return jax.tree.map(_variable, params)
  if 'kernel' in params:
    return _NnxLinear(params)
  return {name: _variables(x) for name, x in params.items()}


def _variable(array: Any) -> nnx.Variable[Any]:
  """Returns the variable of an array."""
  floating = jnp.issubdtype(array.dtype, jnp.floating)
  return (nnx.Param if floating else nnx.Variable)(jnp.asarray(array))


def _arrays(variables: Any) -> Any:
  """Returns the arrays of variables; modules stay."""
  is_leaf = lambda x: isinstance(x, nnx.Variable | _NnxLinear)
  array_of = lambda x: x[...] if isinstance(x, nnx.Variable) else x
  return jax.tree.map(array_of, variables, is_leaf=is_leaf)


def _plain(variables: Any) -> Any:
  """Returns parameters in nested dicts: the inverse of `_variables`."""
  if isinstance(variables, _NnxLinear):
    return {name: _arrays(getattr(variables, name)) for name in variables.names}
  if isinstance(variables, Mapping):
    return {name: _plain(x) for name, x in variables.items()}
  return _arrays(variables)

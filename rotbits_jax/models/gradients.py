"""How much the predictions of a model depend on the outputs of its linear layers.

The divergence that a small change of parameters causes is half its square in the Fisher
information of the predictions, the second moments of the gradient of a token's loss if
the token is drawn from the prediction itself. The gradient of a kernel is a sum of
products x g^T over the inputs x and the gradients g at the outputs; so the second
moments of x and of g approximate it, as in K-FAC.

Layers are differentiated one by one, from the last to the first. Only the residual
stream in front of each layer is kept meanwhile.

References:
  Martens and Grosse, arXiv 1503.05671: K-FAC.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rotbits_jax import structured
from rotbits_jax.models import config as config_lib
from rotbits_jax.models import model as model_lib
from rotbits_jax.models import names
from rotbits_jax.models import transformer


class Gradients(NamedTuple):
  """Sums over the tokens of a text.

  Attributes:
    outputs: the squares of the gradients at the outputs of each linear layer, float32
      `[out]`, by the path of its kernel as `Model.leaves` has it. The path of a head is
      'head/kernel', also if it is tied.
    embedding: the second moments of the gradient at an embedding, float32 `[d, d]`.
    probabilities: of each token of the vocabulary, float32 `[V]`.
  """

  outputs: dict[str, Any]
  embedding: Any
  probabilities: Any


def output_gradients(
  model: model_lib.Model, tokens: jax.Array, key: jax.Array
) -> Gradients:
  """Computes the second moments of the gradients of the model's own predictions.

  Args:
    model: the model, dense or sliced; it may have structured leaves.
    tokens: `[B, T]` integers.
    key: draws the tokens whose losses are differentiated.

  Returns:
    The sums over all tokens.
  """
  config, outer = model.config, model.outer()
  # A layer is taken out of its stack in the program, as a scan does, so that layers
  # share one.
  layers = [
    (model.params[names.stack(stack)], k, transformer.reach(config, i))
    for stack in model.stacks
    for k, i in enumerate(stack)
  ]
  streams = [_embed(outer, config, tokens)]
  for own in layers:
    streams.append(_layer(*own, config, streams[-1]))
  gradient, head, probabilities = _predictions(outer, config, streams.pop(), key)
  outputs = {'head/kernel': head}
  for i in reversed(range(config.num_layers)):
    gradient, squares = _backward(*layers[i], config, streams.pop(), gradient)
    outputs |= {names.prefix(i) + path: x for path, x in squares.items()}
  rows = gradient.reshape(-1, gradient.shape[-1])
  if config.scaled_embedding:
    rows = rows * config.hidden_size**0.5
  return Gradients(outputs, rows.T @ rows, probabilities)


@functools.partial(jax.jit, static_argnums=1)
def _embed(outer: Any, config: config_lib.ModelConfig, tokens: jax.Array) -> jax.Array:
  return transformer.embed(outer, config, tokens)


@functools.partial(jax.jit, static_argnums=3)
def _layer(
  stack: Any,
  index: jax.Array,
  reach: transformer.Reach,
  config: config_lib.ModelConfig,
  x: jax.Array,
) -> jax.Array:
  params = jax.tree.map(lambda x: x[index], stack)
  with jax.default_matmul_precision('highest'):
    return transformer.layer(params, config, x, reach).x


@functools.partial(jax.jit, static_argnums=1)
def _predictions(
  outer: Any, config: config_lib.ModelConfig, x: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradient at x, and sums of the head's squares and of probabilities."""
  with jax.default_matmul_precision('highest'):
    raw, pull = jax.vjp(lambda x: transformer.unembed(outer, config, x)[1], x)
    cap = lambda y: transformer.softcap(y, config.logit_softcap)
    logits, slope = jax.jvp(cap, (raw,), (jnp.ones_like(raw),))
    p = jax.nn.softmax(logits)
    drawn = jax.random.categorical(key, logits)
    (gradient,) = pull((p - jax.nn.one_hot(drawn, p.shape[-1])) * slope)
  # The mean over all tokens that may be drawn has no noise.
  squares = p * (1 - p) * jnp.square(slope)
  return gradient, squares.sum((0, 1)), p.sum((0, 1))


@functools.partial(jax.jit, static_argnums=3)
def _backward(
  stack: Any,
  index: jax.Array,
  reach: transformer.Reach,
  config: config_lib.ModelConfig,
  x: jax.Array,
  gradient: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the gradient at the input x of a layer, and the squares at its outputs."""
  flat = structured.flatten(jax.tree.map(lambda x: x[index], stack))
  kernels = [path for path in flat if path.endswith('/kernel')]
  zeros = {
    path: jnp.zeros((*x.shape[:2], flat[path].shape[-1]), jnp.float32)
    for path in kernels
  }

  def apply(x: jax.Array, added: dict[str, jax.Array]) -> jax.Array:
    # What is added to a bias of each token is added to its output.
    given = dict(flat)
    for path, own_zeros in added.items():
      bias = f'{path.removesuffix("kernel")}bias'
      old = structured.materialize(flat[bias]) if bias in flat else 0.0
      given[bias] = own_zeros + old
    layer = structured.unflatten(given)
    return transformer.layer(layer, config, x, reach).x

  with jax.default_matmul_precision('highest'):
    _, pull = jax.vjp(apply, x, zeros)
    at_input, at_outputs = pull(gradient)
  squares = {path: jnp.square(g).sum((0, 1)) for path, g in at_outputs.items()}
  return at_input, squares

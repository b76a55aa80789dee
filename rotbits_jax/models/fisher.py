"""How much the predictions of a model depend on the outputs of its linear layers.

The divergence that a small change of parameters causes is half its square in the Fisher
information of the predictions, the second moments of the gradient of a token's loss if
the token is drawn from the prediction itself. The gradient of a kernel is a sum of
products x g^T over the inputs x and the gradients g at the outputs; so the second
moments of x and of g approximate it, as in K-FAC.

Layers are differentiated one by one, from the last to the first, and read twice. The
residual stream in front of each layer is kept meanwhile.

References:
  Martens and Grosse, arXiv 1503.05671: K-FAC.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured
from rotbits_jax.models import config as config_lib
from rotbits_jax.models import names
from rotbits_jax.models import transformer


class Factors(NamedTuple):
  """Sums over the tokens of a text, for the matrices of a record.

  Attributes:
    moments: the second moments of the inputs, float32 `[in, in]`, by the paths of the
      matrices that have these inputs.
    squares: the squares of the gradients at the outputs, float32 `[out]`, by path.
  """

  moments: dict[tuple[str, ...], Any]
  squares: dict[str, Any]

  def by_path(self) -> dict[str, Any]:
    """Returns the moments of each matrix by its path."""
    return {path: x for paths, x in self.moments.items() for path in paths}


def fisher_factors(
  model: transformer.Layers,
  windows: Sequence[np.ndarray],
  *,
  seed: int = 0,
  store: Callable[[Any], Any] = np.asarray,
) -> Iterator[tuple[str, Factors]]:
  """Computes the factors of the Fisher information of a model's own predictions.

  Args:
    model: the model, dense or sliced.
    windows: the tokens of the text, integers `[B, T]` each.
    seed: draws the tokens whose losses are differentiated.
    store: takes each residual stream; returns the array to keep.

  Yields:
    The name of each record and its factors: 'head', then the layers from the last to
    the first, then 'embed'. Paths are those of the whole model. The path of the head is
    'head/kernel', also if it is tied. The inputs of an embedding are the gradients that
    it meets, and its squares are the probabilities of the tokens, `[V]`.
  """
  config, kept = model.config, {}
  xs: list[jax.Array] = []
  for i, xs in enumerate(transformer.streams(model, windows)):
    for k, x in enumerate(xs if i < config.num_layers else ()):
      kept[i, k] = store(x)
  outer = jax.device_put(model.outer())
  gradients: list[jax.Array] = []
  total: Any = None
  for k, x in enumerate(xs):
    gradient, *sums = _predictions(outer, config, x, jax.random.key(seed + k))
    gradients.append(gradient)
    total = sums if total is None else _add(total, sums)
  del outer, xs, x
  head, probabilities = total
  yield 'head', head
  for i in reversed(range(config.num_layers)):
    layer = jax.device_put(model.layer(i))
    total = None
    for k, gradient in enumerate(gradients):
      gradients[k], factors = _backward(layer, config, kept[i, k], gradient)
      total = factors if total is None else _add(total, factors)
    del layer
    prefix = names.prefix(i)
    moments = {tuple(prefix + x for x in k): a for k, a in total.moments.items()}
    squares = {prefix + path: g for path, g in total.squares.items()}
    yield names.layer(i), Factors(moments, squares)
  met = sum(transformer.second_moments(gradient) for gradient in gradients)
  yield 'embed', Factors({('embed/tokens',): met}, {'embed/tokens': probabilities})


_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)


@functools.partial(jax.jit, static_argnums=1)
def _predictions(
  outer: Any, config: config_lib.ModelConfig, x: jax.Array, key: jax.Array
) -> tuple[jax.Array, Factors, jax.Array]:
  """Returns the gradient at x, the head's factors, and the sum of probabilities."""
  with jax.default_matmul_precision('highest'):
    unembed = lambda x: transformer.unembed(outer, config, x)[::-1]
    logits, pull, normed = jax.vjp(unembed, x, has_aux=True)
    p = jax.nn.softmax(logits)
    drawn = jax.random.categorical(key, logits)
    (gradient,) = pull(p - jax.nn.one_hot(drawn, p.shape[-1]))
    moments: Any = {('head/kernel',): transformer.second_moments(normed)}
  # The mean over all tokens that may be drawn has no noise.
  squares = p * (1 - p)
  head = Factors(moments, {'head/kernel': squares.sum((0, 1))})
  return gradient, head, p.sum((0, 1))


@functools.partial(jax.jit, static_argnums=1)
def _backward(
  params: Any, config: config_lib.ModelConfig, x: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, Factors]:
  """Returns the gradient at the input x of a layer, and the layer's factors."""
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
    return written.x, {
      tuple(paths): transformer.second_moments(inputs[paths[0]])
      for paths in shared.values()
    }

  with jax.default_matmul_precision('highest'):
    _, pull, moments = jax.vjp(apply, x, zeros, has_aux=True)
    at_input, at_outputs = pull(gradient)
  squares = {path: jnp.square(g).sum((0, 1)) for path, g in at_outputs.items()}
  return at_input, Factors(moments, squares)

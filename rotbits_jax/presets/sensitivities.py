"""How much the predictions of a model depend on each of its matrices.

The divergence of an error E `[in, out]` of a kernel is about

    KL = sum_j g_j (E^T A E)_jj / 2

with the factors A and g of the Fisher information, see `models.fisher`. A row of an
embedding counts by the probability of its token, and its error by the second moments of
the gradient that it meets. The page on `near` has the derivation.

A head that is the embedding as well, or that a tied embedding is made of, causes both
errors. Then the sum of both is approximated by a product of the same form.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.models import fisher
from rotbits_jax.models import transformer

_Means = tuple[np.ndarray, np.ndarray]  # A and g


def measure(
  model: Any,  # a `models.Model`, or other layers as `transformer.streams` takes them
  windows: Sequence[np.ndarray],  # the tokens of the text, [1, T] each
  store: Callable[[Any], Any] = np.asarray,  # keeps the residual stream of a layer
  *,
  seed: int = 0,  # draws the tokens whose losses are differentiated
) -> Iterator[dict[str, passes.Inputs]]:
  """Yields A and g of every matrix of a model on a text, float32, by path.

  The layers come from the last to the first, then the parameters outside them. Equal
  inputs share one A.
  """
  config, kept = model.config, {}
  count = sum(tokens.size for tokens in windows)
  mean = lambda sums: jax.tree.map(lambda x: np.asarray(x) / count, sums)
  xs: list[jax.Array] = []
  for i, xs in enumerate(transformer.streams(model, windows)):
    for k, x in enumerate(xs if i < config.num_layers else ()):
      kept[i, k] = store(x)
  outer = jax.device_put(model.outer())
  gradients: list[jax.Array] = []
  total: Any = None
  for k, x in enumerate(xs):
    gradient, sums = fisher.of_predictions(outer, config, x, jax.random.key(seed + k))
    gradients.append(gradient)
    total = sums if total is None else _add(total, sums)
  del outer, xs, x
  moments, outputs, probabilities = mean(total)
  for i in reversed(range(config.num_layers)):
    layer = jax.device_put(model.layer(i))
    total = None
    for k, gradient in enumerate(gradients):
      gradients[k], sums = fisher.of_layer(layer, config, kept[i, k], gradient)
      total = sums if total is None else _add(total, sums)
    del layer
    of_inputs, squares = mean(total)
    yield {
      models.names.prefix(i) + path: passes.Inputs(shared, 0, squares[path])
      for paths, shared in of_inputs.items()
      for path in paths
    }
  met = mean(sum(map(fisher.second_moments, gradients)))
  yield _outer(model, (moments, outputs), (met, probabilities))


_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)


def _outer(
  model: Any, of_head: _Means, of_embedding: _Means
) -> dict[str, passes.Inputs]:
  """Returns A and g of the head and of embeddings."""
  gradients, tokens = of_embedding
  embed, inputs = model.outer()['embed'], {}
  if model.config.tied_head:
    inputs['embed/tokens'] = _sum(of_head, of_embedding, axis=1)
  else:
    inputs['embed/tokens'] = passes.Inputs(gradients, 1, tokens)
    inputs['head/kernel'] = passes.Inputs(of_head[0], 0, of_head[1])
    if isinstance(embed['tokens'], structured.Tied):
      factor = np.asarray(embed['tokens'].map)
      through_head = factor @ gradients @ factor.T
      inputs['head/kernel'] = _sum(of_head, (through_head, tokens), axis=0)
  if 'positions' in embed:
    count = len(embed['positions'])
    uniform = np.full(count, 1 / count, np.float32)
    inputs['embed/positions'] = passes.Inputs(gradients, 1, uniform)
  return inputs


def _sum(*pairs: _Means, axis: int) -> passes.Inputs:
  """Returns the product of an A and a g that is nearly the sum of such products."""
  moments = sum(g.mean() * a for a, g in pairs)
  outputs = sum(np.trace(a) * g for a, g in pairs)
  return passes.Inputs(moments, axis, outputs / max(np.trace(moments), 1e-30))


def fitted(
  measured: Sequence[Mapping[str, passes.Inputs]],  # A and g on each of several texts
  windows: Sequence[Sequence[np.ndarray]],  # the tokens of each text
  store: Callable[[Any], Any] = np.asarray,  # takes each A; returns the array to keep
) -> dict[str, passes.Inputs]:
  """Returns A and g for rounding, given those on each of several texts.

  For what T tokens do not tell of A `[n, n]`, (n / T)^2 times the mean of its diagonal
  is added to that.
  """
  counts = [sum(tokens.size for tokens in text) for text in windows]
  total = sum(counts)
  shares = [np.float32(count / total) for count in counts]
  mean = lambda arrays: sum(map(operator.mul, arrays, shares))
  shared: dict[int, Any] = {}
  inputs = {}
  for path, first in measured[0].items():
    of_texts = [of_text[path] for of_text in measured]
    if id(first.moments) not in shared:
      moments = mean(x.moments for x in of_texts)
      n = len(moments)
      ridge = np.float32(np.trace(moments) * n / total**2)
      moments = moments + ridge * np.eye(n, dtype=np.float32)
      shared[id(first.moments)] = store(moments)
    outputs = mean(x.outputs for x in of_texts)
    inputs[path] = first._replace(moments=shared[id(first.moments)], outputs=outputs)
  return inputs

"""How much the predictions of a model depend on each of its matrices.

The divergence that an error E `[in, out]` of a kernel causes is about

    KL = sum_j g_j (E^T A E)_jj / 2

with the second moments A of its inputs and the mean squares g of the gradients of the
predictions at its outputs, see `models.fisher`. A token that is embedded is an input
too, whose probability is that of the predictions; so a row of an embedding counts by
this probability, and its error by the second moments of the gradient that it meets.

A head that is the embedding as well, or that a tied embedding is made of, causes both
errors. Then the sum of both is approximated by a product of the same form.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.models import fisher
from rotbits_jax.models import transformer


def measure(
  model: transformer.Layers,
  windows: Sequence[np.ndarray],  # the tokens of the text, [1, T] each
  store: Callable[[Any], Any] = np.asarray,  # see `fisher.fisher_factors`
) -> Iterator[dict[str, passes.Inputs]]:
  """Yields A and g of every matrix of a model on a text, float32, by path.

  The layers come from the last to the first, then the parameters outside them. Equal
  inputs share one A.
  """
  count = sum(tokens.size for tokens in windows)
  head: Any = None
  for name, factors in fisher.fisher_factors(model, windows, store=store):
    means = jax.tree.map(lambda x: np.asarray(x) / count, factors)
    if name == 'head':
      head = means
    elif name == 'embed':
      yield _outer(model, head, means)
    else:
      yield {
        path: passes.Inputs(moments, 0, means.squares[path])
        for path, moments in means.by_path().items()
      }


def _outer(
  model: transformer.Layers, of_head: fisher.Factors, of_embedding: fisher.Factors
) -> dict[str, passes.Inputs]:
  """Returns A and g of the head and of embeddings."""
  (moments,), outputs = of_head.moments.values(), of_head.squares['head/kernel']
  (gradients,) = of_embedding.moments.values()
  tokens = of_embedding.squares['embed/tokens']
  embed, inputs = model.outer()['embed'], {}
  if model.config.tied_head:
    inputs['embed/tokens'] = _sum((moments, outputs), (gradients, tokens), axis=1)
  else:
    inputs['embed/tokens'] = passes.Inputs(gradients, 1, tokens)
    inputs['head/kernel'] = passes.Inputs(moments, 0, outputs)
    if isinstance(embed['tokens'], structured.Tied):
      factor = np.asarray(embed['tokens'].map)
      through_head = factor @ gradients @ factor.T
      inputs['head/kernel'] = _sum((moments, outputs), (through_head, tokens), axis=0)
  if 'positions' in embed:
    count = len(embed['positions'])
    uniform = np.full(count, 1 / count, np.float32)
    inputs['embed/positions'] = passes.Inputs(gradients, 1, uniform)
  return inputs


def _sum(*pairs: tuple[np.ndarray, np.ndarray], axis: int) -> passes.Inputs:
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

  A `[n, n]` of T tokens tells little about directions that these hardly have, and
  feedback would put the errors there. Therefore (n / T)^2 times the mean of the
  diagonal of A is added to it: as much as the mean if there are n tokens.
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

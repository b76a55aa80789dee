"""How much the predictions of a model depend on each of its matrices.

The divergence that an error E `[in, out]` of a kernel causes is about

    KL = sum_j g_j (E^T A E)_jj / 2

with the second moments A of its inputs and the mean squares g of the gradients of the
predictions at its outputs, see `models.gradients`. A token that is embedded is an input
too, whose probability is that of the predictions; so a row of an embedding counts by
this probability, and its error by the second moments of the gradient that it meets.

A head that is the embedding as well, or that a tied embedding is made of, causes both
errors. Then the sum of both is approximated by a product of the same form.
"""

from collections.abc import Iterable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured

_SEED = 0  # draws the tokens whose losses are differentiated


def measure(
  model: models.Model, windows: Iterable[np.ndarray]
) -> dict[str, passes.Inputs]:
  """Measures A and g of every matrix of a model on a text.

  Args:
    model: the model, dense or sliced; it may have structured leaves.
    windows: the tokens of the text, `[1, T]` each.

  Returns:
    For the path of each matrix, as `Model.leaves` has it, A and g, float32.
  """
  total: Any = None
  count = 0
  for i, tokens in enumerate(windows):
    own, key = jnp.asarray(tokens), jax.random.key(_SEED + i)
    found = _input_moments(model, own), models.output_gradients(model, own, key)
    total = found if total is None else jax.tree.map(jnp.add, total, found)
    count += tokens.size
  moments, gradients = jax.tree.map(lambda x: np.asarray(x) / count, total)
  inputs = {}
  for index in range(model.config.num_layers):
    name = models.names.layer(index)
    stack, k = next((x, index - x.start) for x in model.stacks if index in x)
    for path, own in structured.flatten(moments[models.names.stack(stack)]).items():
      path = f'{name}/{path}'
      inputs[path] = passes.Inputs(own[k], 0, gradients.outputs[path])
  return inputs | _outer(model, moments, gradients)


def _outer(
  model: models.Model, moments: Any, gradients: models.Gradients
) -> dict[str, passes.Inputs]:
  """Returns A and g of the head and of embeddings."""
  embed, seen = model.params['embed'], gradients.probabilities
  at_embedding, head = gradients.embedding, gradients.outputs['head/kernel']
  found = {}
  if model.config.tied_head:
    own = moments['embed']['tokens']
    found['embed/tokens'] = _sum((own, head), (at_embedding, seen), axis=1)
  else:
    own, tokens = moments['head']['kernel'], embed['tokens']
    found['embed/tokens'] = passes.Inputs(at_embedding, 1, seen)
    found['head/kernel'] = passes.Inputs(own, 0, head)
    if isinstance(tokens, structured.Tied):
      map = np.asarray(tokens.map)
      mapped = map @ at_embedding @ map.T
      found['head/kernel'] = _sum((own, head), (mapped, seen), axis=0)
  if 'positions' in embed:
    count = len(embed['positions'])
    every = np.full(count, 1 / count, np.float32)
    found['embed/positions'] = passes.Inputs(at_embedding, 1, every)
  return found


def _sum(*pairs: tuple[np.ndarray, np.ndarray], axis: int) -> passes.Inputs:
  """Returns the product of an A and a g that is nearly the sum of such products."""
  moments = sum(g.mean() * a for a, g in pairs)
  outputs = sum(np.trace(a) * g for a, g in pairs)
  return passes.Inputs(moments, axis, outputs / max(np.trace(moments), 1e-30))


_input_moments = jax.jit(models.input_moments)


@functools.partial(jax.jit, static_argnames='axis')
def _divergence(
  error: jax.Array, moments: jax.Array, outputs: jax.Array, axis: int
) -> jax.Array:
  rows = error if axis == 0 else error.T
  product = jnp.matmul(moments, rows, precision='highest')
  return outputs @ (rows * product).sum(axis=0) / 2


def divergence(inputs: passes.Inputs, error: Any) -> float:
  """Returns about the divergence in nats that an error of a matrix causes.

  Args:
    inputs: A and g of the matrix.
    error: float32, in the shape of the matrix.
  """
  return float(_divergence(error, inputs.moments, inputs.outputs, inputs.axis))

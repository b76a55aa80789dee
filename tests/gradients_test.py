"""Gradients of the predictions, beside those of JAX, and what they foretell."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import evaluation
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.models import fisher
from rotbits_jax.presets import sensitivities
from tests import random_models

TINY = pathlib.Path(__file__).parent / 'testdata' / 'llama-tiny-sliced-head-0.25'
SEED = 3


def gradients_of_parameters(model, tokens):
  """The gradients of the loss of the tokens that the same key draws."""
  key = jax.random.key(SEED)
  drawn = jax.random.categorical(key, models.logits(model, tokens))

  def loss(params):
    logits = models.logits(dataclasses.replace(model, params=params), tokens)
    found = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(found, drawn[..., None], axis=-1).sum()

  return dataclasses.replace(model, params=jax.grad(loss)(model.params))


def inputs_of_matrices(model, tokens):
  parts = sensitivities.measure(model, [tokens], seed=SEED)
  return {path: inputs for part in parts for path, inputs in part.items()}


def test_those_of_one_token_are_factors_of_those_of_kernels():
  model, tokens = random_models.sliced_llama([18] * 7), jnp.asarray([[5]])
  found = inputs_of_matrices(model, tokens)
  for path, own in gradients_of_parameters(model, tokens).leaves():
    if path.startswith('layers.') and path.endswith('/kernel'):
      expected = np.square(own).sum(axis=0) / np.trace(found[path].moments)
      got = found[path].outputs
      np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-9, err_msg=path)


def test_those_at_the_embedding_and_the_head():
  model = random_models.sliced_llama([18] * 7)
  tokens = jnp.asarray([[7, 1, 9, 30, 2]])
  found, count = inputs_of_matrices(model, tokens), tokens.size
  table = gradients_of_parameters(model, tokens).params['embed']['tokens']
  rows = np.asarray(table)[tokens[0]]
  met, _, seen = found['embed/tokens']
  np.testing.assert_allclose(met, rows.T @ rows / count, rtol=1e-3, atol=1e-9)
  p = np.asarray(jax.nn.softmax(models.logits(model, tokens)))[0]
  np.testing.assert_allclose(seen, p.mean(axis=0), rtol=1e-4)
  squares = (p * (1 - p)).mean(axis=0)
  np.testing.assert_allclose(found['head/kernel'].outputs, squares, rtol=1e-4)


def test_sensitivities_foretell_the_divergence():
  model = checkpoints.load_checkpoint(TINY).model
  model = dataclasses.replace(
    model, params=structured.astype(model.params, np.float32), buffers={}
  )
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, model.config.vocab_size, 256)
  inputs = inputs_of_matrices(model, tokens[None])
  for path in ('embed/tokens', 'head/kernel', 'layers.0/mlp/down/kernel'):
    array = np.asarray(dict(model.leaves())[path])
    error = 0.02 * array.std() * rng.standard_normal(array.shape).astype(np.float32)
    outer, layers = model.outer(), list(model.layers())
    index = models.names.layer_index(path)
    if index is None:
      name, inner = path.split('/')
      outer[name] = outer[name] | {inner: array + error}
    else:
      flat = structured.flatten(layers[index])
      flat[path.partition('/')[2]] = array + error
      layers[index] = structured.unflatten(flat)
    changed = models.from_layers(model.config, outer, layers)
    measured = evaluation.evaluate(changed, tokens, reference=model)
    expected = fisher.divergence(error, 0 * error, *inputs[path])
    assert 0.6 < measured.kl / expected < 1.7, path

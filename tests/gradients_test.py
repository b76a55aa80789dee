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
from rotbits_jax.presets import sensitivities
from tests import random_models

TINY = pathlib.Path(__file__).parent / 'testdata' / 'llama-tiny-sliced-head-0.25'
KEY = jax.random.key(3)


def gradients_of_parameters(model, tokens):
  """The gradients of the loss of the tokens that the same key draws."""
  drawn = jax.random.categorical(KEY, models.logits(model, tokens))

  def loss(params):
    logits = models.logits(dataclasses.replace(model, params=params), tokens)
    found = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(found, drawn[..., None], axis=-1).sum()

  return dataclasses.replace(model, params=jax.grad(loss)(model.params))


def test_those_of_one_token_are_factors_of_those_of_kernels():
  model, tokens = random_models.sliced_llama([18] * 7), jnp.asarray([[5]])
  found = models.output_gradients(model, tokens, KEY)
  moments = models.input_moments(model, tokens)
  for path, own in gradients_of_parameters(model, tokens).leaves():
    if path.startswith('layers.') and path.endswith('/kernel'):
      index = models.names.layer_index(path)
      inputs = structured.flatten(moments['layers.0:3'])
      size = np.trace(inputs[path.partition('/')[2]][index])
      expected = np.square(own).sum(axis=0) / size
      got = found.outputs[path]
      np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-9, err_msg=path)


def test_those_at_the_embedding_and_the_head():
  model = random_models.sliced_llama([18] * 7)
  tokens = jnp.asarray([[7, 1, 9, 30, 2]])
  found = models.output_gradients(model, tokens, KEY)
  table = gradients_of_parameters(model, tokens).params['embed']['tokens']
  rows = np.asarray(table)[tokens[0]]
  np.testing.assert_allclose(found.embedding, rows.T @ rows, rtol=1e-3, atol=1e-9)
  p = np.asarray(jax.nn.softmax(models.logits(model, tokens)))[0]
  np.testing.assert_allclose(found.probabilities, p.sum(axis=0), rtol=1e-4)
  squares = (p * (1 - p)).sum(axis=0)
  np.testing.assert_allclose(found.outputs['head/kernel'], squares, rtol=1e-4)


def test_sensitivities_foretell_the_divergence():
  model = checkpoints.load_checkpoint(TINY).model
  model = dataclasses.replace(
    model, params=structured.astype(model.params, np.float32), buffers={}
  )
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, model.config.vocab_size, 256)
  inputs = sensitivities.measure(model, [tokens[None]])
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
    measured = evaluation.compare({'x': changed}, tokens, {'model': model})['x']
    expected = sensitivities.divergence(inputs[path], error)
    assert 0.6 < measured.kl['model'] / expected < 1.7, path

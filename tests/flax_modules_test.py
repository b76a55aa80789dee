"""The Flax modules compute the same as the pure forward pass, and are trained."""

import dataclasses

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import random_models

import rotbits_jax
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.models import flax as models_flax

TOKENS = np.random.default_rng(0).integers(40, size=(2, 7))
logits_of = jax.jit(models.logits)


def plain():
  return random_models.sliced_llama((20, 20, 20, 20, 24))


def with_structured_leaves():
  """Makes a model with thin shortcuts and a quantised kernel."""
  model = plain()
  layers = list(model.layers())
  thin = np.tril(0.1 * np.random.default_rng(1).standard_normal((20, 3)))
  layers[0]['attention_shortcut']['kernel'] = structured.IdentityMinusGram(
    thin.astype(np.float16), np.zeros((20, 1), np.float16), 20
  )
  up = layers[0]['mlp']['up']
  integers = np.rint(up['kernel'].astype(np.float32) * 64).astype(np.int16)
  up['kernel'] = structured.UniformlyQuantized(integers, np.float32(1 / 64), 'float16')
  return models.from_layers(model.config, model.outer(), layers)


def trained_in_linen(model):
  """Returns losses of two steps, and the parameters after them."""
  module, optimizer = models_flax.LinenTransformer.like(model), optax.sgd(0.1)

  @jax.jit
  def step(params):
    loss = lambda params: loss_of(module.apply({'params': params}, TOKENS))
    value, grads = jax.value_and_grad(loss)(params)
    updates, _ = optimizer.update(grads, optimizer.init(params))
    return value, optax.apply_updates(params, updates)

  first, params = step(model.params)
  second, params = step(params)
  return first, second, params


def trained_in_nnx(model):
  """Returns losses of two steps, and the parameters after them."""
  module = models_flax.NnxTransformer(model.config, model.params)
  optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)

  @nnx.jit
  def step(module, optimizer):
    value, grads = nnx.value_and_grad(lambda module: loss_of(module(TOKENS)))(module)
    optimizer.update(module, grads)
    return value

  return step(module, optimizer), step(module, optimizer), module.to_params()


def loss_of(logits):
  labels = jnp.asarray(TOKENS[:, 1:])
  loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], labels)
  return loss.mean()


@pytest.mark.parametrize('make', [plain, with_structured_leaves])
def test_modules_give_the_logits_of_the_parameters(make):
  model = make()
  linen = models_flax.LinenTransformer.like(model)
  module = models_flax.NnxTransformer(model.config, model.params)
  expected = logits_of(model, TOKENS)
  for actual in (
    jax.jit(linen.apply)({'params': model.params}, TOKENS),
    nnx.jit(lambda module: module(TOKENS))(module),
  ):
    chex.assert_trees_all_close(actual, expected, atol=1e-5)
  # The state of the module of NNX comes back.
  definition, state = nnx.split(module)
  merged = nnx.merge(definition, jax.tree.map(jnp.copy, state))
  chex.assert_trees_all_equal(merged.to_params(), model.params)
  assert merged.config == model.config


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of qwix
@pytest.mark.parametrize('make', [plain, with_structured_leaves])
def test_qwix_quantises_kernels(make):
  qwix = pytest.importorskip('qwix')
  model = make()
  provider = qwix.PtqProvider([qwix.QuantizationRule(weight_qtype='int8')])
  module = models_flax.LinenTransformer.like(model)
  module = qwix.quantize_model(module, provider)
  params = jax.eval_shape(module.init, jax.random.key(0), TOKENS)['params']
  is_codes = lambda x: isinstance(x, qwix.QArray)
  codes = [x for x in jax.tree.leaves(params, is_leaf=is_codes) if is_codes(x)]
  kernels = [x for path, x in model.leaves() if path.endswith('/kernel')]
  plain_kernels = [x for x in kernels if not structured.is_structured(x)]
  stacked = sum(x.shape[0] if x.qvalue.ndim > 2 else 1 for x in codes)
  assert stacked == len(plain_kernels)
  assert provider.get_unused_rules() == []
  module = models_flax.NnxTransformer(model.config, model.params)
  module = qwix.quantize_model(module, provider, TOKENS)
  expected = logits_of(model, TOKENS)
  np.testing.assert_allclose(module(TOKENS), expected, atol=0.1 * np.ptp(expected))
  codes = [x for x in jax.tree.leaves(nnx.state(module)) if x.dtype == jnp.int8]
  assert len(codes) == len(plain_kernels)


@pytest.mark.parametrize('train', [trained_in_linen, trained_in_nnx])
def test_a_model_is_trained_and_stored(train):
  model = rotbits_jax.load(rotbits_jax.encode(plain(), preset='exact'))
  model = dataclasses.replace(model, params=structured.astype(model.params, np.float32))
  before, after, params = train(model)
  assert after < before
  trained = model.replace(params=params)
  found = rotbits_jax.load(rotbits_jax.encode(trained, preset='exact'))
  chex.assert_trees_all_equal(found.params, trained.params)

"""The Flax modules compute the same as the pure forward pass, and are trained."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import chex
import devices
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import random_models

import rotbits_jax
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.models import flax as models_flax

TOKENS = np.random.default_rng(0).integers(40, size=(2, 7))


def _plain() -> models.Model:
  return random_models.sliced_llama((20, 20, 20, 20, 24))


def _structured() -> models.Model:
  """Makes a model with thin shortcuts and a quantised kernel."""
  model = _plain()
  layers = list(model.layers())
  thin = np.tril(0.1 * np.random.default_rng(1).standard_normal((20, 3)))
  layers[0]['attention_shortcut']['kernel'] = structured.IdentityMinusGram(
    thin.astype(np.float16), np.zeros((20, 1), np.float16), 20
  )
  up = layers[0]['mlp']['up']
  integers = np.rint(up['kernel'].astype(np.float32) * 64).astype(np.int16)
  up['kernel'] = structured.UniformlyQuantized(integers, np.float32(1 / 64), 'float16')
  return models.from_layers(model.config, model.outer(), layers)


_logits = jax.jit(models.logits)
MODELS = {'plain': _plain, 'structured': _structured}


def _loss(logits: jax.Array) -> jax.Array:
  labels = jnp.asarray(TOKENS[:, 1:])
  loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], labels)
  return loss.mean()


def _float32(model: models.Model) -> models.Model:
  return dataclasses.replace(model, params=structured.astype(model.params, np.float32))


# Loads a model whose layers two devices share, and trains it in both modules.
SHARDED = """
import flax.nnx, jax, numpy as np, optax, rotbits_jax
from fuzz import seeds
from jax.sharding import NamedSharding, PartitionSpec
from rotbits_jax import models
from rotbits_jax.models import flax as models_flax

given = seeds.sliced_model(seeds.LLAMA | {'num_hidden_layers': 2})
mesh = jax.make_mesh((2,), ('layers',))
by_layer = NamedSharding(mesh, PartitionSpec('layers'))
everywhere = NamedSharding(mesh, PartitionSpec())
place = lambda path, shape: by_layer if path.startswith('layers') else everywhere
data = rotbits_jax.encode(given, preset='exact')
model = rotbits_jax.load(data, sharding=place, dtype=np.float32)
shardings = jax.tree.map(lambda x: x.sharding, model.params)
tokens = np.arange(16)[None]
loss = lambda logits: logits.var()

def check(params, logits):
  is_same = lambda x, y: x.sharding.is_equivalent_to(y, x.ndim)
  assert all(jax.tree.leaves(jax.tree.map(is_same, params, shardings)))
  data = rotbits_jax.encode(model.replace(params=params))
  found = rotbits_jax.load(data, sharding=place)
  expected = jax.jit(models.logits)(found, tokens)
  np.testing.assert_allclose(expected, logits, atol=1e-4)

module = models_flax.NnxTransformer(model.config, model.params)
optimizer = flax.nnx.Optimizer(module, optax.sgd(0.1), wrt=flax.nnx.Param)

@flax.nnx.jit
def step(module, optimizer):
  optimizer.update(module, flax.nnx.grad(lambda module: loss(module(tokens)))(module))

step(module, optimizer)
check(module.to_params(), flax.nnx.jit(lambda module: module(tokens))(module))

module = models_flax.LinenTransformer.like(model)
apply = lambda params: module.apply({'params': params}, tokens)
grads = jax.jit(jax.grad(lambda params: loss(apply(params))))(model.params)
params = jax.jit(lambda x, y: jax.tree.map(lambda x, y: x - 0.1 * y, x, y))(
  model.params, grads
)
check(params, jax.jit(apply)(params))
"""


class LinenTest(parameterized.TestCase):
  @parameterized.parameters(*MODELS)
  def test_apply_gives_the_logits_of_the_parameters(self, name):
    model = MODELS[name]()
    module = models_flax.LinenTransformer.like(model)
    actual = jax.jit(module.apply)({'params': model.params}, TOKENS)
    chex.assert_trees_all_close(actual, _logits(model, TOKENS), atol=1e-5)

  def test_init_gives_a_model_of_the_config(self):
    config = _plain().config
    module = models_flax.LinenTransformer(config)
    params = module.init(jax.random.key(0), TOKENS)['params']
    model = models.Model(params, {}, config)
    self.assertEqual(model.stacks, (range(1), range(1, 2)))
    logits = _logits(model, TOKENS)
    self.assertTrue(np.isfinite(logits).all())
    kernel = params['layers.0:1']['mlp']['down']['kernel']
    self.assertAlmostEqual(float(kernel.std() * kernel.shape[-2] ** 0.5), 1, delta=0.2)

  def test_an_optax_step_lowers_the_loss(self):
    model = _float32(_plain())
    module, optimizer = models_flax.LinenTransformer.like(model), optax.sgd(0.1)

    @jax.jit
    def step(params):
      loss = lambda params: _loss(module.apply({'params': params}, TOKENS))
      value, grads = jax.value_and_grad(loss)(params)
      updates, _ = optimizer.update(grads, optimizer.init(params))
      return value, grads, optax.apply_updates(params, updates)

    before, grads, params = step(model.params)
    after, _, _ = step(params)
    self.assertLess(after, before)
    self.assertTrue(all(np.any(x != 0) for x in jax.tree.leaves(grads)))


class NnxTest(parameterized.TestCase):
  @parameterized.parameters(*MODELS)
  def test_a_call_gives_the_logits_of_the_parameters(self, name):
    model = MODELS[name]()
    module = models_flax.NnxTransformer(model.config, model.params)
    actual = nnx.jit(lambda module: module(TOKENS))(module)
    chex.assert_trees_all_close(actual, _logits(model, TOKENS), atol=1e-5)

  @parameterized.parameters(*MODELS)
  def test_the_state_comes_back(self, name):
    model = MODELS[name]()
    module = models_flax.NnxTransformer(model.config, model.params)
    definition, state = nnx.split(module)
    merged = nnx.merge(definition, jax.tree.map(jnp.copy, state))
    chex.assert_trees_all_equal(merged.to_params(), model.params)
    self.assertEqual(merged.config, model.config)

  @parameterized.parameters(*MODELS)
  def test_an_optax_step_lowers_the_loss(self, name):
    model = _float32(MODELS[name]())
    module = models_flax.NnxTransformer(model.config, model.params)
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
      loss = lambda module: _loss(module(TOKENS))
      value, grads = nnx.value_and_grad(loss)(module)
      optimizer.update(module, grads)
      return value

    before = step(module, optimizer)
    self.assertLess(step(module, optimizer), before)
    trained = dataclasses.replace(model, params=module.to_params())
    np.testing.assert_allclose(
      _loss(_logits(trained, TOKENS)), _loss(module(TOKENS)), rtol=1e-5
    )

  def test_a_file_becomes_a_module_and_its_state_a_file(self):
    model = _float32(_structured())
    loaded = rotbits_jax.load(rotbits_jax.encode(model, preset='exact'))
    module = models_flax.NnxTransformer(loaded.config, loaded.params)
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(module, nnx.grad(lambda module: _loss(module(TOKENS)))(module))
    with self.subTest('its state'):
      state = nnx.state(module)
      again = rotbits_jax.decode(rotbits_jax.encode(state), like=state)
      other = models_flax.NnxTransformer(loaded.config, loaded.params)
      nnx.update(other, again)
      chex.assert_trees_all_equal(other.to_params(), module.to_params())
    trained = dataclasses.replace(loaded, params=module.to_params())
    with (
      self.subTest('the step has filled the zeros of a structured leaf'),
      self.assertRaisesRegex(ValueError, 'attention_shortcut/kernel: it cannot'),
    ):
      rotbits_jax.encode(trained, preset='exact')
    with self.subTest('the model, beside the one before'):
      trained = trained.materialize()
      data = rotbits_jax.encode(trained, base=loaded)
      found = rotbits_jax.load(data, base=loaded)
      chex.assert_trees_all_equal(found.params, trained.params)

  def test_modules_keep_the_sharding_of_what_is_loaded(self):
    devices.run(SHARDED, devices=2)


if __name__ == '__main__':
  absltest.main()

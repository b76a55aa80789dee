"""Weights of each step of a training, sent as what changed."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import structured

ROOT = pathlib.Path(__file__).parents[1]


def params(dtype=jnp.bfloat16):
  keys = jax.random.split(jax.random.key(0), 2)
  normal = lambda key, *shape: jax.random.normal(key, shape, dtype)
  return {
    'layers': [{'w': normal(keys[0], 64, 96), 'b': jnp.zeros(96, dtype)}],
    'head': normal(keys[1], 96, 10),
  }


def moved(tree, seed=0):
  """The PyTree after a step that moves a hundredth of the numbers by an ulp."""
  rng = np.random.default_rng(seed)

  def move(x):
    bits = np.asarray(x).view(np.int16).copy()
    bits[rng.random(bits.shape) < 0.01] += 1
    return jnp.asarray(bits.view(x.dtype))

  return jax.tree.map(move, tree)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  assert structured.same_bits(jax.device_get(a), jax.device_get(b))


def test_a_delta_turns_one_tree_into_another():
  old = params()
  new = moved(old)
  data = rotbits_jax.delta(new, old)
  found = rotbits_jax.apply(data, old)
  assert_same(found, new)
  assert isinstance(found['head'], jax.Array)
  assert_same(rotbits_jax.apply(data, jax.device_get(old)), jax.device_get(new))


@pytest.mark.parametrize('donate', [False, True])
def test_a_model_is_a_pytree_too(donate):
  old = rotbits_jax.load_checkpoint(checkpoints.example('llama-tiny-dense')).model
  new = old.replace(params=jax.tree.map(lambda x: x * 2, old.params))
  data = rotbits_jax.delta(new, old)
  found = rotbits_jax.apply(data, jax.device_put(old), donate=donate)
  assert found.config == new.config
  assert_same(found.params, new.params)


def test_placed_arrays_do_not_share_memory_with_the_old_ones():
  given = {'a': np.ones((512, 512), np.float32), 'b': np.zeros(9, np.float32)}
  old = rotbits_jax.decode(rotbits_jax.encode(given))  # JAX takes its memory as it is
  data = rotbits_jax.delta({'a': old['a'], 'b': old['b'] + 1}, old)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  new = rotbits_jax.apply(data, old, sharding=place)
  old['a'][:] = 7
  assert float(new['a'][0, 0]) == 1


def test_arrays_that_do_not_change_are_not_moved():
  old = params()
  new = old | {'head': old['head'] + 1}
  found = rotbits_jax.apply(rotbits_jax.delta(new, old), old)
  assert found['layers'][0]['w'] is old['layers'][0]['w']
  assert_same(found, new)


def test_donated_arrays_are_deleted():
  old = params()
  new = moved(old)
  host = jax.device_get(new)
  data = rotbits_jax.delta(new, old)
  found = rotbits_jax.apply(data, old, donate=True)
  assert_same(found, host)
  assert old['layers'][0]['w'].is_deleted()
  # The biases did not change, and stay.
  assert found['layers'][0]['b'] is old['layers'][0]['b'] or (
    old['layers'][0]['b'].is_deleted()
  )


def test_each_array_is_donated_when_it_is_replaced():
  old = {'params': [params()['head'] + i for i in range(8)], 'b': jnp.zeros(2048)}
  new = {'params': moved(old['params']), 'b': jnp.ones(2048)}
  host = jax.device_get(new)
  data = rotbits_jax.delta(new, old)
  leaves, alive = jax.tree.leaves(old), []
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def where(path, shape):
    alive.append(sum(not x.is_deleted() for x in leaves))
    return place

  found = rotbits_jax.apply(data, old, sharding=where, donate=True)
  assert_same(found, host)
  assert alive == [*range(9, 0, -1)]
  # The file stores one alone: it does not need the old one.
  assert all(x.is_deleted() for x in leaves)


def test_a_wrong_base_deletes_nothing():
  old = {'alone': jnp.zeros(2048), 'w': params()['layers'][0]['w']}
  data = rotbits_jax.delta({'alone': jnp.ones(2048), 'w': moved(old['w'])}, old)
  wrong = old | {'w': old['w'] + 1}
  with pytest.raises(rotbits_jax.ContainerError, match='w: w of this base has other'):
    rotbits_jax.apply(data, wrong, donate=True)
  assert not any(x.is_deleted() for x in jax.tree.leaves(wrong))


def test_donated_arrays_that_are_there_twice_stay():
  old = {'a': params()['layers'][0]['w']}
  old['b'] = old['a']
  new = jax.device_get(old | {'a': old['a'].at[0, 0].set(5)})
  found = rotbits_jax.apply(rotbits_jax.delta(new, old), old, donate=True)
  assert_same(found, new)


def test_a_sharding_places_the_arrays():
  old = params()
  new = moved(old)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  found = rotbits_jax.apply(rotbits_jax.delta(new, old), old, sharding=place)
  assert_same(found, new)
  assert found['head'].sharding == place


def test_the_sharding_of_a_model_gets_the_paths_of_load():
  old = rotbits_jax.load_checkpoint(checkpoints.example('llama-tiny-dense')).model
  old = old.replace(buffers={'inv_freq': np.ones(64, np.float32)})
  new = old.replace(params=jax.tree.map(lambda x: x * 2, old.params))
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  loaded, applied = [], []
  where = lambda paths: lambda path, shape: paths.append(path) or place
  rotbits_jax.load(rotbits_jax.encode(new, preset='exact'), sharding=where(loaded))
  data = rotbits_jax.delta(new, old)
  found = rotbits_jax.apply(data, old, sharding=where(applied))
  assert set(applied) == set(loaded)
  assert found.buffers['inv_freq'] is old.buffers['inv_freq']


@pytest.mark.parametrize('dtype', ['int2', 'uint2', 'int4', 'uint4'])
def test_the_upper_bits_of_short_integers_say_nothing(dtype):
  given = {'x': np.tile(np.arange(256, dtype=np.uint8), 4).view(jnp.dtype(dtype))}
  plain = {'x': given['x'].astype(np.int8).astype(given['x'].dtype)}
  assert not structured.same_bits(given, plain)
  new = {'x': plain['x'].copy()}
  new['x'][:3] = 1
  assert rotbits_jax.encode(given) == rotbits_jax.encode(plain)
  assert_same(rotbits_jax.apply(rotbits_jax.delta(new, plain), given), new)
  assert_same(rotbits_jax.apply(rotbits_jax.delta(new, given), plain), new)


def test_leaves_of_integers_come_back_as_arrays():
  numbers = np.arange(-32, 32, dtype=np.int16).reshape(8, 8)
  leaf = structured.UniformlyQuantized(numbers, np.float32(0.5), 'float32')
  old, new = {'w': leaf}, {'w': leaf.replace(integers=numbers + 1)}
  expected = {'w': np.asarray(new['w'].materialize())}
  assert_same(rotbits_jax.decode(rotbits_jax.encode(new), like=old), expected)
  assert_same(rotbits_jax.apply(rotbits_jax.delta(new, old), old), new)
  assert rotbits_jax.apply(rotbits_jax.delta(old, old), old)['w'] is leaf
  with pytest.raises(ValueError, match='w: `like` has'):
    rotbits_jax.decode(rotbits_jax.encode({'w': np.ones((8, 9))}), like=old)


def test_numbers_of_64_bits_keep_them_on_devices():
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  new = {'n': np.array([2**40 + 1, 3]), 'w': np.full(99, 1 + 1e-12)}
  assert_same(rotbits_jax.load(rotbits_jax.encode(new), sharding=place), new)
  with jax.enable_x64(True):
    old = {'n': jnp.arange(2), 'w': jnp.ones(99)}
    for sharding in (None, place):
      data = rotbits_jax.delta(new, old)
      found = rotbits_jax.apply(data, old, sharding=sharding)
      assert_same(found, new)
      assert isinstance(found['w'], jax.Array)
  model = rotbits_jax.load_checkpoint(rotbits_jax.checkpoints.example()).model
  params = jax.tree.map(lambda x: np.float64(x) + 1e-12, model.params)
  data = rotbits_jax.encode(model.replace(params=params), preset='exact')
  assert_same(rotbits_jax.load(data, sharding=place).params, params)


def test_a_step_out_of_order_is_refused():
  steps = [params()]
  for seed in range(2):
    steps.append(moved(steps[-1], seed))
  second = rotbits_jax.delta(steps[2], steps[1])
  with pytest.raises(rotbits_jax.ContainerError, match='has other elements'):
    rotbits_jax.apply(second, steps[0], donate=True)
  assert not any(x.is_deleted() for x in jax.tree.leaves(steps[0]))
  with pytest.raises(rotbits_jax.ContainerError, match='the base has no'):
    rotbits_jax.apply(second, {'x': steps[1]})
  with pytest.raises(ValueError, match='only one of the file and'):
    rotbits_jax.apply(second, steps[1] | {'more': jnp.ones(3)})


def test_a_sampler_follows_a_training():
  x = jax.random.normal(jax.random.key(1), (128, 64), jnp.bfloat16)
  y = x @ jax.random.normal(jax.random.key(2), (64, 10), jnp.bfloat16)
  optimizer = optax.adam(1e-4)

  def loss(weights):
    hidden = jnp.tanh(x @ weights['layers'][0]['w'] + weights['layers'][0]['b'])
    return jnp.mean(jnp.square(hidden @ weights['head'] - y).astype(jnp.float32))

  @jax.jit
  def step(weights, state):
    updates, state = optimizer.update(jax.grad(loss)(weights), state)
    return optax.apply_updates(weights, updates), state

  trained = params()
  state = optimizer.init(trained)
  sampled, sizes = trained, []
  for _ in range(3):
    new, state = step(trained, state)
    data = rotbits_jax.delta(new, trained)
    sizes.append(len(data))
    sampled, trained = rotbits_jax.apply(data, sampled), new
    assert_same(sampled, trained)
  # The state of the optimizer is a PyTree, too.
  later = step(trained, state)[1]
  assert_same(rotbits_jax.apply(rotbits_jax.delta(later, state), state), later)
  assert sizes[-1] < len(rotbits_jax.encode(trained))


def test_structured_leaves_stay_on_their_devices():
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  pair = structured.LowRank(jnp.ones((64, 2)), jnp.ones((2, 64)))
  old = jax.device_put({'x': pair, 'y': jnp.zeros(64)}, place)
  new = jax.tree.map(lambda x: x + 1, old)
  host = jax.device_get(new)
  found = rotbits_jax.apply(rotbits_jax.delta(new, old), old, donate=True)
  assert_same(found, host)
  assert all(x.committed for x in jax.tree.leaves(found))
  assert all(x.is_deleted() for x in jax.tree.leaves(old))

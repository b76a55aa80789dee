"""Weights of each step of a training, sent as what changed."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import structured

ROOT = pathlib.Path(__file__).parents[1]
PLACE = jax.device_put(0, jax.devices()[0]).sharding


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


def model():
  return rotbits_jax.load_checkpoint(checkpoints.example('llama-tiny-dense')).model


def head_bases():
  leaf = structured.HeadBases(jnp.ones((62, 2)), None, heads=1)
  return {'x': leaf, 'y': jnp.zeros(64)}


def integers():
  numbers = np.arange(-32, 32, dtype=np.int16).reshape(8, 8)
  return {'w': structured.UniformlyQuantized(numbers, np.float32(0.5), 'float32')}


def plus_one(tree):
  return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), tree)


def twice():
  array = params()['head']
  return {'a': array, 'b': array}


# The PyTree before a step, and the step.
TREES = {
  'bfloat16': (params, moved),
  'a new head': (params, lambda old: old | {'head': old['head'] + 1}),
  'on the host': (
    lambda: jax.device_get(params()),
    lambda old: jax.device_get(moved(old)),
  ),
  'slashes': (lambda: {'mlp/~/a%2F': params()}, moved),
  'placed': (lambda: jax.device_put(params(), PLACE), moved),
  'a model': (model, lambda old: old.replace(params=plus_one(old.params))),
  'structured leaves': (head_bases, plus_one),
  'integers': (integers, lambda old: plus_one(old)),
  'an array twice': (twice, lambda old: old | {'a': old['a'].at[0, 0].set(5)}),
  '64 bits': (
    lambda: {'n': np.arange(2), 'w': np.ones(99)},
    lambda old: {'n': np.array([2**40 + 1, 3]), 'w': np.full(99, 1 + 1e-12)},
  ),
}


def assert_same(found, expected):
  arrays = lambda tree: jax.device_get(structured.materialize(tree))
  assert structured.same_bits(arrays(found), arrays(expected))


@pytest.mark.parametrize('options', [{}, {'donate': True}, {'sharding': PLACE}])
def test_a_delta_turns_one_tree_into_another(options, subtests):
  for name, (make, step) in TREES.items():
    with subtests.test(name=name):
      check_delta(make, step, options)


def check_delta(make, step, options):
  old = make()
  new = step(old)
  expected = jax.device_get(new)
  data = rotbits_jax.delta(new, old)
  found = rotbits_jax.apply(data, old, **options)
  if isinstance(new, rotbits_jax.Model):
    assert found.config == new.config
    found, expected = found.params, expected.params
  assert_same(found, expected)
  for x in jax.tree.leaves(found):
    if 'sharding' in options:
      assert x.sharding == PLACE


def test_each_array_is_donated_when_it_is_replaced():
  old = {'params': [params()['head'] + i for i in range(8)], 'b': jnp.zeros(2048)}
  new = {'params': moved(old['params']), 'b': jnp.ones(2048)}
  data = rotbits_jax.delta(new, old)
  leaves, alive = jax.tree.leaves(old), []

  def where(path, shape):
    alive.append(sum(not x.is_deleted() for x in leaves))
    return PLACE

  rotbits_jax.apply(data, old, sharding=where, donate=True)
  assert alive == [*range(9, 0, -1)]
  assert all(x.is_deleted() for x in leaves)


@pytest.mark.parametrize(
  'change',
  [
    lambda old: old | {'head': old['head'] + 1},
    lambda old: old | {'count': old['count'] + 1},  # which no new array needs
    lambda old: {'x': old},
    lambda old: old | {'more': jnp.ones(3)},
  ],
)
def test_another_old_tree_is_refused(change):
  old, new = (
    tree | {'count': jnp.int32(i)} for i, tree in enumerate((params(), moved(params())))
  )
  data = rotbits_jax.delta(new, old)
  wrong = change(old)
  with pytest.raises(ValueError, match='was made from other old arrays'):
    rotbits_jax.apply(data, wrong, donate=True)
  assert not any(x.is_deleted() for x in jax.tree.leaves(wrong))


def test_a_delta_that_nobody_could_apply_is_refused():
  old = params()
  for new in old | {'more': old['head']}, old | {'head': old['head'].T}:
    with pytest.raises(ValueError, match='like'):
      rotbits_jax.delta(new, old)


@pytest.mark.slow
@pytest.mark.daily
def test_two_processes(tmp_path):
  example = ROOT / 'examples' / 'weight_sync.py'
  run = [sys.executable, example, str(tmp_path), '--steps=4', '--anchor_every=3']
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  (trained,) = re.findall('the trainer has (step 4, .*)', done.stdout)
  assert f'the sampler has {trained}' in done.stdout

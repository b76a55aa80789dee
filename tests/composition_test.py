"""Pure functions of `symmetries` have equal results under `jit`, `vmap` and sharding.

To add a function to all these tests, add a row to `FUNCTIONS`.
"""

import functools
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rotbits_jax import structured
from rotbits_jax.symmetries import biases
from rotbits_jax.symmetries import canonical
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import low_rank
from rotbits_jax.symmetries import norms
from rotbits_jax.symmetries import residual
from rotbits_jax.symmetries import rotations
from rotbits_jax.symmetries import shortcuts

STACK = 8  # layers


def _normal(rng, *shape):
  return rng.standard_normal(shape).astype(np.float32)


def _orthogonal(rng, n):
  return np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32)


def _mlp(rng):
  return {
    'up': {'kernel': _normal(rng, 6, 8), 'bias': _normal(rng, 8)},
    'down': {'kernel': _normal(rng, 8, 6) * 8, 'bias': _normal(rng, 6)},
  }


def _attention(rng):
  linear = lambda n, m: {'kernel': _normal(rng, n, m), 'bias': _normal(rng, m)}
  return {
    'query': linear(6, 8),
    'key': linear(6, 4),
    'value': linear(6, 4),
    'out': linear(8, 6),
  }


def _layer(rng):
  layer = {
    'attention': _attention(rng),
    'mlp': _mlp(rng),
    'attention_shortcut': {'kernel': _normal(rng, 6, 6)},
    'mlp_shortcut': {'kernel': _normal(rng, 6, 6)},
  }
  layer['mlp']['up']['kernel'] = structured.LowRank(
    _normal(rng, 6, 2), _normal(rng, 2, 8)
  )
  return structured.flatten(layer)


def _norms(rng):
  return {f'{name}_norm/scale': _normal(rng, 6) for name in ('attention', 'mlp')}


def _polar(rng):
  values = np.float32([1.5, 1, 1, 1, 0.5, 0.25])
  return canonical.Polar(_orthogonal(rng, 6), values, _orthogonal(rng, 6))


# The axes of the parameters above.
AXES = (
  ('attention/query/kernel', (0, 'query')),
  ('attention/query/bias', ('query',)),
  ('attention/out/kernel', ('query', 1)),
  ('attention/out/bias', (1,)),
  ('mlp/up/kernel', (1, 'neuron')),
  ('mlp/down/kernel', ('neuron', -1)),
  ('attention_shortcut/kernel', (0, 1)),
  ('mlp_shortcut/kernel', (1, -1)),
)
NORMS = (('attention', 'attention_norm'), ('mlp', 'mlp_norm'))


def _pair(rng, *names):
  attention = _attention(rng)
  return {name: attention[name] for name in names}


def _values(rng):
  pair = _pair(rng, 'value', 'out')
  return pair | {'out': {'kernel': pair['out']['kernel']}}


# Functions, each with a function that makes its float32 arguments from a generator.
FUNCTIONS = {
  'polar': (canonical.polar, lambda r: (_normal(r, 6, 8),)),
  'lower_factor': (shortcuts.lower_factor, lambda r: (_normal(r, 6, 5),)),
  'gram_factor': (
    functools.partial(shortcuts.gram_factor, k=3, dtype=np.float32),
    lambda r: (_orthogonal(r, 6), _polar(r), np.int32(4), np.int32(6)),
  ),
  'next_rotation': (
    residual.next_rotation,
    lambda r: (_orthogonal(r, 6), _orthogonal(r, 4), _orthogonal(r, 2)),
  ),
  'triangle': (
    functools.partial(shortcuts.triangle, dtype=np.float32),
    lambda r: (_orthogonal(r, 6), _polar(r)),
  ),
  'range_used': (
    functools.partial(residual.range_used, axes=AXES),
    lambda r: (_layer(r), dict.fromkeys(dict(AXES), np.float32(65504))),
  ),
  'fold_norm_scales': (
    functools.partial(norms.fold_norm_scales, axes=AXES, norms=NORMS),
    lambda r: (_layer(r) | _norms(r),),
  ),
  'lower': (rotations.lower, lambda r: (_normal(r, 6, 3),)),
  'turn': (
    lambda array, rows: rotations.turn(array, rows=rows),
    lambda r: (_normal(r, 6, 5), _orthogonal(r, 6)),
  ),
  'turn_parameters': (
    functools.partial(rotations.turn_parameters, axes=AXES),
    lambda r: (_layer(r), tuple(_orthogonal(r, 6) for _ in range(3))),
  ),
  'upper_rotation': (residual.upper_rotation, lambda r: (_normal(r, 6, 8),)),
  'canonical_svd': (canonical.svd, lambda r: (_normal(r, 6, 8),)),
  'canonical_qr': (canonical.qr, lambda r: (_normal(r, 6, 8),)),
  'canonical_polar': (canonical.polar_shortcut, lambda r: (_normal(r, 6, 8),)),
  'basis': (heads.basis, lambda r: (_normal(r, 8, 3),)),
  'rotate_values': (
    lambda layer, q: heads.rotate_values({'attention': layer}, q),
    lambda r: (_attention(r), np.stack([_orthogonal(r, 2)] * 2)),
  ),
  'fix_values': (
    functools.partial(heads.fix_values, kv_heads=2),
    lambda r: (_values(r),),
  ),
  'fix_keys': (
    functools.partial(heads.fix_keys, kv_heads=1, rotary=2),
    lambda r: (_pair(r, 'query', 'key'),),
  ),
  'with_value_bias': (
    functools.partial(biases.with_value_bias, kv_heads=2),
    lambda r: (_normal(r, 6), _normal(r, 4), _normal(r, 8, 6)),
  ),
  'fix_pair': (low_rank.fix_pair, lambda r: (_normal(r, 8, 3), _normal(r, 3, 6))),
}


@functools.cache
def _arguments(name):
  """Returns a stack of arguments, and the compiled function's result for each."""
  function, arguments = FUNCTIONS[name]
  rng = np.random.default_rng(0)
  layers = [arguments(rng) for _ in range(STACK)]
  stack = jax.tree.map(lambda *x: np.stack(x), *layers)
  compiled = jax.jit(function)
  results = [jax.device_get(compiled(*layer)) for layer in layers]
  return layers, stack, jax.tree.map(lambda *x: np.stack(x), *results)


def _assert_same(actual, expected):
  chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
  chex.assert_trees_all_close(actual, expected, atol=2e-5, rtol=2e-5)


def check_sharded(name):
  """Checks one function on all devices; each device holds some of the layers."""
  function, _ = FUNCTIONS[name]
  _, stack, expected = _arguments(name)
  mesh = jax.sharding.Mesh(jax.devices(), 'layers')
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('layers'))
  sharded = jax.device_put(stack, sharding)
  result = jax.jit(jax.vmap(function))(*sharded)
  for leaf in jax.tree.leaves(result):
    assert len(leaf.sharding.device_set) == jax.device_count(), leaf.sharding
  _assert_same(jax.device_get(result), expected)


class CompositionTest(parameterized.TestCase):
  @parameterized.parameters(*FUNCTIONS)
  def test_a_compiled_function_does_what_it_does_uncompiled(self, name):
    layers, _, expected = _arguments(name)
    result = jax.device_get(FUNCTIONS[name][0](*jax.tree.map(jnp.asarray, layers[0])))
    _assert_same(result, jax.tree.map(lambda x: x[0], expected))

  @parameterized.parameters(*FUNCTIONS)
  def test_a_sharded_stack_of_layers_is_like_each_layer_by_itself(self, name):
    check_sharded(name)

  @pytest.mark.slow
  def test_eight_devices_do_what_one_does(self):
    flags = os.environ.get('XLA_FLAGS', '')
    environment = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': str(pathlib.Path(__file__).parents[1]),
      'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count=8',
    }
    program = (
      'import jax, composition_test as t\n'
      'assert jax.device_count() == 8\n'
      'for name in t.FUNCTIONS:\n'
      '  t.check_sharded(name)\n'
    )
    done = subprocess.run(
      [sys.executable, '-c', program],
      cwd=pathlib.Path(__file__).parent,
      env=environment,
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr)


if __name__ == '__main__':
  absltest.main()

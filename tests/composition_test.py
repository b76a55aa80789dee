"""Pure functions of `symmetries` have equal results under `jit`, `vmap` and sharding.

To add a function to all these tests, add a row to `FUNCTIONS`.
"""

import functools

from absl.testing import absltest
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rotbits_jax import checkpoints
from rotbits_jax import structured
from rotbits_jax.symmetries import canonical
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import low_rank
from rotbits_jax.symmetries import norms
from rotbits_jax.symmetries import rotations
from rotbits_jax.symmetries import shortcuts
from rotbits_jax.symmetries import steps
from tests import devices
from tests import random_models

STACK = 8  # layers


def _normal(rng, *shape):
  return rng.standard_normal(shape).astype(np.float32)


def _orthogonal(rng, n):
  return np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32)


LINEARS = {
  'attention/query': (6, 8),
  'attention/key': (6, 4),
  'attention/value': (6, 4),
  'attention/out': (8, 6),
  'mlp/down': (8, 6),
}


def _layer(rng):
  layer = {}
  for path, (n, m) in LINEARS.items():
    layer |= {f'{path}/kernel': _normal(rng, n, m), f'{path}/bias': _normal(rng, m)}
  for name in ('attention', 'mlp'):
    layer[f'{name}_shortcut/kernel'] = _normal(rng, 6, 6)
  layer['mlp/up/kernel'] = structured.LowRank(_normal(rng, 6, 2), _normal(rng, 2, 8))
  return layer


def _dense_layer(rng):
  layer = {path: x for path, x in _layer(rng).items() if '_shortcut' not in path}
  layer['mlp/gate/kernel'] = _normal(rng, 6, 8)
  return layer | {f'{x}_norm/scale': _normal(rng, 6) for x in ('attention', 'mlp')}


def _polar(rng):
  values = np.float32([1.5, 1, 1, 1, 0.5, 0.25])
  return canonical.Polar(_orthogonal(rng, 6), values, _orthogonal(rng, 6))


# The axes of the parameters above.
AXES = {
  'attention/query/kernel': (0, 'query'),
  'attention/query/bias': ('query',),
  'attention/out/kernel': ('query', 1),
  'attention/out/bias': (1,),
  'mlp/up/kernel': (1, 'neuron'),
  'mlp/down/kernel': ('neuron', -1),
  'attention_shortcut/kernel': (0, 1),
  'mlp_shortcut/kernel': (1, -1),
}
DENSE = checkpoints.parse_config(random_models.BASE | {'num_hidden_layers': 1}, None)


def _some(rng, paths):
  layer = _layer(rng)
  return {path: layer[path] for path in paths}


# Functions, each with a function that makes its float32 arguments from a generator.
FUNCTIONS = {
  'polar': (canonical.polar, lambda r: (_normal(r, 6, 8),)),
  'quick_polar': (canonical.quick_polar, lambda r: (_normal(r, 6, 8),)),
  'narrowing_rotation': (
    shortcuts.narrowing_rotation,
    lambda r: (_orthogonal(r, 6), _normal(r, 6, 5)),
  ),
  'factors': (
    functools.partial(shortcuts.factors, tolerance=0.1, columns=(3, 2)),
    lambda r: (_orthogonal(r, 6), _polar(r)),
  ),
  'next_rotation': (
    rotations.next_rotation,
    lambda r: (_orthogonal(r, 6), _orthogonal(r, 4), _orthogonal(r, 2)),
  ),
  'running_rotations': (
    rotations.running_rotations,
    lambda r: (np.stack([_orthogonal(r, 4) for _ in range(5)]), _orthogonal(r, 4)),
  ),
  'largest_norm': (
    functools.partial(rotations.largest_norm, axes=(0, -1)),
    lambda r: (structured.LowRank(_normal(r, 6, 2), _normal(r, 2, 8)),),
  ),
  'fold_norm_scales': (
    functools.partial(norms.fold_norm_scales, config=DENSE),
    lambda r: (_dense_layer(r),),
  ),
  'lower': (rotations.lower, lambda r: (_normal(r, 6, 3),)),
  'rotate': (rotations.rotate, lambda r: (_normal(r, 6, 5), _orthogonal(r, 6))),
  'rotate_parameters': (
    functools.partial(rotations.rotate_parameters, axes=AXES),
    lambda r: (_layer(r), tuple(_orthogonal(r, 6) for _ in range(3))),
  ),
  'upper_rotation': (rotations.upper_rotation, lambda r: (_normal(r, 6, 8),)),
  'typical_size': (steps.typical_size, lambda r: (_normal(r, 6, 8),)),
  'with_feedback': (
    steps.with_feedback,
    lambda r: (_normal(r, 6, 8), np.float32(0.5), np.eye(6, dtype=np.float32)),
  ),
  'canonical_svd': (canonical.svd, lambda r: (_normal(r, 6, 8),)),
  'canonical_qr': (canonical.qr, lambda r: (_normal(r, 6, 8),)),
  'canonical_polar': (canonical.polar_shortcut, lambda r: (_normal(r, 6, 8),)),
  'basis': (heads.basis, lambda r: (_normal(r, 8, 3),)),
  'rotate_heads': (
    heads.rotate_heads,
    lambda r: (_some(r, heads.VALUES), np.stack([_orthogonal(r, 2)] * 2)),
  ),
  'rounding_errors': (
    functools.partial(heads.rounding_errors, dtype=np.float16),
    lambda r: tuple((_normal(r, 2, 6, 3), _normal(r, 2, 5, 3)) for _ in range(3)),
  ),
  'fix_values': (
    functools.partial(heads.fix_values, kv_heads=2),
    lambda r: (_some(r, heads.VALUES),),
  ),
  'fix_keys': (
    functools.partial(heads.fix_keys, kv_heads=1, rotary=2),
    lambda r: (_some(r, heads.KEYS),),
  ),
  'with_value_bias': (
    functools.partial(heads.with_value_bias, kv_heads=2),
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


class CompositionTest(absltest.TestCase):
  def test_a_compiled_function_does_what_it_does_uncompiled(self):
    for name in FUNCTIONS:
      with self.subTest(name=name):
        layers, _, expected = _arguments(name)
        result = jax.device_get(
          FUNCTIONS[name][0](*jax.tree.map(jnp.asarray, layers[0]))
        )
        _assert_same(result, jax.tree.map(lambda x: x[0], expected))

  def test_a_sharded_stack_of_layers_is_like_each_layer_by_itself(self):
    for name in FUNCTIONS:
      with self.subTest(name=name):
        check_sharded(name)

  def test_a_model_that_is_divided_over_devices_is_encoded(self):
    devices.run(
      'import jax, numpy as np, rotbits_jax\n'
      'from jax.sharding import NamedSharding, PartitionSpec as P\n'
      'auto = (jax.sharding.AxisType.Auto,)\n'
      'mesh = jax.make_mesh((2,), ("model",), axis_types=auto)\n'
      'place = NamedSharding(mesh, P(None, None, "model"))\n'
      'for name in ("phi2-tiny-sliced-0.25", "llama-tiny-dense"):\n'
      '  model = rotbits_jax.load_checkpoint(f"tests/testdata/{name}").model\n'
      '  data = rotbits_jax.encode(model, preset="exact")\n'
      '  divided = rotbits_jax.load(data, sharding=place)\n'
      '  for preset in ("free", "near"):\n'
      '    own = rotbits_jax.encode(model, preset=preset)\n'
      '    assert rotbits_jax.encode(divided, preset=preset) == own, (name, preset)\n',
      devices=2,
    )

  @pytest.mark.slow
  def test_eight_devices_do_what_one_does(self):
    devices.run(
      'import jax\n'
      'from tests import composition_test as t\n'
      'assert jax.device_count() == 8\n'
      'for name in t.FUNCTIONS:\n'
      '  t.check_sharded(name)\n'
    )


if __name__ == '__main__':
  absltest.main()

"""Pure functions of `symmetries`, beside NumPy; and under `jit`, `vmap` and sharding.

A function that joins the table `FUNCTIONS` joins the tests of composition.
"""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rotbits_jax.symmetries import factorizations
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import rotations
from rotbits_jax.symmetries import steps
from tests import devices
from tests import random_models

STACK = 8  # layers


def _normal(rng, *shape):
  return rng.standard_normal(shape).astype(np.float32)


def _orthogonal(rng, n):
  return np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32)


def _repeated(rng, n, m):
  """Returns a matrix whose first columns repeat."""
  return _normal(rng, n, m)[:, [0, 0, 1, 1, *range(2, m - 2)]]


# Functions, each with a function that makes its float32 arguments from a generator.
FUNCTIONS = {
  'polar': (factorizations.polar, lambda r: (_normal(r, 6, 8),)),
  'next_rotation': (
    rotations.next_rotation,
    lambda r: (_orthogonal(r, 6), _orthogonal(r, 4), _orthogonal(r, 2)),
  ),
  'running_rotations': (
    rotations.running_rotations,
    lambda r: (np.stack([_orthogonal(r, 4) for _ in range(5)]), _orthogonal(r, 4)),
  ),
  'rotate': (rotations.rotate, lambda r: (_normal(r, 6, 5), _orthogonal(r, 6))),
  'upper_rotation': (rotations.upper_rotation, lambda r: (_normal(r, 6, 8),)),
  'upper_form': (rotations.upper_form, lambda r: (_repeated(r, 6, 9),)),
  'typical_size': (steps.typical_size, lambda r: (_normal(r, 6, 8),)),
  'quantize': (
    steps.quantize,
    lambda r: (_normal(r, 6, 8), np.float32(0.5), np.eye(6, dtype=np.float32)),
  ),
  'canonical_svd': (factorizations.svd, lambda r: (_normal(r, 6, 8),)),
  'canonical_qr': (factorizations.qr, lambda r: (_normal(r, 6, 8),)),
  'basis': (heads.basis, lambda r: (_normal(r, 8, 3),)),
  'with_value_bias': (
    functools.partial(heads.with_value_bias, kv_heads=2),
    lambda r: (_normal(r, 6), _normal(r, 4), _normal(r, 8, 6)),
  ),
  'fix_low_rank': (heads.fix_low_rank, lambda r: (_normal(r, 8, 3), _normal(r, 3, 6))),
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

  @pytest.mark.slow
  @pytest.mark.daily
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
      'from tests import symmetries_test as t\n'
      'assert jax.device_count() == 8\n'
      'for name in t.FUNCTIONS:\n'
      '  t.check_sharded(name)\n'
    )


# ---- beside NumPy --------------------------------------------------------------------


def _random(shape, seed=0, scale=1.0):
  values = np.random.default_rng(seed).standard_normal(shape)
  return (scale * values).astype(np.float32)


def _spanned(below):
  """Returns `[I - B^T B / 4; B]` in float64."""
  below = np.float64(below)
  return np.concatenate([np.eye(below.shape[1]) - below.T @ below / 4, below])


MATRICES = {
  'random': _random((9, 4)),
  'square': _random((4, 4)),
  'of_rank_1': np.outer(_random(9), _random(4, 1)),
  'zero': np.zeros((9, 4), np.float32),
  'opposite_to_the_first_rows': np.eye(9, 4, dtype=np.float32) * -3,
  'orthogonal_to_the_first_rows': np.eye(9, 4, -4, dtype=np.float32),
  'of_equal_rows': np.ones((9, 4), np.float32),
  'ill_conditioned': _random((9, 4)) * np.float32([1e4, 1, 1e-3, 1e-6]),
}


_basis = jax.jit(heads.basis)


class StreamTest(parameterized.TestCase):
  @parameterized.parameters(factorizations.polar, factorizations.quick_polar)
  def test_polar_factors_agree_with_numpy(self, function):
    rng, polar = np.random.default_rng(0), jax.jit(function)
    for d, e, least in ((3, 3, 1.0), (4, 7, 0.5), (48, 48, 0.05), (64, 80, 1e-3)):
      with self.subTest(d=d, e=e, least=least):
        left, right = (random_models.orthogonal(rng, n) for n in (d, e))
        values = np.append(rng.uniform(0.1, 1, d - 3), [least] * 3)
        matrix = (left * values) @ right[:d]
        got = polar(jnp.float32(matrix))
        o, psd = np.float64(got.rotation), np.float64(got.u * got.values) @ got.u.T
        np.testing.assert_allclose(psd, (left * values) @ left.T, atol=1e-5)
        np.testing.assert_allclose(o @ o.T, np.eye(e), atol=1e-5)
        np.testing.assert_allclose(psd @ o[:d], matrix, atol=1e-5)

  def test_quick_polar_of_small_and_no_singular_values(self):
    # Where too many values are small, or nothing is left for the last rows.
    dropped = np.diag(np.arange(64) != 3).astype(np.float32)
    outlier = dropped.copy()
    outlier[3, 3], outlier[5, 5] = 1, 1000
    flat = np.diag(np.repeat(np.float32([1.0, 1e-3]), 32))
    for matrix in (dropped, 0.15 * dropped, outlier, flat):
      got = jax.jit(factorizations.quick_polar)(matrix)
      o, psd = np.float64(got.rotation), np.float64(got.u * got.values) @ got.u.T
      np.testing.assert_allclose(o @ o.T, np.eye(64), atol=1e-5)
      np.testing.assert_allclose(psd @ o, matrix, atol=1e-5 * np.abs(matrix).max())

  def test_a_scan_over_many_layers_is_the_walk_and_orthogonal(self):
    rng = np.random.default_rng(0)
    steps = np.stack([random_models.orthogonal(rng, 16) for _ in range(200)])
    first = random_models.orthogonal(rng, 16)
    walk, expected = first, []
    for step in steps:
      walk = step.T @ walk
      expected.append(walk)
    got = jax.jit(rotations.running_rotations)(jnp.float32(steps), jnp.float32(first))
    got = np.float64(got)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    error = np.abs(np.swapaxes(got, 1, 2) @ got - np.eye(16)).max()
    self.assertLess(error, 2e-6)


class HeadsTest(parameterized.TestCase):
  def test_spans_a_matrix_of_any_rank_and_is_well_conditioned(self):
    for name in MATRICES:
      with self.subTest(name=name):
        matrix = MATRICES[name]
        below, factor = _basis(matrix)
        self.assertEqual(below.dtype, matrix.dtype)
        spanned = _spanned(below)
        wide = np.asarray(factor, spanned.dtype)
        tolerance = 2e-6 * max(np.linalg.norm(matrix), 1e-30)
        np.testing.assert_allclose(spanned @ wide, matrix, rtol=0, atol=tolerance)
        self.assertLess(np.linalg.cond(spanned), 2 + 1e-5)
        if below.size:
          self.assertLess(np.linalg.norm(below, 2), 2 + 1e-5)

  def test_factors_of_any_rank_keep_their_product(self):
    for u in MATRICES.values():
      v = _random((u.shape[1], 9))
      below, other = jax.jit(heads.fix_low_rank)(u, v)
      tolerance = 2e-5 * max(np.linalg.norm(u), 1e-30)
      np.testing.assert_allclose(_spanned(below) @ other, u @ v, atol=tolerance)


CANONICALIZERS = factorizations.svd, factorizations.qr


def _turn(n: int, seed: int) -> np.ndarray:
  key = jax.random.key(seed)
  return np.asarray(jax.random.orthogonal(key, n), np.float64)


def _spread(n: int, m: int, seed: int = 0) -> np.ndarray:
  """Returns a matrix with the singular values 1, 2, ..., n."""
  left, right = _turn(n, seed + 1), _turn(m, seed + 2)
  return (left * np.arange(n, 0, -1.0)) @ right[:n]


class CanonicalTest(parameterized.TestCase):
  @parameterized.parameters(*CANONICALIZERS)
  def test_rotation_of_the_reference_is_found(self, canonicalizer):
    canonicalize = jax.jit(canonicalizer)
    for shape in ((1, 1), (6, 6), (6, 11)):
      w = _spread(*shape)
      reference, q = canonicalize(w)
      np.testing.assert_allclose(q @ reference, w, atol=1e-5)
      np.testing.assert_allclose(q.T @ q, np.eye(shape[0]), atol=2e-6)
      for seed in range(3):
        turn = _turn(shape[0], seed)
        again, found = canonicalize(turn @ np.asarray(reference, np.float64))
        np.testing.assert_allclose(found, turn, atol=2e-5)
        np.testing.assert_allclose(again, reference, atol=1e-4)

  @parameterized.parameters(*CANONICALIZERS)
  def test_degenerate_matrices_give_orthogonal_rotations(self, canonicalizer):
    cases = {
      'zero': np.zeros((6, 8)),
      'identity': np.eye(6, 8),
      'equal': _turn(8, 0)[:6],
      'zero rows': _spread(6, 8) * (np.arange(6) % 2)[:, None],
      'low rank': _spread(2, 8)[[0, 1, 0, 1, 0, 1]],
      'narrow': _spread(4, 4)[[0, 1, 2, 3, 0, 1]],
    }
    for case, w in cases.items():
      reference, q = canonicalizer(w)
      self.assertEqual((reference.dtype, q.dtype), (jnp.float32, jnp.float32))
      np.testing.assert_allclose(q.T @ q, np.eye(6), atol=1e-5, err_msg=case)
      np.testing.assert_allclose(q @ reference, w, atol=1e-5, err_msg=case)


# ---- wrong arguments -----------------------------------------------------------------


def _zeros(*shape):
  return jnp.zeros(shape, jnp.float32)


ERRORS = {
  'a polar factor of a list': (
    lambda: factorizations.polar([4, 3]),
    r'matrix.shape=\(2,\)',
  ),
  'a polar factor of a tall matrix': (
    lambda: factorizations.polar(_zeros(4, 3)),
    r'd <= e, got matrix.shape=\(4, 3\)',
  ),
  'a quick polar factor of a tall matrix': (
    lambda: factorizations.quick_polar(_zeros(4, 3)),
    r'd <= e, got matrix.shape=\(4, 3\)',
  ),
  'singular values of a vector': (
    lambda: factorizations.svd(_zeros(4)),
    r'w.shape=\(4,\)',
  ),
  'a QR factorization of a stack': (
    lambda: factorizations.qr(_zeros(2, 4, 4)),
    r'w.shape=\(2, 4, 4\)',
  ),
  'a step that is no matrix': (
    lambda: factorizations.reorthogonalize(_zeros(4, 3)),
    r'q.shape=\(4, 3\)',
  ),
  'rows of another size': (
    lambda: rotations.rotate(_zeros(4, 3), _zeros(3, 3)),
    r'must be \[4, 4\], got rotation.shape=\(3, 3\)',
  ),
  'columns of another size': (
    lambda: rotations.rotate(_zeros(4), columns=_zeros(3, 3)),
    r'must be \[4, 4\], got rotation.shape=\(3, 3\)',
  ),
  'a narrower segment': (
    lambda: rotations.next_rotation(_zeros(3, 3), _zeros(4, 4)),
    r'step.shape=\(3, 3\)',
  ),
  'a single step': (
    lambda: rotations.running_rotations(_zeros(3, 3), _zeros(3, 3)),
    r'steps.shape=\(3, 3\)',
  ),
  'moments of other inputs': (
    lambda: steps.quantize(_zeros(4, 3), jnp.float32(1), _zeros(3, 3)),
    r'moments.shape=\(3, 3\)',
  ),
  'a wide basis': (lambda: heads.basis(_zeros(2, 3)), r'matrix.shape=\(2, 3\)'),
  'factors of other ranks': (
    lambda: heads.fix_low_rank(_zeros(4, 3), _zeros(2, 4)),
    r'v.shape=\(2, 4\)',
  ),
  'heads that do not divide': (
    lambda: heads.fix_values(
      {heads.VALUE: _zeros(4, 6), heads.OUT: _zeros(6, 4)}, kv_heads=4
    ),
    'attention/value/kernel must have kv_heads=4',
  ),
  'a bias of another kernel': (
    lambda: heads.with_value_bias(_zeros(3), _zeros(4), _zeros(4, 4), kv_heads=2),
    r'out_bias.shape=\(3,\)',
  ),
}


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters(*ERRORS)
  def test_a_wrong_argument_is_named(self, name):
    call, text = ERRORS[name]
    with self.assertRaisesRegex(ValueError, text):
      call()

"""JAX's own switches, which users set globally, change neither bytes nor elements."""

import contextlib
import functools

import jax
import numpy as np
import pytest

from fuzz import seeds
import rotbits_jax

SWITCHES = {
  'jax_enable_x64': True,
  'jax_numpy_rank_promotion': 'raise',
  'jax_numpy_dtype_promotion': 'strict',
  'jax_transfer_guard': 'disallow',
  'jax_debug_nans': True,
  'jax_check_tracer_leaks': True,
  'jax_default_matmul_precision': 'bfloat16',
}
TOGETHER = {name: SWITCHES[name] for name in list(SWITCHES)[:4]}
TREE = {
  'a': {'x': np.arange(5000, dtype=np.float32).reshape(50, 100)},
  'b': np.arange(3000) % 7,
  'c': np.linspace(0, 1, 2000),
}
INPUTS = ('tree', *rotbits_jax.PRESETS)


@contextlib.contextmanager
def switched(switches):
  before = {name: getattr(jax.config, name) for name in switches}
  try:
    for name, value in switches.items():
      jax.config.update(name, value)
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


def encode(given):
  if given == 'tree':
    return rotbits_jax.encode(TREE)
  model = seeds.sliced_model(seeds.LLAMA)
  source = rotbits_jax.Checkpoint(model, seeds.FILES, 'tiny')
  return rotbits_jax.encode(source, preset=given)


@functools.cache
def encoded(given):
  """Returns the bytes and the decoded leaves without any switch."""
  data = encode(given)
  return data, bits(rotbits_jax.decode(data))


def bits(tree):
  return [(x.dtype, np.asarray(jax.device_get(x)).tobytes()) for x in leaves(tree)]


def leaves(tree):
  return jax.tree.leaves(getattr(tree, 'params', tree))


def check(given, switches, folder):
  data, expected = encoded(given)
  with switched(switches):
    assert encode(given) == data
    assert bits(rotbits_jax.decode(data)) == expected
    assert bits(rotbits_jax.load(data)) == expected
    rotbits_jax.verify(data)
    rotbits_jax.inspect(data).to_text()
    if given != 'tree':
      rotbits_jax.decode_to_directory(data, folder / 'out')
      rotbits_jax.load(data, dtype='bfloat16', integers=True)


@pytest.mark.parametrize('given', INPUTS)
def test_switches_together(given, tmp_path):
  check(given, TOGETHER, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('given', INPUTS)
def test_each_switch(given, tmp_path, subtests):
  for name in SWITCHES:
    with subtests.test(name=name):
      check(given, {name: SWITCHES[name]}, tmp_path / name)

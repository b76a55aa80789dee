"""The preset `near`: uniform steps, the bound of the divergence, and its files."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import evaluation
from rotbits_jax import structured
from rotbits_jax.presets import steps as steps_lib

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
TINY = 'llama-tiny-sliced-head-0.25'


@functools.cache
def load(name=TINY):
  return checkpoints.load_checkpoint(TESTDATA / name)


@functools.cache
def encoded(step=-5.0):
  return rotbits_jax.encode(load(), preset='near', step=step)


def tokens_of(model, count=256):
  return np.random.default_rng(0).integers(0, model.config.vocab_size, count)


def is_multiple(leaf):
  return isinstance(leaf, structured.UniformlyQuantized)


def multiples(model):
  return [x for x in structured.flatten(model.params).values() if is_multiple(x)]


def assert_same_bits(plain, loaded):
  """Compares parameters; leaves of integers stand for their arrays."""
  plain, loaded = structured.flatten(plain.params), structured.flatten(loaded.params)
  loaded = {k: x.materialize() if is_multiple(x) else x for k, x in loaded.items()}
  assert structured.same_bits(*jax.device_get((plain, loaded)))


PLACE = jax.NamedSharding(jax.make_mesh((1,), ('layers',)), jax.P('layers'))


@pytest.mark.parametrize('step', [-3.0, -7.0])
def test_integers_stand_for_the_same_numbers(step):
  for options in (
    {},
    {'layers': range(1, 2)},
    {'dtype': jnp.bfloat16},
    {'sharding': PLACE},
  ):
    plain = rotbits_jax.load(encoded(step), **options)
    loaded = rotbits_jax.load(encoded(step), integers=True, **options)
    assert multiples(loaded)
    assert_same_bits(plain, loaded)


def divergence_of(calibration, model, tokens):
  """Returns the mean KL of the decoded checkpoint, in the dtype of the model."""
  data = rotbits_jax.encode(model, preset='near', **calibration.options)
  decoded = rotbits_jax.decode(data)
  dtype = model.params['embed']['tokens'].dtype
  stored = structured.astype(decoded.materialize(), dtype)
  return evaluation.evaluate(stored, tokens, reference=model).kl


@pytest.mark.parametrize(
  ('dtype', 'bound'),
  [
    pytest.param('float16', 1e-3, marks=pytest.mark.slow),
    ('bfloat16', 6e-5),  # rounding to bfloat16 causes about half of it
  ],
)
def test_the_divergence_of_the_file_is_below_the_bound(dtype, bound):
  model = structured.astype(load().model, jnp.dtype(dtype))
  tokens = tokens_of(model)
  calibration = steps_lib.calibrate(model, tokens, max_kl=bound)
  assert calibration.offsets
  assert calibration.inputs
  kl = divergence_of(calibration, model, tokens)
  assert kl <= bound
  assert kl == pytest.approx(calibration.kl, rel=0.01)
  # The next step that was measured is too coarse.
  assert all(
    point.kl > bound for point in calibration.curve if point.step > calibration.step
  )

"""The preset `near`: uniform steps, the bound of the divergence, and its files."""

import functools
import io
import pathlib
import re
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.evaluation import held_out
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


def test_tokens_are_kept_apart_from_the_calibration():
  tokens, config = np.arange(66) % 61, load().model.config
  used, apart = held_out.split(tokens, config, seed=1)
  assert [x.shape for x in (*used, *apart)] == [(1, 16)] * 4
  starts = [int(x[0, 0]) for x in (*used, *apart)]
  assert sorted(starts) == [0, 16, 32, 48]
  _, others = held_out.split(tokens, config, seed=4)
  assert int(others[0][0, 0]) != starts[-1]


def test_a_search_shows_progress_before_its_first_layer(monkeypatch):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, 'stderr', terminal)
  monkeypatch.setattr(passes, 'rewrite', mock.Mock(side_effect=KeyboardInterrupt))
  with pytest.raises(KeyboardInterrupt):
    steps_lib.calibrate(load().model, np.arange(64), max_kl=1e-3, progress=True)
  assert re.search('calibrate: +0%.* records.*removing gauges', terminal.getvalue())


@pytest.mark.parametrize(
  ('dtype', 'bound'),
  [
    pytest.param('float16', 1e-3, marks=[pytest.mark.slow, pytest.mark.daily]),
    ('bfloat16', 6e-5),  # rounding to bfloat16 causes about half of it
  ],
)
def test_the_divergence_on_tokens_kept_apart_is_below_the_bound(dtype, bound, tmp_path):
  model = structured.astype(load().model, jnp.dtype(dtype))
  tokens, path = tokens_of(model), tmp_path / 'model'
  checkpoint = load()._replace(model=model)
  rotbits_jax.save_checkpoint(checkpoint, path)
  calibration = steps_lib.calibrate(model, tokens, max_kl=bound)
  assert calibration.offsets
  assert calibration.inputs
  data = rotbits_jax.encode(checkpoint, preset='near', **calibration.options)
  recorded = rotbits_jax.inspect(data).measured
  assert recorded == calibration.measured
  assert recorded.tokens == 64
  verified = rotbits_jax.verify(
    data, against=path, tokens=np.append(tokens, 0)
  ).measured
  assert verified.kl <= bound
  assert (verified.kl, verified.ear) == pytest.approx((recorded.kl, recorded.ear), 0.01)
  with pytest.raises(ValueError, match='text is not the one'):
    rotbits_jax.verify(data, against=path, tokens=tokens[::-1])
  # The next step that was measured is too coarse.
  assert all(
    point.kl > bound for point in calibration.curve if point.step > calibration.step
  )

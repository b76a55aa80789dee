"""Files of `near` with a given size."""

import functools
import types

import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import presets
from rotbits_jax.file import sizing
from tests import random_models


@functools.cache
def _model():
  config = random_models.BASE | {'num_hidden_layers': 2, 'vocab_size': 600}
  return random_models.random_model(config, np.float16)


def test_the_search_does_not_ask_for_steps_finer_than_the_finest(monkeypatch):
  def at(step, held):
    presets.near(step=step)  # which refuses them
    jumps = 1000.0 if held.get('a', step) >= -11.985 else 1100.0
    return sizing.Steps(step, {}, {'a': jumps, 'b': 100.0})

  sizes = sizing.Sizes.__new__(sizing.Sizes)
  sizes._context = types.SimpleNamespace(config=None)
  sizes.at = at
  monkeypatch.setattr(sizing.models, 'count_elements', lambda config: 200)
  assert sizes.meet(1150, 1.0, 0.0, -5.0).sizes['a'] == 1000


def test_the_file_is_within_a_percent_of_the_size(tmp_path):
  path, target = tmp_path / 'near.rotbits', 45_000
  rotbits_jax.encode_to_file(
    _model(), path, preset='near', target_size=target, offsets={'head/kernel': -1.0}
  )
  assert 0.99 * target <= path.stat().st_size <= target


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'preset': 'near', 'target_size': 5_000}, 'files of about .* which 5 kB is not'),
    ({'preset': 'near', 'target_size': 10**9}, 'files of about .* which 1 GB is not'),
    ({'preset': 'near', 'target_size': 45_000, 'step': -5.0}, 'finds the step'),
    ({'preset': 'free', 'target_size': 45_000}, 'finds the step'),
  ],
)
def test_sizes_that_cannot_be(tmp_path, options, words):
  with pytest.raises(ValueError, match=words):
    rotbits_jax.encode_to_file(_model(), tmp_path / 'near.rotbits', **options)
  assert not [*tmp_path.iterdir()]

"""Presets by name, their options, and one that is registered."""

import math

import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import presets

BAD_OPTIONS = [
  ('fre', {}, r"free, exact, near, paper.*got 'fre'"),
  ('paper', {'transforms': ()}, "'paper' has no option 'transforms'"),
  ('free', {'tolerance': -1.0}, 'tolerance must be a finite number from 0'),
  ('free', {'floor': math.nan}, 'floor must be .* got nan'),
  ('near', {'step': math.inf}, 'step must be a finite number'),
  ('near', {'step': -30}, 'step must be .* from -12 to 1'),
  ('near', {'offsets': {'head/kernel': 'x'}}, 'head/kernel must be a finite'),
  ('paper', {'canonicalizer': 'best'}, 'canonicalizer'),
  ('paper', {'correction': 'threshold'}, 'needs symmetric_eig'),
]


def test_bad_options(subtests):
  for name, options, words in BAD_OPTIONS:
    with subtests.test(words), pytest.raises(ValueError, match=words):
      presets.make(name, **options)


def test_a_preset_that_keeps_the_function_needs_a_model():
  with pytest.raises(ValueError, match='needs a model'):
    rotbits_jax.encode({'a': np.zeros(3)}, preset='free')

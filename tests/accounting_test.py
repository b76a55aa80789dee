"""Sizes from shapes: the paper's table, and the fixtures' files."""

import json
import pathlib

import pytest

from benchmarks import accounting
from configs import published
from rotbits_jax import checkpoints
from rotbits_jax import models

TESTDATA = pathlib.Path(__file__).parent / 'testdata'

# Reductions in percent at 20, 25 and 30%; those of SliceGPT are from arXiv 2410.01309.
# The figures for heads and for the retied embedding are increments. The last is a
# rougher estimate, so its test has a tolerance.
TABLE = {
  'opt-1.3b': {
    'slicegpt': (9.53, 14.84, 20.53),
    'bits_back_ideal': (14.04, 18.83, 24.00),
    'gauge_fixed': (16.72, 20.79, 25.31),
    'heads': 0.44,
    'retied': (5.7, 5.3, 4.9),
  },
  'opt-6.7b': {
    'slicegpt': (9.29, 15.16, 21.18),
    'bits_back_ideal': (14.28, 19.56, 25.00),
    'gauge_fixed': (17.23, 21.66, 26.39),
    'heads': 0.49,
    'retied': (2.3, 2.2, 2.0),
  },
  'llama-2-7b': {
    'slicegpt': (9.38, 15.34, 21.45),
    'bits_back_ideal': (14.47, 19.82, 25.34),
    'gauge_fixed': (17.47, 21.96, 26.76),
    'heads': 0.25,
    'retied': None,
  },
}


def config_of(name):
  if name in published.MODELS:
    return checkpoints.parse_config(published.MODELS[name])
  return checkpoints.parse_config(
    json.loads((TESTDATA / name / 'config.json').read_text())
  )


@pytest.mark.parametrize('name', TABLE)
def test_reductions_to_the_last_digit(name):
  expected = TABLE[name]
  for i, sparsity in enumerate(published.SPARSITIES):
    reduction = accounting.accounting(config_of(name), sparsity).reduction()
    for scheme in ('slicegpt', 'bits_back_ideal', 'gauge_fixed'):
      assert reduction[scheme] == pytest.approx(expected[scheme][i], abs=0.005)
    heads = reduction['gauge_fixed_heads'] - reduction['gauge_fixed']
    assert heads == pytest.approx(expected['heads'], abs=0.005)
    retied = reduction['gauge_fixed_heads_retied']
    if expected['retied'] is None:
      assert retied is None
    else:
      increment = retied - reduction['gauge_fixed_heads']
      assert increment == pytest.approx(expected['retied'][i], abs=0.16)
    # The published coder gets nearly all bits back.
    if name in published.REDUCTIONS:
      assert 0 < reduction['bits_back_ideal'] - published.REDUCTIONS[name][i] < 0.4


@pytest.mark.parametrize(
  ('name', 'size'),
  [
    ('opt-1.3b', 1_315_758_080),
    ('opt-6.7b', 6_658_473_984),
    ('llama-2-7b', 6_738_415_616),
    ('llama-2-13b', 13_015_864_320),
  ],
)
def test_sizes_of_the_models(name, size):
  """They are published with the models. They include norms, and tied heads once."""
  assert models.count_elements(config_of(name)) == size

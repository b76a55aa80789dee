"""Damage of every type to a container of every preset is noticed and named."""

import pytest

from fuzz import containers
from fuzz import seeds
from fuzz import sweep
import rotbits_jax

VARIANTS = ('paper-published', 'paper-entropy')  # many programs are compiled for these
PRESETS = [
  pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ())
  for name in (*seeds.presets_of_sweep(), seeds.PLAIN)
]


def swept(preset, stride):
  """Counts by damage and end, and failures."""
  failures = []
  data, other = seeds.container(preset), seeds.container(preset, seed=1)
  return sweep.sweep(data, other, stride=stride, report=failures.append), failures


@pytest.mark.parametrize('preset', PRESETS)
def test_a_part_of_all_damage(preset):
  counts, failures = swept(preset, stride=401)
  assert not failures
  for damage in ('flip', 'truncation', 'exchange'):
    assert counts[damage, 'refused']
    assert not counts[damage, 'same']


@pytest.mark.slow
@pytest.mark.parametrize('preset', PRESETS)
def test_all_damage(preset):
  counts, failures = swept(preset, stride=1)
  assert not failures
  size = len(seeds.container(preset))
  assert counts['flip', 'refused'] == counts['truncation', 'refused'] == size


def test_a_message_has_the_parameters_of_its_config_and_no_more():
  streams, manifest = containers.unpack(seeds.container('paper'))
  others, of_records = containers.unpack(seeds.container('exact', seed=1))
  arrays = manifest['message']['layout']['arrays']
  less = {name: x for name, x in arrays.items() if name != 'head/kernel'}
  layout = manifest['message']['layout'] | {'arrays': less}
  widths = {'num_layers': 10**5, 'parallel_block': True}
  widths['segment_widths'] = [1] * (10**5 + 1)
  head = [x for x in of_records['records'] if x['name'] == 'head']
  for edit in (
    {'message': manifest['message'] | {'layout': layout}},
    {'config': manifest['config'] | widths},
    {'records': head},
  ):
    more = {'head': others['head']} if 'records' in edit else {}
    data = containers.pack(streams | more, containers.to_json(manifest | edit))
    with pytest.raises(rotbits_jax.ContainerError):
      sweep.numbers(data)

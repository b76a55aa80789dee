"""Damage of every kind to a container of every preset is noticed and named."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from fuzz import containers
from fuzz import seeds
from fuzz import sweep
import rotbits_jax
from rotbits_jax import models
from rotbits_jax import presets

PRESETS = (*seeds.presets_of_sweep(), seeds.PLAIN)
VARIANTS = ('paper-published', 'paper-entropy')  # many programs are compiled for these


def swept(preset, stride):
  """Counts by kind, and failures."""
  failures = []
  data = seeds.container(preset)
  other = seeds.container(preset, seed=1)
  return sweep.sweep(data, other, stride=stride, report=failures.append), failures


class SweepTest(parameterized.TestCase):
  def test_every_preset_is_swept(self):
    self.assertContainsSubset(presets.PRESETS, PRESETS)

  @parameterized.parameters(*(x for x in PRESETS if x not in VARIANTS))
  def test_a_part_of_all_damage(self, preset):
    self.check_a_part(preset)

  @parameterized.parameters(*VARIANTS)
  @pytest.mark.slow
  def test_a_part_of_all_damage_to_variants(self, preset):
    self.check_a_part(preset)

  def check_a_part(self, preset):
    counts, failures = swept(preset, stride=401)
    self.assertEmpty(failures)
    self.assertEqual(set(counts), {'flip', 'truncation', 'swap', 'exchange', 'field'})
    for kind in ('flip', 'truncation', 'exchange'):
      self.assertEqual(counts[kind].refused, counts[kind].cases)

  @parameterized.parameters(*PRESETS)
  @pytest.mark.slow
  def test_all_damage(self, preset):
    counts, failures = swept(preset, stride=1)
    self.assertEmpty(failures)
    size = len(seeds.container(preset))
    self.assertEqual(counts['flip'].cases, size)
    self.assertEqual(counts['truncation'].cases, size)

  def test_a_decoder_that_checks_nothing_is_found_out(self):
    data = seeds.container('exact')
    other = seeds.container('exact', seed=1)
    wrong, failures = {'x': ('', b'')}, []
    real = sweep.numbers
    lenient = lambda damaged: real(damaged) if damaged == data else wrong
    with absltest.mock.patch.object(sweep, 'numbers', lenient):
      counts = sweep.sweep(data, other, stride=401, report=failures.append)
    self.assertEqual(
      sum(x.failures for x in counts.values()), sum(x.cases for x in counts.values())
    )
    self.assertIn('other numbers, and no error', failures[0])


def test_a_message_without_a_parameter():
  streams, manifest = containers.unpack(seeds.container('paper'))
  del manifest['message']['layout']['arrays']['head/kernel']
  data = containers.pack(streams, containers.to_json(manifest))
  with pytest.raises(rotbits_jax.ContainerError, match='other parameters'):
    sweep.numbers(data)


def test_a_message_of_fewer_arrays_than_layers_is_refused_at_once():
  streams, manifest = containers.unpack(seeds.container('paper'))
  layers = 100_000
  manifest['config'] |= {
    'num_layers': layers,
    'parallel_block': True,
    'segment_widths': [1] * (layers + 1),
  }
  data = containers.pack(streams, containers.to_json(manifest))
  with (
    absltest.mock.patch.object(models, 'layer_shapes') as shapes,
    pytest.raises(rotbits_jax.ContainerError, match='other parameters'),
  ):
    rotbits_jax.inspect(data)
  shapes.assert_not_called()


def test_a_message_beside_a_record():
  streams, manifest = containers.unpack(seeds.container('paper'))
  others, of_records = containers.unpack(seeds.container('exact', seed=1))
  manifest['records'] = [x for x in of_records['records'] if x['name'] == 'head']
  data = containers.pack(
    streams | {'head': others['head']}, containers.to_json(manifest)
  )
  with pytest.raises(rotbits_jax.ContainerError, match='there are no other records'):
    rotbits_jax.inspect(data)


def test_decode_leaves_nothing_behind(tmp_path, rotbits):
  data = bytearray(seeds.container('free'))
  sections = {name: start for name, start, _ in sweep._sections(bytes(data))}
  for name in ('layers.0', 'embed', 'head', 'files/config.json', 'manifest'):
    damaged = bytearray(data)
    damaged[sections[name] + 3] ^= 4
    file = tmp_path / 'damaged.rotbits'
    file.write_bytes(damaged)
    output = tmp_path / 'out'
    code, _, err = rotbits('decode', f'--input={file}', f'--output={output}')
    assert code == 2
    errors = [x for x in err.splitlines() if x.startswith('rotbits')]
    assert len(errors) == 1
    assert name in errors[0]
    assert sorted(pathlib.Path(tmp_path).iterdir()) == [file]


if __name__ == '__main__':
  absltest.main()

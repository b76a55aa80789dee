"""Presets by name, their options, and presets of other packages."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import passes
from rotbits_jax import presets

ROOT = pathlib.Path(__file__).parents[1]
SLICED = ROOT / 'tests' / 'testdata' / 'llama-tiny-sliced-head-0.25'
# What another package needs for a preset: this file and an entry point.


class TestMake:
  def test_a_preset_is_returned(self):
    preset = presets.free()
    assert presets.make(preset) is preset
    with pytest.raises(ValueError, match='only with the name'):
      presets.make(preset, tolerance=1.0)

  def test_unknown_names_and_options(self):
    with pytest.raises(ValueError, match=r"free, exact, near, paper.*got 'fre'"):
      presets.make('fre')
    with pytest.raises(ValueError, match="'paper' has no option 'transforms'"):
      presets.make('paper', transforms=())

  def test_options_are_checked(self, subtests):
    for name, options, words in (
      ('free', {'tolerance': -1.0}, 'tolerance .* at least 0, got -1.0'),
      ('free', {'tolerance': True}, 'tolerance must be a finite number'),
      ('free', {'floor': float('nan')}, 'floor must be .* at least -64, got nan'),
      ('free', {'floor': -65}, 'floor must be .* at least -64, got -65'),
      ('free', {'floor': 1.5}, 'floor must be at most 1, got 1.5: near rounds'),
      ('near', {'step': float('inf')}, 'step must be a finite number'),
      ('near', {'step': -30}, '`free` keeps more'),
      ('near', {'offsets': {'head/kernel': 'x'}}, 'head/kernel must be a finite'),
      ('paper', {'canonicalizer': 'best'}, 'canonicalizer: .*polar_shortcut, qr, svd'),
      ('paper', {'threshold': -1.0}, 'threshold: must not be negative'),
      ('paper', {'correction': 'threshold'}, 'needs symmetric_eig'),
    ):
      with (
        subtests.test(name=name, options=options),
        pytest.raises(ValueError, match=words),
      ):
        presets.make(name, **options)

  def test_options_are_json(self):
    for name in presets.PRESETS:
      options = presets.make(name).options
      assert json.loads(json.dumps(options)) == options


def test_exact_with_transforms_keeps_the_function_only():
  assert presets.exact().keeps == 'bits'
  made = presets.exact(transforms=(passes.Transform('nothing'),))
  assert (made.keeps, made.resumable) == ('function', False)
  with pytest.raises(ValueError, match='needs a model'):
    rotbits_jax.encode({'a': np.zeros(3)}, preset=made)


@pytest.mark.slow
def test_a_type_checker_finds_an_unknown_preset(tmp_path):
  program = tmp_path / 'program.py'
  program.write_text(
    "import rotbits_jax\nrotbits_jax.encode({}, preset='exact')\n"
    "rotbits_jax.encode({}, preset='fre')\n"
  )
  command = [sys.executable, '-m', 'mypy', '--follow-imports=silent', program]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  (line,) = [x for x in done.stdout.splitlines() if 'error:' in x]
  assert 'program.py:3: error: Argument "preset" to "encode"' in line


def test_every_name_of_the_package_is_known_to_type_checkers():
  source = pathlib.Path(rotbits_jax.__file__).read_text()
  names = set(re.findall(r'^  from [\w.]+ import (\w+) as \1', source, re.M))
  assert names == set(rotbits_jax.__all__)

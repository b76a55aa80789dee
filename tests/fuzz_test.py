"""What the fuzzer found stays mended, and a part of the fuzzing is run again."""

import ast
import contextlib
import json
import pathlib
import random
import time

import pytest

from fuzz import classes
from fuzz import containers
from fuzz import run
from fuzz import seeds
from fuzz import targets
import rotbits_jax
from rotbits_jax import structured

CORPUS = pathlib.Path(run.__file__).parent / 'corpus'
INPUTS = sorted(path for path in CORPUS.glob('*/*') if path.is_file())
MAY_SUCCEED = {('torch_zip', 'stored'), ('gguf', 'llama')}
RANDOM = {'codecs'}  # targets whose seeds are random bytes, which may be refused


@pytest.mark.parametrize('name', sorted({path.parent.name for path in INPUTS}))
def test_inputs_of_the_corpus_end_in_the_error_that_is_promised(name):
  target = targets.TARGETS[name]
  for path in INPUTS:
    if path.parent.name != name:
      continue
    start = time.process_time()
    if (name, path.name) in MAY_SUCCEED:
      target.run(path.read_bytes())
    else:
      with pytest.raises(target.expected):
        target.run(path.read_bytes())
    assert time.process_time() - start < 5, path


# Targets that read models of several presets, for which many programs are compiled.
OF_MODELS = ('chains', 'container', 'manifest', 'paper', 'special_numbers')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow) if name in OF_MODELS else name
    for name in targets.TARGETS
  ],
)
def test_a_target_reads_its_seeds(name):
  target = targets.TARGETS[name]
  inputs = list(target.seeds())
  assert inputs
  for data in inputs:
    with contextlib.suppress(*([] if name not in RANDOM else target.expected)):
      target.run(data)


@pytest.mark.parametrize(
  'name',
  [
    *('config', 'leaves', 'safetensors', 'torch_zip', 'gguf'),
    *('plain_safetensors', 'plain_torch', 'weights_index'),
  ],
)
def test_a_few_mutations_end_well(name):
  target = targets.TARGETS[name]
  inputs, changed = list(target.seeds()), 0
  for seed in range(60):
    rng = random.Random(seed)
    flip = lambda data, rng=rng: _flipped(data, rng)
    data = target.mutate(rng.choice(inputs), rng, flip)
    changed += data not in inputs
    with contextlib.suppress(*target.expected):
      target.run(data)
  assert changed > 40


def test_every_type_of_leaf_is_fuzzed():
  fuzzed = {json.loads(leaf)['type'] for leaf in seeds.stored_leaves()}
  own = {
    name
    for name, cls in structured.TYPES.items()
    if cls.__module__.startswith('rotbits_jax.')
  }
  assert fuzzed == own


def _flipped(data, rng):
  flipped = bytearray(data or b'x')
  flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
  return bytes(flipped)


def test_damage_with_the_checksums_made_right_is_found_behind_them():
  streams, manifest = containers.unpack(seeds.container('exact'))
  streams['head'] = streams['head'][:-1] + bytes([streams['head'][-1] ^ 1])
  text = containers.to_json(manifest)
  with pytest.raises(rotbits_jax.ContainerError, match='head: the stream is damaged'):
    rotbits_jax.decode(containers.pack(streams, text))
  text = containers.to_json(containers.sealed(streams, manifest))
  with pytest.raises(rotbits_jax.ContainerError, match=r'head: .*array 0'):
    rotbits_jax.decode(containers.pack(streams, text))


def test_a_model_of_an_unknown_family_does_not_become_a_checkpoint(tmp_path):
  streams, manifest = containers.unpack(seeds.container('exact'))
  manifest['config']['family'] = 'x'
  data = containers.pack(streams, containers.to_json(manifest))
  with pytest.raises(rotbits_jax.ContainerError, match="of the family 'x'"):
    rotbits_jax.decode_to_directory(data, tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', list(classes.CLASSES))
def test_the_tests_of_a_class_exist(name):
  for test in classes.CLASSES[name].tests:
    file, *names = test.split('::')
    body = ast.parse((classes.ROOT / file).read_text()).body
    for own in names:
      (found,) = [x for x in body if getattr(x, 'name', '') == own]
      body = found.body


def test_cases_of_tests_are_counted(tmp_path, capsys):
  (tmp_path / 'a_test.py').write_text("""
import unittest
import pytest

class Test(unittest.TestCase):
  def test_of_three(self):
    for i in range(3):
      with self.subTest(i=i):
        assert i

def test_skipped():
  pytest.skip()

@pytest.mark.slow
def test_slow():
  pass
""")
  counts = classes.run([str(tmp_path / 'a_test.py')])
  # A test that has subtests is a case, too.
  assert counts[:3] == (6, 1, 1)
  assert 'test_of_three' in capsys.readouterr().out
  with pytest.raises(RuntimeError, match='not found'):
    classes.run([str(tmp_path / 'b_test.py')])


@pytest.mark.slow
@pytest.mark.parametrize('name', list(targets.TARGETS))
def test_fuzz(name, tmp_path):
  result = run.fuzz(name, 2000, seconds=120, failures=tmp_path, corpus=CORPUS)
  assert not result.failures
  assert result.executions > 100

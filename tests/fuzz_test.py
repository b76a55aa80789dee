"""What the fuzzer found stays mended, and a part of the fuzzing is run again."""

import contextlib
import json
import random

import pytest

from fuzz import containers
from fuzz import run
from fuzz import seeds
from fuzz import targets
import rotbits_jax
from rotbits_jax import structured

INPUTS = sorted(path for path in run.CORPUS.glob('*/*') if path.is_file())
OF_MODELS = 'container'  # for which many programs are compiled


def test_inputs_of_the_corpus_end_in_the_error_that_is_promised(subtests):
  for path in INPUTS:
    target = targets.TARGETS[path.parent.name]
    with subtests.test(path=path):
      if path.name == 'stored':
        target.run(path.read_bytes())
      else:
        with pytest.raises(target.expected):
          target.run(path.read_bytes())


def _flipped(data, rng):
  flipped = bytearray(data or b'x')
  flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
  return bytes(flipped)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow if name == OF_MODELS else ())
    for name in targets.TARGETS
  ],
)
def test_a_target_reads_its_seeds_and_mutations_of_them(name):
  target = targets.TARGETS[name]
  inputs, changed = list(target.seeds()), 0
  for data in inputs:
    target.run(data)
  for seed in range(40):
    rng = random.Random(seed)
    data = target.mutate(rng.choice(inputs), rng, lambda x, rng=rng: _flipped(x, rng))
    changed += data not in inputs
    with contextlib.suppress(target.expected):
      target.run(data)
  assert changed > 20


def test_every_type_of_leaf_is_fuzzed():
  fuzzed = {json.loads(leaf)['type'] for leaf in seeds.stored_leaves()}
  types = structured.TYPES.items()
  assert fuzzed == {x for x, y in types if y.__module__.startswith('rotbits_jax.')}


def test_damage_with_the_checksums_made_right_is_found_behind_them():
  streams, manifest = containers.unpack(seeds.container('exact'))
  streams['head'] = streams['head'][:-1] + bytes([streams['head'][-1] ^ 1])
  text = containers.to_json(containers.sealed(streams, manifest))
  with pytest.raises(rotbits_jax.ContainerError, match=r'head: .*array 0'):
    rotbits_jax.decode(containers.pack(streams, text))


@pytest.mark.slow
@pytest.mark.parametrize('name', list(targets.TARGETS))
def test_fuzz(name, tmp_path):
  pytest.importorskip('atheris')
  assert not run.fuzz(name, tmp_path, executions=2000, seconds=120)

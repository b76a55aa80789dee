"""What the fuzzer found stays mended, and a part of the fuzzing is run again."""

import contextlib
import json
import random

import pytest

from fuzz import containers
from fuzz import edits
from fuzz import manifests
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


def assert_no_failures(counts):
  assert counts['refused']
  assert counts['decoded']
  assert not counts.keys() - {'refused', 'decoded'}


@pytest.mark.parametrize('name', manifests.KINDS)
def test_edited_manifests_are_refused_or_read(name):
  assert_no_failures(manifests.fuzz(name, 60))


@pytest.mark.slow
@pytest.mark.parametrize('name', manifests.KINDS)
def test_many_edited_manifests(name):
  assert_no_failures(manifests.fuzz(name, 2000, seed=1))


def test_equal_seeds_make_equal_edits():
  _, manifest = containers.unpack(seeds.container('free'))
  donors = edits.Donors.of([manifest])
  edited = [
    [edits.edited(manifest, donors, random.Random(f'{seed}')) for seed in range(20)]
    for _ in range(2)
  ]
  assert edited[0] == edited[1]


def test_the_first_file_of_each_failure_is_kept(monkeypatch, tmp_path):
  original = rotbits_jax.file.Reader.names

  def names(reader):
    return original(reader) + reader.manifest.options['missing']

  monkeypatch.setattr(rotbits_jax.file.Reader, 'names', names)
  counts = manifests.fuzz('plain', 20, failures=tmp_path)
  (failure,) = counts.keys() - {'refused', 'decoded'}
  assert failure.startswith('KeyError')
  assert counts[failure] > 1
  (folder,) = tmp_path.iterdir()
  assert sorted(x.name for x in folder.iterdir()) == ['failure.txt', 'x.rotbits']


@pytest.mark.slow
@pytest.mark.parametrize('name', list(targets.TARGETS))
def test_fuzz(name, tmp_path):
  pytest.importorskip('atheris')
  assert not run.fuzz(name, tmp_path, executions=2000, seconds=120)

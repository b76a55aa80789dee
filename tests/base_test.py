"""Files beside a base: API, CLI, chains, wrong bases, shards, resume."""

import json
import pathlib
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from fuzz import seeds
import rotbits_jax
from rotbits_jax import file
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.file import reader as reader_lib

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
DENSE = TESTDATA / 'llama-tiny-dense'
SLICED = TESTDATA / 'phi2-tiny-sliced-0.25'


def near(array, *, seed=0, scale=2.0**-8):
  """An array that differs from another as a fine-tune does."""
  rng = np.random.default_rng(seed)
  wide = np.asarray(array, np.float64)
  return (wide + scale * wide.std() * rng.normal(size=wide.shape)).astype(array.dtype)


def tree(seed=0, dtype=ml_dtypes.bfloat16):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(dtype)
  return {'a': {'w': normal(200, 96), 'b': normal(96)}, 'c': normal(64, 128)}


def tuned(base, seed=1):
  return jax.tree.map(lambda x: near(x, seed=seed), base)


def tuned_checkpoint(folder, *, source=DENSE, seed=1):
  """A fine-tune of a checkpoint of the tests, in a folder."""
  checkpoint = rotbits_jax.load_checkpoint(source)
  model = checkpoint.model.replace(params=tuned(checkpoint.model.params, seed))
  rotbits_jax.save_checkpoint(checkpoint._replace(model=model), folder)
  return folder


def plain_checkpoint(folder, tensors, *, kind='unknown'):
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps({'model_type': kind}))
  safetensors_numpy.save_file(tensors, folder / 'model.safetensors')
  return folder


def same_files(a, b):
  names = lambda folder: sorted(x.name for x in folder.iterdir())
  assert names(a) == names(b)
  return all((b / x.name).read_bytes() == x.read_bytes() for x in a.iterdir())


def tensors_of(folder):
  return safetensors_numpy.load_file(folder / 'model.safetensors')


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
def test_a_tree_beside_another_comes_back(dtype):
  base = tree(dtype=jnp.dtype(dtype))
  new = tuned(base)
  data = rotbits_jax.encode(new, base=base)
  assert len(data) < 0.8 * len(rotbits_jax.encode(new))
  assert structured.same_bits(rotbits_jax.decode(data, base=base), new)
  assert structured.same_bits(rotbits_jax.decode(data, base=base, like=new), new)
  loaded = rotbits_jax.load(data, base=base)
  assert structured.same_bits(jax.device_get(loaded), new)
  found = rotbits_jax.read_tensor(data, 'a/w', base=base)
  assert structured.same_bits(found, new['a']['w'])
  found = rotbits_jax.read_record(data, 'c', base=base)
  assert structured.same_bits(found, {'c': new['c']})
  assert rotbits_jax.verify(data, base=base).tensors == 3
  assert structured.same_bits(rotbits_jax.read_tensor(data, 'c', base=base), new['c'])


def test_what_the_base_lacks_is_stored_alone():
  base = tree()
  new = tuned(base) | {'more': near(base['c']), 'few': np.arange(3)}
  del base['a']['b']
  data = rotbits_jax.encode(new, base=base)
  assert structured.same_bits(rotbits_jax.decode(data, base=base), new)
  needs = rotbits_jax.inspect(data).needs
  assert sorted(needs) == ['a/w', 'c']
  assert (needs['a/w'].shape, needs['a/w'].dtype) == ((200, 96), 'bfloat16')


def test_an_embedding_that_is_predicted_from_its_head(monkeypatch):
  near_of = reader_lib._StoredLeaf.near  # the embedding waits for a slow head
  slow = lambda x: time.sleep(x.entry.path.startswith('head') / 20) or near_of(x)
  monkeypatch.setattr(reader_lib._StoredLeaf, 'near', slow)
  model = seeds.sliced_model(seeds.LLAMA | {'vocab_size': 2000})
  outer = model.outer()
  table, kernel = outer['embed']['tokens'], outer['head']['kernel']
  outer |= {'embed': {'tokens': near(table, scale=2)}, 'head': {'kernel': near(kernel)}}
  other = models.from_layers(model.config, outer, list(model.layers()))
  alone = rotbits_jax.encode(model, preset='exact')
  for base, form, share in ((model, 'unchanged', 0.2), (other, 'difference', 0.9)):
    data = rotbits_jax.encode(model, preset='exact', base=base)
    assert len(data) < share * len(alone)
    notes = rotbits_jax.inspect(data).notes['relative to a base']
    assert {'tensor': 'embed/tokens', 'form': form} in notes
    found = rotbits_jax.decode(data, base=base)
    assert structured.same_bits(found.params, model.params)


def test_arrays_that_each_machine_sums_are_no_base():
  model = rotbits_jax.load_checkpoint(SLICED).model
  base = rotbits_jax.encode(model, preset='free')
  params = jax.device_get(rotbits_jax.decode(base).materialize().params)
  new = model.replace(params=tuned(params))
  data = rotbits_jax.encode(new, preset='exact', base=base)
  found = rotbits_jax.decode(data, base=base)
  assert structured.same_bits(dict(found.leaves()), dict(new.leaves()))
  needed = rotbits_jax.inspect(data).needs
  below = file.Reader(base)
  summed = {
    path
    for record in below.records
    for path, leaf in structured.flatten(below.read(record)).items()
    if isinstance(leaf, structured.IdentityMinusGram | structured.HeadBases)
  }
  assert needed
  assert summed
  assert not summed & needed.keys()


OPTIMIZER = {'m': (np.zeros((0, 3), np.float16), np.float32(3)), 'n': np.arange(9)}


@pytest.mark.parametrize('new', [OPTIMIZER, OPTIMIZER | {'d': {}, 'n': np.zeros(9)}])
def test_an_optimizer_beside_an_earlier_one(new):
  data = rotbits_jax.encode(new, base=OPTIMIZER)
  assert len(data) < 4000
  found = rotbits_jax.decode(data, base=OPTIMIZER, like=new)
  assert structured.same_bits(found, new)


def test_a_wrong_base_is_refused_by_name():
  base = tree()
  data = rotbits_jax.encode(tuned(base), base=base)
  decode = rotbits_jax.decode
  with pytest.raises(file.ContainerError, match='it needs base='):
    decode(data)
  with pytest.raises(file.ContainerError, match='another base: it has no c'):
    decode(data, base={'a': base['a']})
  for other, words in (
    (base['c'].astype(np.float32), 'its c is float32 .*, not bfloat16'),
    (base['c'][:-1], 'its c is bfloat16 '),
    (tuned(base['c']), 'its c has other elements'),
  ):
    with pytest.raises(file.ContainerError, match=f'c: this is another base: {words}'):
      decode(data, base=base | {'c': other})
  with pytest.raises(ValueError, match=r'has no .*, nor any other array'):
    rotbits_jax.encode(tree(), base={'x': base['c']})


def test_a_model_beside_another(tmp_path):
  path = tuned_checkpoint(tmp_path / 'tuned')
  base = rotbits_jax.load_checkpoint(DENSE).model
  model = rotbits_jax.load_checkpoint(path).model
  data = rotbits_jax.encode(model, base=base)
  assert len(data) < 0.6 * len(rotbits_jax.encode(model, preset='exact'))
  for own in (base, DENSE, str(DENSE), rotbits_jax.open_checkpoint(DENSE)):
    found = rotbits_jax.decode(data, base=own)
    assert isinstance(found, models.Model)
    assert structured.same_bits(found.params, model.params)
  whole = rotbits_jax.encode(base, preset='exact')
  for own in (whole, file.Reader(whole)):
    assert structured.same_bits(rotbits_jax.decode(data, base=own).params, model.params)


def test_checkpoints_on_disk(tmp_path):
  path = tuned_checkpoint(tmp_path / 'tuned')
  encoded = tmp_path / 'x.rotbits'
  rotbits_jax.encode_to_file(path, encoded, base=DENSE, check=True)
  rotbits_jax.decode_to_directory(encoded, tmp_path / 'again', base=DENSE)
  assert structured.same_bits(tensors_of(tmp_path / 'again'), tensors_of(path))
  assert rotbits_jax.verify(encoded, against=path, base=DENSE).same_bits
  with pytest.raises(file.ContainerError, match=r'differs from .* the first at \['):
    rotbits_jax.verify(encoded, against=DENSE, base=DENSE)
  with pytest.raises(file.ContainerError, match='other elements'):
    rotbits_jax.decode_to_directory(encoded, tmp_path / 'other', base=path)
  assert not (tmp_path / 'other').exists()
  found = rotbits_jax.decode_checkpoint(encoded, base=DENSE)
  assert 'config.json' in found.files


def test_shards_beside_shards(tmp_path):
  path = tuned_checkpoint(tmp_path / 'tuned')
  size = 40_000
  base, tuned = tmp_path / 'base', tmp_path / 'x'
  rotbits_jax.encode_to_file(DENSE, base, shard_size=size)
  rotbits_jax.encode_to_file(path, tuned, base=base, shard_size=size)
  assert len(list(tuned.glob('*.rotbits'))) > 1
  for own in (base, base / 'model.rotbits.index.json', DENSE):
    assert rotbits_jax.verify(tuned, against=path, base=own).same_bits


def test_a_chain_of_bases(tmp_path):
  steps = [tree()]
  for i in range(3):
    steps.append(tuned(steps[-1], seed=i))
  paths = [tmp_path / f'{i}.rotbits' for i in range(4)]
  rotbits_jax.encode_to_file(steps[0], paths[0])
  for i in range(1, 4):
    below = [paths[j] for j in range(i - 1, -1, -1)]
    rotbits_jax.encode_to_file(steps[i], paths[i], base=below)
  chain = paths[2::-1]
  decode = rotbits_jax.decode
  assert structured.same_bits(decode(paths[3], base=chain), steps[3])
  assert structured.same_bits(decode(paths[3], base=[*chain[:2], steps[0]]), steps[3])
  reader = file.Reader(paths[2], base=[paths[1], steps[0]])
  assert structured.same_bits(decode(paths[3], base=reader), steps[3])
  with pytest.raises(file.ContainerError, match='it needs base='):
    decode(paths[3], base=paths[2])


@pytest.mark.parametrize('prefixes', [('', 'model.'), ('base_model.model.', 'model.')])
def test_names_that_differ_by_a_prefix(prefixes, tmp_path):
  rng = np.random.default_rng(0)
  base = {f'h.{i}.weight': rng.normal(size=(64, 80)).astype(np.float16) for i in (0, 1)}
  new = {name: near(x) for name, x in base.items()}
  with_prefix = lambda p, tensors: {f'{p}{name}': x for name, x in tensors.items()}
  own = plain_checkpoint(tmp_path / 'base', with_prefix(prefixes[0], base))
  path = plain_checkpoint(tmp_path / 'new', with_prefix(prefixes[1], new))
  encoded = tmp_path / 'x.rotbits'
  rotbits_jax.encode_to_file(path, encoded, base=own)
  assert sorted(rotbits_jax.inspect(encoded).needs) == sorted(tensors_of(own))
  rotbits_jax.decode_to_directory(encoded, tmp_path / 'again', base=own)
  assert same_files(path, tmp_path / 'again')
  # Any folder with these tensors will do.
  renamed = plain_checkpoint(tmp_path / 'renamed', with_prefix('module.', base))
  assert rotbits_jax.verify(encoded, against=path, base=renamed).same_bits

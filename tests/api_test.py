"""What the functions of a session take: readers, `like`, metadata, any PyTree."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import file

GOLDEN = pathlib.Path(__file__).parent / 'testdata' / 'golden' / 'v1'

TREE = {'a': {'w': np.arange(6, dtype=np.float32)}, 'b': np.ones(3, np.float16)}
METADATA = {'step': '1000', 'Größe': 'ein\nText'}


def test_no_tree_at_the_top():
  with pytest.raises(
    ValueError, match='the tree: expected arrays of numbers, got None'
  ):
    rotbits_jax.encode(None)


def test_none_inside_a_tree_is_an_empty_container():
  tree = {'a': None, 'b': np.ones(2)}
  assert rotbits_jax.decode(rotbits_jax.encode(tree), like=tree)['a'] is None


def test_keys_that_jax_cannot_sort():
  tree = {'x': {1: np.ones(2), 'a': np.ones(1)}}
  with pytest.raises(ValueError, match=r'^x: JAX cannot sort keys .* int and str$'):
    rotbits_jax.encode(tree)


def test_a_reader_reads_tensors_by_name(tmp_path):
  rotbits_jax.encode_to_file(TREE, tmp_path / 'x')
  with rotbits_jax.open(tmp_path / 'x') as reader:
    assert reader.keys() == ['a/w', 'b']
    np.testing.assert_array_equal(reader.tensor('a/w'), TREE['a']['w'])
    assert [*reader.record('b')] == ['b']


def test_a_tensor_is_read_without_the_rest(tmp_path):
  rotbits_jax.encode_to_file(TREE, tmp_path / 'x')
  reader = rotbits_jax.open(tmp_path / 'x')
  data = bytearray((tmp_path / 'x').read_bytes())
  begin, end = json.loads(data[8 : data.index(b'}}') + 2])['a']['data_offsets']
  start = 8 + int.from_bytes(data[:8], 'little')
  data[start + begin : start + end] = bytes(end - begin)
  broken = rotbits_jax.open(bytes(data))
  np.testing.assert_array_equal(broken.tensor('b'), reader.tensor('b'))
  with pytest.raises(file.ContainerError):
    broken.tensor('a/w')


def test_a_message_decodes_whole():
  reader = rotbits_jax.open(GOLDEN / 'paper.rotbits')
  assert 'embed/tokens' in reader.keys()  # noqa: SIM118  no dict
  with pytest.raises(file.ContainerError, match='the preset paper decodes whole'):
    reader.tensor('embed/tokens')


@pytest.mark.parametrize('read', [rotbits_jax.decode, rotbits_jax.load])
def test_readers_are_taken_with_their_base(read):
  base = {'w': np.arange(900, dtype=np.float32)}
  data = rotbits_jax.encode({'w': base['w'] + np.eye(30).ravel()}, base=base)
  reader = rotbits_jax.open(data, base=base)
  np.testing.assert_array_equal(read(reader)['w'], read(data, base=base)['w'])
  with pytest.raises(ValueError, match='an opened file has its base'):
    read(reader, base=base)


def test_readers_of_checkpoints(tmp_path, monkeypatch):
  monkeypatch.setenv('ROTBITS_JAX_CACHE', str(tmp_path / 'cache'))
  source = checkpoints.example('llama-tiny-dense')
  rotbits_jax.encode_to_file(source, tmp_path / 'x')
  reader = rotbits_jax.open(tmp_path / 'x')
  rotbits_jax.decode_to_directory(reader, tmp_path / 'folder')
  names = {x.name for x in (tmp_path / 'folder').iterdir()}
  assert {x.name for x in rotbits_jax.snapshot(reader).iterdir()} == names
  assert rotbits_jax.decode_checkpoint(reader).model.config.num_layers
  assert rotbits_jax.inspect(reader).file_bytes == (tmp_path / 'x').stat().st_size
  name = reader.keys()[0]
  assert rotbits_jax.read_tensor(reader, name).shape == reader.tensor(name).shape
  record = next(iter(reader.records))
  assert rotbits_jax.read_record(reader, record).keys() == reader.record(record).keys()


def test_a_delta_is_applied_from_its_reader():
  new = jax.tree.map(lambda x: x + 1, TREE)
  data = rotbits_jax.delta(new, TREE, metadata={'step': '7'})
  reader = rotbits_jax.open(data)
  assert reader.metadata == {'step': '7'}
  np.testing.assert_array_equal(rotbits_jax.apply(reader, TREE)['b'], new['b'])
  with pytest.raises(ValueError, match='the base of a delta is `params`'):
    rotbits_jax.apply(rotbits_jax.open(data, base=TREE), TREE)


def test_metadata_comes_back(tmp_path):
  rotbits_jax.encode_to_file(TREE, tmp_path / 'x', metadata=METADATA, shard_size=24)
  assert rotbits_jax.open(tmp_path / 'x').metadata == METADATA
  report = rotbits_jax.inspect(tmp_path / 'x')
  assert report.to_json()['metadata'] == METADATA
  assert '  step: 1000\n' in report.to_text()
  assert 'ein\nText' not in report.to_text()  # no text of a file makes lines


def test_no_metadata_leaves_the_bytes_of_files():
  assert rotbits_jax.encode(TREE, metadata={}) == rotbits_jax.encode(TREE)


@pytest.mark.parametrize(
  'metadata',
  [
    {'a': 1},
    {1: 'a'},
    {'a': 'x' * 70_000},
    {'a': '\ud800'},
    dict.fromkeys(map(str, range(2000)), ''),
  ],
)
def test_metadata_that_no_file_holds(metadata):
  with pytest.raises(ValueError, match=r'^metadata: '):
    rotbits_jax.encode(TREE, metadata=metadata)


def test_metadata_on_the_command_line(tmp_path, rotbits):
  arguments = '--metadata=run=a=b', '--metadata=step=7'
  code, _, _ = rotbits('encode', checkpoints.example(), tmp_path / 'x', *arguments)
  assert code == 0
  assert rotbits_jax.open(tmp_path / 'x').metadata == {'run': 'a=b', 'step': '7'}
  code, _, err = rotbits(
    'encode', checkpoints.example(), tmp_path / 'y', '--metadata=run'
  )
  assert code == 2
  assert "--metadata must be KEY=VALUE, each key once, got 'run'" in err
  assert not (tmp_path / 'y').exists()


def test_load_restores_structure_and_shardings():
  mesh = jax.make_mesh((1,), ('x',))
  sharding = jax.NamedSharding(mesh, jax.P('x'))
  like = [jax.ShapeDtypeStruct((4,), np.float32, sharding=sharding), (np.zeros(2),)]
  tree = [np.arange(4, dtype=np.float32), (np.float64([1, 1 / 3]),)]
  loaded = rotbits_jax.load(rotbits_jax.encode(tree), like=like)
  assert jax.tree.structure(loaded) == jax.tree.structure(tree)
  assert isinstance(loaded[0], jax.Array)
  assert loaded[0].sharding == sharding
  assert loaded[1][0].dtype == np.float64  # which JAX would narrow


def test_load_restores_a_model():
  model = rotbits_jax.load_checkpoint(checkpoints.example('llama-tiny-dense')).model
  data = rotbits_jax.encode(model)
  place = jax.NamedSharding(jax.make_mesh((1,), ('x',)), jax.P())
  spec = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  loaded = rotbits_jax.load(data, like=jax.tree.map(spec, model))
  assert isinstance(loaded, rotbits_jax.Model)
  for new, old in zip(jax.tree.leaves(loaded), jax.tree.leaves(model), strict=True):
    assert new.sharding == place
    np.testing.assert_array_equal(new, old)


def test_load_takes_a_dtype_with_like():
  like = {'w': jax.ShapeDtypeStruct((2,), jnp.bfloat16)}
  data = rotbits_jax.encode({'w': np.ones(2, np.float32)})
  assert rotbits_jax.load(data, like=like, dtype='bfloat16')['w'].dtype == jnp.bfloat16
  with pytest.raises(ValueError, match=r'^w: `like` has'):
    rotbits_jax.load(data, like=like)


@pytest.mark.parametrize('option', [{'layers': range(1)}, {'integers': True}])
def test_like_excludes(option):
  with pytest.raises(ValueError, match='`like` excludes'):
    rotbits_jax.load(rotbits_jax.encode(TREE), like=TREE, **option)


def test_a_model_is_not_a_tree():
  model = rotbits_jax.load_checkpoint(checkpoints.example()).model
  with pytest.raises(ValueError, match='`like` is a Model, but the file holds none'):
    rotbits_jax.load(rotbits_jax.encode(TREE), like=model)
  with pytest.raises(ValueError, match='the file holds a model: leave out `like`'):
    rotbits_jax.decode(rotbits_jax.encode(model), like=TREE)

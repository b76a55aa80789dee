"""PyTrees and checkpoints of any family: stored bit for bit as plain arrays."""

import dataclasses
import json
import pathlib
import tempfile
from unittest import mock
import zlib

from absl.testing import parameterized
from flax import nnx
from flax.core import frozen_dict
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import weights_files

from fuzz import containers
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import structured
from rotbits_jax.file import memory
from tests import cases

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
PARAMS = {'kernel': jnp.arange(12.0).reshape(3, 4), 'bias': jnp.zeros(4, jnp.bfloat16)}


def _nnx_state():
  return nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))


def _without_base():
  return structured.Difference(lengths=(9, 3), name='float16')


class TreeTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('list', lambda: [PARAMS, PARAMS['bias']]),
    ('tuple', lambda: ((jnp.ones(3),), {'x': ()}, PARAMS)),
    ('optax', lambda: optax.adam(1e-3).init(PARAMS)),
    ('frozen_dict', lambda: frozen_dict.freeze({'params': PARAMS})),
    ('nnx', _nnx_state),
    ('numpy_scalar', lambda: {'step': np.int32(3)}),
    ('structured', lambda: {'x': structured.Constant(np.float16(1), (3,))}),
  )
  def test_any_pytree_comes_back_with_its_structure(self, make):
    tree = make()
    decoded = rotbits_jax.decode(rotbits_jax.encode(tree), like=tree)
    self.assertEqual(jax.tree.structure(decoded), jax.tree.structure(tree))
    for got, expected in zip(
      jax.tree.leaves(decoded), jax.tree.leaves(tree), strict=True
    ):
      self.assertEqual(got.dtype, expected.dtype)
      self.assertEqual(got.tobytes(), np.asarray(expected).tobytes())

  def test_shapes(self):
    for shape in ((1,) * 9, (2,) * 12, (1,) * 32, (1 << 31, 0), (0, 1 << 40)):
      with self.subTest(shape=shape):
        array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        decoded = rotbits_jax.decode(rotbits_jax.encode({'a': {'b': array}}))
        np.testing.assert_array_equal(decoded['a']['b'], array)
        self.assertEqual(decoded['a']['b'].shape, shape)

  def test_a_structured_leaf_comes_back_or_is_refused(self):
    for name in cases.leaves():
      with self.subTest(name=name):
        leaf = cases.leaves()[name]
        if name in ('basis', 'subspace'):
          with self.assertRaisesRegex(ValueError, 'a basis needs'):
            rotbits_jax.encode({'a': {'b': leaf}})
          continue
        decoded = rotbits_jax.decode(rotbits_jax.encode({'a': {'b': leaf}}))
        if leaf.origin.is_in_files:
          leaf = np.asarray(leaf.materialize())
        else:
          with self.assertRaisesRegex(ValueError, r'^a/b: it cannot be stored: '):
            rotbits_jax.encode({'a': {'b': type(leaf).stack([leaf, leaf])}})
        self.assertTrue(structured.same_bits(decoded, {'a': {'b': leaf}}))

  def test_a_huge_shape_of_few_numbers_is_refused(self):
    for name, shape, words in (
      ('constant', [1 << 31], 'tail/0: must be'),
      ('constant', [1 << 31, 0], 'tail/0: must be'),
      ('gram', [6, 1 << 31], 'columns: must be'),
      ('trapezoidal_rows', [10, 1 << 31], 'differs from the manifest'),
      ('tied', [1 << 31, 3], 'tokens: must be'),
    ):
      with self.subTest(name=name, shape=shape, words=words):
        self.enterContext(mock.patch.object(memory, '_available', return_value=None))
        data = rotbits_jax.encode({'a': {'b': cases.leaves()[name]}})
        streams, manifest = containers.unpack(data)
        (entry,) = manifest['records'][0]['leaves']
        entry['shape'] = shape
        settings = entry.get('settings', {})
        lengths = {'columns': shape[-1], 'tokens': shape[0], 'tail': shape}
        settings |= {key: lengths[key] for key in lengths if key in settings}
        data = containers.pack(streams, containers.to_json(manifest))
        self.assertEqual(rotbits_jax.inspect(data).file_bytes, len(data))
        for read in (rotbits_jax.decode, rotbits_jax.load, rotbits_jax.verify):
          with self.assertRaisesRegex(rotbits_jax.ContainerError, words):
            read(data)

  def test_arrays_in_the_other_byte_order(self):
    for dtype in ('i8', 'f2', 'f4', 'u4'):
      with self.subTest(dtype=dtype):
        old, new = ({'x': np.arange(i, i + 99).astype(dtype)} for i in range(2))
        swapped = [{'x': y['x'].astype(f'>{dtype}')} for y in (old, new)]
        data = rotbits_jax.encode(swapped[1])
        self.assertEqual(data, rotbits_jax.encode(new))
        self.assertTrue(structured.same_bits(rotbits_jax.decode(data), new))
        data = rotbits_jax.delta(*swapped[::-1])
        found = rotbits_jax.apply(data, swapped[0])
        self.assertTrue(structured.same_bits(found, new))
        self.assertTrue(structured.same_bits(rotbits_jax.apply(data, old), new))
    model = rotbits_jax.load_checkpoint(rotbits_jax.checkpoints.example()).model
    params = jax.tree.map(lambda x: np.asarray(x).astype('>f2'), model.params)
    swapped = dataclasses.replace(model, params=params)
    for preset in ('exact', 'free'):
      expected = rotbits_jax.encode(model, preset=preset)
      self.assertEqual(rotbits_jax.encode(swapped, preset=preset), expected)

  def test_what_cannot_be_stored_is_named(self):
    for tree, words in (
      ({'a': {'b': 'text'}}, 'a/b: not an array'),
      ({'a': [1.5]}, 'a/0: not an array.* numpy.asarray'),
      ({'a': np.array(['x'])}, 'a: an array of <U1 .*frombuffer'),
      ({'a': jax.random.key(0)}, 'a: a key'),
      ({'a': np.zeros(2, np.complex64)}, 'a.*complex64'),
      ({'a': np.ma.array([1.0, 2.0], mask=[0, 1])}, 'a: a masked array'),
      ({'a/b': np.zeros(2)}, 'without a slash'),
      (np.zeros(2), 'at the top level'),
      ('MODEL', 'MODEL: expected a model, got a path; encode_to_file'),
      (pathlib.Path('MODEL'), 'MODEL: expected a model'),
      ({'manifest': np.zeros(2)}, 'manifest: the file has another entry'),
      ({'a': {'b': np.zeros((1,) * 33)}}, 'a/b/shape: .* up to 32 axes'),
      ({'a': {'b\ud800': np.zeros(2)}}, 'a: .* lone surrogate'),
      ({'b': structured.Constant(np.float32(1), (1 << 31,))}, 'b: it cannot be stored'),
      ({'b': _without_base()}, 'b: it cannot be stored'),
    ):
      with self.subTest(words=words), self.assertRaisesRegex(ValueError, words):
        rotbits_jax.encode(tree)

  def test_keys_keep_their_order(self):
    tree = {'b': [np.full(2, i) for i in range(12)], 'a': {'z': np.ones(1), 'y': {}}}
    found = rotbits_jax.decode(rotbits_jax.encode(tree))
    self.assertEqual([*found['b']], [str(i) for i in range(12)])
    self.assertEqual([*found], ['b', 'a'])


def _tensors(layers=3):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape)
  tensors = {
    'wte.weight': draw(40, 16).astype(np.float16),
    'ln_f.weight': draw(16).astype(np.float32),
    'ln_f.bias': draw(16).astype(np.float32),
    'scale': np.float32(2),
    'none': np.zeros((0, 3), np.float16),
    'encoder/x': draw(3).astype(np.float16),
    'encoder/y': draw(3).astype(np.float16),
    'pruned.weight': (draw(64, 96) * (draw(64, 96) > 1)).astype(np.float16),
    'dequantised.weight': np.float32(rng.integers(-7, 8, (96, 64)) * draw(96, 1)),
    'mask': np.tri(96, dtype=np.float32),
  }
  for i in range(layers):
    prefix = f'h.{i}'
    tensors |= {
      f'{prefix}.attn.weight': draw(16, 48).astype(ml_dtypes.bfloat16),
      f'{prefix}.attn.bias': np.tri(4, dtype=bool),
      f'{prefix}.steps': np.arange(4),
    }
  return tensors


FILES = {'config.json': '{"model_type": "gpt2"}', 'LICENSE': 'free', 'code/x.py': ''}


def _index(names):
  return json.dumps({'weight_map': names}, indent=3)


def _experts():
  prefix = 'model.layers.0.mlp'
  names = [f'{prefix}.experts.{i}.{x}_proj.weight' for i in (0, 10) for x in 'ab']
  names += [f'{prefix}.gate.weight', 'model.layers.0.norm.weight', 'lm_head.weight']
  return {name: np.ones((2, 3), np.float16) for name in names}


# Checkpoints: the tensors of each weights file, and the other files.
CHECKPOINTS = {
  'one file': ({'model.safetensors': _tensors()}, FILES),
  'no config': ({'x.safetensors': _tensors()}, {}),
  'experts': ({'model.safetensors': _experts()}, FILES),
  'shards': (
    {
      'model-1.safetensors': dict([*_tensors().items()][::2]),
      'model-2.safetensors': dict([*_tensors().items()][1::2]),
    },
    FILES
    | {
      'model.safetensors.index.json': _index(
        {x: f'model-{i % 2 + 1}.safetensors' for i, x in enumerate(_tensors())}
      )
    },
  ),
  'float8': (
    {'model.safetensors': {'a.b': np.zeros(9, ml_dtypes.float8_e5m2), 'c': np.ones(2)}},
    FILES,
  ),
}


def _write(folder, name):
  """Writes one of the checkpoints; returns its folder."""
  weights, files = CHECKPOINTS[name]
  for file in (*weights, *files):
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
  for file, tensors in weights.items():
    weights_files.write_safetensors(folder / file, tensors)
  for file, text in files.items():
    (folder / file).write_text(text)
  if name == 'float8':  # a dtype that NumPy lacks, and metadata
    path = folder / 'model.safetensors'
    data = path.read_bytes().replace(b'F8_E5M2', b'F8_E8M0')
    path.write_bytes(data.replace(b'"format":"pt"', b'"format":"tp"'))
  return folder


def _contents(folder):
  files = [x for x in folder.rglob('*') if x.is_file()]
  return {x.relative_to(folder): x.read_bytes() for x in files}


@pytest.mark.parametrize('name', CHECKPOINTS)
@pytest.mark.parametrize('options', [{}, {'shard_size': 2000}])
def test_files_come_back_byte_for_byte(tmp_path, name, options):
  source, path = _write(tmp_path / 'in', name), tmp_path / 'x'
  rotbits_jax.encode_to_file(source, path, check=True, **options)
  rotbits_jax.decode_to_directory(path, tmp_path / 'out')
  assert _contents(tmp_path / 'out') == _contents(source)
  assert rotbits_jax.verify(path, against=source).same_bits
  report = rotbits_jax.inspect(path)
  saved = sum(line.bytes_saved for line in report.lines)
  assert saved == report.input_bytes - report.file_bytes
  for tensor in checkpoints.open_plain(source).tensors:
    rotbits_jax.read_tensor(path, tensor)


def test_an_expert_is_a_record():
  with tempfile.TemporaryDirectory() as folder:
    opened = checkpoints.open_plain(_write(pathlib.Path(folder), 'experts'))
  prefix = 'model.layers.0'
  experts = [f'{prefix}.mlp.experts.{i}' for i in (0, 10)]
  assert {*opened.records} == {prefix, 'lm_head', *experts}


@pytest.mark.parametrize('name', ['llama-tiny-dense', 'phi3-tiny-dense'])
def test_a_dense_model_of_a_known_family(tmp_path, name):
  source, path = TESTDATA / name, tmp_path / 'x'
  rotbits_jax.encode_to_file(source, path, preset='exact')
  rotbits_jax.decode_to_directory(path, tmp_path / 'out')
  weights = 'model.safetensors'
  expected = (source / weights).read_bytes()
  assert (tmp_path / 'out' / weights).read_bytes() == expected
  checkpoint = rotbits_jax.load_checkpoint(source)
  as_model = rotbits_jax.encode(checkpoint, preset='exact')
  assert path.stat().st_size < len(as_model) + 1000
  for model in (
    rotbits_jax.load(path),
    rotbits_jax.decode_checkpoint(path).model,
    rotbits_jax.decode(as_model),
  ):
    assert structured.same_bits(jax.device_get(model.params), checkpoint.model.params)


def test_a_base_of_plain_tensors(tmp_path):
  base, tuned = (_write(tmp_path / x, 'one file') for x in ('base', 'tuned'))
  weights = tuned / 'model.safetensors'
  tensors = _tensors() | {'ln_f.bias': np.ones(16, np.float32)}
  weights_files.write_safetensors(weights, tensors)
  rotbits_jax.encode_to_file(tuned, tmp_path / 'x', base=base)
  rotbits_jax.encode_to_file(base, tmp_path / 'base.rotbits')
  for path in (base, tmp_path / 'base.rotbits'):
    rotbits_jax.decode_to_directory(tmp_path / 'x', tmp_path / 'out', base=path)
    assert _contents(tmp_path / 'out') == _contents(tuned)
    assert rotbits_jax.verify(tmp_path / 'x', against=tuned, base=path).same_bits


def test_near_rounds_each_matrix_and_says_that_nothing_was_measured(tmp_path):
  rng = np.random.default_rng(0)
  tensors = {
    dtype: rng.normal(size=(64, 96)).astype(jnp.dtype(dtype))
    for dtype in ('float16', 'bfloat16', 'float32')
  }
  tensors |= {'norm': np.ones(96, np.float32), 'steps': np.arange(6).reshape(2, 3)}
  (tmp_path / 'in').mkdir()
  weights_files.write_safetensors(tmp_path / 'in' / 'model.safetensors', tensors)
  path = tmp_path / 'x'
  rotbits_jax.encode_to_file(tmp_path / 'in', path, preset='near', step=-4.0)
  rotbits_jax.decode_to_directory(path, tmp_path / 'out')
  found = weights_files.read_safetensors(tmp_path / 'out' / 'model.safetensors')
  for name, tensor in tensors.items():
    assert found[name].dtype == tensor.dtype
    error = np.abs(found[name].astype(np.float64) - tensor.astype(np.float64))
    assert error.max() <= 2**-4.9 + 2**-7
    assert (error.max() > 0) == (name in ('float16', 'bfloat16', 'float32'))
  assert path.stat().st_size < 3 * 64 * 96
  assert 'No divergence was measured' in ' '.join(rotbits_jax.inspect(path).remarks())
  assert not rotbits_jax.verify(path, against=tmp_path / 'in').same_bits


def test_damage_is_found(tmp_path):
  source = _write(tmp_path / 'in', 'one file')
  rotbits_jax.encode_to_file(source, tmp_path / 'x')
  data = (tmp_path / 'x').read_bytes()
  for position in np.linspace(0, len(data) - 1, 60).astype(int):
    damaged = bytearray(data)
    damaged[position] ^= 1 << position % 8
    with pytest.raises(rotbits_jax.ContainerError):
      rotbits_jax.decode_to_directory(bytes(damaged), tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_headers_that_lie_are_refused(tmp_path):
  source = _write(tmp_path / 'in', 'one file')
  rotbits_jax.encode_to_file(source, tmp_path / 'x')
  streams, manifest = containers.unpack((tmp_path / 'x').read_bytes())
  (name,) = manifest['headers']
  header = zlib.decompress(streams[f'headers/{name}'])
  for changed in (
    header.replace(b'wte.weight', b'wtf.weight'),
    header.replace(b'"shape":[16]', b'"shape":[61]'),
    header.replace(b'"dtype":"F32"', b'"dtype":"I32"'),
    header[:-1],
    b'',
  ):
    packed = zlib.compress(changed)
    manifest['headers'] = {name: [len(packed), zlib.crc32(packed), len(changed)]}
    lying = streams | {f'headers/{name}': packed}
    data = containers.pack(lying, containers.to_json(manifest))
    with pytest.raises(rotbits_jax.ContainerError):
      rotbits_jax.decode_to_directory(data, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_another_checkpoint_is_not_what_was_encoded(tmp_path):
  source = _write(tmp_path / 'in', 'one file')
  rotbits_jax.encode_to_file(source, tmp_path / 'x')
  weights = source / 'model.safetensors'
  data = weights.read_bytes()
  for changed in (
    data[:-1] + bytes([data[-1] ^ 1]),
    data.replace(b'"format":"pt"', b'"format":"tp"'),
  ):
    weights.write_bytes(changed)
    with pytest.raises(rotbits_jax.ContainerError, match='differ'):
      rotbits_jax.verify(tmp_path / 'x', against=source)


def test_what_plain_tensors_do_not_take(tmp_path):
  source = _write(tmp_path / 'in', 'one file')
  with pytest.raises(ValueError, match='known family'):
    rotbits_jax.encode_to_file(source, tmp_path / 'x', preset='free')
  rotbits_jax.encode_to_file(source, tmp_path / 'x')
  with pytest.raises(rotbits_jax.ContainerError, match='known family'):
    rotbits_jax.decode_checkpoint(tmp_path / 'x')
  for option in ({'format': 'slicegpt'}, {'dtype': 'float16'}, {'shard_size': 9}):
    with pytest.raises(ValueError, match='come back in the files'):
      rotbits_jax.decode_to_directory(tmp_path / 'x', tmp_path / 'out', **option)

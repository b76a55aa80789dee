"""PyTrees and checkpoints of unknown families: stored bit for bit as plain arrays."""

import dataclasses
import json
import pathlib
import tempfile
from unittest import mock
import zipfile

from absl.testing import absltest
from absl.testing import parameterized
from flax import nnx
from flax.core import frozen_dict
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import weights_files

from fuzz import containers
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import structured
from rotbits_jax.checkpoints import lazy
from rotbits_jax.file import container
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import memory
from rotbits_jax.file import writer
from rotbits_jax.relative import measure
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

  def test_a_leaf_that_needs_one_of_its_own_record_is_refused(self):
    head, table = np.zeros((5, 9), np.float16), np.zeros((9, 3), np.float16)
    exponents = np.zeros(5, np.int32)
    leaf = measure.beside_head(table, head, np.zeros((5, 3), np.int32), exponents).leaf
    tree = {'head': {'kernel': head, 'x': leaf}}
    with self.assertRaisesRegex(ValueError, 'head/kernel, which is in its own record'):
      rotbits_jax.encode(tree)

  def test_what_cannot_be_stored_is_refused_before_the_work(self):
    for last, words in (
      (np.zeros(2, np.complex64), 'complex64'),
      (np.zeros((1,) * 33), '32 axes'),
    ):
      with self.subTest(words), mock.patch.object(writer, 'encode_record') as work:
        with self.assertRaisesRegex(ValueError, f'z/.*{words}'):
          rotbits_jax.encode({'a': np.zeros(3), 'z': last})
        work.assert_not_called()
    with (
      mock.patch.object(container, '_MOST_HEADER', 10_000),
      self.assertRaisesRegex(ValueError, '200 streams are too many'),
    ):
      rotbits_jax.encode({f'key{i}': np.zeros(1) for i in range(200)})

  def test_shapes(self):
    for shape in ((1,) * 9, (2,) * 12, (1,) * 32, (1 << 31, 0), (0, 1 << 40)):
      with self.subTest(shape=shape):
        array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        decoded = rotbits_jax.decode(rotbits_jax.encode({'a': {'b': array}}))
        np.testing.assert_array_equal(decoded['a']['b'], array)
        self.assertEqual(decoded['a']['b'].shape, shape)

  def test_arrays_with_many_axes(self):
    array = np.zeros((2,) * 13, np.float32)
    decoded = rotbits_jax.decode(rotbits_jax.encode({'a': array}))
    np.testing.assert_array_equal(decoded['a'], array)

  def test_an_array_that_is_there_twice_may_differ_in_the_file(self):
    zeros = np.zeros(2)
    data = rotbits_jax.encode([np.ones(2), (zeros,)])
    first, (second,) = rotbits_jax.decode(data, like=[zeros, (zeros,)])
    np.testing.assert_array_equal(first, np.ones(2))
    np.testing.assert_array_equal(second, zeros)

  def test_a_structured_leaf_comes_back_or_is_refused(self):
    for name in cases.leaves():
      with self.subTest(name=name):
        leaf = cases.leaves()[name]
        if name in ('basis', 'subspace'):
          with self.assertRaisesRegex(ValueError, '^a/b: it cannot be stored: a basis'):
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

  def test_a_leaf_under_another_key_is_refused(self):
    data = rotbits_jax.encode({'a': {'b': np.arange(8.0)}})
    streams, manifest = containers.unpack(data)
    manifest['records'][0]['leaves'][0]['path'] = 'c/b'
    data = containers.pack(streams, containers.to_json(manifest))
    with self.assertRaisesRegex(rotbits_jax.ContainerError, 'a: .* under its name'):
      rotbits_jax.load(data)

  def test_an_axis_may_have_the_greatest_length(self):
    leaf = structured.Constant(np.float16(1), ((1 << 31) - 1, 0))
    decoded = rotbits_jax.load(rotbits_jax.encode({'a': leaf}))
    self.assertEqual(decoded['a'].shape, leaf.shape)

  def test_without_a_structure_it_is_nested_dicts(self):
    decoded = rotbits_jax.decode(rotbits_jax.encode([PARAMS, (PARAMS['bias'],)]))
    self.assertEqual(
      jax.tree.map(lambda x: x.shape, decoded, is_leaf=lambda x: hasattr(x, 'shape')),
      {'0': {'bias': (4,), 'kernel': (3, 4)}, '1': {'0': (4,)}},
    )

  def test_dtypes(self):
    for dtype in (
      *(
        'float8_e4m3fn',
        'float8_e5m2',
        'float4_e2m1fn',
        'int4',
        'uint4',
        'int2',
        'bool',
      ),
      *('int64', 'float64', 'uint32'),
    ):
      with self.subTest(dtype=dtype):
        numbers = np.arange(16).reshape(2, 8) % 2
        tree = {'x': numbers.astype(jnp.dtype(dtype)).T}
        data = rotbits_jax.encode(tree)
        decoded = rotbits_jax.decode(data)['x']
        self.assertEqual(decoded.dtype.name, dtype)
        self.assertEqual(decoded.tobytes(), tree['x'].tobytes())
        self.assertEqual(rotbits_jax.load(data)['x'].dtype.name, dtype)

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
      ('MODEL', 'MODEL: a path is no model; encode_to_file takes one'),
      (pathlib.Path('MODEL'), 'MODEL: a path is no model'),
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

  def test_another_structure_is_refused(self):
    for like, words in (
      ({'x': np.zeros(3)}, 'y: only one'),
      ({'x': np.zeros(3), 'y': np.zeros(4)}, 'y: `like` has'),
      ({'x': np.zeros(3), 'y': np.zeros(3, np.float32)}, 'y: `like` has'),
    ):
      with self.subTest(words=words):
        data = rotbits_jax.encode({'x': np.zeros(3), 'y': np.zeros(3)})
        with self.assertRaisesRegex(ValueError, words):
          rotbits_jax.decode(data, like=like)

  def test_free_is_for_models(self):
    with self.assertRaisesRegex(ValueError, 'known family'):
      rotbits_jax.encode(PARAMS, preset='free')


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


class CheckpointTest(parameterized.TestCase):
  """Checkpoints of families that the package does not know."""

  def setUp(self):
    super().setUp()
    self.source = (
      pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / 'gpt2'
    )
    self.source.mkdir()
    self.output = self.source.parent / 'out'
    self.file = self.source.parent / 'gpt2.rotbits'
    (self.source / 'config.json').write_text('{"model_type": "gpt2"}')
    for name in ('LICENSE', 'README.md', 'tokenizer.json', 'modeling_gpt2.py'):
      (self.source / name).write_text(f'the text of {name}')

  def check_round_trip(self, source=None):
    rotbits_jax.encode_to_file(source or self.source, self.file)
    rotbits_jax.decode_to_directory(self.file, self.output)
    self.assertTrue(rotbits_jax.verify(self.file, against=self.output).same_bits)
    given, found = (
      {x.relative_to(folder): x.read_bytes() for x in folder.rglob('*') if x.is_file()}
      for folder in (self.source, self.output)
    )
    self.assertEqual(found, given)
    report = rotbits_jax.inspect(self.file)
    self.assertIsNone(report.family)
    saved = sum(line.bytes_saved for line in report.lines)
    self.assertEqual(saved, report.input_bytes - self.file.stat().st_size)

  def test_safetensors(self):
    weights_files.write_safetensors(self.source / 'model.safetensors', _tensors())
    self.check_round_trip()
    decoded = rotbits_jax.decode(self.file)
    self.assertEqual(decoded.keys(), _tensors().keys())
    for name, tensor in _tensors().items():
      self.assertEqual(decoded[name].tobytes(), tensor.tobytes())
      self.assertEqual(decoded[name].dtype, tensor.dtype)
      got = rotbits_jax.read_tensor(self.file, name)
      self.assertEqual(got.tobytes(), tensor.tobytes())
    self.assertIn('h.1', rotbits_jax.file.Reader(self.file).records)

  def test_weights_in_sub_folders(self):
    tensors = {'down.0.weight': np.ones((4, 3), np.float32), 'bias': np.zeros(3)}
    names = ('unet/x.safetensors', 'unet/x.fp16.safetensors', 'vae/x.safetensors')
    for name in names:
      (self.source / name).parent.mkdir(exist_ok=True)
      weights_files.write_safetensors(self.source / name, tensors)
    (self.source / 'unet' / 'config.json').write_text('{}')
    # Without a list of parts, the folder may be a collection of models.
    with self.assertRaisesRegex(checkpoints.CheckpointError, 'there are no .pt or'):
      rotbits_jax.encode_to_file(self.source, self.file)
    (self.source / 'model_index.json').write_text('{}')
    self.check_round_trip()
    decoded = rotbits_jax.decode(self.file)
    unet = [f'unet/{name}' for name in tensors]
    more = [f'unet/x.safetensors/{name}' for name in tensors]
    self.assertEqual(decoded.keys(), {*unet, *more, *(f'vae/{x}' for x in tensors)})
    # Beside weights of their own, as in sentence-transformers.
    weights_files.write_safetensors(self.source / 'model.safetensors', tensors)
    self.output = self.output.with_name('again')
    self.check_round_trip()
    (self.source / 'vae' / 'x.safetensors').rename(self.source.parent / 'private')
    (self.source / 'vae' / 'x.safetensors').symlink_to('../../private')
    source = checkpoints.open_plain(self.source)
    self.assertEqual(source.left_out, ('vae/x.safetensors',))
    self.assertLen(source.weights, 3)
    # A file that is named is one model of a collection.
    source = checkpoints.open_plain(self.source / 'model.safetensors')
    self.assertLen(source.weights, 1)
    self.assertContainsSubset(['unet/x.safetensors'], source.left_out)

  def test_experts_are_records(self):
    prefix = 'model.layers.0.mlp'
    names = [f'{prefix}.experts.{i}.{x}_proj.weight' for i in (0, 10) for x in 'ab']
    names += [f'{prefix}.gate.weight', 'model.layers.0.norm.weight', 'lm_head.weight']
    tensors = {name: np.ones((2, 3), np.float16) for name in names}
    weights_files.write_safetensors(self.source / 'model.safetensors', tensors)
    self.check_round_trip()
    records = {'lm_head', 'model.layers.0'}
    records |= {f'{prefix}.experts.{i}' for i in (0, 10)}
    self.assertEqual({*rotbits_jax.file.Reader(self.file).records}, records)

  def test_safetensors_with_dtypes_that_numpy_lacks(self):
    tensors = {'a': np.zeros(3, ml_dtypes.float8_e5m2), 'b': np.ones(2, np.int64)}
    path = self.source / 'model.safetensors'
    weights_files.write_safetensors(path, tensors)
    path.write_bytes(path.read_bytes().replace(b'F8_E5M2', b'F8_E8M0'))
    self.check_round_trip()

  def test_shards(self):
    tensors, index = _tensors(), {}
    for i, part in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
      name = f'model-{i:05}-of-00002.safetensors'
      weights_files.write_safetensors(self.source / name, {x: tensors[x] for x in part})
      index |= dict.fromkeys(part, name)
    text = json.dumps({'weight_map': index}, indent=3)
    (self.source / 'model.safetensors.index.json').write_text(text)
    self.check_round_trip()

  def test_pytorch(self):
    path = self.source / 'pytorch_model.bin'
    weights_files.write_torch(path, _tensors(), 'archive')
    self.check_round_trip()

  def test_pytorch_beside_an_adapter(self):
    weights_files.write_torch(self.source / 'pytorch_model.bin', _tensors(), 'archive')
    adapter = {'lora_A.weight': np.ones((4, 4), np.float32)}
    weights_files.write_safetensors(self.source / 'adapter_model.safetensors', adapter)
    for opened in (checkpoints.open_any(self.source), None):
      opened = opened or checkpoints.open_plain(self.source)
      self.assertEqual(opened.path.name, 'pytorch_model.bin')
      self.assertEqual(opened.left_out, ('adapter_model.safetensors',))

  def test_pytorch_takes_the_place_of_an_older_result(self):
    dense = TESTDATA / 'llama-tiny-dense'
    tensors = weights_files.read_safetensors(dense / 'model.safetensors')
    (self.source / 'config.json').write_bytes((dense / 'config.json').read_bytes())
    rotbits_jax.encode_to_file(dense, self.file)
    rotbits_jax.decode_to_directory(self.file, self.output)
    single = 'pytorch_model.bin'
    shards = [f'pytorch_model-{i:05}-of-00002.bin' for i in (1, 2)]
    for names in ([single], shards, [single]):  # beside safetensors, one file, shards
      for path in (self.file, *self.source.glob('pytorch_model*')):
        path.unlink()
      tensors = {name: -tensor for name, tensor in tensors.items()}
      parts = [list(tensors)[i :: len(names)] for i in range(len(names))]
      weight_map = {}
      for name, part in zip(names, parts, strict=True):
        own = {x: tensors[x] for x in part}
        weights_files.write_torch(self.source / name, own, 'archive')
        weight_map |= dict.fromkeys(part, name)
      if names == shards:
        text = json.dumps({'weight_map': weight_map})
        (self.source / f'{single}.index.json').write_text(text)
      rotbits_jax.encode_to_file(checkpoints.open_plain(self.source), self.file)
      rotbits_jax.decode_to_directory(self.file, self.output)
      suffixes = ('.bin', '.safetensors')
      self.assertEqual(
        {x.name for x in self.output.iterdir() if x.suffix in suffixes}, {*names}
      )
      decoded = checkpoints.to_tensors(checkpoints.load_checkpoint(self.output).model)
      for name, tensor in tensors.items():
        self.assertEqual(decoded[name].tobytes(), tensor.tobytes(), name)

  def test_pytorch_views_and_tied_tensors(self):
    # Microsoft's files have storages with columns that no tensor shows.
    (weights,) = (TESTDATA / 'llama-tiny-sliced-head-0.25').glob('*.pt')
    path = self.source / 'pytorch_model.bin'
    path.write_bytes(weights.read_bytes())
    self.check_round_trip(checkpoints.open_plain(path))

  def test_pytorch_with_compressed_members_is_refused(self):
    path = self.source / 'pytorch_model.bin'
    weights_files.write_torch(path, _tensors(), 'archive')
    with zipfile.ZipFile(path) as archive:
      members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
      for name, data in members.items():
        archive.writestr(name, data)
    with self.assertRaisesRegex(checkpoints.CheckpointError, 'compressed'):
      checkpoints.open_plain(path)

  def test_without_a_config(self):
    (self.source / 'config.json').unlink()
    weights_files.write_safetensors(
      self.source / 'adapter_model.safetensors', _tensors()
    )
    self.check_round_trip()

  def test_a_known_family_with_a_setting_that_is_not_known(self):
    for file in (TESTDATA / 'llama-tiny-dense').iterdir():
      if file.suffix != '.npz':
        (self.source / file.name).write_bytes(file.read_bytes())
    config = json.loads((self.source / 'config.json').read_text())
    (self.source / 'config.json').write_text(json.dumps(config | {'colour': 'red'}))
    with self.assertRaisesRegex(checkpoints.UnsupportedError, 'colour.*preset exact'):
      rotbits_jax.encode_to_file(self.source, self.file, preset='free')
    self.check_round_trip()

  def test_a_config_with_an_infinite_number(self):
    # Mamba's configs have `"time_step_limit": [0.0, Infinity]`.
    config = '{"model_type": "mamba2", "time_step_limit": [0.0, Infinity]}'
    (self.source / 'config.json').write_text(config)
    weights_files.write_safetensors(self.source / 'model.safetensors', _tensors())
    self.check_round_trip()

  def test_output_shards_and_an_output_beside_the_input(self):
    weights_files.write_safetensors(self.source / 'model.safetensors', _tensors())
    self.check_round_trip()
    beside = self.source / 'old'
    beside.write_bytes(self.file.read_bytes())
    rotbits_jax.encode_to_file(self.source, beside, shard_size=2000)
    shards = sorted(self.source.glob('old-*'))
    self.assertGreater(len(shards), 2)
    rotbits_jax.encode_to_file(self.source, beside, shard_size=2000)
    self.assertEqual(sorted(self.source.glob('old-*')), shards)
    rotbits_jax.decode_to_directory(beside, self.output)
    self.assertFalse((self.output / 'old').exists())
    rotbits_jax.verify(beside, against=self.source)
    rotbits_jax.encode_to_file(self.source, self.source / 'single')
    rotbits_jax.verify(self.source / 'single', against=self.source)
    weights = 'model.safetensors'
    self.assertEqual(
      (self.output / weights).read_bytes(), (self.source / weights).read_bytes()
    )

  def test_a_killed_run_is_resumed(self):
    weights_files.write_safetensors(self.source / 'model.safetensors', _tensors())
    rotbits_jax.encode_to_file(self.source, self.file)
    expected = self.file.read_bytes()
    real, coded = writer.encode_record, []

    def encode_record(record, *args):
      if record.name == 'h.1' and 'h.1' not in coded:
        coded.append(record.name)
        raise KeyboardInterrupt
      coded.append(record.name)
      return real(record, *args)

    self.enterContext(mock.patch.object(writer, 'encode_record', encode_record))
    with self.assertRaises(KeyboardInterrupt):
      rotbits_jax.encode_to_file(self.source, self.file)
    rotbits_jax.encode_to_file(self.source, self.file)
    self.assertEqual(self.file.read_bytes(), expected)
    self.assertEqual(coded.count('h.0'), 1)
    self.assertEqual(coded.count('h.1'), 2)

  def test_damage_is_found(self):
    weights_files.write_safetensors(self.source / 'model.safetensors', _tensors())
    rotbits_jax.encode_to_file(self.source, self.file)
    data = self.file.read_bytes()
    for position in np.linspace(0, len(data) - 1, 80).astype(int):
      damaged = bytearray(data)
      damaged[position] ^= 1 << position % 8
      with self.assertRaises(rotbits_jax.ContainerError):
        rotbits_jax.decode_to_directory(bytes(damaged), self.output)
      self.assertFalse(self.output.exists())

  def test_another_checkpoint_is_not_what_was_encoded(self):
    path = self.source / 'model.safetensors'
    weights_files.write_safetensors(path, _tensors())
    rotbits_jax.encode_to_file(self.source, self.file)
    weights_files.write_safetensors(path, _tensors() | {'scale': np.float32(3)})
    with self.assertRaisesRegex(rotbits_jax.ContainerError, 'scale: differs'):
      rotbits_jax.verify(self.file, against=self.source)
    weights_files.write_safetensors(path, _tensors())
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"tp"'))
    with self.assertRaisesRegex(rotbits_jax.ContainerError, 'safetensors: differs'):
      rotbits_jax.verify(self.file, against=self.source)

  def test_tensors_that_overlap_are_refused(self):
    layout = checkpoints.WeightsFile(name='x', nbytes=10, places=(('a', 2), ('b', 5)))
    self.assertEqual(layout.gaps({'a': 3, 'b': 4}), [(0, 2), (9, 10)])
    for sizes in ({'a': 4, 'b': 1}, {'a': 1, 'b': 6}):
      with self.assertRaisesRegex(ValueError, 'overlap'):
        layout.gaps(sizes)

  def test_a_weights_file_has_one_place_for_each_tensor(self):
    tensors = {'a': np.ones(3), 'b': np.zeros(3)}
    weights_files.write_safetensors(self.source / 'model.safetensors', tensors)
    rotbits_jax.encode_to_file(self.source, self.file)
    streams, manifest = containers.unpack(self.file.read_bytes())
    (weights,) = manifest['weights']
    places = weights['layout']['places']
    for changed, words in (
      (places[:1], 'b: not a tensor with a place'),
      ([places[0], places[0]], 'a: the weights files have it twice'),
      ([['c', places[0][1]], *places], 'c: not a tensor with a place'),
    ):
      weights['layout']['places'] = changed
      data = containers.pack(streams, containers.to_json(manifest))
      with self.assertRaisesRegex(rotbits_jax.ContainerError, words):
        rotbits_jax.decode_to_directory(data, self.output)

  def test_the_work_to_open_shards_is_linear(self):
    names = [f'h.{i}' for i in range(32)]
    for name in names:
      path = self.source / f'{name}.safetensors'
      weights_files.write_safetensors(path, {name: np.ones(3)})
    index = {'weight_map': {x: f'{x}.safetensors' for x in names}}
    (self.source / 'model.safetensors.index.json').write_text(json.dumps(index))
    real, asked = lazy.LazyTensor.nbytes.fget, []
    counted = property(lambda x: (asked.append(x), real(x))[1])
    with mock.patch.object(lazy.LazyTensor, 'nbytes', counted):
      opened = checkpoints.open_plain(self.source)
      for file in opened.weights:
        self.assertLen(list(opened.gaps(file)), 1)
    self.assertLess(len(asked), 8 * len(names))

  def test_what_is_not_in_tensors_is_bounded_over_all_files(self):
    for name in ('one', 'two'):
      tensors = {name: np.ones(3)}
      weights_files.write_safetensors(self.source / f'{name}.safetensors', tensors)
    index = {'weight_map': {x: f'{x}.safetensors' for x in ('one', 'two')}}
    (self.source / 'model.safetensors.index.json').write_text(json.dumps(index))
    rotbits_jax.encode_to_file(self.source, self.file, files={})
    with rotbits_jax.file.Reader(self.file) as reader:
      sizes = sorted(map(len, reader.gaps().values()))
      with (
        mock.patch.object(manifest_lib, 'MOST_FILES', sizes[-1]),
        self.assertRaisesRegex(rotbits_jax.ContainerError, 'bytes between its tensors'),
      ):
        reader.gaps()
    with (
      mock.patch.object(manifest_lib, 'MOST_FILES', sizes[-1]),
      self.assertRaisesRegex(ValueError, 'are not in tensors'),
    ):
      rotbits_jax.encode_to_file(self.source, self.file, files={})

  @parameterized.parameters(
    'manifest.weight', 'files/LICENSE', 'gaps/model.safetensors.weight'
  )
  def test_names_of_other_streams_are_refused_before_the_work(self, name):
    weights_files.write_safetensors(
      self.source / 'model.safetensors', {name: np.ones(3)}
    )
    read = mock.patch.object(
      checkpoints.TensorFiles, 'read', side_effect=AssertionError
    )
    with read, self.assertRaisesRegex(ValueError, 'another entry of this name'):
      rotbits_jax.encode_to_file(self.source, self.file)
    self.assertFalse(self.file.exists())

  def test_models_need_a_known_family(self):
    weights_files.write_safetensors(self.source / 'model.safetensors', _tensors())
    rotbits_jax.encode_to_file(self.source, self.file)
    with self.assertRaisesRegex(rotbits_jax.ContainerError, 'known family'):
      rotbits_jax.decode_checkpoint(self.file)
    for option in (
      {'format': 'slicegpt'},
      {'dtype': 'float16'},
      {'shard_size': 1 << 20},
    ):
      with (
        self.subTest(**option),
        self.assertRaisesRegex(ValueError, 'come back in the files'),
      ):
        rotbits_jax.decode_to_directory(self.file, self.output, **option)


if __name__ == '__main__':
  absltest.main()

"""Tests of the conversion between models and files, configs and tensors."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import random_models
import safetensors
import safetensors.numpy
import weights_files

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax.checkpoints import CheckpointError
from tests import cases

SLICED = [name for name in cases.CHECKPOINTS if 'sliced' in name]

CONFIGS = {
  family: json.loads((cases.TESTDATA / name / 'config.json').read_text())
  for family, name in (
    ('opt', 'opt-small-sliced-0.2'),
    ('llama', 'llama-tiny-dense'),
    ('phi', 'phi2-tiny-dense'),
    ('phi3', 'phi3-tiny-dense'),
    ('qwen3', 'qwen3-tiny-dense'),
  )
}
CONFIGS['mistral'] = random_models.FAMILIES['mistral']

# Two Llama layers, in which every segment has another width.
TINY = {
  'model_type': 'llama',
  'hidden_size': 8,
  'intermediate_size': 6,
  'num_attention_heads': 2,
  'num_key_value_heads': 1,
  'num_hidden_layers': 2,
  'vocab_size': 10,
  'tie_word_embeddings': True,
}
TINY_SLICING = {
  'hidden_size': 8,
  'layers_num': 2,
  'do_slice_head': False,
  'parallel_blocks': False,
  'embedding_dimensions': {'0': 3},
  'attention_input_dimensions': {'0': 3, '1': 5},
  'attention_output_dimensions': {'0': 4, '1': 6},
  'mlp_input_dimensions': {'0': 4, '1': 6},
  'mlp_output_dimensions': {'0': 5, '1': 8},
  'head_dimension': 8,
  'const_dimension': None,
}


def tiny_tensors(widths=None, dtype=np.float16):
  """The tiny model's tensors; a dense one has no head of its own."""
  if widths is None:
    return checkpoints.to_tensors(random_models.random_model(TINY, dtype))
  return checkpoints.to_tensors(random_models.sliced(TINY, widths, dtype))


def file_tensors(directory):
  """The tensors as they are in the file."""
  (path,) = [*directory.glob('*.pt'), *directory.glob('*.safetensors')]
  if path.suffix == '.pt':
    return weights_files.read_torch(path)
  return safetensors.numpy.load_file(path)


def assert_same_tensors(got, expected):
  assert set(got) == set(expected)
  for name, x in expected.items():
    assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape), name
    assert got[name].tobytes() == x.tobytes(), name


class TestRoundTrip:
  @pytest.mark.parametrize(
    ('name', 'format'),
    [
      *((x, 'safetensors') for x in cases.CHECKPOINTS),
      *((x, 'slicegpt') for x in SLICED),
    ],
  )
  def test_a_checkpoint_is_saved_with_its_tensors(self, tmp_path, name, format):
    checkpoint = checkpoints.load_checkpoint(cases.TESTDATA / name)
    checkpoints.save_checkpoint(checkpoint, tmp_path / 'new' / 'x', format)
    expected = file_tensors(cases.TESTDATA / name)
    assert_same_tensors(checkpoints.to_tensors(checkpoint.model), expected)
    assert_same_tensors(file_tensors(tmp_path / 'new' / 'x'), expected)
    for path in (tmp_path / 'new' / 'x').iterdir():
      if path.suffix == '.json' or 'dense' in name:
        assert path.read_bytes() == (cases.TESTDATA / name / path.name).read_bytes()

  @pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float32])
  def test_widths_and_dtypes_of_each_layer(self, tmp_path, dtype):
    tensors = tiny_tensors((3, 4, 5, 6, 8), dtype)
    name = 'model.layers.1.attn_shortcut_Q'
    tensors[name] = tensors[name].astype(np.float32)
    config = checkpoints.parse_config(TINY, TINY_SLICING)
    model = checkpoints.from_tensors(tensors, config)
    assert model.stacks == (range(1), range(1, 2))
    files = {
      'config.json': json.dumps(TINY).encode(),
      'tiny_0.5.json': json.dumps(TINY_SLICING).encode(),
    }
    checkpoint = checkpoints.Checkpoint(model, files, 'tiny_0.5')
    checkpoints.save_checkpoint(checkpoint, tmp_path, 'slicegpt')
    again = checkpoints.load_checkpoint(tmp_path)
    assert_same_tensors(checkpoints.to_tensors(again.model), tensors)


def with_biases(tensors):
  """Adds the biases of all linear layers."""
  return tensors | {
    name.replace('weight', 'bias'): x[:, 0].copy()
    for name, x in tensors.items()
    if '_proj' in name
  }


def with_head(sign):
  def add(tensors):
    return tensors | {'lm_head.weight': sign * tensors['model.embed_tokens.weight']}

  return add


def with_buffers(tensors):
  return tensors | {
    'model.layers.0.self_attn.rotary_emb.inv_freq': np.arange(2, dtype=np.float32),
    'model.layers.1.self_attn.masked_bias': np.array(-1e4, np.float16),
  }


class TestTensors:
  @pytest.mark.parametrize(
    ('change', 'fields', 'is_tied'),
    [
      (lambda tensors: tensors, {}, True),
      (with_head(1), {}, False),
      (with_buffers, {}, True),
      (with_biases, {'attention_bias': True, 'mlp_bias': True}, True),
    ],
  )
  def test_tensors_beside_the_usual_ones_come_back(self, change, fields, is_tied):
    tensors = change(tiny_tensors())
    model = checkpoints.from_tensors(tensors, checkpoints.parse_config(TINY | fields))
    assert model.config.tied_head == is_tied
    assert_same_tensors(checkpoints.to_tensors(model), tensors)

  @pytest.mark.parametrize(
    ('change', 'match'),
    [
      (with_head(-1), r'lm_head.weight differs from .*embed'),
      (lambda x: x | {'model.norm.weight': x['model.norm.weight'][1:]}, 'norm.weight'),
      *(
        (
          lambda x, t=t: x | {'model.norm.weight': x['model.norm.weight'].astype(t)},
          f'norm.weight: .* got {t}',
        )
        for t in ('float64', 'int8', 'bool')
      ),
    ],
  )
  def test_refused(self, change, match):
    with pytest.raises(CheckpointError, match=match):
      checkpoints.from_tensors(change(tiny_tensors()), checkpoints.parse_config(TINY))


# Family, attribute of config.json, and a value that it must not have (... if missing).
REFUSED = (
  ('opt', 'do_layer_norm_before', False),
  ('opt', '_remove_final_layer_norm', True),
  ('opt', 'activation_function', 'gelu'),
  ('llama', 'rope_interleaved', True),
  ('llama', 'partial_rotary_factor', 0.5),
  ('llama', 'quantization_config', {'bits': 4}),
  ('llama', 'layer_frobnication', 3),
  ('llama', 'hidden_size', '576'),
  ('llama', 'hidden_size', -576),
  ('llama', 'hidden_size', ...),
  ('llama', 'num_hidden_layers', 2**40),
  ('llama', 'rms_norm_eps', float('nan')),
  ('llama', 'rope_theta', 0),
  ('llama', 'rope_scaling', {'rope_type': 'yarn', 'factor': 2.0}),
  ('llama', 'rope_scaling', random_models.LLAMA3_ROPE | {'attention_factor': 1.5}),
  ('llama', 'rope_scaling', random_models.LLAMA3_ROPE | {'high_freq_factor': 1.0}),
  ('llama', 'rope_scaling', random_models.LLAMA3_ROPE | {'type': 'linear'}),
  ('llama', 'rope_parameters', random_models.LLAMA3_ROPE | {'rope_theta': 50.0}),
  ('llama', 'tie_word_embeddings', 'false'),
  ('llama', 'model_type', 'gemma'),
  ('phi', 'qk_layernorm', True),
  ('phi', 'partial_rotary_factor', 0.01),
  ('phi', 'tie_word_embeddings', True),
  ('phi3', 'sliding_window', 0),
  ('phi3', 'rope_scaling', {'type': 'longrope'}),
  ('mistral', 'num_key_value_heads', ...),
  ('mistral', 'attention_bias', True),
  ('qwen3', 'use_sliding_window', True),
  ('qwen3', 'layer_types', ['full_attention', 'sliding_attention']),
  ('qwen3', 'head_dim', ...),
  ('qwen3', 'use_qk_norm', False),
)


def test_configs_that_are_refused(subtests):
  for family, name, value in REFUSED:
    values = {
      k: v for k, v in (CONFIGS[family] | {name: value}).items() if v is not ...
    }
    with (
      subtests.test(family=family, name=name, value=value),
      pytest.raises(
        CheckpointError, match='rope|freq_factor' if 'rope' in name else name
      ),
    ):
      checkpoints.parse_config(values)


class TestSlicing:
  def test_slicing_json_is_what_slicegpt_writes(self, subtests):
    for name in SLICED:
      with subtests.test(name=name):
        checkpoint = checkpoints.load_checkpoint(cases.TESTDATA / name)
        got = json.dumps(checkpoints.slicing_json(checkpoint.model.config)).encode()
        assert got == checkpoint.files[f'{checkpoint.stem}.json']

  def test_slicing_json_of_different_widths(self):
    config = checkpoints.parse_config(TINY, TINY_SLICING)
    assert checkpoints.slicing_json(config) == TINY_SLICING

  def test_refused(self, subtests):
    for change in (
      {'hidden_size': 16},
      {'parallel_blocks': True},
      {'const_dimension': 8},
      {'do_slice_head': ...},
      {'bonus': 1},
      {'embedding_dimensions': {'0': 4}},
      {'embedding_dimensions': {'0': 3, '1': 3}},
      {'mlp_input_dimensions': {'0': 4, '1': 7}},
      {'mlp_input_dimensions': {'1': '6'}},
      {'mlp_output_dimensions': {'0': 5}},
      {'mlp_output_dimensions': {'0': 5, '1': 9}},
      {'mlp_output_dimensions': None},
      {'head_dimension': 7},
      *({name: ...} for name in TINY_SLICING if name.endswith('_dimensions')),
    ):
      values = {k: v for k, v in (TINY_SLICING | change).items() if v is not ...}
      with (
        subtests.test(change=change),
        pytest.raises(CheckpointError, match='slicing JSON'),
      ):
        checkpoints.parse_config(TINY, values)


class TestDirectory:
  def test_sidecars_are_verbatim(self, tmp_path):
    shutil.copytree(cases.TESTDATA / 'llama-tiny-dense', tmp_path, dirs_exist_ok=True)
    (tmp_path / 'merges.txt').write_bytes(b'a\r\nb')
    (tmp_path / 'tokenizer.model').write_bytes(b'\0\xff')
    for name in ('.gitattributes', 'LICENSE', 'README.md', 'modeling_x.py'):
      (tmp_path / name).write_text(name)
    for name in ('tf_model.h5', 'optimizer.pt'):
      (tmp_path / name).write_text('not kept')
    (tmp_path / 'training_args.bin').write_text('kept')
    for name in ('onnx', '.cache', 'checkpoint-500', '1_Pooling/inner', '~'):
      (tmp_path / name).mkdir(parents=True)
      (tmp_path / name / 'config.json').write_text('{}')
    (tmp_path / '.envrc').write_text('not kept')
    (tmp_path / '1_Pooling' / 'x.npy').write_text('not kept')
    source = checkpoints.open_checkpoint(tmp_path)
    files = source.files
    lost = ('.envrc', '1_Pooling/x.npy', 'optimizer.pt', 'tf_model.h5', '~/')
    assert source.missed == lost
    assert source.left_out == ('.cache/',)
    assert sorted(files) == [
      '.gitattributes',
      '1_Pooling/inner/config.json',
      'LICENSE',
      'README.md',
      'checkpoint-500/config.json',
      'config.json',
      'generation_config.json',
      'merges.txt',
      'modeling_x.py',
      'onnx/config.json',
      'tokenizer.model',
      'training_args.bin',
    ]
    assert files['LICENSE'] == b'LICENSE'
    assert files['merges.txt'] == b'a\r\nb'
    assert files['tokenizer.model'] == b'\0\xff'

  def test_only_a_folder_of_a_model_has_sidecars(self, tmp_path):
    path = tmp_path / 'model.safetensors'
    shutil.copy(cases.TESTDATA / 'llama-tiny-dense' / path.name, path)
    (tmp_path / 'key.json').write_text('a key')
    given = {}
    for place in (path, tmp_path):
      given[place] = [*checkpoints.open_plain(place).files]
    assert given == {path: [], tmp_path: ['key.json']}

  def test_a_link_that_leaves_the_folder_is_left_out(self, tmp_path):
    folder = tmp_path / 'x'
    shutil.copytree(cases.TESTDATA / 'llama-tiny-dense', folder)
    (tmp_path / 'private').write_text('a key')
    (folder / 'notes.txt').symlink_to('../private')
    (folder / 'more').mkdir()
    (folder / 'more' / 'inside').write_text('inside')
    (folder / 'inside.txt').symlink_to('more/inside')
    (tmp_path / 'outside').mkdir()
    (tmp_path / 'outside' / 'key').write_text('a key')
    (folder / 'linked').symlink_to('../outside')
    (folder / 'more' / 'up').symlink_to('../../private')
    (folder / 'more' / 'root').symlink_to('..')
    source = checkpoints.open_checkpoint(folder)
    links = {'notes.txt', 'linked/', 'more/up', 'more/root/'}
    assert links <= set(source.missed)
    found = {'inside.txt', 'more/inside'}
    assert source.files.keys() - {'config.json', 'generation_config.json'} == found
    assert source.files['inside.txt'] == b'inside'
    (folder / 'config.json').rename(tmp_path / 'config.json')
    (folder / 'config.json').symlink_to('../config.json')
    with pytest.raises(CheckpointError, match=r'there is no config\.json'):
      checkpoints.open_checkpoint(folder)

  def test_links_of_the_cache_of_hugging_face_are_followed(self, tmp_path):
    snapshot, blobs = tmp_path / 'snapshots' / '0123', tmp_path / 'blobs'
    (snapshot / 'instruct').mkdir(parents=True)
    shutil.copytree(cases.TESTDATA / 'llama-tiny-dense', blobs)
    for file in blobs.iterdir():
      (snapshot / file.name).symlink_to(f'../../blobs/{file.name}')
      (snapshot / 'instruct' / file.name).symlink_to(f'../../../blobs/{file.name}')
    for folder in (snapshot, snapshot / 'instruct'):
      source = checkpoints.open_checkpoint(folder)
      own = {x: y for x, y in source.files.items() if '/' not in x}
      assert own == checkpoints.open_checkpoint(blobs).files
    blobs.rename(tmp_path / 'private')
    blobs.symlink_to('private')
    assert not checkpoints.open_plain(snapshot).files

  def test_weights_without_an_index_and_the_cache_of_the_hub(self, tmp_path):
    checkpoint = checkpoints.load_checkpoint(cases.TESTDATA / 'llama-tiny-dense')
    cache = tmp_path / 'models--a--b'
    folder = cache / 'snapshots' / '0123'
    folder.parent.mkdir(parents=True)
    checkpoints.save_checkpoint(checkpoint, folder, shard_size=300_000)
    (folder / 'model.safetensors.index.json').unlink()
    (cache / 'refs').mkdir()
    (cache / 'refs' / 'main').write_text('0123\n')
    for path in (folder, cache):
      loaded = checkpoints.load_checkpoint(path)
      jax.tree.map(np.testing.assert_array_equal, loaded.model, checkpoint.model)
      out = tmp_path / f'from {path.name}'
      rotbits_jax.decode_to_directory(rotbits_jax.encode(path), out)
      contents = ({x.name: x.read_bytes() for x in y.iterdir()} for y in (folder, out))
      assert next(contents) == next(contents)
    with pytest.raises(rotbits_jax.ContainerError, match='load_checkpoint loads'):
      rotbits_jax.load(folder)


def test_which_folders_are_replaced(tmp_path):
  path = tmp_path / 'x'
  checkpoint = checkpoints.load_checkpoint(cases.TESTDATA / 'llama-tiny-dense')
  for shard_size in (None, 100_000, 300_000, None):  # in place of older weights
    options = {'shard_size': shard_size, 'overwrite': path.exists()}
    checkpoints.save_checkpoint(checkpoint, path, **options)
    assert list(tmp_path.iterdir()) == [path]
    loaded = checkpoints.load_checkpoint(path)
    jax.tree.map(np.testing.assert_array_equal, loaded.model, checkpoint.model)
  with pytest.raises(FileExistsError, match='overwrite'):
    checkpoints.save_checkpoint(checkpoint, path)
  for other in ('mine.py', 'mine.safetensors', 'folder/config.json'):
    (path / other).parent.mkdir(exist_ok=True)
    (path / other).write_text('mine')
    with pytest.raises(FileExistsError, match=f'{other} would be lost'):
      checkpoints.save_checkpoint(checkpoint, path, overwrite=True)
    assert (path / other).read_text() == 'mine'
    (path / other).unlink()


class TestSafetensors:
  def tensors(self):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(5, 3)).astype(np.float32)
    return {
      'bf16': matrix.astype(ml_dtypes.bfloat16),
      'a.transposed': matrix.T,
      'f16': matrix.astype(np.float16)[::2],
      'empty': np.zeros((0, 3), np.float16),
      'scalar': np.array(True),
      'long': np.arange(3),
    }

  def test_the_library_reads_and_writes_the_same(self, tmp_path):
    ours, theirs = tmp_path / 'x.safetensors', tmp_path / 'y.safetensors'
    tensors = {name: np.array(x, order='C') for name, x in self.tensors().items()}
    weights_files.write_safetensors(ours, self.tensors())
    with safetensors.safe_open(ours, framework='np') as file:
      assert file.metadata() == {'format': 'pt'}
    assert_same_tensors(safetensors.numpy.load_file(ours), tensors)
    safetensors.numpy.save_file(tensors, theirs)
    assert_same_tensors(weights_files.read_safetensors(theirs), tensors)

  def test_truncated(self, tmp_path):
    path = tmp_path / 'x.safetensors'
    weights_files.write_safetensors(path, self.tensors())
    content = path.read_bytes()
    for size in (0, 4, 20, len(content) - 1):
      path.write_bytes(content[:size])
      with pytest.raises(CheckpointError, match=str(path)):
        weights_files.read_safetensors(path)

  def test_other_dtypes_are_bytes(self, tmp_path):
    path = tmp_path / 'x.safetensors'
    weights_files.write_safetensors(path, {'w': np.arange(2, dtype=np.uint16)})
    path.write_bytes(path.read_bytes().replace(b'U16', b'F42'))
    assert weights_files.read_safetensors(path)['w'].tolist() == [0, 0, 1, 0]

  def test_indexes_that_are_refused(self, tmp_path, subtests):
    checkpoint = checkpoints.load_checkpoint(cases.TESTDATA / 'llama-tiny-dense')
    checkpoints.save_checkpoint(checkpoint, tmp_path, shard_size=300_000)
    path = tmp_path / 'model.safetensors.index.json'
    weight_map = json.loads(path.read_text())['weight_map']
    name = 'model.norm.weight'
    rest = {n: shard for n, shard in weight_map.items() if n != name}
    for content, match in (
      ('[', 'JSON'),
      ('[]', 'object'),
      ('{"weight_map": {"a": 1}}', 'weight_map'),
      (json.dumps({'weight_map': rest}), f'index differ in {name}'),
      (json.dumps({'weight_map': weight_map | {'x': weight_map[name]}}), 'differ in x'),
      (
        json.dumps({'weight_map': {'x': '../x.safetensors'}}),
        'is not the name of a file',
      ),
      (
        json.dumps({'weight_map': {'x': 'y.safetensors'}}),
        'y.safetensors: No such file',
      ),
      (json.dumps({'weight_map': {'x': 'y' * 300}}), 'yyy is not the name'),
      (json.dumps({'weight_map': {'x': '-x.safetensors'}}), 'is not the name'),
    ):
      path.write_text(content)
      with subtests.test(match), pytest.raises(CheckpointError, match=match):
        checkpoints.load_checkpoint(tmp_path)

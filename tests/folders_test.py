"""Folders: what goes in comes out, or is named."""

import json
import subprocess
import sys

import numpy as np
import pytest
import weights_files

import rotbits_jax
from rotbits_jax import checkpoints

SENTENCE_TRANSFORMERS = {
  'model.safetensors': {'embeddings.weight': (40, 16), 'pooler.bias': (16,)},
  '2_Dense/model.safetensors': {'linear.weight': (16, 16), 'linear.bias': (16,)},
}
DIFFUSERS = {
  'text_encoder/model.safetensors': {'embed.weight': (40, 16)},
  'unet/diffusion_pytorch_model-00001-of-00002.safetensors': {'down.0.w': (16, 16)},
  'unet/diffusion_pytorch_model-00002-of-00002.safetensors': {'up.0.w': (16, 16)},
  'vae/diffusion_pytorch_model.safetensors': {'conv.w': (4, 4, 3, 3)},
  'vae/diffusion_pytorch_model.fp16.safetensors': {'conv.w': (4, 4, 3, 3)},
}
INDEX = 'unet/diffusion_pytorch_model.safetensors.index.json'


def _write(folder, weights, texts):
  """Writes safetensors files with random tensors, and texts; returns the folder."""
  rng = np.random.default_rng(0)
  for name, shapes in weights.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    tensors = {x: rng.normal(size=shape) for x, shape in shapes.items()}
    tensors = {x: y.astype(np.float16) for x, y in tensors.items()}
    weights_files.write_safetensors(folder / name, tensors)
  for name, text in texts.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
  return folder


def _sentence_transformers(folder):
  texts = {
    'modules.json': '[]',
    'config.json': '{"model_type": "bert"}',
    '2_Dense/config.json': '{"in_features": 16}',
    '1_Pooling/config.json': '{}',
  }
  return _write(folder, SENTENCE_TRANSFORMERS, texts)


def _diffusers(folder):
  shards = [name for name in DIFFUSERS if name.startswith('unet/')]
  weight_map = {next(iter(DIFFUSERS[x])): x.removeprefix('unet/') for x in shards}
  texts = {
    'model_index.json': '{"_class_name": "StableDiffusionPipeline"}',
    'unet/config.json': '{}',
    'scheduler/scheduler_config.json': '{}',
    INDEX: json.dumps({'metadata': {}, 'weight_map': weight_map}),
  }
  return _write(folder, DIFFUSERS, texts)


def _llama(folder):
  """Writes a folder of a known family."""
  checkpoint = checkpoints.load_checkpoint(checkpoints.example('llama-tiny-dense'))
  checkpoints.save_checkpoint(checkpoint, folder)
  return folder


def _contents(folder):
  files = (x for x in folder.rglob('*') if x.is_file())
  return {x.relative_to(folder).as_posix(): x.read_bytes() for x in files}


def _cli(*arguments):
  command = [sys.executable, '-m', 'rotbits_jax', *map(str, arguments)]
  return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize('write', [_sentence_transformers, _diffusers])
@pytest.mark.parametrize('options', [{}, {'shard_size': 700}])
def test_weights_in_sub_folders_come_back(tmp_path, write, options):
  source = write(tmp_path / 'in')
  rotbits_jax.encode_to_file(source, tmp_path / 'x', check=True, **options)
  rotbits_jax.decode_to_directory(tmp_path / 'x', tmp_path / 'out')
  assert _contents(tmp_path / 'out') == _contents(source)


def test_tensors_in_sub_folders_are_read_by_name(tmp_path):
  data = rotbits_jax.encode(_sentence_transformers(tmp_path / 'in'))
  stored = weights_files.read_safetensors(tmp_path / 'in/2_Dense/model.safetensors')
  read = rotbits_jax.read_tensor(data, '2_Dense/linear.weight')
  np.testing.assert_array_equal(read, stored['linear.weight'])


def test_variants_of_one_tensor_have_the_name_of_their_file(tmp_path):
  data = rotbits_jax.encode(_diffusers(tmp_path / 'in'))
  variant = 'vae/diffusion_pytorch_model.fp16.safetensors'
  stored = weights_files.read_safetensors(tmp_path / 'in' / variant)
  read = rotbits_jax.read_tensor(data, f'{variant}/conv.w')
  np.testing.assert_array_equal(read, stored['conv.w'])


def test_a_missing_shard_of_a_sub_folder_is_refused(tmp_path):
  source = _diffusers(tmp_path / 'in')
  (source / 'unet/diffusion_pytorch_model-00002-of-00002.safetensors').unlink()
  with pytest.raises(rotbits_jax.CheckpointError, match=r'unet.*00002.* is missing'):
    rotbits_jax.encode(source)


def test_a_family_is_that_of_the_folder_with_its_config(tmp_path):
  source = _write(_llama(tmp_path / 'in'), {'extra/x.safetensors': {'w': (8, 8)}}, {})
  data = rotbits_jax.encode(source)
  assert isinstance(rotbits_jax.load(data), rotbits_jax.Model)
  rotbits_jax.decode_to_directory(data, tmp_path / 'out')
  assert _contents(tmp_path / 'out') == _contents(source)


def _with_adapter(folder):
  adapter = {'adapter_model.safetensors': {'base_model.q.lora_A.weight': (2, 16)}}
  return _write(_llama(folder), adapter, {'adapter_config.json': '{"r": 2}'})


def test_an_adapter_comes_back_with_its_config(tmp_path):
  source = _with_adapter(tmp_path / 'in')
  data = rotbits_jax.encode(source)
  rotbits_jax.decode_to_directory(data, tmp_path / 'out')
  assert _contents(tmp_path / 'out') == _contents(source)


def test_a_config_of_an_adapter_does_not_come_back_without_its_weights(tmp_path):
  source = _with_adapter(tmp_path / 'in')
  rotbits_jax.decode_to_directory(
    rotbits_jax.encode(source, preset='near', step=-6.0), tmp_path / 'out'
  )
  assert not [name for name in _contents(tmp_path / 'out') if 'adapter' in name]
  opened = checkpoints.open_checkpoint(source)
  assert opened.missed == ('adapter_config.json', 'adapter_model.safetensors')


OTHERS = ['sub/weights.pth', 'pytorch_model.bin', 'a.onnx', 'm.gguf', 'f.msgpack']


def _with_others(folder):
  return _write(_sentence_transformers(folder), {}, dict.fromkeys(OTHERS, 'x' * 9999))


def test_other_formats_are_named(tmp_path):
  assert checkpoints.open_plain(_with_others(tmp_path)).missed == tuple(sorted(OTHERS))


def test_checking_refuses_a_folder_that_is_not_stored_whole(tmp_path):
  source = _with_others(tmp_path / 'in')
  with pytest.raises(ValueError, match=r'NOT STORED: a\.onnx, .*sub/weights\.pth'):
    rotbits_jax.encode_to_file(source, tmp_path / 'x', check=True)
  assert not (tmp_path / 'x').exists()


def test_all_files_keeps_other_formats_byte_for_byte(tmp_path):
  source = _with_others(tmp_path / 'in')
  options = {'all_files': True, 'check': True}
  rotbits_jax.encode_to_file(source, tmp_path / 'x', **options)
  rotbits_jax.decode_to_directory(tmp_path / 'x', tmp_path / 'out')
  assert _contents(tmp_path / 'out') == _contents(source)


def test_all_files_has_no_bound(tmp_path, monkeypatch):
  monkeypatch.setattr('rotbits_jax.checkpoints.reader._MOST_SIDECARS', 1000)
  large = np.random.default_rng(0).bytes(5 << 20)
  source = _sentence_transformers(tmp_path / 'in')
  (source / 'data.csv').write_bytes(large)
  assert checkpoints.open_plain(source).missed == ('data.csv',)
  data = rotbits_jax.encode(source, all_files=True)
  rotbits_jax.decode_to_directory(data, tmp_path / 'out')
  assert (tmp_path / 'out/data.csv').read_bytes() == large


def test_a_damaged_copy_is_an_error(tmp_path):
  source = _with_others(tmp_path / 'in')
  data = bytearray(rotbits_jax.encode(source, all_files=True))
  offset = data.rindex(b'copies/sub/weights.pth')
  header = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])
  begin, _ = header['copies/sub/weights.pth']['data_offsets']
  assert offset < 8 + int.from_bytes(data[:8], 'little')
  data[8 + int.from_bytes(data[:8], 'little') + begin + 5] ^= 1
  with pytest.raises(rotbits_jax.ContainerError, match=r'copies/sub/weights\.pth'):
    rotbits_jax.decode_to_directory(bytes(data), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_excluded_files_are_not_missed_and_are_recorded(tmp_path):
  source = _with_others(tmp_path / 'in')
  globs = ['sub/', '*.bin', '*.onnx', 'm.*', '*.msgpack']
  rotbits_jax.encode_to_file(source, tmp_path / 'x', exclude=globs, check=True)
  manifest = rotbits_jax.file.Reader(tmp_path / 'x').manifest
  assert manifest.excluded == tuple(sorted(OTHERS))


def test_weights_can_be_excluded(tmp_path):
  source = _sentence_transformers(tmp_path / 'in')
  data = rotbits_jax.encode(source, exclude=['2_Dense/*'])
  rotbits_jax.decode_to_directory(data, tmp_path / 'out')
  names = {x for x in _contents(source) if not x.startswith('2_Dense/')}
  assert {*_contents(tmp_path / 'out')} == names


def test_hidden_folders_and_links_are_missed_but_caches_are_not(tmp_path):
  source = _sentence_transformers(tmp_path / 'in')
  _write(source, {}, {'.git/HEAD': 'x', '.cache/x': 'x', '__pycache__/x.pyc': 'x'})
  (source / 'link.txt').symlink_to(tmp_path / 'elsewhere')
  opened = checkpoints.open_plain(source)
  assert opened.missed == ('.git/', 'link.txt')
  assert opened.left_out == ('.cache/', '__pycache__/')


def test_a_file_of_a_long_name_is_opened(tmp_path):
  source = checkpoints.example('phi2-tiny-sliced-0.25')
  long = 'x' * 220
  for file in source.iterdir():
    if file.suffix in ('.pt', '.json'):
      name = file.name.replace('phi-2_0.25', long)
      (tmp_path / name).write_bytes(file.read_bytes())
  assert checkpoints.open_checkpoint(tmp_path).stem == long


def test_the_command_names_what_is_not_stored(tmp_path):
  source = _with_others(tmp_path / 'in')
  done = _cli('encode', source, tmp_path / 'x')
  assert done.returncode == 0
  line = 'NOT STORED: sub/weights.pth (keep the original of these)'
  assert line in done.stdout.splitlines()
  assert 'every bit' not in done.stdout


def test_the_command_does_not_miss_an_adapter_that_it_stores(tmp_path):
  done = _cli('encode', _with_adapter(tmp_path / 'in'), tmp_path / 'x', '--verify')
  assert done.returncode == 0
  assert 'NOT STORED' not in done.stdout


def test_the_command_verifies_the_folder(tmp_path):
  done = _cli('encode', _with_others(tmp_path / 'in'), tmp_path / 'x', '--verify')
  assert done.returncode == 2
  assert 'NOT STORED: a.onnx' in done.stderr
  assert not (tmp_path / 'x').exists()


def test_verify_compares_the_folder(tmp_path):
  source = _sentence_transformers(tmp_path / 'in')
  rotbits_jax.encode_to_file(source, tmp_path / 'x', check=True)
  _write(source, {}, {'sub/weights.pth': 'x', 'notes.txt': 'x'})
  verified = rotbits_jax.verify(tmp_path / 'x', against=source)
  assert verified.missed == ('notes.txt', 'sub/weights.pth')


def test_verify_does_not_miss_what_was_excluded(tmp_path):
  source = _with_others(tmp_path / 'in')
  globs = ['sub/', '*.bin', '*.onnx', 'm.*', '*.msgpack']
  rotbits_jax.encode_to_file(source, tmp_path / 'x', exclude=globs)
  assert rotbits_jax.verify(tmp_path / 'x', against=source).missed == ()


@pytest.mark.parametrize('change', [b'y' * 9999, b'x' * 9998, b'x' * 10000])
def test_verify_compares_copies(tmp_path, change):
  source = _with_others(tmp_path / 'in')
  rotbits_jax.encode_to_file(source, tmp_path / 'x', all_files=True)
  (source / 'sub/weights.pth').write_bytes(change)
  with pytest.raises(rotbits_jax.ContainerError, match=r'sub/weights\.pth: differs'):
    rotbits_jax.verify(tmp_path / 'x', against=source)


def test_an_output_in_the_folder_is_not_missed(tmp_path):
  source = _sentence_transformers(tmp_path / 'in')
  rotbits_jax.encode_to_file(source, source / 'x.rotbits', check=True)
  assert rotbits_jax.verify(source / 'x.rotbits', against=source).missed == ()

"""Sliced models in the format of transformers, without transformers.

`scripts/transformers_check.py` runs them.
"""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import random_models
import safetensors.numpy

import rotbits_jax
from rotbits_jax import checkpoints

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
SLICED = sorted(path.parent.name for path in TESTDATA.glob('*sliced*/config.json'))
CODE = pathlib.Path(checkpoints.__file__).parent / 'remote_code'
CHANGED = {
  'architectures', 'auto_map', 'model_type', 'segment_widths', 'tie_word_embeddings',
  'torch_dtype',
}  # fmt: skip


def read(folder):
  """Returns the tensors and the config in a folder."""
  tensors = {}
  for file in folder.glob('*.safetensors'):
    tensors |= safetensors.numpy.load_file(file)
  return tensors, json.loads((folder / 'config.json').read_text())


def checkpoint_of(model):
  """Returns a checkpoint with the config of `random_models.sliced_llama`."""
  config_json = random_models.BASE | {'num_hidden_layers': model.config.num_layers}
  files = {
    'config.json': json.dumps(config_json).encode(),
    'x_0.25.json': json.dumps(checkpoints.slicing_json(model.config)).encode(),
    'LICENSE': b'free',
    'code/x.py': b'harm()',
  }
  return checkpoints.Checkpoint(model, files, 'x_0.25')


def test_code_of_the_file_is_written_only_on_request(tmp_path):
  data = rotbits_jax.encode(
    checkpoint_of(random_models.sliced_llama((20, 20, 20))), preset='exact'
  )
  for options, is_written in (
    ({}, True),
    ({'format': 'slicegpt'}, True),
    ({'format': 'transformers'}, False),
    ({'format': 'transformers', 'code': True}, True),
  ):
    folder = tmp_path / str(options)
    rotbits_jax.decode_to_directory(data, folder, **options)
    assert (folder / 'code' / 'x.py').exists() == is_written
    assert (folder / 'LICENSE').exists()


@pytest.mark.parametrize('name', SLICED)
def test_files(name, tmp_path):
  source = checkpoints.load_checkpoint(TESTDATA / name)
  # transformers 5 has another name for the dtype of the dense model, and prefers it.
  added = {'dtype': 'bfloat16', '_attn_implementation': 'a/b', 'custom_pipelines': {}}
  newer = json.dumps(json.loads(source.files['config.json']) | added)
  files = source.files | {'config.json': newer.encode()}
  names = 'x.py', 'custom_generate/generate.PY', 'adapter_config.json'
  code = dict.fromkeys(names, b'harm()')
  newer = source._replace(files=files | code)
  checkpoints.save_checkpoint(newer, tmp_path / 'out', 'transformers')
  tensors, config = read(tmp_path / 'out')
  expected = {
    key.replace('_shortcut_Q', '_shortcut.weight'): x.T if '_shortcut_Q' in key else x
    for key, x in checkpoints.to_tensors(source.model).items()
  }
  assert tensors.keys() == expected.keys()
  for key, tensor in tensors.items():
    assert tensor.dtype == expected[key].dtype
    np.testing.assert_array_equal(tensor, expected[key])
  kept = source.files.keys() - {f'{source.stem}.json'}
  written = {file.name: file.read_bytes() for file in (tmp_path / 'out').iterdir()}
  assert written.keys() == kept | {'modeling_sliced.py', 'model.safetensors'}
  assert written['modeling_sliced.py'] == (CODE / 'modeling_sliced.py').read_bytes()
  for file in kept - {'config.json'}:
    assert written[file] == source.files[file]

  dense = json.loads(source.files['config.json'])
  assert config.keys() == dense.keys() | CHANGED | {'tokenizer_class'}
  for key in dense.keys() - CHANGED:
    assert config[key] == dense[key]
  assert config['model_type'] == f'sliced_{source.model.config.family}'
  assert config['tie_word_embeddings'] is False
  assert config['torch_dtype'] == 'float16'
  for path in config['auto_map'].values():
    assert path.startswith('modeling_sliced.Sliced')


@pytest.mark.parametrize(
  ('name', 'beside', 'scaling'),
  [
    ('llama-tiny-sliced-head-0.25', {'rope_theta': 5e5}, random_models.LLAMA3_ROPE),
    ('llama-tiny-sliced-head-0.25', {}, {'type': 'linear', 'factor': 2.0}),
    ('phi2-tiny-sliced-0.25', {'rope_theta': 50.0, 'partial_rotary_factor': 0.5}, None),
  ],
)
def test_rope_is_where_transformers_4_reads_it(name, beside, scaling, tmp_path):
  shutil.copytree(TESTDATA / name, tmp_path / 'x')
  path = tmp_path / 'x' / 'config.json'
  dense = json.loads(path.read_text())
  for key in ('rope_theta', 'rope_scaling', 'partial_rotary_factor'):
    dense.pop(key, None)
  newer = dense | {'rope_parameters': (scaling or {'rope_type': 'default'}) | beside}
  path.write_text(json.dumps(newer))
  source = rotbits_jax.load_checkpoint(tmp_path / 'x')
  encoded = rotbits_jax.encode(source, preset='exact')
  rotbits_jax.decode_to_directory(encoded, tmp_path / 'y', format='transformers')
  _, config = read(tmp_path / 'y')
  older = dense | beside | ({'rope_scaling': scaling} if scaling else {})
  kept = older.keys() - CHANGED
  assert {key: config[key] for key in kept} == {key: older[key] for key in kept}
  assert config.keys() == older.keys() | CHANGED | {'tokenizer_class'}
  # The two forms are the same for our parser, too.
  assert checkpoints.parse_config(older) == checkpoints.parse_config(newer)


@pytest.mark.parametrize('options', [{}, {'dtype': 'float32', 'shard_size': 4000}])
def test_decoding_is_saving_what_was_decoded(options, tmp_path):
  model = random_models.sliced_llama((20, 20, 20, 20, 24), np.float16)
  # Old versions of transformers stored this buffer.
  buffers = {'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(6, np.float32)}
  model = dataclasses.replace(model, buffers=buffers)
  data = rotbits_jax.encode(checkpoint_of(model), preset='free')
  here, there = tmp_path / 'x', tmp_path / 'y'
  rotbits_jax.decode_to_directory(data, here, format='transformers', **options)
  decoded = rotbits_jax.decode_checkpoint(data)
  checkpoints.save_checkpoint(decoded, there, 'transformers')
  (tensors, config), (expected, _) = read(here), read(there)
  assert not any('rotary' in name for name in tensors)
  assert tensors.keys() == expected.keys()
  for name, tensor in tensors.items():
    dtype = options.get('dtype', 'float16')
    np.testing.assert_array_equal(tensor, expected[name].astype(dtype))
    assert tensor.dtype == dtype
  assert config['torch_dtype'] == options.get('dtype', 'float16')
  assert (len(list(here.glob('*.safetensors'))) > 1) == bool(options)

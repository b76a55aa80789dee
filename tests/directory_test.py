"""Files become checkpoints again: every fixture, with every preset, in each format."""

import json

import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import presets
from rotbits_jax import structured
from tests import cases

# Fused tensors, which bits-back coding decodes in parts; and one that is quick.
QUICK = {('phi3-tiny-sliced-0.25', 'paper'), ('llama-tiny-sliced-head-0.25', 'free')}


def tensors(path):
  """Returns shape and dtype of each tensor of a checkpoint, and its bits."""
  found = checkpoints.to_tensors(rotbits_jax.load_checkpoint(path).model)
  specs = {name: (x.shape, x.dtype) for name, x in found.items()}
  return specs, {name: x.tobytes() for name, x in found.items()}


@pytest.mark.parametrize(('name', 'preset'), sorted(QUICK))
def test_a_checkpoint_comes_back(tmp_path, name, preset):
  check_directory(tmp_path, name, preset)


@pytest.mark.slow
@pytest.mark.parametrize('preset', presets.PRESETS)
def test_every_checkpoint_comes_back(tmp_path, preset, subtests):
  for name in cases.CHECKPOINTS:
    if preset != 'paper' or 'sliced' in name:
      with subtests.test(name=name):
        (tmp_path / name).mkdir()
        check_directory(tmp_path / name, name, preset)


def check_directory(tmp_path, name, preset):
  output = tmp_path / 'x.rotbits'
  rotbits_jax.encode_to_file(cases.TESTDATA / name, output, preset=preset)
  specs, bits = tensors(cases.TESTDATA / name)
  formats = ['safetensors', *(['slicegpt'] if 'sliced' in name else [])]
  written = {}
  for format in formats:
    rotbits_jax.decode_to_directory(output, tmp_path / format, format=format)
    found, written[format] = tensors(tmp_path / format)
    assert found == specs
    expected = rotbits_jax.load_checkpoint(tmp_path / format).model.config
    assert expected == rotbits_jax.load_checkpoint(cases.TESTDATA / name).model.config
  assert all(x == written['safetensors'] for x in written.values())
  assert (written['safetensors'] == bits) == (preset == 'exact')
  if 'sliced' in name:  # only transformers loads it: scripts/transformers.sh does
    folder = tmp_path / 'transformers'
    rotbits_jax.decode_to_directory(output, folder, format='transformers')
    opened = checkpoints.open_plain(folder).tensors
    others = {x for x in specs if 'shortcut' not in x}
    assert others <= opened.keys()
    assert all((opened[x].shape, opened[x].dtype) == specs[x] for x in others)
    assert list(folder.glob('modeling_*.py'))


def test_the_config_names_the_dtype(tmp_path):
  folder = cases.TESTDATA / 'llama-tiny-dense'
  data = rotbits_jax.encode(rotbits_jax.load_checkpoint(folder))
  rotbits_jax.decode_to_directory(data, tmp_path / 'x', dtype='bfloat16')
  given, config = (
    json.loads((x / 'config.json').read_text()) for x in (folder, tmp_path / 'x')
  )
  with pytest.raises(ValueError, match='of floating-point numbers, got int8'):
    rotbits_jax.decode_to_directory(data, tmp_path / 'y', dtype='int8')
  with pytest.raises(ValueError, match='of floating-point numbers, got bool'):
    rotbits_jax.load(data, dtype=bool)
  name = 'dtype' if 'dtype' in given else 'torch_dtype'
  assert config == given | {name: 'bfloat16'} != given


def test_numbers_that_are_too_large_for_a_dtype(tmp_path):
  checkpoint = rotbits_jax.load_checkpoint(cases.TESTDATA / 'llama-tiny-dense')
  model = structured.astype(checkpoint.model, np.float32)
  layers = list(model.layers())
  kernel = np.array(layers[1]['mlp']['up']['kernel'])
  kernel[3, 4] = 65520  # which float16 rounds to infinity
  layers[1]['mlp']['up']['kernel'] = kernel
  model = models.from_layers(model.config, model.outer(), layers)
  data = rotbits_jax.encode(checkpoint._replace(model=model), preset='exact')
  words = r'layers\.1/mlp/up/kernel: too large for float16; .* --dtype=float32'
  with pytest.raises(ValueError, match=words):
    rotbits_jax.decode_to_directory(data, tmp_path / 'x', dtype='float16')
  assert not list(tmp_path.iterdir())
  for dtype in (None, 'float32', 'bfloat16'):
    rotbits_jax.decode_to_directory(data, tmp_path / f'{dtype}', dtype=dtype)

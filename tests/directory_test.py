"""Files become checkpoints again: every fixture, with every preset, in each format."""

import itertools
import json
import pathlib
import shutil

import pytest
import weights_files

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import presets

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
FIXTURES = sorted(x.parent.name for x in TESTDATA.glob('*/config.json'))
# Fused tensors, which bits-back coding decodes in parts; and one that is quick.
QUICK = {('phi3-tiny-sliced-0.25', 'paper'), ('llama-tiny-sliced-head-0.25', 'free')}


def cases():
  """Yields each fixture with each preset that takes it."""
  for name, preset in itertools.product(FIXTURES, presets.PRESETS):
    if preset == 'paper' and 'sliced' not in name:
      continue
    marks = [] if (name, preset) in QUICK else [pytest.mark.slow]
    yield pytest.param(name, preset, marks=marks)


def tensors(path):
  """Returns shape and dtype of each tensor of a checkpoint, and its bits."""
  found = checkpoints.to_tensors(rotbits_jax.load_checkpoint(path).model)
  specs = {name: (x.shape, x.dtype) for name, x in found.items()}
  return specs, {name: x.tobytes() for name, x in found.items()}


@pytest.mark.parametrize(('name', 'preset'), list(cases()))
def test_a_checkpoint_comes_back(tmp_path, name, preset):
  output = tmp_path / 'x.rotbits'
  rotbits_jax.encode_to_file(TESTDATA / name, output, preset=preset)
  specs, bits = tensors(TESTDATA / name)
  formats = ['safetensors', *(['slicegpt'] if 'sliced' in name else [])]
  written = {}
  for format in formats:
    rotbits_jax.decode_to_directory(output, tmp_path / format, format=format)
    found, written[format] = tensors(tmp_path / format)
    assert found == specs
    expected = rotbits_jax.load_checkpoint(tmp_path / format).model.config
    assert expected == rotbits_jax.load_checkpoint(TESTDATA / name).model.config
  assert all(x == written['safetensors'] for x in written.values())
  assert (written['safetensors'] == bits) == (preset == 'exact')
  if 'sliced' in name:  # only transformers loads it: scripts/transformers.sh does
    folder = tmp_path / 'transformers'
    rotbits_jax.decode_to_directory(output, folder, format='transformers')
    opened = checkpoints.open_tensors(folder).tensors
    others = {x for x in specs if 'shortcut' not in x}
    assert others <= opened.keys()
    assert all((opened[x].shape, opened[x].dtype) == specs[x] for x in others)
    assert list(folder.glob('modeling_*.py'))


def test_a_tied_head_that_is_stored_too_is_the_models_own_once_it_is_rewritten(
  tmp_path, subtests
):
  folder = tmp_path / 'tied'
  shutil.copytree(TESTDATA / 'llama-tiny-dense', folder)
  config, weights = folder / 'config.json', folder / 'model.safetensors'
  given = json.loads(config.read_text()) | {'tie_word_embeddings': True}
  config.write_text(json.dumps(given))
  read = {name: x.copy() for name, x in weights_files.read_safetensors(weights).items()}
  read['lm_head.weight'] = read['model.embed_tokens.weight']
  weights_files.write_safetensors(weights, read)
  for preset in ('exact', 'free', 'near'):
    with subtests.test(preset):
      data = rotbits_jax.encode(rotbits_jax.load_checkpoint(folder), preset=preset)
      ways = [tmp_path / f'{preset}-{i}' for i in range(2)]
      rotbits_jax.decode_to_directory(data, ways[0])
      rotbits_jax.save_checkpoint(rotbits_jax.decode_checkpoint(data), ways[1])
      for way in ways:
        text = (way / 'config.json').read_text()
        if preset == 'exact':
          assert text == config.read_text()
        else:
          assert json.loads(text) == given | {'tie_word_embeddings': False}
        assert not rotbits_jax.load_checkpoint(way).model.config.tied_head


def test_the_config_names_the_dtype(tmp_path):
  folder = TESTDATA / 'llama-tiny-dense'
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

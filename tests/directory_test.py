"""Files become checkpoints again: every fixture, with every preset, in each format."""

import itertools
import pathlib

import pytest

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

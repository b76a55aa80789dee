"""The second reader, written from the format's page alone, reads the same numbers."""

import importlib.util
import pathlib

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

import rotbits_jax
from rotbits_jax import structured

ROOT = pathlib.Path(__file__).parents[1]
UNITS = [name for name in rotbits_jax.PRESETS if name != 'paper']
SMALL = [
  *('llama-tiny-dense', 'phi2-tiny-sliced-0.25', 'phi3-tiny-dense'),
  pytest.param('opt-small-sliced-0.2', marks=pytest.mark.slow),
]


def load_decoder():
  path = ROOT / 'examples' / 'numpy_decoder.py'
  spec = importlib.util.spec_from_file_location('numpy_decoder', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def parameters(model):
  """The arrays of a model by path, and whether each is a leaf's expansion."""
  found = {}
  plain = model.materialize()
  units = [('', model.outer(), plain.outer())]
  layers = zip(model.layers(), plain.layers(), strict=True)
  units += [(f'layers.{i}/', *both) for i, both in enumerate(layers)]
  for prefix, leaves, arrays in units:
    leaves, arrays = structured.flatten(leaves), structured.flatten(arrays)
    for path, array in arrays.items():
      is_leaf = structured.is_structured(leaves[path])
      found[prefix + path] = np.asarray(array), is_leaf
  return found


@pytest.mark.parametrize('preset', UNITS)
@pytest.mark.parametrize('name', SMALL)
def test_reads_the_same_numbers(name, preset, tmp_path):
  file, output = tmp_path / 'model.rotbits', tmp_path / 'model.safetensors'
  checkpoint = rotbits_jax.load_checkpoint(ROOT / 'tests' / 'testdata' / name)
  rotbits_jax.encode_to_file(checkpoint.model, file, preset=preset)
  load_decoder().main(file, output)
  got = safetensors_numpy.load_file(output)
  expected = parameters(rotbits_jax.decode(file))
  assert set(got) == set(expected)
  for path, (array, is_leaf) in expected.items():
    assert (got[path].dtype, got[path].shape) == (array.dtype, array.shape)
    bits = [x.view(f'u{x.itemsize}') for x in (got[path], array)]
    if is_leaf:
      # Float sums in another order: few numbers are rounded to their other neighbour.
      assert np.mean(bits[0] != bits[1]) < 2e-3, path
      wide = [np.asarray(x, np.float64) for x in (got[path], array)]
      roundoff = 2.0**-7 if array.dtype.name == 'bfloat16' else 2.0**-10
      np.testing.assert_allclose(*wide, rtol=roundoff, atol=1e-6, err_msg=path)
    else:
      np.testing.assert_array_equal(*bits, err_msg=path)


def test_is_short():
  lines = (ROOT / 'examples' / 'numpy_decoder.py').read_text().splitlines()
  assert len(lines) < 300

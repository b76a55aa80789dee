"""The second reader, written from the format's page alone, reads the same numbers."""

import importlib
import itertools
import json
import pathlib
import sys

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
import safetensors
from safetensors import numpy as safetensors_numpy

import rotbits_jax
from rotbits_jax import structured
from tests import golden
from tests import quantisers_test
from tests import recipe_test

ROOT = pathlib.Path(__file__).parents[1]
ROUNDOFF = {'bfloat16': 2.0**-7, 'float16': 2.0**-10, 'float32': 1e-5}
RECORDS = [name for name in rotbits_jax.PRESETS if name != 'paper']
SMALL = [
  *('llama-tiny-dense', 'phi2-tiny-sliced-0.25', 'phi3-tiny-dense'),
  pytest.param('opt-small-sliced-0.2', marks=pytest.mark.slow),
]


def load_last_layer(name):
  """A checkpoint's model with its last layer alone, because the decoder is slow."""
  model = rotbits_jax.load_checkpoint(ROOT / 'tests' / 'testdata' / name).model
  widths = model.config.segment_widths[-model.config.segments_per_layer - 1 :]
  config = msgspec.structs.replace(model.config, num_layers=1, segment_widths=widths)
  return rotbits_jax.models.from_layers(
    config, model.outer(), [model.layer(model.config.num_layers - 1)]
  )


def load_decoder():
  sys.path.insert(0, str(ROOT / 'examples'))
  return importlib.import_module('numpy_decoder')


def parameters(decoded):
  """Arrays of a model or of nested dicts by path, and whether each was structured."""
  if isinstance(decoded, rotbits_jax.Model):
    leaves, arrays = dict(decoded.leaves()), dict(decoded.materialize().leaves())
  else:
    leaves = arrays = structured.flatten(decoded)
  return {
    path: (np.asarray(array), structured.is_structured(leaves[path]))
    for path, array in arrays.items()
  }


def save_base(base, folder):
  is_model = isinstance(base, rotbits_jax.Model)
  leaves = dict(base.leaves()) if is_model else structured.flatten(base)
  arrays = {path: np.ascontiguousarray(x) for path, x in leaves.items()}
  safetensors_numpy.save_file(arrays, folder / 'base.safetensors')
  return folder / 'base.safetensors'


def assert_reads_the_same(file, output, base=None, dense=None):
  load_decoder().main(file, output, base)
  got = safetensors_numpy.load_file(output)
  decoded = rotbits_jax.decode(file, base=base if dense is None else dense)
  expected = parameters(decoded)
  assert set(got) == set(expected)
  for path, (array, is_leaf) in expected.items():
    assert (got[path].dtype, got[path].shape) == (array.dtype, array.shape)
    bits = [x.view(f'u{x.itemsize}') for x in (got[path], array)]
    if is_leaf:
      # Float sums in another order: few numbers are rounded to their other neighbour.
      # In float32 most sums differ in a few of their last bits.
      if array.dtype.itemsize < 4:
        assert np.mean(bits[0] != bits[1]) < 2e-3, path
      wide = [np.asarray(x, np.float64) for x in (got[path], array)]
      rtol = ROUNDOFF[array.dtype.name]
      np.testing.assert_allclose(*wide, rtol=rtol, atol=1e-6, err_msg=path)
    else:
      np.testing.assert_array_equal(*bits, err_msg=path)


@pytest.mark.parametrize('preset', RECORDS)
@pytest.mark.parametrize('name', SMALL)
def test_reads_the_same_numbers(name, preset, tmp_path):
  file, output = tmp_path / 'model.rotbits', tmp_path / 'model.safetensors'
  rotbits_jax.encode_to_file(load_last_layer(name), file, preset=preset)
  assert_reads_the_same(file, output)


@pytest.mark.parametrize('name', [x for x in golden.names() if 'paper' not in x])
def test_reads_golden_files(name, tmp_path):
  output, base = tmp_path / 'model.safetensors', golden.base_of(name)
  path = None if base is None else save_base(base, tmp_path)
  assert_reads_the_same(golden.file_of(name), output, path, base)


def test_reads_a_tree_beside_a_base(tmp_path, subtests):
  for own, dtype in itertools.product(
    ('float16', 'bfloat16', 'float32', 'float64', 'int16'),
    ('float16', 'bfloat16', 'float32', 'int16'),
  ):
    with subtests.test(own=own, dtype=dtype):
      rng = np.random.default_rng(0)
      base = {name: 9 * rng.normal(size=(64, 80)) for name in 'abc'}
      near = {name: x + 0.1 * rng.normal(size=x.shape) for name, x in base.items()}
      near['b'][1:] = base['b'][1:]
      base['d'] = rng.normal(size=(64, 80))
      near['d'] = base['d'] + rng.normal(size=(64, 2)) @ rng.normal(size=(2, 80))
      near['c'] = np.vstack([base['c'], near['b']])
      base['e'] = rng.normal(size=(90, 100))
      near['e'] = 0.98 * base['e']
      base['f'] = base['a'][:, :70]  # a head of fewer tokens, and then of more
      near['f'], near['a'] = near['a'], near['a'][:, :70]
      as_type = lambda tree, name: {
        k: x.astype(jnp.dtype(name)) for k, x in tree.items()
      }
      base, near = as_type(base, own), as_type(near, dtype)
      file, output = tmp_path / 'x.rotbits', tmp_path / 'x.safetensors'
      safetensors_numpy.save_file(base, tmp_path / 'base.safetensors')
      options = {'base': tmp_path / 'base.safetensors', 'overwrite': True}
      rotbits_jax.encode_to_file(near, file, **options)
      assert_reads_the_same(file, output, tmp_path / 'base.safetensors')


@pytest.mark.parametrize('preset', ['free', 'exact'])
def test_reads_a_sliced_model_beside_its_dense_model(preset, tmp_path):
  dense, model = recipe_test.opt_pair(jnp.bfloat16)
  file, output = tmp_path / 'x.rotbits', tmp_path / 'x.safetensors'
  rotbits_jax.encode_to_file(model, file, base=dense, preset=preset)
  assert_reads_the_same(file, output, save_base(dense, tmp_path), dense)


def test_reads_trees_with_names_of_a_model_and_empty_dicts(tmp_path):
  file, output = tmp_path / 'tree.rotbits', tmp_path / 'tree.safetensors'
  tree = {'embed': {'x': np.arange(3)}, 'layers.0': {'y': {}, 'z': np.ones(2)}, 'e': {}}
  rotbits_jax.encode_to_file(tree, file)
  assert_reads_the_same(file, output)
  with safetensors.safe_open(output, 'np') as opened:
    assert sorted(json.loads(opened.metadata()['empty'])) == ['e', 'layers.0/y']


def test_reads_codes_and_scales(tmp_path):
  file, output = tmp_path / 'x.rotbits', tmp_path / 'x.safetensors'
  tree = {}
  for scheme, (quantiser, *_) in quantisers_test.SCHEMES.items():
    tree[scheme] = quantiser(quantisers_test.weights(128, 256)).astype(jnp.bfloat16)
    tree[scheme][0, :2] = np.nan, 1
  rotbits_jax.encode_to_file({'x': tree}, file)
  assert_reads_the_same(file, output)


@pytest.mark.parametrize('dtype', ['int2', 'int4'])
def test_reads_negative_numbers_of_few_bits(dtype, tmp_path):
  file, output = tmp_path / 'tree.rotbits', tmp_path / 'tree.safetensors'
  numbers = np.tile(np.array([-2, -1, 0, 1], np.int8), 64)
  rotbits_jax.encode_to_file({'x': numbers.astype(jnp.dtype(dtype))}, file)
  load_decoder().main(file, output)
  found = safetensors_numpy.load_file(output)['x']
  np.testing.assert_array_equal(found, numbers)


def test_metadata_changes_nothing_for_it(tmp_path):
  file, output = tmp_path / 'x.rotbits', tmp_path / 'x.safetensors'
  rotbits_jax.encode_to_file({'x': np.ones(9)}, file, metadata={'run': 'a'})
  assert_reads_the_same(file, output)

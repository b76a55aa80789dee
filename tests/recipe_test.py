"""A sliced model beside the dense model that it was sliced from."""

import dataclasses
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest

from fuzz import containers
import rotbits_jax
from rotbits_jax import file
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.file import encode
from rotbits_jax.relative import entries
from rotbits_jax.relative import products
from rotbits_jax.structured import subspaces
from tests import random_models

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
MICROSOFT = {
  'llama-tiny': 'llama-tiny-sliced-head-0.25',
  'phi2-tiny': 'phi2-tiny-sliced-0.25',
  'phi3-tiny': 'phi3-tiny-sliced-0.25',
}
OPT = {
  'model_type': 'opt',
  'hidden_size': 48,
  'word_embed_proj_dim': 48,
  'ffn_dim': 96,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'vocab_size': 200,
  'max_position_embeddings': 30,
}
WIDTHS = (40, 36, 36, 44, 48)


def opt_pair(dtype=np.float16):
  dense = random_models.random_model(OPT, dtype)
  return dense, random_models.sliced_from(dense, WIDTHS, dtype)


def size_of(model):
  return structured.count_bytes(dict(model.leaves()))


def stream_bytes(data):
  reader = file.Reader(data)
  return sum(nbytes for _, nbytes in reader.manifest.streams())


def forms(data):
  """How each parameter is stored, by path."""
  notes = rotbits_jax.inspect(data).notes[encode.RELATIVE]
  return {note['tensor']: (note['form'], note.get('product')) for note in notes}


@pytest.mark.parametrize(
  ('name', 'exact', 'free'),
  [('llama-tiny', 0.31, 0.085), ('phi2-tiny', 0.18, 0.032), ('phi3-tiny', 0.31, 0.075)],
)
def test_checkpoints_that_microsoft_sliced(name, exact, free):
  path, base = TESTDATA / MICROSOFT[name], TESTDATA / f'{name}-dense'
  checkpoint = rotbits_jax.open_checkpoint(path)
  model = rotbits_jax.load_checkpoint(path).model
  data = rotbits_jax.encode(checkpoint, base=base, preset='exact')
  assert stream_bytes(data) < exact * size_of(model)
  decoded = rotbits_jax.decode(data, base=base)
  assert structured.same_bits(decoded.params, model.params)
  data = rotbits_jax.encode(checkpoint, base=base, preset='free')
  assert stream_bytes(data) < free * size_of(model)
  found = rotbits_jax.verify(data, against=path, base=base)
  # The given numbers are one rounding from their products, and so are those that come
  # back: about twice the noise floor, and more if SliceGPT rounded a tensor twice.
  assert found.kl < (2.5 if name == 'llama-tiny' else 2) * found.kl_rerounded
  stored = {
    'difference' if product == 'shortcut' else 'unchanged'
    for form, product in forms(data).values()
    if product is not None
  }
  assert stored == {'difference', 'unchanged'}


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float32])
def test_widths_that_differ_biases_and_a_tied_head(dtype):
  dense, model = opt_pair(dtype)
  for preset, share in {'exact': 0.75, 'free': 0.6}.items():
    data = rotbits_jax.encode(model, base=dense, preset=preset)
    assert stream_bytes(data) < share * size_of(model), preset
    found = rotbits_jax.decode(data, base=dense)
    if preset == 'exact':
      assert structured.same_bits(found.params, model.params)
    own, other = (x.outer()['head']['kernel'] for x in (found, model))
    norms = [np.linalg.norm(np.float32(x), axis=0) for x in (own, other)]
    np.testing.assert_allclose(*norms, rtol=8 * float(ml_dtypes.finfo(dtype).eps))


def test_segments_side_by_side_that_were_not_sliced():
  dense = random_models.random_model(OPT, np.float16)
  for widths in ((48,) * 5, (40, 48, 48, 44, 48)):
    model = random_models.sliced_from(dense, widths, np.float16)
    data = rotbits_jax.encode(model, base=dense, preset='free')
    assert forms(data)['layers.0/mlp_shortcut/kernel'] == ('unchanged', 'shortcut')
    found = rotbits_jax.decode(data, base=dense).layer(0)['mlp_shortcut']['kernel']
    np.testing.assert_array_equal(found, np.eye(48))
    exact = rotbits_jax.encode(model, base=dense, preset='exact')
    found = rotbits_jax.decode(exact, base=dense)
    assert structured.same_bits(found.params, model.params)


def test_a_tensor_that_was_changed_after_slicing_is_a_difference():
  dense = rotbits_jax.load_checkpoint(TESTDATA / 'llama-tiny-dense').model
  model = rotbits_jax.load_checkpoint(TESTDATA / MICROSOFT['llama-tiny']).model
  layers, rng = list(model.layers()), np.random.default_rng(0)
  kernel = layers[1]['mlp']['up']['kernel']
  update = rng.normal(size=(96, 2)) @ rng.normal(size=(2, 256)) * 0.01
  layers[1]['mlp']['up']['kernel'] = (kernel + update).astype(kernel.dtype)
  layers[1]['mlp']['down']['kernel'] = rng.normal(size=(256, 96)).astype(kernel.dtype)
  tuned = models.from_layers(model.config, model.outer(), layers)
  data = rotbits_jax.encode(tuned, base=dense, preset='free')
  found = forms(data)
  assert found['layers.1/mlp/up/kernel'] == ('difference', 'reads')
  assert found['layers.1/mlp/down/kernel'] == ('array', None)
  assert found['layers.1/mlp/gate/kernel'] == ('unchanged', 'reads')
  data = rotbits_jax.encode(tuned, base=dense, preset='exact')
  assert structured.same_bits(rotbits_jax.decode(data, base=dense).params, tuned.params)


def test_a_base_that_the_model_was_not_sliced_from():
  dense, model = opt_pair()
  flipped = jax.tree.map(lambda x: x[..., ::-1].copy(), dense.params)
  other = dataclasses.replace(dense, params=flipped)
  with pytest.raises(ValueError, match='takes no such base'):
    rotbits_jax.encode(model, base=other, preset='free')
  phi2 = rotbits_jax.load_checkpoint(TESTDATA / 'phi2-tiny-sliced-0.25').model
  data = rotbits_jax.encode(phi2, base=dense, preset='exact')  # of other segments
  assert structured.same_bits(rotbits_jax.decode(data, base=dense).params, phi2.params)
  data = rotbits_jax.encode(model, base=dense, preset='free')
  with pytest.raises(file.ContainerError, match='other elements'):
    rotbits_jax.decode(data, base=other)
  with pytest.raises(file.ContainerError, match='it needs base='):
    rotbits_jax.decode(data)


def test_what_cannot_be_rotated_keeps_its_bases():
  dense, model = opt_pair()
  layers = list(model.layers())
  kernel = layers[1]['mlp']['up']['kernel'].copy()
  kernel[:9, 0] = 6e4  # finite, but not as a rotation may make it
  layers[1]['mlp']['up']['kernel'] = kernel
  changed = models.from_layers(model.config, model.outer(), layers)
  data = rotbits_jax.encode(changed, base=dense, preset='free')
  assert stream_bytes(data) < 0.75 * size_of(model)
  found = rotbits_jax.decode(data, base=dense)
  assert structured.same_bits(found.params['embed'], model.params['embed'])
  assert np.isfinite(found.layer(1)['mlp']['up']['kernel']).all()


def test_a_base_with_numbers_too_large_for_a_product():
  dense = rotbits_jax.load_checkpoint(TESTDATA / 'llama-tiny-dense').model
  model = rotbits_jax.load_checkpoint(TESTDATA / MICROSOFT['llama-tiny']).model
  layers = [jax.tree.map(np.float32, x) for x in dense.layers()]
  # The scale times the kernel is finite, and the product is not.
  layers[1]['mlp_norm']['scale'][3] = 6e4
  layers[1]['mlp']['up']['kernel'][3] = 6e4
  base = models.from_layers(dense.config, dense.outer(), layers)
  data = rotbits_jax.encode(model, base=base, preset='exact')
  found = rotbits_jax.decode(data, base=base)
  assert structured.same_bits(found.params, model.params)


def test_parts_and_shards(tmp_path):
  dense, model = opt_pair()
  data = rotbits_jax.encode(model, base=dense, preset='exact')
  path = 'layers.1/attention/query/kernel'
  found = rotbits_jax.read_tensor(data, path, base=dense)
  assert structured.same_bits(found, model.layer(1)['attention']['query']['kernel'])
  for size in (None, 3000):
    target = tmp_path / f'{size}.rotbits'
    rotbits_jax.encode_to_file(
      model, target, base=dense, preset='exact', shard_size=size, check=True
    )
    found = rotbits_jax.load(target, base=dense)
    assert structured.same_bits(jax.device_get(found.params), model.params)
  assert len(list(target.glob('*.rotbits'))) > 3


@pytest.mark.parametrize(
  ('kind', 'segments', 'arrays'),
  [('shortcut', (1,), 0), ('writes', (), 1), ('reads', (1,), 1), ('bias', (), 1)],
)
def test_a_product_lacks_nothing(kind, segments, arrays):
  array = entries.BaseArray('w', (4, 6), 'float16', 0)
  with pytest.raises(ValueError, match=f'a product {kind!r} cannot be made of'):
    products.Product(kind=kind, segments=segments, arrays=(array,) * arrays)


def test_a_shortcut_of_one_segment_is_refused():
  dense, model = opt_pair()
  streams, manifest = containers.unpack(
    rotbits_jax.encode(model, base=dense, preset='free')
  )
  leaves = [leaf for record in manifest['records'] for leaf in record['leaves']]
  found = [leaf['product'] for leaf in leaves if 'product' in leaf]
  product = next(x for x in found if x['kind'] == 'shortcut')
  del product['segments'][1]
  data = containers.pack(streams, containers.to_json(manifest))
  with pytest.raises(file.ContainerError, match='cannot be made of 1 segments'):
    rotbits_jax.verify(data, base=dense)


def test_a_recipe_is_compared_with_a_file_and_a_file_with_it():
  dense, model = opt_pair()
  alone = rotbits_jax.encode(model, preset='exact')
  recipe = file.Reader(rotbits_jax.encode(model, base=dense, preset='exact'), dense)
  assert rotbits_jax.verify(alone, against=recipe).same_bits
  again = rotbits_jax.encode(model, base=dense, preset='exact')
  assert rotbits_jax.verify(again, against=alone, base=dense).same_bits


def test_a_subspace_is_made_of_integers():
  rng = np.random.default_rng(0)
  basis = random_models.orthogonal(rng, 11)[:, :8]
  leaf = subspaces.Basis.near(basis, 2.0**-11, keeps_basis=False)
  found = leaf.materialize()
  one = 1 << 25
  np.testing.assert_allclose(found.T @ (found / one**2), np.eye(8), atol=1e-6)
  # It is the same subspace.
  np.testing.assert_allclose(
    basis @ (basis.T @ found) / one, found / one, atol=2.0**-12
  )
  # The same in integers of Python. Multiples of 2^-50 become the nearest of 2^-25.
  scaled = np.vectorize(lambda x: int(np.rint(x / one)), otypes=[object])
  unit = lambda n, x: np.eye(n, dtype=int).astype(object) * x
  tangent = leaf.numbers.astype(object) * leaf.step
  gram = scaled(tangent @ tangent.T) + unit(3, one)
  inverse = unit(3, int(np.rint(one * 2 / 3)))
  for _ in range(5):
    inverse = scaled(inverse @ (unit(3, 2 * one) - scaled(gram @ inverse)))
  lower = 2 * scaled(inverse @ tangent)
  upper = unit(8, one) - scaled(tangent.T @ lower)
  rows = np.unpackbits(leaf.mask, count=11, bitorder='little').astype(bool)
  assert found[rows].tolist() == upper.tolist()
  assert found[~rows].tolist() == lower.tolist()


def test_products_of_large_numbers_are_exact_and_of_infinite_ones_refused():
  array = entries.BaseArray('w', (4, 6), 'float16', 0)
  form = products.Product(kind='writes', segments=(0,), arrays=(array,))
  kernel, huge = np.ones((4, 6), np.float16), np.full((6, 3), 2**30, np.int32)
  make = lambda array, basis: form.tensor(
    [array], [basis], (4, 3), np.dtype(np.float16)
  )
  np.testing.assert_array_equal(make(kernel, huge), np.full((4, 3), 6 * 2**5))
  with pytest.raises(ValueError, match='not finite'):
    make(np.full_like(kernel, np.inf), huge // 2**8)
  with pytest.raises(ValueError, match='size 5 is different from 6'):
    make(kernel, huge[:5] // 2**8)


def test_records_that_are_no_bases_are_refused():
  dense, model = opt_pair()
  encoded = rotbits_jax.encode(model, base=dense, preset='free')
  streams, manifest = containers.unpack(encoded)
  numbers = np.random.default_rng(0).integers(0, 99, (48, WIDTHS[1]), np.int32)
  tree = {'subspaces.1': {'basis': numbers}}
  leaf = subspaces.Basis.near(np.eye(96)[:, :72], 2.0**-11, keeps_basis=False)
  for name in ('subspaces.1', 'a'):
    with pytest.raises(ValueError, match='a basis needs'):
      rotbits_jax.encode({name: {'basis': leaf}})
  constant = {'subspaces.1': {'basis': structured.Constant.like(numbers, 1)}}
  for given, base in ((constant, None), (tree, tree)):
    own, found = containers.unpack(rotbits_jax.encode(given, base=base))
    (record,) = found['records']
    if base is not None:  # the basis needs itself
      (leaf,) = record['leaves']
      assert leaf.pop('base')
      leaf['product'] = {'kind': 'shortcut', 'segments': [1, 1]}
      data = containers.pack(own, containers.to_json(found))
      with pytest.raises(file.ContainerError, match='a basis needs a config'):
        rotbits_jax.decode(data)
    others = [x for x in manifest['records'] if x['name'] != record['name']]
    changed = containers.to_json(manifest | {'records': [record, *others]})
    with pytest.raises(file.ContainerError, match='it is not the basis of a segment'):
      rotbits_jax.decode(containers.pack(streams | own, changed), base=dense)


def test_a_basis_must_have_as_many_rows_as_it_says():
  basis = random_models.orthogonal(np.random.default_rng(0), 11)[:, :8]
  leaf = subspaces.Basis.near(basis, 2.0**-11, keeps_basis=False)
  settings, arrays = leaf.stored()
  wrong = arrays | {'mask': np.full(2, 255, np.uint8)}
  with pytest.raises(ValueError, match='must have 8 rows'):
    subspaces.Basis.from_stored(settings, wrong)
  greater = dataclasses.replace(leaf, numbers=leaf.numbers * 100)
  with pytest.raises(ValueError, match='too large'):
    greater.materialize()

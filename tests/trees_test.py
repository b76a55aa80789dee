"""PyTrees of any structure, dtype and shape come back bit for bit."""

import dataclasses
import pathlib

from flax import nnx
from flax.core import frozen_dict
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from fuzz import containers
import rotbits_jax
from rotbits_jax import structured
from rotbits_jax.file import memory
from rotbits_jax.structured import difference
from tests import cases

PARAMS = {'kernel': jnp.arange(12.0).reshape(3, 4), 'bias': jnp.zeros(4, jnp.bfloat16)}
FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
DTYPES = (
  *FLOATS,
  *('bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64'),
  *('float8_e4m3fn', 'float8_e5m2', 'float4_e2m1fn', 'int4', 'uint4', 'int2'),
)
SHAPE = (96, 80)


def special_floats(dtype):
  """Arrays of one dtype: values at the edges, alone and among others."""
  rng, dtype = np.random.default_rng(0), np.dtype(dtype)
  unsigned = np.dtype(f'u{dtype.itemsize}')
  normal = rng.normal(size=SHAPE).astype(dtype)
  mixed = normal.copy()
  mixed[3, 4], mixed[5], mixed[:, 7] = np.nan, np.inf, -np.inf
  mixed.view(unsigned)[9, 9] |= 1
  zeros = normal.copy()
  zeros[rng.random(SHAPE) < 0.5] = 0
  zeros[rng.random(SHAPE) < 0.3] *= -1
  small = rng.integers(0, 50, SHAPE).astype(unsigned)
  sign = unsigned.type(1 << (8 * dtype.itemsize - 1))
  greatest = np.full(SHAPE, jnp.finfo(dtype).max, dtype)
  return {
    'any bits': np.frombuffer(rng.bytes(normal.nbytes), dtype).reshape(SHAPE),
    'infinite': np.full(SHAPE, -np.inf, dtype),
    'mixed': mixed,
    'NaN': np.full(SHAPE, np.nan, dtype),
    'zeros': np.zeros(SHAPE, dtype),
    'negative zeros': -np.zeros(SHAPE, dtype),
    'zeros among others': zeros,
    'subnormal': small.view(dtype),
    'negative subnormal': (small | sign).view(dtype),
    'greatest': greatest * np.sign(normal),
  }


def arrays_of(shape):
  """Returns an array of this shape of every dtype."""
  numbers = np.arange(np.prod(shape)).reshape(shape) % 2
  return {jnp.dtype(x).name: numbers.astype(jnp.dtype(x)).T for x in DTYPES}


TREES = {
  'list': lambda: [PARAMS, PARAMS['bias']],
  'tuple': lambda: ((jnp.ones(3),), {'x': ()}, PARAMS),
  'optax': lambda: optax.adam(1e-3).init(PARAMS),
  'frozen_dict': lambda: frozen_dict.freeze({'params': PARAMS}),
  'nnx': lambda: nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0))),
  'numpy_scalar': lambda: {'step': np.int32(3)},
  'structured': lambda: {'x': structured.Constant(np.float16(1), (3,))},
  'empty dicts': lambda: {'a': {'b': {}, 'c': np.ones(3), 'd': {'e': {}}}, 'f': {}},
  'nothing': dict,
  'array': lambda: np.ones((2, 3)),
  'leaf': lambda: structured.Constant(np.float16(1), (3,)),
  'slashes': lambda: ({'a/b': {'c%2F': np.ones(2)}, 'a': {'b/c': np.zeros(1)}},),
  'many small arrays': lambda: (
    [arrays_of((i % 9, 2)) for i in range(13)] + [np.ones(99)] * 9,
    [np.zeros((), jnp.bfloat16), np.zeros((4, 0), np.int8)] * 140,
  ),
  'wide integers': lambda: {'x': np.arange(5) << 40, 'y': np.arange(5.0) + 2**-40},
  **{
    f'special {np.dtype(dtype)}': lambda dtype=dtype: {'x': special_floats(dtype)}
    for dtype in FLOATS
  },
  **{
    f'dtypes {shape}': lambda shape=shape: {'x': arrays_of(shape)}
    for shape in ((), (0,), (3, 0, 2), (1, 1), (7, 300))
  },
  **{
    f'shape {len(shape)}': lambda shape=shape: {
      'a': {'b': np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}
    }
    for shape in ((1,) * 9, (2,) * 13, (1,) * 32, (1 << 31, 0), (0, 1 << 40))
  },
}


@pytest.mark.parametrize('name', TREES)
def test_a_tree_comes_back(name):
  tree = TREES[name]()
  data = rotbits_jax.encode(tree)
  decoded = rotbits_jax.decode(data, like=tree)
  assert structured.same_bits(decoded, tree)
  assert jax.tree.structure(decoded) == jax.tree.structure(tree)
  assert rotbits_jax.encode(tree) == data
  if isinstance(tree, dict):
    assert structured.same_bits(rotbits_jax.load(data), tree)
    records = {key: rotbits_jax.read_record(data, key)[key] for key in tree}
    assert structured.same_bits(records, tree)


class Network(nnx.Module):
  def __init__(self, rngs):
    self.linear, self.dropout = nnx.Linear(3, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)


def test_numbers_and_typed_keys_come_back():
  keys = jax.random.key(7), jax.random.split(jax.random.key(0, impl='rbg'), 3)
  tree = {'keys': keys, 'numbers': [3, 2.5, True]}
  data = rotbits_jax.encode(tree)
  decoded = rotbits_jax.decode(data, like=tree)
  assert repr(decoded) == repr(tree)
  assert list(rotbits_jax.decode(data)['keys']['1']) == ['rbg']
  state = nnx.state(Network(nnx.Rngs(0)))
  again = rotbits_jax.decode(rotbits_jax.encode(state), like=state)
  assert jax.tree.structure(again) == jax.tree.structure(state)
  assert list(map(str, jax.tree.leaves(again))) == list(
    map(str, jax.tree.leaves(state))
  )
  with pytest.raises(ValueError, match='only one of the file and'):
    rotbits_jax.decode(data, like=tree | {'keys': keys[:1] * 2})


def test_keys_with_slashes_are_those_of_the_dicts():
  tree = {'mlp/~/linear_0': {'w': np.ones(2)}, '100%': np.zeros(1)}
  assert structured.same_bits(rotbits_jax.decode(rotbits_jax.encode(tree)), tree)


def test_keys_keep_their_order():
  tree = {'b': [np.full(2, i) for i in range(12)], 'a': {'z': np.ones(1), 'y': {}}}
  found = rotbits_jax.decode(rotbits_jax.encode(tree))
  assert [*found['b']] == [str(i) for i in range(12)]
  assert [*found] == ['b', 'a']


def test_paths_bytes_and_open_files_are_read_alike(tmp_path):
  path, tree = tmp_path / 'x', TREES['wide integers']()
  rotbits_jax.encode_to_file(tree, path)
  with path.open('rb') as file:
    for source in (path, str(path), path.read_bytes(), file):
      assert structured.same_bits(rotbits_jax.decode(source), tree)
      assert rotbits_jax.inspect(source).file_bytes == path.stat().st_size


def test_structured_leaves_come_back_or_are_refused(subtests):
  for name, leaf in cases.leaves().items():
    with subtests.test(name=name):
      check_structured(name, leaf)


def check_structured(name, leaf):
  if name in ('basis', 'subspace'):
    with pytest.raises(ValueError, match='a basis needs'):
      rotbits_jax.encode({'a': {'b': leaf}})
    return
  decoded = rotbits_jax.decode(rotbits_jax.encode({'a': {'b': leaf}}))
  if leaf.is_in_files:
    leaf = np.asarray(leaf.materialize())
  else:
    with pytest.raises(ValueError, match=r'^a/b: it cannot be stored: '):
      rotbits_jax.encode({'a': {'b': type(leaf).stack([leaf, leaf])}})
  assert structured.same_bits(decoded, {'a': {'b': leaf}})


def test_a_leaf_without_the_array_that_it_needs_is_named():
  tied = cases.leaves()['tied']
  data = rotbits_jax.encode({'embed': {'tokens': tied}})
  leaves = structured.flatten(rotbits_jax.decode(data))
  with pytest.raises(ValueError, match='embed/tokens: it needs head/kernel'):
    structured.expand(leaves)
  reader = rotbits_jax.file.Reader(data)
  with pytest.raises(rotbits_jax.ContainerError, match='embed/tokens: it needs head/'):
    dict(reader.each(as_arrays=True))


@pytest.mark.parametrize(
  ('name', 'shape', 'words'),
  [
    ('constant', [1 << 31], 'tail: Expected'),
    ('gram', [6, 1 << 31], 'columns: Expected'),
    ('trapezoidal_rows', [10, 1 << 31], 'differs from the manifest'),
    ('tied', [1 << 31, 3], 'tokens: Expected'),
  ],
)
def test_a_huge_shape_of_few_numbers_is_refused(name, shape, words, monkeypatch):
  monkeypatch.setattr(memory, '_available', lambda: None)
  streams, manifest = containers.unpack(
    rotbits_jax.encode({'a': {'b': cases.leaves()[name]}})
  )
  (entry,) = manifest['records'][0]['leaves']
  entry['shape'] = shape
  settings = entry.get('settings', {})
  lengths = {'columns': shape[-1], 'tokens': shape[0], 'tail': shape}
  settings |= {key: lengths[key] for key in lengths if key in settings}
  data = containers.pack(streams, containers.to_json(manifest))
  assert rotbits_jax.inspect(data).file_bytes == len(data)
  for read in (rotbits_jax.decode, rotbits_jax.load, rotbits_jax.verify):
    with pytest.raises(rotbits_jax.ContainerError, match=words):
      read(data)


@pytest.mark.parametrize('dtype', ['i8', 'f2', 'f4', 'u4'])
def test_arrays_in_the_other_byte_order(dtype):
  old, new = ({'x': np.arange(i, i + 99).astype(dtype)} for i in range(2))
  swapped = [{'x': y['x'].astype(f'>{dtype}')} for y in (old, new)]
  assert rotbits_jax.encode(swapped[1]) == rotbits_jax.encode(new)
  data = rotbits_jax.delta(*swapped[::-1])
  for base in (swapped[0], old):
    assert structured.same_bits(rotbits_jax.apply(data, base), new)


def test_a_model_in_the_other_byte_order():
  model = rotbits_jax.load_checkpoint(rotbits_jax.checkpoints.example()).model
  params = jax.tree.map(lambda x: np.asarray(x).astype('>f2'), model.params)
  swapped = dataclasses.replace(model, params=params)
  expected = rotbits_jax.encode(model, preset='exact')
  assert rotbits_jax.encode(swapped, preset='exact') == expected


REFUSED = (
  ({'a': {'b': 'text'}}, 'a/b: expected an array'),
  ({'a': [2**70]}, 'a/0: .* numpy.asarray'),
  ({'a': np.array(['x'])}, 'a: .* <U1.*frombuffer'),
  ({'a': np.zeros(2, np.complex64)}, 'a.*complex64'),
  ({'a': np.ma.array([1.0, 2.0], mask=[0, 1])}, 'a: .* MaskedArray'),
  ({'': np.zeros(2)}, 'not empty'),
  (pathlib.Path('MODEL'), 'MODEL: there is no such file'),
  ({'manifest': np.zeros(2)}, 'manifest: the file has another entry'),
  ({'__metadata__': np.zeros(2)}, '__metadata__: the file has another entry'),
  ({'a': {'b': np.zeros((1,) * 33)}}, 'a/b: .* length <= 32'),
  ({'a': {'b\ud800': np.zeros(2)}}, 'a/b.*: .*surrogates'),
  ({'b': structured.Constant(np.float32(1), (1 << 31,))}, 'b: it cannot be stored'),
  ({'b': difference.Difference(lengths=(9, 3), name='float16')}, 'b: it cannot be'),
)


def test_what_cannot_be_stored_is_named(subtests):
  for tree, words in REFUSED:
    with subtests.test(words=words), pytest.raises(ValueError, match=words):
      rotbits_jax.encode(tree)

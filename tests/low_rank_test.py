"""Low-rank pairs: leaves, the gauge between two factors, and checkpoints of them."""

import functools
import json
import pathlib
import tempfile
import types

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference_forward
import transform_checks
import weights_files

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.passes import rounding
from rotbits_jax.symmetries import low_rank

DENSE = pathlib.Path(__file__).parent / 'testdata' / 'llama-tiny-dense'
LLAMA = {
  'model_type': 'llama',
  'hidden_size': 12,
  'intermediate_size': 20,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'num_key_value_heads': 1,
  'vocab_size': 31,
  'max_position_embeddings': 32,
  'rope_theta': 50.0,
  'rms_norm_eps': 1e-3,
}
OPT = {
  'model_type': 'opt',
  'hidden_size': 12,
  'ffn_dim': 20,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'vocab_size': 31,
  'max_position_embeddings': 20,
  'word_embed_proj_dim': 12,
}
LOW_RANK = (
  ('attention', 'query'),
  ('attention', 'out'),
  ('mlp', 'gate'),
  ('mlp', 'down'),
)
# Naming scheme, config, the factored linear layer, and the names of its factors.
NAMINGS = (
  ('svd_llm', LLAMA, 'mlp.up_proj', 'mlp.up_u_proj.weight', 'mlp.up_v_proj.weight'),
  ('svd_llm_with_biases', OPT, 'fc1', 'fc1_u_proj.weight', 'fc1_v_proj.weight'),
  ('asvd', OPT, 'fc2', 'fc2.ALinear.weight', 'fc2.BLinear.weight'),
  ('linears', LLAMA, 'mlp.up_proj', 'mlp.up_proj.U.weight', 'mlp.up_proj.V.weight'),
  ('factors', OPT, 'fc1', 'fc1.U', 'fc1.V'),
)

_fix_pair = jax.jit(low_rank.fix_pair)
_logits = jax.jit(models.logits)


def _pair(m, n, rank, dtype=np.float16, seed=0):
  rng = np.random.default_rng(seed)
  u, v = rng.standard_normal((m, rank)), rng.standard_normal((rank, n))
  return structured.LowRank(u.astype(dtype), v.astype(dtype))


def _product(leaf):
  """Returns the product of a `LowRank` in float64."""
  return np.float64(leaf.u) @ np.float64(leaf.v)


def _reduced(m, n, rank, seed=0):
  pair = _pair(m, n, rank, np.float32, seed)
  fixed = jax.device_get(_fix_pair(pair.u, pair.v))
  return fixed.astype(np.float16)


def _definition(leaf):
  """Returns the matrix of a `ReducedLowRank` in float64."""
  below, other = np.float64(leaf.below), np.float64(leaf.other)
  square = np.eye(leaf.rank) - below.T @ below / 4
  matrix = np.concatenate([below, square]) @ other
  matrix = matrix.T if leaf.transposed else matrix
  return matrix * _lines(leaf)


def _lines(leaf):
  """Returns the factors of the lines of a `ReducedLowRank`, as a matrix in float64."""
  rows, columns = (
    np.exp2(x // 4) * (1 + x % 4 / 4)
    for x in map(np.float64, (leaf.basis_exponents, leaf.other_exponents))
  )
  return np.outer(columns, rows) if leaf.transposed else np.outer(rows, columns)


def _relative(array, expected):
  return np.linalg.norm(np.float64(array) - expected) / np.linalg.norm(expected)


def _with_exponents(*exponents):
  """Returns the arrays of a reduced leaf of size 7 with factors of lines."""
  names = ('basis_exponents', 'other_exponents')
  arrays = {'below': np.zeros((4, 3)), 'other': np.zeros((3, 9))}
  return arrays | dict(zip(names, exponents, strict=False))


# Unstacked leaves of one shape by a seed, with equal or with different ranks.
LEAVES = {
  'low_rank': lambda seed: _pair(7, 9, 3, seed=seed),
  'low_rank_of_ranks': lambda seed: _pair(7, 9, 2 + seed, seed=seed),
  'reduced': lambda seed: _reduced(7, 9, 3, seed=seed),
  'reduced_transposed': lambda seed: _reduced(9, 7, 3, seed=seed),
  'reduced_of_ranks': lambda seed: _reduced(7, 9, (2, 7, 3)[seed], seed=seed),
  'reduced_transposed_of_ranks': lambda seed: _reduced(
    9, 7, (4, 1, 7)[seed], seed=seed
  ),
}


class LeavesTest(absltest.TestCase):
  def test_stands_for_the_product_of_its_definition(self):
    for name in LEAVES:
      with self.subTest(name=name):
        leaf = LEAVES[name](1).astype(np.float32)
        expected = _product(leaf) if 'low_rank' in name else _definition(leaf)
        self.assertEqual(leaf.shape, expected.shape)
        np.testing.assert_allclose(leaf.materialize(), expected, atol=1e-5)
        transposed = leaf.pair().T
        np.testing.assert_allclose(transposed.materialize(), expected.T, atol=1e-5)
        x = np.random.default_rng(0).standard_normal((2, 3, leaf.shape[0]))
        np.testing.assert_allclose(leaf.apply(np.float32(x)), x @ expected, atol=1e-4)

  def test_a_stack_of_leaves_of_any_rank_is_applied_and_comes_apart(self):
    for name in LEAVES:
      with self.subTest(name=name):
        leaves = [LEAVES[name](seed) for seed in range(3)]
        stack = type(leaves[0]).stack(leaves)
        self.assertEqual(stack.shape, (3, *leaves[0].shape))
        x = np.random.default_rng(0).standard_normal((4, leaves[0].shape[0]))
        x = x.astype(np.float32)
        wide = stack.astype(np.float32)
        applied = jax.jit(jax.vmap(lambda leaf, x=x: leaf.apply(x)))(wide)
        matrices = jax.jit(jax.vmap(lambda leaf: leaf.materialize()))(wide)
        for i, leaf in enumerate(leaves):
          chex.assert_trees_all_equal(stack.layer(i), leaf)
          expected = leaf.astype(np.float32).materialize()
          np.testing.assert_allclose(matrices[i], expected, atol=1e-5)
          np.testing.assert_allclose(applied[i], x @ np.asarray(expected), atol=1e-4)

  def test_padding_that_has_moved_is_refused(self):
    for name in ('low_rank_of_ranks', 'reduced_of_ranks'):
      with self.subTest(name=name):
        leaves = [LEAVES[name](seed) for seed in range(3)]
        stack = jax.tree.map(lambda x: x + 1, type(leaves[0]).stack(leaves))
        with self.assertRaisesRegex(ValueError, 'not zero where they are padded'):
          stack.check_layer(int(np.argmin(stack.ranks)))

  def test_reduced_leaf_stores_the_square_of_the_rank_fewer_and_exponents(self):
    for m, n, r in ((7, 9, 3), (9, 7, 3), (7, 9, 7), (7, 9, 1)):
      self.assertEqual(
        structured.count_elements(_reduced(m, n, r)), r * (m + n) - r * r + m + n
      )

  def test_plain_pair_has_the_same_product(self):
    leaf = _reduced(9, 7, 3).astype(np.float32)
    plain = leaf.pair()
    np.testing.assert_allclose(_product(plain), _definition(leaf), atol=1e-5)

  def test_arrays_of_wrong_shapes_are_refused(self):
    for kind, arrays in (
      ('low_rank', {'u': np.zeros((7, 3)), 'v': np.zeros((2, 9))}),
      ('low_rank', {'u': np.zeros(7), 'v': np.zeros((7, 9))}),
      ('reduced_low_rank', {'below': np.zeros((4, 3)), 'other': np.zeros((4, 9))}),
      ('reduced_low_rank', {'below': np.zeros((3, 3)), 'other': np.zeros((3, 9))}),
      ('reduced_low_rank', {'below': np.zeros((4, 3)), 'other': np.zeros((3, 6))}),
      ('reduced_low_rank', {'below': np.zeros(3), 'other': np.zeros((3, 6))}),
      ('reduced_low_rank', _with_exponents(np.zeros(7, np.int8))),
      ('reduced_low_rank', _with_exponents(np.zeros(6, np.int8), np.zeros(9, np.int8))),
      ('reduced_low_rank', _with_exponents(np.zeros(7), np.zeros(9))),
    ):
      with self.subTest(kind=kind, arrays=arrays):
        settings = {}
        if kind == 'reduced_low_rank':
          settings |= {'transposed': False, 'size': 7}
        with self.assertRaisesRegex(ValueError, r'\(.*\)'):
          structured.TYPES[kind].from_stored(settings, arrays)


class FixPairTest(absltest.TestCase):
  def test_product_is_kept_and_no_number_is_large(self):
    for m, n, rank in ((24, 16, 8), (16, 24, 8), (16, 16, 16), (16, 24, 1)):
      with self.subTest(m=m, n=n, rank=rank):
        pair = _pair(m, n, rank, np.float32)
        fixed = _fix_pair(pair.u, pair.v)
        self.assertLess(_relative(_definition(fixed), _product(pair)), 2e-6)
        self.assertLessEqual(np.linalg.norm(fixed.below, 2), 2 + 1e-5)
        self.assertEqual(fixed.shape, (m, n))
        self.assertEqual(fixed.transposed, m > n)

  def test_factors_of_any_rank_and_scale_are_kept(self):
    pair = _pair(24, 16, 8, np.float32)
    u, v = np.array(pair.u), np.array(pair.v)
    u[:, 3] = u[:, 5] - u[:, 6]  # so that the rank is 6
    v[7] = 0
    scales = np.float32(10.0) ** np.arange(-4, 4)
    u, v = u * scales, v / scales[:, None]
    fixed = _fix_pair(u, v)
    expected = np.float64(u) @ np.float64(v)
    self.assertLess(_relative(_definition(fixed), expected), 1e-5)

  def test_zeros_are_kept(self):
    fixed = _fix_pair(np.zeros((24, 8), np.float32), np.ones((8, 16), np.float32))
    np.testing.assert_array_equal(_definition(fixed), np.zeros((24, 16)))


def _fix_pairs(params, **options):
  """Applies the transform to leaves outside the layers, by path, without rounding."""
  dtypes = {path: np.dtype(leaf.dtype) for path, leaf in params.items()}
  source = types.SimpleNamespace(config=None)
  context = passes.Context(source, dtypes, np.dtype(np.float32))  # of most numbers
  fix = passes.remove_low_rank_gauge(**options)
  return fix.outer(context, (), dict(params))


class FixPairsTest(parameterized.TestCase):
  @parameterized.parameters(np.float16, ml_dtypes.bfloat16)
  def test_rounding_does_as_much_harm_as_to_the_plain_pair(self, dtype):
    tree = {'a': _pair(64, 48, 24, dtype), 'b/c': _pair(48, 64, 24, dtype, 1)}
    fixed, notes = _fix_pairs(tree)
    unit = float(jnp.finfo(dtype).eps) / 2
    for note, pair, leaf in (
      (notes[0], tree['a'], fixed['a']),
      (notes[1], tree['b/c'], fixed['b/c']),
    ):
      self.assertEqual(leaf.type_name, 'reduced_low_rank')
      self.assertEqual(leaf.names, 'asvd')
      lines, rounded = _lines(leaf), _definition(leaf.astype(dtype))
      self.assertLess(_relative(rounded, _product(pair)), 0.8 * unit)
      error = _relative(rounded / lines, _product(pair) / lines)
      np.testing.assert_allclose(note['error'], error, rtol=0.02)
      np.testing.assert_allclose(note['plain_error'], 0.58 * unit, rtol=0.1)
      self.assertEqual(note['elements'], 24 * (64 + 48 - 24) + 64 + 48)
      self.assertEqual(note['rank'], 24)
      self.assertEqual(tuple(note['shape']), pair.shape)
    self.assertEqual([note['tensor'] for note in notes], ['a', 'b/c'])

  def test_small_rows_get_small_errors(self):
    # As those of U have whose inputs are large.
    sizes = np.float32(2.0) ** np.linspace(-6, 6, 64)
    for shape in ((64, 48), (48, 64)):
      pair = _pair(*shape, 24, np.float32)
      u = (pair.u * sizes[: len(pair.u), None]).astype(ml_dtypes.bfloat16)
      pair = pair.replace(u=u, v=pair.v.astype(ml_dtypes.bfloat16))
      fixed, _ = _fix_pairs({'a': pair})
      leaf, _ = rounding.round_leaf(fixed['a'], pair.dtype, -7, uniform=False)
      q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((24, 24)))
      rotated = pair.replace(
        u=(np.float32(u) @ q).astype(pair.dtype),
        v=(q.T @ np.float32(pair.v)).astype(pair.dtype),
      )
      whole = _product(pair) / sizes[: shape[0], None]
      error, noise = (
        _relative(x / sizes[: shape[0], None], whole)
        for x in (_definition(leaf), _product(rotated))
      )
      self.assertLess(error, 2**0.5 * noise)

  def test_float32_is_kept_to_what_float32_arithmetic_can_tell(self):
    pair = _pair(24, 16, 8, np.float32)
    fixed, _ = _fix_pairs({'a': pair})
    self.assertEqual(fixed['a'].type_name, 'reduced_low_rank')
    self.assertLess(_relative(_definition(fixed['a']), _product(pair)), 2e-6)

  def test_a_pair_that_rounding_would_harm_more_than_the_tolerance_stays(self):
    pair = _pair(24, 16, 8)
    fixed, notes = _fix_pairs({'a': pair}, tolerance=0)
    self.assertIs(fixed['a'], pair)
    self.assertEqual(notes[0]['form'], 'low_rank')
    self.assertEqual(notes[0]['elements'], 8 * 40)

  def test_what_overflows_or_is_not_finite_or_no_pair_stays(self):
    huge = structured.LowRank(
      np.full((8, 2), 4e4, np.float16), np.full((2, 8), 4e4, np.float16)
    )
    broken = _pair(24, 16, 8)
    broken = broken.replace(v=np.where(broken.v > 2, np.nan, broken.v))
    tree = {
      'array': np.ones((4, 4), np.float16),
      'broken': broken,
      'huge': huge,
      'wide': _pair(4, 8, 6),  # r > m
      'triangle': structured.TrapezoidalRows(None, np.tril(np.ones((4, 4)))),
    }
    fixed, notes = _fix_pairs(tree)
    for name, leaf in tree.items():
      self.assertIs(fixed[name], leaf)
    self.assertEqual([note['tensor'] for note in notes], ['broken', 'huge'])
    self.assertIn('not finite', notes[0]['obstacle'])


@functools.cache
def _compressed():
  """Makes the dense Llama with kernels of half the rank, and one of lower rank."""
  model = checkpoints.load_checkpoint(DENSE).model

  def truncated(kernel, rank):
    u, values, vt = np.linalg.svd(np.float64(kernel), full_matrices=False)
    roots = np.sqrt(values[:rank])
    u, v = u[:, :rank] * roots, roots[:, None] * vt[:rank]
    return structured.LowRank(u.astype(kernel.dtype), v.astype(kernel.dtype))

  layers = []
  for i, layer in enumerate(model.layers()):
    for part, name in LOW_RANK:
      rank = 40 if (i, name) == (2, 'down') else 64
      kernel = layer[part][name]['kernel']
      layer[part][name] = {'kernel': truncated(kernel, rank)}
    layers.append(layer)
  return models.from_layers(model.config, model.outer(), layers)


@functools.cache
def _rewritten():
  """Returns the model of `_compressed` with its pairs reduced, and the saving."""
  chain = (passes.remove_low_rank_gauge(),)
  model, (saving,) = passes.run_chain(chain, _compressed())
  return model, saving


class RemoveLowRankGaugeTest(parameterized.TestCase):
  def test_stores_the_squares_of_the_ranks_fewer_and_keeps_the_products(
    self,
  ):
    model = _compressed()
    self.assertEqual(model.stacks, (range(3),))  # different ranks do not split it
    rewritten, saving = _rewritten()
    self.assertLen(saving.notes, 3 * len(LOW_RANK))
    squares = sum(n['rank'] ** 2 - sum(n['shape']) for n in saving.notes)
    self.assertEqual(saving.elements, squares)
    self.assertEqual(rewritten.stacks, (range(3),))
    leaf = rewritten.params['layers.0:3']['mlp']['down']['kernel']
    self.assertEqual((leaf.dtype, leaf.ranks), (np.float16, (64, 64, 40)))
    rng = np.random.default_rng(0)
    for before, after in zip(model.layers(), rewritten.layers(), strict=True):
      for part, name in LOW_RANK:
        pair, leaf = (x[part][name]['kernel'] for x in (before, after))
        q, _ = np.linalg.qr(rng.standard_normal((pair.rank, pair.rank)))
        u, v = np.float64(pair.u) @ q, q.T @ np.float64(pair.v)
        noise = _relative(
          _product(structured.LowRank(np.float16(u), np.float16(v))), u @ v
        )
        self.assertLess(_relative(_definition(leaf), u @ v), 1.2 * noise)

  @pytest.mark.slow
  def test_free_keeps_pairs_and_stores_fewer_numbers(self):
    decoded = rotbits_jax.decode(rotbits_jax.encode(_compressed(), preset='free'))
    layer = next(decoded.layers())
    for part, name in LOW_RANK:
      kernel = layer[part][name]['kernel']
      self.assertIsInstance(kernel, structured.ReducedLowRank, name)
    tokens = np.load(DENSE / 'ref_logits.npz')['input_ids'][:, :12]
    expected = _logits(_compressed(), tokens)
    self.assertLess(np.abs(_logits(decoded, tokens) - expected).mean(), 0.01)

  def test_a_model_without_pairs_stays(self):
    model = checkpoints.load_checkpoint(DENSE).model
    rewritten, notes = transform_checks.apply(passes.remove_low_rank_gauge(), model)
    transform_checks.assert_same_bits(rewritten, model)
    self.assertEmpty(notes)


def _random_tensors(config_json, seed=0):
  """Returns a dense config, and random tensors of its checkpoint by name."""
  config = checkpoints.parse_config(config_json)
  rng = np.random.default_rng(seed)
  fill = lambda shape: np.float32(rng.standard_normal(shape) / np.sqrt(shape[0]))
  is_shape = lambda x: isinstance(x, tuple)
  layers = [
    jax.tree.map(fill, models.layer_shapes(config, i), is_leaf=is_shape)
    for i in range(config.num_layers)
  ]
  outer = jax.tree.map(fill, models.outer_shapes(config), is_leaf=is_shape)
  return config, checkpoints.to_tensors(models.from_layers(config, outer, layers))


def _factorize(tensors, linear, left, right):
  """Replaces a linear layer's weights by factors; returns products and factors."""
  products, stored = dict(tensors), dict(tensors)
  for name, weight in tensors.items():
    if name.endswith(f'.{linear}.weight'):
      prefix = name.removesuffix(f'{linear}.weight')
      rank = 5 - ('layers.1' in prefix)
      rng = np.random.default_rng(rank)
      a = np.float32(rng.standard_normal((weight.shape[0], rank)))
      b = np.float32(rng.standard_normal((rank, weight.shape[1])) / rank)
      del stored[name]
      stored |= {prefix + left: a, prefix + right: b}
      products[name] = np.float64(a) @ np.float64(b)
      bias = name.removesuffix('weight') + 'bias'
      if bias in stored and left.endswith('.weight'):
        stored[prefix + left.removesuffix('weight') + 'bias'] = stored.pop(bias)
  return products, stored


class FactorCheckpointsTest(parameterized.TestCase):
  @parameterized.named_parameters(*NAMINGS)
  def test_factors_become_a_leaf_and_go_back_by_the_same_names(
    self, config_json, linear, left, right
  ):
    config, tensors = _random_tensors(config_json)
    products, stored = _factorize(tensors, linear, left, right)
    model = checkpoints.from_tensors(stored, config)
    pairs = [
      x
      for x in jax.tree.leaves(model.params, is_leaf=structured.is_structured)
      if structured.is_structured(x)
    ]
    self.assertLen(pairs, 1)
    self.assertEqual(pairs[0].ranks, (5, 4))
    tokens = np.arange(6)
    np.testing.assert_allclose(
      _logits(model, tokens[None])[0],
      reference_forward.forward(products, config_json, tokens),
      atol=2e-3,
    )
    chex.assert_trees_all_equal(checkpoints.to_tensors(model), stored)

  def test_reduced_pairs_go_through_a_file_and_are_saved_as_factors(self):
    config, tensors = _random_tensors(OPT)
    products, stored = _factorize(
      tensors, 'fc1', 'fc1.ALinear.weight', 'fc1.BLinear.weight'
    )
    model = checkpoints.from_tensors(stored, config)
    model, _ = transform_checks.apply(passes.remove_low_rank_gauge(), model)
    decoded = rotbits_jax.decode(rotbits_jax.encode(model, preset='exact'))
    chex.assert_trees_all_equal(decoded.params, model.params)
    np.testing.assert_allclose(
      _logits(decoded, np.arange(6)[None])[0],
      reference_forward.forward(products, OPT, np.arange(6)),
      atol=2e-3,
    )
    saved = checkpoints.to_tensors(decoded)
    chex.assert_trees_all_equal_shapes_and_dtypes(saved, stored)
    for name in stored:
      if name.endswith('ALinear.weight'):
        other = name.replace('ALinear', 'BLinear')
        product = np.float64(stored[name]) @ np.float64(stored[other])
        self.assertLess(
          _relative(np.float64(saved[name]) @ np.float64(saved[other]), product), 4e-6
        )
      elif 'BLinear' not in name:
        np.testing.assert_array_equal(saved[name], stored[name])

  def test_a_directory_is_loaded_encoded_and_saved_again(self):
    config, tensors = _random_tensors(LLAMA)
    _, stored = _factorize(
      tensors, 'mlp.down_proj', 'mlp.down_u_proj.weight', 'mlp.down_v_proj.weight'
    )
    scratch = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    directory = scratch / 'model'
    directory.mkdir()
    (directory / 'config.json').write_text(json.dumps(LLAMA))
    weights_files.write_safetensors(directory / 'model.safetensors', stored)
    checkpoint = rotbits_jax.load_checkpoint(directory)
    self.assertEqual(checkpoint.model.config, config)
    data = rotbits_jax.encode(checkpoint.model, preset='exact', files=checkpoint.files)
    again = scratch / 'again'
    rotbits_jax.save_checkpoint(rotbits_jax.decode_checkpoint(data), again)
    saved = weights_files.read_safetensors(again / 'model.safetensors')
    chex.assert_trees_all_equal(saved, stored)

  def test_factors_that_do_not_fit_are_refused_by_name(self):
    config, tensors = _random_tensors(OPT)
    _, stored = _factorize(tensors, 'fc1', 'fc1.U', 'fc1.V')
    left = 'model.decoder.layers.1.fc1.U'
    for change, message in (
      (lambda x: x[:, 1:], r'layers\.1\.fc1\.U and .*fc1\.V must be .*\(20, 3\)'),
      (lambda x: x[1:], r'layers\.1\.fc1\.U: expected shape \(20, 4\)'),
      (lambda x: x.astype(np.float16), r'fc1\.V must be float16 like .*float32'),
      (lambda x: x.ravel(), r'must be \[out, r\] and \[r, in\]'),
    ):
      with self.assertRaisesRegex(checkpoints.CheckpointError, message):
        checkpoints.from_tensors(stored | {left: change(stored[left])}, config)
    del stored[left]
    with self.assertRaisesRegex(checkpoints.CheckpointError, r'missing: .*fc1\.weight'):
      checkpoints.from_tensors(stored, config)

  def test_an_adapter_is_not_taken_for_a_weight(self):
    config, tensors = _random_tensors(OPT)
    _, stored = _factorize(tensors, 'fc1', 'fc1.lora_B.weight', 'fc1.lora_A.weight')
    with self.assertRaisesRegex(checkpoints.CheckpointError, r'unknown: .*lora_A'):
      checkpoints.from_tensors(stored, config)


if __name__ == '__main__':
  absltest.main()

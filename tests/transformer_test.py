"""The forward passes agree with Microsoft's, and with a second one in NumPy."""

import pathlib
from unittest import mock

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference_forward

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
FIXTURES = sorted(path.parent.name for path in TESTDATA.glob('*/ref_logits.npz'))

OPT = {
  'model_type': 'opt',
  'hidden_size': 24,
  'ffn_dim': 36,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'vocab_size': 31,
  'max_position_embeddings': 20,
  'word_embed_proj_dim': 24,
}
LLAMA = {
  'model_type': 'llama',
  'hidden_size': 24,
  'intermediate_size': 36,
  'num_hidden_layers': 3,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'vocab_size': 31,
  'max_position_embeddings': 32,
  'rms_norm_eps': 1e-3,
  'rope_theta': 50.0,
}
PHI = {
  'model_type': 'phi',
  'hidden_size': 32,
  'intermediate_size': 36,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'vocab_size': 31,
  'partial_rotary_factor': 0.5,
  'rope_theta': 100.0,
}
PHI3 = LLAMA | {'model_type': 'phi3', 'sliding_window': 5, 'hidden_size': 48}

# Compilation takes half the time; the slower program does not matter here.
logits_of = jax.jit(
  models.logits, compiler_options={'xla_backend_optimization_level': 0}
)

# Name, config.json, and the widths of the segments (None if dense).
CASES = (
  ('opt_dense_tied', OPT, None),
  ('opt_sliced', OPT, (20, 20, 20, 20, 20, 20, 24)),
  ('llama_dense_tied', LLAMA | {'tie_word_embeddings': True}, None),
  ('llama_dense_biases', LLAMA | {'attention_bias': True, 'mlp_bias': True}, None),
  ('llama_sliced', LLAMA, (20,) * 7),
  ('llama_mixed_widths', LLAMA, (22, 22, 12, 24, 12, 9, 7)),
  ('phi_dense', PHI, None),
  ('phi_sliced', PHI, (24, 24, 20, 32)),
  ('phi3_dense', PHI3, None),
  ('phi3_sliced', PHI3, (36, 36, 36, 36, 36, 36, 48)),
)


def slicing_json(config, widths):
  numbered = lambda values: {str(i): width for i, width in enumerate(values)}
  parallel = config['model_type'] == 'phi'
  step = 1 if parallel else 2
  between = [] if parallel else widths[1::2]
  return {
    'hidden_size': config['hidden_size'],
    'layers_num': config['num_hidden_layers'],
    'do_slice_head': widths[-1] < config['hidden_size'],
    'parallel_blocks': parallel,
    'embedding_dimensions': numbered(
      widths[:1] * (2 if config['model_type'] == 'opt' else 1)
    ),
    'attention_input_dimensions': numbered(widths[:-1:step]),
    'attention_output_dimensions': numbered(between),
    'mlp_input_dimensions': numbered(between),
    'mlp_output_dimensions': numbered(widths[step::step]),
    'head_dimension': widths[-1],
    'const_dimension': None,
  }


def parse(config, widths):
  slicing = None if widths is None else slicing_json(config, widths)
  return checkpoints.parse_config(config, slicing)


def random_model(config, seed=0, dtype=np.float16):
  """Makes a model in which every parameter is random, also norms and biases."""
  rng = np.random.default_rng(seed)

  def draw(path, shape):
    name = path[-1].key
    scale = shape[0] ** -0.5 if name == 'kernel' else 0.5
    offset = 1 if name == 'scale' else 0
    return (offset + scale * rng.standard_normal(shape)).astype(dtype)

  random = lambda shapes: jax.tree_util.tree_map_with_path(
    draw, shapes, is_leaf=lambda x: isinstance(x, tuple)
  )
  layers = [random(models.layer_shapes(config, i)) for i in range(config.num_layers)]
  return models.from_layers(config, random(models.outer_shapes(config)), layers)


def random_tokens(config, shape, seed=0):
  return np.random.default_rng(seed).integers(config.vocab_size, size=shape)


def trace(model, shape):
  """Traces the forward pass for tokens of a shape, without computing it."""
  return jax.eval_shape(models.logits, model, jnp.zeros(shape, jnp.int32))


class TransformerTest(chex.TestCase):
  @parameterized.parameters(FIXTURES)
  def test_logits_are_those_of_pytorch(self, name):
    model = checkpoints.load_checkpoint(TESTDATA / name).model
    expected = np.load(TESTDATA / name / 'ref_logits.npz')
    logits = logits_of(model, expected['input_ids'])
    chex.assert_type(logits, jnp.float32)
    np.testing.assert_allclose(logits, expected['logits'], rtol=0, atol=1e-4)

  @parameterized.named_parameters(*CASES)
  def test_logits_are_those_of_the_reference(self, config_json, widths):
    model = random_model(parse(config_json, widths))
    tokens = random_tokens(model.config, (2, 11))
    slicing = None if widths is None else slicing_json(config_json, widths)
    tensors = checkpoints.to_tensors(model)
    expected = [
      reference_forward.forward(tensors, config_json, sequence, slicing)
      for sequence in tokens
    ]
    logits = logits_of(model, tokens)
    np.testing.assert_allclose(logits, np.stack(expected), rtol=0, atol=1e-4)

  @parameterized.parameters('opt_sliced', 'llama_sliced', 'phi_sliced')
  def test_no_dtype_is_promoted_by_chance(self, name):
    config_json, widths = next(case[1:] for case in CASES if case[0] == name)
    model = random_model(parse(config_json, widths), dtype=ml_dtypes.bfloat16)
    with jax.numpy_dtype_promotion('strict'):
      trace(model, (2, 5))

  def test_a_token_outside_the_vocabulary_gives_nan(self):
    model = random_model(parse(OPT, None))
    logits = logits_of(model, np.array([[1, 31, 2], [1, -1, 2], [1, 30, 2]]))
    assert np.isnan(logits[:2]).all()
    assert not np.isnan(logits[2]).any()

  def test_more_tokens_than_learned_positions_are_refused(self):
    model = random_model(parse(OPT, None))
    trace(model, (1, 20))
    with pytest.raises(ValueError, match=r'20 positions.*\(1, 21\)'):
      trace(model, (1, 21))

  def test_a_wrong_shape_is_refused_by_its_path(self):
    model = random_model(parse(LLAMA, None))
    model.params['layers.0:3']['mlp']['up']['kernel'] = np.zeros(
      (3, 24, 35), np.float16
    )
    with pytest.raises(ValueError, match=r'layers.0:3/mlp/up/kernel .*\(3, 24, 35\)'):
      trace(model, (1, 2))

  def test_unknown_parameters_are_refused_by_their_paths(self):
    model = random_model(parse(LLAMA, None))
    model.params['tail'] = {'kernel': np.zeros(3)}
    with pytest.raises(ValueError, match='tail/kernel is not known'):
      trace(model, (1, 2))


class StructuredLeavesTest(chex.TestCase):
  """Structured leaves act like the float32 arrays that they stand for."""

  def assert_acts_as(self, model, plain):
    tokens = random_tokens(model.config, (1, 6))
    np.testing.assert_allclose(
      logits_of(model, tokens),
      logits_of(plain, tokens),
      rtol=0,
      atol=2e-5,
    )

  def test_identity_minus_gram(self):
    model = random_model(parse(LLAMA, (20, 20, 20, 20, 20, 20, 24)))
    rng = np.random.default_rng(1)
    # Ranks of b and c, some thin, some not. They differ within a stack.
    ranks = {
      'attention_shortcut': ((3, 1), (4, 2), (0, 0)),
      'mlp_shortcut': ((12, 2), (11, 0), (3, 0)),
    }
    compact, plain = list(model.layers()), list(model.layers())
    for name, pairs in ranks.items():
      for i, (k, j) in enumerate(pairs):
        columns = plain[i][name]['kernel'].shape[1]
        draw = lambda rank: np.tril(0.2 * rng.standard_normal((20, rank)))
        b, c = draw(k).astype(np.float16), draw(j).astype(np.float16)
        square = np.eye(20) - np.float64(b) @ b.T + np.float64(c) @ c.T
        matrix = np.pad(square, ((0, 0), (0, columns - 20))).astype(np.float32)
        compact[i][name]['kernel'] = structured.IdentityMinusGram(b, c, columns)
        plain[i][name]['kernel'] = matrix
    build = lambda layers: models.from_layers(model.config, model.outer(), layers)
    assert build(compact).stacks == (range(2), range(2, 3))
    self.assert_acts_as(build(compact), build(plain))

  def test_a_thin_shortcut_is_not_materialized(self):
    model = random_model(parse(PHI, (24, 24, 24, 24)))
    b, c = np.ones((3, 24, 5), np.float16), np.zeros((3, 24, 0), np.float16)
    leaf = structured.IdentityMinusGram(b, c, columns=24, ranks=((5, 0),) * 3)
    model.params['layers.0:3']['attention_shortcut']['kernel'] = leaf
    with mock.patch.object(
      structured.IdentityMinusGram, 'materialize', side_effect=NotImplementedError
    ):
      trace(model, (1, 2))

  def test_any_parameter_may_be_structured(self):
    model = random_model(parse(LLAMA | {'tie_word_embeddings': True}, None))

    def edited(edit):
      outer, layers = model.outer(), list(model.layers())
      outer = outer | {'embed': {'tokens': edit(outer['embed']['tokens'])}}
      for layer in layers:
        for linear in (layer['attention']['query'], layer['mlp']['down']):
          linear['kernel'] = edit(linear['kernel'])
      return models.from_layers(model.config, outer, layers)

    trapezoid = lambda x: structured.TrapezoidalRows.of(np.triu(x), len(x))
    self.assert_acts_as(edited(trapezoid), edited(np.triu))

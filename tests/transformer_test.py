"""The forward passes agree with PyTorch's, and with a second one in NumPy."""

import pathlib

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
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
  'head_dim': 12,
  'vocab_size': 31,
  'max_position_embeddings': 32,
  'rms_norm_eps': 1e-3,
  'rope_theta': 60.0,
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
PHI3 = LLAMA | {
  'model_type': 'phi3', 'sliding_window': 5, 'hidden_size': 48, 'head_dim': 8
}  # fmt: skip
MISTRAL = LLAMA | {'model_type': 'mistral', 'sliding_window': 4}
QWEN2 = LLAMA | {
  'model_type': 'qwen2',
  'use_sliding_window': False,
  'sliding_window': 3,
  'max_window_layers': 1,
  'layer_types': ['full_attention'] * 3,
}
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 3.0,
  'original_max_position_embeddings': 24,
}
TIED = {'tie_word_embeddings': True}
BIASES = {'attention_bias': True, 'mlp_bias': True}
LINEAR = {'type': 'linear', 'factor': 2.5}
NARROW = (20,) * 6 + (24,)
# How the reference says what the config has in another form.
SCALED = {'rope_theta': reference_forward.ScaledBase(60.0, 4.0, 1.0, 3.0, 24)}
DIVIDED = {'rope_theta': reference_forward.DividedBase(60.0, 2.5)}
WHOLE = {'sliding_window': None}

# Compilation takes half the time; the slower program does not matter here.
logits_of = jax.jit(
  models.logits, compiler_options={'xla_backend_optimization_level': 0}
)

# Name, config.json, differences in the reference's config, widths (None if dense).
CASES = (
  ('opt_dense_tied', OPT, {}, None),
  ('opt_sliced', OPT, {}, NARROW),
  ('llama_dense_biases', LLAMA | BIASES, {}, None),
  ('llama_mixed_widths', LLAMA, {}, (22, 22, 12, 24, 12, 9, 7)),
  ('llama3_tied', LLAMA | TIED | {'rope_scaling': LLAMA3}, SCALED, None),
  ('linear_rope', LLAMA | {'rope_scaling': LINEAR}, DIVIDED, None),
  ('mistral', MISTRAL, {}, None),
  ('qwen2_tied', QWEN2 | TIED, WHOLE, None),
  ('qwen2_sliced', QWEN2 | TIED, WHOLE, NARROW),
  ('phi_dense', PHI, {}, None),
  ('phi_sliced', PHI, {}, (24, 24, 20, 32)),
  ('phi3_dense', PHI3, {}, None),
  ('phi3_sliced', PHI3, {}, (36,) * 6 + (48,)),
)


def parse(config_json, widths):
  config = checkpoints.parse_config(config_json)
  return config if widths is None else config.sliced_to(widths)


def random_model(config, dtype=np.float16):
  """Makes a model in which every parameter is random, also norms and biases."""
  rng = np.random.default_rng(0)

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


def random_tokens(config, shape):
  return np.random.default_rng(0).integers(config.vocab_size, size=shape)


class TransformerTest(chex.TestCase):
  @parameterized.parameters(FIXTURES)
  def test_logits_are_those_of_pytorch(self, name):
    model = checkpoints.load_checkpoint(TESTDATA / name).model
    expected = np.load(TESTDATA / name / 'ref_logits.npz')
    logits = logits_of(model, expected['input_ids'])
    chex.assert_type(logits, jnp.float32)
    np.testing.assert_allclose(logits, expected['logits'], rtol=0, atol=1e-4)

  @parameterized.named_parameters(*CASES)
  def test_logits_are_those_of_the_reference(self, config_json, differs, widths):
    model = random_model(parse(config_json, widths))
    slicing = None if widths is None else checkpoints.slicing_json(model.config)
    assert checkpoints.parse_config(config_json, slicing) == model.config
    tokens, tensors = random_tokens(model.config, 13), checkpoints.to_tensors(model)
    expected = reference_forward.forward(
      tensors, config_json | differs, tokens, slicing
    )
    logits = logits_of(model, tokens[None])[0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)

  def test_tokens_and_positions_that_the_model_lacks(self):
    model = random_model(parse(OPT, None))
    logits = logits_of(model, np.array([[1, 31, 2], [1, -1, 2], [1, 30, 2]]))
    assert np.isnan(logits[:2]).all()
    assert not np.isnan(logits[2]).any()
    with pytest.raises(ValueError, match=r'20 positions.*\(1, 21\)'):
      jax.eval_shape(models.logits, model, jnp.zeros((1, 21), jnp.int32))


class StructuredLeavesTest(chex.TestCase):
  """Structured leaves act like the float32 arrays that they stand for."""

  def assert_acts_as(self, model, plain):
    tokens = random_tokens(model.config, (1, 6))
    np.testing.assert_allclose(
      logits_of(model, tokens), logits_of(plain, tokens), rtol=0, atol=2e-5
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

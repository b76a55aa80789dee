"""The forward passes agree with PyTorch's, and with a second one in NumPy."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_models
import reference_forward

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
FIXTURES = sorted(path.stem for path in TESTDATA.glob('logits/*.npz'))

# Two layers of each family, with what its published configs have besides.
CONFIGS = {
  name: config | {'num_hidden_layers': 2}
  for name, config in random_models.FAMILIES.items()
}
CONFIGS['phi3'] |= {'sliding_window': 5}
CONFIGS['qwen2'] |= {'use_sliding_window': False, 'sliding_window': 3}
TIED = {'tie_word_embeddings': True}
BIASES = {'attention_bias': True, 'mlp_bias': True}
LINEAR = {'type': 'linear', 'factor': 2.5}
NARROW = (20,) * 4 + (24,)
# How the reference says what the config has in another form.
SCALED = {'rope_theta': reference_forward.ScaledBase(50.0, 4.0, 1.0, 3.0, 24)}
DIVIDED = {'rope_theta': reference_forward.DividedBase(50.0, 2.5)}
WHOLE = {'sliding_window': None}

# Compilation takes half the time; the slower program does not matter here.
logits_of = jax.jit(
  models.logits, compiler_options={'xla_backend_optimization_level': 0}
)

# Family, what config.json has besides, how it differs in the reference, and the widths
# of a sliced model.
CASES = (
  ('opt', {}, {}, None),
  ('opt', {}, {}, NARROW),
  ('llama', BIASES, {}, None),
  ('llama', {}, {}, (22, 12, 24, 9, 7)),
  ('llama', TIED | {'rope_scaling': random_models.LLAMA3_ROPE}, SCALED, None),
  ('llama', {'rope_scaling': LINEAR}, DIVIDED, None),
  ('mistral', {}, {}, None),
  ('qwen2', TIED, WHOLE, None),
  ('qwen2', TIED, WHOLE, NARROW),
  ('phi2', {}, {}, None),
  ('phi2', {}, {}, (20, 12, 24)),
  ('phi3', {}, {}, None),
  ('phi3', {}, {}, NARROW),
)


def random_tokens(config, shape):
  return np.random.default_rng(0).integers(config.vocab_size, size=shape)


@pytest.mark.parametrize('name', FIXTURES)
def test_logits_are_those_of_pytorch(name):
  model = checkpoints.load_checkpoint(TESTDATA / name).model
  expected = np.load(TESTDATA / 'logits' / f'{name}.npz')
  logits = logits_of(model, expected['input_ids'])
  assert logits.dtype == np.float32
  np.testing.assert_allclose(logits, expected['logits'], rtol=0, atol=1e-4)


@pytest.mark.parametrize(('family', 'change', 'differs', 'widths'), CASES)
def test_logits_are_those_of_the_reference(family, change, differs, widths):
  config_json, slicing = CONFIGS[family] | change, None
  if widths is None:
    model = random_models.random_model(config_json)
  else:
    model = random_models.sliced(config_json, widths)
    slicing = checkpoints.slicing_json(model.config)
  assert checkpoints.parse_config(config_json, slicing) == model.config
  tokens, tensors = random_tokens(model.config, 13), checkpoints.to_tensors(model)
  expected = reference_forward.forward(tensors, config_json | differs, tokens, slicing)
  logits = logits_of(model, tokens[None])[0]
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_tokens_and_positions_that_the_model_lacks():
  model = random_models.random_model(CONFIGS['opt'])
  logits = logits_of(model, np.array([[1, 40, 2], [1, -1, 2], [1, 39, 2]]))
  assert np.isnan(logits[:2]).all()
  assert not np.isnan(logits[2]).any()
  with pytest.raises(ValueError, match=r'30 positions.*\(1, 31\)'):
    jax.eval_shape(models.logits, model, jnp.zeros((1, 31), jnp.int32))


def test_shortcuts_of_identity_minus_gram_act_as_their_matrices():
  model = random_models.sliced(
    CONFIGS['llama'] | {'num_hidden_layers': 3}, (20,) * 6 + (24,), np.float16
  )
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
  compact, plain = (
    models.from_layers(model.config, model.outer(), layers)
    for layers in (compact, plain)
  )
  assert compact.stacks == (range(2), range(2, 3))
  tokens = random_tokens(model.config, (1, 6))
  expected = logits_of(plain, tokens)
  np.testing.assert_allclose(logits_of(compact, tokens), expected, rtol=0, atol=2e-5)

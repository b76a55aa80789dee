"""Configs of the families, and forward passes of RoPE scaling, Mistral and Qwen2.

The tensors are random and have Hugging Face's names. The expected logits are those of a
second forward pass in NumPy. `transformer_test` compares the logits of the checkpoints
in `testdata`, among them Qwen3, with those of transformers.
"""

import dataclasses
import json

from absl.testing import parameterized
import chex
import jax
import numpy as np
import pytest
import reference_forward

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax.checkpoints import CheckpointError
from rotbits_jax.models import config as models_config
from rotbits_jax.models import transformer
from rotbits_jax.system import schema

LLAMA = {
  'model_type': 'llama',
  'hidden_size': 24,
  'intermediate_size': 20,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 12,
  'vocab_size': 31,
  'max_position_embeddings': 32,
  'rms_norm_eps': 1e-3,
  'rope_theta': 60.0,
}
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 3.0,
  'original_max_position_embeddings': 24,
}
MISTRAL = LLAMA | {'model_type': 'mistral', 'sliding_window': 4}
QWEN2 = LLAMA | {
  'model_type': 'qwen2',
  'use_sliding_window': False,
  'sliding_window': 3,
  'max_window_layers': 1,
  'layer_types': ['full_attention'] * 2,
}
QWEN3 = QWEN2 | {'model_type': 'qwen3'}
TIED = {'tie_word_embeddings': True}

# Name, config.json, differences in the reference's config, widths (None if dense).
CASES = (
  (
    'llama3_tied',
    LLAMA | TIED | {'rope_scaling': LLAMA3},
    {'rope_theta': reference_forward.ScaledBase(60.0, 4.0, 1.0, 3.0, 24)},
    None,
  ),
  (
    'linear',
    LLAMA | {'rope_scaling': {'type': 'linear', 'factor': 2.5}},
    {'rope_theta': reference_forward.DividedBase(60.0, 2.5)},
    None,
  ),
  ('mistral', MISTRAL, {}, None),
  ('qwen2_tied', QWEN2 | TIED, {'sliding_window': None}, None),
  ('qwen2_sliced', QWEN2 | TIED, {'sliding_window': None}, (20, 16, 20, 16, 24)),
)


def random_tensors(config, widths):
  """Makes a Llama's tensors by Hugging Face's names; Qwen2 has biases on q, k and v."""
  rng = np.random.default_rng(0)
  hidden, inner = config['hidden_size'], config['intermediate_size']
  queries = config['num_attention_heads'] * config['head_dim']
  keys = config['num_key_value_heads'] * config['head_dim']
  layers, vocab = config['num_hidden_layers'], config['vocab_size']
  sliced = widths is not None
  widths = widths or (hidden,) * (2 * layers + 1)
  draw = lambda *shape: (rng.standard_normal(shape) / shape[-1] ** 0.5).astype('f4')
  tensors = {'model.embed_tokens.weight': 3 * draw(vocab, widths[0])}
  if sliced or not config.get('tie_word_embeddings'):
    tensors['lm_head.weight'] = draw(vocab, widths[-1])
  if not sliced:
    tensors['model.norm.weight'] = 1 + draw(hidden)
  for layer in range(layers):
    first, middle, last = widths[2 * layer : 2 * layer + 3]
    prefix = f'model.layers.{layer}.'
    tensors |= {
      f'{prefix}self_attn.q_proj.weight': 2 * draw(queries, first),
      f'{prefix}self_attn.k_proj.weight': 2 * draw(keys, first),
      f'{prefix}self_attn.v_proj.weight': draw(keys, first),
      f'{prefix}self_attn.o_proj.weight': draw(middle, queries),
      f'{prefix}mlp.gate_proj.weight': draw(inner, middle),
      f'{prefix}mlp.up_proj.weight': draw(inner, middle),
      f'{prefix}mlp.down_proj.weight': draw(last, inner),
    }
    if config['model_type'] == 'qwen2':
      for name, rows in (('q', queries), ('k', keys), ('v', keys)):
        tensors[f'{prefix}self_attn.{name}_proj.bias'] = 3 * draw(rows)
    if sliced:
      tensors[f'{prefix}attn_shortcut_Q'] = draw(first, middle)
      tensors[f'{prefix}mlp_shortcut_Q'] = draw(middle, last)
    else:
      tensors[f'{prefix}input_layernorm.weight'] = 1 + draw(hidden)
      tensors[f'{prefix}post_attention_layernorm.weight'] = 1 + draw(hidden)
  return tensors


class ForwardTest(chex.TestCase):
  @parameterized.named_parameters(*CASES)
  def test_logits_are_those_of_the_reference(self, config_json, differs, widths):
    config, slicing = checkpoints.parse_config(config_json), None
    if widths is not None:
      config = config.sliced_to(widths)
      slicing = checkpoints.slicing_json(config)
      assert checkpoints.parse_config(config_json, slicing) == config
    tensors = random_tensors(config_json, widths)
    model = checkpoints.from_tensors(tensors, config)
    tokens = np.random.default_rng(1).integers(config.vocab_size, size=13)
    expected = reference_forward.forward(
      tensors, config_json | differs, tokens, slicing
    )
    logits = jax.jit(models.logits)(model, tokens[None])[0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    assert checkpoints.to_tensors(model).keys() == tensors.keys()


class RopeFrequenciesTest(chex.TestCase):
  @parameterized.parameters(
    (60.0, 12, 4.0, 1.0, 3.0, 24),
    (500000.0, 128, 8.0, 1.0, 4.0, 8192),  # Llama 3.1
    (500000.0, 64, 32.0, 1.0, 4.0, 8192),  # Llama 3.2
  )
  def test_llama3(self, theta, head_dim, factor, low, high, positions):
    scaling = models_config.RopeScaling(
      type_name='llama3',
      factor=factor,
      low_freq_factor=low,
      high_freq_factor=high,
      original_positions=positions,
    )
    config = dataclasses.replace(
      checkpoints.parse_config(LLAMA),
      rope_theta=theta,
      head_dim=head_dim,
      rotary_dim=head_dim,
      rope_scaling=scaling,
    )
    base = reference_forward.ScaledBase(theta, factor, low, high, positions)
    expected = np.array([base ** (-2 * i / head_dim) for i in range(head_dim // 2)])
    np.testing.assert_allclose(
      transformer.rope_frequencies(config), expected, rtol=1e-12
    )
    ratio = theta ** (-np.arange(0, head_dim, 2) / head_dim) / expected
    assert np.isclose(ratio, 1).any()
    assert np.isclose(ratio, factor).any()
    assert ((ratio > 1.01) & (ratio < factor - 0.01)).any()


class ConfigTest(chex.TestCase):
  def test_both_forms_of_rope_settings_are_the_same(self):
    older = checkpoints.parse_config(LLAMA | {'rope_scaling': LLAMA3})
    values = {k: v for k, v in LLAMA.items() if k != 'rope_theta'}
    newer = values | {'rope_parameters': LLAMA3 | {'rope_theta': 60.0}}
    assert checkpoints.parse_config(newer) == older
    both = newer | {'rope_theta': 60}
    assert checkpoints.parse_config(both) == older
    assert older.rope_scaling == models_config.RopeScaling(
      type_name='llama3',
      factor=4.0,
      low_freq_factor=1.0,
      high_freq_factor=3.0,
      original_positions=24,
    )

  @parameterized.parameters(
    ({'rotary_dim': 14}, 'rotary_dim must be even and at most head_dim'),
    ({'rotary_dim': 3}, 'rotary_dim must be even'),
    ({'head_dim': 0, 'rotary_dim': 0}, 'at most head_dim, got 0 and 0'),
    ({'num_heads': 0}, 'num_heads must be a multiple'),
    ({'rope_theta': float('nan')}, 'rope_theta must be positive'),
  )
  def test_numbers_with_which_nothing_can_be_computed(self, fields, message):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(checkpoints.parse_config(LLAMA), **fields)

  @parameterized.parameters((None,), ({'type': 'linear', 'factor': 2},), (LLAMA3,))
  def test_a_config_comes_back_from_json(self, scaling):
    config = checkpoints.parse_config(LLAMA | {'rope_scaling': scaling})
    fields = json.loads(json.dumps(schema.dump(config)))
    assert schema.load(models.ModelConfig, fields) == config
    assert hash(schema.load(models.ModelConfig, fields)) == hash(config)

  def test_part_of_a_head_is_refused(self):
    rope = {'rope_type': 'default', 'partial_rotary_factor': 0.5}
    for config in (LLAMA, MISTRAL, QWEN2):
      values = {k: v for k, v in config.items() if k != 'rope_scaling'}
      with (
        self.subTest(config['model_type']),
        pytest.raises(checkpoints.CheckpointError, match='parameters: partial_rotary'),
      ):
        checkpoints.parse_config(values | {'rope_parameters': rope})

  def test_qwen3(self):
    config = checkpoints.parse_config(QWEN3 | {'attention_bias': True})
    assert (config.qkv_bias, config.out_bias, config.tied_head) == (True, True, False)
    # The norms of queries and keys keep their epsilon in a sliced model.
    assert config.sliced_to(config.segment_widths).qk_norm_eps == 1e-3

  def test_published_sizes(self):
    qwen = QWEN2 | {
      'hidden_size': 896, 'intermediate_size': 4864, 'num_hidden_layers': 24,
      'num_attention_heads': 14, 'num_key_value_heads': 2, 'head_dim': None,
      'vocab_size': 151936, 'layer_types': None, **TIED,
    }  # fmt: skip
    assert models.count_elements(checkpoints.parse_config(qwen)) == 494032768
    mistral = MISTRAL | {
      'hidden_size': 4096, 'intermediate_size': 14336, 'num_hidden_layers': 32,
      'num_attention_heads': 32, 'num_key_value_heads': 8, 'head_dim': 128,
      'vocab_size': 32000,
    }  # fmt: skip
    assert models.count_elements(checkpoints.parse_config(mistral)) == 7241732096
    names = (
      'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
      'num_key_value_heads', 'head_dim', 'vocab_size',
    )  # fmt: skip
    for base, sizes, elements in (
      (QWEN3 | TIED, (1024, 3072, 28, 16, 8, 128, 151936), 596049920),
    ):
      given = base | dict(zip(names, sizes, strict=True))
      given.pop('layer_types', None)  # it lists two layers
      config = checkpoints.parse_config(given)
      assert models.count_elements(config) == elements

  def test_refused(self):
    cases = (
      (LLAMA, {'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0}},
       "rope_scaling: rope_type is 'yarn'"),
      (LLAMA, {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}},
       "rope_scaling: rope_type is 'dynamic'"),
      (LLAMA, {'rope_scaling': LLAMA3 | {'low_freq_factor': None}},
       'rope_scaling: low_freq_factor is None'),
      (LLAMA, {'rope_scaling': LLAMA3 | {'attention_factor': 1.5}},
       'rope_scaling: attention_factor is 1.5'),
      (LLAMA, {'rope_scaling': LLAMA3 | {'high_freq_factor': 1.0}},
       'low_freq_factor must be positive and less than high_freq_factor'),
      (LLAMA, {'rope_scaling': LLAMA3, 'rope_parameters': LLAMA3},
       'config.json: rope_scaling is'),
      (LLAMA, {'rope_scaling': {'rope_type': 'linear'}}, 'factor is missing'),
      (LLAMA, {'rope_parameters': {'rope_theta': 50.0}},
       'config.json: rope_theta is 60.0; supported: 50.0'),
      (LLAMA, {'rope_scaling': LLAMA3 | {'type': 'linear'}},
       "rope_scaling: type is 'linear'; supported: 'llama3'"),
      (LLAMA | {'model_type': 'phi3', 'partial_rotary_factor': 1.0},
       {'rope_parameters': {'partial_rotary_factor': 0.5}},
       'config.json: partial_rotary_factor is 1.0; supported: 0.5'),
      (MISTRAL, {'num_key_value_heads': ...}, 'num_key_value_heads is missing'),
      (MISTRAL, {'sliding_window': ...}, 'sliding_window is missing'),
      (MISTRAL, {'attention_bias': True}, 'attention_bias is True'),
      (QWEN2, {'use_sliding_window': True}, 'use_sliding_window is True'),
      (QWEN2, {'layer_types': True}, 'layer_types'),
      (QWEN2, {'num_hidden_layers': 2**31 - 1}, 'num_hidden_layers'),
      (QWEN2, {'layer_types': ['full_attention', 'sliding_attention']},
       'layer_types is'),
      (QWEN3, {'head_dim': ...}, 'head_dim is missing'),
      (QWEN3, {'use_sliding_window': True}, 'use_sliding_window is True'),
      (QWEN3, {'use_qk_norm': False}, 'use_qk_norm is False; supported: no attribute'),
    )  # fmt: skip
    for values, change, match in cases:
      given = {k: v for k, v in (values | change).items() if v is not ...}
      with self.subTest(change=change), pytest.raises(CheckpointError, match=match):
        checkpoints.parse_config(given)

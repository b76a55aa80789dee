"""SliceGPT: fusing of norms, slicing, and the written files."""

import dataclasses
import functools
import json
import pathlib

import chex
import jax
import numpy as np
import pytest
import word_checkpoints

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import evaluation
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import slicing
from rotbits_jax.slicing import norm_fusion
from tests import random_models

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
SIZES = {'num_hidden_layers': 2, 'vocab_size': 69, 'max_position_embeddings': 48}
TIED = {'tie_word_embeddings': True}
# Dense models are named after a fixture or a random model.
RANDOM = {
  'opt-random': random_models.OPT | SIZES,
  'llama-random': random_models.FAMILIES['llama'] | SIZES | TIED,
  'qwen3-random': random_models.FAMILIES['qwen3'] | SIZES,
}
# A dense model, the result of Microsoft's SliceGPT, and whether its head is sliced.
FIXTURES = {
  'llama-tiny-dense': ('llama-tiny-sliced-head-0.25', True),
  'phi2-tiny-dense': ('phi2-tiny-sliced-0.25', False),
  'phi3-tiny-dense': ('phi3-tiny-sliced-0.25', False),
}
SLICED_HEADS = {name for name, (_, head) in FIXTURES.items() if head}

# Compilation takes half the time; the slower program does not matter here.
logits_of = jax.jit(
  models.logits, compiler_options={'xla_backend_optimization_level': 0}
)


def random_tokens(seed, shape):
  return np.random.default_rng(seed).integers(69, size=shape)


CALIBRATION = random_tokens(0, (12, 48))
EVALUATION = random_tokens(1, (4, 48))


@functools.cache
def dense(name):
  if name in RANDOM:
    return random_models.random_model(RANDOM[name])
  model = checkpoints.load_checkpoint(TESTDATA / name).model
  return jax.tree.map(lambda x: x.astype(np.float32), model)


@functools.cache
def fused(name):
  """Returns a sliced model that lacks nothing: each shortcut is the identity."""
  model, config = dense(name), dense(name).config
  identity = {'kernel': np.eye(config.hidden_size)}
  shortcuts = ('attention_shortcut', 'mlp_shortcut')[: config.segments_per_layer]
  layers = [
    norm_fusion.fuse_layer(layer, config) | dict.fromkeys(shortcuts, identity)
    for layer in model.layers()
  ]
  outer = {
    'embed': norm_fusion.fuse_embeddings(model.outer(), config),
    'head': norm_fusion.fuse_head(model.outer(), config),
  }
  outer, layers = jax.tree.map(lambda x: x.astype(np.float32), (outer, layers))
  return models.from_layers(norm_fusion.fused(config), outer, layers)


@functools.cache
def sliced(name, **settings):
  settings = {'sparsity': 0.25, 'slice_head': name in SLICED_HEADS} | settings
  return slicing.slice_model(dense(name), CALIBRATION, **settings)


@functools.cache
def dense_logits(name):
  return np.asarray(logits_of(dense(name), EVALUATION))


def assert_same_logits(actual, expected, tolerance=1e-4):
  error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
  assert error < tolerance, error


@pytest.mark.parametrize('name', [*RANDOM, *FIXTURES])
def test_fusing_norms_keeps_the_function(name):
  assert fused(name).config.sliced
  assert_same_logits(logits_of(fused(name), EVALUATION), dense_logits(name))


@pytest.mark.parametrize(
  ('name', 'sparsity', 'interval', 'width'),
  [
    ('llama-random', 0.0, 8, 24),
    ('qwen3-random', 0.0, 8, 24),
    ('phi2-tiny-dense', 0.0, 8, 128),
    ('opt-random', 1 / 24, 23, 23),  # LayerNorm removes the direction of the mean
  ],
)
def test_keeps_the_function_where_nothing_is_lost(name, sparsity, interval, width):
  model = sliced(name, sparsity=sparsity, round_interval=interval)
  assert model.config.segment_widths[0] == width
  assert_same_logits(logits_of(model, EVALUATION), dense_logits(name))


@pytest.mark.parametrize('name', ['opt-random', 'llama-random', 'phi2-tiny-dense'])
def test_the_function_does_not_depend_on_the_rotations(name):
  models = sliced(name), sliced(name, seed=1)
  assert_same_logits(*(logits_of(model, EVALUATION) for model in models))
  first, second = (np.asarray(model.params['head']['kernel']) for model in models)
  assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize('name', FIXTURES)
def test_no_worse_than_microsofts(name):
  theirs = checkpoints.load_checkpoint(TESTDATA / FIXTURES[name][0]).model
  ours = sliced(name)
  assert ours.config == theirs.config
  chex.assert_trees_all_equal_shapes(ours, theirs)
  theirs = jax.tree.map(lambda x: x.astype(np.float32), theirs)
  ours, theirs = (
    np.mean(evaluation.kl_divergence(dense_logits(name), logits_of(x, EVALUATION)))
    for x in (ours, theirs)
  )
  assert ours < 1.05 * theirs


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('name', FIXTURES)
def test_free_is_within_twice_the_noise_floor(name, dtype, subtests):
  for sparsity in (0.15, 0.2, 0.25, 0.3, 0.4):
    with subtests.test(sparsity=sparsity):
      check_noise(name, sparsity, dtype)


def check_noise(name, sparsity, dtype):
  unrounded = sliced(name, sparsity=sparsity)
  model = dataclasses.replace(unrounded, stored_as=dtype)
  rounded = model.rounded()
  free = lambda x: rotbits_jax.decode(rotbits_jax.encode(x, preset='free'))
  kl = lambda x, reference: (
    evaluation.evaluate(x, EVALUATION.reshape(-1), reference=reference).kl
  )
  rotated = [passes.randomly_rotated(rounded, key=jax.random.key(i)) for i in range(2)]
  floor = np.mean([kl(x, rounded) for x in rotated])
  assert kl(free(rounded), rounded) < 2 * floor
  # Elements that were not rounded before: a single rounding, as in the rounded model.
  assert kl(free(model), unrounded) < 2 * kl(rounded, unrounded)


def test_refuses(subtests):
  model, too_large = dense('opt-random'), jax.tree.map(np.copy, dense('llama-random'))
  too_large.params['final_norm']['scale'][:] = 3e38
  for refused, tokens, sparsity, message in (
    (model, CALIBRATION + 0.5, 0.25, r'tokens must be \[S, T\] integers'),
    (model, CALIBRATION + 1, 0.25, 'token 69 is outside'),
    (model, CALIBRATION.reshape(6, 96), 0.25, '48 positions, got sequences of 96'),
    (model, CALIBRATION[:1, :23], 0.25, 'hidden size 24, got 23'),
    (model, CALIBRATION, 1.0, r'must be in \[0, 1\), got 1.0'),
    (fused('opt-random'), CALIBRATION, 0.25, 'only a dense model'),
    (too_large, CALIBRATION, 0.25, 'head/kernel has .* float32'),
  ):
    with subtests.test(message), pytest.raises(ValueError, match=message):
      slicing.slice_model(refused, tokens, sparsity=sparsity)


def test_widths_are_rounded_as_by_slicegpt():
  for hidden, sparsity, interval, width in (
    (256, 0.2, 8, 200),
    (576, 0.3, 8, 400),
    (4096, 0.25, 8, 3072),
    (4096, 0.3, 1, 2867),
    (768, 0.0, 8, 768),
  ):
    assert slicing.sliced_width(hidden, sparsity, interval) == width


def test_the_command_writes_what_microsofts_writes(rotbits, tmp_path):
  source = word_checkpoints.copy_with_tokenizer('phi2-tiny-dense', tmp_path)
  text, output = tmp_path / 'text', tmp_path / 'sliced'
  text.write_text(word_checkpoints.random_text(600))
  code, out, err = rotbits(
    'slice',
    source,
    output,
    f'--text={text}',
    '--sparsity=0.25',
    '--sequence_length=48',
    f'--encoded={output.parent / "free.rotbits"}',
    f'--recipe={output.parent / "recipe.rotbits"}',
  )
  assert (code, err) == (0, '')
  stem = 'phi2-tiny-dense_0.25'
  encoded = rotbits_jax.inspect(output.parent / 'free.rotbits')
  tensors = checkpoints.to_tensors(rotbits_jax.load_checkpoint(output).model)
  assert encoded.input_bytes == sum(tensor.nbytes for tensor in tensors.values())
  assert encoded.file_bytes < encoded.input_bytes
  recipe = rotbits_jax.inspect(output.parent / 'recipe.rotbits')
  assert recipe.file_bytes < 0.2 * encoded.file_bytes
  assert 'layers.0/mlp/up/kernel' in recipe.needs
  assert f'{stem}.pt: width 96 of 128, calibrated on 576 tokens' in out
  names = {f'{stem}.pt', f'{stem}.json', 'tokenizer.json', 'config.json'}
  assert {file.name for file in output.iterdir()} == names | {'generation_config.json'}
  loaded = checkpoints.load_checkpoint(output)
  theirs = json.loads((TESTDATA / 'phi2-tiny-sliced-0.25/phi-2_0.25.json').read_text())
  assert json.loads((output / f'{stem}.json').read_text()) == theirs
  assert loaded.model.params['embed']['tokens'].dtype == np.float16  # as before
  tokens = slicing.sample_sequences(
    evaluation.encode_text(loaded.files, text.read_text()),
    sequences=128,
    length=48,
    seed=42,
  )
  unrounded = slicing.slice_model(
    checkpoints.load_checkpoint(source).model, tokens, sparsity=0.25
  )
  chex.assert_trees_all_equal(
    loaded.model, rotbits_jax.structured.astype(unrounded, np.float16)
  )

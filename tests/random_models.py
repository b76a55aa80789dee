"""Random models for tests."""

import jax
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax.slicing import norm_fusion
from rotbits_jax.slicing import slicegpt
from tests import reference_forward

BASE = {
  'model_type': 'llama',
  'hidden_size': 24,
  'intermediate_size': 32,
  'num_attention_heads': 2,
  'num_key_value_heads': 1,
  'vocab_size': 40,
  'max_position_embeddings': 64,
}
_ROTARY = BASE | {'num_hidden_layers': 4, 'rope_theta': 50.0}
_LLAMA = _ROTARY | {'rms_norm_eps': 1e-5}
_GROUPS = _LLAMA | {'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 8}
OPT = {
  'model_type': 'opt',
  'hidden_size': 24,
  'ffn_dim': 40,
  'num_hidden_layers': 4,
  'num_attention_heads': 3,
  'vocab_size': 40,
  'max_position_embeddings': 30,
  'word_embed_proj_dim': 24,
}
FAMILIES = {
  'llama': _GROUPS,
  'mistral': _GROUPS | {'model_type': 'mistral', 'sliding_window': 5},
  'qwen2': _GROUPS | {'model_type': 'qwen2'},
  'qwen3': _GROUPS | {'model_type': 'qwen3'},
  'phi3': _LLAMA | {'model_type': 'phi3', 'num_key_value_heads': 2},
  'opt': OPT,
  'phi2': _ROTARY | {'model_type': 'phi', 'partial_rotary_factor': 0.5},
}
"""The configs of small models of every family; a new one joins tests by a row here."""
LLAMA3_ROPE = {
  'rope_type': 'llama3',
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 3.0,
  'original_max_position_embeddings': 24,
}


def orthogonal(rng, n):
  q, r = np.linalg.qr(rng.standard_normal((n, n)))
  return q * np.sign(np.diag(r))


def random_model(config_json, dtype=np.float32):
  """Makes a dense model in which every parameter is random, also norms and biases."""
  config = checkpoints.parse_config(config_json, None)
  rng = np.random.default_rng(0)
  draw = lambda shape: (rng.standard_normal(shape) / 3).astype(dtype)
  random = lambda shapes: jax.tree.map(
    draw, shapes, is_leaf=lambda x: isinstance(x, tuple)
  )
  layers = [random(models.layer_shapes(config, i)) for i in range(config.num_layers)]
  return models.from_layers(config, random(models.outer_shapes(config)), layers)


def reference_logits(config_json, model):
  """Returns float64 logits of 9 random tokens by the second forward pass."""
  tokens = np.random.default_rng(1).integers(31, size=9)
  tensors = checkpoints.to_tensors(model)
  return reference_forward.forward(tensors, config_json, tokens)


def sliced_llama(widths, dtype=np.float32, seed=0, shortcut=None):
  """Makes a random sliced Llama with these segment widths and hidden size 24."""
  config_json = BASE | {'num_hidden_layers': (len(widths) - 1) // 2}
  return sliced(config_json, widths, dtype, seed, shortcut)


def sliced(config_json, widths, dtype=np.float32, seed=0, shortcut=None):
  """Makes a random sliced model.

  Args:
    config_json: the config of the dense model.
    widths: the widths of the segments.
    dtype: dtype of the parameters.
    seed: seed of the numbers.
    shortcut: takes a generator and a block of an orthogonal matrix; returns the
      shortcut. By default it is that block.

  Returns:
    The model.
  """
  rng = np.random.default_rng(seed)
  config = checkpoints.parse_config(config_json, None).sliced_to(tuple(widths))
  bases = [orthogonal(rng, config.hidden_size)[:, :w] for w in widths]
  filled = iter(bases[i].T @ bases[i + 1] for i in range(len(widths) - 1))

  def leaf(path, shape):
    if 'shortcut' in path[0].key:
      matrix = next(filled)
      return (matrix if shortcut is None else shortcut(rng, matrix)).astype(dtype)
    return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(dtype)

  is_shape = lambda x: isinstance(x, tuple)
  fill = lambda shapes: jax.tree_util.tree_map_with_path(leaf, shapes, is_leaf=is_shape)
  outer = fill(models.outer_shapes(config))
  stack = [fill(models.layer_shapes(config, i)) for i in range(config.num_layers)]
  return models.from_layers(config, outer, stack)


def sliced_from(dense, widths, dtype=np.float16, seed=0):
  """Slices a model with random subspaces, without a text."""
  rng, config = np.random.default_rng(seed), norm_fusion.fused(dense.config)
  hidden, step = config.hidden_size, config.segments_per_layer
  whole = (np.linalg.qr(rng.standard_normal((hidden, hidden)))[0] for _ in widths)
  bases = [x[:, :n] for x, n in zip(whole, widths, strict=True)]
  embed = norm_fusion.fuse_embeddings(dense.outer(), dense.config)
  head = norm_fusion.fuse_head(dense.outer(), dense.config)
  head['kernel'] = bases[-1].T @ head['kernel']
  outer = {'embed': {k: x @ bases[0] for k, x in embed.items()}, 'head': head}
  layers = [
    slicegpt.slice_layer(
      norm_fusion.fuse_layer(layer, dense.config),
      tuple(bases[i * step : (i + 1) * step + 1]),
      config,
    )
    for i, layer in enumerate(dense.layers())
  ]
  outer, layers = jax.tree.map(lambda x: x.astype(dtype), (outer, layers))
  return models.from_layers(config.sliced_to(widths), outer, layers)

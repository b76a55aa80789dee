r"""Norm fusion: a dense model as one whose norms have no parameters.

    norm(x) = (x - mean(x)) / rms(x - mean(x)) * scale + bias

The scale goes into the kernels that read the norm, the bias into their biases. The
mean, which LayerNorm takes off and RMSNorm does not, is taken off where it comes from:
the rows of the embeddings and what the sublayers write. Left is RMSN(x) = x / rms(x),
which commutes with rotations of x.

Reference: SliceGPT, arXiv 2401.15024, section 3.2.
"""

from typing import Any

import jax
import numpy as np

from rotbits_jax import models


def fuse_norms(model: models.Model) -> models.Model:
  """A model of the same function whose norms are fused and whose segments are whole.

  It is a sliced model of which nothing is cut off: every segment has the width D, every
  shortcut is the identity. The head is not tied. The function differs only where the
  dense norm's epsilon is not that of RMSN, 1e-5.

  Args:
    model: dense.

  Returns:
    The model; its leaves are float32 NumPy arrays.

  Raises:
    ValueError: if the model is sliced already.
  """
  model, config = model.materialize(), model.config
  fused_config = fused(config)
  identity = {'kernel': np.eye(config.hidden_size)}
  shortcuts = ('attention_shortcut', 'mlp_shortcut')[: config.segments_per_layer]
  layers = [
    fuse_layer(layer, config) | dict.fromkeys(shortcuts, identity)
    for layer in model.layers()
  ]
  outer = {
    'embed': fuse_embeddings(model.outer(), config),
    'head': fuse_head(model.outer(), config),
  }
  outer, layers = jax.tree.map(lambda x: x.astype(np.float32), (outer, layers))
  return models.from_layers(fused_config, outer, layers, model.buffers)


def fused(config: models.ModelConfig) -> models.ModelConfig:
  """The config of a dense model once its norms are fused.

  Raises:
    ValueError: if it is a sliced model's.
  """
  if config.sliced:
    raise ValueError(f'only a dense model can be sliced, got {config.norm=}')
  return config.sliced_to(config.segment_widths)


def fuse_layer(layer: models.Params, config: models.ModelConfig) -> models.Params:
  """One layer without its norms.

  Args:
    layer: parameters of a layer of a dense model.
    config: of the dense model.

  Returns:
    The sublayers' parameters, float64; no shortcuts.
  """
  layer = _float64(layer)
  fused_layer: models.Params = {name: {} for name in models.layout.SUBLAYERS}
  for path, ends in models.layout.linears(config).items():
    sublayer, name = path.split('/')
    linear = layer[sublayer][name]
    if ends.reads is None:
      linear = _centred(linear, config)
    else:
      linear = _read(layer[models.layout.norm_of(config, sublayer)], linear)
    fused_layer[sublayer][name] = linear
  return fused_layer


def fuse_embeddings(outer: models.Params, config: models.ModelConfig) -> models.Params:
  """The embeddings as RMSN can read them.

  Args:
    outer: what is outside the layers of a dense model.
    config: of the dense model.

  Returns:
    The tables, float64.
  """
  return _centred(_float64(outer['embed']), config)


def fuse_head(outer: models.Params, config: models.ModelConfig) -> models.Params:
  """The head without the norm before it, and without a tie to the embedding.

  Args:
    outer: what is outside the layers of a dense model.
    config: of the dense model.

  Returns:
    The head's parameters, float64.
  """
  tied = config.tied_head
  head = {'kernel': outer['embed']['tokens'].T} if tied else outer['head']
  return _read(_float64(outer['final_norm']), _float64(head))


def _read(norm: models.Params, linear: models.Params) -> models.Params:
  """A linear that reads `RMSN(x)` in place of the norm of x."""
  kernel = linear['kernel']
  fused_linear = linear | {'kernel': norm['scale'][:, None] * kernel}
  if 'bias' in norm:
    fused_linear['bias'] = linear.get('bias', 0) + norm['bias'] @ kernel
  return fused_linear


def _centred(arrays: models.Params, config: models.ModelConfig) -> models.Params:
  """What writes the residual stream, `[..., D]`, less the mean that LayerNorm drops."""
  if config.norm != 'layernorm':
    return arrays
  return {k: x - x.mean(axis=-1, keepdims=True) for k, x in arrays.items()}


def _float64(tree: Any) -> Any:
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)

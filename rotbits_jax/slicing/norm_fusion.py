r"""Norm fusion: rewrites a dense model so that its norms have no parameters.

    norm(x) = (x - mean(x)) / rms(x - mean(x)) * scale + bias

The scale is multiplied into the kernels that read the norm, and the bias is added to
their biases. LayerNorm subtracts the mean, RMSNorm does not. The mean is subtracted in
advance, from the rows of the embeddings and from the kernels and biases that write the
residual stream. The remaining norm is RMSN(x) = x / rms(x), which commutes with
rotations of x.

Reference: SliceGPT, arXiv 2401.15024, section 3.2.
"""

from typing import Any

import jax
import numpy as np

from rotbits_jax import models


def fuse_norms(model: models.Model) -> models.Model:
  """Fuses the norms of a model without slicing it.

  The result is a sliced model from which nothing is removed: every segment has the
  width D, every shortcut is the identity, and the head is not tied. Its function is the
  same, except that the epsilon of its norms is 1e-5.

  Args:
    model: a dense model.

  Returns:
    The fused model. Its leaves are float32 NumPy arrays.

  Raises:
    ValueError: if the model is already sliced.
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
  """Returns the config of a dense model after norm fusion.

  Raises:
    ValueError: if the config is that of a sliced model, or of a model with norms that
      cannot be fused.
  """
  if config.sliced:
    raise ValueError(f'only a dense model can be sliced, got {config.norm=}')
  return config.sliced_to(config.segment_widths)


def fuse_layer(layer: models.Params, config: models.ModelConfig) -> models.Params:
  """Fuses the norms of one layer into its sublayers.

  Args:
    layer: parameters of a layer of a dense model.
    config: config of the dense model.

  Returns:
    The parameters of the sublayers, float64, without norms and shortcuts.
  """
  layer = _float64(layer)
  fused_layer: models.Params = {name: {} for name in models.layout.SUBLAYERS}
  for path in models.layout.QK_NORMS:
    sublayer, name, _ = path.split('/')
    if name in layer[sublayer]:
      fused_layer[sublayer][name] = layer[sublayer][name]
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
  """Subtracts from the embeddings the mean that LayerNorm would subtract.

  Args:
    outer: the parameters outside the layers of a dense model.
    config: config of the dense model.

  Returns:
    The tables, float64.
  """
  return _centred(_float64(outer['embed']), config)


def fuse_head(outer: models.Params, config: models.ModelConfig) -> models.Params:
  """Fuses the final norm into the head, and unties the head from the embedding.

  Args:
    outer: the parameters outside the layers of a dense model.
    config: config of the dense model.

  Returns:
    The parameters of the head, float64.
  """
  tied = config.tied_head
  head = {'kernel': outer['embed']['tokens'].T} if tied else outer['head']
  return _read(_float64(outer['final_norm']), _float64(head))


def _read(norm: models.Params, linear: models.Params) -> models.Params:
  """Returns a linear layer that reads `RMSN(x)` in place of `norm(x)`."""
  kernel = linear['kernel']
  fused_linear = linear | {'kernel': norm['scale'][:, None] * kernel}
  if 'bias' in norm:
    fused_linear['bias'] = linear.get('bias', 0) + norm['bias'] @ kernel
  return fused_linear


def _centred(arrays: models.Params, config: models.ModelConfig) -> models.Params:
  """Subtracts the mean of the last axis `[..., D]`, if the model has LayerNorm."""
  if config.norm != 'layernorm':
    return arrays
  return {k: x - x.mean(axis=-1, keepdims=True) for k, x in arrays.items()}


def _float64(tree: Any) -> Any:
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)

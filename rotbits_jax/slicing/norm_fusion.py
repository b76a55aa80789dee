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


def fused(config: models.ModelConfig) -> models.ModelConfig:
  """Returns the config of a dense model after norm fusion; a ValueError if sliced."""
  if config.sliced:
    raise ValueError(f'only a dense model can be sliced, got {config.norm=}')
  return config.sliced_to(config.segment_widths)


def fuse_layer(layer: models.Params, config: models.ModelConfig) -> models.Params:
  """Returns the sublayers of a dense layer, float64, with its norms fused into them."""
  layer = _float64(layer)
  fused_layer: models.Params = {name: {} for name in models.layout.SUBLAYERS}
  for path in models.layout.QK_NORMS:
    sublayer, name, _ = path.split('/')
    if name in layer[sublayer]:
      fused_layer[sublayer][name] = layer[sublayer][name]
  for path, axes in models.layout.layer_axes(config).items():
    if path.endswith('/kernel'):
      sublayer, name, _ = path.split('/')
      linear = layer[sublayer][name]
      if isinstance(axes[0], int):  # it reads a segment, or else it writes one
        linear = _read(layer[models.layout.norm_of(config, sublayer)], linear)
      else:
        linear = _centred(linear, config)
      fused_layer[sublayer][name] = linear
  return fused_layer


def fuse_embeddings(outer: models.Params, config: models.ModelConfig) -> models.Params:
  """Returns the embeddings, float64, without the mean that LayerNorm would subtract."""
  return _centred(_float64(outer['embed']), config)


def fuse_head(outer: models.Params, config: models.ModelConfig) -> models.Params:
  """Returns the head, float64, untied, with the final norm fused into it."""
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
  """Returns the arrays of a tree as float64."""
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)

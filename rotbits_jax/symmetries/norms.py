"""Folding the scales of RMSNorms into the kernels that read the norms.

A scale multiplies the numbers of a segment one by one, and a rotation does not commute
with that. Therefore the residual stream of a dense model can be rotated only after the
scales have been multiplied into the kernels.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from rotbits_jax import models
from rotbits_jax import structured


def fold_norm_scales(
  params: dict[str, Any], config: models.ModelConfig, *, is_outer: bool = False
) -> dict[str, Any]:
  """Moves the scales of RMSNorms into the kernels that read them, in their old dtypes.

  The scales become leaves of one number, 1. The parameters are those of a layer of a
  dense model, or those outside the layers; a ValueError if it has other norms.

  >>> checkpoint = rotbits_jax.checkpoints.example('llama-tiny-dense')
  >>> model = rotbits_jax.load_checkpoint(checkpoint).model
  >>> folded = fold_norm_scales(structured.flatten(model.layer(0)), model.config)
  >>> float(folded['mlp_norm/scale'].value)
  1.0
  """
  if config.norm != 'rmsnorm':
    raise ValueError(f'{config.family}: only scales of RMSNorms can be folded')
  layout, folded = models.layout, dict(params)
  axes = layout.outer_axes(config) if is_outer else layout.layer_axes(config)
  for path, path_axes in axes.items():
    sublayer, is_reader = path.split('/')[0], isinstance(path_axes[0], int)
    if path in params and len(path_axes) == 2 and is_reader:
      norm = 'final_norm' if is_outer else layout.norm_of(config, sublayer)
      scale = params[f'{norm}/scale']
      folded[path] = _scale_rows(params[path], scale)
      folded[f'{norm}/scale'] = structured.Constant.like(scale, 1.0)
  return folded


def _scale_rows(kernel: Any, scale: jax.Array) -> Any:
  """Returns `diag(scale) @ kernel`, computed in float32, in the kernel's dtype."""
  pair = structured.pair(kernel)
  if pair is not None:
    return pair.replace(u=_scale_rows(pair.u, scale))
  chex.assert_shape(scale, (kernel.shape[-2],))
  product = kernel.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]
  return product.astype(kernel.dtype)

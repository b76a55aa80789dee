"""Folding the scales of RMSNorms into the kernels that read the norms.

A scale multiplies the numbers of a segment one by one, and a rotation does not commute
with that. Therefore the residual stream of a dense model can be rotated only after the
scales have been multiplied into the kernels.
"""

from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rotbits_jax import models
from rotbits_jax import structured


def scale_rows(kernel: Any, scale: jax.Array) -> Any:
  """Returns `diag(scale) @ kernel`, computed in float32, in the kernel's dtype.

  >>> scale_rows(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([10.0, 1.0])).tolist()
  [[10.0, 20.0], [3.0, 4.0]]

  Args:
    kernel: an array or a low-rank leaf, `[n, m]`.
    scale: `[n]`.
  """
  pair = structured.pair(kernel)
  if pair is not None:
    return pair.replace(u=scale_rows(pair.u, scale))
  chex.assert_shape(scale, (kernel.shape[0],))
  product = kernel.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]
  return product.astype(kernel.dtype)


def readers(config: models.ModelConfig, axes: models.layout.Axes) -> Iterator[Any]:
  """Yields the path of each kernel that reads a norm, and the path of its scale.

  Args:
    config: the config of a dense model.
    axes: `models.layout.layer_axes`, or `models.layout.outer_axes`.
  """
  for path, own in axes.items():
    if len(own) == 2 and isinstance(own[0], int):
      first = path.split('/')[0]
      is_head = first == 'head'
      norm = 'final_norm' if is_head else models.layout.norm_of(config, first)
      yield path, f'{norm}/scale'


def fold_norm_scales(
  params: dict[str, Any], config: models.ModelConfig, axes: models.layout.Axes
) -> dict[str, Any]:
  """Moves the scales of RMSNorms into the kernels that read them.

  Args:
    params: parameters of a layer, or parameters outside the layers, of a dense model,
      by path.
    config: its config.
    axes: see `readers`.

  Returns:
    The parameters in their old dtypes; the scales are 1.
  """
  folded = dict(params)
  for kernel, scale in readers(config, axes):
    folded[kernel] = scale_rows(params[kernel], params[scale])
    folded[scale] = jnp.ones_like(params[scale])
  return folded

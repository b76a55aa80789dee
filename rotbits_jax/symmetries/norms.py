"""Folding the scales of RMSNorms into the kernels that read the norms.

A scale multiplies the numbers of a segment one by one, and a rotation does not commute
with that. Therefore the residual stream of a dense model can be rotated only after the
scales have been multiplied into the kernels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rotbits_jax import models
from rotbits_jax import structured


def fold_norm_scales(
  flat: dict[str, Any], *, axes: tuple[Any, ...], norms: tuple[Any, ...]
) -> dict[str, Any]:
  """Moves the scales of RMSNorms into the kernels that read them.

  Args:
    flat: parameters of a layer, or parameters outside the layers, of a dense model, by
      path.
    axes: pairs of a path and the parameter's axes, see `models.layout`.
    norms: pairs of the first key of a path, and the name of the norm that kernels with
      such a path read.

  Returns:
    The parameters in their old dtypes; the scales are 1.
  """
  folded = dict(flat)
  for path, own in axes:
    norm = dict(norms).get(path.split('/')[0])
    if norm and len(own) == 2 and isinstance(own[0], int):
      folded[path] = scaled(flat[path], flat[f'{norm}/scale'])
  for path in flat:
    if path.endswith('_norm/scale'):
      folded[path] = jnp.ones_like(flat[path])
  return folded


def scaled(kernel: Any, scale: jax.Array) -> Any:
  """Returns `diag(scale) @ kernel`, computed in float32, in the kernel's dtype."""
  if isinstance(kernel, structured.FactorPair):
    pair = kernel.plain()
    return dataclasses.replace(pair, u=scaled(pair.u, scale))
  product = kernel.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]
  return product.astype(kernel.dtype)


def folded(config: models.ModelConfig, flat: dict[str, Any]) -> dict[str, Any]:
  """Folds the norm scales of a layer of a dense model; parameters are by path."""
  axes = tuple(models.layout.layer_axes(config).items())
  norms = [(x, models.layout.norm_of(config, x)) for x in models.layout.SUBLAYERS]
  return _fold_norm_scales(flat, axes=axes, norms=tuple(norms))


def folded_outer(config: models.ModelConfig, flat: dict[str, Any]) -> dict[str, Any]:
  """Folds the scale of the last norm into the head; parameters are by path."""
  axes = tuple(models.layout.outer_axes(config).items())
  return _fold_norm_scales(flat, axes=axes, norms=(('head', 'final_norm'),))


def with_constant_norms(flat: dict[str, Any]) -> dict[str, Any]:
  """Replaces scales of 1 by leaves that store no numbers."""
  return {
    path: structured.Constant.like(leaf, 1.0) if path.endswith('_norm/scale') else leaf
    for path, leaf in flat.items()
  }


_fold_norm_scales = jax.jit(fold_norm_scales, static_argnames=('axes', 'norms'))

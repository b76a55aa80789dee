"""Biases of attention that the output does not need, see `symmetries.biases`."""

from typing import Any

import jax
import jax.numpy as jnp

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import transform
from rotbits_jax.symmetries import biases

_KEY, _VALUE, _OUT = (f'attention/{name}/bias' for name in ('key', 'value', 'out'))


def remove_biases() -> transform.Transform:
  """Makes the transform that sets the biases of key and value to zero.

  The zeros are not stored. The bias of the key is removed if there is no RoPE. The bias
  of the value is removed if the output projection has a bias that can include it.

  Returns:
    A transform. Its notes name the biases that became zero, and those that did not
    because numbers are not finite or would be too large.
  """
  return transform.Transform(
    'biases', layers=_layers, takes='float32', carries_adapters=True
  )


def _layers(
  context: transform.Context, state: Any, first: int, layers: list[transform.Params]
) -> transform.Noted:
  valid = models.layout.symmetries(context.config)
  removed: list[dict[str, Any]] = [{} for _ in layers]  # greatest number, by path
  moved = {}
  for i, layer in enumerate(layers):
    if valid.key_bias and structured.is_plain(layer.get(_KEY)):
      removed[i][_KEY] = _greatest(layer[_KEY])
    if valid.values and all(structured.is_plain(layer.get(x)) for x in (_VALUE, _OUT)):
      kernel = structured.materialize(layer['attention/out/kernel'])
      moved[i] = _with_value_bias(
        layer[_OUT], layer[_VALUE], kernel, kv_heads=context.config.num_kv_heads
      )
      removed[i][_VALUE] = _greatest(moved[i])
  notes: list[list[transform.Note]] = [[] for _ in layers]
  for i, own in enumerate(jax.device_get(removed)):
    prefix, layer = models.names.prefix(first + i), layers[i]
    for path, greatest in own.items():
      details = {}
      if greatest <= context.limit(prefix + (_OUT if path == _VALUE else path)):
        layer[path] = structured.Constant.like(layer[path], 0.0)
        if path == _VALUE:
          layer[_OUT] = moved[i]
      else:
        details = {'obstacle': 'numbers that are not finite or would be too large'}
      notes[i].append(transform.note(prefix + path, layer[path], **details))
  return state, layers, notes


_greatest = jax.jit(lambda x: jnp.max(jnp.abs(x)))  # NaN if a number is NaN
_with_value_bias = jax.jit(biases.with_value_bias, static_argnames='kv_heads')

r"""Biases of attention that the output does not need.

The bias of the keys adds `q . b_k` to all scores of a query. The softmax ignores a
number that is added to all scores. With RoPE this does not hold, because RoPE rotates
queries and keys by different angles.

The attention weights of a query sum to 1. Therefore the bias of the values adds the
same vector to the output at every token, and the bias of the output can include it:

    (weights @ (x W_v + b_v)) W_o + b_o = (weights @ x W_v) W_o + (b_v W_o + b_o)

Here b_v is repeated for every query head that reads it.

Shape letters are those of `models.config`. Use `vmap` for several layers.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.symmetries import transform


def remove_biases() -> transform.Transform:
  """Makes the transform that sets the biases of key and value to zero.

  The zeros are not stored. The bias of the key is removed if there is no RoPE. The bias
  of the value is removed if the output projection has a bias that can include it.

  Returns:
    A transform. Its notes name the biases that became zero.
  """
  return transform.make('biases', layers=_layers)


def with_value_bias(
  out_bias: jax.Array, value_bias: jax.Array, kernel: jax.Array, *, kv_heads: int
) -> jax.Array:
  """Returns the output bias that includes the value bias: `b_o + b_v W_o`.

  Args:
    out_bias: `[d]`.
    value_bias: `[K h]`.
    kernel: W_o, `[H h, d]`.
    kv_heads: K.

  Returns:
    float32 `[d]`.
  """
  # H / K consecutive query heads read the same value head.
  heads = value_bias.astype(jnp.float32).reshape(kv_heads, 1, -1)
  groups = kernel.shape[0] // value_bias.shape[0]
  repeated = jnp.broadcast_to(heads, (kv_heads, groups, heads.shape[2])).reshape(-1)
  moved = jnp.matmul(repeated, kernel.astype(jnp.float32), precision='highest')
  return out_bias.astype(jnp.float32) + moved


def _layers(
  context: transform.Context, state: Any, first: int, layers: transform.Layers
) -> tuple[Any, transform.Layers, list[list[transform.Note]]]:
  config = context.config
  valid = models.layout.symmetries(config)
  rewritten, notes = [], []
  for index, layer in enumerate(layers, first):
    flat, removed = structured.flatten(layer), []
    bias: Any = flat.get('attention/key/bias')
    if valid.key_bias and structured.is_plain(bias) and bool(jnp.isfinite(bias).all()):
      removed.append('key')
    biases = [flat.get(f'attention/{name}/bias') for name in ('out', 'value')]
    if valid.values and all(map(structured.is_plain, biases)):
      kernel = structured.materialize(flat['attention/out/kernel'])
      moved = _with_value_bias(*biases, kernel, kv_heads=config.num_kv_heads)
      path = f'{models.names.layer(index)}/attention/out/bias'
      if bool(jnp.all(jnp.abs(moved) <= context.limit(path))):
        removed.append('value')
        flat['attention/out/bias'] = moved.astype(flat['attention/out/bias'].dtype)
    own = []
    for name in removed:
      path = f'attention/{name}/bias'
      flat[path] = structured.Constant.like(flat[path], 0.0)
      own.append(transform.note(models.names.prefix(index) + path, flat[path]))
    rewritten.append(structured.unflatten(flat))
    notes.append(own)
  return state, rewritten, notes


_with_value_bias = jax.jit(with_value_bias, static_argnames='kv_heads')

r"""Biases of attention that the output does not need.

A key's bias adds `q . b_k` to all scores of one query alike, which the softmax takes no
notice of, unless RoPE turns keys and queries apart. The weights of attention sum to 1,
so that a value's bias adds the same to the output at every token:

    (weights @ (x W_v + b_v)) W_o + b_o = (weights @ x W_v) W_o + (b_v W_o + b_o)

with b_v once for every query head that reads it.

Shape letters are those of `models.config`; N layers of a block. `vmap` over layers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.symmetries import transform


def remove_biases() -> transform.Transform:
  """The transform that puts zeros, which are not stored, for biases of key and value.

  The key's where there is no RoPE, the value's where the output projection has a bias
  that can take it up.

  Returns:
    A transform. Its notes name the biases that are zero now.
  """
  return transform.Transform('biases', _remove_biases)


def with_value_bias(
  out_bias: jax.Array, value_bias: jax.Array, kernel: jax.Array, *, kv_heads: int
) -> jax.Array:
  """The output's bias after it took up the value's: `b_o + b_v W_o`.

  Args:
    out_bias: `[d]`.
    value_bias: `[K h]`.
    kernel: W_o, `[H h, d]`.
    kv_heads: K.

  Returns:
    float32 `[d]`.
  """
  # H / K query heads in a row read the same value.
  heads = value_bias.astype(jnp.float32).reshape(kv_heads, 1, -1)
  groups = kernel.shape[0] // value_bias.shape[0]
  repeated = jnp.broadcast_to(heads, (kv_heads, groups, heads.shape[2])).reshape(-1)
  moved = jnp.matmul(repeated, kernel.astype(jnp.float32), precision='highest')
  return out_bias.astype(jnp.float32) + moved


def _remove_biases(
  model: models.Model,
) -> tuple[models.Model, list[transform.Note]]:
  config = model.config
  limit = transform.limit(model)
  layers: list[models.Params] = []
  notes: list[transform.Note] = []
  for group, size in enumerate(model.group_sizes):
    block = model.params[f'blocks_{group}']
    biases = {n: p.get('bias') for n, p in block['attention'].items()}
    sums = None
    if structured.is_plain(biases['value']) and structured.is_plain(biases['out']):
      kernel = structured.materialize(block['attention']['out']['kernel'])
      stacks = biases['out'], biases['value'], kernel
      sums = np.asarray(_with_value_biases(*stacks, kv_heads=config.num_kv_heads))
    for i in range(size):
      layer = models.unstack_layer(block, i)
      attention = dict(layer['attention'])
      removed = []
      key_is_idle = not config.rotary_dim and structured.is_plain(biases['key'])
      if key_is_idle and np.isfinite(np.float32(biases['key'][i])).all():
        removed.append('key')
      if sums is not None and np.all(np.abs(sums[i]) <= limit):
        removed.append('value')
        out = attention['out']
        attention['out'] = out | {'bias': sums[i].astype(out['bias'].dtype)}
      for name in removed:
        zero = structured.Constant.like(attention[name]['bias'], 0.0)
        attention[name] = attention[name] | {'bias': zero}
        path = f'layers.{len(layers)}/attention/{name}/bias'
        notes.append(transform.note(path, zero))
      layers.append(layer | {'attention': attention})
  rewritten = models.from_layers(
    config, model.outer(), layers, model.buffers, model.stored_as
  )
  return rewritten, notes


@functools.partial(jax.jit, static_argnames='kv_heads')
def _with_value_biases(*stacks: jax.Array, kv_heads: int) -> jax.Array:
  return jax.vmap(functools.partial(with_value_bias, kv_heads=kv_heads))(*stacks)

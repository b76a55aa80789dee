"""The forward pass of a dense or sliced decoder-only transformer, as pure functions.

    x_0     = embed[tokens] (+ positions)
    x_{s+1} = x_s @ M_s + sublayer_s(norm(x_s))
    logits  = norm(x_S) @ head

In a sliced model, `M_s` is the shortcut, a matrix that takes the residual stream from
segment s to segment s + 1. In a dense model it is the identity. With parallel blocks,
attention and MLP are one sublayer. `models.config` defines segments and sublayers.

The functions compute in float32, independent of the dtype of the parameters. A
parameter may be a structured leaf. Shapes are checked when the functions are traced;
`jax.jit` is left to the caller. Layers and sublayers also return the inputs of their
linear layers, because calibration and error feedback need them.

Shape letters are those of `models.config`. In addition:
  B  sequences                           T  tokens of a sequence
  N  layers of a stack                   r  coordinates of a head that RoPE rotates
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured
from rotbits_jax.models import config as config_lib
from rotbits_jax.models import layout
from rotbits_jax.models import meshes
from rotbits_jax.models import model as model_lib
from rotbits_jax.models import names

Params = model_lib.Params

ACTIVATIONS: dict[config_lib.Activation, Callable[[jax.Array], jax.Array]] = {
  'relu': jax.nn.relu,
  'gelu_new': lambda x: jax.nn.gelu(x, approximate=True),
  'silu': jax.nn.silu,
}

POSITION_OFFSET = 2  # OPT's position table begins with two unused rows


class Written(NamedTuple):
  """The residual stream after a layer, or the update that a sublayer adds to it."""

  x: jax.Array  # [B, T, d] float32
  inputs: Params  # of linear layers, [B, T, in] float32 in the places of their kernels


def logits(model: model_lib.Model, tokens: jax.Array) -> jax.Array:
  """Computes the next-token logits of a model.

  >>> path = rotbits_jax.checkpoints.example('llama-tiny-dense')
  >>> model = rotbits_jax.load_checkpoint(path).model
  >>> logits(model, jnp.array([[1, 2, 3]])).shape
  (1, 3, 69)

  Args:
    model: the model, dense or sliced; it may have structured leaves.
    tokens: `[B, T]` integers.
  """
  return forward(model.params, model.config, tokens)


@meshes.with_auto_axes
def forward(
  params: Params,
  config: config_lib.ModelConfig,
  tokens: jax.Array,
) -> jax.Array:
  """Computes the logits of a model from its parameters; an error names a wrong shape.

  Args:
    params: the parameters, see `Model.params`.
    tokens: `[B, T]` integers. A token outside the vocabulary makes its sequence NaN.

  Returns:
    `[B, T, V]` float32.
  """
  stacks = layout.check_params(params, config)
  if tokens.ndim != 2:
    raise ValueError(f'tokens must be [B, T], got {tokens.shape=}')
  with jax.default_matmul_precision('highest'):
    x = embed(params, config, tokens)
    for stack in stacks:
      x = _apply_stack(params[names.stack(stack)], config, x, len(stack))
    return unembed(params, config, x)[1]


def embed(
  params: Params,  # `embed`, and those that its leaves need
  config: config_lib.ModelConfig,
  tokens: jax.Array,
) -> jax.Array:
  """Embeds tokens, integers `[B, T]`, and adds learned embeddings of their positions.

  Returns:
    `[B, T, d]` float32, d of the first segment.
  """
  # A negative index would count from the end.
  tokens = jnp.where(tokens < 0, config.vocab_size, tokens)
  x = _rows(params['embed']['tokens'], tokens, params)
  if not config.learned_positions:
    return x
  most = config.learned_positions - POSITION_OFFSET
  length = tokens.shape[-1]
  if length > most:
    raise ValueError(f'the model has {most} positions, got {tokens.shape=}')
  positions = jnp.arange(length) + POSITION_OFFSET
  return x + _rows(params['embed']['positions'], positions, params)


def unembed(
  params: Params, config: config_lib.ModelConfig, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Applies the final norm and the head to the residual stream `[B, T, d]`, float32.

  Returns:
    The input of the head `[B, T, d]`, and its output `[B, T, V]`, the logits.
  """
  x = norm(params.get('final_norm'), config, x)
  if config.tied_head:
    return x, x @ float32(params['embed']['tokens']).T
  return x, linear(params['head'], x)


def layer(params: Params, config: config_lib.ModelConfig, x: jax.Array) -> Written:
  """Applies an unstacked layer to x, `[B, T, d]` float32: attention and MLP."""
  inputs: Params = {}

  def shortcut(name: str, x: jax.Array) -> jax.Array:
    if not config.sliced:
      return x
    inputs[name] = {'kernel': x}
    return linear(params[name], x)

  normed = norm(params.get('attention_norm'), config, x)
  attended = attention(params['attention'], config, normed)
  x = shortcut('attention_shortcut', x) + attended.x
  if not config.parallel_block:
    normed = norm(params.get('mlp_norm'), config, x)
    x = shortcut('mlp_shortcut', x)
  transformed = mlp(params['mlp'], config, normed)
  inputs |= {'attention': attended.inputs, 'mlp': transformed.inputs}
  return Written(x + transformed.x, inputs)


def attention(params: Params, config: config_lib.ModelConfig, x: jax.Array) -> Written:
  """Computes causal grouped-query attention of the normed input `[B, T, d]`."""

  def heads(name: str, count: int) -> jax.Array:
    return linear(params[name], x).reshape(*x.shape[:-1], count, config.head_dim)

  query = heads('query', config.num_heads)  # [B, T, H, h]
  key = heads('key', config.num_kv_heads)  # [B, T, K, h]
  value = heads('value', config.num_kv_heads)
  if config.qk_norm_eps is not None:
    query = _head_norm(params['query_norm'], config, query)
    key = _head_norm(params['key_norm'], config, key)
  positions = jnp.arange(x.shape[1])
  if config.rotary_dim:
    frequencies = rope_frequencies(config)
    query, key = rope(query, frequencies), rope(key, frequencies)
  distance = positions[:, None] - positions  # [T, T]
  seen = distance >= 0
  if config.sliding_window is not None:
    seen &= distance < config.sliding_window
  # H / K consecutive query heads read the same key-value head.
  query = query.reshape(*x.shape[:-1], config.num_kv_heads, -1, config.head_dim)
  scores = jnp.einsum('btkgh,bckh->bkgtc', query, key) * config.head_dim**-0.5
  weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
  mixed = jnp.einsum('bkgtc,bckh->btkgh', weights, value)
  mixed = mixed.reshape(*x.shape[:-1], config.num_heads * config.head_dim)
  inputs = {name: {'kernel': x} for name in ('query', 'key', 'value')}
  inputs['out'] = {'kernel': mixed}
  return Written(linear(params['out'], mixed), inputs)


def mlp(params: Params, config: config_lib.ModelConfig, x: jax.Array) -> Written:
  """Computes the MLP of the normed input `[B, T, d]`, see `ModelConfig.gated_mlp`."""
  activation = ACTIVATIONS[config.activation]
  inputs = {'up': {'kernel': x}}
  hidden = linear(params['up'], x)
  if config.gated_mlp:
    inputs['gate'] = {'kernel': x}
    hidden = activation(linear(params['gate'], x)) * hidden
  else:
    hidden = activation(hidden)
  inputs['down'] = {'kernel': hidden}
  return Written(linear(params['down'], hidden), inputs)


def linear(params: Any, x: jax.Array) -> jax.Array:
  """Computes `x @ kernel`, plus the bias if there is one; or calls a module with x."""
  if not isinstance(params, Mapping):
    return jnp.asarray(params(x))
  kernel = params['kernel']
  # qwix, which quantises Flax modules, sees a product of this form.
  is_leaf = structured.is_structured(kernel)
  y = kernel.apply(x) if is_leaf else jnp.dot(x, float32(kernel))
  return y + float32(params['bias']) if 'bias' in params else y


def float32(leaf: Any) -> jax.Array:
  """Returns a parameter in float32: a leaf's own dtype is coarser than its array."""
  if structured.is_structured(leaf):
    leaf = leaf.astype(jnp.float32).materialize()
  return jnp.asarray(leaf, jnp.float32)


def norm(
  params: Params | None, config: config_lib.ModelConfig, x: jax.Array
) -> jax.Array:
  """Norms x: `x / sqrt(sum(x^2) / D + eps)`, then scale and bias if there are any.

  D is the hidden size of the dense model, even where x is narrower, so SliceGPT's RMSN
  and RMSNorm are one formula. LayerNorm subtracts the mean first.
  """
  if config.norm == 'layernorm':
    x = x - jnp.mean(x, axis=-1, keepdims=True)
  x = _divided_by_rms(x, config.hidden_size, config.norm_eps)
  if params is None:
    return x
  x = x * float32(params['scale'])
  return x + float32(params['bias']) if 'bias' in params else x


def _head_norm(
  params: Params, config: config_lib.ModelConfig, x: jax.Array
) -> jax.Array:
  """Norms every head of `[B, T, H, h]`: RMSNorm, also in a sliced model."""
  assert config.qk_norm_eps is not None
  x = _divided_by_rms(x, config.head_dim, config.qk_norm_eps)
  return x * float32(params['scale'])


def _divided_by_rms(x: jax.Array, size: int, eps: float) -> jax.Array:
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(square / size + eps)


def rope(x: jax.Array, frequencies: np.ndarray) -> jax.Array:
  """Applies rotary position embedding to `[B, T, H, h]`, in Hugging Face's order.

  For `i < r/2`, the pair `(x_i, x_{i + r/2})` at position t is rotated by the angle
  `t frequencies_i`, of `[r/2]` frequencies. Coordinates from r on do not change.

  References:
    Su et al., arXiv 2104.09864, section 3.2.
  """
  half = frequencies.size
  steps = jnp.asarray(frequencies, jnp.float32)
  angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * steps
  angles = angles[None, :, None]  # [1, T, 1, r/2]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second, others = jnp.split(x, (half, 2 * half), axis=-1)
  rotated = (first * cos - second * sin, second * cos + first * sin, others)
  return jnp.concatenate(rotated, axis=-1)


def rope_frequencies(config: config_lib.ModelConfig) -> np.ndarray:
  """Returns RoPE's frequencies: `theta^(-2i/r)` for `i < r/2`, see `RopeScaling`.

  Returns:
    `[r/2]` float64, in radians per token.
  """
  half = config.rotary_dim // 2
  frequencies = config.rope_theta ** (-np.arange(half) / half)
  scaling = config.rope_scaling
  if scaling is None:
    return frequencies
  lowered = frequencies / scaling.factor
  if scaling.type_name == 'linear':
    return lowered
  turns = scaling.original_positions * frequencies / (2 * np.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return kept * frequencies + (1 - kept) * lowered


def _apply_stack(
  stack: Params, config: config_lib.ModelConfig, x: jax.Array, count: int
) -> jax.Array:
  """Applies the `count` layers of a stack."""
  if count > 1:
    step = lambda x, params: (layer(params, config, x).x, None)
    return jax.lax.scan(step, x, stack)[0]
  # A layer may change the width of the residual stream. A scan cannot, because its
  # carry keeps one shape.
  return layer(jax.tree.map(lambda leaf: leaf[0], stack), config, x).x


def _rows(table: Any, indices: jax.Array, params: Params) -> jax.Array:
  """Returns rows of a table in float32; rows outside the table are NaN."""
  if structured.is_structured(table):
    flat = structured.flatten(params)
    needed = [float32(flat[path]) for path in table.needs]
    return jnp.asarray(table.astype(jnp.float32).rows(*needed, indices))
  taken = jnp.asarray(table).at[indices].get(mode='fill', fill_value=jnp.nan)
  return taken.astype(jnp.float32)


# ---- layer by layer ------------------------------------------------------------------


def streams(model: Any, windows: Sequence[np.ndarray]) -> Iterator[list[jax.Array]]:
  """Computes the residual stream in front of each layer, and after the last one.

  Args:
    model: the model, dense or sliced; it may have structured leaves. A `Model`, a
      checkpoint on disk, or anything with its `config`, `outer()` and `layer(index)`.
    windows: the tokens of a text, integers `[B, T]` each.

  Yields:
    The stream of each window, float32 `[B, T, d]`.
  """
  config = model.config
  outer = model.outer()
  xs = [_embed(outer, config, window) for window in windows]
  del outer
  yield list(xs)
  for i in range(config.num_layers):
    params = jax.device_put(model.layer(i))
    for k, x in enumerate(xs):
      xs[k] = _layer(params, config, x)
    del params
    yield list(xs)


_embed = jax.jit(embed, static_argnums=1)


@functools.partial(jax.jit, static_argnums=1)
def _layer(params: Params, config: config_lib.ModelConfig, x: jax.Array) -> jax.Array:
  """Applies a layer."""
  with jax.default_matmul_precision('highest'):
    return layer(params, config, x).x

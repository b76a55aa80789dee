"""The forward pass of a dense or sliced decoder-only transformer.

In a sliced model, a shortcut is the matrix that maps one residual segment to the next
one; it takes the place of the identity of a dense model. `models.config` defines
segments and sublayers.

All computation is in float32, independent of the dtype of the parameters.

Shape letters are those of `models.config`. In addition:
  B  sequences                           T  tokens of a sequence
  C  rows of the cache, see `models.generation`; T without a cache
  r  numbers of a head that RoPE rotates
"""

from collections.abc import Callable
import itertools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import structured
from rotbits_jax.models import config as config_lib
from rotbits_jax.models import model as model_lib
from rotbits_jax.models import names
from rotbits_jax.models import shapes as shapes_lib

ACTIVATIONS: dict[config_lib.Activation, Callable[[jax.Array], jax.Array]] = {
  'relu': nn.relu,
  'gelu_new': lambda x: nn.gelu(x, approximate=True),
  'silu': nn.silu,
}

_MOMENTS = 'moments'  # the collection that `input_moments` fills

POSITION_OFFSET = 2  # OPT's position table begins with two unused rows


def logits(model: model_lib.Model, tokens: jax.Array) -> jax.Array:
  """Computes the next-token logits of a model.

  Args:
    model: the model, dense or sliced; it may have structured leaves.
    tokens: `[B, T]` integers.

  Returns:
    `[B, T, V]` float32.
  """
  transformer = Transformer(model.config, model.stacks)
  return jnp.asarray(transformer.apply({'params': model.params}, tokens))


def input_moments(model: model_lib.Model, tokens: jax.Array) -> model_lib.Params:
  """Computes the second moments of the inputs of every linear layer.

  Args:
    model: as for `logits`.
    tokens: `[B, T]` integers.

  Returns:
    The sum of `x^T x` over all inputs x `[in]` of a linear layer, float32 `[in, in]`,
    in the place of its kernel in the model's parameters; `[N, in, in]` in a stack of
    layers. The moments of a tied head are in the place of the token embedding.
  """
  transformer = Transformer(model.config, model.stacks)
  _, found = transformer.apply({'params': model.params}, tokens, mutable=[_MOMENTS])
  return dict(found[_MOMENTS])


class Transformer(nn.Module):
  """The whole model: embedding, layers, final norm and head.

      x_0     = embed[tokens] (+ positions)
      x_{s+1} = x_s @ M_s + sublayer_s(norm(x_s))
      logits  = norm(x_S) @ head

  `M_s` is the shortcut from segment s to segment s + 1 in a sliced model, and the
  identity in a dense model. With parallel blocks, attention and MLP are one sublayer.

  Attributes:
    config: sizes and switches.
    stacks: the layers of each `layers.I:J` of the parameters, in order.
    precision: precision of the matrix products, see `jax.lax.Precision`.
  """

  config: config_lib.ModelConfig
  stacks: tuple[range, ...]
  precision: str = 'highest'

  @nn.compact
  def __call__(self, tokens: jax.Array, start: jax.Array | int = 0) -> jax.Array:
    """Maps `[B, T]` tokens to `[B, T, V]` float32 logits.

    Args:
      tokens: `[B, T]` integers.
      start: how many earlier tokens have keys and values in the collection `cache`,
        see `Attention`.

    Returns:
      `[B, T, V]`.
    """
    config = self.config
    if [*itertools.chain(*self.stacks)] != [*range(config.num_layers)]:
      raise ValueError(
        f'the stacks must hold {config.num_layers} layers in order, got {self.stacks}'
      )
    with jax.default_matmul_precision(self.precision):
      embed = Embedding(config, name='embed')
      x = embed(tokens, self.variables.get('params', {}), start)
      for layers in self.stacks:
        widths = config.layer_widths(layers.start)
        block = Block(config, widths, name=names.stack(layers))
        x = _apply_stacked(block, len(layers), x, start)
      x = _norm(config, 'final_norm')(x)
      if config.tied_head:
        return embed.attend(x)
      return Linear(config.vocab_size, config.head_bias, name='head')(x)


class Embedding(nn.Module):
  """Token embedding, plus a position embedding if positions are learned."""

  config: config_lib.ModelConfig

  def setup(self) -> None:
    shapes = shapes_lib.outer_shapes(self.config)['embed']
    init = nn.initializers.normal(0.02)
    self.tokens = _parameter(self, 'tokens', shapes['tokens'], init)
    if self.config.learned_positions:
      self.positions = _parameter(self, 'positions', shapes['positions'], init)

  def __call__(
    self, tokens: jax.Array, params: Any, start: jax.Array | int = 0
  ) -> jax.Array:
    """Embeds tokens.

    Args:
      tokens: `[B, T]` integers.
      params: the model's parameters, from which a dependent token table is computed.
      start: how many tokens precede these.

    Returns:
      Float32 `[B, T, d]`, d of the first segment.
    """
    if isinstance(self.tokens, structured.Dependent):
      flat = structured.flatten(params)
      needed = [_float32(flat[path]) for path in self.tokens.needs]
      x = jax.tree.map(_upcast, self.tokens).rows(*needed, tokens)
    else:
      x = _take(self.tokens, tokens)
    rows = self.config.learned_positions
    if not rows:
      return x
    length = tokens.shape[-1]
    if length > rows - POSITION_OFFSET:
      raise ValueError(
        f'the model has {rows - POSITION_OFFSET} positions, got {tokens.shape=}'
      )
    return x + _take(self.positions, start + jnp.arange(length) + POSITION_OFFSET)

  def attend(self, x: jax.Array) -> jax.Array:
    """Applies the tied head: `x @ tokens.T`."""
    _sow_moments(self, 'tokens', x)
    return x @ _float32(self.tokens).T


class Block(nn.Module):
  """One layer: attention and MLP, one after the other or side by side.

  Attributes:
    config: sizes and switches.
    widths: widths of the layer's segments, see `ModelConfig.layer_widths`.
  """

  config: config_lib.ModelConfig
  widths: tuple[int, ...]

  @nn.compact
  def __call__(self, x: jax.Array, start: jax.Array | int = 0) -> jax.Array:
    attention = Attention(self.config, self.widths[1], name='attention')
    mlp = Mlp(self.config, self.widths[-1], name='mlp')
    if self.config.parallel_block:
      normed = _norm(self.config, 'attention_norm')(x)
      return self._shortcut('attention', x) + attention(normed, start) + mlp(normed)
    normed = _norm(self.config, 'attention_norm')(x)
    x = self._shortcut('attention', x) + attention(normed, start)
    normed = _norm(self.config, 'mlp_norm')(x)
    return self._shortcut('mlp', x) + mlp(normed)

  def _shortcut(self, sublayer: str, x: jax.Array) -> jax.Array:
    if not self.config.sliced:
      return x
    width = self.widths[1] if sublayer == 'attention' else self.widths[-1]
    return Linear(width, name=f'{sublayer}_shortcut')(x)


class Attention(nn.Module):
  """Causal grouped-query attention.

  The variables may have a collection `cache` with a `key` and a `value`, both
  `[B, C, K, h]`. Then the keys and values of the tokens are written into the cache from
  row `start` on, and the tokens also attend to the rows before `start`.

  Attributes:
    config: sizes and switches.
    features: width of the output.
  """

  config: config_lib.ModelConfig
  features: int

  @nn.compact
  def __call__(self, x: jax.Array, start: jax.Array | int = 0) -> jax.Array:
    config, h = self.config, self.config.head_dim
    positions = start + jnp.arange(x.shape[1])

    def heads(name: str, count: int) -> jax.Array:
      projected = Linear(count * h, config.qkv_bias, name=name)(x)
      return projected.reshape(*x.shape[:-1], count, h)

    query = heads('query', config.num_heads)  # [B, T, H, h]
    key = heads('key', config.num_kv_heads)  # [B, T, K, h]
    value = heads('value', config.num_kv_heads)
    if config.rotary_dim:
      frequencies = rope_frequencies(config)
      query = rope(query, positions, frequencies)
      key = rope(key, positions, frequencies)
    key = self._through_cache('key', key, start)  # [B, C, K, h]
    value = self._through_cache('value', value, start)
    distance = positions[:, None] - jnp.arange(key.shape[1])  # [T, C]
    seen = distance >= 0
    if config.sliding_window is not None:
      seen &= distance < config.sliding_window
    mixed = jax.nn.dot_product_attention(
      query, key, value, mask=seen[None, None], implementation='xla'
    )
    return Linear(self.features, config.out_bias, name='out')(
      mixed.reshape(*x.shape[:-1], config.num_heads * h)
    )

  def _through_cache(self, name: str, new: jax.Array, start: jax.Array | int) -> Any:
    """Writes new rows into the cache and returns all of it.

    Without a cache it returns the new rows.
    """
    if not self.has_variable('cache', name):
      return new
    cached: Any = self.get_variable('cache', name)
    cached = jax.lax.dynamic_update_slice_in_dim(cached, new, start, axis=1)
    self.put_variable('cache', name, cached)
    return cached


class Mlp(nn.Module):
  """The MLP: `down(act(up(x)))`, or with a gate `down(act(gate(x)) * up(x))`.

  Attributes:
    config: sizes and switches.
    features: width of the output.
  """

  config: config_lib.ModelConfig
  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config, activation = self.config, ACTIVATIONS[self.config.activation]
    hidden = Linear(config.intermediate_size, config.mlp_bias, name='up')(x)
    if config.gated_mlp:
      gate = Linear(config.intermediate_size, config.mlp_bias, name='gate')(x)
      hidden = activation(gate) * hidden
    else:
      hidden = activation(hidden)
    return Linear(self.features, config.mlp_bias, name='down')(hidden)


class Linear(nn.Module):
  """A linear layer, `x @ kernel + bias`; the kernel may be a structured leaf.

  Attributes:
    features: width of the output.
    use_bias: whether there is a bias.
  """

  features: int
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1], self.features)
    kernel = _parameter(self, 'kernel', shape, nn.initializers.lecun_normal())
    if isinstance(kernel, _FACTORED) and kernel.is_thin:
      y = kernel.apply(x)
    else:
      y = x @ _float32(kernel)
    _sow_moments(self, 'kernel', x)
    if not self.use_bias:
      return y
    bias = _parameter(self, 'bias', shape[1:], nn.initializers.zeros_init())
    return y + _float32(bias)


def rmsn(x: jax.Array, *, hidden_size: int, eps: float) -> jax.Array:
  """Applies SliceGPT's norm: `x / sqrt(sum(x^2) / D + eps)` for x of any width."""
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(square / hidden_size + eps)


def rope(x: jax.Array, positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
  """Applies rotary position embedding, in Hugging Face's order of the numbers.

  For `i < r/2`, the pair `(x_i, x_{i + r/2})` at position t is rotated by the angle
  `t frequencies_i`. The numbers of a head from r on do not change.

  Args:
    x: `[B, T, H, h]`.
    positions: `[T]` integers.
    frequencies: `[r/2]`, see `rope_frequencies`.

  Returns:
    `[B, T, H, h]`.

  References:
    Su et al., arXiv 2104.09864, section 3.2.
  """
  half = frequencies.size
  turns = jnp.asarray(frequencies, jnp.float32)
  angles = positions.astype(jnp.float32)[:, None] * turns
  angles = angles[None, :, None]  # [1, T, 1, r/2]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin, rest)
  return jnp.concatenate(turned, axis=-1)


def rope_frequencies(config: config_lib.ModelConfig) -> np.ndarray:
  """Returns RoPE's frequencies: `theta^(-2i/r)` for `i < r/2`, scaled by the config.

  Here r is `rotary_dim`; see `RopeScaling` for the scaling.

  Returns:
    `[r/2]` float64, in radians per token.
  """
  half = config.rotary_dim // 2
  frequencies = config.rope_theta ** (-np.arange(half) / half)
  scaling = config.rope_scaling
  if scaling is None:
    return frequencies
  lowered = frequencies / scaling.factor
  if scaling.kind == 'linear':
    return lowered
  turns = scaling.original_positions * frequencies / (2 * np.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return kept * frequencies + (1 - kept) * lowered


class DenseNorm(nn.Module):
  """A dense model's RMSNorm or LayerNorm; its parameters may be structured leaves.

  Attributes:
    config: sizes and switches.
  """

  config: config_lib.ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    eps, width = self.config.norm_eps, (self.config.hidden_size,)
    scale = _parameter(self, 'scale', width, nn.initializers.ones_init())
    if self.config.norm == 'rmsnorm':
      normed = nn.RMSNorm(eps, dtype=jnp.float32, use_scale=False)(x)
      return normed * _float32(scale)
    bias = _parameter(self, 'bias', width, nn.initializers.zeros_init())
    normed = nn.LayerNorm(
      eps, dtype=jnp.float32, use_scale=False, use_bias=False, use_fast_variance=False
    )(x)
    return normed * _float32(scale) + _float32(bias)


def _norm(config: config_lib.ModelConfig, name: str) -> Callable[[Any], jax.Array]:
  if config.norm == 'rmsn':
    return lambda x: rmsn(x, hidden_size=config.hidden_size, eps=config.norm_eps)
  return DenseNorm(config, name=name)


def _apply_stacked(
  block: Block, size: int, x: jax.Array, start: jax.Array | int
) -> jax.Array:
  """Applies the layers of a stack one after another."""
  stacked: dict[str, Any] = {
    'variable_axes': {'params': 0, 'cache': 0, _MOMENTS: 0},
    'split_rngs': {'params': True},
  }
  if size > 1:
    scan = nn.scan(
      lambda block, x, start: (block(x, start), None),
      length=size,
      in_axes=nn.broadcast,
      **stacked,
    )
    return scan(block, x, start)[0]
  # A layer may change the width of the residual stream. A scan cannot, because its
  # carry keeps one shape; so a stack of one layer is applied without a scan.
  vmap = nn.vmap(
    lambda block, x, start: block(x, start), in_axes=None, axis_size=1, **stacked
  )
  return vmap(block, x, start)[0]


def _parameter(
  module: nn.Module, name: str, shape: tuple[int, ...], init: Callable[..., Any]
) -> Any:
  """Returns a parameter as stored: an array of any float dtype or a structured leaf.

  `module.param` alone would mistake the arrays of a structured leaf for the parameter.
  """
  if not module.has_variable('params', name):
    return module.param(name, init, shape)
  leaf: Any = module.get_variable('params', name)
  if leaf.shape != shape:
    path = '/'.join((*module.path, name))
    raise ValueError(f'{path} must have shape {shape}, got {leaf.shape=}')
  return leaf


def _sow_moments(module: nn.Module, name: str, x: jax.Array) -> None:
  """Stores the moments of a matrix's inputs, if `input_moments` asks for them."""
  if module.is_mutable_collection(_MOMENTS) and not module.is_initializing():
    rows = x.reshape(-1, x.shape[-1])
    module.sow(_MOMENTS, name, rows.T @ rows, lambda _, new: new, lambda: None)


def _float32(leaf: Any) -> jax.Array:
  """Returns a parameter as a float32 array.

  A structured leaf is materialized in float32, so that it is not rounded to its dtype.
  """
  if not structured.is_structured(leaf):
    return jnp.asarray(leaf, jnp.float32)
  return jax.tree.map(_upcast, leaf).materialize().astype(jnp.float32)


def _upcast(array: Any) -> jax.Array:
  array = jnp.asarray(array)
  floating = jnp.issubdtype(array.dtype, jnp.floating)
  return array.astype(jnp.float32) if floating else array


def _take(table: Any, rows: jax.Array) -> jax.Array:
  """Returns rows of a table in float32; rows outside the table are NaN."""
  if isinstance(table, structured.UniformlyQuantized):
    return table.rows(rows).astype(jnp.float32)
  if structured.is_structured(table):
    table = _float32(table)
  taken = jnp.asarray(table).at[rows].get(mode='fill', fill_value=jnp.nan)
  return taken.astype(jnp.float32)


_FACTORED = (structured.IdentityMinusGram, structured.FactorPair)

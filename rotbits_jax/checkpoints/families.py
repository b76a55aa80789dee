"""The model families: the names of their tensors and of their config attributes.

A family is the set of models with one `model_type` in `config.json`. To add a family,
add a row to `FAMILIES`: the names of its tensors beside the parameters that they hold,
and a function that reads its `config.json`.

Parameters are named by paths, see `structured.flatten`.
"""

from collections.abc import Callable
import dataclasses
import re
from typing import NamedTuple

from rotbits_jax import models
from rotbits_jax.checkpoints import attributes
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import shared_attributes as shared

SHORTCUT_SUFFIX = '_Q'  # of the names of shortcuts
SHORTCUT_NAME = f'attn_shortcut{SHORTCUT_SUFFIX}'  # a tensor of every sliced layer

# Constants that old versions of transformers stored as tensors.
_BUFFERS = re.compile(
  r'.*\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(self_attn|attn)\.(masked_)?bias)'
)


class TensorRow(NamedTuple):
  """One tensor of a checkpoint.

  Attributes:
    name: name of the tensor, without the prefix of the layer if it belongs to a layer.
    paths: paths of the parameters that the tensor holds, stacked along its first axis.
    transposed: whether the tensor is `[out, in]` and the parameters are `[in, out]`.
  """

  name: str
  paths: tuple[str, ...]
  transposed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """How a checkpoint of a model family stores the parameters.

  The rows name the tensors of all models of the family. `models.outer_shapes` and
  `models.layer_shapes` say which of them a model with a given config has.

  Attributes:
    layer_prefix: the names of a layer's tensors begin with this prefix and the index of
      the layer.
    outer: the tensors outside the layers.
    layer: the tensors of a layer.
    parse: function that makes the config of the dense model from the attributes of
      `config.json`.
  """

  layer_prefix: str
  outer: tuple[TensorRow, ...]
  layer: tuple[TensorRow, ...]
  parse: Callable[[attributes.Attributes], models.ModelConfig]


def _table(name: str, path: str) -> tuple[TensorRow, ...]:
  return (TensorRow(f'{name}.weight', (path,)),)


def _norm(name: str, path: str) -> tuple[TensorRow, ...]:
  return (
    TensorRow(f'{name}.weight', (f'{path}/scale',)),
    TensorRow(f'{name}.bias', (f'{path}/bias',)),
  )


def _linear(name: str, *paths: str) -> tuple[TensorRow, ...]:
  return (
    TensorRow(f'{name}.weight', tuple(f'{p}/kernel' for p in paths), transposed=True),
    TensorRow(f'{name}.bias', tuple(f'{p}/bias' for p in paths)),
  )


_SHORTCUTS = (
  TensorRow(f'mlp_shortcut{SHORTCUT_SUFFIX}', ('mlp_shortcut/kernel',)),
  TensorRow(SHORTCUT_NAME, ('attention_shortcut/kernel',)),
)


def _opt(config: attributes.Attributes) -> models.ModelConfig:
  positions = config.size('max_position_embeddings', most=2**31 - 3)
  config.require(
    do_layer_norm_before=True,
    enable_bias=True,
    layer_norm_elementwise_affine=True,
    _remove_final_layer_norm=False,
    word_embed_proj_dim=config.size('hidden_size'),
  )
  return shared.decoder(
    config,
    family='opt',
    intermediate_size=config.size('ffn_dim'),
    num_kv_heads=config.size('num_attention_heads'),
    activation=shared.activation(config, 'activation_function', 'relu'),
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    norm='layernorm',
    norm_eps=1e-5,
    max_positions=positions,
    learned_positions=positions + 2,
    tied_head=config.boolean('tie_word_embeddings', True),
  )


def _llama(config: attributes.Attributes) -> models.ModelConfig:
  config.require(rope_interleaved=False)
  attention_bias = config.boolean('attention_bias', False)
  return shared.rotary_gated(
    config,
    family='llama',
    qkv_bias=attention_bias,
    out_bias=attention_bias,
    mlp_bias=config.boolean('mlp_bias', False),
  )


def _mistral(config: attributes.Attributes) -> models.ModelConfig:
  # These attributes have other defaults in Mistral's config than in Llama's.
  config.demand('max_position_embeddings', 'num_key_value_heads', 'sliding_window')
  window = shared.sliding_window(config)
  return shared.rotary_gated(config, family='mistral', sliding_window=window)


def _qwen2(config: attributes.Attributes) -> models.ModelConfig:
  shared.require_full_attention(config)
  config.require(use_mrope=False)
  return shared.rotary_gated(config, family='qwen2', qkv_bias=True)


def _qwen3(config: attributes.Attributes) -> models.ModelConfig:
  config.demand('head_dim')
  shared.require_full_attention(config)
  attention_bias = config.boolean('attention_bias', False)
  return shared.rotary_gated(
    config,
    family='qwen3',
    qkv_bias=attention_bias,
    out_bias=attention_bias,
    qk_norm_eps=shared.norm_eps(config),
  )


def _phi3(config: attributes.Attributes) -> models.ModelConfig:
  config.demand('max_position_embeddings', 'rms_norm_eps')
  config.require(attention_bias=False, rope_scaling=None)
  window = shared.sliding_window(config)
  return shared.rotary_gated(
    config, family='phi3', rotary_factor=1.0, sliding_window=window
  )


def _phi(config: attributes.Attributes) -> models.ModelConfig:
  config.require(qk_layernorm=False, tie_word_embeddings=False)
  return shared.rotary(
    config,
    family='phi',
    activation=shared.activation(config, 'hidden_act', 'gelu_new'),
    parallel_block=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    head_bias=True,
    norm='layernorm',
    norm_eps=config.number('layer_norm_eps', 1e-5),
    rotary_factor=0.5,
  )


_LLAMA = Family(
  layer_prefix='model.layers.',
  outer=(
    *_table('model.embed_tokens', 'embed/tokens'),
    *_norm('model.norm', 'final_norm'),
    *_linear('lm_head', 'head'),
  ),
  layer=(
    *_SHORTCUTS,
    *_linear('self_attn.q_proj', 'attention/query'),
    *_linear('self_attn.k_proj', 'attention/key'),
    *_linear('self_attn.v_proj', 'attention/value'),
    *_linear('self_attn.o_proj', 'attention/out'),
    *_linear('mlp.gate_proj', 'mlp/gate'),
    *_linear('mlp.up_proj', 'mlp/up'),
    *_linear('mlp.down_proj', 'mlp/down'),
    *_norm('input_layernorm', 'attention_norm'),
    *_norm('post_attention_layernorm', 'mlp_norm'),
  ),
  parse=_llama,
)


_QK_NORMS = (
  *_norm('self_attn.q_norm', 'attention/query_norm'),
  *_norm('self_attn.k_norm', 'attention/key_norm'),
)

FAMILIES: dict[str, Family] = {
  'opt': Family(
    layer_prefix='model.decoder.layers.',
    outer=(
      *_table('model.decoder.embed_tokens', 'embed/tokens'),
      *_table('model.decoder.embed_positions', 'embed/positions'),
      *_norm('model.decoder.final_layer_norm', 'final_norm'),
      *_linear('lm_head', 'head'),
    ),
    layer=(
      *_SHORTCUTS,
      *_linear('self_attn.k_proj', 'attention/key'),
      *_linear('self_attn.v_proj', 'attention/value'),
      *_linear('self_attn.q_proj', 'attention/query'),
      *_linear('self_attn.out_proj', 'attention/out'),
      *_norm('self_attn_layer_norm', 'attention_norm'),
      *_linear('fc1', 'mlp/up'),
      *_linear('fc2', 'mlp/down'),
      *_norm('final_layer_norm', 'mlp_norm'),
    ),
    parse=_opt,
  ),
  'llama': _LLAMA,
  'phi': Family(
    layer_prefix='model.layers.',
    outer=(
      *_table('model.embed_tokens', 'embed/tokens'),
      *_norm('model.final_layernorm', 'final_norm'),
      *_linear('lm_head', 'head'),
    ),
    layer=(
      *_SHORTCUTS,
      *_linear('self_attn.q_proj', 'attention/query'),
      *_linear('self_attn.k_proj', 'attention/key'),
      *_linear('self_attn.v_proj', 'attention/value'),
      *_linear('self_attn.dense', 'attention/out'),
      *_linear('mlp.fc1', 'mlp/up'),
      *_linear('mlp.fc2', 'mlp/down'),
      *_norm('input_layernorm', 'attention_norm'),
    ),
    parse=_phi,
  ),
  'phi3': dataclasses.replace(
    _LLAMA,
    layer=(
      *_SHORTCUTS,
      *_linear('self_attn.o_proj', 'attention/out'),
      *_linear(
        'self_attn.qkv_proj', 'attention/query', 'attention/key', 'attention/value'
      ),
      *_linear('mlp.gate_up_proj', 'mlp/gate', 'mlp/up'),
      *_linear('mlp.down_proj', 'mlp/down'),
      *_norm('input_layernorm', 'attention_norm'),
      *_norm('post_attention_layernorm', 'mlp_norm'),
    ),
    parse=_phi3,
  ),
  'mistral': dataclasses.replace(_LLAMA, parse=_mistral),
  'qwen2': dataclasses.replace(_LLAMA, parse=_qwen2),
  'qwen3': dataclasses.replace(_LLAMA, layer=(*_LLAMA.layer, *_QK_NORMS), parse=_qwen3),
}


def family(name: str) -> Family:
  """Returns a row of `FAMILIES`.

  Raises:
    CheckpointError: if the family is unknown. The message names the known families.
  """
  if name not in FAMILIES:
    raise errors.CheckpointError(
      f'unknown model family {name!r}; known: {", ".join(FAMILIES)}'
    )
  return FAMILIES[name]


def is_buffer(name: str) -> bool:
  """Returns whether the forward pass does not use a tensor with this name."""
  return _BUFFERS.fullmatch(name) is not None

"""The model families: the names of their tensors and of their config attributes.

A family is the set of models with one `model_type` in `config.json`. To add a family,
add a row to `FAMILIES`: the names of its modules beside their paths in a model, and a
dataclass of its attributes.
"""

import dataclasses
import re
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec

from rotbits_jax import models
from rotbits_jax.checkpoints import errors
from rotbits_jax.system import schema

MOST_LAYERS = 1 << 12
"""A bound for layers, because a config is read before tensors bound their number."""

SHORTCUT_SUFFIX = '_Q'  # of the names of shortcuts

# Constants that old versions of transformers stored as tensors.
_BUFFERS = re.compile(
  r'[^/]*\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(self_attn|attn)\.(masked_)?bias)'
)


def is_buffer(name: str) -> bool:
  """Returns whether the forward pass does not use a tensor with this name."""
  return _BUFFERS.fullmatch(name) is not None


# ---- the attributes of config.json ---------------------------------------------------

# A field has the name of the field of `models.ModelConfig` that it sets; `name` is the
# one in the file. Its annotation says which values are supported. An attribute whose
# field has no default must be present.

_Size = Annotated[int, schema.between(1, (1 << 31) - 1)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]
_Fraction = Annotated[float, msgspec.Meta(gt=0, le=1)]
_Activation = Literal['relu', 'gelu_new', 'gelu_pytorch_tanh', 'silu']
_RopeType = Literal['default', 'linear', 'llama3']
_named = msgspec.field


class Attributes(schema.Object, kw_only=True):
  """The attributes that all families have.

  Attributes:
    fixed: the supported value of attributes that have only one.
  """

  fixed: ClassVar[dict[str, Any]] = {
    'is_encoder_decoder': False,
    'add_cross_attention': False,
    'cross_attention_hidden_size': None,
    'pruned_heads': {},
  }

  family: str = _named(name='model_type')
  hidden_size: _Size
  num_layers: Annotated[int, schema.between(1, MOST_LAYERS)] = _named(
    name='num_hidden_layers'
  )
  num_heads: _Size = _named(name='num_attention_heads')
  vocab_size: _Size
  width_of_head: _Size | None = _named(default=None, name='head_dim')
  activation: _Activation
  parallel_block = False

  @classmethod
  def read(cls, values: dict[str, Any]) -> Self:
    """Makes the attributes from the values that may have an effect.

    Raises:
      ValueError: if one is missing, unknown or not supported.
    """
    left = dict(values)
    for name, expected in cls.fixed.items():
      value = left.pop(name, expected)
      if value != expected or isinstance(value, bool) != isinstance(expected, bool):
        raise ValueError(f'{name} is {value!r:.100}; supported: {expected}')
    return schema.load(cls, left)

  def config(self) -> models.ModelConfig:
    """Returns the config of the dense model; a ValueError if attributes do not fit."""
    names = models.ModelConfig.__struct_fields__
    fields = {name: getattr(self, name) for name in names if hasattr(self, name)}
    if self.activation == 'gelu_pytorch_tanh':  # two names of one function
      fields['activation'] = 'gelu_new'
    return models.ModelConfig(**fields)

  @property
  def head_dim(self) -> int:
    if self.width_of_head is None and self.hidden_size % self.num_heads:
      raise ValueError('num_attention_heads does not divide hidden_size')
    return self.width_of_head or self.hidden_size // self.num_heads

  @property
  def segment_widths(self) -> tuple[int, ...]:
    segments = self.num_layers * (1 if self.parallel_block else 2)
    return (self.hidden_size,) * (segments + 1)


class _Opt(Attributes, kw_only=True):
  fixed = Attributes.fixed | {
    'do_layer_norm_before': True,
    'enable_bias': True,
    'layer_norm_elementwise_affine': True,
    '_remove_final_layer_norm': False,
  }

  intermediate_size: _Size = _named(name='ffn_dim')
  max_positions: Annotated[int, schema.between(1, (1 << 31) - 3)] = _named(
    name='max_position_embeddings'
  )
  activation: _Activation = _named(default='relu', name='activation_function')
  tied_head: bool = _named(default=True, name='tie_word_embeddings')
  word_embed_proj_dim: _Size | None = None
  qkv_bias = out_bias = mlp_bias = True
  norm, norm_eps = 'layernorm', 1e-5

  def __post_init__(self) -> None:
    if self.word_embed_proj_dim not in (None, self.hidden_size):
      raise ValueError('word_embed_proj_dim differs from hidden_size')

  @property
  def num_kv_heads(self) -> int:
    return self.num_heads

  @property
  def learned_positions(self) -> int:
    return self.max_positions + 2


class _RopeScaling(schema.Object, kw_only=True):
  type: _RopeType | None = None  # the older name
  rope_type: _RopeType | None = None
  factor: _Positive | None = None
  low_freq_factor: _Positive | None = None
  high_freq_factor: _Positive | None = None
  original_max_position_embeddings: _Size | None = None

  def config(self) -> models.RopeScaling | None:
    """Returns the scaling; None for none."""
    rope_type = self.rope_type or self.type or 'default'
    if self.type not in (None, rope_type):
      raise ValueError('rope_scaling: type and rope_type differ')
    numbers = {
      'factor': self.factor,
      'low_freq_factor': self.low_freq_factor,
      'high_freq_factor': self.high_freq_factor,
      'original_positions': self.original_max_position_embeddings,
    }
    expected = [*numbers][: {'default': 0, 'linear': 1, 'llama3': 4}[rope_type]]
    present: dict[str, Any] = {k: x for k, x in numbers.items() if x is not None}
    if [*present] != expected:
      raise ValueError(
        f'rope_scaling: {rope_type} has the numbers {expected}, got {[*present]}'
      )
    if rope_type == 'default':
      return None
    return models.RopeScaling(type_name=rope_type, **present)


def older_rope(values: dict[str, Any]) -> dict[str, Any]:
  """Returns attributes with the settings of RoPE where transformers 4 reads them.

  transformers 5 gathers all settings in `rope_parameters`. Earlier versions have those
  of the scaling in `rope_scaling` and the others beside it. Versions differ in which of
  two they take, so two must be the same.

  Raises:
    CheckpointError: if they are not.
  """
  places = ('rope_parameters', 'rope_scaling')
  scaling, *others = [values[x] for x in places if values.get(x)] or [None]
  if scaling is None:
    return values
  if others or not isinstance(scaling, dict):
    raise errors.CheckpointError(f'expected an object in one of {", ".join(places)}')
  for name in scaling.keys() & values.keys():
    if values[name] not in (None, scaling[name]):
      raise errors.CheckpointError(
        f'there are two values of {errors.cut(name)}, of RoPE'
      )
  older = {name: value for name, value in values.items() if name not in places}
  outside = ('rope_theta', 'partial_rotary_factor')
  older |= {name: scaling[name] for name in outside if name in scaling}
  scaling = {name: value for name, value in scaling.items() if name not in outside}
  default = {'rope_type': 'default'}
  return older if scaling == default else older | {'rope_scaling': scaling}


class _Rotary(Attributes, kw_only=True):
  intermediate_size: _Size
  groups: _Size | None = _named(default=None, name='num_key_value_heads')
  positions: _Size | None = _named(default=None, name='max_position_embeddings')
  rope_theta: _Positive = 10000.0
  scaling: _RopeScaling | None = _named(default=None, name='rope_scaling')
  partial_rotary_factor: _Fraction = 1.0

  @property
  def num_kv_heads(self) -> int:
    return self.groups or self.num_heads

  @property
  def max_positions(self) -> int:
    return self.positions or 2048

  @property
  def rope_scaling(self) -> models.RopeScaling | None:
    return self.scaling and self.scaling.config()

  @property
  def rotary_dim(self) -> int:
    rotary_dim = int(self.head_dim * self.partial_rotary_factor)
    if rotary_dim % 2 or not rotary_dim:
      raise ValueError(f'partial_rotary_factor rotates {rotary_dim} elements of a head')
    return rotary_dim


class _Phi(_Rotary, kw_only=True):
  fixed = Attributes.fixed | {'qk_layernorm': False, 'tie_word_embeddings': False}

  activation: _Activation = _named(default='gelu_new', name='hidden_act')
  norm_eps: _Positive = _named(default=1e-5, name='layer_norm_eps')
  partial_rotary_factor: _Fraction = 0.5
  norm = 'layernorm'
  parallel_block = qkv_bias = out_bias = mlp_bias = head_bias = True


class _Gated(_Rotary, kw_only=True):
  """A family that resembles Llama."""

  # transformers rotates the whole head, whatever this attribute says.
  fixed = Attributes.fixed | {'partial_rotary_factor': 1.0}

  activation: _Activation = _named(default='silu', name='hidden_act')
  norm_eps: _Positive = _named(default=1e-6, name='rms_norm_eps')
  tied_head: bool = _named(default=False, name='tie_word_embeddings')
  norm = 'rmsnorm'
  gated_mlp = True


class _Llama(_Gated, kw_only=True):
  fixed = _Gated.fixed | {'rope_interleaved': False}

  qkv_bias: bool = _named(default=False, name='attention_bias')
  mlp_bias: bool = False

  @property
  def out_bias(self) -> bool:
    return self.qkv_bias


class _Mistral(_Gated, kw_only=True):
  # Mistral's defaults differ from Llama's.
  positions: _Size | None = _named(name='max_position_embeddings')
  groups: _Size | None = _named(name='num_key_value_heads')
  sliding_window: _Size | None


class _Phi3(_Gated, kw_only=True):
  fixed = Attributes.fixed | {'attention_bias': False, 'rope_scaling': None}

  positions: _Size | None = _named(name='max_position_embeddings')
  norm_eps: _Positive = _named(name='rms_norm_eps')
  sliding_window: _Size | None = None


class _Qwen(_Gated, kw_only=True):
  fixed = _Gated.fixed | {'use_sliding_window': False, 'use_mrope': False}

  positions: _Size | None = _named(name='max_position_embeddings')
  groups: _Size | None = _named(name='num_key_value_heads')
  unused_window: Any = _named(default=None, name='sliding_window')
  max_window_layers: Any = None
  layer_types: tuple[Literal['full_attention'], ...] | None = None

  def __post_init__(self) -> None:
    types = self.layer_types
    if types is not None and len(types) != self.num_layers:
      raise ValueError('layer_types has not as many entries as num_hidden_layers')


class _Qwen2(_Qwen, kw_only=True):
  qkv_bias = True


class _Qwen3(_Qwen, kw_only=True):
  width_of_head: _Size = _named(name='head_dim')
  qkv_bias: bool = _named(default=False, name='attention_bias')

  @property
  def out_bias(self) -> bool:
    return self.qkv_bias

  @property
  def qk_norm_eps(self) -> float:
    return self.norm_eps


# Attributes that do not affect the function of a trained model.
WITHOUT_EFFECT = frozenset([
  '_attn_implementation', '_attn_implementation_autoset',
  '_attn_implementation_internal', '_commit_hash', '_flash_attn_2_enabled',
  '_name_or_path', 'activation_dropout', 'architectures', 'attention_dropout',
  'auto_map', 'bad_words_ids', 'begin_suppress_tokens', 'bos_token_id',
  'chunk_size_feed_forward', 'decoder_start_token_id', 'diversity_penalty',
  'do_sample', 'dropout', 'dtype', 'early_stopping', 'embd_pdrop',
  'encoder_no_repeat_ngram_size', 'eos_token_id', 'exponential_decay_length_penalty',
  'finetuning_task', 'forced_bos_token_id', 'forced_eos_token_id',
  'gradient_checkpointing', 'id2label', 'init_std', 'initializer_range', 'is_decoder',
  'is_llama_config', 'label2id', 'layerdrop', 'length_penalty', 'max_length',
  'max_sequence_length', 'min_length', 'no_repeat_ngram_size', 'num_beam_groups',
  'num_beams', 'num_return_sequences', 'original_max_position_embeddings',
  'output_attentions', 'output_hidden_states', 'output_projection', 'output_scores',
  'pad_token_id', 'prefix', 'pretraining_tp', 'problem_type', 'remove_invalid_values',
  'repetition_penalty', 'resid_pdrop', 'return_dict', 'return_dict_in_generate',
  'sep_token_id', 'suppress_tokens', 'task_specific_params', 'temperature',
  'tf_legacy_loss', 'tie_encoder_decoder', 'tokenizer_class', 'top_k', 'top_p',
  'torch_dtype', 'torchscript', 'transformers.js_config', 'transformers_version',
  'truncation_ranks', 'typical_p', 'unsloth_version', 'use_bfloat16', 'use_cache',
])  # fmt: skip


# ---- the names of modules ------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """How the checkpoints of a model family store the parameters.

  The modules are those of all models of the family. `models.outer_shapes` and
  `models.layer_shapes` say which of them a model with a given config has. A module may
  hold those of several modules here, stacked along the first axis of its tensors.

  Attributes:
    layer_prefix: the names of a layer's tensors begin with this prefix and the index of
      the layer.
    outer: the paths of modules outside the layers, by their names in the checkpoint.
    layer: those of modules in a layer.
    attributes: dataclass of the attributes of `config.json`.
  """

  layer_prefix: str = 'model.layers.'
  outer: dict[str, str]
  layer: dict[str, str]
  attributes: type[Attributes]


_SHORTCUTS = {'mlp_shortcut': 'mlp_shortcut', 'attn_shortcut': 'attention_shortcut'}
_NORMS = {'input_layernorm': 'attention_norm', 'post_attention_layernorm': 'mlp_norm'}
_QUERY_KEY_VALUE = {
  'self_attn.q_proj': 'attention/query',
  'self_attn.k_proj': 'attention/key',
  'self_attn.v_proj': 'attention/value',
}
_LLAMA = Family(
  outer={
    'model.embed_tokens': 'embed/tokens',
    'model.norm': 'final_norm',
    'lm_head': 'head',
  },
  layer={
    **_SHORTCUTS,
    **_QUERY_KEY_VALUE,
    'self_attn.o_proj': 'attention/out',
    'mlp.gate_proj': 'mlp/gate',
    'mlp.up_proj': 'mlp/up',
    'mlp.down_proj': 'mlp/down',
    **_NORMS,
  },
  attributes=_Llama,
)
_QK_NORMS = {
  'self_attn.q_norm': 'attention/query_norm',
  'self_attn.k_norm': 'attention/key_norm',
}
FAMILIES: dict[str, Family] = {
  'opt': Family(
    layer_prefix='model.decoder.layers.',
    outer={
      'model.decoder.embed_tokens': 'embed/tokens',
      'model.decoder.embed_positions': 'embed/positions',
      'model.decoder.final_layer_norm': 'final_norm',
      'lm_head': 'head',
    },
    layer={
      **_SHORTCUTS,
      'self_attn.k_proj': 'attention/key',
      'self_attn.v_proj': 'attention/value',
      'self_attn.q_proj': 'attention/query',
      'self_attn.out_proj': 'attention/out',
      'self_attn_layer_norm': 'attention_norm',
      'fc1': 'mlp/up',
      'fc2': 'mlp/down',
      'final_layer_norm': 'mlp_norm',
    },
    attributes=_Opt,
  ),
  'llama': _LLAMA,
  'phi': Family(
    outer={
      'model.embed_tokens': 'embed/tokens',
      'model.final_layernorm': 'final_norm',
      'lm_head': 'head',
    },
    layer={
      **_SHORTCUTS,
      **_QUERY_KEY_VALUE,
      'self_attn.dense': 'attention/out',
      'mlp.fc1': 'mlp/up',
      'mlp.fc2': 'mlp/down',
      'input_layernorm': 'attention_norm',
    },
    attributes=_Phi,
  ),
  'phi3': Family(
    outer=_LLAMA.outer,
    layer={
      **_SHORTCUTS,
      'self_attn.o_proj': 'attention/out',
      'self_attn.qkv_proj': 'attention/query attention/key attention/value',
      'mlp.gate_up_proj': 'mlp/gate mlp/up',
      'mlp.down_proj': 'mlp/down',
      **_NORMS,
    },
    attributes=_Phi3,
  ),
  'mistral': dataclasses.replace(_LLAMA, attributes=_Mistral),
  'qwen2': dataclasses.replace(_LLAMA, attributes=_Qwen2),
  'qwen3': Family(
    outer=_LLAMA.outer, layer=_LLAMA.layer | _QK_NORMS, attributes=_Qwen3
  ),
}

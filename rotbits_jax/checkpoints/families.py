"""The model families, `config.json`, and the slicing JSON of sliced models.

A family is the set of models with one `model_type` in `config.json`. To add a family,
add a row to `FAMILIES`.
"""

import dataclasses
import json
import re
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from rotbits_jax import models
from rotbits_jax.checkpoints import errors
from rotbits_jax.system import schema

CONFIG = 'config.json'

_MOST_CONFIG = 1 << 20  # bytes; configs have a few thousand
_MOST_LAYERS = 1 << 12  # because a config is read before tensors bound their number

SHORTCUT_SUFFIX = '_Q'  # of the names of shortcuts

# Names of the tensors that the forward pass does not use: constants that old versions
# of transformers stored.
BUFFERS = re.compile(
  r'[^/]*\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(self_attn|attn)\.(masked_)?bias)'
)


_Size = Annotated[int, schema.between(1, (1 << 31) - 3)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]
_Fraction = Annotated[float, msgspec.Meta(gt=0, le=1)]
_Activation = Literal['relu', 'gelu_new', 'gelu_pytorch_tanh', 'silu']

# The attributes that set a field of `models.ModelConfig`, and the supported values.
_ATTRIBUTES: dict[str, tuple[str, Any]] = {
  'hidden_size': ('hidden_size', _Size),
  'num_hidden_layers': ('num_layers', Annotated[int, schema.between(1, _MOST_LAYERS)]),
  'num_attention_heads': ('num_heads', _Size),
  'num_key_value_heads': ('num_kv_heads', _Size | None),
  'head_dim': ('head_dim', _Size | None),
  'vocab_size': ('vocab_size', _Size),
  'intermediate_size': ('intermediate_size', _Size),
  'ffn_dim': ('intermediate_size', _Size),
  'max_position_embeddings': ('max_positions', _Size | None),
  'hidden_act': ('activation', _Activation),
  'activation_function': ('activation', _Activation),
  'layer_norm_eps': ('norm_eps', _Positive),
  'rms_norm_eps': ('norm_eps', _Positive),
  'attention_bias': ('qkv_bias', bool),
  'mlp_bias': ('mlp_bias', bool),
  'tie_word_embeddings': ('tied_head', bool),
  'sliding_window': ('sliding_window', _Size | None),
  'rope_theta': ('rope_theta', _Positive),
  'rope_scaling': ('rope_scaling', dict[str, Any] | None),
  'partial_rotary_factor': ('rotary_factor', _Fraction),
  'layer_types': ('layer_types', tuple[Literal['full_attention'], ...] | None),
}

# Attributes that do not affect the function of a trained model, or only in a family
# that has them among its `attributes`.
_WITHOUT_EFFECT = frozenset([
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
  'max_sequence_length', 'max_window_layers', 'min_length', 'no_repeat_ngram_size',
  'num_beam_groups', 'num_beams', 'num_return_sequences',
  'original_max_position_embeddings', 'output_attentions', 'output_hidden_states',
  'output_projection', 'output_scores', 'pad_token_id', 'prefix', 'pretraining_tp',
  'problem_type', 'remove_invalid_values', 'repetition_penalty', 'resid_pdrop',
  'return_dict', 'return_dict_in_generate', 'sep_token_id', 'sliding_window',
  'suppress_tokens', 'task_specific_params', 'temperature', 'tf_legacy_loss',
  'tie_encoder_decoder', 'tokenizer_class', 'top_k', 'top_p', 'torch_dtype',
  'torchscript', 'transformers.js_config', 'transformers_version', 'truncation_ranks',
  'typical_p', 'unsloth_version', 'use_bfloat16', 'use_cache', 'word_embed_proj_dim',
])  # fmt: skip

# The only value of attributes in all families.
_ONLY: dict[str, Any] = {'cross_attention_hidden_size': None, 'pruned_heads': {}}
_ONLY |= dict.fromkeys(('is_encoder_decoder', 'add_cross_attention'), False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """How the checkpoints of a model family store a model and its config.

  The modules are those of all models of the family. `models.outer_shapes` and
  `models.layer_shapes` say which of them a model with a given config has. A module may
  hold several of a model's, stacked along the first axis of its tensors.
  """

  layer_prefix: str = 'model.layers.'  # of names, before the index of a layer
  outer: dict[str, str]  # paths of modules by their names in the checkpoint
  layer: dict[str, str]  # those of modules in a layer
  attributes: dict[str, Any]  # of `config.json`, with defaults; `...` if there is none
  only: dict[str, Any]  # the attributes of which one value is supported
  fields: dict[str, Any]  # of the config, which no attribute sets


def _dense(family: Family, values: dict[str, Any]) -> models.ModelConfig:
  """Makes the config of a dense model from the content of `config.json`."""
  left = {**older_rope(values)}
  for name, expected in (_ONLY | family.only).items():
    value = left.pop(name, expected)
    if value != expected or isinstance(value, bool) != isinstance(expected, bool):
      raise ValueError(f'{name} is {value!r:.100}; supported: {expected}')
  fields = family.fields | {'family': left.pop('model_type')}
  for name, default in family.attributes.items():
    field, annotation = _ATTRIBUTES[name]
    if name in left:
      fields[field] = schema.load(annotation, left.pop(name), name)
    elif default is ...:
      raise ValueError(f'{name} is missing')
    else:
      fields[field] = default
  if unknown := left.keys() - _WITHOUT_EFFECT:
    raise ValueError(f'there is no attribute {errors.cut(min(unknown))}')
  heads, hidden = fields['num_heads'], fields['hidden_size']
  fields.pop('layer_types', None)
  head_dim = fields['head_dim'] or hidden // heads
  positions = fields['max_positions'] or 2048
  if fields['activation'] == 'gelu_pytorch_tanh':  # two names of one function
    fields['activation'] = 'gelu_new'
  if 'embed/positions' in family.outer.values():
    fields['learned_positions'] = positions + 2
  else:
    rotary_dim = int(head_dim * fields.pop('rotary_factor', 1.0))
    if rotary_dim % 2 or not rotary_dim:
      text = f'rotates {rotary_dim} of {head_dim} elements'
      raise ValueError(f'partial_rotary_factor {text}')
    scaling = _rope_scaling(fields.get('rope_scaling') or {})
    fields |= {'rotary_dim': rotary_dim, 'rope_scaling': scaling}
  if 'attention/query_norm' in family.layer.values():
    fields['qk_norm_eps'] = fields['norm_eps']
  segments = fields['num_layers'] * (1 if fields.get('parallel_block') else 2)
  fields['head_dim'], fields['max_positions'] = head_dim, positions
  fields['num_kv_heads'] = fields.get('num_kv_heads') or heads
  fields['segment_widths'] = (hidden,) * (segments + 1)
  fields.setdefault('out_bias', fields.get('qkv_bias', False))
  return models.ModelConfig(**fields)


def _rope_scaling(settings: dict[str, Any]) -> models.RopeScaling | None:
  """Returns how frequencies are lowered; None if they are not."""
  renamed = {name: name for name in ('factor', 'low_freq_factor', 'high_freq_factor')}
  renamed |= {'original_max_position_embeddings': 'original_positions'}
  counts = {'default': 0, 'linear': 1, 'llama3': 4}
  older = settings.get('type', 'default')
  rope_type = settings.get('rope_type', older)
  expected = [*renamed][: counts.get(str(rope_type))]
  values = {x: settings[x] for x in settings if x not in ('type', 'rope_type')}
  if older not in ('default', rope_type) or values.keys() != {*expected}:
    raise ValueError(f'rope_scaling is {settings!r:.200}, which is not supported')
  fields = {renamed[name]: value for name, value in values.items()}
  fields['type_name'] = rope_type
  return schema.load(models.RopeScaling, fields, 'rope_scaling') if values else None


def older_rope(values: dict[str, Any]) -> dict[str, Any]:
  """Returns attributes with the settings of RoPE where transformers 4 reads them.

  transformers 5 gathers all settings in `rope_parameters`. Versions differ in which of
  two values they take, so two must be the same.
  """
  places = ('rope_parameters', 'rope_scaling')
  scaling, *others = [values[x] for x in places if values.get(x)] or [None]
  if scaling is None:
    return values
  if others or not isinstance(scaling, dict):
    raise errors.CheckpointError(f'expected an object in one of {", ".join(places)}')
  for name in scaling.keys() & values.keys():
    if values[name] not in (None, scaling[name]):
      raise errors.CheckpointError(f'RoPE has two values of {errors.cut(name)}')
  older = {name: value for name, value in values.items() if name not in places}
  outside = ('rope_theta', 'partial_rotary_factor')
  older |= {name: scaling[name] for name in outside if name in scaling}
  scaling = {name: value for name, value in scaling.items() if name not in outside}
  default = {'rope_type': 'default'}
  return older if scaling == default else older | {'rope_scaling': scaling}


_SHORTCUTS = {'mlp_shortcut': 'mlp_shortcut', 'attn_shortcut': 'attention_shortcut'}
_NORMS = {'input_layernorm': 'attention_norm', 'post_attention_layernorm': 'mlp_norm'}
_QUERY_KEY_VALUE = {
  'self_attn.q_proj': 'attention/query',
  'self_attn.k_proj': 'attention/key',
  'self_attn.v_proj': 'attention/value',
}
_REQUIRED = ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'vocab_size')
_SIZES: dict[str, Any] = {**dict.fromkeys(_REQUIRED, ...), 'head_dim': None}
_BIASES = dict.fromkeys(('qkv_bias', 'out_bias', 'mlp_bias'), True)
_ROTARY = {
  **_SIZES,
  'intermediate_size': ...,
  'num_key_value_heads': None,
  'max_position_embeddings': None,
  'rope_theta': 10000.0,
  'rope_scaling': None,
}
_GATED = {
  **_ROTARY,
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-6,
  'tie_word_embeddings': False,
}
_WHOLE_HEAD = {'partial_rotary_factor': 1.0}  # transformers ignores other values


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
  attributes={**_GATED, 'attention_bias': False, 'mlp_bias': False},
  only={**_WHOLE_HEAD, 'rope_interleaved': False},
  fields={'norm': 'rmsnorm', 'gated_mlp': True},
)
_GROUPS = {'max_position_embeddings': ..., 'num_key_value_heads': ...}
_QWEN2 = dataclasses.replace(
  _LLAMA,
  attributes={**_GATED, **_GROUPS, 'layer_types': None},
  only={**_WHOLE_HEAD, 'use_sliding_window': False, 'use_mrope': False},
  fields=_LLAMA.fields | {'qkv_bias': True, 'out_bias': False},
)
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
    attributes={
      **_SIZES,
      'ffn_dim': ...,
      'max_position_embeddings': ...,
      'activation_function': 'relu',
      'tie_word_embeddings': True,
    },
    only={
      'do_layer_norm_before': True,
      'enable_bias': True,
      'layer_norm_elementwise_affine': True,
      '_remove_final_layer_norm': False,
    },
    fields={**_BIASES, 'norm': 'layernorm', 'norm_eps': 1e-5},
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
    attributes={
      **_ROTARY,
      'hidden_act': 'gelu_new',
      'layer_norm_eps': 1e-5,
      'partial_rotary_factor': 0.5,
    },
    only={'qk_layernorm': False, 'tie_word_embeddings': False},
    fields={**_BIASES, 'norm': 'layernorm', 'head_bias': True, 'parallel_block': True},
  ),
  'phi3': dataclasses.replace(
    _LLAMA,
    layer={
      **_SHORTCUTS,
      'self_attn.o_proj': 'attention/out',
      'self_attn.qkv_proj': 'attention/query attention/key attention/value',
      'mlp.gate_up_proj': 'mlp/gate mlp/up',
      'mlp.down_proj': 'mlp/down',
      **_NORMS,
    },
    attributes={
      **_GATED,
      'max_position_embeddings': ...,
      'rms_norm_eps': ...,
      'partial_rotary_factor': 1.0,
      'sliding_window': None,
    },
    only={'attention_bias': False, 'rope_scaling': None},
  ),
  'mistral': dataclasses.replace(
    _LLAMA,
    attributes={**_GATED, **_GROUPS, 'sliding_window': ...},
    only=_WHOLE_HEAD,
  ),
  'qwen2': _QWEN2,
  'qwen3': dataclasses.replace(
    _QWEN2,
    layer={
      **_LLAMA.layer,
      'self_attn.q_norm': 'attention/query_norm',
      'self_attn.k_norm': 'attention/key_norm',
    },
    attributes={**_QWEN2.attributes, 'head_dim': ..., 'attention_bias': False},
    fields=_LLAMA.fields,
  ),
}


def parse_object(
  content: bytes, where: str, *, most: int = _MOST_CONFIG
) -> dict[str, Any]:
  """Parses a JSON file of a checkpoint, which errors call `where`.

  `most` bytes are the limit, which bounds memory: the object may take 30 times as much.
  """
  if len(content) > most:
    raise errors.CheckpointError(f'{where}: the JSON has more than {most} bytes')
  with errors.named(where, ValueError):
    parsed = schema.decode(Any, content)
  if not isinstance(parsed, dict):
    text = errors.cut(repr(parsed))
    raise errors.CheckpointError(f'{where}: expected an object, got {text}')
  return parsed


def parse_config(
  config_json: dict[str, Any],
  slicing_json: dict[str, Any] | None = None,
) -> models.ModelConfig:
  """Makes the config of a dense or a sliced model from its JSON files.

  Hugging Face's `config.json` describes the model before slicing. SliceGPT's JSON is
  None for a dense model.
  """
  model_type = config_json.get('model_type') if isinstance(config_json, dict) else None
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    text = f'{errors.cut(repr(model_type))}; supported: {", ".join(FAMILIES)}'
    raise errors.CheckpointError(f'{CONFIG}: model_type is {text}')
  with errors.named(CONFIG, ValueError):
    dense = _dense(FAMILIES[model_type], config_json)
  return dense if slicing_json is None else _sliced(dense, slicing_json)


def slicing_json(config: models.ModelConfig) -> dict[str, Any]:
  """Makes a sliced model's JSON, whose `json.dumps` equals SliceGPT's file."""
  if not config.sliced:
    raise ValueError(f'only a sliced model has a slicing JSON, got {config.norm=}')
  layers = [config.layer_widths(layer) for layer in range(config.num_layers)]
  numbered = lambda widths: {str(index): width for index, width in enumerate(widths)}
  between = [] if config.parallel_block else [width[1] for width in layers]
  first, last = config.segment_widths[0], config.segment_widths[-1]
  return {
    'hidden_size': config.hidden_size,
    'layers_num': config.num_layers,
    'do_slice_head': last < config.hidden_size,
    'parallel_blocks': config.parallel_block,
    'embedding_dimensions': numbered([first] * (2 if config.learned_positions else 1)),
    'attention_input_dimensions': numbered(width[0] for width in layers),
    'attention_output_dimensions': numbered(between),
    'mlp_input_dimensions': numbered(between),
    'mlp_output_dimensions': numbered(width[-1] for width in layers),
    'head_dimension': last,
    'const_dimension': None,
  }


def _sliced(dense: models.ModelConfig, values: Any) -> models.ModelConfig:
  """Returns the config of the model of which SliceGPT makes this slicing JSON."""
  with errors.named('slicing JSON', KeyError, TypeError, ValueError):
    widths = [values['attention_input_dimensions']['0']]
    for layer in map(str, range(dense.num_layers)):
      if not dense.parallel_block:
        widths.append(values['attention_output_dimensions'][layer])
      widths.append(values['mlp_output_dimensions'][layer])
    if not all(type(width) is int for width in widths):
      raise ValueError('expected integers')
    config = dense.sliced_to(tuple(widths))
    expected = slicing_json(config)
    # SliceGPT knows whether the head was to be sliced, whatever its width.
    if isinstance(values['do_slice_head'], bool):
      expected['do_slice_head'] = values['do_slice_head']
    if differing := [x for x in {*values, *expected} if values[x] != expected[x]]:
      raise ValueError(f'these do not fit the widths: {", ".join(sorted(differing))}')
  return config


def with_own_head(
  files: dict[str, bytes], config: models.ModelConfig
) -> dict[str, bytes]:
  """Returns files whose `config.json` does not tie the head that a model has itself.

  A checkpoint may store its tied head, and rewriting may change it.
  """
  has_config = CONFIG in files and config.family in FAMILIES
  if config.sliced or config.tied_head or not has_config:
    return files
  name, parsed = 'tie_word_embeddings', parse_object(files[CONFIG], CONFIG)
  is_tied = parsed.get(name, FAMILIES[config.family].attributes.get(name))
  untied = to_json(parsed | {name: False}, sort_keys=False)
  return files | {CONFIG: untied} if is_tied else files


def with_dtype(files: dict[str, bytes], dtype: np.dtype) -> dict[str, bytes]:
  """Returns files whose `config.json`, if it names a dtype, names this one."""
  parsed = parse_object(files.get(CONFIG, b''), CONFIG)
  names = [name for name in ('dtype', 'torch_dtype') if name in parsed]
  changed = parsed | dict.fromkeys(names, dtype.name)
  return files | {CONFIG: to_json(changed, sort_keys=False)}


def to_json(value: Any, *, sort_keys: bool = True) -> bytes:
  """Returns the content of a JSON file."""
  return f'{json.dumps(value, indent=2, sort_keys=sort_keys)}\n'.encode()

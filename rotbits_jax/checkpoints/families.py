"""The model families: the names of their tensors and of their config attributes.

A family is the set of models with one `model_type` in `config.json`. To add a family,
add a row to `FAMILIES`: the names of its tensors beside the parameters that they hold,
and a function that reads its `config.json`. Parameters are named by paths, see
`structured.flatten`.

The slicing JSON is the file in which SliceGPT keeps the width of every residual segment
of a sliced model.

Raises:
  CheckpointError: if an attribute is missing, of a wrong type or unknown, or has an
    unsupported value.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import json
import re
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import models
from rotbits_jax.checkpoints import config as config_lib
from rotbits_jax.checkpoints import errors

CONFIG = 'config.json'
SLICING_KEY = 'embedding_dimensions'  # distinguishes a slicing JSON from other files
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
  parse: Callable[[config_lib.Attributes], models.ModelConfig]


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


def _opt(config: config_lib.Attributes) -> models.ModelConfig:
  positions = config.size('max_position_embeddings', most=2**31 - 3)
  config.require(
    do_layer_norm_before=True,
    enable_bias=True,
    layer_norm_elementwise_affine=True,
    _remove_final_layer_norm=False,
    word_embed_proj_dim=config.size('hidden_size'),
  )
  return config_lib.decoder(
    config,
    family='opt',
    intermediate_size=config.size('ffn_dim'),
    num_kv_heads=config.size('num_attention_heads'),
    activation=config_lib.activation(config, 'activation_function', 'relu'),
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    norm='layernorm',
    norm_eps=1e-5,
    max_positions=positions,
    learned_positions=positions + 2,
    tied_head=config.boolean('tie_word_embeddings', True),
  )


def _llama(config: config_lib.Attributes) -> models.ModelConfig:
  config.require(rope_interleaved=False)
  attention_bias = config.boolean('attention_bias', False)
  return config_lib.rotary_gated(
    config,
    family='llama',
    qkv_bias=attention_bias,
    out_bias=attention_bias,
    mlp_bias=config.boolean('mlp_bias', False),
  )


def _mistral(config: config_lib.Attributes) -> models.ModelConfig:
  # These attributes have other defaults in Mistral's config than in Llama's.
  config.demand('max_position_embeddings', 'num_key_value_heads', 'sliding_window')
  window = config_lib.sliding_window(config)
  return config_lib.rotary_gated(config, family='mistral', sliding_window=window)


def _qwen2(config: config_lib.Attributes) -> models.ModelConfig:
  config_lib.require_full_attention(config)
  config.require(use_mrope=False)
  return config_lib.rotary_gated(config, family='qwen2', qkv_bias=True)


def _qwen3(config: config_lib.Attributes) -> models.ModelConfig:
  config.demand('head_dim')
  config_lib.require_full_attention(config)
  attention_bias = config.boolean('attention_bias', False)
  return config_lib.rotary_gated(
    config,
    family='qwen3',
    qkv_bias=attention_bias,
    out_bias=attention_bias,
    qk_norm_eps=config_lib.norm_eps(config),
  )


def _phi3(config: config_lib.Attributes) -> models.ModelConfig:
  config.demand('max_position_embeddings', 'rms_norm_eps')
  config.require(attention_bias=False, rope_scaling=None)
  window = config_lib.sliding_window(config)
  return config_lib.rotary_gated(
    config, family='phi3', rotary_factor=1.0, sliding_window=window
  )


def _phi(config: config_lib.Attributes) -> models.ModelConfig:
  config.require(qk_layernorm=False, tie_word_embeddings=False)
  return config_lib.rotary(
    config,
    family='phi',
    activation=config_lib.activation(config, 'hidden_act', 'gelu_new'),
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
  """Returns a row of `FAMILIES`, whose names an error lists."""
  if name not in FAMILIES:
    raise errors.CheckpointError(
      f'unknown model family {name!r}; known: {", ".join(FAMILIES)}'
    )
  return FAMILIES[name]


def is_buffer(name: str) -> bool:
  """Returns whether the forward pass does not use a tensor with this name."""
  return _BUFFERS.fullmatch(name) is not None


# ---- config.json and the slicing JSON ------------------------------------------------

# Attributes that do not affect the function of a trained model.
_IGNORED = frozenset([
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


def parse_config(
  config_json: dict[str, Any],
  slicing_json: dict[str, Any] | None = None,
  *,
  where: str = 'config.json',
) -> models.ModelConfig:
  """Makes the config of a dense or a sliced model from its JSON files.

  Every attribute is used, known to have no effect, or refused.

  Args:
    config_json: the content of Hugging Face's `config.json`. For a sliced checkpoint
      it describes the model before slicing.
    slicing_json: the content of SliceGPT's JSON; None for a dense model.
    where: name of the `config.json` in error messages.

  Returns:
    The config.
  """
  config = config_lib.Attributes(config_json, where)
  model_type = config.take('model_type')
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    config.refuse('model_type', model_type, ', '.join(FAMILIES))
  config.demand(  # all families have these
    'hidden_size', 'num_attention_heads', 'num_hidden_layers', 'vocab_size'
  )
  config.require(
    is_encoder_decoder=False,
    add_cross_attention=False,
    cross_attention_hidden_size=None,
    pruned_heads={},
  )
  try:
    dense = FAMILIES[model_type].parse(config)
  except errors.CheckpointError:
    raise
  except ValueError as e:
    raise errors.CheckpointError(f'{where}: {e}') from e
  config.finish(_IGNORED)
  return dense if slicing_json is None else _sliced(dense, slicing_json)


def slicing_json(config: models.ModelConfig) -> dict[str, Any]:
  """Makes SliceGPT's JSON for a sliced model: the inverse of `parse_config`.

  Returns:
    The content of the slicing JSON; its `json.dumps` equals SliceGPT's file.

  Raises:
    ValueError: if the model is not sliced.
  """
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


def with_own_head(
  files: dict[str, bytes], config: models.ModelConfig
) -> dict[str, bytes]:
  """Returns files whose `config.json` does not tie the head that a model has itself.

  A checkpoint may store its tied head. Once the model was rewritten, its head and its
  embedding may differ. A config with settings that are not known may tie the head by
  default, so it gets the word that it does not.
  """
  if config.sliced or config.tied_head or CONFIG not in files:
    return files
  parsed = config_lib.parse_object(files[CONFIG], CONFIG)
  is_tied = parsed.get('tie_word_embeddings') is not False
  with contextlib.suppress(errors.CheckpointError):
    is_tied = is_tied and parse_config(parsed).tied_head
  if not is_tied:
    return files
  return _changed(files, parsed | {'tie_word_embeddings': False})


def with_dtype(files: dict[str, bytes], dtype: np.dtype) -> dict[str, bytes]:
  """Returns files whose `config.json`, if it names a dtype, names this one."""
  parsed = config_lib.parse_object(files[CONFIG], CONFIG)
  names = [name for name in ('dtype', 'torch_dtype') if name in parsed]
  return _changed(files, parsed | dict.fromkeys(names, dtype.name))


def _changed(files: dict[str, bytes], parsed: Any) -> dict[str, bytes]:
  """Returns files with another `config.json`."""
  return {**files, CONFIG: f'{json.dumps(parsed, indent=2)}\n'.encode()}


def _sliced(dense: models.ModelConfig, values: Any) -> models.ModelConfig:
  """Returns the config of a sliced model.

  It takes the widths that sublayers write. The JSON must be the one that SliceGPT makes
  for the result.
  """
  try:
    widths = [values['attention_input_dimensions']['0']]
    for layer in map(str, range(dense.num_layers)):
      if not dense.parallel_block:
        widths.append(values['attention_output_dimensions'][layer])
      widths.append(values['mlp_output_dimensions'][layer])
    if not all(type(width) is int for width in widths):
      raise ValueError('expected integers')
    config = dense.sliced_to(tuple(widths))
  except (KeyError, TypeError, ValueError) as e:
    raise errors.CheckpointError(f'slicing JSON: {errors.cut(repr(e))}') from e
  expected = slicing_json(config)
  # SliceGPT knows whether the head was to be sliced, whatever its width.
  if isinstance(values.get('do_slice_head'), bool):
    expected['do_slice_head'] = values['do_slice_head']
  if values != expected:
    differing = sorted(
      name
      for name in values.keys() | expected.keys()
      if name not in values or values[name] != expected.get(name)
    )
    raise errors.CheckpointError(
      f'slicing JSON: these do not fit the widths: {errors.cut(", ".join(differing))}'
    )
  return config

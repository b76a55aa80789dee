"""Conversion of `config.json` and SliceGPT's slicing JSON to and from a `ModelConfig`.

The slicing JSON is the file in which SliceGPT keeps the width of every residual segment
of a sliced model.
"""

from collections.abc import Mapping
from typing import Any

from rotbits_jax import models
from rotbits_jax.checkpoints import attributes
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import families

SLICING_KEY = 'embedding_dimensions'  # distinguishes a slicing JSON from other files


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
  'truncation_ranks',
  'typical_p', 'unsloth_version', 'use_bfloat16', 'use_cache',
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

  Raises:
    CheckpointError: if an attribute is missing, of a wrong type or unknown, or has an
      unsupported value.
  """
  config = attributes.Attributes(config_json, where)
  model_type = config.take('model_type')
  if not isinstance(model_type, str) or model_type not in families.FAMILIES:
    config.refuse('model_type', model_type, ', '.join(families.FAMILIES))
  config.require(
    is_encoder_decoder=False,
    add_cross_attention=False,
    cross_attention_hidden_size=None,
    pruned_heads={},
  )
  try:
    dense = families.FAMILIES[model_type].parse(config)
  except errors.CheckpointError:
    raise
  except ValueError as e:
    raise errors.CheckpointError(f'{where}: {e}') from e
  config.finish(_IGNORED)
  return dense if slicing_json is None else _sliced(dense, slicing_json)


def slicing_json(config: models.ModelConfig) -> dict[str, Any]:
  """Makes SliceGPT's JSON for a sliced model: the inverse of `parse_config`.

  Args:
    config: config of a sliced model.

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
    'embedding_dimensions': numbered([first] * _num_embeddings(config)),
    'attention_input_dimensions': numbered(width[0] for width in layers),
    'attention_output_dimensions': numbered(between),
    'mlp_input_dimensions': numbered(between),
    'mlp_output_dimensions': numbered(width[-1] for width in layers),
    'head_dimension': last,
    'const_dimension': None,
  }


def stop_tokens(files: Mapping[str, bytes]) -> tuple[int, ...]:
  """Returns the tokens that end a text.

  Args:
    files: the checkpoint's sidecar files by name.

  Returns:
    The `eos_token_id` of `generation_config.json` or, if it has none, of `config.json`.
    Empty if neither has one.

  Raises:
    CheckpointError: if a file is not JSON, or if `eos_token_id` is neither a token nor
      a list of tokens.
  """
  for name in ('generation_config.json', 'config.json'):
    parsed = attributes.parse_json(files.get(name, b'{}'), name)
    values = attributes.Attributes(parsed, name)
    stops = values.take('eos_token_id', None)
    if stops is None:
      continue
    stops = stops if isinstance(stops, list) else [stops]
    if not all(type(stop) is int for stop in stops):
      values.refuse('eos_token_id', stops, 'a token, or a list of tokens')
    return tuple(stops)
  return ()


def _num_embeddings(config: models.ModelConfig) -> int:
  return 2 if config.learned_positions else 1


def _sliced(dense: models.ModelConfig, values: Any) -> models.ModelConfig:
  slicing = attributes.Attributes(values, 'slicing JSON')
  slicing.require(
    hidden_size=dense.hidden_size,
    layers_num=dense.num_layers,
    parallel_blocks=dense.parallel_block,
    const_dimension=None,
  )
  slicing.boolean('do_slice_head')
  layers = dense.num_layers
  between = 0 if dense.parallel_block else layers
  embedding = _widths(slicing, 'embedding_dimensions', _num_embeddings(dense))
  attention_in = _widths(slicing, 'attention_input_dimensions', layers)
  attention_out = _widths(slicing, 'attention_output_dimensions', between)
  mlp_in = _widths(slicing, 'mlp_input_dimensions', between)
  mlp_out = _widths(slicing, 'mlp_output_dimensions', layers)
  head = slicing.size('head_dimension')
  slicing.finish()

  # A sublayer must write the width that the next sublayer reads.
  joints = [(width, attention_in[0], 'embedding_dimensions') for width in embedding]
  for layer in range(layers):
    if between:
      key = f'attention_output_dimensions.{layer}'
      joints.append((attention_out[layer], mlp_in[layer], key))
    read = attention_in[layer + 1] if layer + 1 < layers else head
    joints.append((mlp_out[layer], read, f'mlp_output_dimensions.{layer}'))
  for written, read, key in joints:
    if written != read:
      slicing.refuse(key, written, f'{read}, the width that the next sublayer reads')

  widths = [attention_in[0]]
  for layer in range(layers):
    widths += [*attention_out[layer : layer + 1], mlp_out[layer]]
  if max(widths) > dense.hidden_size:
    raise errors.CheckpointError(
      f'slicing JSON: the width {max(widths)} exceeds hidden_size {dense.hidden_size}'
    )
  return dense.sliced_to(tuple(widths))


def _widths(slicing: attributes.Attributes, key: str, count: int) -> list[int]:
  """Reads the widths in an object whose keys are '0', '1', ..."""
  widths = attributes.Attributes(slicing.take(key), f'{slicing.where}: {key}')
  sizes = [widths.size(str(index)) for index in range(count)]
  widths.finish()
  return sizes

"""Conversion of `config.json` and SliceGPT's slicing JSON to and from a `ModelConfig`.

The slicing JSON is the file in which SliceGPT keeps the width of every residual segment
of a sliced model.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import json
from typing import Any

import numpy as np

from rotbits_jax import models
from rotbits_jax.checkpoints import attributes
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import families
from rotbits_jax.checkpoints.contents import CONFIG
from rotbits_jax.system import schema

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
    dense = families.FAMILIES[model_type].parse(config)
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


def check_files(
  files: Mapping[str, bytes], config: models.ModelConfig, stem: str | None
) -> None:
  """Checks that the config in the files of a model is that of the model.

  The files may tie a head that the model has itself, see `with_own_head`. Files that
  are missing, or cannot be parsed, are not compared.

  Args:
    files: the sidecar files by name.
    config: config of the model.
    stem: name of the slicing JSON.

  Raises:
    ValueError: if it is another one. The message names the fields that differ.
  """
  names = [CONFIG, f'{stem}.json'] if config.sliced else [CONFIG]
  if not files.keys() >= {*names}:
    return
  try:
    found = parse_config(*(attributes.parse_object(files[x], x) for x in names))
  except errors.CheckpointError:
    return
  found = dataclasses.replace(found, tied_head=found.tied_head and config.tied_head)
  fields = [field.name for field in dataclasses.fields(config)]
  if other := [x for x in fields if getattr(found, x) != getattr(config, x)]:
    given = ', '.join(names)
    raise ValueError(
      f'{given}: the config of the model has another {", ".join(other)}; '
      f'change {given} in `files`, too'
    )


def with_own_head(
  files: dict[str, bytes], config: models.ModelConfig
) -> dict[str, bytes]:
  """Returns files whose `config.json` does not tie the head that a model has itself.

  A checkpoint may store its tied head. Once the model was rewritten, its head and its
  embedding may differ. A config with settings that are not known may tie the head by
  default, so it gets the word that it does not.

  Raises:
    CheckpointError: if `config.json` is not a JSON object.
  """
  if config.sliced or config.tied_head or CONFIG not in files:
    return files
  parsed = attributes.parse_object(files[CONFIG], CONFIG)
  is_tied = parsed.get('tie_word_embeddings') is not False
  with contextlib.suppress(errors.CheckpointError):
    is_tied = is_tied and parse_config(parsed).tied_head
  if not is_tied:
    return files
  return _changed(files, parsed | {'tie_word_embeddings': False})


def with_dtype(files: dict[str, bytes], dtype: np.dtype) -> dict[str, bytes]:
  """Returns files whose `config.json`, if it names a dtype, names this one.

  Raises:
    CheckpointError: if `config.json` is not a JSON object.
  """
  parsed = attributes.parse_object(files[CONFIG], CONFIG)
  names = [name for name in ('dtype', 'torch_dtype') if name in parsed]
  return _changed(files, parsed | dict.fromkeys(names, dtype.name))


def _changed(files: dict[str, bytes], parsed: Any) -> dict[str, bytes]:
  return {**files, CONFIG: f'{json.dumps(parsed, indent=2)}\n'.encode()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Slicing:
  """The slicing JSON: widths by the index of the layer, as a string."""

  hidden_size: int
  layers_num: int
  do_slice_head: bool
  parallel_blocks: bool
  embedding_dimensions: dict[str, int]
  attention_input_dimensions: dict[str, int]
  attention_output_dimensions: dict[str, int]
  mlp_input_dimensions: dict[str, int]
  mlp_output_dimensions: dict[str, int]
  head_dimension: int
  const_dimension: Any


def _sliced(dense: models.ModelConfig, values: Any) -> models.ModelConfig:
  """Returns the config of a sliced model.

  It takes the widths that sublayers write. The JSON must be the one that SliceGPT makes
  for the result.
  """
  where = 'slicing JSON'
  try:
    given = schema.load(_Slicing, values, where)
    widths = [given.attention_input_dimensions.get('0', 0)]
    for index in map(str, range(dense.num_layers)):
      if not dense.parallel_block:
        widths.append(given.attention_output_dimensions.get(index, 0))
      widths.append(given.mlp_output_dimensions.get(index, 0))
    config = dense.sliced_to(tuple(widths))
  except ValueError as e:
    text = str(e).removeprefix(f'{where}: ')
    raise errors.CheckpointError(f'{where}: {errors.cut(text)}') from e
  expected = slicing_json(config) | {'do_slice_head': given.do_slice_head}
  for name, value in expected.items():
    if values[name] != value:
      raise errors.CheckpointError(
        f'{where}: {name} is {errors.cut(repr(values[name]))}, which does not fit the '
        f'other widths; expected {errors.cut(repr(value))}'
      )
  return config

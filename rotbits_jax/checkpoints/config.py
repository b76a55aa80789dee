"""The JSON files of a checkpoint: `config.json` and the slicing JSON.

The slicing JSON is the file in which SliceGPT keeps the width of every residual segment
of a sliced model.

Raises:
  UnsupportedError: if a file is no JSON, or has an infinite number or the like, see
    `schema.parse`. Configs of families that are not known have these.
  CheckpointError: if an attribute is missing, of a wrong type or
    unknown, or has an unsupported value.
"""

import contextlib
import json
from typing import Any

import numpy as np

from rotbits_jax import models
from rotbits_jax.checkpoints import errors
from rotbits_jax.checkpoints import families
from rotbits_jax.system import schema

CONFIG = 'config.json'
SLICING_KEY = 'embedding_dimensions'  # distinguishes a slicing JSON from other files

_MOST_CONFIG = 1 << 20  # bytes; configs have a few thousand


def parse_object(
  content: bytes, where: str, *, most: int = _MOST_CONFIG
) -> dict[str, Any]:
  """Parses a JSON file of a checkpoint, which errors call `where`.

  `most` bytes are the limit, which bounds memory: the object may take 30 times as much.
  """
  if len(content) > most:
    raise errors.UnsupportedError(f'{where}: the JSON has more than {most} bytes')
  try:
    parsed = schema.parse(content)
    schema.check_depth(parsed)
  except ValueError as e:
    raise errors.UnsupportedError(f'{where}: {e}') from e
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
  known = families.FAMILIES
  model_type = config_json.get('model_type') if isinstance(config_json, dict) else None
  if not isinstance(model_type, str) or model_type not in known:
    text = f'{errors.cut(repr(model_type))}; supported: {", ".join(known)}'
    raise errors.CheckpointError(f'{CONFIG}: model_type is {text}')
  try:
    dense = known[model_type].config(config_json)
  except ValueError as e:
    raise errors.CheckpointError(f'{CONFIG}: {errors.cut(str(e))}') from e
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
  try:
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
  except (KeyError, TypeError, ValueError) as e:
    raise errors.CheckpointError(f'slicing JSON: {errors.cut(repr(e))}') from e
  return config


def with_own_head(
  files: dict[str, bytes], config: models.ModelConfig
) -> dict[str, bytes]:
  """Returns files whose `config.json` does not tie the head that a model has itself.

  A checkpoint may store its tied head, and rewriting may change it. A config with
  settings that are not known may tie the head by default.
  """
  if config.sliced or config.tied_head or CONFIG not in files:
    return files
  parsed = parse_object(files[CONFIG], CONFIG)
  is_tied = parsed.get('tie_word_embeddings') is not False
  with contextlib.suppress(errors.CheckpointError):
    is_tied = is_tied and parse_config(parsed).tied_head
  return _changed(files, parsed, tie_word_embeddings=False) if is_tied else files


def with_dtype(files: dict[str, bytes], dtype: np.dtype) -> dict[str, bytes]:
  """Returns files whose `config.json`, if it names a dtype, names this one."""
  parsed = parse_object(files[CONFIG], CONFIG)
  names = [name for name in ('dtype', 'torch_dtype') if name in parsed]
  return _changed(files, parsed, **dict.fromkeys(names, dtype.name))


def _changed(
  files: dict[str, bytes], parsed: dict[str, Any], **changes: Any
) -> dict[str, bytes]:
  """Returns files with changed attributes of `config.json`."""
  content = json.dumps(parsed | changes, indent=2)
  return {**files, CONFIG: f'{content}\n'.encode()}

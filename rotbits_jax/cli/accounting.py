"""Counts the elements of a model, sliced and stored in each way, from its sizes alone.

  rotbits accounting --model=NAME|PATH --slicing=SPARSITY [--json] [--verbose]
  rotbits accounting --config=EXPERIMENT[:SPARSITY] [--json] [--verbose]

Example:

  rotbits accounting --model=opt-6.7b --slicing=0.25
  rotbits accounting --config=opt_6_7b:0.25 --config.experiment.model.vocab_size=32000

NAME is opt-1.3b, opt-2.7b, opt-6.7b, opt-13b, llama-2-7b or llama-2-13b; PATH is a
dense model's config.json or a directory that has one. EXPERIMENT is the name or the
path of a config file with a model and a sparsity, like those in the folder configs of
the repository. No weights are read. Reductions are against the dense model with an
untied head, at 16 bits an element, without entropy coding; the published ones are those
of arXiv 2410.01309.

JSON:

  model      name or path of the model
  slicing    the part of the hidden size that slicing removes
  width      of the residual stream after slicing
  elements   object: count of elements by way of storing; see the table
  reduction  object: percent saved by way of storing; null where nothing is published
"""

import os
import pathlib
from typing import Any

from absl import flags

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax.checkpoints import attributes
from rotbits_jax.cli import program
from rotbits_jax.evaluation import accounting
from rotbits_jax.evaluation import published

FLAGS = program.Flags()
_MODEL = FLAGS.add('model', 'A name, or a path.')
_SLICING = FLAGS.add(
  'slicing',
  'The part of the hidden size that slicing removes: at least 0, less than 1.',
  float,
)
_CONFIG = FLAGS.config('An experiment, in place of both.')

_LABELS = {
  'dense': 'dense',
  'slicegpt': 'SliceGPT',
  'bits_back_ideal': 'bits-back, ideal',
  'bits_back_published': 'bits-back, published',
  'gauge_fixed': 'gauge-fixed',
  'gauge_fixed_heads': '  and heads',
  'gauge_fixed_heads_retied': '  and retied embedding',
}


def read_config(path: str) -> models.ModelConfig:
  """Reads a `config.json`, or the `config.json` in a directory.

  Raises:
    ValueError: if it is not the config of a known family.
  """
  file = (
    pathlib.Path(path, 'config.json') if os.path.isdir(path) else pathlib.Path(path)
  )
  if file.suffix != '.json':  # it may be a weights file, which is too large to parse
    raise ValueError(f'{file}: neither a config.json nor a directory that has one')
  config_json = attributes.parse_json(file.read_bytes(), str(file))
  return checkpoints.parse_config(config_json, where=str(file))


def to_text(result: dict[str, Any]) -> str:
  """Formats the result as a table. Rows without a value are omitted."""
  lines = [f'{result["model"]} sliced by {result["slicing"]:g} to {result["width"]}']
  lines.append(f'{"":24}{"elements":>16}{"reduction":>12}')
  for name, label in _LABELS.items():
    count = result['elements'].get(name)
    reduction = result['reduction'].get(name)
    if count is None and reduction is None:
      continue
    cells = ['' if count is None else f'{count:,}']
    cells.append('' if reduction is None else f'{reduction:.2f}%')
    lines.append(f'{label:24}{cells[0]:>16}{cells[1]:>12}'.rstrip())
  return '\n'.join(lines)


def read_experiment() -> published.Experiment:
  """Returns the experiment of --config, or that of --model and --slicing.

  Raises:
    flags.Error: if flags are missing or cannot be combined.
    ValueError: if the model is not known, or a config has another form.
  """
  model, slicing = _MODEL.value, _SLICING.value
  fields = FLAGS.fields(_CONFIG)
  if fields is not None:
    if model is not None or slicing is not None:
      raise flags.Error('--config cannot be combined with --model and --slicing')
    if 'experiment' not in fields:
      raise ValueError('--config has no field experiment')
    return published.experiment(fields['experiment'])
  if model is None or slicing is None:
    raise flags.Error(f'--{"model" if model is None else "slicing"}=... is missing')
  known = published.experiments()
  if model.lower() in known:
    return known[model.lower()]._replace(slicing=slicing)
  if not os.path.exists(model):
    names = ', '.join(known)
    raise ValueError(f'unknown model {model!r}: neither a path nor one of {names}')
  return published.Experiment(model, read_config(model), slicing, {})


def main() -> program.Result:
  found = read_experiment()
  counts = accounting.accounting(found.config, found.slicing)
  bits_back = found.bits_back.get(found.slicing)
  result = {
    'model': found.name,
    'slicing': found.slicing,
    'width': counts.width,
    'elements': counts.elements(),
    'reduction': counts.reduction() | {'bits_back_published': bits_back},
  }
  return result, to_text(result)

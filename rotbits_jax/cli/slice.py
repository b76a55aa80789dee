r"""Slices a dense checkpoint with SliceGPT: fewer elements, similar predictions.

  rotbits slice --model=DIR|FILE --output=DIR --sparsity=0.25 --calibration=FILE
    [--dtype=same|float16|bfloat16|float32] [--final_orientation=random|pca]
    [--round_interval=8] [--slice_head] [--sequences=128] [--sequence_length=N]
    [--seed=42] [--encoded=FILE] [--recipe=FILE] [--overwrite] [--json] [--verbose]

Example:

  rotbits slice --model=SmolLM2-135M --output=sliced --sparsity=0.25 \
    --calibration=book.txt --encoded=sliced.rotbits

Every width of the residual stream shrinks by the sparsity, rounded down to a multiple
of the interval. The calibration text decides which directions stay. The output is that
of Microsoft's run_slicegpt.py: <name>_<sparsity>.pt, its .json, and the dense model's
configs and tokenizer. The name is that of the model's directory or file. With --encoded
the file that `rotbits encode --preset=free` makes is written, too, from the elements
before they are rounded. With --recipe the same is written beside the dense model, which
whoever decodes the file passes with --base. Files that exist are replaced with
--overwrite only. Slicing costs quality, most of all in small models: measure it with
`rotbits evaluate`. A small model with a tied head does not even become smaller, because
slicing unties the head from the embedding.

JSON:

  weights      path of the .pt file
  encoded      path of the encoded file, or null
  recipe       path of the encoded file that needs the dense model, or null
  hidden_size  width of the dense model
  width        width of the first segment of the sliced model
  tokens       count of the tokens that calibrated the slicing
"""

import dataclasses
import pathlib

import rotbits_jax
from rotbits_jax import slicing
from rotbits_jax.checkpoints import indices
from rotbits_jax.checkpoints import staging
from rotbits_jax.cli import program
from rotbits_jax.file import inputs
from rotbits_jax.system import outputs

MAX_SEQUENCE_LENGTH = 2048  # SliceGPT's default

FLAGS = program.Flags()
_MODEL = FLAGS.add('model', 'The dense model to slice.', source=True, required=True)
_OUTPUT = FLAGS.add('output', 'The directory to write to.', required=True)
_SPARSITY = FLAGS.add(
  'sparsity',
  'The part of the hidden size to remove: at least 0, less than 1.',
  float,
  required=True,
)
_CALIBRATION = FLAGS.add('calibration', 'A text file in UTF-8.', required=True)
_DTYPE = FLAGS.add(
  'dtype',
  'Dtype of the sliced model; by default that of the dense model.',
  ('same', 'float16', 'bfloat16', 'float32'),
  default='same',
)
_FINAL_ORIENTATION = FLAGS.add(
  'final_orientation',
  'Coordinates of the residual stream: rotated at random, or principal components.',
  slicing.ORIENTATIONS,
  default=slicing.ORIENTATIONS[0],
)
_ROUND_INTERVAL = FLAGS.add(
  'round_interval', 'Widths are multiples of it.', int, 8, lower_bound=1
)
_SLICE_HEAD = FLAGS.add('slice_head', 'Slice the input of the head, too.', bool, False)
_SEQUENCES = FLAGS.add(
  'sequences',
  'Number of sequences of the text to calibrate with, drawn at random.',
  int,
  128,
  lower_bound=1,
)
_SEQUENCE_LENGTH = FLAGS.add(
  'sequence_length',
  'Number of tokens in a sequence; by default the number of positions of the model, '
  f'but at most {MAX_SEQUENCE_LENGTH}.',
  int,
  lower_bound=1,
)
_SEED = FLAGS.add('seed', 'The seed of all that is random.', int, 42, lower_bound=0)
_ENCODED = FLAGS.add(
  'encoded', 'A file for the sliced model, encoded with the preset free.'
)
_RECIPE = FLAGS.add(
  'recipe', 'A file for the sliced model that needs the dense model to be decoded.'
)
_OVERWRITE = FLAGS.add('overwrite', 'Replace existing files.', bool, False)


def main() -> program.Result:
  overwrite = _OVERWRITE.value
  text = program.read_text(_CALIBRATION.value)
  dense = program.read_model(_MODEL.value)
  path = pathlib.Path(_MODEL.value).resolve()
  stem = f'{path.name if path.is_dir() else path.stem}_{_SPARSITY.value}'
  # There are no shards, and no index of them.
  beside = [name for name in dense.files if name != indices.INDEX]
  _check_outputs([f'{stem}.pt', f'{stem}.json', *beside])
  config = dense.model.config
  length = _SEQUENCE_LENGTH.value or min(config.max_positions, MAX_SEQUENCE_LENGTH)
  tokens = slicing.sample_sequences(
    program.read_tokens(dense.files, dense.model.config, text),
    sequences=_SEQUENCES.value,
    length=length,
    seed=_SEED.value,
  )
  same = dense.model.params['embed']['tokens'].dtype.name
  stored_as = same if _DTYPE.value == 'same' else _DTYPE.value
  unrounded = slicing.slice_model(
    dense.model,
    tokens,
    sparsity=_SPARSITY.value,
    round_interval=_ROUND_INTERVAL.value,
    slice_head=_SLICE_HEAD.value,
    final_orientation=_FINAL_ORIENTATION.value,
    seed=_SEED.value,
    progress=True,
  )
  unrounded = dataclasses.replace(unrounded, stored_as=stored_as)
  model = unrounded.rounded()
  checkpoint = slicing.sliced_checkpoint(dense, model, stem)
  rotbits_jax.save_checkpoint(
    checkpoint, _OUTPUT.value, format='slicegpt', overwrite=overwrite
  )
  bases = {_ENCODED.value: None, _RECIPE.value: dense.model}
  for encoded, base in bases.items():
    if encoded is None:
      continue
    rotbits_jax.encode_to_file(
      unrounded,
      encoded,
      preset='free',
      base=base,
      files=checkpoint.files,
      stem=stem,
      overwrite=overwrite,
      progress=True,
    )
  weights = pathlib.Path(_OUTPUT.value, f'{stem}.pt')
  width = model.config.segment_widths[0]
  result = {
    'weights': str(weights),
    'encoded': _ENCODED.value,
    'recipe': _RECIPE.value,
    'hidden_size': config.hidden_size,
    'width': width,
    'tokens': int(tokens.size),
  }
  text = (
    f'wrote {weights}: width {width} of {config.hidden_size}, '
    f'calibrated on {tokens.size:,} tokens'
  )
  return result, program.printable(text)


def _check_outputs(names: list[str]) -> None:
  """Checks that all outputs can be written, before the work begins.

  Raises:
    ValueError: if two are one file, or if one is an input.
    OSError: if one cannot be written.
  """
  directory = outputs.directory_target(_OUTPUT.value)
  inputs.check([directory / name for name in names], [_MODEL.value])
  if directory.exists():
    staging.check_files(directory, names, overwrite=_OVERWRITE.value)
  given = _ENCODED.value, _RECIPE.value
  files = [outputs.resolved(x) for x in given if x is not None]
  if len({*files}) < len(files):
    raise ValueError('--encoded and --recipe are the same file')
  others = {directory, *(directory / name for name in names)}
  others.add(outputs.resolved(_CALIBRATION.value))
  for file in files:
    if file in others:
      raise ValueError(f'{file}: --output, a file in it, or --calibration is the same')
    outputs.check(file, overwrite=_OVERWRITE.value)
  inputs.check(files, [_MODEL.value])

"""Slices a dense checkpoint with SliceGPT: fewer elements, similar predictions.

  rotbits slice SmolLM2-135M SLICED --sparsity=0.25 --text=book.txt

Every width of the residual stream shrinks by the sparsity. The text decides which
directions remain. FOLDER gets the output of Microsoft's run_slicegpt.py:
<name>_<sparsity>.pt, its .json, and the dense model's other files. --encoded writes the
file of `rotbits encode --preset=free`, too, from the weights before they are rounded;
--recipe the same relative to the dense model, which decoding then needs as --base.

JSON: weights, their path; hidden_size of the dense model; width of the first segment of
the sliced model; tokens, how many calibrated it.
"""

import pathlib
from typing import Any

from absl import flags

import rotbits_jax
from rotbits_jax import slicing
from rotbits_jax.cli import program
from rotbits_jax.file import output
from rotbits_jax.system import files
from rotbits_jax.system import outputs

(_OVERWRITE,) = program.shared('overwrite')
_SPARSITY = flags.DEFINE_float(
  'sparsity', None, 'The share of the hidden size to remove.', 0, 1, required=True
)
_TEXT = flags.DEFINE_string('text', None, 'A text to calibrate on.', required=True)
_SLICE_HEAD = flags.DEFINE_bool('slice_head', False, "Slice the head's input, too.")
_LENGTH = flags.DEFINE_integer(
  'sequence_length', None, 'Tokens in a sequence; default: all positions, to 2048.', 1
)
_ENCODED = flags.DEFINE_string('encoded', None, 'Write a file of `free`, too.')
_RECIPE = flags.DEFINE_string('recipe', None, 'The same, given the dense model.')


def main(model: str, folder: str) -> program.Result:
  dense, overwrite = program.read_model(model), _OVERWRITE.value
  path = files.real_path(model)
  stem = f'{path.name if path.is_dir() else path.stem}_{_SPARSITY.value}'
  directory = outputs.directory_target(folder)
  names = f'{stem}.pt', f'{stem}.json', *dense.files
  encodings = (_ENCODED.value, None), (_RECIPE.value, dense.model)
  bases = {file: base for file, base in encodings if file is not None}
  inputs = [model, _TEXT.value]
  for file in bases:
    output.check_path(file, None, inputs=inputs, overwrite=overwrite)
  outputs.check_replaced(directory, names.__contains__, overwrite=overwrite)
  output.check_inputs([directory / name for name in names], inputs)
  with outputs.reserved(directory, *bases):
    return _sliced(dense, directory, stem, bases)


def _sliced(
  dense: rotbits_jax.Checkpoint,
  directory: pathlib.Path,
  stem: str,
  bases: dict[str, Any],
) -> program.Result:
  """Slices a model and writes it.

  Args:
    dense: the dense model.
    directory: the folder to write.
    stem: the name of the weights file without its ending.
    bases: the encoded files to write, each with the model that it is relative to.
  """
  overwrite = _OVERWRITE.value
  config = dense.model.config
  tokens = slicing.sample_sequences(
    program.read_tokens(_TEXT.value, dense.files),
    sequences=128,  # as many as SliceGPT takes
    length=_LENGTH.value or min(config.max_positions, 2048),  # as SliceGPT does
    seed=42,
  )
  unrounded = slicing.slice_model(
    dense.model,
    tokens,
    sparsity=_SPARSITY.value,
    slice_head=_SLICE_HEAD.value,
    progress=True,
  )
  dtype = dense.model.params['embed']['tokens'].dtype.name
  unrounded = unrounded.replace(stored_as=dtype)
  checkpoint = slicing.sliced_checkpoint(dense, unrounded.rounded(), stem)
  rotbits_jax.save_checkpoint(
    checkpoint, directory, format='slicegpt', overwrite=overwrite
  )
  for file, base in bases.items():
    rotbits_jax.encode_to_file(
      checkpoint._replace(model=unrounded),
      file,
      preset='free',
      base=base,
      overwrite=overwrite,
      progress=True,
    )
  width, weights = unrounded.config.segment_widths[0], f'{directory / stem}.pt'
  result = {
    'weights': weights,
    'hidden_size': config.hidden_size,
    'width': width,
    'tokens': int(tokens.size),
  }
  widths = f'width {width} of {config.hidden_size}'
  return result, f'wrote {weights}: {widths}, calibrated on {tokens.size:,} tokens'

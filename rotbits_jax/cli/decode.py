"""Decodes a file into a checkpoint again.

  rotbits decode --input=FILE --output=DIR [--format=safetensors|slicegpt]

`safetensors` writes DIR/model.safetensors with the tensor names, shapes and dtypes of
the checkpoint that was encoded; `slicegpt` the .pt and .json that Microsoft's SliceGPT
reads. The other files that lay beside the checkpoint come back too.
"""

import sys
import typing

from absl import flags

import rotbits_jax
from rotbits_jax.checkpoints.checkpoint import Format
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_INPUT = flags.DEFINE_string(
  'input', None, 'The file to decode.', required=True, flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'The directory to write to.', required=True, flag_values=FLAGS
)
_FORMAT = flags.DEFINE_enum(
  'format',
  'safetensors',
  typing.get_args(Format),
  'The form of the weights.',
  flag_values=FLAGS,
)


def main() -> None:
  program.check_output_directory(_OUTPUT.value)
  checkpoint = rotbits_jax.decode_checkpoint(_INPUT.value, progress=True)
  form = typing.cast(Format, _FORMAT.value)
  rotbits_jax.save_checkpoint(checkpoint, _OUTPUT.value, format=form)
  print(f'wrote {_OUTPUT.value}')


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())

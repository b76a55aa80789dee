"""Decodes a file into a checkpoint again.

  rotbits decode --input=FILE --output=DIR [--format=safetensors|slicegpt]
    [--shard_size=2GB] [--overwrite]

`safetensors` writes DIR/model.safetensors with the tensor names, shapes and dtypes of
the checkpoint that was encoded; `slicegpt` the .pt and .json that Microsoft's SliceGPT
reads. The other files that lay beside the checkpoint come back too. FILE may be the
path that shards were written to, or their index. One layer at a time is in memory.
Files in DIR that exist are replaced with --overwrite only; other files stay.
"""

import sys
import typing

from absl import flags

import rotbits_jax
from rotbits_jax import checkpoints
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
  typing.get_args(checkpoints.Format),
  'The form of the weights.',
  flag_values=FLAGS,
)

_SHARD_SIZE = flags.DEFINE_string(
  'shard_size',
  None,
  'Bytes of one file of weights, at most, like 2GB; one file unless said otherwise.',
  flag_values=FLAGS,
)

_OVERWRITE = flags.DEFINE_bool(
  'overwrite', False, 'Replace files that exist.', flag_values=FLAGS
)


def main() -> None:
  rotbits_jax.decode_to_directory(
    _INPUT.value,
    _OUTPUT.value,
    format=typing.cast(checkpoints.Format, _FORMAT.value),
    shard_size=program.parse_size('shard_size', _SHARD_SIZE.value),
    overwrite=_OVERWRITE.value,
    progress=True,
  )
  print(f'wrote {_OUTPUT.value}')


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())

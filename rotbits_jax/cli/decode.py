"""Decodes a file to a checkpoint.

  rotbits decode --input=FILE --output=DIR [--format=safetensors|slicegpt]
    [--shard_size=2GB] [--dtype=float32|bfloat16|float16] [--overwrite]

The format `safetensors` writes DIR/model.safetensors with the tensor names, shapes and
dtypes of the encoded checkpoint. The format `slicegpt` writes the .pt and .json files
that Microsoft's SliceGPT reads. The other files of the checkpoint are written, too. For
a file in several shards, FILE is the path that was given to `rotbits encode`, or the
index. Only one layer at a time is in memory. Existing files in DIR are replaced only
with --overwrite; other files stay.
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
  'Format of the weights.',
  flag_values=FLAGS,
)

_SHARD_SIZE = flags.DEFINE_string(
  'shard_size',
  None,
  'Greatest size of a weights file, like 2GB. By default there is one file.',
  flag_values=FLAGS,
)

_DTYPE = flags.DEFINE_enum(
  'dtype',
  None,
  ('float32', 'bfloat16', 'float16'),
  'Dtype of the weights. By default they have that of the encoded checkpoint.',
  flag_values=FLAGS,
)

_OVERWRITE = flags.DEFINE_bool(
  'overwrite', False, 'Replace existing files.', flag_values=FLAGS
)


def main() -> None:
  rotbits_jax.decode_to_directory(
    _INPUT.value,
    _OUTPUT.value,
    format=typing.cast(checkpoints.Format, _FORMAT.value),
    shard_size=program.parse_size('shard_size', _SHARD_SIZE.value),
    dtype=_DTYPE.value,
    overwrite=_OVERWRITE.value,
    progress=True,
  )
  print(f'wrote {_OUTPUT.value}')


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())

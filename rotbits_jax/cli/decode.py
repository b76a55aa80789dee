"""Decodes a file to a checkpoint.

  rotbits decode --input=FILE --output=DIR [--format=safetensors|slicegpt|transformers]
    [--shard_size=2GB] [--dtype=float32|bfloat16|float16] [--overwrite]
    [--json] [--verbose]

Example:

  rotbits decode --input=smollm2.rotbits --output=SmolLM2-again

The weights get the tensor names, shapes and dtypes of the checkpoint that was encoded,
in DIR/model.safetensors or, with --shard_size, in shards and an index, whatever files
they came from. The other files come back too: configs, tokenizer, license, model card,
code. `slicegpt` writes the .pt and .json that Microsoft's SliceGPT reads. Plain tensors
(a checkpoint of an unknown family) come back in the files that they were in, byte for
byte. FILE may be the path that shards were written to, or their index. One layer at a
time is in memory. Files in DIR that exist are replaced with --overwrite only; other
files stay.

A dense checkpoint loads in transformers. A sliced one does after --format=transformers,
which writes the code of the model, too:

  AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

`rotbits generate --model=FILE` runs it, too, and after --format=slicegpt so does
Microsoft's SliceGPT:

  from slicegpt import hf_utils
  model, tokenizer = hf_utils.load_sliced_model(NAME, DIR, sparsity=0.25)

JSON:

  output  the directory
  files   list of the names of the files in it
  bytes   bytes of these files
  sliced  whether the model is sliced; null for plain tensors
"""

import pathlib
import sys
import typing

from absl import flags

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import file
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
_JSON, _VERBOSE = program.define_output_flags(FLAGS)

SLICED = """The model is sliced: transformers cannot load this folder. To run it:
  rotbits generate --model={output} --prompt="Once upon a time"
or decode with --format=transformers and load it in transformers, or with
--format=slicegpt and load it with Microsoft's SliceGPT; see rotbits decode --help."""


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
  with file.Reader(_INPUT.value) as reader:
    sliced = None if reader.config is None else reader.config.sliced
  written = [path for path in pathlib.Path(_OUTPUT.value).iterdir() if path.is_file()]
  if _JSON.value:
    result = {
      'output': _OUTPUT.value,
      'files': sorted(path.name for path in written),
      'bytes': sum(path.stat().st_size for path in written),
      'sliced': sliced,
    }
    program.print_json(result)
    return
  program.say(f'wrote {_OUTPUT.value}')
  if sliced and _FORMAT.value == 'safetensors':
    for line in SLICED.format(output=_OUTPUT.value).splitlines():
      program.say(line)


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())

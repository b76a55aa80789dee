"""Decodes a file to a checkpoint.

  rotbits decode --input=FILE --output=DIR [--base=DIR|FILE]
    [--format=safetensors|slicegpt|transformers] [--shard_size=2GB]
    [--dtype=float32|bfloat16|float16] [--overwrite] [--json] [--verbose]

Example:

  rotbits decode --input=smollm2.rotbits --output=SmolLM2-again

The weights get the tensor names, shapes and dtypes of the checkpoint that was encoded,
in DIR/model.safetensors; in the shards that it had, if they were safetensors; or, with
--shard_size, in shards of that size. Weights from .bin files come back as safetensors,
see `rotbits encode --same_files`; so do those of a GGUF file, quantised ones rounded to
float16. The other files come back too: configs, tokenizer,
license, model card, code. `slicegpt` writes the .pt and .json that Microsoft's SliceGPT
reads. Plain tensors (a checkpoint of an unknown family) come back in the files that
they were in, byte for byte. FILE may be the path that shards were written to, or their
index. One layer at a time is in memory. Files in DIR that exist are replaced with
--overwrite only, and never those of FILE or of the base; other files stay.

A dense checkpoint loads in transformers. A sliced one does after --format=transformers,
which writes the code of the model, too:

  AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

`rotbits generate --model=FILE` runs it, too, and after --format=slicegpt so does
Microsoft's SliceGPT:

  from slicegpt import hf_utils
  model, tokenizer = hf_utils.load_sliced_model(NAME, DIR, sparsity=0.25)

JSON:

  output  the directory
  files   list of the files in it and in its sub-folders, by their paths in it
  bytes   bytes of these files
  sliced  whether the model is sliced; null for plain tensors
"""

import typing

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import file
from rotbits_jax.cli import program
from rotbits_jax.system import outputs

FLAGS = program.Flags()
_INPUT = FLAGS.add('input', 'The file to decode.', source=True, required=True)
_BASE = FLAGS.bases()
_OUTPUT = FLAGS.add('output', 'The directory to write to.', required=True)
_FORMAT = FLAGS.add(
  'format',
  'Format of the weights.',
  typing.get_args(checkpoints.Format),
  default='safetensors',
)
_SHARD_SIZE = FLAGS.add(
  'shard_size',
  'Greatest size of a weights file, like 2GB. By default there are the shards that the '
  'checkpoint had, or one file.',
)
_DTYPE = FLAGS.add(
  'dtype',
  'Dtype of the weights. By default they have that of the encoded checkpoint.',
  program.DTYPES,
)
_OVERWRITE = FLAGS.add('overwrite', 'Replace existing files.', bool, False)

SLICED = """The model is sliced: transformers cannot load this folder. To run it:
  rotbits generate --model={output} --prompt="Once upon a time"
or decode with --format=transformers and load it in transformers, or with
--format=slicegpt and load it with Microsoft's SliceGPT; see rotbits decode --help."""


def main() -> program.Result:
  rotbits_jax.decode_to_directory(
    _INPUT.value,
    _OUTPUT.value,
    base=_BASE.value,
    format=_FORMAT.value,
    shard_size=program.parse_size('shard_size', _SHARD_SIZE.value),
    dtype=_DTYPE.value,
    overwrite=_OVERWRITE.value,
    progress=True,
  )
  with file.Reader(_INPUT.value) as reader:
    sliced = None if reader.config is None else reader.config.sliced
  folder = outputs.resolved(_OUTPUT.value)
  written = [path for path in folder.rglob('*') if path.is_file()]
  result = {
    'output': _OUTPUT.value,
    'files': sorted(path.relative_to(folder).as_posix() for path in written),
    'bytes': sum(path.stat().st_size for path in written),
    'sliced': sliced,
  }
  lines = [f'wrote {_OUTPUT.value}']
  if sliced and _FORMAT.value == 'safetensors':
    lines += SLICED.format(output=_OUTPUT.value).splitlines()
  return result, '\n'.join(map(program.printable, lines))
